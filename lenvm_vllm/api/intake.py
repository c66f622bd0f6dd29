"""What becomes of a guided request on its way into the engine.

The one place that every route leads through, with the model's configuration, the length of the
prompt, and a copy of the parameters that is the engine's own.
"""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

from lenvm_vllm.api.errors import check_context, check_prefix
from lenvm_vllm.host.sampling import take_from
from lenvm_vllm.target.admission import Limits, check_admission, only_prefills, resolved
from lenvm_vllm.target.rails import bounds_of, needed_by, rails_of
from lenvm_vllm.target.request import (
    ADAPTER,
    FIELD,
    HAS_CALLS,
    MEDIA,
    UNSEEN,
    LengthTarget,
    LengthTargetError,
)
from lenvm_vllm.text.tokenizer import decoded, tokenizer_of
from value_server.contract.units import UNITS, count

_SECRET = secrets.token_bytes(32)


def proof(digests: Sequence[str]) -> str:
    """What `pictures` of this process writes before the digests that it tells. No client can make
    it; one that hears of it, as in an error of vLLM's, has it for its own pictures alone."""
    said = repr(list(digests)).encode()  # which no other list has
    return hashlib.blake2b(said, key=_SECRET, digest_size=16).hexdigest()


def take_in(config: Any, request: Any) -> None:
    """Prepare an EngineCoreRequest; one without a length target stays as it is.

    Raises LengthTargetError, which vLLM answers with HTTP 400.
    """
    params = request.sampling_params
    if params is None or (target := LengthTarget.from_extra_args(params.extra_args)) is None:
        return
    target = resolved(target, config)
    # The engine's processors are told neither of an adapter nor of pictures; a client's word for
    # them counts for nothing.
    adapter = request.lora_request.lora_name if request.lora_request is not None else ""
    known = {ADAPTER: adapter, MEDIA: _media(request)}
    params.extra_args = {**params.extra_args, **target.to_xargs(), **known}
    prompt = len(request.prompt_token_ids or ())
    check_prefix(target.prefix_tokens, prompt)
    room = config.model_config.max_model_len - prompt
    if not only_prefills(config):
        check_context(needed_by(target).behind(target.prefix_tokens).first, prompt, room)
    params.max_tokens = min(params.max_tokens, room)  # the context ends a text as it does
    check_admission(target, Limits.of(params), config)
    _check_prefix_text(target, request.prompt_token_ids, config)
    if not only_prefills(config):
        _hold_stop_strings(params, target)
    # Model Runner V2 penalises before the plugin has its turn.
    take_from(params, penalties=not config.use_v2_model_runner)


def _check_prefix_text(target: LengthTarget, prompt_ids: Sequence[int] | None, config: Any) -> None:
    """For a prefix that has more words or characters than the whole completion may have."""
    most = None if target.unit == UNITS[0] else bounds_of(target).last
    if most is None or not target.prefix_tokens or prompt_ids is None:
        return
    text = decoded(tokenizer_of(config), list(prompt_ids)[-target.prefix_tokens :])
    if (amount := count(text, target.unit)) > most:
        raise LengthTargetError(
            f"{FIELD}.prefix_tokens: {target.prefix_tokens}, whose text has {amount} "
            f"{target.unit}, of a completion that has at most {most}"
        )


def _media(request: Any) -> list[str]:
    """An entry for each part of its prompt that is no text: the digests that the middleware told,
    if these are its pictures, one by one, and there is nothing else."""
    features = request.mm_features or ()
    told = request.sampling_params.extra_args.get(MEDIA)
    known = isinstance(told, list) and all(isinstance(entry, str) for entry in told)
    known = known and told[:1] == [proof(told[1:])] and len(told) == len(features) + 1
    others = any(feature.modality != "image" for feature in features)
    if known and not others and request.prompt_embeds is None:
        return list(told[1:])
    return [UNSEEN] * (len(features) + (request.prompt_embeds is not None))


def _hold_stop_strings(params: Any, target: LengthTarget) -> None:
    """No stop string before the lower rail: vLLM looks for them behind `min_tokens` tokens.

    Of an answer whose thinking is still to come it holds them as long as the answer would have.
    With tools it holds none: before so many tokens vLLM would not end a text whose call is whole.
    """
    if params.stop and not params.extra_args.get(HAS_CALLS):
        least = rails_of(target).behind(target.prefix_tokens).first - 1
        params.min_tokens = min(max(params.min_tokens, least), params.max_tokens)
