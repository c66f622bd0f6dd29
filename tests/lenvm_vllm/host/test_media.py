"""Which tokens of a prompt stand for pictures, sound and video."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from lenvm_vllm.host.media import placeholder_ids


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("llama", set()),
        ("llava", {"image_token_index", "image_token_id"}),
        ("idefics3", {"image_token_id"}),
        ("gemma3", {"image_token_index", "image_token_id"}),
        ("qwen2_5_vl", {"image_token_id", "video_token_id"}),
        ("qwen2_audio", {"audio_token_index", "audio_token_id"}),
    ],
)
def test_real_configurations_name_them(kind: str, ids: set[str]) -> None:
    config = AutoConfig.for_model(kind)
    found = placeholder_ids(config)
    assert found == {getattr(config, name) for name in ids if hasattr(config, name)}
    assert bool(found) is bool(ids)


@pytest.mark.parametrize(
    "config", [None, SimpleNamespace(), SimpleNamespace(image_token_id=None, image_token_index="x")]
)
def test_one_that_names_none(config: Any) -> None:
    assert placeholder_ids(config) == frozenset()
