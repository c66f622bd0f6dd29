"""What of a prompt is no text, on its way into vLLM's engine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import PlaceholderRange
from vllm.v1.engine.input_processor import InputProcessor

from lenvm_vllm.api.intake import proof, take_in
from lenvm_vllm.host import served
from lenvm_vllm.plugin import BARE, register
from lenvm_vllm.target.request import MEDIA, UNSEEN
from tests.support.fakes import config, entering, params
from tests.support.tiny_llm import tiny_llm


def test_vllms_own_door_tells_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline too, where no middleware is. Hashes and placeholders are what the engine has."""
    register()
    monkeypatch.setattr(served, "config", None)  # and back, behind this test
    args = EngineArgs(model=str(tiny_llm(tmp_path)), logits_processors=[BARE], max_model_len=512)
    door = InputProcessor(args.create_engine_config())
    door.mm_encoder_cache_size = 100  # as of a model that takes pictures
    parts = {"image": 2, "audio": 1}
    places = {"image": [(2, 3), (7, 1)], "audio": [(5, 1)]}
    prompt = {
        "type": "multimodal",
        "prompt_token_ids": [5] * 10,
        "mm_kwargs": {kind: [None] * n for kind, n in parts.items()},
        "mm_hashes": {kind: ["x"] * n for kind, n in parts.items()},
        "mm_placeholders": {
            kind: [PlaceholderRange(offset=at, length=n) for at, n in found]
            for kind, found in places.items()
        },
    }
    text = {"type": "token", "prompt_token_ids": [5]}
    for asked, told in ((prompt, [UNSEEN] * 3), (text, [])):
        made = door.process_inputs("one", asked, params(80), supported_tasks=("generate",))
        assert made.sampling_params is not None
        assert made.sampling_params.extra_args[MEDIA] == told


def test_a_client_does_not_say_what_is_seen() -> None:
    own = {"length_target": 80, MEDIA: ["f" * 64]}
    for found, told in ((None, []), ([], []), ([feature("image")], [UNSEEN])):
        request = entering(params(own), mm_features=found)
        take_in(config(), request)
        assert request.sampling_params.extra_args[MEDIA] == told
    request = entering(params(own), prompt_embeds=torch.zeros(1, 4))  # of a part of a message
    take_in(config(), request)
    assert request.sampling_params.extra_args[MEDIA] == [UNSEEN]


def feature(modality: str) -> Any:
    return SimpleNamespace(modality=modality)


@pytest.mark.parametrize(
    ("digests", "found", "told"),
    [
        (["a"], ["image"], ["a"]),
        (["a", "b"], ["image", "image"], ["a", "b"]),
        (["a"], ["image", "image"], [UNSEEN] * 2),  # one in a form that the middleware did not know
        (["a", "b"], ["image"], [UNSEEN]),
        (["a"], ["video"], [UNSEEN]),
        (["a"], ["image", "audio"], [UNSEEN] * 2),
        (["a"], [], []),
        ([], ["image"], [UNSEEN]),
    ],
)
def test_the_middlewares_word_counts_for_the_very_pictures(
    digests: list[str], found: list[str], told: list[str]
) -> None:
    wanted = params({"length_target": 80, MEDIA: [proof(digests), *digests]})
    request = entering(wanted, mm_features=[feature(modality) for modality in found])
    take_in(config(), request)
    assert wanted.extra_args is not None
    assert wanted.extra_args[MEDIA] == told
    assert proof(digests) not in str(wanted.extra_args)


@pytest.mark.parametrize(
    "own",
    [
        [],
        ["a"],
        [proof(["b"]), "a"],
        [proof(["a", "b"]), "a b"],
        [5, "a"],
        ["\ud800", "a"],
        [proof(["a"]), "\ud800"],
        "ab",
        7,
    ],
)
def test_no_other_word_does(own: Any) -> None:
    wanted = params({"length_target": 80, MEDIA: own})
    take_in(config(), entering(wanted, mm_features=[feature("image")]))
    assert wanted.extra_args is not None
    assert wanted.extra_args[MEDIA] == [UNSEEN]
