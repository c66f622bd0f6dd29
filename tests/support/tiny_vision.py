"""Tiny random vision-language models of the real classes, their processors, and pictures."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from torch import Tensor

from tests.support.tiny import tiny_tokenizer

PLACEHOLDER = 258
VOCABULARY = 260  # of tiny_tokenizer with MORE
MORE = ("<image>", "<break>")
SIZES = ((90, 60), (40, 100), (64, 64))  # of pictures, of which each has rows of its own number
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
QWEN |= {"out_hidden_size": 32}
SIGLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
SIGLIP |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
LLAMA = {"model_type": "llama"}
TILES = {"do_image_splitting": True, "size": {"longest_edge": 64}}
TILES |= {"max_image_size": {"longest_edge": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}

# name: (class, config of the text, of the tower, of the whole, class of the text part alone,
#        image processor, its config)
BACKBONES: dict[str, tuple[str, Any, Any, Any, str, str, Any]] = {
    "qwen2.5-vl": (
        *("Qwen2_5_VL", {"rope_parameters": MROPE}, QWEN, {}, "Qwen2Model"),
        *("Qwen2VLImageProcessor", {"min_pixels": 28 * 28, "max_pixels": 112 * 112}),
    ),
    "qwen3-vl": (
        *("Qwen3VL", {"rope_parameters": MROPE}),
        *(QWEN | {"deepstack_visual_indexes": [0, 1]}, {}, "Qwen3Model"),
        *("Qwen2VLImageProcessor",),
        {"min_pixels": 32 * 32, "max_pixels": 128 * 128, "patch_size": 16},
    ),
    "gemma3": (
        *("Gemma3", {"sliding_window": 4, "layer_types": KINDS}, SIGLIP),
        *({"mm_tokens_per_image": 16},),
        *("Gemma3TextModel", "Gemma3ImageProcessor", SQUARE),
    ),
    "llava": (
        *("Llava", LLAMA, SIGLIP | {"model_type": "clip_vision_model"}, {}, "LlamaModel"),
        *("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": SQUARE["size"]}),
    ),
    "smolvlm": ("SmolVLM", LLAMA, SIGLIP, {}, "LlamaModel", "SmolVLMImageProcessor", TILES),
    "idefics3": ("Idefics3", LLAMA, SIGLIP, {}, "LlamaModel", "Idefics3ImageProcessor", TILES),
}


def write_backbone(folder: Path, name: str) -> Any:
    """A random vision-language model on disk with tokenizer and image processor; the model."""
    torch.manual_seed(0)
    kind, text, vision, more, _, processor, sizes = BACKBONES[name]
    config = getattr(tf, f"{kind}Config")(
        text_config=TEXT | text, vision_config=vision, image_token_id=PLACEHOLDER, **more
    )
    model = tf.AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():  # else towers add hardly anything
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer(MORE).save_pretrained(folder)
    facts = {"image_processor_type": processor, **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return model.model


def picture(seed: int = 0, width: int = 90, height: int = 60) -> Image.Image:
    """Coloured noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png(seed: int = 0, width: int = 90, height: int = 60) -> bytes:
    """The same as a file."""
    return as_png(picture(seed, width, height))


def as_png(image: Image.Image) -> bytes:
    """A file of it."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def text_with(rows: list[int], tile: int | None = None) -> list[int]:
    """A text with pictures of so many rows; with a token between each `tile` of them."""
    found = [5, 6, 7]
    for number, count in enumerate(rows):
        step = tile or count
        for start in range(0, count, step):
            found += [259, *[PLACEHOLDER] * min(step, count - start)]
        found += [259, 10 + number, 20 + number]
    return [*found, 30, 31, 32]


@torch.inference_mode()
def whole_hidden(model: Any, tokens: list[int], pixels: list[dict[str, Tensor]]) -> Tensor:
    """(T, H) by plain transformers' whole model, everything at once."""
    ids = torch.tensor([tokens])
    is_row = (ids == PLACEHOLDER).long()
    given: dict[str, Any] = {}
    for name in pixels[0] if pixels else ():
        parts = [one[name] for one in pixels]
        along = 1 if name in ("pixel_values", "pixel_attention_mask") and parts[0].ndim > 4 else 0
        along = 1 if name == "pixel_attention_mask" else along
        given[name] = torch.cat(parts, dim=along)
    if model.config.model_type.startswith("qwen"):
        given["mm_token_type_ids"] = is_row
    if model.config.model_type == "gemma3":
        given["token_type_ids"] = is_row
    output: Tensor = model(ids, use_cache=False, **given).last_hidden_state
    return output[0]
