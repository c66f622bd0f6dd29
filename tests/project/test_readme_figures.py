"""Every figure that the README claims is held by a stored result, and says what that says.

benchmarks/results/readme.json lists the claims: a piece of the README with its figures left open,
and where they come from. A figure of the README that no claim covers fails, too.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CLAIMS: list[dict[str, Any]] = json.loads((RESULTS / "readme.json").read_text())
README = (ROOT / "README.md").read_text()
_NO_FIGURES = re.compile(
    r"\]\([^)]*\)|`[^`]*`|SmolLM2-135M\S*|Qwen2\.5-Coder-0\.5B\S*|H100|Eq\. 15|first row = 1"
)


def value(source: dict[str, Any], name: str) -> Any:
    """Of a figure: as it was noted, or out of a final JSON line."""
    if "noted" in source:
        return source["noted"][name]
    found = json.loads((RESULTS / source["file"]).read_text())
    for key in source["values"][name]:
        found = found[key]
    return found


def names(claim: str) -> list[str]:
    return re.findall(r"{(\w+)[^}]*}", claim)


def filled(claim: dict[str, Any]) -> str:
    """The piece of the README with the figures that the stored result has."""
    figures = {name: value(claim["from"], name) for name in names(claim["readme"])}
    if claim.get("percent"):  # whole ones, of which the sign stands at the last
        figures = {name: round(100 * figure) for name, figure in figures.items()}
    return str(claim["readme"].format(**figures))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["readme"][:40])
def test_the_readme_says_what_the_results_say(claim: dict[str, Any]) -> None:
    assert filled(claim) in README
    assert claim["from"].get("file") or claim["from"]["by"]


def test_no_figure_without_a_result() -> None:
    """In the section that claims something; elsewhere figures are examples and versions."""
    (section,) = re.findall(r"^## Results\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    for claim in CLAIMS:
        section = section.replace(filled(claim), "")
    rest = [line for line in _NO_FIGURES.sub("", section).splitlines() if re.search(r"\d", line)]
    assert rest == []


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_a_stored_line_says_how_it_was_made(path: Path) -> None:
    if path.name != "readme.json":
        made = json.loads(path.read_text())["provenance"]
        assert made["commit"]
        assert made["command"].startswith("python -m ")
        assert made["machine"]["processor"]
        assert "/tmp/" not in path.read_text()


def test_a_figure_that_is_wrong_or_new_would_be_seen() -> None:
    claim = {"readme": "takes {ms:.0f} ms", "from": {"noted": {"ms": 46.6}, "by": "a run"}}
    assert filled(claim) == "takes 47 ms"
    claim["from"]["noted"]["ms"] = 48
    assert filled(claim) not in README
