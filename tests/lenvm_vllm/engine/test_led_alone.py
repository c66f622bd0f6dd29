"""Texts that have no values: their rails hold, and they end where a sentence does, as do those
with values where no other sentence fits."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams

from lenvm_vllm.engine.messages import NOBODY
from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.values.client import TimedOut
from tests.support import fakes, toy
from tests.support.real_tokenizers import real
from value_server.contract.units import count

TEXTS = 40
TOKENIZER = real("byte-level")
END = TOKENIZER.eos_token_id
(STOP,) = TOKENIZER.encode(".", add_special_tokens=False)
SAID = " the cat and old river was never in its long house of stone while rain fell"
WORDS = TOKENIZER.encode(SAID, add_special_tokens=False)  # a token each
(LINE,) = TOKENIZER.encode("\n", add_special_tokens=False)
SIZE = max(*WORDS, STOP, LINE, END) + 1  # of the vocabulary, as far as it is used
LOG_WORDS = torch.linspace(0, -2, len(WORDS)).log_softmax(-1)


def next_logits(text: list[int], rng: random.Random, rare: float = 1.0) -> Tensor:
    """Of a model whose sentences have six words or more, and which hardly ever ends by itself.

    rare: what its full stops are less likely by.
    """
    here = len(text) - max((i + 1 for i, token in enumerate(text) if token == STOP), default=0)
    stop = 0.0 if here < 3 else 0.002 if here < 6 else rng.choice([0.02, 0.1, 0.4])
    stop *= rare
    end = 2e-3 if text and here == 0 else 1e-7
    logits = torch.full((SIZE,), -math.inf)
    logits[WORDS] = LOG_WORDS + math.log(1 - stop - end)
    logits[STOP], logits[END] = math.log(stop or 1e-7), math.log(end)
    logits[LINE] = -20.0
    return logits


def write(
    target: dict[str, Any], server: Any, seed: int = 0, rare: float = 1.0, **sampling: Any
) -> list[RequestState]:
    rng, made = random.Random(seed), SamplingParams(max_tokens=600, **sampling)
    made.extra_args = LengthTarget.parse(target).to_xargs()
    made.update_from_generation_config({}, END)
    rows = EngineRows(fakes.config(), fakes.replicas_of(server))
    opened = [rows.open(made, [1, 2], []) for _ in range(TEXTS)]
    states = [state for state in opened if state is not None]
    while running := [state for state in states if state.output_ids[-1:] != [END]]:
        logits = torch.stack([next_logits(state.output_ids, rng, rare) for state in running])
        rows.tell(running)
        rows.steer_inplace(logits, dict(enumerate(running)))
        for state, p in zip(running, logits.softmax(-1), strict=True):
            state.output_ids.append(int(p.multinomial(1)))
    return states


@pytest.fixture(autouse=True)
def _tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lenvm_vllm.engine.rows.tokenizer_of", lambda config: TOKENIZER)
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("target", "least", "most"),
    [
        ({"tokens": 100}, 90, 110),
        ({"tokens": 100, "policy": "greedy"}, 90, 110),
        ({"tokens": 60, "tolerance": 0.2}, 48, 72),
        ({"mode": "at_most", "tokens": 80}, 2, 80),
        ({"mode": "range", "min_tokens": 50, "max_tokens": 80}, 50, 80),
        ({"words": 80}, 72, 88),
        ({"mode": "at_most", "characters": 300}, 1, 300),
    ],
)
def test_texts_without_values_end_with_a_sentence(
    target: dict[str, Any], least: int, most: int
) -> None:
    states = write(target, fakes.Server(TimedOut("slow")))
    assert not any(state.valued for state in states)
    texts = [TOKENIZER.decode(state.output_ids[:-1]) for state in states]
    unit = states[0].target.unit
    sizes = [
        len(state.output_ids) if unit == "tokens" else count(text, unit)
        for state, text in zip(states, texts, strict=True)
    ]
    assert least <= min(sizes)
    assert max(sizes) <= most
    assert sum(text.endswith(".") for text in texts) >= 0.85 * TEXTS


@pytest.mark.parametrize(
    "target",
    [{"words": 60, "tolerance": 0}, {"mode": "range", "min_words": 60, "max_words": 60}],
)
def test_no_sentence_is_ended_where_another_word_has_to_follow(target: dict[str, Any]) -> None:
    """It would stand alone at the end, and most sentences here have six words."""
    states = write(target, fakes.Server(TimedOut("slow")))
    texts = [TOKENIZER.decode(state.output_ids[:-1]) for state in states]
    assert {count(text, "words") for text in texts} == {60}
    assert sum(text.endswith(".") for text in texts) >= 0.75 * TEXTS


@pytest.mark.parametrize(
    "target",
    [
        {"tokens": 60},
        {"tokens": 60, "tolerance": 0},
        {"mode": "range", "min_tokens": 60, "max_tokens": 60},
        {"mode": "at_most", "tokens": 80},
        {"mode": "range", "min_tokens": 50, "max_tokens": 80},
        {"words": 80},
    ],
)
def test_a_full_stop_needs_no_place_in_the_cut(target: dict[str, Any]) -> None:
    """Ten words are likelier than it in each step, and the request takes five. Where but one token
    may be the last one, empty lines fill a text up to it."""
    states = write(target, fakes.Server(TimedOut("slow")), rare=0.02, top_k=5)
    texts = [TOKENIZER.decode(state.output_ids[:-1]) for state in states]
    assert sum(text.rstrip("\n").endswith(".") for text in texts) >= 0.9 * TEXTS
    assert not any(text.endswith("\n" * 5) for text in texts)
    if target.get("tolerance") == 0 or target.get("min_tokens") == 60:
        assert {len(state.output_ids) for state in states} == {60}
    if "mode" not in target:  # it comes in the landing alone
        assert not any("." in text.rstrip(".\n") for text in texts)


# ---- one step


class Whole:
    """Sentences of ten tokens, of which one has ended; `stops` end one."""

    breaks: tuple[int, ...] = ()
    line = None

    def __init__(self, whole: bool = True, stops: tuple[int, ...] = ()) -> None:
        self.ids = stops
        self.is_whole = lambda text, own: whole
        self.tokens_a_sentence = lambda text: 10.0

    def ends(self, text: list[int], tokens: list[int]) -> list[bool]:
        assert -1 not in text
        return [token in self.ids for token in tokens]


def after(
    state: RequestState, sentences: Any = None, valued: bool = False, **closed: Any
) -> dict[int, float]:
    """The next token's probabilities, of an unlikely end. valued: whether the server has values."""
    server = toy.Server()
    server.pending = [] if valued else [0]
    logits = toy.flat_logits(1, (toy.EOS, 10, 20, 40, 80))
    logits[:, toy.EOS] = -5.0
    logits[:, closed.get("closed", [])] = -math.inf
    p = toy.steered(toy.guide_of(server, sentences), logits, {0: state}).softmax(-1)[0]
    assert bool(state.valued) == valued
    return {token: float(p[token]) for token in p.nonzero()[:, 0].tolist()}


def text_of(tokens: int, target: Any = 30, **fields: Any) -> RequestState:
    return toy.request(target, output=[50] * tokens, **fields)


def test_a_finished_sentence_in_the_landing_is_the_end_where_no_other_fits() -> None:
    assert after(text_of(29), Whole()) == {toy.EOS: 1.0}
    assert 0 < after(text_of(29), Whole(whole=False))[toy.EOS] < 0.5
    assert toy.EOS not in after(text_of(20), Whole())  # before the landing
    limit = {"mode": "at_most", "tokens": 30}
    assert after(text_of(25, limit), Whole()) == {toy.EOS: 1.0}
    assert len(after(text_of(10, limit), Whole())) == 5


def test_values_do_not_keep_a_finished_sentence_from_being_the_end() -> None:
    assert after(text_of(29), Whole(), valued=True) == {toy.EOS: 1.0}
    assert 0 < after(text_of(29), Whole(whole=False), valued=True)[toy.EOS] < 0.5
    assert toy.EOS not in after(text_of(20), Whole(), valued=True)  # before the landing


@pytest.mark.parametrize(("policy", "chosen"), [("project", toy.EOS), ("greedy", 1)])
def test_the_greedy_policy_goes_by_its_values(policy: str, chosen: int) -> None:
    """Of 30 tokens one remains behind the next, as token 1 promises."""
    state = text_of(28, {"tokens": 30, "policy": policy})
    logits = toy.flat_logits(1, (toy.EOS, 1, 10))
    p = toy.steered(toy.guide_of(toy.Server(), Whole()), logits, {0: state}).softmax(-1)[0]
    assert p.nonzero()[:, 0].tolist() == [chosen]


def test_an_end_that_cannot_come_is_not_forced() -> None:
    """It is no token of the vocabulary, or a grammar has removed it."""
    assert after(text_of(29, eos_ids=[toy.EOS, 10_000]), Whole()) == {toy.EOS: 1.0}
    assert sorted(after(text_of(29), Whole(), closed=[toy.EOS])) == [10, 20, 40, 80]


def test_ends_gain_through_the_landing() -> None:
    ends = [after(text_of(tokens))[toy.EOS] for tokens in (29, 30, 31)]
    assert ends == sorted(ends)
    assert ends[0] < 0.02 < 0.1 < ends[-1]


def test_no_end_comes_too_early() -> None:
    at_least = {"mode": "at_least", "tokens": 90}
    assert toy.EOS not in after(text_of(20, at_least | {"tolerance": 0.1}))
    assert 0 < after(text_of(20, at_least))[toy.EOS] < 0.01  # without rails its own
    assert toy.EOS not in after(text_of(20, 90))


@pytest.mark.parametrize(
    "target",
    [
        {"mode": "tilt", "beta": -5.0},
        {"mode": "at_most", "tokens": 300},
        {"mode": "at_least", "tokens": 5},
    ],
)
def test_what_needs_no_lead_stays_as_it_is(target: dict[str, Any]) -> None:
    server = toy.Server()
    server.pending = [0]
    assert toy.guide_of(server).plan(toy.flat_logits(1), {0: text_of(9, target)}) is None
    assert len(server.requests) == 1


def test_no_end_is_brought_about_below_the_lower_limit_of_a_range() -> None:
    """Nor is there any with rails; without them it is as likely as by itself."""
    target = {"mode": "range", "min_tokens": 95, "max_tokens": 100}
    assert toy.EOS not in after(text_of(85, target | {"tolerance": 0.1}), Whole())
    assert 0 < after(text_of(85, target), Whole())[toy.EOS] < 0.01
    assert after(text_of(95, target), Whole()) == {toy.EOS: 1.0}


def test_behind_the_landing_of_a_text_without_rails_any_end_is_taken() -> None:
    """Its landing closes at 33 tokens."""
    assert after(text_of(50)) == {toy.EOS: 1.0}
    assert after(text_of(50), Whole(), closed=[toy.EOS]) != {toy.EOS: 1.0}


def test_a_token_that_is_not_known_yet_costs_no_other_row_its_values() -> None:
    server = toy.Server()
    guide = toy.guide_of(server, Whole(stops=(20,)))
    states = {0: text_of(29), 1: text_of(5)}
    states[0].output_ids.append(-1)
    assert toy.guided_rows(guide, toy.flat_logits(2), states) == [1]


def rows_told(server: fakes.Server) -> int:
    return sum(len(request.sessions) for request in server.requests)


@pytest.mark.parametrize("target", [{"tokens": 60}, {"mode": "at_most", "words": 50}])
def test_the_landing_alone_asks_for_no_values(target: dict[str, Any]) -> None:
    """The same texts as with values that never come, and of a server that has them no call."""
    torch.manual_seed(1)
    lost = write(target, fakes.Server(TimedOut("slow")))
    server = fakes.Server(gamma=NOBODY.gamma, vocab_size=SIZE)
    torch.manual_seed(1)
    alone = write(target | {"policy": "landing"}, server)
    assert [state.output_ids for state in alone] == [state.output_ids for state in lost]
    assert (rows_told(server), server.calls) == (0, 0)
    assert not any(state.steered for state in alone)


def test_the_rails_alone_lead_nothing() -> None:
    """Of these texts, which hardly end by themselves, all end at the upper rail."""
    server = fakes.Server()
    states = write({"tokens": 60, "policy": "rails"}, server)
    assert {len(state.output_ids) for state in states} == {66}
    assert (rows_told(server), server.calls) == (0, 0)
    assert not any(state.landing or state.steered for state in states)
