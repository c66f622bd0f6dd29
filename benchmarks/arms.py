"""The ways to get a text of a wished length that LIFEBench compares; all of them also ask in words.

prompt      words alone
limits      max_tokens and min_tokens
ramp        end-of-sequence gets likelier as the target nears (benchmarks/ramp.py), no model
greedy      length_target by the paper's rule, rails off
project     length_target by the smallest change, rails off
railed      length_target as it is by default
"""

from typing import Any

from benchmarks.endpoint import Endpoint

ARMS = ("prompt", "limits", "ramp", "greedy", "project", "railed")
# What an arm needs of its server, and a request that only such a server refuses.
PROBES: dict[str, tuple[dict[str, Any], str]] = {
    "ramp": ({"vllm_xargs": {"ramp_tokens": 0}}, "benchmarks.ramp:Ramp"),
    **dict.fromkeys(ARMS[3:], ({"length_target": {"tokens": 0}}, "lenvm_vllm")),
}


def fields(arm: str, mode: str, tokens: int) -> dict[str, Any] | None:
    """What a request of this arm adds; None where it has no means for the mode."""
    if arm == "prompt":
        return {}
    if arm == "limits":  # vLLM counts min_tokens without the end
        least = {} if mode == "at_most" else {"min_tokens": tokens - 1}
        return least if mode == "at_least" else {**least, "max_tokens": tokens}
    if arm == "ramp":
        return None if mode == "at_least" else {"vllm_xargs": {"ramp_tokens": tokens}}
    target: dict[str, Any] = {"mode": mode, "tokens": tokens}
    if arm != "railed":
        target |= {"tolerance": None, "policy": arm}
    return {"length_target": target}


def check_arms(arms: tuple[str, ...], endpoint: Endpoint) -> None:
    """Raises ValueError for an arm that is unknown or that the server cannot do."""
    for arm in arms:
        if arm not in ARMS:
            raise ValueError(f"arms: {arm!r}, must be one of {', '.join(ARMS)}")
        probe, processor = PROBES.get(arm, (None, ""))
        if probe and not endpoint.refuses(probe):
            raise ValueError(
                f"arms: {arm!r} needs a vLLM started with --logits-processors {processor}, which "
                f"{endpoint.url} is not"
            )
