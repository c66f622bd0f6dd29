"""What of rollouts the engine is told, beside the prompts themselves."""

import hashlib
from pathlib import Path

import pytest

from tests.support.fake_vllm import FakeVllm, rollout
from tests.support.prompts import write_prompts
from trainer.rollouts import samplers
from trainer.rollouts.prompts import Prompt
from trainer.rollouts.samplers import Engine
from trainer.rollouts.shards import shards_of


def test_any_argument_of_the_engine(vllm: FakeVllm, tmp_path: Path) -> None:
    given = ("tensor-parallel-size=2", "quantization=fp8", 'hf_overrides={"a": [1]}', "x=a=b")
    rollout(write_prompts(tmp_path / "p.jsonl"), tmp_path / "out", model="m", engine_arg=given)
    (options,) = vllm.models
    own = {"tensor_parallel_size": 2, "quantization": "fp8", "hf_overrides": {"a": [1]}, "x": "a=b"}
    assert own.items() <= options.items()
    with pytest.raises(ValueError, match=r"^engine_arg: \['a=1'\], must be left out with a server"):
        Engine(server="http://host", engine_arg=("a=1",)).check()
    with pytest.raises(ValueError, match=r"^engine_arg: 'a=2', must be name=value, once"):
        Engine(engine_arg=("a=1", "a=2")).check()


@pytest.mark.parametrize(
    ("native", "asked", "given"),
    [(True, "auto", "auto"), (False, "auto", "float32"), (False, "bfloat16", "bfloat16")],
)
def test_a_cpu_without_bfloat16(
    native: bool, asked: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would emulate it, several times slower; what was asked for is done."""
    monkeypatch.setattr(samplers, "has_bfloat16", lambda: native)
    assert Engine(dtype=asked).engine_arguments()["dtype"] == given


def test_system_prompts(vllm: FakeVllm, tmp_path: Path) -> None:
    """A prompt's own, or that of all; other ones make other shards."""
    rows = [{"prompt": "a"}, {"prompt": "b", "system": "Be kind."}]
    prompts = write_prompts(tmp_path / "p.jsonl", rows)
    rollout(prompts, tmp_path / "out", model="m", system="Be brief.")
    assert vllm.systems == ["Be brief.", "Be kind."]
    with pytest.raises(ValueError, match=r"^prompts: .*part-00000.* was made with"):
        rollout(prompts, tmp_path / "out", model="m", system="Be slow.")
    with pytest.raises(ValueError, match=r"line 1: system: 3, must be a text"):
        rollout(write_prompts(tmp_path / "q.jsonl", [{"prompt": "a", "system": 3}]), tmp_path / "o",
            model="m")  # fmt: skip


def test_shards_of_before_system_prompts_are_known(tmp_path: Path) -> None:
    """Their digests were of prompts with three fields."""
    for count in (1, 2):
        (shard,) = shards_of([Prompt("7", "d", "it's")] * count, tmp_path, 9, {})
        before = ", ".join(["Prompt(id='7', domain='d', text=\"it's\")"] * count)
        told = f"({before},)" if count == 1 else f"({before})"
        assert shard.settings["prompts"] == hashlib.sha256(told.encode()).hexdigest()[:16]
