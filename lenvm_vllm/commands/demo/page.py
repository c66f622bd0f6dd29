"""What the demo shows: whole texts with what came of them, a table of all, and what it waits for.

In a terminal a line moves while it waits; elsewhere there is a new one now and then.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lenvm_vllm.commands.demo.questions import ARMS, LENGTHS, Answer

WIDTH = 96  # longer lines are hard to read
EVERY_S = 30  # between two lines that tell of the same wait, where nothing can move
INDENT = " " * 4
NEAR = 10  # percent, the guard rails of the default
_ENDS = {
    "own": "its own end",
    "max_tokens": "cut by max_tokens",
    "natural": "natural end",
    "whole": "whole sentence",
    "cut": "cut",
    None: "end unknown",
}


def console(file: TextIO | None = None) -> Console:
    """Of a terminal's width, but not too wide to read."""
    page = Console(file=file, highlight=False)
    page.width = min(page.width, WIDTH)
    return page


class Waiting:
    """What is being waited for, and the seconds since that was first told."""

    def __init__(self, page: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._page, self._clock, self._status = page, clock, page.status("")
        self._what, self._since, self._told = "", 0.0, 0

    def tell(self, what: str, so_far: str = "") -> None:
        """To be called again and again. so_far: what there is of it."""
        if new := what != self._what:
            self._what, self._since, self._told = what, self._clock(), 0
        seconds = int(self._clock() - self._since)
        line = f"{what}: {so_far}{seconds} s"
        if self._page.is_interactive:
            self._status.update(line)
            self._status.start()
        elif new or seconds >= self._told + EVERY_S:
            self._told = seconds
            self._page.print(line if seconds else what)

    def close(self) -> None:
        """Nothing is waited for any more."""
        self._status.stop()


def show_question(page: Console, prompt: str, wanted: str) -> None:
    page.rule(f"[bold]wanted: {wanted}")
    page.print(Text(prompt, style="bold"), end="\n\n")


def show_answer(page: Console, answer: Answer) -> None:
    """How it was asked for, what came of it, and the whole text."""
    page.print(Text(_asked(answer), style="cyan"))
    page.print(_came(answer))
    for line in Text(answer.text.strip()).wrap(page, page.width - len(INDENT) - 2):
        line.rstrip()
        page.print(Text(INDENT if line else "") + line)
    page.print()


def _asked(answer: Answer) -> str:
    fields = answer.arm.fields(answer.length)
    if answer.arm.says and fields:
        return "both of these"
    if answer.arm.says:
        return f'in the prompt: "{answer.length.sentence}"'
    asked = [f'"{name}": {json.dumps(value)}' for name, value in fields.items()]
    return ", ".join(asked) or answer.arm.label


def _came(answer: Answer) -> Text:
    end = _ENDS[answer.end]
    if answer.forced and answer.end == "cut":
        end = "cut by the target"
    style = "bold green" if abs(answer.deviation) <= NEAR else "bold red"
    count = f"{answer.count} {answer.length.unit} ({answer.deviation:+.0f}%)"
    seconds = "" if answer.seconds is None else f", {answer.seconds:.1f} s"
    ending = (end, "" if answer.ends_well else "yellow")
    return Text.assemble("→ ", (count, style), ", ", ending, seconds)


def table(answers: Sequence[Answer]) -> Table:
    """A row an arm: mean lengths for each that was wanted, mean deviation, ends, seconds."""
    table = Table(box=None, pad_edge=False)
    table.add_column("the length was\nasked for by")
    for length in LENGTHS:
        table.add_column(f"{length.number}\n{length.unit}", justify="right")
    for name in ("off\nby", "ends\nwell", "seconds"):
        table.add_column(name, justify="right")
    for arm in ARMS:
        if of := [a for a in answers if a.arm == arm]:
            table.add_row(arm.label, *_lengths(of), *_means(of))
    return table


def _lengths(answers: Sequence[Answer]) -> Iterator[str]:
    for length in LENGTHS:
        counts = [a.count for a in answers if a.length == length]
        yield f"{fmean(counts):.0f}" if counts else ""


def _means(answers: Sequence[Answer]) -> Iterator[str]:
    yield f"{fmean(abs(a.deviation) for a in answers):.0f}%"
    yield f"{fmean(100 * a.ends_well for a in answers):.0f}%"
    seconds = [a.seconds for a in answers if a.seconds is not None]
    yield f"{fmean(seconds):.1f}" if len(seconds) == len(answers) else ""
