"""The ways to get a text of a wished length that LIFEBench compares; all of them also say it.

prompt      saying it alone
limits      max_tokens and min_tokens; of tokens only
ramp        end-of-sequence gets likelier as the target nears (benchmarks/ramp.py), no model;
            of tokens only
countdown   the prompt asks the model to number its words down to 0 (countdown.py), no model
greedy      length_target by the paper's rule, rails off
project     length_target by the smallest change, rails off
single      the same with guard rails, one ending
railed      length_target as it is by default: with other endings where the first is not good

Without values, but with all the rest, to tell what these bring:

rails            the guard rails alone, one ending
rails+endings    with as many other endings as railed, chosen by the same rule
limits+endings   the same with rails at the target itself, as limits has them
ramp+endings     the ramp between the rails, with these endings; of tokens only
landing          rails and the landing that needs no values, one ending
landing+endings  with these endings

All with a length_target take other options of it behind a colon: `railed:tolerance=0.05`,
`project:max_kl=0.4,every=2`.
"""

import json
from typing import Any

from benchmarks.endpoint import Endpoint, Job
from benchmarks.evidence import countdown
from lenvm_vllm.target.request import LengthTarget, LengthTargetError
from value_server.contract.units import UNITS, WORDS

WITHOUT_RAILS = {"tolerance": None}
RAMP = "ramp"  # how the names of the arms begin that need benchmarks/ramp.py
TARGETED: dict[str, dict[str, Any]] = {
    "greedy": {**WITHOUT_RAILS, "policy": "greedy"},
    "project": {**WITHOUT_RAILS, "policy": "project"},
    "single": {"endings": 1},
    "railed": {},
    "rails": {"policy": "rails", "endings": 1},
    "rails+endings": {"policy": "rails"},
    "limits+endings": {"policy": "rails", "tolerance": 0},
    "ramp+endings": {"policy": "rails"},
    "landing": {"policy": "landing", "endings": 1},
    "landing+endings": {"policy": "landing"},
}
ARMS = ("prompt", "limits", RAMP, countdown.ARM, *TARGETED)
CHOSEN = "end, length"
USUAL = ARMS[: ARMS.index("railed") + 1]  # those of a run that names none
# What an arm needs of its server, and a request that only such a server refuses.
PROBES: dict[str, tuple[dict[str, Any], str]] = {
    "ramp": ({"vllm_xargs": {"ramp_tokens": 0}}, "benchmarks.ramp:Ramp"),
    **dict.fromkeys(TARGETED, ({"length_target": {"tokens": 0}}, "lenvm_vllm")),
    "ramp+endings": ({"vllm_xargs": {"ramp_tokens": 0}}, "benchmarks.ramp:Ramp lenvm_vllm"),
}


def fields(arm: str, mode: str, amount: int, unit: str = UNITS[0]) -> dict[str, Any] | None:
    """What a request of this arm adds; None where it has no means for the mode or the unit."""
    if arm == "prompt":
        return {}
    if arm == countdown.ARM:
        return countdown.fields(mode)
    if arm in ("limits", "ramp"):
        return _in_tokens(arm, mode, amount) if unit == UNITS[0] else None
    name, _, options = arm.partition(":")
    wish = {"length_target": {"mode": mode, unit: amount, **TARGETED[name], **_options(options)}}
    if name != "ramp+endings":
        return wish
    ramp = _in_tokens("ramp", mode, amount) if unit == UNITS[0] else None
    return ramp and {**ramp, **wish}


def job_of(
    facts: dict[str, Any], text: str, body: dict[str, Any], unit: str, tokenizer: Any
) -> Job | None:
    """The request for the length that `facts` name by arm, mode, target and language, in `unit`;
    None where the arm has no means for it. The same prompt and body in every arm, but for what the
    arm itself adds.

    tokenizer: of the served model, for the countdown; see there.
    """
    arm, mode, target = facts["arm"], facts["mode"], facts["target"]
    if (more := fields(arm, mode, target, unit)) is None:
        return None
    asked = text
    if arm == countdown.ARM:
        words = countdown.words_of(target, unit, text, tokenizer)
        asked = f"{text}\n\n{countdown.rule(words, facts['language'], mode)}"
        more |= {"max_tokens": countdown.limit(words, body["max_tokens"])}
    return Job(facts, [{"role": "user", "content": asked}], {**body, **more}, bare=text)


def chosen_by(arm: str, mode: str) -> str:
    """What an arm's other endings are chosen by, which its own figures then measure; empty where it
    has none. A second model's judgement of them is in `compare`."""
    if arm.partition(":")[0] not in ARMS:  # of an older run
        return ""
    wish = (fields(arm, mode, 100, WORDS) or fields(arm, mode, 100) or {}).get("length_target")
    if wish is None:
        return ""
    target = LengthTarget.parse(wish)
    several = target.endings if target.endings is not None else 1 + (target.tolerance is not None)
    may = several > 1 and mode != "at_least"
    return CHOSEN if may or target.best_of > 1 else ""


def _in_tokens(arm: str, mode: str, tokens: int) -> dict[str, Any] | None:
    if arm == "ramp":
        return None if mode == "at_least" else {"vllm_xargs": {"ramp_tokens": tokens}}
    least = {} if mode == "at_most" else {"min_tokens": tokens - 1}  # vLLM counts without the end
    return least if mode == "at_least" else {**least, "max_tokens": tokens}


def _options(text: str) -> dict[str, Any]:
    """`a=1,b=x` as an object; values are JSON where they can be."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def check_arms(arms: tuple[str, ...], unit: str = UNITS[0]) -> None:
    """Raises ValueError for an arm that is unknown, or whose options are."""
    for arm in arms:
        name, colon, _ = arm.partition(":")
        if name not in ARMS or (colon and name not in TARGETED):
            raise ValueError(f"arms: {arm!r}, must be one of {', '.join(ARMS)}")
        if wish := (fields(arm, "equal_to", 100, unit) or {}).get("length_target"):
            try:
                LengthTarget.parse(wish)
            except LengthTargetError as error:
                raise ValueError(f"arms: {arm!r}: {error}") from error


def check_served(arms: tuple[str, ...], endpoint: Endpoint) -> None:
    """Raises ValueError for an arm that the server cannot do."""
    for arm in arms:
        probe, processor = PROBES.get(arm.partition(":")[0], (None, ""))
        if probe and not endpoint.refuses(probe):
            raise ValueError(
                f"arms: {arm!r} needs a vLLM started with --logits-processors {processor}, which "
                f"{endpoint.url} is not"
            )
