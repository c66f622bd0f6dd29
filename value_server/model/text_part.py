"""The text part of a vision-language backbone: the decoder without what sees.

Qwen's is taken as the plain Qwen decoder: on text its three position axes agree, so they are one,
and its own class does not tell packed texts apart.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

PLAIN: dict[str, type[PreTrainedConfig]] = {
    "qwen2_vl_text": Qwen2Config,
    "qwen2_5_vl_text": Qwen2Config,
    "qwen3_vl_text": Qwen3Config,
}


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the decoder; `config` itself where there is no other part."""
    text = config.get_text_config()
    if text.model_type not in PLAIN:
        return text
    facts: dict[str, Any] = text.to_dict()
    rope = {"rope_type": "default", "rope_theta": facts["rope_parameters"]["rope_theta"]}
    facts |= {"rope_parameters": rope, "tie_word_embeddings": config.tie_word_embeddings}
    return PLAIN[facts.pop("model_type")](**facts)


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder in `model`; `model` itself where there is no other part."""
    config = text_config(model.config)
    if config is model.config:
        return model
    decoder = model.get_decoder()
    if config is decoder.config:
        return decoder
    plain = AutoModel.from_config(
        config, dtype=decoder.dtype, attn_implementation=decoder.config._attn_implementation
    )
    plain.load_state_dict(decoder.state_dict())
    return plain


def picture_token(source: str) -> int:
    """Placeholder of pictures in the texts of a model that lies here; -1 where it has none."""
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):  # a full checkpoint can do without its base model
        return -1
    token = getattr(config, "image_token_id", None)
    return -1 if token is None else int(token)
