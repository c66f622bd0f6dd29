"""Every name of vLLM that the plugin leans on, read from 0.32 and 0.33.

`from lenvm_vllm.host.names import X` loads the module of X only, when it is asked for. A name
that a newer vLLM has moved is an ImportError that tells which; a test walks through all tables.
"""

import pkgutil
from typing import Any

_RANKS = "vllm.distributed.parallel_state"
_CHAT = "vllm.entrypoints.openai.chat_completion.protocol"
# our name: module and name there
WHERE = {
    "EngineArgs": "vllm.engine.arg_utils:EngineArgs",
    "SamplingParams": "vllm.sampling_params:SamplingParams",
    "V1LogitsProcessor": "vllm.v1.sample.logits_processor:LogitsProcessor",
    "BatchUpdate": "vllm.v1.sample.logits_processor:BatchUpdate",
    "MoveDirectionality": "vllm.v1.sample.logits_processor:MoveDirectionality",
    "V2LogitsProcessor": "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor",
    "LogitsContext": "vllm.v1.worker.gpu.sample.logits_processor:LogitsContext",
    "RequestSlots": "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcRequestState",
    "vllm_command": "vllm.entrypoints.cli.main:main",
    "VllmConfig": "vllm.config:VllmConfig",
    "ModelConfig": "vllm.config:ModelConfig",
    "ReasoningConfig": "vllm.config.reasoning:ReasoningConfig",
    "ParallelConfig": "vllm.config:ParallelConfig",
    "CacheConfig": "vllm.config:CacheConfig",
    "KVTransferConfig": "vllm.config:KVTransferConfig",
    "ECTransferConfig": "vllm.config:ECTransferConfig",
    "DeviceConfig": "vllm.config:DeviceConfig",
    "SchedulerConfig": "vllm.config:SchedulerConfig",
    "GroupCoordinator": f"{_RANKS}:GroupCoordinator",
    "get_pp_group": f"{_RANKS}:get_pp_group",
    "get_tp_group": f"{_RANKS}:get_tp_group",
    "model_parallel_is_initialized": f"{_RANKS}:model_parallel_is_initialized",
    "ChatCompletionRequest": f"{_CHAT}:ChatCompletionRequest",
    "EngineCoreRequest": "vllm.v1.engine:EngineCoreRequest",
    "InputProcessor": "vllm.v1.engine.input_processor:InputProcessor",
    "LoRARequest": "vllm.lora.request:LoRARequest",
    "apply_top_k_top_p": "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p",
    "apply_all_penalties": "vllm.v1.sample.ops.penalties:apply_all_penalties",
    "MultiModalConfig": "vllm.config:MultiModalConfig",
    "MediaConnector": "vllm.multimodal.media:MediaConnector",
    "MEDIA_CONNECTORS": "vllm.multimodal.media:MEDIA_CONNECTOR_REGISTRY",
    "envs": "vllm.envs",
    "cached_tokenizer_from_config": "vllm.tokenizers:cached_tokenizer_from_config",
}

# What is read, called or overridden of a class: the parameters of its methods, and its fields.
METHODS = {
    "EngineArgs": {
        "from_cli_args": "args",
        "create_engine_config": "self usage_context headless",
    },
    "V1LogitsProcessor": {
        "__init__": "self vllm_config device is_pin_memory",
        "apply": "self logits",
        "update_state": "self batch_update",
        "is_argmax_invariant": "self",
        "validate_params": "sampling_params",
    },
    "V2LogitsProcessor": {
        "__init__": "self vllm_config req_states",
        "add_request": "self req_idx sampling_params",
        "apply": "self logits ctx",
        "validate_params": "sampling_params",
    },
    "ChatCompletionRequest": {"to_sampling_params": "self max_tokens default_sampling_params"},
    "MediaConnector": {
        "__init__": (
            "self media_io_kwargs connection allowed_local_media_path allowed_media_domains"
        ),
        "load_from_url_async": "self url media_io fetch_timeout",
    },
    "GroupCoordinator": {"broadcast_object": "self obj src"},
}
FIELDS = {
    "EngineArgs": "logits_processors",
    "SamplingParams": (
        "extra_args max_tokens min_tokens ignore_eos all_stop_token_ids temperature top_k top_p "
        "min_p thinking_token_budget stop repetition_penalty frequency_penalty presence_penalty"
    ),
    "InputProcessor": "process_inputs",
    "EngineCoreRequest": (
        "sampling_params prompt_token_ids prompt_embeds lora_request mm_features"
    ),
    "LoRARequest": "lora_name",
    "BatchUpdate": "removed added moved",
    "MoveDirectionality": "SWAP UNIDIRECTIONAL",
    "LogitsContext": "idx_mapping_np seq_lens_upper_bound_np",
    "RequestSlots": "all_token_ids prompt_len prefill_len total_len",
    "VllmConfig": (
        "additional_config model_config parallel_config speculative_config reasoning_config "
        "scheduler_config use_v2_model_runner cache_config kv_transfer_config ec_transfer_config "
        "device_config"
    ),
    "ModelConfig": (
        "skip_tokenizer_init max_model_len override_generation_config logits_processors hf_config "
        "multimodal_config allowed_local_media_path allowed_media_domains"
    ),
    "MultiModalConfig": "mm_processor_kwargs media_io_kwargs",
    "MEDIA_CONNECTORS": "load",
    "envs": "VLLM_MEDIA_CONNECTOR VLLM_IMAGE_FETCH_TIMEOUT",
    "ReasoningConfig": "natural_reasoning_end_token_ids reasoning_start_token_ids",
    "SchedulerConfig": "policy",
    "KVTransferConfig": "kv_role",
    "ECTransferConfig": "ec_role",
    "ParallelConfig": "enable_batch_sharded_sampling data_parallel_size pipeline_parallel_size",
    "CacheConfig": "enable_prefix_caching",
    "DeviceConfig": "device_type",
}


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return pkgutil.resolve_name(WHERE[name])
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"this vLLM has no {WHERE[name].replace(':', '.')}, which lenvm-vllm needs; "
            "pyproject.toml tells the versions that have"
        ) from error
