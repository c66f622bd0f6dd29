"""Answers as rows: files that a stopped run goes on from, tasks, jobs, scores of tiny models."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.endpoint import Endpoint, Job, without_row
from benchmarks.evidence import ends
from benchmarks.evidence.answers import Served
from benchmarks.evidence.arms import USUAL
from benchmarks.evidence.judge import Judge
from benchmarks.evidence.lifebench import Plan
from benchmarks.evidence.likelihood import EVEN, batches, score_rows
from benchmarks.evidence.tasks import OWN, Task, read_tasks, stratified
from tests.support.tiny_llm import tiny_llm
from trainer.resume import keep_settings
from trainer.rows import Rows

ENGLISH = "Do it. It must be {word_count_type} {word_count} words long."
CHINESE = "你的回答字数必须{word_count_type} {word_count}字。"

# ---- rows


def test_rows_come_back_and_a_torn_last_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    rows = Rows(path)
    rows.add({"key": "a", "text": "é\r\u2028"})
    rows.add({"key": "b"})
    with path.open("a") as file:
        file.write('{"key": "c", "te')
    again = Rows(path)
    assert again == {"a": {"key": "a", "text": "é\r\u2028"}, "b": {"key": "b"}}
    again.add({"key": "c"})
    assert list(Rows(path)) == ["a", "b", "c"]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    keep_settings(tmp_path, {"model": "a", "seed": 0})
    keep_settings(tmp_path, {"model": "a", "seed": 0})
    with pytest.raises(ValueError, match=r"seed: .* made with 0, this run has 1"):
        keep_settings(tmp_path, {"model": "a", "seed": 1})


def test_steps_without_values_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = iter([(10, 2), (40, 8), (40, 8), (60, 8)])

    def get(url: str, **_: Any) -> httpx.Response:
        assert url == "http://host/metrics"
        steps, blind = next(counts)
        text = (
            f"# TYPE x counter\nlenvm_steps_total {steps}.0\nlenvm_fallback_steps_total {blind}.0\n"
        )
        return httpx.Response(200, text=text)

    monkeypatch.setattr(httpx, "get", get)
    endpoint = Endpoint("http://host/v1", "m")
    endpoint.answer([], Rows(tmp_path / "rows.jsonl"))
    assert "warning: 6 of 30 guided steps at http://host/v1 had no" in capsys.readouterr().err
    endpoint.answer([], Rows(tmp_path / "rows.jsonl"))
    assert "warning" not in capsys.readouterr().err


def test_a_kept_answer_to_another_prompt_is_none(tmp_path: Path) -> None:
    """As of other data whose tasks have the same ids."""
    rows = Rows(tmp_path / "answers.jsonl")
    old, new = (
        Job({"id": 1}, [{"role": "user", "content": text}], {}) for text in ("Old?", "New?")
    )
    rows.add({"key": "1", "request": "Old?"})
    assert without_row([old], rows) == []
    with pytest.raises(ValueError, match=f"data: another prompt is named 1 in {tmp_path}"):
        without_row([new], rows)
    with pytest.raises(ValueError, match="data: another prompt is named 1"):
        without_row([old, new], Rows(None))


def test_what_shapes_the_answers_of_our_own_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_SCORING", "exact")
    monkeypatch.setenv("LENVM_TOKEN", "secret")
    own = Served(dtype="float32").settings()
    assert (own["LENVM_SCORING"], own["dtype"]) == ("exact", "float32")
    assert "LENVM_TOKEN" not in own
    assert Served(url="http://host/v1").settings().keys() == {"model", "value_model", "seed"}


# ---- tasks


def test_tokens_for_words() -> None:
    english, chinese = Task("1", "qa", "en", ENGLISH), Task("2", "qa", "cn", CHINESE)
    assert english.prompt("at_most", 64) == "Do it. It must be at most 64 tokens long."
    assert chinese.prompt("equal_to", 32) == "你的回答token数必须等于 32个token。"


def test_lifebenchs_own_words() -> None:
    english, chinese = Task("1", "qa", "en", ENGLISH), Task("2", "qa", "cn", CHINESE)
    assert english.prompt("at_most", 64, OWN) == "Do it. It must be at most 64 words long."
    assert chinese.prompt("equal_to", 32, OWN) == "你的回答字数必须等于 32字。"
    assert chinese.prompt("at_most", 32, OWN) == "你的回答字数必须至多有 32字。"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ('{"id": 1, "category": "qa", "lang": "en"}', "line 1: no 'task'"),
        ('{"id": 1, "category": "qa", "lang": "de", "task": "x"}', "line 1: task"),
        ('{"id": 1, "category": "qa", "lang": "en", "task": "no length"}', "line 1: task"),
        ("[1]", "line 1: expected an object"),
        ("{", "line 1"),
    ],
)
def test_tasks_that_are_none(tmp_path: Path, row: str, complaint: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(ValueError, match=complaint):
        read_tasks(path)


def test_a_larger_limit_goes_on_from_a_smaller_one() -> None:
    items = [(kind, i) for kind, count in (("a", 50), ("b", 9), ("c", 3)) for i in range(count)]
    few, many = (stratified(items, lambda item: item[0], limit, 1) for limit in (6, 20))
    assert many[:6] == few
    assert [sum(item[0] == kind for item in few) for kind in "abc"] == [2, 2, 2]
    assert [sum(item[0] == kind for item in many) for kind in "abc"] == [9, 8, 3]
    assert len(stratified(items, lambda item: item[0], None, 1)) == len(set(items))


def test_jobs_are_all_different() -> None:
    tasks = [Task(str(i), "qa", "en", ENGLISH) for i in range(2)]
    arms, modes = ("prompt", "ramp"), ("equal_to", "at_least")
    plan = Plan(data=Path(), arms=arms, modes=modes, targets=(32, 64), max_tokens=99)
    jobs = plan.jobs(tasks)
    assert len({job.key for job in jobs}) == len(jobs) == 2 * (2 * 2 + 2)  # no ramp at least
    assert {job.body["max_tokens"] for job in jobs} == {99}


@pytest.mark.parametrize("kind", [Plan, ends.Plan])
@pytest.mark.parametrize(
    ("arm", "complaint"),
    [
        ("fast", "arms: 'fast', must be one of prompt"),
        ("limits:tolerance=0", "arms: 'limits:tolerance=0', must be one of"),
        ("railed:tolerence=0", "arms: 'railed:tolerence=0': length_target.tolerence"),
    ],
)
def test_an_arm_that_is_none_is_named(kind: Any, arm: str, complaint: str) -> None:
    """Before a server is started for it."""
    data = Path() if kind is Plan else (Path(),)
    kind(data=data).check()
    with pytest.raises(ValueError, match=complaint):
        kind(data=data, arms=("prompt", arm)).check()


def test_jobs_in_words_ask_for_words_in_every_arm() -> None:
    tasks = [Task("1", "qa", "en", ENGLISH)]
    jobs = Plan(data=Path(), modes=("equal_to",), targets=(50,), unit="own").jobs(tasks)
    assert {job.facts["arm"] for job in jobs} == {*USUAL} - {"limits", "ramp"}
    assert {job.request for job in jobs} == {"Do it. It must be equal to 50 words long."}
    asked = [job for job in jobs if job.facts["arm"] not in ("prompt", "countdown")]
    wishes = [job.body["length_target"] for job in asked]
    assert all(wish["words"] == 50 and "tokens" not in wish for wish in wishes)


# ---- scores


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm(tmp_path_factory.mktemp("llm"))


def naive(model: Any, prompt: list[int], ids: list[int], ended: bool) -> tuple[float, float]:
    """One token at a time, each in a forward pass of its own."""
    nll = []
    for k, token in enumerate(ids):
        log_p = model(torch.tensor([prompt + ids[:k]])).logits[0, -1].float().log_softmax(-1)
        nll.append(-log_p[token].item())
        p_end = log_p[256].exp().item()
    text = nll[: len(ids) - ended]
    return sum(text) / len(text), p_end


def test_scores_are_the_naive_ones_and_are_kept(llm: Path, tmp_path: Path) -> None:
    answers = [
        {"key": "a", "prompt_ids": [1, 2, 3], "ids": [4, 5, 6, 256], "finish": "stop"},
        {"key": "b", "prompt_ids": [9], "ids": list(range(40)), "finish": "length"},
        {"key": "c", "prompt_ids": [7, 8], "ids": [256], "finish": "stop"},
        {"key": "d", "prompt_ids": [1, 2, 3], "ids": list(range(9, 60)), "finish": "length"},
        {"key": "e", "prompt_ids": [1, 2, 3], "ids": list(range(60, 20, -1)), "finish": "length"},
    ]
    path = tmp_path / "scores.jsonl"
    scores = score_rows(answers, str(llm), Rows(path))
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    for score, a in zip(scores, answers, strict=True):
        if a["key"] == "c":  # nothing but the end
            assert score["nll"] is None
            continue
        nll, p_end = naive(model, a["prompt_ids"], a["ids"], a["finish"] == "stop")
        assert score["nll"] == pytest.approx(nll, rel=0.01)
        assert score["p_end"] == pytest.approx(p_end, rel=0.05)
    assert score_rows(answers, "nowhere", Rows(path)) == scores


def test_batches_hold_all_within_their_capacity() -> None:
    answers = [{"ids": [0] * n} for n in (5, 90, 1, 40, 7, 7, 200)]
    found = list(batches(answers, 100))
    assert sorted(len(a["ids"]) for batch in found for a in batch) == [1, 5, 7, 7, 40, 90, 200]
    for batch in found:
        sizes = [len(a["ids"]) for a in batch]
        assert len(batch) == 1 or max(sizes) * len(batch) <= 100
        assert min(sizes) >= EVEN * max(sizes)


# ---- judge


def test_a_judge_sees_both_orders(tmp_path: Path) -> None:
    """All verdicts are in the file already: the first answer always wins, so nobody does."""
    facts = {"mode": "equal_to", "target": 32, "id": "7", "request": "?", "text": "!"}
    rows = [{"arm": arm, **facts} for arm in ("prompt", "railed")]
    verdicts = Rows(tmp_path / "verdicts-none.jsonl")
    for first in (True, False):
        key = f"railed/equal_to/32/7/{first}"
        verdicts.add({"key": key, "arm": "railed", "id": "7", "first": first, "text": "A"})
    judge = Judge(url="http://nowhere/v1", model="hub/none")
    assert judge.compare(rows, tmp_path)["railed"].value == 50.0
    lines = (tmp_path / "verdicts-none.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["A", "A"]
