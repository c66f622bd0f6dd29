"""Other endings of an answer: when they are asked for, what is asked, and what is returned."""

from pathlib import Path
from typing import Any

import pytest

from lenvm_vllm.api.endings import TAIL
from lenvm_vllm.api.routes import CHAT, TEXT
from lenvm_vllm.host import served
from lenvm_vllm.steering.constants import SENTENCE
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.metrics import FOLDER
from tests.support.engine_side import BAD, EOS, App, Told, content_of, round_of, serve
from tests.support.through import post_to

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}]}
ASK: dict[str, dict[str, Any]] = {CHAT: HELLO, TEXT: {"prompt": "?", "max_tokens": 500}}


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LENVM_ENDINGS_PATIENCE", "1000")  # the first answer takes no time
    serve(monkeypatch, tmp_path)


def post(app: App, path: str, **fields: Any) -> Any:
    return post_to(app, ASK[path] | fields, path)[2]


def text_of(answer: Any) -> str:
    (choice,) = answer["choices"]
    return content_of(choice)


def result_of(answer: Any) -> Any:
    return answer["choices"][0]["length_result"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_good_answer_stays(path: str) -> None:
    app = App([Told(102)])
    answer = post(app, path, length_target=100)
    assert (text_of(answer), len(app.asked)) == ("a" * 101, 1)
    (choice,) = answer["choices"]
    assert choice["token_ids"] is None
    assert (answer if path == CHAT else choice)["prompt_token_ids"] is None
    assert result_of(answer)["end"] == "natural"
    assert "logprobs" not in app.asked[0][1]


def test_a_whole_sentence_is_a_good_end() -> None:
    app = App([Told(101, BAD, forced=True, content="It is whole.")])
    answer = post(app, CHAT, length_target=100)
    assert (len(app.asked), result_of(answer)["end"]) == (1, "whole")
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_any_length_inside_the_rails_is_good() -> None:
    for first, more in ((18, 0), (22, 0), (23, 1)):
        app = App([Told(first)], round_of(*[(20, 0.5)] * 4))
        post(app, CHAT, length_target=20)
        assert len(app.asked) == 1 + more
    app = App([Told(129)])  # 0.29 * 100 is below 29 in binary
    post(app, CHAT, length_target={"tokens": 100, "tolerance": 0.29})
    assert len(app.asked) == 1


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("first", [Told(101, BAD), Told(89), Told(110, BAD, forced=True)])
def test_a_bad_one_gets_the_best_of_its_endings(path: str, first: Told) -> None:
    cut = min(first.length, 100) - TAIL
    lengths = [(103, BAD), (100, BAD), (101, 0.5), (99, BAD)]
    app = App([first], round_of(*lengths, cut=cut))
    answer = post(app, path, length_target=100, return_token_ids=True, temperature=0.7)
    assert text_of(answer) == "a" * cut + "d" * (100 - cut)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == [97] * cut + [100] * (100 - cut) + [EOS]
    assert (answer if path == CHAT else choice)["prompt_token_ids"] == [65, 66]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 101, "total_tokens": 103}
    result = result_of(answer)
    assert result["sampled_tokens"] == first.length + sum(n - cut for n, _ in lengths)
    assert (result["tokens"], result["endings"], result["end"]) == (101, 5, "natural")
    assert (result["steps"], result["steered_steps"]) == (101, 100)
    (_, asked), (where, wish) = app.asked
    assert where == TEXT
    assert (wish["prompt"], wish["n"], wish["temperature"]) == ([65, 66] + [97] * cut, 4, 0.7)
    assert wish["max_tokens"] == 105 - cut
    target = LengthTarget.from_extra_args(wish["vllm_xargs"])
    assert target is not None
    assert (target.tokens, target.tolerance, target.prefix_tokens) == (100, 0.05, cut)
    assert asked["vllm_xargs"]["length_tolerance"] == 0.1


def test_the_log_has_what_is_returned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM's own log of answers has the first one and each ending."""
    for wanted in (False, True):
        monkeypatch.setattr(served, "logs_answers", wanted)
        app = App([Told(60, BAD)], round_of(*[(60, 0.5)] * 4, cut=60 - TAIL))
        with caplog.at_level("INFO", "vllm.lenvm"):
            answer = post(app, CHAT, length_target=60)
        assert (repr(text_of(answer)) in caplog.text) is wanted


def test_a_text_that_vllm_gave_up_stays() -> None:
    app = App([Told(60, BAD, finish="abort")])
    answer = post(app, CHAT, length_target=100)
    assert (len(app.asked), answer["choices"][0]["finish_reason"]) == (1, "abort")


def test_an_end_that_is_replaced_takes_its_reason_along() -> None:
    """One of a model's several ends has its number there."""
    app = App([Told(60, BAD, stop_reason=7)], round_of(*[(60, 0.5)] * 4, cut=60 - TAIL))
    (choice,) = post(app, CHAT, length_target=60)["choices"]
    assert (choice["message"]["content"][-1], choice["stop_reason"]) == ("b", None)


def test_rounds_begin_earlier_until_an_ending_is_good_or_none_is_left() -> None:
    bad = round_of(*[(TAIL, BAD)] * 4)
    app = App([Told(100, BAD)], bad, bad[:3])
    answer = post(app, CHAT, length_target={"tokens": 100, "endings": 8})
    cuts = [len(wish["prompt"]) - 2 for _, wish in app.asked[1:]]
    assert cuts == [100 - TAIL, 100 - TAIL - SENTENCE]
    assert [wish["n"] for _, wish in app.asked[1:]] == [4, 3]  # with the first one eight
    assert text_of(answer) == "a" * 99
    app = App([Told(100, BAD)], *[bad] * 3, bad[:3])
    post(app, CHAT, length_target={"tokens": 100, "endings": 16})
    assert [wish["n"] for _, wish in app.asked[1:]] == [4, 4, 4, 3]


def test_a_seed_gives_other_endings_each_time_and_the_same_ones_again() -> None:
    """A text that is written again from its beginning with its own seed would be the same."""
    for _ in range(2):
        app = App([Told(20, BAD)], *[round_of(*[(20, BAD)] * 4)] * 2)
        post(app, CHAT, length_target={"tokens": 20, "endings": 9}, seed=7)
        assert [wish["prompt"] for _, wish in app.asked[1:]] == [[65, 66]] * 2
        assert [wish["seed"] for _, wish in app.asked] == [7, 8, 12]


@pytest.mark.parametrize(
    ("target", "first"),
    [
        ({"mode": "at_most", "tokens": 100}, Told(100, BAD, forced=True)),
        ({"mode": "range", "min_tokens": 50, "max_tokens": 100}, Told(90, BAD)),
    ],
)
def test_limits(target: dict[str, Any], first: Told) -> None:
    cut = first.length - TAIL
    endings = round_of((cut + 30, BAD), (cut + 30, 0.5), (cut + 31, 0.5), (cut + 29, 0.5), cut=cut)
    app = App([first], endings)
    answer = post(app, CHAT, length_target=target)
    assert text_of(answer) == "a" * cut + "c" * 29
    assert app.asked[1][1]["max_tokens"] == 100 - cut


FREE: dict[str, Any] = {"p_end": 0.03, "landing": False}


@pytest.mark.parametrize(
    ("target", "first"),
    [
        ({"mode": "at_most", "tokens": 900}, Told(120, **FREE)),  # nothing made it end there
        ({"mode": "range", "min_tokens": 50, "max_tokens": 900}, Told(120, **FREE)),
        ({"mode": "at_least", "tokens": 200}, Told(380, **FREE)),
        ({"mode": "at_least", "tokens": 200}, Told(380, BAD)),
    ],
)
def test_an_end_that_steering_had_no_part_in_stays(target: dict[str, Any], first: Told) -> None:
    app = App([first])
    answer = post(app, CHAT, length_target=target)
    assert (len(app.asked), text_of(answer)) == (1, first.text)


def test_without_values_there_are_no_other_endings() -> None:
    app = App([Told(100, BAD, forced=True, valued=False)])
    answer = post(app, CHAT, length_target=100)
    assert (len(app.asked), result_of(answer)["endings"]) == (1, 1)
    app = App([Told(100, BAD)], round_of(*[(TAIL, BAD)] * 4, valued=False))
    post(app, CHAT, length_target=100)
    assert len(app.asked) == 2  # lost in between


@pytest.mark.parametrize("policy", ["landing", "rails"])
def test_a_policy_that_wants_no_values_needs_none_for_other_endings(policy: str) -> None:
    first = Told(100, BAD, forced=True, valued=False)
    rounds = [round_of(*[(TAIL, BAD)] * 4, valued=False)] * 2
    app = App([first], *rounds)
    answer = post(app, CHAT, length_target={"tokens": 100, "policy": policy, "endings": 9})
    assert (len(app.asked), result_of(answer)["endings"]) == (3, 9)
    assert {wish["vllm_xargs"]["length_policy"] for _, wish in app.asked} == {policy}


def test_an_engine_that_tells_nothing_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER)
    app = App([Told(100, BAD)])
    answer = post(app, CHAT, length_target=100)
    assert (len(app.asked), result_of(answer)["end"]) == (1, None)


def test_a_forced_cut_is_called_a_limit() -> None:
    app = App([Told(110, BAD, forced=True)])
    answer = post(app, CHAT, length_target={"tokens": 100, "endings": 1})
    assert answer["choices"][0]["finish_reason"] == "length"
    result = result_of(answer)
    assert (result["end"], result["forced"]) == ("cut", True)
    assert result["target"] == {"mode": "equal_to", "tokens": 100, "endings": 1}


def test_the_request_s_own_limits_hold() -> None:
    app = App([Told(100, BAD)], round_of(*[(TAIL, 0.5)] * 4))
    post(app, CHAT, length_target=100, max_tokens=102, min_tokens=95)
    wish = app.asked[1][1]
    cut = 100 - TAIL
    assert (wish["max_tokens"], wish["min_tokens"]) == (102 - cut, 95 - cut)


def test_what_samples_is_the_same_for_every_ending() -> None:
    same = {
        **{"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
        **{"logit_bias": {"9": 1.0}, "allowed_token_ids": [97, 98, 0], "watermarking": False},
        **{"model": "m", "user": "me", "priority": 7, "session_id": "s", "cache_salt": "x"},
    }
    app = App([Told(100, BAD)], round_of(*[(TAIL, 0.5)] * 4))
    post(app, CHAT, length_target=100, metadata={"run": "7"}, tool_choice="none", **same)
    wish = app.asked[1][1]
    assert wish == wish | same
    assert "metadata" not in wish
    assert "tool_choice" not in wish


def test_an_answer_that_is_not_all_text_stays() -> None:
    app = App([Told(100, BAD, content="what followed the thinking")])
    answer = post(app, CHAT, length_target=100)
    assert (text_of(answer), len(app.asked)) == ("what followed the thinking", 1)
