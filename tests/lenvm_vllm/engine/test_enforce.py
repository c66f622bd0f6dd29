"""Guard rails in rows of logits: exact, never emptying a row, whatever the value server does.

Legend: V vocabulary. Token 0 is the end.
"""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lenvm_vllm.engine.enforce import enforce_inplace
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.text.letters import Letters
from lenvm_vllm.text.parts import Markers
from lenvm_vllm.values.client import CircuitOpen, TimedOut
from tests.support.fakes import EOS, Server, V, exactly, params, same_bits
from tests.support.real_tokenizers import real
from tests.support.v1_batch import added, apply, processor_with, rails_only, update

INF = math.inf


ERRORS = [None, TimedOut("slow"), CircuitOpen("not yet"), RuntimeError("bug"), KeyError("x")]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("end", [-9.0, 0.0, 9.0])
def test_rails_land_exactly_whatever_the_server_does(error: Any, end: float) -> None:
    rng = random.Random(0)
    served = processor_with(Server(error))
    outputs: list[list[int]] = [[] for _ in range(4)]
    targets = [1, 2, 7, 20]
    served.update_state(
        update(
            added=[
                added(row, params(exactly(tokens), temperature=0.8), outputs[row])
                for row, tokens in enumerate(targets)
            ]
        )
    )
    for _ in range(20):
        logits = torch.randn(4, V)
        logits[:, EOS] = end
        p = torch.softmax(apply(served, logits).double() / 0.8, dim=-1).tolist()
        for row, output in enumerate(outputs):
            if output[-1:] != [EOS]:
                output.append(rng.choices(range(V), p[row])[0])
            if output[-1] == EOS:
                served.update_state(update(removed=[row]))
    assert [len(output) for output in outputs] == targets
    assert all(output.index(EOS) == len(output) - 1 for output in outputs)


def railed(logits: Tensor, target: Any, generated: int = 0, **fields: Any) -> Tensor:
    """(V,) after the rails alone; logits (V,)."""
    served = rails_only()
    served.update_state(update(added=[added(0, params(target, **fields), [9] * generated)]))
    return apply(served, logits[None])[0]


@pytest.mark.parametrize(
    ("target", "first", "last"),
    [
        ({"length_target": 10, "length_tolerance": 0.2}, 8, 12),
        ({"length_target": 10, "length_mode": "at_least"}, 10, None),
        ({"length_target": 10, "length_mode": "at_most"}, 1, 10),
        ({"length_target": 10, "length_tolerance": "off"}, 1, None),
        ({"length_mode": "tilt", "length_beta": 1.0}, 1, None),
    ],
)
def test_the_end_is_closed_open_or_due(target: Any, first: int, last: int | None) -> None:
    logits = torch.randn(V)
    for number in range(1, 15):
        after = railed(logits, target, number - 1, stop_token_ids=[4])
        expected = logits.clone()
        if number < first:
            expected[[EOS, 4]] = -INF
        elif last is not None and number >= last:
            expected[:] = -INF
            expected[[EOS, 4]] = logits[[EOS, 4]]
        assert same_bits(after, expected)


def test_tokens_not_known_yet_count() -> None:
    """Asynchronous scheduling: -1 is a token all the same."""
    served = rails_only()
    served.update_state(update(added=[added(0, params(exactly(3)), [9, -1])]))
    assert apply(served, torch.zeros(1, V))[0].isfinite().nonzero()[:, 0].tolist() == [EOS]


@pytest.mark.parametrize("target", [exactly(1), exactly(9)])
@pytest.mark.parametrize("open_tokens", [[EOS], [9], [EOS, 9], [5], []])
@pytest.mark.parametrize("down", [True, False])
def test_a_row_is_never_emptied_nor_opened(target: Any, open_tokens: list[int], down: bool) -> None:
    """What a grammar forbids stays forbidden, and what it allows alone is taken."""
    served = rails_only() if down else processor_with(Server())
    served.update_state(update(added=[added(0, params(target, stop_token_ids=[5]))]))
    logits = torch.full((1, V), -INF)
    logits[0, open_tokens] = 1.5
    left = (apply(served, logits)[0] > -INF).nonzero()[:, 0].tolist()
    ends = [token for token in open_tokens if token in (EOS, 5)]
    others = [token for token in open_tokens if token not in ends]
    due = target["length_target"] == 1
    assert left == ((ends or others) if due else (others or ends))


@pytest.mark.parametrize("target", [exactly(1), exactly(9)])
@pytest.mark.parametrize("eos", [V, V + 3, -1, -V - 3])
def test_ends_beyond_the_vocabulary(target: Any, eos: int) -> None:
    logits = torch.randn(V)
    assert same_bits(railed(logits, target, eos=eos), logits)


# ---- what else a request may ask for


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_a_token_that_is_not_known_yet_ends_no_sentence(unit: str) -> None:
    """At a limit of words the text is decoded, which tokenizers refuse to do with a -1."""
    tokenizer, asked = real("byte-level"), LengthTarget.parse({unit: 2, "mode": "at_most"})
    letters = Letters(tokenizer, Markers())
    text = [*tokenizer.encode("a." if unit == "characters" else "One two."), -1]
    state = RequestState(asked, [9], text, [2], counter=letters.counter(unit, specials=False))
    logits = torch.zeros(1, len(tokenizer))
    enforce_inplace(logits, {0: state}, letters)
    assert not logits.isneginf().all()


def test_a_forced_row_is_copied_once() -> None:
    """It is as wide as the vocabulary."""
    served = processor_with(Server())
    served.update_state(update(added=[added(0, params(exactly(1)))]))
    with WideCopies() as copies:
        served.apply(torch.zeros(1, V))
    assert copies.count == 1


class WideCopies(TorchDispatchMode):
    """Counts rows of logits that are taken out of a batch."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten.index.Tensor and made.shape == (1, V)
        return made
