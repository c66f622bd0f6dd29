"""What a length was bought with: how a text ends, and how much it repeats itself."""

from collections.abc import Sequence

from lenvm_vllm.request import NATURAL


def ends_naturally(finish: str, length: int, last: int | None, p_end: float) -> bool:
    """Whether the model finished by itself.

    last: number of the token that a guard rail makes the end; None without one. p_end: the
    unguided model's probability of an end at that place.
    """
    forced = last is not None and length >= last
    return finish == "stop" and not forced and p_end >= NATURAL


def distinct(ids: Sequence[int], n: int) -> float:
    """Different n-grams of a text over all its n-grams; 1 in a text without any."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams that stood in the text before."""
    return 1 - distinct(ids, 4)
