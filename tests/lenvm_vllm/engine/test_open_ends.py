"""No text ends in an open code block, in a bare number of a list or at the point of a number, and
its limits hold all the same. The model writes at random, and no values come."""

import math
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams

from lenvm_vllm.engine.enforce import enforce_inplace
from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.text.blocks import FENCE
from lenvm_vllm.text.letters import Letters
from lenvm_vllm.text.parts import Markers
from lenvm_vllm.values.client import TimedOut
from tests.support import fakes
from tests.support.real_tokenizers import real
from value_server.contract.units import count

TEXTS = 24
TOKENIZER = real("byte-level")
END = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


LINE, FENCED = ids("\n")[0], ids("```")[0]
CODE = [token for text in (" x", " =", " 10", "()", ".", "：", "变", "\n\n") for token in ids(text)]  # noqa: RUF001
DIGIT, POINT = ids("0123456789"), ids(".")
LIST = [token for text in (" one", " two", " the", " of", "y") for token in ids(text)]


def opened(target: dict[str, Any], prompt: list[int], max_tokens: int = 400) -> Any:
    made = SamplingParams(max_tokens=max_tokens)
    made.extra_args = LengthTarget.parse(target).to_xargs()
    made.update_from_generation_config({}, END)
    rows = EngineRows(fakes.config(), fakes.replicas_of(fakes.Server(TimedOut("slow"))))
    return rows, [rows.open(made, prompt, []) for _ in range(TEXTS)]


def code_logits(text: list[int], rng: random.Random) -> Tensor:
    """It opens blocks and lines, and hardly ever closes or ends one."""
    logits = torch.full((len(TOKENIZER),), -math.inf)
    logits[CODE], logits[LINE], logits[END] = 0.0, 1.0, -12.0
    at_start = not text or text[-1] == LINE
    logits[FENCED] = 1.5 if at_start and FENCED not in text else -14.0
    return logits


def list_logits(text: list[int], rng: random.Random) -> Tensor:
    """Items of some words: the number, a full stop, and no sentence ends."""
    logits = torch.full((len(TOKENIZER),), -20.0)
    logits[LIST], logits[LINE] = 0.0, 1.0
    if not text or text[-1] == LINE:
        logits[ids("7")] = 9.0
    elif text[-1] in ids("7"):
        logits[ids(".")] = 9.0
    elif text[-1] in ids("."):
        logits[LINE] = -20.0
    return logits


def number_logits(text: list[int], rng: random.Random) -> Tensor:
    """Sentences of some words, with numbers that have a point in their middle."""
    logits = torch.full((len(TOKENIZER),), -20.0)
    if text and text[-1] in POINT:
        logits[DIGIT if len(text) > 1 and text[-2] in DIGIT else LIST] = 0.0
    elif text and text[-1] in DIGIT:
        logits[POINT if len(text) < 2 or text[-2] not in POINT else LIST] = 0.0
    else:
        logits[LIST], logits[DIGIT], logits[POINT] = 0.0, -1.0, -2.0
    return logits


def write(target: dict[str, Any], next_logits: Any, prefix: str = "", **fields: Any) -> list[str]:
    """The texts behind `prefix`, of which the prompt holds what the target says."""
    rng = random.Random(0)
    torch.manual_seed(0)
    rows, states = opened(target, [1, 2, *ids(prefix)], **fields)
    while running := [s for s in states if s.output_ids[-1:] != [END]]:
        logits = torch.stack([next_logits(s.output_ids, rng) for s in running])
        rows.tell(running)
        rows.steer_inplace(logits, dict(enumerate(running)))
        for state, p in zip(running, logits.softmax(-1), strict=True):
            state.output_ids.append(int(p.multinomial(1)))
    check_limits(target, states)
    return [prefix + TOKENIZER.decode(state.output_ids[:-1]) for state in states]


def check_limits(target: dict[str, Any], states: list[RequestState]) -> None:
    asked = states[0].target
    low, high = asked.limits
    if asked.mode == "equal_to":
        low, high = math.ceil(low * (1 - asked.tolerance)), math.floor(high * (1 + asked.tolerance))
    for state in states:
        text = TOKENIZER.decode(state.output_ids[:-1])
        size = len(state.output_ids) if asked.unit == "tokens" else count(text, asked.unit)
        assert size >= low or asked.mode == "at_most"
        assert size <= high


@pytest.fixture(autouse=True)
def _tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lenvm_vllm.engine.rows.tokenizer_of", lambda config: TOKENIZER)


@pytest.mark.parametrize(
    "target",
    [
        {"tokens": 60},
        {"tokens": 40, "tolerance": 0},
        {"tokens": 50, "mode": "at_most"},
        {"mode": "range", "min_tokens": 30, "max_tokens": 40},
        {"words": 30},
        {"words": 30, "tolerance": 0},
        {"words": 40, "mode": "at_most"},
        {"characters": 120},
        {"characters": 90, "mode": "at_most"},
    ],
)
def test_no_text_ends_in_an_open_code_block(target: dict[str, Any]) -> None:
    texts = write(target, code_logits)
    fences = [len(FENCE.findall(text)) for text in texts]
    assert sum(fences) >= TEXTS  # most have blocks
    assert not [text for text, n in zip(texts, fences, strict=True) if n % 2]
    assert not [text for text in texts if text.endswith("\ufffd")]


def test_a_block_that_the_prompt_has_opened_is_closed_too() -> None:
    prefix = "Code:\n```\nx"
    target = {"tokens": 40, "mode": "at_most", "prefix_tokens": len(ids(prefix))}
    texts = write(target, lambda text, rng: code_logits([*ids(prefix), *text], rng), prefix)
    assert all(len(FENCE.findall(text)) % 2 == 0 for text in texts)


@pytest.mark.parametrize(
    "target", [{"tokens": 60}, {"tokens": 40, "tolerance": 0}, {"tokens": 50, "mode": "at_most"}]
)
def test_no_text_ends_in_a_bare_number(target: dict[str, Any]) -> None:
    texts = write(target, list_logits)
    lines = [text.splitlines()[-1] for text in texts]
    assert not {*lines} & {"7", "7."}
    if target.get("tolerance") != 0:  # a whole item is the end
        assert sum(text.endswith("\n") for text in texts) >= 0.8 * TEXTS


@pytest.mark.parametrize(
    "target",
    [
        {"tokens": 60},
        {"tokens": 40, "tolerance": 0},
        {"tokens": 50, "mode": "at_most"},
        {"mode": "range", "min_tokens": 30, "max_tokens": 50},
        {"words": 30},
        {"characters": 120, "mode": "at_most"},
    ],
)
def test_no_text_ends_at_the_point_of_a_number(target: dict[str, Any]) -> None:
    texts = [text.rstrip("\n") for text in write(target, number_logits)]
    assert not [text for text in texts if re.search(r"\d\.$", text)]
    assert sum(text.endswith(".") for text in texts) >= 0.6 * TEXTS


def test_a_grammar_goes_before_the_end_of_a_block() -> None:
    letters = Letters(TOKENIZER, Markers())
    text = ids("```\nx = 1")
    asked = LengthTarget.parse({"tokens": len(text) + 3, "tolerance": 0})
    state = RequestState(asked, [9], text, [END])
    for allowed, left in ([LINE, 500], [LINE]), ([500, 501], [500, 501]):
        logits = torch.full((1, len(TOKENIZER)), -math.inf)
        logits[0, allowed] = 0.0
        enforce_inplace(logits, {0: state}, letters)
        assert logits[0].isfinite().nonzero()[:, 0].tolist() == left
