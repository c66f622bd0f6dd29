"""What one request asks for: the `length_target` field, and its flat form in `vllm_xargs`.

`vllm_xargs` takes neither objects nor null, so there each part of the field is a key of its
own: `length_target` (tokens), `length_mode`, `length_beta`, `length_tolerance` ("off" or a
negative number for null), `length_policy`, `length_max_kl`.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FIELD = "length_target"
PREFIX = "length_"
DEFAULT_TOLERANCE = 0.1

_FLAT = {
    "length_target": "tokens",
    "length_mode": "mode",
    "length_beta": "beta",
    "length_tolerance": "tolerance",
    "length_policy": "policy",
    "length_max_kl": "max_kl",
}


class LengthTargetError(ValueError):
    """A length target that cannot be met or read; the message names field and value."""


class LengthTarget(BaseModel):
    """How long a completion should be.

    mode: equal_to, at_most and at_least `tokens`; tilt shifts all lengths by `beta`.
    tokens: completion tokens, the end-of-sequence token included.
    beta: of tilt only; below 0 shortens, above 0 lengthens, 0 changes nothing.
    tolerance: half width of the guard rails as a share of `tokens`; None: no rails.
    policy: project (least change of the model's distribution) or greedy (nearest value).
    max_kl: nats that a step of `project` may move the text; None: the plugin's setting.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    mode: Literal["equal_to", "at_most", "at_least", "tilt"] = "equal_to"
    tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    beta: float | None = None
    tolerance: float | None = Field(DEFAULT_TOLERANCE, ge=0)
    policy: Literal["project", "greedy"] = "project"
    max_kl: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _mode_has_its_number(self) -> Self:
        needed, unused = ("beta", "tokens") if self.mode == "tilt" else ("tokens", "beta")
        if getattr(self, needed) is None:
            raise ValueError(f"{needed}: required by mode {self.mode!r}")
        if getattr(self, unused) is not None:
            value = getattr(self, unused)
            raise ValueError(f"{unused}: mode {self.mode!r} takes none, got {value!r}")
        return self

    @classmethod
    def parse(cls, value: Any) -> Self:
        """From the JSON value of the field, an object or a number. Raises LengthTargetError."""
        if isinstance(value, int) and not isinstance(value, bool):
            value = {"tokens": value}
        if not isinstance(value, dict):
            raise LengthTargetError(f"{FIELD}: expected a number or an object, got {value!r}")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise LengthTargetError("; ".join(map(_describe, error.errors()))) from error

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> Self | None:
        """From `SamplingParams.extra_args`; None when it asks for no length.

        Raises LengthTargetError, also for an unknown key that starts with `length_`.
        """
        flat = {key: v for key, v in (extra_args or {}).items() if key.startswith(PREFIX)}
        if not flat:
            return None
        if unknown := sorted(flat.keys() - _FLAT.keys()):
            raise LengthTargetError(f"{unknown[0]}: unknown field, got {flat[unknown[0]]!r}")
        tolerance = flat.get("length_tolerance")
        if tolerance == "off" or (isinstance(tolerance, int | float) and tolerance < 0):
            flat["length_tolerance"] = None
        return cls.parse({_FLAT[key]: value for key, value in flat.items()})

    def to_xargs(self) -> dict[str, str | int | float]:
        """The flat form; `from_extra_args` gives back an equal target."""
        xargs = {key: getattr(self, name) for key, name in _FLAT.items()}
        if self.tolerance is None:
            xargs["length_tolerance"] = "off"
        return {key: value for key, value in xargs.items() if value is not None}


def _describe(error: Any) -> str:
    """`length_target.tokens: what is wrong, got 0` of one pydantic error."""
    path = ".".join([FIELD, *map(str, error["loc"])])
    if not error["loc"]:  # raised by the model itself, which names the part
        return f"{FIELD}.{error['msg'].removeprefix('Value error, ')}"
    return f"{path}: {error['msg']}, got {error['input']!r}"
