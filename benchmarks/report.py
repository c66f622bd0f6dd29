"""From the folders of the harnesses to the tables of docs/benchmarks.md and one HTML page.

    python -m benchmarks.report

It reads what lies in --runs: a folder is the harness's whose name it begins with, so that
`lifebench-qwen` stands beside `lifebench`. Nothing is measured again. A section whose run is not
there, as one of another machine, stays as it is; one that is to go is deleted by hand.
"""

import base64
import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cyclopts import App
from jinja2 import Environment, FileSystemLoader
from transformers import AutoTokenizer

from benchmarks.estimates import Estimate
from benchmarks.evidence import control
from benchmarks.evidence.grid import grid_rows
from benchmarks.evidence.prediction import model_rows
from benchmarks.evidence.texts import Text, choose, read_texts
from benchmarks.evidence.tradeoff import point_rows
from benchmarks.pictures import plot_control, plot_grid, plot_tradeoff
from benchmarks.rows import SETTINGS_FILE, Rows
from benchmarks.servers import value_served
from benchmarks.tables import table
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL
from value_server.contract.units import UNITS

app = App(help=__doc__)
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"
SECTION = re.compile(r"<!-- section: (\S+) -->\n(.*?)\n<!-- /section -->", re.DOTALL)
PAGE = Path(__file__).with_name("report.html")  # an empty one
DOC_TABLES = ("By mode",)  # the others are in the HTML page


@dataclass
class Section:
    """tables: rows by caption. pictures: files, beside the document."""

    title: str
    about: str
    tables: dict[str, list[dict[str, Any]]]
    pictures: list[Path] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)


def lifebench(figures: dict[str, Any], picture: Path) -> dict[str, Any]:
    plot_control(figures["cells"], picture, figures.get("unit", UNITS[0]))
    return control.tables(figures["cells"])


def tradeoff(figures: dict[str, Any], picture: Path) -> dict[str, Any]:
    plot_tradeoff(figures["measured"], picture)
    return {"Accuracy and tokens": point_rows(figures["measured"])}


def prediction(figures: dict[str, Any], picture: Path) -> dict[str, Any]:
    models = {
        name: {key: Estimate(**figure) for key, figure in own.items()}
        for name, own in figures["models"].items()
    }
    return {f"Under gamma {figures['gamma']:.5g}": model_rows(models)}


def grid(figures: dict[str, Any], picture: Path) -> dict[str, Any]:
    plot_grid(figures["runs"], picture)
    return {"One change at a time": grid_rows(figures["runs"])}


READERS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "lifebench": lifebench,
    "tradeoff": tradeoff,
    "prediction": prediction,
    "scaling": grid,
    "ablations": grid,
}


def sections_of(runs: Path, docs: Path) -> dict[Path, Section]:
    """By its folder the section of every run, in the order of READERS; writes their pictures."""
    found = {}
    for kind, reader in READERS.items():
        for path in sorted(runs.glob(f"{kind}*/figures.json")):
            folder = path.parent
            picture = docs / f"{folder.name}.png"
            tables = reader(json.loads(path.read_text()), picture)
            settings = folder / SETTINGS_FILE
            facts = json.loads(settings.read_text()) if settings.exists() else {}
            about = ", ".join(f"{name} {value}" for name, value in facts.items())
            pictures = [picture] if picture.exists() else []
            found[folder] = Section(folder.name, about, tables, pictures)
    return found


def markdown(section: Section) -> str:
    parts = [f"### {section.title}", section.about]
    parts += [f"![{section.title}]({picture.name})" for picture in section.pictures]
    kept = {c: rows for c, rows in section.tables.items() if c in DOC_TABLES} or section.tables
    parts += [f"{caption}:\n\n{table(rows)}" for caption, rows in kept.items() if rows]
    return "\n\n".join(part for part in parts if part)


def html(section: Section) -> str:
    """With its pictures inside."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.filters["encoded"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return environment.get_template("section.html.j2").render(section=section).strip()


def insert(document: Path, texts: dict[str, str]) -> list[str]:
    """Put the sections between the marks, in the order of READERS; returns the titles of all.

    Raises ValueError where the document has no marks.
    """
    before, begin, rest = document.read_text().partition(BEGIN)
    known, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs: {document} has no lines {BEGIN} and {END}")
    sections = dict(SECTION.findall(known)) | texts
    titles = sorted(sections, key=lambda title: (_kind(title), title))
    marked = [f"<!-- section: {t} -->\n{sections[t]}\n<!-- /section -->" for t in titles]
    document.write_text("\n\n".join([f"{before}{BEGIN}", *marked, f"{END}{after}"]))
    return titles


def _kind(title: str) -> int:
    return next(i for i, kind in enumerate(READERS) if title.startswith(kind))


@app.default
def main(
    *,
    runs: Path = Path("runs"),
    docs: Path = Path("docs"),
    model: str = str(MODEL),
    checkpoint: Path = CHECKPOINT,
    values_url: str | None = None,
    texts: int = 3,
) -> None:
    """Write docs/benchmarks.md's tables, the pictures and docs/report.html; end with a JSON line.

    Parameters
    ----------
    runs
        Folder of the harnesses' output folders.
    docs
        Folder of benchmarks.md, which has two lines for the text to stand between.
    model
        Hub name or folder of the model that wrote the texts of `lifebench`.
    checkpoint
        Value model for the lengths under their tokens.
    values_url
        Of its server; by default one is started.
    texts
        Requests whose answers the page shows, of each arm.
    """
    found = sections_of(runs, docs)
    if not found:
        raise ValueError(f"runs: {runs} has no folder of {', '.join(READERS)} with figures.json")
    shown = runs / "lifebench"
    if texts and shown in found:
        answers = list(choose([*Rows(shown / "answers.jsonl").values()], texts))
        values = Rows(shown / "values.jsonl")
        known = all(answer["key"] in values for answer in answers)
        with contextlib.ExitStack() as stack:
            if not known and not values_url:
                values_url = stack.enter_context(value_served(model, checkpoint, shown))
            tokenizer = AutoTokenizer.from_pretrained(model)
            found[shown].texts = read_texts(answers, values, values_url or "", tokenizer)
    sections = [*found.values()]
    insert(docs / "benchmarks.md", {s.title: markdown(s) for s in sections})
    page = docs / "report.html"
    kept = dict(SECTION.findall(page.read_text())) if page.exists() else {}
    shutil.copyfile(PAGE, page)  # so that the page's own frame is told in one place
    titles = insert(page, kept | {s.title: html(s) for s in sections})
    result = {"sections": titles, "bytes": page.stat().st_size}
    print(json.dumps(result))


if __name__ == "__main__":
    app()
