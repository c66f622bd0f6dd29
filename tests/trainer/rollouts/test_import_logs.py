"""Production logs as rollouts."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support.logs import (
    CHAT,
    END,
    IDS,
    REPLY,
    REQUEST,
    USER,
    Import,
    answer,
    figures,
    plain,
    prompt,
    write,
)
from tests.support.tiny import tiny_tokenizer
from trainer.columns import SCHEMA
from trainer.rollout_files import TOKENIZER_KEY, read_rollouts
from trainer.rollouts.import_logs import import_logs
from value_server.contract.checkpoint import tokenizer_fingerprint


def test_every_assistant_turn_is_a_text(imported: Import) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Ü?")]
    messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", "Nö")]]
    first, second = imported({"messages": messages, "domain": "chat", "finish_reason": "length"})
    assert first["prompt_ids"] == prompt(*turns[:2])
    assert first["completion_ids"] == [*plain("Ho"), END]
    assert (first["finish_reason"], first["domain"]) == ("stop", "chat")
    assert second["prompt_ids"] == prompt(*turns)
    assert second["completion_ids"] == plain("Nö")  # it was cut: no end
    assert second["finish_reason"] == "length"
    assert {row["token_source"] for row in (first, second)} == {"text"}
    assert first["conversation"] == second["conversation"] != ""
    assert first["prompt_id"] != second["prompt_id"]
    assert (first["prompt"], second["prompt"]) == ("Hi", "Ü?")


@pytest.mark.parametrize(
    "line",
    [
        CHAT,
        {**REQUEST, **answer()},
        {"request": REQUEST, "response": answer()},
        {**REQUEST, "response": answer()},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, REPLY]},
    ],
)
def test_forms_of_one_answer(line: Any, imported: Import) -> None:
    (row,) = imported(line)
    assert row["prompt_ids"] == prompt(("user", "Hi"))
    assert row["completion_ids"] == [*plain("Hello"), END]


@pytest.mark.parametrize(
    "line",
    [
        IDS,
        {"request": REQUEST, "response": answer(token_ids=IDS["token_ids"]) | IDS},
        {"response": {"choices": [IDS | {"text": "Hello"}]}},  # of /v1/completions
    ],
)
def test_ids_that_were_sampled_are_kept(line: Any, imported: Import) -> None:
    (row,) = imported(line)
    assert (row["prompt_ids"], row["completion_ids"]) == ([1, 2], IDS["token_ids"])
    assert row["token_source"] == "engine"


def test_a_conversation_with_its_ids_is_one_answer(imported: Import) -> None:
    (row,) = imported(CHAT | IDS | {"finish_reason": "length"})
    assert (row["prompt_ids"], row["completion_ids"]) == ([1, 2], IDS["token_ids"])
    assert (row["token_source"], row["finish_reason"]) == ("engine", "length")
    assert row["prompt"] == "Hi"


def test_each_choice_has_its_own_prompt(imported: Import) -> None:
    """/v1/completions takes several prompts at once."""
    choices = [IDS | {"text": "Hello"}, IDS | {"prompt_token_ids": [3, 4, 5], "text": "Hello"}]
    rows = imported({"response": {"id": "cmpl-1", "choices": choices}})
    assert [row["prompt_ids"] for row in rows] == [[1, 2], [3, 4, 5]]
    del choices[1]["prompt_token_ids"]
    with pytest.raises(ValueError, match=r"line 1: messages: \[\], must be there"):
        imported({"response": {"id": "cmpl-1", "choices": choices}})


@pytest.mark.parametrize("sampled", ["Hm.\n\nHello", "Hello STOP"])
def test_texts_that_the_server_trimmed_are_of_this_model(
    sampled: str, imported: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a parser of reasoning that is not logged, or by a stop string."""
    exact = {"token_ids": [*plain(sampled), END], "prompt_token_ids": [1]}
    assert len(imported({"request": REQUEST, "response": answer(**exact)})) == 1
    assert figures(capsys.readouterr().out)["engine_exact"] == 0


def test_a_batch(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `vllm run-batch` reads and writes it, in another order, with one that failed."""
    asked = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate([REQUEST, {"messages": [{**USER, "content": "Ho"}]}, REQUEST])
    ]
    answered = [
        {
            "id": f"vllm-{i}",
            "custom_id": f"r{i}",
            "response": {
                "status_code": 200,
                "request_id": "x",
                "body": answer(f"a{i}") | {"id": i},
            },
            "error": None,
        }
        for i in (1, 0)
    ]
    failed = {"custom_id": "r2", "response": {"status_code": 400, "body": {}}, "error": None}
    write(tmp_path / "logs.jsonl", *answered, failed)
    requests = write(tmp_path / "requests.jsonl", *asked)
    # A folder with both: the requests are no log.
    import_logs(tmp_path, tmp_path / "out", model=str(base), requests=requests)
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert [row["prompt_ids"] for row in rows] == [prompt(("user", t)) for t in ("Ho", "Hi")]
    assert [row["completion_ids"][:-1] for row in rows] == [plain("a1"), plain("a0")]
    assert {"lines": 3, "turns": 2, "failed": 1}.items() <= figures(capsys.readouterr().out).items()


def test_cut_and_other_ends_are_marked(imported: Import) -> None:
    reasons = ["stop", "length", "tool_calls", "content_filter", "abort", None]
    rows = imported(*({**CHAT, "finish_reason": reason} for reason in reasons))
    told = [row["finish_reason"] for row in rows]
    assert told == ["stop", "length", "stop", "content_filter", "abort", "stop"]
    ends = [row["completion_ids"][-1] == END for row in rows]
    assert ends == [True, False, True, False, False, True]


def test_answers_to_a_length_target_teach_nothing(
    imported: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their lengths are not the model's own."""
    steered = [
        {"request": REQUEST | {"length_target": 100}, "response": answer()},
        {"request": REQUEST | {"vllm_xargs": {"length_words": 9}}, "response": answer()},
        {"request": REQUEST, "response": answer(length_result={"tokens": 5})},
        {"request": REQUEST | {"min_tokens": 5}, "response": answer()},
        {"request": REQUEST | {"ignore_eos": True}, "response": answer()},
    ]
    assert len(imported(*steered, CHAT)) == 1
    assert figures(capsys.readouterr().out)["steered"] == 5


def test_how_exactly_texts_come_back(imported: Import, capsys: pytest.CaptureFixture[str]) -> None:
    ids = {"prompt_token_ids": [1], "usage": {"completion_tokens": 6}}
    lines = [
        {"request": REQUEST, "response": answer() | {"usage": {"completion_tokens": 6}, "id": "a"}},
        {"request": REQUEST, "response": answer() | {"usage": {"completion_tokens": 9}, "id": "b"}},
        {
            "request": REQUEST,
            "response": answer(token_ids=[*plain("Hello"), END]) | ids | {"id": "c"},
        },
        {
            "request": REQUEST,
            "response": answer(token_ids=[*plain("Other"), END]) | ids | {"id": "d"},
        },
    ]
    imported(*lines)
    shown = capsys.readouterr()
    found = json.loads(shown.out.splitlines()[-1])["import"]
    assert found == {
        "lines": 4, "turns": 4, "engine": 2, "text": 2,
        "text_exact": 1.0, "engine_exact": 0.5, "counted_alike": 0.5, "our_tokens": 12 / 15,
    }  # fmt: skip
    assert "encoded answers have 0.80 times the tokens that the server counted" in shown.err


def test_names_of_special_tokens_in_an_answer_are_text(imported: Import) -> None:
    """The bug guarded against: an answer that explains a chat template ends in its middle."""
    (row,) = imported({"messages": [USER, REPLY | {"content": "Use <|end|> there"}]})
    assert row["completion_ids"] == [*plain("Use <|end|> there"), END]


def test_the_files_tell_what_they_are_and_stay(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", CHAT)
    write(tmp_path / "b.jsonl.gz", IDS)
    import_logs(tmp_path, tmp_path / "out", model=str(base))
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == ["a.parquet", "b.parquet"]
    schema = pq.read_schema(files["a.parquet"])
    assert schema.equals(SCHEMA)
    told = json.loads(schema.metadata[TOKENIZER_KEY])
    assert told == {"model": str(base), "fingerprint": tokenizer_fingerprint(tiny_tokenizer())}
    assert len(read_rollouts(tmp_path / "out")) == 2
    before = {path: path.stat().st_mtime_ns for path in files.values()}
    files["a.parquet"].unlink()
    import_logs(tmp_path, tmp_path / "out", model=str(base))
    assert files["b.parquet"].stat().st_mtime_ns == before[files["b.parquet"]]
    assert files["a.parquet"].exists()
    with pytest.raises(ValueError, match=r"^turns: .*a\.parquet was made with 'all', this run has"):
        import_logs(tmp_path, tmp_path / "out", model=str(base), turns="last")
    write(tmp_path / "a.jsonl", CHAT, CHAT)
    with pytest.raises(ValueError, match=r"^log: .*a\.parquet was made with"):
        import_logs(tmp_path, tmp_path / "out", model=str(base))
    write(tmp_path / "b.jsonl", CHAT)
    with pytest.raises(ValueError, match=r"^logs: .*b\.jsonl.*b\.jsonl\.gz.*of different names"):
        import_logs(tmp_path, tmp_path / "out", model=str(base))
