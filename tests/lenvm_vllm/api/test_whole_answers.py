"""Several answers to a request: which of them is returned, and what else the client is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from lenvm_vllm.api.outcome import Outcome
from lenvm_vllm.api.routes import CHAT, TEXT
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.metrics import FOLDER
from lenvm_vllm.telemetry.progress import Step
from tests.support.engine_side import App, Told, content_of
from tests.support.through import post_to

TEN = {"tokens": 10, "best_of": 3, "tolerance": 0.1}  # rails 9 to 11
PROMPT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "?"}]},
    TEXT: {"prompt": "?", "max_tokens": 50},
}


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))


def outcome(length: int, p_end: float = 0.5, text: str = "a", **fields: Any) -> Outcome:
    step = Step(length, p_end, 0.0, *(False, True, True, False, False), *(length, length))
    return Outcome(length, text, **{"limited": False, "stopped": False, "step": step} | fields)


def order(target: dict[str, Any], *outcomes: Outcome) -> list[int]:
    """Best first."""
    wish = LengthTarget.parse(target)
    return sorted(range(len(outcomes)), key=lambda index: outcomes[index].faults(wish))


def test_a_natural_end_goes_before_a_whole_one_and_that_before_a_near_one() -> None:
    assert order(TEN, outcome(10, 0.01), outcome(11, 0.01, "One."), outcome(9)) == [2, 1, 0]


def test_of_natural_ends_the_nearest_and_of_equals_the_first() -> None:
    assert order(TEN, outcome(9), outcome(10), outcome(10)) == [1, 2, 0]
    assert order(TEN, outcome(9, 0.01), outcome(11), outcome(10, 0.01)) == [1, 2, 0]


def test_an_end_at_max_tokens_is_none() -> None:
    assert order(TEN, outcome(10, limited=True), outcome(9)) == [1, 0]


def test_a_stop_string_is_an_end() -> None:
    assert order(TEN, outcome(10, 0.01), outcome(10, 0.0, stopped=True)) == [1, 0]


@pytest.mark.parametrize(
    ("target", "lengths", "best"),
    [
        ({"mode": "at_most", "tokens": 20, "tolerance": None}, (25, 12, 22, 3), [1, 3, 2, 0]),
        ({"mode": "at_least", "tokens": 20, "tolerance": None}, (25, 12, 22, 3), [0, 2, 1, 3]),
        ({"mode": "range", "min_tokens": 10, "max_tokens": 20}, (10, 8, 15, 12), [0, 2, 3, 1]),
    ],
)
def test_other_modes_count_what_is_outside(
    target: dict[str, Any], lengths: tuple[int, ...], best: list[int]
) -> None:
    assert order(target, *map(outcome, lengths)) == best


FLAT = {f"length_{key}": value for key, value in TEN.items() if key != "tokens"}


@pytest.mark.parametrize(
    "wish", [{"length_target": TEN}, {"vllm_xargs": {"length_target": 10} | FLAT}]
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_client_sees_one_answer(wish: dict[str, Any], path: str) -> None:
    app = App([Told(9, letter="a"), Told(10, letter="b"), Told(11, letter="c")])
    status, headers, answer = post_to(app, wish | PROMPT[path], path)
    assert (app.asked[0][1]["n"], b"Content-Length" in headers) == (3, False)
    assert "logprobs" not in app.asked[0][1]
    assert (status, headers[b"lenvm-sampled-tokens"], headers[b"x-request-id"]) == (
        *(200, b"30", b"r"),
    )
    (choice,) = answer["choices"]
    assert (content_of(choice), choice["index"], choice["token_ids"]) == ("b" * 9, 0, None)
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 10, "total_tokens": 12}
    told = choice["length_result"]
    assert (told["endings"], told["sampled_tokens"], told["tokens"]) == (3, 30, 10)


def test_the_best_two_of_three() -> None:
    app = App([Told(9, letter="a"), Told(10, letter="b"), Told(9, 0.01, "c")])
    _, _, answer = post_to(app, {"length_target": TEN, "n": 2} | PROMPT[CHAT], CHAT)
    assert [content_of(choice)[0] for choice in answer["choices"]] == ["b", "a"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


def test_each_prompt_has_its_own_best() -> None:
    texts = Told(9, letter="a"), Told(10, letter="b"), Told(10, letter="c"), Told(9, letter="d")
    app = App(texts)
    target = TEN | {"best_of": 2}
    _, _, answer = post_to(app, {"length_target": target, "prompt": ["?", "!"]}, TEXT)
    assert [content_of(choice)[0] for choice in answer["choices"]] == ["b", "c"]
    assert answer["usage"]["completion_tokens"] == 20


class Refusing:
    body = b'{"error": {"message": "no such model"}}'

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Content-Length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


@pytest.mark.parametrize("best_of", [1, 3])
def test_an_error_goes_on_as_it_is(best_of: int) -> None:
    wish = {"length_target": TEN | {"best_of": best_of}} | PROMPT[CHAT]
    status, _, answer = post_to(Refusing(), wish, CHAT)
    assert (status, answer) == (404, json.loads(Refusing.body))
