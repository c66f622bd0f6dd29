"""Names and places that were meant for `length_target`, so that none is silently ignored.

vLLM accepts unknown fields and drops them; a length target in a wrong place would be lost.
"""

import re
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

FIELD = "length_target"
PREFIX = "length_"

_OTHERS = {"length_penalty"}  # fields of vLLM's own that start with the same letters
_MEANT = ("lengthtarget", "targetlength", "targettokens")
_LIKE = 0.75  # above it a name is one of these with slips; target_language has 0.69
_LONGEST = 64  # of a name with slips; to compare a longer one takes its time

# What clients wrap parameters of their own in (extra_body, model_kwargs, providerOptions, …), and
# vLLM does not unwrap; and what it hands on to others, in which such names may be theirs.
_WRAPPER = re.compile("(?i)extra|param|args|option|config|setting")
_OF_OTHERS = {
    "chat_template_kwargs",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "kv_transfer_params",
    "ec_transfer_params",
}

# A key of a body that is worth a look; cheap, as every body is searched for it.
HINT = re.compile(rb'(?i)"[a-z_ -]{0,24}(?:len|target)[a-z_ -]{0,24}"\s*:')


def looks_like_target(name: str) -> bool:
    """Whether this is `length_target`, or was meant to be: lengthTarget, target_length, …"""
    if len(name) > _LONGEST:
        return False
    plain = re.sub("[^a-z]", "", name.lower())
    return any(SequenceMatcher(None, plain, meant).ratio() > _LIKE for meant in _MEANT)


def is_meant(name: str) -> bool:
    """Whether a length is asked for by this name, or by a slip of it."""
    return (name.startswith(PREFIX) and name not in _OTHERS) or looks_like_target(name)


def misplaced(request: Mapping[str, Any], own: str, outer: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of each name of ours that stands inside of a wrapper.

    own: path of the one wrapper that the engine does read.
    """
    for wrapper in (name for name in request if _WRAPPER.search(name)):
        inner, path = request[wrapper], f"{outer}{wrapper}"
        if path == own or wrapper in _OF_OTHERS or not isinstance(inner, Mapping):
            continue
        yield from ((f"{path}.{name}", inner[name]) for name in inner if is_meant(name))
        if not outer:
            yield from misplaced(inner, own, f"{path}.")
