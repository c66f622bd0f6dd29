"""Rollouts with a vLLM made by hand."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from jinja2 import TemplateError

from tests.support.fake_vllm import FakeVllm, KilledError, answer, rollout
from tests.support.prompts import LINES, PROMPTS, many, write_prompts
from trainer.columns import SCHEMA
from trainer.rollout_files import read_rollouts


def rows_of(*files: Path) -> list[dict[str, Any]]:
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_tokens_and_finish_reasons_are_kept(vllm: FakeVllm, tmp_path: Path) -> None:
    rollout(write_prompts(tmp_path / "p.jsonl"), tmp_path / "out", model="org/m", n=2)
    (file,) = (tmp_path / "out").iterdir()
    assert pq.read_schema(file).equals(SCHEMA)
    rows = rows_of(file)
    assert rows == [
        {
            "prompt_id": prompt.id,
            "domain": prompt.domain,
            "prompt": prompt.text,
            "prompt_ids": [1, *prompt.text.encode(), 2],
            "completion_ids": list(answer(prompt.text, k).token_ids),
            "finish_reason": "stop" if prompt.text == "one" else "length",
            "conversation": None,
            "token_source": "engine",
            "pictures": None,
            "picture_bytes": None,
        }
        for prompt in PROMPTS
        for k in range(2)
    ]
    read = read_rollouts(tmp_path / "out")
    assert [r.completion_ids.tolist() for r in read] == [row["completion_ids"] for row in rows]
    assert [r.finished for r in read] == [True] * 2 + [False] * 4


def test_the_models_own_distribution_is_sampled(
    vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another temperature or a cut tail would teach the lengths of another model."""
    monkeypatch.setattr("trainer.rollouts.samplers.has_bfloat16", lambda: True)
    rollout(
        write_prompts(tmp_path / "p.jsonl"), tmp_path / "out", model="org/m", max_tokens=9, seed=3
    )
    assert vllm.samplings == [{"n": 2, "temperature": 1.0, "top_p": 1.0, "max_tokens": 9}]
    assert vllm.models == [{"model": "org/m", "max_model_len": None, "dtype": "auto", "seed": 3}]


def test_shards_hold_the_prompts_in_order(vllm: FakeVllm, tmp_path: Path) -> None:
    rollout(many(tmp_path), tmp_path / "out", model="m", n=1, shard_size=4, limit=9)
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"part-0000{i}.parquet" for i in range(3)]
    assert [len(rows_of(file)) for file in files] == [4, 4, 1]
    assert [row["prompt"] for row in rows_of(*files)] == [f"p{i}" for i in range(9)]


def test_a_stopped_run_goes_on_with_the_first_missing_shard(vllm: FakeVllm, tmp_path: Path) -> None:
    prompts, out = many(tmp_path), tmp_path / "out"
    vllm.calls_left = 2
    with pytest.raises(KilledError):
        rollout(prompts, out, model="m", n=1, shard_size=4)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()}
    assert sorted(file.name for file in before) == ["part-00000.parquet", "part-00001.parquet"]

    vllm.calls_left = 2
    rollout(prompts, out, model="m", n=1, shard_size=4)
    assert vllm.chats[2:] == [["p8", "p9"]]
    for file, content in before.items():
        assert (file.read_bytes(), file.stat().st_mtime_ns) == content
    assert [r.prompt_id for r in read_rollouts(out)] == [str(i) for i in range(10)]


def test_a_hole_is_filled(vllm: FakeVllm, tmp_path: Path) -> None:
    prompts, out = many(tmp_path), tmp_path / "out"
    rollout(prompts, out, model="m", shard_size=4)
    (out / "part-00001.parquet").unlink()
    rollout(prompts, out, model="m", shard_size=4)
    assert vllm.chats[3:] == [["p4", "p5", "p6", "p7"]]


def test_a_shard_exists_only_whole(
    vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_table: Any, where: Path) -> None:
        where.write_bytes(b"PAR1")
        raise OSError("no space left")

    prompts, out = many(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full_disk)
        with pytest.raises(OSError, match="no space left"):
            rollout(prompts, out, model="m")
    assert not list(out.glob("*.parquet"))
    rollout(prompts, out, model="m")
    assert [file.name for file in out.iterdir()] == ["part-00000.parquet"]


def test_nothing_left_to_do_loads_no_model(vllm: FakeVllm, tmp_path: Path) -> None:
    for _ in range(2):
        rollout(many(tmp_path), tmp_path / "out", model="m")
    assert len(vllm.models) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shard_size", 0),
        ("limit", 0),
        ("limit", -1),
        ("n", 0),
        ("max_tokens", 0),
        ("temperature", -0.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("concurrency", 0),
        ("engine_arg", "tensor_parallel_size"),
        ("engine_arg", "dtype=half"),
        ("engine_arg", "=1"),
        ("plot", "a.txt"),
        ("template", "no place"),
        ("template", "{prompt} {other}"),
        ("template", "{prompt} }"),
    ],
)
def test_a_bad_argument_is_named(name: str, value: Any, vllm: FakeVllm, tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"plot": Path, "engine_arg": lambda text: (text,)}
    options: dict[str, Any] = {name: kinds.get(name, lambda own: own)(value)}
    with pytest.raises(ValueError, match=f"^{name}: {re.escape(repr(value))}, "):
        rollout(many(tmp_path), tmp_path / "out", model="m", **options)
    assert not (tmp_path / "out").exists()


def test_bad_prompts_load_no_model(vllm: FakeVllm, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", [*LINES, {}])
    with pytest.raises(ValueError, match="line 4: prompt"):
        rollout(prompts, tmp_path / "out", model="m")
    assert not vllm.models
    assert not (tmp_path / "out").exists()


def test_no_prompts(vllm: FakeVllm, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^prompts: .* must be a file with prompts"):
        rollout(write_prompts(tmp_path / "p.jsonl", []), tmp_path / "out", model="m")


@pytest.mark.parametrize(
    ("name", "value"), [("model", "other"), ("n", 1), ("max_tokens", 9), ("top_p", 0.9)]
)
def test_shards_sampled_otherwise_are_not_mixed(
    name: str, value: Any, vllm: FakeVllm, tmp_path: Path
) -> None:
    prompts = many(tmp_path)
    rollout(prompts, tmp_path / "out", model="m", shard_size=4)
    (tmp_path / "out" / "part-00002.parquet").unlink()
    with pytest.raises(ValueError, match=rf"^{name}: .*part-00000\.parquet was made with"):
        rollout(prompts, tmp_path / "out", **{"model": "m", "shard_size": 4, name: value})


def test_shards_of_other_prompts_are_not_taken_for_these(vllm: FakeVllm, tmp_path: Path) -> None:
    rollout(many(tmp_path), tmp_path / "out", model="m", shard_size=4)
    for change in ({"shard_size": 5}, {"template": "{prompt}!"}):
        with pytest.raises(ValueError, match=r"^prompts: .*part-00000"):
            rollout(many(tmp_path), tmp_path / "out", model="m", **{"shard_size": 4} | change)


def test_a_broken_shard_is_named(vllm: FakeVllm, tmp_path: Path) -> None:
    rollout(many(tmp_path), tmp_path / "out", model="m", shard_size=4)
    (tmp_path / "out" / "part-00001.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"part-00001\.parquet: not a readable Parquet file"):
        rollout(many(tmp_path), tmp_path / "out", model="m", shard_size=4)


def test_a_domain_may_be_called_all(vllm: FakeVllm, tmp_path: Path) -> None:
    """As all domains together are in the table."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "one", "domain": "all"}) + "\n")
    plot = tmp_path / "none" / "p.svg"  # in a folder that is not there yet
    rollout(prompts, tmp_path / "out", model="m", plot=plot)
    assert "<svg" in plot.read_text()


def test_shards_are_a_data_set(vllm: FakeVllm, tmp_path: Path) -> None:
    rollout(many(tmp_path), tmp_path / "out", model="m", n=2, shard_size=4)
    files = [str(file) for file in sorted((tmp_path / "out").iterdir())]
    loaded = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 20
    assert loaded[0]["completion_ids"] == [*b"p0", 0]


def test_prompts_that_are_too_long_are_left_out_and_told(
    vllm: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bug guarded against: one long prompt, and its shard can never be sampled."""
    prompts = write_prompts(tmp_path / "p.jsonl")  # of 5, 9 and 7 tokens
    rollout(prompts, tmp_path / "out", model="m", max_model_len=7)
    assert vllm.chats == [["one"]]
    assert {r.prompt_id for r in read_rollouts(tmp_path / "out")} == {"7"}
    assert "part-00000.parquet: 2 prompts are too long for m, left out" in capsys.readouterr().out


def test_a_prompt_that_the_chat_template_refuses_is_named(
    vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some take no system prompt, others want user and assistant by turns."""

    def refuse(_self: FakeVllm, chat: list[dict[str, str]], **_options: bool) -> dict[str, Any]:
        if chat[0]["role"] == "system":
            raise TemplateError("System role not supported")
        return {"input_ids": [1]}

    monkeypatch.setattr(FakeVllm, "apply_chat_template", refuse)
    rows = [{"prompt": "a"}, {"prompt": "b", "id": "x", "system": "Be kind."}]
    with pytest.raises(ValueError, match=r"^prompt x: the chat template of m refuses it: System"):
        rollout(write_prompts(tmp_path / "p.jsonl", rows), tmp_path / "out", model="m")


def test_a_template_stands_around_each_prompt(vllm: FakeVllm, tmp_path: Path) -> None:
    template = "In {{one}} word: {prompt}?"
    rollout(write_prompts(tmp_path / "p.jsonl"), tmp_path / "out", model="m", template=template)
    assert vllm.chats == [
        ["In {one} word: one?", "In {one} word: zwei ü?", "In {one} word: three?"]
    ]


def test_it_ends_with_the_lengths(
    vllm: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of "one" two completions of 4 tokens; the other prompts, of 8 and 6, are cut."""
    prompts, out = write_prompts(tmp_path / "p.jsonl"), tmp_path / "out"
    rollout(prompts, out, model="m", plot=tmp_path / "p.svg")
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {
        "": {"completions": 4, "tokens": 28, "cut": 4, "mean": 7.0, **dict.fromkeys(PERCENTILES)},
        "news": {"completions": 2, "tokens": 8, "cut": 0, "mean": 4.0}
        | dict.fromkeys(PERCENTILES, 4.0),
        "all": {"completions": 6, "tokens": 36, "cut": 4, "mean": 6.0}
        | dict.fromkeys(PERCENTILES, 4.0),
    }
    assert [line.split("|")[1].strip() for line in table] == ["domain", "---", "", "news", "all"]
    assert "<svg" in (tmp_path / "p.svg").read_text()


PERCENTILES = ("p50", "p90", "p99")
