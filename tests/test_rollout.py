"""Rollouts with a vLLM made by hand: it answers a prompt with its own bytes."""

import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from trainer.data import read_rollouts
from trainer.rollout import SCHEMA, Prompt, read_prompts, rollout

LINES = [
    {"prompt": "one", "id": 7, "domain": "news"},
    {"prompt": "zwei ü"},
    {"prompt": "three", "id": "x", "more": []},
]
PROMPTS = [Prompt("7", "news", "one"), Prompt("1", "", "zwei ü"), Prompt("x", "", "three")]


def write_prompts(path: Path, rows: Sequence[Any] = LINES) -> Path:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.jsonl.gz"])
def test_read_prompts(name: str, tmp_path: Path) -> None:
    assert list(read_prompts(write_prompts(tmp_path / name))) == PROMPTS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl: line 2: "),
        ("", r"a\.jsonl: line 2: "),
        ("[]", r"a\.jsonl: line 2: prompt: missing or not a text"),
        ('{"text": "hi"}', r"a\.jsonl: line 2: prompt: missing or not a text"),
        ('{"prompt": 3}', r"a\.jsonl: line 2: prompt: missing or not a text"),
        ('{"prompt": null}', r"a\.jsonl: line 2: prompt: missing or not a text"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        list(read_prompts(tmp_path / "a.jsonl"))


@dataclass
class Completion:
    token_ids: Sequence[int]
    finish_reason: str


@dataclass
class Output:
    prompt_token_ids: list[int]
    outputs: list[Completion]


@dataclass
class FakeVllm(ModuleType):
    """Completion k of a prompt repeats its bytes and ends with k; one of over 5 tokens is cut.

    chats: the texts of every call. After `calls_left` calls the next one fails.
    """

    models: list[dict[str, Any]] = field(default_factory=list)
    samplings: list[dict[str, Any]] = field(default_factory=list)
    chats: list[list[str]] = field(default_factory=list)
    calls_left: int = 1000

    def LLM(self, **options: Any) -> "FakeVllm":  # noqa: N802
        self.models.append(options)
        return self

    def SamplingParams(self, **options: Any) -> dict[str, Any]:  # noqa: N802
        self.samplings.append(options)
        return options

    def chat(
        self, chats: list[list[dict[str, str]]], sampling: dict[str, Any], use_tqdm: bool
    ) -> list[Output]:
        if self.calls_left == 0:
            raise KilledError
        self.calls_left -= 1
        assert all([message["role"] for message in chat] == ["user"] for chat in chats)
        texts = [chat[0]["content"] for chat in chats]
        self.chats.append(texts)
        return [
            Output([1, *text.encode(), 2], [answer(text, k) for k in range(sampling["n"])])
            for text in texts
        ]


def answer(text: str, k: int) -> Completion:
    ids = (*text.encode(), k)  # vLLM gives a tuple or its own sequence
    return Completion(ids, "stop" if len(ids) <= 5 else "length")


class KilledError(Exception):
    pass


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return fake


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
        }
        for prompt in PROMPTS
        for k in range(2)
    ]
    read = read_rollouts(tmp_path / "out")
    assert [r.completion_ids.tolist() for r in read] == [row["completion_ids"] for row in rows]
    assert [r.finished for r in read] == [True] * 2 + [False] * 4


def test_the_models_own_distribution_is_sampled(vllm: FakeVllm, tmp_path: Path) -> None:
    """Another temperature or a cut tail would teach the lengths of another model."""
    rollout(
        write_prompts(tmp_path / "p.jsonl"), tmp_path / "out", model="org/m", max_tokens=9, seed=3
    )
    assert vllm.samplings == [{"n": 2, "temperature": 1.0, "top_p": 1.0, "max_tokens": 9}]
    assert vllm.models == [{"model": "org/m", "max_model_len": None, "dtype": "auto", "seed": 3}]


def many(tmp_path: Path, count: int = 10) -> Path:
    return write_prompts(tmp_path / "p.jsonl", [{"prompt": f"p{i}"} for i in range(count)])


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


@pytest.mark.parametrize(("name", "value"), [("shard_size", 0), ("limit", 0), ("limit", -1)])
def test_a_bad_argument_is_named(name: str, value: int, vllm: FakeVllm, tmp_path: Path) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"^{name}: {value}, must be above 0"):
        rollout(many(tmp_path), tmp_path / "out", model="m", **options)
    assert not (tmp_path / "out").exists()


def test_bad_prompts_load_no_model(vllm: FakeVllm, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", [*LINES, {}])
    with pytest.raises(ValueError, match="line 4: prompt"):
        rollout(prompts, tmp_path / "out", model="m")
    assert not vllm.models
    assert not (tmp_path / "out").exists()
