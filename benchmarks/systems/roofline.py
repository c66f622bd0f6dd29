"""How long must a step take at least, of the served model and of a value model beside it?

    python -m benchmarks.systems.roofline

Sums, nothing is run. A decode step reads the weights of the linear layers once and the keys and
values of all sessions, and multiplies each row by the weights; it takes the longer of both at the
card's full rates. A lookahead step is one row a session, an exact one nine (the newest token and
eight candidates). What an engine reaches of this is measured by `benchmarks.systems.device`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from cyclopts import App

from benchmarks.provenance import end
from benchmarks.systems.device import SHAPES
from trainer.output import table

app = App(help=__doc__)
BYTES = 2  # of a number in bfloat16
ROWS = {"lookahead": 1, "exact": 9}  # of a session in a step


@dataclass(frozen=True)
class Card:
    """The vendor's figures: bytes, and bytes and bfloat16 operations a second, without sparsity."""

    name: str
    memory: float
    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Shape:
    """vocabulary: of the output layer; 0: there is none, as in a value model."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 0

    @property
    def weights(self) -> int:
        """Parameters of the linear layers."""
        keys = self.hidden * self.key_heads // self.heads
        layer = self.hidden * (2 * self.hidden + 2 * keys + 3 * self.inner)
        return self.layers * layer + self.hidden * self.vocabulary

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token."""
        return 2 * BYTES * self.layers * self.hidden * self.key_heads // self.heads

    def step_ms(self, card: Card, sessions: int, tokens: int, rows: int = 1) -> float:
        """Milliseconds of a step with so many rows a session behind so many tokens."""
        moved = BYTES * self.weights + sessions * tokens * self.token_bytes
        work = 2 * self.weights * sessions * rows
        return 1000 * max(moved / card.bytes_per_s, work / card.flops_per_s)


CARDS = (
    Card("H100 SXM, 80 GB", 80e9, 3.35e12, 989e12),
    Card("RTX 4090, 24 GB", 24e9, 1.008e12, 165e12),
)
# Qwen2.5-7B and -32B
SERVED = (
    Shape("7B", 3584, 18944, 28, 28, 4, 152064),
    Shape("32B", 5120, 27648, 64, 40, 8, 152064),
)


def measured(name: str) -> Shape:
    """One of those that `benchmarks.systems.device` measures."""
    options = SHAPES[name][2]
    parts = ("hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    return Shape(name, *(options[part] for part in parts + heads))


VALUES = (
    measured("135M"),
    replace(measured("0.5B"), name="0.5B, its lowest 6 layers", layers=6),
    measured("0.5B"),
    measured("1.5B"),
    Shape("3B", 2048, 11008, 36, 16, 2),  # Qwen2.5-3B
)


def lines(loads: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Any]]:
    """A line for each card, served model that fits it, load and value model."""
    for card in CARDS:
        for served in SERVED:
            for sessions, tokens in loads:
                memory = BYTES * served.weights + sessions * tokens * served.token_bytes
                if memory > card.memory:
                    continue
                step = served.step_ms(card, sessions, tokens)
                for values in VALUES:
                    own = {
                        kind: values.step_ms(card, sessions, tokens, rows)
                        for kind, rows in ROWS.items()
                    }
                    shares = {f"{kind} %": round(100 * ms / step, 1) for kind, ms in own.items()}
                    yield {
                        "card": card.name,
                        "served": served.name,
                        "sessions": sessions,
                        "tokens": tokens,
                        "its step ms": round(step, 1),
                        "value model": values.name,
                        **shares,
                    }


@app.default
def main(*, sessions: tuple[int, ...] = (1, 32, 256), tokens: tuple[int, ...] = (1024,)) -> None:
    """Print a table and one JSON line: each step of a value model as a share of the served one's.

    Parameters
    ----------
    sessions
        At a time.
    tokens
        Behind each.
    """
    found = list(lines(tuple((n, behind) for n in sessions for behind in tokens)))
    end({"lines": found}, table(found))


if __name__ == "__main__":
    app()
