"""What is found once a token, against a text that is read anew each time."""

import random
from typing import Any

import pytest

from lenvm_vllm.engine.completion import once_a_token
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.text.letters import Letters
from lenvm_vllm.text.parts import Markers
from tests.support.real_tokenizers import real

TOKENIZER = real("byte-level")
START, OVER, CALL, CALLED, END = 1000, 1001, 1002, 1003, 2
MARKERS = Markers((START,), (OVER,), {CALL: CALLED})
LETTERS = Letters(TOKENIZER, MARKERS)
TEXT = TOKENIZER.encode("So it is. A 語 and more words.", add_special_tokens=False)
# Of the text itself, and not of what a step has forced or kept free.
FACTS = sorted({*once_a_token.names} - {"parts"})


def text_of(target: dict[str, Any], output: list[int]) -> RequestState:
    asked = LengthTarget.parse(target)
    counter = LETTERS.counter(asked.unit, specials=False)
    return RequestState(asked, [9, *TEXT[:4]], output, [END], MARKERS, counter, 60)


@pytest.mark.parametrize("scope", ["completion", "answer", "thinking"])
@pytest.mark.parametrize(
    "length",
    [
        {"tokens": 30},
        {"tokens": 30, "every": 3},
        {"mode": "at_most", "words": 12},
        {"mode": "at_least", "characters": 40},
        {"mode": "tilt", "beta": -2.0},
    ],
)
def test_it_is_that_of_a_text_read_anew(length: dict[str, Any], scope: str) -> None:
    """After any token, while some are not known yet, and where a text begins anew."""
    rng = random.Random(0)
    target = length | {"scope": scope}
    state = text_of(target, [])
    for step in range(150):
        if step % 50 == 49:
            state.output_ids[:] = [START] * rng.randrange(2)
        elif state.output_ids[-1:] == [-1] and rng.random() < 0.7:
            state.output_ids[-1] = rng.choice(TEXT)
        else:
            state.output_ids.append(
                rng.choice([*TEXT, START, OVER, OVER, CALL, CALLED, CALLED, -1])
            )
            if -1 in state.output_ids[:-1]:  # all before it are known when one comes
                state.output_ids[:] = [t if t >= 0 else TEXT[0] for t in state.output_ids]
        state.renew()
        fresh = text_of(target, [*state.output_ids])
        for fact in rng.sample(FACTS, len(FACTS)):
            assert getattr(state, fact) == getattr(fresh, fact), fact
