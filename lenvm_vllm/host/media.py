"""What a served model takes beside text."""

import re
from typing import Any

# Of a model's own configuration, as those of transformers call it.
_PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)")


def placeholder_ids(config: Any) -> frozenset[int]:
    """Tokens that stand in a prompt for a picture, a sound or a video, as far as the
    configuration of the served model names them; none of a model that takes text alone.

    config: of transformers; None where there is none.
    """
    facts = vars(config) if config else {}
    found = {value for name, value in facts.items() if _PLACEHOLDER.fullmatch(name)}
    return frozenset(value for value in found if type(value) is int)
