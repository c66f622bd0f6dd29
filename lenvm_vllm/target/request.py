"""What one request asks for: the `length_target` field, and its flat form in `vllm_xargs`.

`vllm_xargs` takes neither objects nor null, so there each part of the field is a key of its
own, `length_<part>` but for `length_target`, the tokens. `length_tolerance` takes "off" or a
negative number for null.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from lenvm_vllm.steering.constants import DEFAULT_TOLERANCE
from lenvm_vllm.target.misplaced import FIELD, PREFIX, is_meant
from value_server.contract.units import UNITS

# Keys in `vllm_xargs` beside those of the field: the id that a request came with, whether its tool
# calls are taken out of its text, the LoRA adapter that writes it, and what of its prompt is no
# text: an entry for each picture, sound or video, in order.
REQUEST_ID, HAS_CALLS, ADAPTER = "lenvm_request_id", "lenvm_has_calls", "lenvm_adapter"
MEDIA = "lenvm_media"
UNSEEN = ""  # the entry of one that no value model can be shown

# Units in which no length can be asked for.
_OTHER_UNITS = {"chars", "letters", "sentences", "paragraphs", "lines", "pages", "bytes"}
# Names of lengths → their unit.
_NUMBERS = {f"{end}{unit}": unit for end in ("", "min_", "max_") for unit in UNITS}
_MOST = 2**31 - 1


class LengthTargetError(ValueError):
    """A length target that cannot be met or read; the message names field and value."""


class LengthTarget(BaseModel):
    """How long a completion should be.

    mode: equal_to, at_most and at_least so many `tokens`, `words` or `characters`; range, from
        min_tokens to max_tokens, or the same of another unit; tilt shifts all lengths by `beta`.
    tokens, min_tokens, max_tokens: completion tokens, the end-of-sequence token included and
        those of tool calls excluded.
    words, characters, and what begins with min_ and max_: of the text that the client gets, as
        `units.py` counts them.
    beta: of tilt only; below 0 shortens, above 0 lengthens, 0 changes nothing.
    tolerance: half width of the guard rails as a share of the length; None: no rails.
    policy: project (least change of the model's distribution) or greedy (nearest value); landing,
        which asks for no values and leads the end alone, or rails, which leads nothing.
    max_kl: nats that a step of `project` may move the text; None: the plugin's setting.
    min_entropy: nats; a step whose candidates have less is not scored.
    every: a token is scored, and then `every` - 1 are not.
    scope: what is counted: the whole completion, its thinkings up to the marker that ends them
        (the marker included), or the answer outside them. Where it is not given, the served
        model decides; see `admission.resolved`.
    endings: that an answer may have at most; None: the plugin's setting, where the request lets
        it have any.
    best_of: whole answers that are sampled side by side, to return those that end best.
    prefix_tokens: tokens at the end of the prompt that count as the completion's, of which the
        rest is generated.
    hint: True: the target is said in the prompt, too, in the user's language; a text: this line is.
    progress: tokens of a stream between two chunks that tell how many are expected still; 0: none
        does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    mode: Literal["equal_to", "at_most", "at_least", "tilt", "range"] = "equal_to"
    tokens: int | None = Field(None, ge=0, le=_MOST)
    min_tokens: int | None = Field(None, ge=1, le=_MOST)
    max_tokens: int | None = Field(None, ge=1, le=_MOST)
    words: int | None = Field(None, ge=1, le=_MOST)
    min_words: int | None = Field(None, ge=1, le=_MOST)
    max_words: int | None = Field(None, ge=1, le=_MOST)
    characters: int | None = Field(None, ge=1, le=_MOST)
    min_characters: int | None = Field(None, ge=1, le=_MOST)
    max_characters: int | None = Field(None, ge=1, le=_MOST)
    beta: float | None = None
    tolerance: float | None = Field(DEFAULT_TOLERANCE, ge=0)
    policy: Literal["project", "greedy", "landing", "rails"] = "project"
    max_kl: float | None = Field(None, ge=0)
    min_entropy: float = Field(0.0, ge=0)
    every: int = Field(1, ge=1, le=_MOST)
    scope: Literal["completion", "thinking", "answer"] = "completion"
    endings: int | None = Field(None, ge=1, le=64)
    best_of: int = Field(1, ge=1, le=64)
    prefix_tokens: int = Field(0, ge=0, le=_MOST)
    progress: int = Field(16, ge=0, le=_MOST)
    hint: bool | str = False

    @field_validator("*", mode="before")
    @classmethod
    def _in_other_clothes(cls, value: Any) -> Any:
        return number(value)

    @field_validator("hint", mode="before")
    @classmethod
    def _true_as_a_string(cls, value: Any) -> Any:
        return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _mode_has_its_numbers(self) -> Self:
        given = [name for name in ("beta", *_NUMBERS) if getattr(self, name) is not None]
        needed = self._numbers()
        for name in given:
            if name not in needed:
                beside = f" and {needed[0]}" if _NUMBERS.get(name) != self.unit else ""
                raise ValueError(
                    f"{name}: not allowed with mode {self.mode!r}{beside}, "
                    f"got {getattr(self, name)!r}"
                )
        for name in needed:
            if name not in given:
                raise ValueError(f"{name}: required by mode {self.mode!r}")
        low, high = self.limits
        if low > high:
            raise ValueError(f"min_{self.unit}: {low} is above max_{self.unit} {high}")
        return self

    @model_validator(mode="after")
    def _fields_go_together(self) -> Self:
        if (self.tolerance or 0) > 1:
            raise ValueError(
                f"tolerance: {self.tolerance} is above 1; it is a share of the length, 0.1 is 10%"
            )
        if self.mode == "tilt" and not self.wants_values:
            raise ValueError(f"policy: {self.policy!r} wants no values, mode 'tilt' is of values")
        if self.policy == "rails" and self.tolerance is None:
            raise ValueError("policy: 'rails' needs a tolerance, null switches the rails off")
        if self.tokens == 0 and (self.scope != "thinking" or self.mode == "at_least"):
            raise ValueError("tokens: must be at least 1, or 0 with scope 'thinking', got 0")
        what = f"mode {self.mode!r} and scope {self.scope!r}"
        for name in ("endings", "best_of"):
            several = getattr(self, name)
            if (several or 1) > 1 and (self.mode == "tilt" or self.scope != "completion"):
                raise ValueError(
                    f"{name}: {several} needs scope 'completion' and a mode other than tilt, "
                    f"not {what}"
                )
        if (self.endings or 1) > 1 and self.best_of > 1:
            raise ValueError(
                f"best_of: {self.best_of} cannot be combined with endings: {self.endings}"
            )
        if self.hint and (self.mode == "tilt" or self.scope == "thinking"):
            raise ValueError(f"hint: {self.hint!r} says the length of an answer, not of {what}")
        if self.prefix_tokens and self.scope != "completion":
            raise ValueError(
                f"prefix_tokens: {self.prefix_tokens} needs scope 'completion', not {self.scope!r}"
            )
        return self

    @property
    def unit(self) -> str:
        """One of UNITS, in which the length is given; tokens of a tilt."""
        given = (unit for name, unit in _NUMBERS.items() if getattr(self, name) is not None)
        return next(given, UNITS[0])

    @property
    def wants_values(self) -> bool:
        """Whether its policy asks for any."""
        return self.policy in ("project", "greedy")

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the most that is wanted, the same but for a range; 0 of a tilt."""
        exact, *ends = (getattr(self, f"{end}{self.unit}") for end in ("", "min_", "max_"))
        low, high = (exact or end or 0 for end in ends)
        return low, high

    def in_tokens(self, tokens: Callable[[int], int]) -> Self:
        """The same target in tokens. tokens: those of so much of its unit."""
        names = [name for name in self._numbers() if name in _NUMBERS]
        given = {name.replace(self.unit, UNITS[0]): tokens(getattr(self, name)) for name in names}
        return self.model_copy(update=dict.fromkeys(names) | given)

    def _numbers(self) -> tuple[str, ...]:
        """Names of the numbers that the mode takes."""
        if self.mode == "tilt":
            return ("beta",)
        ranged = self.mode == "range"
        return (f"min_{self.unit}", f"max_{self.unit}") if ranged else (self.unit,)

    @classmethod
    def parse(cls, value: Any) -> Self:
        """From the JSON value of the field, an object or a number, or a string that holds one.

        Raises LengthTargetError.
        """
        said = json_of(value) if isinstance(value, str) else value
        if type(tokens := number(said)) is int:
            said = {"tokens": tokens}
        if not isinstance(said, dict):
            raise LengthTargetError(
                f"{FIELD}: expected a number of tokens or an object, got {value!r}"
            )
        if units := [key for key in said if key in _OTHER_UNITS]:
            raise _no_unit(f"{FIELD}.{units[0]}", said[units[0]])
        try:
            return cls.model_validate(said)
        except ValidationError as error:
            raise LengthTargetError("; ".join(map(_describe, error.errors()))) from error

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> Self | None:
        """From `SamplingParams.extra_args`; None when it asks for no length.

        So does a prefill for another engine: its one token is thrown away.
        Raises LengthTargetError, also for an unknown key that starts with `length_` or is a near
        miss of the field's name.
        """
        args = extra_args or {}
        flat = {key: v for key, v in args.items() if is_meant(key)}
        if not flat:
            return None
        if unknown := sorted(flat.keys() - _FLAT.keys()):
            if unknown[0].removeprefix(PREFIX) in _OTHER_UNITS:
                raise _no_unit(unknown[0], flat[unknown[0]])
            raise LengthTargetError(f"{unknown[0]}: unknown field, got {flat[unknown[0]]!r}")
        tolerance = number(flat.get("length_tolerance"))
        negative = isinstance(tolerance, int | float) and tolerance < 0
        if tolerance == "off" or negative:
            flat["length_tolerance"] = None
        target = cls.parse({_FLAT[key]: value for key, value in flat.items()})
        return None if is_prefill(args) else target

    def to_xargs(self) -> dict[str, str | int | float]:
        """The flat form; `from_extra_args` gives back an equal target."""
        xargs = {key: getattr(self, name) for key, name in _FLAT.items()}
        if self.tolerance is None:
            xargs["length_tolerance"] = "off"
        return {key: value for key, value in xargs.items() if value is not None}


# Key in `vllm_xargs` → part of the field. There the prompt is as it is.
_FLAT = {
    "length_target" if part == "tokens" else f"{PREFIX}{part}": part
    for part in LengthTarget.model_fields
    if part != "hint"
}


def is_prefill(request: Mapping[str, Any]) -> bool:
    """Whether another engine writes the answer (disaggregated prefill): this one writes a token
    that nobody reads, so its limit of one is no contradiction."""
    transfer = request.get("kv_transfer_params")
    return isinstance(transfer, Mapping) and bool(transfer.get("do_remote_decode"))


def number(value: Any) -> Any:
    """A string that holds a number or null as that, and a whole float as an int.

    Clients send parameters of their own as strings. All else stays as it is.
    """
    said = json_of(value) if isinstance(value, str) else value
    if isinstance(said, float) and said.is_integer():
        return int(said)
    return said if said is None or type(said) in (int, float) else value


def json_of(text: str) -> Any:
    """What the text says as JSON; itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _no_unit(name: str, value: Any) -> LengthTargetError:
    return LengthTargetError(f"{name}: unknown unit; use {', '.join(UNITS)}; got {value!r}")


def _describe(error: Any) -> str:
    """`length_target.tokens: what is wrong, got 0` of one pydantic error."""
    path = ".".join([FIELD, *map(str, error["loc"])])
    if not error["loc"]:  # raised by the model itself, which names the part
        return f"{FIELD}.{error['msg'].removeprefix('Value error, ')}"
    return f"{path}: {error['msg']}, got {error['input']!r}"
