"""Other endings of an answer: when they are asked for, what is asked, and what is returned."""

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from lenvm_vllm import vllm_hooks
from lenvm_vllm.endings import CHAT, TAIL, TEXT, can_continue, narrowed
from lenvm_vllm.middleware import LengthTargetMiddleware
from lenvm_vllm.request import LengthTarget
from lenvm_vllm.sentences import SENTENCE

EOS = 0
GOOD, BAD = math.log(0.5), math.log(0.01)
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}]}
ASK: dict[str, dict[str, Any]] = {CHAT: HELLO, TEXT: {"prompt": "?", "max_tokens": 500}}


class Tokenizer:
    """Token i is the letter i; the end is nothing."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(i) for i in ids if i != EOS)


def text_of(length: int, letter: str) -> list[int]:
    """So many tokens, the end the last of them."""
    return [ord(letter)] * (length - 1) + [EOS]


def choice_of(path: str, ids: list[int], end: float, content: str, finish: str) -> dict[str, Any]:
    probs = [-1.0] * (len(ids) - 1) + [end]
    common = {"index": 0, "finish_reason": finish, "stop_reason": None, "token_ids": ids}
    if path == CHAT:
        logprobs: Any = {"content": [{"token": "x", "logprob": p} for p in probs]}
        return common | {"message": {"content": content}, "logprobs": logprobs}
    return common | {"text": content, "logprobs": {"token_logprobs": probs}}


class App:
    """Answers first with one text, then with rounds of endings, and keeps what it was asked.

    first, rounds: (length, logprob of the end), of an ending its own.
    """

    def __init__(
        self,
        first: tuple[int, float],
        *rounds: list[tuple[int, float]],
        content: str | None = None,
        status: int = 200,
    ) -> None:
        self.first, self.rounds = first, list(rounds)
        self.content, self.status = content, status
        self.asked: list[tuple[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = json.loads((await receive())["body"])
        self.asked.append((scope["path"], request))
        path, status = scope["path"], 200
        if len(self.asked) == 1:
            choices = [self.choice(path, *self.first, "a")]
        else:
            status = self.status
            choices = [
                self.choice(path, *ending, chr(ord("b") + i))
                for i, ending in enumerate(self.rounds[len(self.asked) - 2])
            ]
        tokens = sum(len(choice["token_ids"]) for choice in choices)
        usage = {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": tokens + 2}
        answer = {"id": "r", "choices": choices, "usage": usage}
        (answer if path == CHAT else choices[0])["prompt_token_ids"] = [65, 66]
        body = json.dumps(answer).encode()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def choice(self, path: str, length: int, end: float, letter: str) -> dict[str, Any]:
        content = self.content or letter * (length - 1)
        return choice_of(path, text_of(length, letter), end, content, "stop")


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(max_model_len=1000, skip_tokenizer_init=False)
    config = SimpleNamespace(
        model_config=model, speculative_config=None, additional_config={}, scheduler_config=None
    )
    monkeypatch.setattr(vllm_hooks, "served_config", config)
    monkeypatch.setattr("lenvm_vllm.middleware.tokenizer_of", lambda config: Tokenizer())


def post(app: App, path: str, **fields: Any) -> tuple[Any, int]:
    """The answer, and the tokens that were sampled for it."""
    sent: list[Any] = []

    async def receive() -> Any:
        body = json.dumps(ASK[path] | fields).encode()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(LengthTargetMiddleware(app)(scope, receive, send))
    return json.loads(sent[1]["body"]), int(dict(sent[0]["headers"])[b"lenvm-sampled-tokens"])


def content_of(answer: Any) -> str:
    (choice,) = answer["choices"]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_good_answer_stays(path: str) -> None:
    app = App((102, GOOD))
    answer, sampled = post(app, path, length_target=100)
    assert (content_of(answer), len(app.asked), sampled) == ("a" * 101, 1, 102)
    (choice,) = answer["choices"]
    assert choice["logprobs"] is choice["token_ids"] is None
    assert (answer if path == CHAT else choice)["prompt_token_ids"] is None


def test_a_token_is_near() -> None:
    for first, more in ((21, 0), (22, 1)):
        app = App((first, GOOD), [(20, GOOD)] * 4)
        post(app, CHAT, length_target=20)
        assert len(app.asked) == 1 + more


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("first", [(101, BAD), (93, GOOD), (110, GOOD)])  # 110: the upper rail
def test_a_bad_one_gets_the_best_of_its_endings(path: str, first: tuple[int, float]) -> None:
    cut = min(first[0], 100) - TAIL
    lengths = [(103, GOOD), (100, BAD), (101, GOOD), (99, BAD)]
    app = App(first, [(n - cut, end) for n, end in lengths])
    answer, sampled = post(app, path, length_target=100, return_token_ids=True, temperature=0.7)
    assert content_of(answer) == "a" * cut + "d" * (100 - cut)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == [97] * cut + text_of(101 - cut, "d")
    assert (answer if path == CHAT else choice)["prompt_token_ids"] == [65, 66]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 101, "total_tokens": 103}
    assert sampled == first[0] + sum(n - cut for n, _ in lengths)
    (_, asked), (where, wish) = app.asked
    assert where == TEXT
    assert (wish["prompt"], wish["n"], wish["temperature"]) == ([65, 66] + [97] * cut, 4, 0.7)
    assert wish["max_tokens"] == 105 - cut
    target = LengthTarget.from_extra_args(wish["vllm_xargs"])
    assert target is not None
    assert (target.tokens, target.tolerance, target.prefix_tokens) == (100, 0.05, cut)
    assert asked["vllm_xargs"]["length_tolerance"] == 0.1


def test_rounds_begin_earlier_until_an_ending_is_good_or_none_is_left() -> None:
    bad = [(TAIL, BAD)] * 4
    app = App((100, BAD), bad, bad[:3])
    answer, _ = post(app, CHAT, length_target={"tokens": 100, "best_of": 8})
    cuts = [len(wish["prompt"]) - 2 for _, wish in app.asked[1:]]
    assert cuts == [100 - TAIL, 100 - TAIL - SENTENCE]
    assert [wish["n"] for _, wish in app.asked[1:]] == [4, 3]  # with the first one eight
    assert content_of(answer) == "a" * 99
    app = App((100, BAD), *[bad] * 3, bad[:3])
    post(app, CHAT, length_target=100)
    assert [wish["n"] for _, wish in app.asked[1:]] == [4, 4, 4, 3]  # the setting: sixteen


def test_a_short_text_is_written_again_from_its_beginning() -> None:
    app = App((20, BAD), [(20, GOOD)] * 4)
    answer, _ = post(app, CHAT, length_target=20)
    assert app.asked[1][1]["prompt"] == [65, 66]
    assert content_of(answer) == "b" * 19


@pytest.mark.parametrize(
    ("target", "first"),
    [
        ({"mode": "at_most", "tokens": 100}, (100, GOOD)),  # the rail wrote it
        ({"mode": "at_most", "tokens": 100}, (60, BAD)),
        ({"mode": "range", "min_tokens": 50, "max_tokens": 100}, (60, BAD)),
    ],
)
def test_limits(target: dict[str, Any], first: tuple[int, float]) -> None:
    cut = first[0] - TAIL
    app = App(first, [(30, BAD), (30, GOOD), (31, GOOD), (29, GOOD)])
    answer, _ = post(app, CHAT, length_target=target)
    assert content_of(answer) == "a" * cut + "c" * 29
    assert app.asked[1][1]["max_tokens"] == 100 - cut


def test_a_text_that_never_ends_gets_an_end_behind_its_lower_rail() -> None:
    app = App((400, BAD), [(40, GOOD)] * 4)
    answer, _ = post(app, CHAT, length_target={"mode": "at_least", "tokens": 100})
    target = LengthTarget.from_extra_args(app.asked[1][1]["vllm_xargs"])
    cut = 100 - TAIL
    expected = {"mode": "range", "min_tokens": 100, "max_tokens": 110, "prefix_tokens": cut}
    assert target == LengthTarget.parse(expected)
    assert content_of(answer) == "a" * cut + "b" * 39


@pytest.mark.parametrize("mode", ["equal_to", "at_most", "at_least"])
def test_rails_that_are_off_stay_off(mode: str) -> None:
    target = LengthTarget.parse({"mode": mode, "tokens": 100, "tolerance": None, "best_of": 4})
    assert narrowed(target) == target


def test_the_request_s_own_limits_hold() -> None:
    app = App((100, BAD), [(TAIL, GOOD)] * 4)
    post(app, CHAT, length_target=100, max_tokens=102, min_tokens=95)
    wish = app.asked[1][1]
    cut = 100 - TAIL
    assert (wish["max_tokens"], wish["min_tokens"]) == (102 - cut, 95 - cut)


def test_a_refused_ending_leaves_the_answer() -> None:
    app = App((100, BAD), [(TAIL, GOOD)], status=500)
    answer, sampled = post(app, CHAT, length_target=100)
    assert (content_of(answer), sampled) == ("a" * 99, 100)


def test_an_answer_that_is_not_all_text_stays() -> None:
    app = App((100, BAD), content="what followed the thinking")
    answer, _ = post(app, CHAT, length_target=100)
    assert (content_of(answer), len(app.asked)) == ("what followed the thinking", 1)


def test_without_rails_or_with_one_ending_the_answer_is_as_vllm_gave_it() -> None:
    for target in ({"tokens": 100, "tolerance": None}, {"tokens": 100, "best_of": 1}):
        app = App((100, BAD))
        with pytest.raises(KeyError, match="sampled"):
            post(app, CHAT, length_target=target)
        assert "logprobs" not in app.asked[0][1]


@pytest.mark.parametrize(
    "fields",
    [
        *({"stream": True}, {"n": 2}, {"temperature": 0}, {"logprobs": True}, {"stop": "x"}),
        *({"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}),
        *({"frequency_penalty": 0.5}, {"structured_outputs": {"regex": "a"}}, {"unknown": 1}),
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": None},
    ],
)
def test_what_cannot_be_continued(fields: dict[str, Any]) -> None:
    target = LengthTarget.parse(100)
    plain = {"stream": False, "stop": [], "n": None, "response_format": {"type": "text"}}
    assert can_continue(HELLO | plain, target, CHAT)
    assert not can_continue(HELLO | fields, target, CHAT)


@pytest.mark.parametrize(
    ("prompt", "whether"), [("a", True), ([1, 2], True), (["a"], False), ([[1]], False)]
)
def test_one_prompt_can_be_continued(prompt: Any, whether: bool) -> None:
    assert can_continue({"prompt": prompt}, LengthTarget.parse(9), TEXT) is whether


@pytest.mark.parametrize(
    "target",
    [
        {"mode": "tilt", "beta": 1.0},
        {"tokens": 9, "scope": "answer"},
        {"tokens": 9, "prefix_tokens": 3},
    ],
)
def test_targets_that_have_no_end_to_move(target: dict[str, Any]) -> None:
    assert not can_continue(HELLO, LengthTarget.parse(target), CHAT)
