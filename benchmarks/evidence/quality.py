"""What a length was bought with: how a text ends, and how much it repeats itself."""

from collections.abc import Container, Sequence

from lenvm_vllm.steering.constants import NATURAL


def ends_naturally(finish: str, length: int, lasts: Container[int], p_end: float) -> bool:
    """Whether the model finished by itself.

    lasts: numbers of the tokens that a guard rail makes the end. p_end: the unguided model's
    probability of an end at that place.
    """
    return finish == "stop" and length not in lasts and p_end >= NATURAL


def distinct(ids: Sequence[int], n: int) -> float:
    """Different n-grams of a text over all its n-grams; 1 in a text without any."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams that stood in the text before."""
    return 1 - distinct(ids, 4)
