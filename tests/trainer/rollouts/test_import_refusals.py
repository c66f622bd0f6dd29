"""What cannot be imported, by name; and what a hook takes out of logs."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

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
    write,
)
from tests.support.tiny import tiny_tokenizer
from trainer.rollouts.import_logs import import_logs


def test_ids_of_another_tokenizer_are_refused(imported: Import, tmp_path: Path) -> None:
    line = {"request": REQUEST, "response": answer(token_ids=[1, 2, 3]) | {"prompt_token_ids": [1]}}
    with pytest.raises(ValueError, match=r"^model: .* makes other texts than .*log\.jsonl has"):
        imported(line)
    assert not list(tmp_path.glob("out-*/*"))
    with pytest.raises(ValueError, match=r"line 1: token_ids: 258, must be below 258"):
        imported(IDS | {"token_ids": [258]})


BAD: list[tuple[Any, str]] = [
    ("{", "Expecting property name"),
    ("[]", r"expected an object, got \[\]"),
    ({"messages": [{**USER, "content": "\ud83d"}, REPLY]}, "'utf-8' codec can't encode"),
    ({}, r"messages: \[\], must be there"),
    ({"messages": 3}, r"messages: 3: Expected `array`, got `int`"),
    ({"messages": [USER, {"role": 7}]}, r"messages\[1\]\.role: 7: Expected `str`, got `int`"),
    ({"messages": [{"content": "x"}]}, r"messages\[0\]: .*: Object missing required field `role`"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        r"messages\[0\]\.content\[0\]\.type: 'image_url': Invalid enum value",
    ),
    ({**CHAT, "finish_reason": "eos"}, r"finish_reason: 'eos': Invalid enum value"),
    ({**CHAT, "domain": 1}, r"domain: 1, must be a text"),
    ({"request": 1, "response": answer()}, r"request: 1: Expected `object`"),
    ({**REQUEST, "response": {"choices": []}}, r"response\.choices: \[\]: Expected .* length >= 1"),
    (
        {"request": REQUEST, "response": answer(token_ids=[1, -1])},
        r"response\.choices\[0\]\.token_ids\[1\]: -1: Expected `int` >= 0",
    ),
    ({"response": answer()}, r"messages: \[\], must be there \(of a batch: by REQUESTS\)"),
    ({"custom_id": "a", "response": {"body": answer()}}, r"messages: \[\], must be there"),
    (
        {"request": REQUEST, "response": {"choices": [{}]}},
        r"response\.choices\[0\]\.message: None, must be",
    ),
    (
        {"request": {**CHAT, "continue_final_message": True}, "response": answer()},
        r"continue_final_message: True, must be left out",
    ),
    (
        {
            "messages": [
                USER,
                {**REPLY, "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
            ]
        },
        r"tool_calls\.function\.arguments: 'x': ",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_is_named_before_any_work(
    line: Any, message: str, imported: Import, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=rf"log\.jsonl: line 3: {message}"):
        imported(CHAT, "", line)
    assert not list(tmp_path.glob("out-*"))
    assert len(imported(CHAT, "", line, skip_bad=True)) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["import"]["bad"] == 1
    assert re.search(rf"skipped: .*line 3: {message}", shown.err)


def test_a_bad_line_shows_little_of_its_value(imported: Import) -> None:
    """Logs hold what people wrote."""
    with pytest.raises(ValueError, match="messages: ") as error:
        imported({"messages": "secret " * 100})
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match="line 1: expected an object, got ") as error:
        imported(["secret " * 100])
    assert len(str(error.value)) < 300


def test_a_line_that_is_no_utf_8_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path / "log.jsonl", CHAT)
    log.write_bytes(b'{"messages": "\xff"}\n' + log.read_bytes())
    with pytest.raises(ValueError, match=r"log\.jsonl: line 1: 'utf-8' codec can't decode"):
        import_logs(log, tmp_path / "out", model=str(base))
    import_logs(log, tmp_path / "out", model=str(base), skip_bad=True)
    shown = capsys.readouterr()
    assert {"bad": 1, "turns": 1}.items() <= figures(shown.out).items()
    assert re.search(r"skipped: .*log\.jsonl: line 1: 'utf-8'", shown.err)


@pytest.mark.parametrize("size", [-9, 5, None], ids=["cut", "cut early", "not gzip"])
def test_a_log_that_is_not_a_whole_gzip_file_is_named(
    size: int | None, base: Path, tmp_path: Path
) -> None:
    """As one that is still being written."""
    log = tmp_path / "log.jsonl.gz"
    line = json.dumps(CHAT).encode() + b"\n"
    log.write_bytes(line if size is None else gzip.compress(line)[:size])
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match=r"log\.jsonl\.gz: not a whole gzip file"):
            import_logs(log, tmp_path / "out", model=str(base), skip_bad=skip_bad)
    assert not [*tmp_path.glob("out/*")]


def test_a_broken_file_is_named(base: Path, tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", CHAT)
    (tmp_path / "log.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"log\.parquet: not a readable Parquet file"):
        import_logs(log, tmp_path, model=str(base))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"custom_id": 1, "body": {}}, "custom_id: 1, must be a text that no other"),
        ({"custom_id": "a"}, "body: None, must be an object"),
    ],
)
def test_bad_requests_are_named(line: Any, message: str, imported: Import, tmp_path: Path) -> None:
    requests = write(tmp_path / "r.jsonl", {"custom_id": "b", "body": REQUEST}, line)
    with pytest.raises(ValueError, match=rf"r\.jsonl: line 2: {message}"):
        imported(CHAT, requests=requests)
    unknown = {"custom_id": "c", "response": {"body": answer()}}
    requests = write(tmp_path / "r.jsonl", {"custom_id": "b", "body": REQUEST})
    with pytest.raises(ValueError, match=r"line 1: custom_id: 'c', must be one of those"):
        imported(unknown, requests=requests)


HOOK = """
def hide(messages):
    if any("secret" in m["content"] for m in messages):
        return None
    return [{**m, "content": m["content"].replace("Ann", "Bob")} for m in messages]

def broken(messages):
    return messages[:-1]

def texts(messages):
    return [m["content"] for m in messages]

def fails(messages):
    raise KeyError("x")
"""


def test_personal_data(
    imported: Import,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ids of a text that was changed are those of the changed text."""
    (tmp_path / "hooks_of_test.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    lines = [
        {
            "request": REQUEST,
            "response": answer(token_ids=[*plain("Hello"), END]) | IDS | {"id": "a"},
        },
        {"request": REQUEST, "response": answer("I am Ann", token_ids=[9]) | IDS | {"id": "b"}},
        {"messages": [USER, {**REPLY, "content": "secret"}]},
    ]
    first, second = imported(*lines, redact="hooks_of_test:hide")
    assert (first["token_source"], second["token_source"]) == ("engine", "text")
    assert second["completion_ids"] == [*plain("I am Bob"), END]
    assert figures(capsys.readouterr().out)["dropped"] == 1
    for hook in ("broken", "texts"):
        with pytest.raises(ValueError, match=r"line 1: redact: .* must be messages with the same"):
            imported(CHAT, redact=f"hooks_of_test:{hook}")
    with pytest.raises(ValueError, match=r"line 1: redact: KeyError"):
        imported(CHAT, redact="hooks_of_test:fails")
    with pytest.raises(ValueError, match=r"line 1: messages: \[\], must be there, to be redacted"):
        imported(IDS, redact="hooks_of_test:hide")


@pytest.mark.parametrize("text", ["Hi", "I am Ann"])
def test_an_answer_of_ids_alone_is_not_redacted(
    text: str, imported: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug guarded against: the hook saw the request, and the ids were written."""
    (tmp_path / "hooks_of_ids.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    asked = {"messages": [{"role": "user", "content": text}]}
    lines = [{"request": asked, "response": {**IDS, "choices": [IDS]}}, asked | IDS]
    for line in lines:
        assert [row["token_source"] for row in imported(line)] == ["engine"]
        with pytest.raises(ValueError, match=r"line 1: message: None, must be there beside its"):
            imported(line, redact="hooks_of_ids:hide")
    assert len(list(tmp_path.glob("out-*"))) == len(lines)


def test_a_corrected_hook_is_another_setting(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug guarded against: what the first one let through stayed in the files."""
    monkeypatch.chdir(tmp_path)
    hook = tmp_path / "hooks_to_correct.py"
    hook.write_text(HOOK)
    log = write(tmp_path / "log.jsonl", CHAT)
    redact = "hooks_to_correct:hide"
    for _ in range(2):
        import_logs(log, tmp_path / "out", model=str(base), redact=redact)
    hook.write_text(HOOK.replace("Ann", "Eve"))
    with pytest.raises(ValueError, match=r"^redact_source: .*log\.parquet was made with '\w+'"):
        import_logs(log, tmp_path / "out", model=str(base), redact=redact)


@pytest.mark.parametrize("name", ["nothing", "json", "json:nothing", "nothing:f", ":f"])
def test_a_hook_that_is_none(name: str, imported: Import) -> None:
    with pytest.raises(ValueError, match=f"^redact: '{name}', must be module:function"):
        imported(CHAT, redact=name)


def test_nothing_to_import(base: Path, imported: Import, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^logs: .*empty', must be a file, or a folder with"):
        import_logs(tmp_path / "empty", tmp_path / "out", model=str(base))
    with pytest.raises(ValueError, match=r"^logs: .* must be with answers"):
        imported(REQUEST)
    with pytest.raises(ValueError, match=r"^model: '.*nothing' does not load"):
        import_logs(
            write(tmp_path / "a.jsonl", CHAT), tmp_path / "o", model=str(tmp_path / "nothing")
        )
    plain = tiny_tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"^model: .*plain' has no chat template"):
        import_logs(tmp_path / "a.jsonl", tmp_path / "o", model=str(tmp_path / "plain"))
