"""What the doctor has seen of one part, and how it is shown."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

_STATES = {"ok": "green", "off": "dim", "wrong": "bold red"}
_NARROW = 60  # columns: with fewer, the name of the part stands in the text
_UNBOUNDED = 10_000  # in a pipe no line is broken


@dataclass(frozen=True)
class Finding:
    """What was looked at and seen; advice, where something is wrong, or off and need not be."""

    part: str
    seen: str
    advice: str = ""
    off: bool = False

    @property
    def is_wrong(self) -> bool:
        return bool(self.advice) and not self.off

    @property
    def state(self) -> str:
        return "off" if self.off else "wrong" if self.advice else "ok"


def guarded(
    part: str, subject: str, look: Iterator[Finding], remedies: dict[str, str]
) -> Iterator[Finding]:
    """What `look` finds, and the error that ends it, with what to do.

    remedies: advice by a pattern in "Type: text" of the error, the first that fits.
    """
    try:
        yield from look
    except Exception as error:  # whatever vLLM, transformers or a server have
        text = one_line(error)
        told = f"{type(error).__name__}: {text}"
        advice = next(remedies[pattern] for pattern in remedies if re.search(pattern, told))
        yield Finding(part, f"{subject}: {text}", advice)


class Sheet:
    """A table on stdout that grows by a row for each finding.

    Broken at words as wide as the terminal is, in colours; in a pipe neither.
    """

    def __init__(self) -> None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # arrows, in an encoding that has none
        width = None if sys.stdout.isatty() else _UNBOUNDED
        self._console = Console(width=width, highlight=False)
        self._wide = self._console.width >= _NARROW
        self._row(Text("state"), "part", Text("what was found, and what to do"))

    def show(self, finding: Finding) -> None:
        text = Text(finding.seen)
        if finding.advice:
            text.append(f"\n→ {finding.advice}", "bold" if finding.is_wrong else "")
        self._row(Text(finding.state, _STATES[finding.state]), finding.part, text)

    def _row(self, state: Text, part: str, text: Text) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=5)
        if self._wide:
            grid.add_column(width=13)
            grid.add_column(overflow="fold")
            grid.add_row(state, part, text)
        else:
            grid.add_column(overflow="fold")
            grid.add_row(state, Text(f"{part}: ") + text)
        with self._console.capture() as captured:
            self._console.print(grid)
        lines = captured.get().splitlines()
        print("\n".join(line.rstrip() for line in lines), flush=True)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or repr(error)
