"""A request's own sampling limits and penalties, which the plugin applies itself (`own_cut.py`).

vLLM applies them behind the plugin, to what is already steered: a top_p would cut the steered
distribution a second time, and under Model Runner V1 a penalty would change it. So on its way
into the engine a guided request gives them to the plugin, and vLLM is told of none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

KEY = "lenvm_sampling"  # in `SamplingParams.extra_args`


@dataclass(frozen=True)
class OwnSampling:
    """What vLLM calls by the same names; the defaults do nothing.

    ours: whether they are the plugin's to apply, and not vLLM's.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    ours: bool = False

    @property
    def cuts(self) -> bool:
        return self.ours and bool(self.top_k or self.top_p < 1 or self.min_p)

    @property
    def penalises(self) -> bool:
        penalties = self.repetition_penalty != 1, self.frequency_penalty, self.presence_penalty
        return self.ours and any(penalties)

    @classmethod
    def of(cls, params: Any) -> "OwnSampling":
        """Of SamplingParams, whether they have been through `take_from` or not."""
        if taken := (params.extra_args or {}).get(KEY):
            return replace(cls(*taken), ours=True)
        return cls(top_k=max(params.top_k, 0), top_p=params.top_p, min_p=params.min_p)


def check_unset(extra_args: Mapping[str, Any]) -> None:
    """Raises ValueError for a client that writes what `take_from` does: where nothing takes a
    request in, the engine would believe it, and fall for it."""
    if KEY in extra_args:
        raise ValueError(f"{KEY}: unknown field, got {extra_args[KEY]!r}")


_NEUTRAL: dict[str, Any] = {
    field.name: field.default for field in fields(OwnSampling) if field.name != "ours"
}
_CUT = ("top_k", "top_p", "min_p")


def take_from(params: Any, penalties: bool) -> None:
    """Change SamplingParams so that the plugin applies its cut and, if asked to, its penalties."""
    taken = _NEUTRAL if penalties else _CUT
    own = _NEUTRAL | {name: getattr(params, name) for name in taken}
    own["top_k"] = max(own["top_k"], 0)
    params.extra_args = {**params.extra_args, KEY: list(own.values())}
    for name in taken:
        setattr(params, name, _NEUTRAL[name])
