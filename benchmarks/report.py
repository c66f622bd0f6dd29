"""From the folders of the harnesses to docs/figures.md and one HTML page, docs/report.html.

    python -m benchmarks.report

It reads what lies in --runs: a folder is the harness's whose name it begins with, so that
`lifebench-qwen` stands beside `lifebench`. Nothing is measured again. A section whose run is not
there, as one of another machine, stays as it is; one that is to go is deleted by hand.
"""

import base64
import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cyclopts import App
from jinja2 import Environment, FileSystemLoader
from transformers import AutoTokenizer

from benchmarks.evidence import grid, lifebench_table, prediction, tradeoff_table
from benchmarks.evidence.texts import Text, choose, read_texts
from benchmarks.figures import FIGURES_FILE, read_figures
from benchmarks.pictures import plot_control, plot_grid, plot_prediction, plot_tradeoff
from benchmarks.provenance import KEY, end
from benchmarks.servers import value_served
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL
from trainer.output import table
from trainer.resume import SETTINGS_FILE
from trainer.rows import Rows
from value_server.contract.units import UNITS

app = App(help=__doc__)
SECTION = re.compile(r"<!-- section: (\S+) -->\n(.*?)\n<!-- /section -->", re.DOTALL)
SHORT = "By mode"  # of several tables the one that is in figures.md too
Tables = dict[str, list[dict[str, Any]]]

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=lambda name: "section.html" in (name or ""),
    trim_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters["encoded"] = lambda path: base64.b64encode(path.read_bytes()).decode()


@dataclass
class Section:
    """tables: rows by caption. pictures: files, beside the document."""

    title: str
    about: str
    tables: Tables
    pictures: list[Path] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)

    def markdown(self) -> str:
        parts = [f"### {self.title}", self.about]
        parts += [f"![{self.title}]({picture.name})" for picture in self.pictures]
        kept = {SHORT: self.tables[SHORT]} if SHORT in self.tables else self.tables
        parts += [f"{caption}:\n\n{table(rows)}" for caption, rows in kept.items() if rows]
        return "\n\n".join(part for part in parts if part)

    def html(self) -> str:
        """With its pictures inside."""
        return TEMPLATES.get_template("section.html.j2").render(section=self).strip()


def of_lifebench(figures: dict[str, Any], picture: Path) -> Tables:
    plot_control(figures["cells"], picture, figures.get("unit", UNITS[0]))
    return lifebench_table.tables(figures["cells"])


def of_tradeoff(figures: dict[str, Any], picture: Path) -> Tables:
    plot_tradeoff(figures["measured"], picture)
    return {"Accuracy and tokens": tradeoff_table.table_rows(figures["measured"])}


def of_prediction(figures: dict[str, Any], picture: Path) -> Tables:
    if "positions" in figures:
        plot_prediction(figures, picture)
    return prediction.tables(figures)


def of_grid(figures: dict[str, Any], picture: Path) -> Tables:
    plot_grid(figures["runs"], picture)
    return grid.tables(figures["runs"])


READERS: dict[str, Callable[[dict[str, Any], Path], Tables]] = {
    "lifebench": of_lifebench,
    "tradeoff": of_tradeoff,
    "prediction": of_prediction,
    "scaling": of_grid,
    "ablations": of_grid,
    "censoring": of_grid,
}


def sections_of(runs: Path, docs: Path) -> dict[Path, Section]:
    """By its folder the section of every run; writes their pictures.

    Raises ValueError where there is no run.
    """
    found = {}
    for kind, reader in READERS.items():
        for path in sorted(runs.glob(f"{kind}*/{FIGURES_FILE}")):
            folder = path.parent
            picture = docs / f"{folder.name}.png"
            figures = read_figures(folder)
            tables = reader(figures, picture)
            settings = folder / SETTINGS_FILE
            facts = json.loads(settings.read_text()) if settings.exists() else {}
            facts |= _origin(figures.get(KEY))
            about = ", ".join(f"{name} {value}" for name, value in facts.items())
            pictures = [picture] if picture.exists() else []
            found[folder] = Section(folder.name, about, tables, pictures)
    if not found:
        raise ValueError(f"runs: {runs} has no folder of {', '.join(READERS)} with {FIGURES_FILE}")
    return found


def _origin(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of runs that noted it: commit and machine, for the line under a section's title."""
    if provenance is None:
        return {}
    machine = provenance["machine"]
    named = ", ".join([f"{machine['cores']} cores of {machine['processor']}", *machine["gpus"]])
    return {"commit": provenance["commit"] or "unknown", "on": named}


def texts_of(
    folder: Path, count: int, model: str, checkpoint: Path, values_url: str | None
) -> list[Text]:
    """Of a run of `lifebench`; a value server is started for values that it does not hold yet."""
    answers = list(choose([*Rows(folder / "answers.jsonl").values()], count))
    values = Rows(folder / "values.jsonl")
    known = all(answer["key"] in values for answer in answers)
    with contextlib.ExitStack() as stack:
        if not known and not values_url:
            values_url = stack.enter_context(value_served(model, checkpoint, folder))
        tokenizer = AutoTokenizer.from_pretrained(model)
        return read_texts(answers, values, values_url or "", tokenizer)


def write(document: Path, sections: Mapping[str, str]) -> list[str]:
    """These sections and the others that the document has, in the order of READERS.

    Returns the titles of all. What stands around them is in templates/.
    """
    known = dict(SECTION.findall(document.read_text())) if document.exists() else {}
    texts = {**known, **sections}
    titles = sorted(texts, key=lambda title: (_kind(title), title))
    template = TEMPLATES.get_template(f"{document.name}.j2")
    document.write_text(template.render(sections={title: texts[title] for title in titles}))
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
    """Write docs/figures.md, the pictures and docs/report.html; end with a JSON line.

    Parameters
    ----------
    runs
        Folder of the harnesses' output folders.
    docs
        Folder to write to.
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
    shown = runs / "lifebench"
    if texts and shown in found:
        found[shown].texts = texts_of(shown, texts, model, checkpoint, values_url)
    sections = found.values()
    write(docs / "figures.md", {s.title: s.markdown() for s in sections})
    page = docs / "report.html"
    titles = write(page, {s.title: s.html() for s in sections})
    end({"sections": titles, "bytes": page.stat().st_size})


if __name__ == "__main__":
    app()
