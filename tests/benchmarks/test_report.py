"""docs/figures.md and docs/report.html are what `benchmarks.report` writes."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.estimates import Estimate
from benchmarks.figures import write_figures
from benchmarks.provenance import commit
from benchmarks.report import SECTION, write
from trainer.resume import keep_settings

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("figures.md", "report.html")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_written_as_it_stands(name: str, tmp_path: Path) -> None:
    """By hand nothing is changed in it but whole sections; what stands around them is told once."""
    page = Path(shutil.copy(DOCS / name, tmp_path))
    assert write(page, {})
    assert page.read_text() == (DOCS / name).read_text()


def test_both_pages_have_the_same_runs_and_their_pictures() -> None:
    texts = [(DOCS / name).read_text() for name in PAGES]
    sections = [dict(SECTION.findall(text)) for text in texts]
    assert list(sections[0]) == list(sections[1])
    linked = {line.split("](")[1][:-1] for line in texts[0].splitlines() if line.startswith("![")}
    assert all((DOCS / name).exists() for name in linked)


def test_a_section_whose_run_is_not_here_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = Estimate(0.5, 0.4, 0.6, 9)
    for name in ("scaling", "ablations-small"):
        run = {"axis": "layers", "setting": "2", "completions": 9, "cut": 1, "length_error": 0.25}
        run["figures"] = {"mre math": figure, "loss": figure, "r2": figure}
        run["figures"] |= {"median_error": figure, "rank_correlation": figure}
        write_figures(tmp_path / "runs" / name, {"gamma": 0.9, "runs": [run]})
        keep_settings(tmp_path / "runs" / name, {"model": "m"})
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "figures.md").write_text(
        "<!-- section: tradeoff-there -->\nof another machine\n<!-- /section -->"
    )
    report.main(runs=tmp_path / "runs", docs=docs)
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["sections"] == ["scaling", "ablations-small"]
    text = (docs / "figures.md").read_text()
    assert [title for title, _ in SECTION.findall(text)] == [
        "tradeoff-there",
        "scaling",
        "ablations-small",
    ]
    percent, share = "50 [40, 60]", "0.5 [0.4, 0.6]"
    figures = f"{percent} | {percent} | {share} | 500 [400, 600] | {share}"
    assert f"| layers | 2 | 9 | 1 | {figures} | 9 | 9 | 25% |" in text
    assert f"model m, commit {commit() or 'unknown'}, on " in text
    with pytest.raises(ValueError, match=r"^runs: .* has no folder of lifebench"):
        report.main(runs=docs)
