"""The lines of a log as rows of a file of rollouts, and what became of each line."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.rollout_files import ENGINE, TEXT
from trainer.rollouts.encoding import ChatEncoder
from trainer.rollouts.logs import CUT, FAILED, STEERED, Logged, lines_of, parse
from trainer.rollouts.turns import Turn, Turns

SHOWN = 5  # bad lines that are told one by one
COUNTS = {
    "lines": "lines",
    "turns": "turns",
    ENGINE: "turns with the ids that were sampled",
    TEXT: "turns that were encoded",
    "cut": "turns that were cut",
    "no_reason": "turns without finish_reason, taken as finished",
    "empty": "turns without a token, left out",
    "repeated": "answers logged twice, left out",
    "dropped": "answers left out by redact",
    FAILED: "requests that failed, left out",
    STEERED: "lines whose length was asked for, left out",
    "bad": "bad lines, left out",
}
SHARES = {  # of what could be compared: (part, whole)
    "text_exact": ("encoded turns whose ids give their text back", "text_compared"),
    "engine_exact": ("sampled ids that give the logged text", "engine_compared"),
    "counted_alike": ("encoded turns with as many tokens as the server counted", "counted"),
    "our_tokens": ("tokens of encoded turns, of those that the server counted", "their_tokens"),
}


@dataclass(frozen=True, slots=True)
class Reader:
    """How the lines of logs become rows."""

    encoder: ChatEncoder
    requests: Mapping[str, Any] | None
    turns: Callable[[], Turns]  # of one log each; they have `told` in common
    skip_bad: bool

    def check(self, log: Path) -> None:
        """Note the answers of all logs, before `rows` of any.

        Raises ValueError naming the first line that cannot be read, unless those are skipped.
        """
        turns = self.turns()
        for place, line in lines_of(log):
            try:
                found = parse(place, line, self.requests)
                if isinstance(found, Logged):
                    turns.note(found)
            except ValueError:
                if not self.skip_bad:
                    raise

    def rows(self, log: Path, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        """Of SCHEMA. counts: what became of lines and turns, added to."""
        turns = self.turns()
        for place, line in tqdm(lines_of(log), desc=log.name, unit="line", file=sys.stderr):
            counts["lines"] += 1
            try:
                found = parse(place, line, self.requests)
                if isinstance(found, Logged):
                    own = [row for turn in turns.of(found) if (row := self._row(turn, counts))]
                else:
                    counts[found] += 1
                    continue
            except ValueError as error:
                if not self.skip_bad:
                    raise
                counts["bad"] += 1
                if counts["bad"] <= SHOWN:
                    tqdm.write(f"skipped: {error}", file=sys.stderr)
                continue
            yield from own
        counts["repeated"] += turns.repeated
        counts["dropped"] += turns.dropped

    def _row(self, turn: Turn, counts: Counter[str]) -> dict[str, Any] | None:
        """None of a turn without a token."""
        encoded = self.encoder.encode(turn)
        row = encoded.row
        if not row["completion_ids"] or not row["prompt_ids"]:
            counts["empty"] += 1
            return None
        source = row["token_source"]
        counts["turns"] += 1
        counts[source] += 1
        counts["cut"] += turn.finish_reason in CUT
        counts["no_reason"] += turn.finish_reason is None
        if encoded.exact is not None:
            counts[f"{source}_compared"] += 1
            counts[f"{source}_exact"] += encoded.exact
            counts[f"{source}_held"] += encoded.held
        if encoded.tokens is not None:
            counts["counted"] += 1
            counts["counted_alike"] += encoded.tokens == len(row["completion_ids"])
            counts["their_tokens"] += encoded.tokens
            counts["our_tokens"] += len(row["completion_ids"])
        prompt = json.dumps(row["prompt_ids"]).encode()
        return row | {"prompt_id": hashlib.sha256(prompt).hexdigest()[:32]}


def figures_of(counts: Mapping[str, int]) -> dict[str, int | float]:
    """Counts that are not 0, and the shares of what could be compared."""
    figures: dict[str, int | float] = {name: counts[name] for name in COUNTS if counts.get(name)}
    shares = {name: whole for name, (_, whole) in SHARES.items() if counts.get(whole)}
    return figures | {name: counts.get(name, 0) / counts[whole] for name, whole in shares.items()}
