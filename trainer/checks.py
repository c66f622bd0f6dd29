"""Refusals of settings: one line that names the field and its value."""

from collections.abc import Iterable
from typing import Any


def check(ok: bool, field: str, value: object, rule: str) -> None:
    """Raises ValueError unless `ok`."""
    if not ok:
        raise ValueError(f"{field}: {value!r}, must be {rule}")


def check_positive(**values: float | None) -> None:
    """Raises ValueError unless all that are given are above 0."""
    for field, value in values.items():
        check(value is None or value > 0, field, value, "above 0")


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    choices = list(choices)
    check(value in choices, field, value, "one of " + ", ".join(choices))


def check_positions(max_length: int, config: Any, model: object) -> None:
    """Raises ValueError where a model without rope looks its positions up, and has fewer.

    config: transformers' own, of the decoder.
    """
    rope = getattr(config, "rope_parameters", None)
    known = max_length if rope else getattr(config, "max_position_embeddings", max_length)
    rule = f"at most {known}, the positions of {model}"
    check(max_length <= known, "max_length", max_length, rule)
