"""The docs name what is there: files, modules, links, folders, and every key and setting."""

import re
from pathlib import Path

import pytest

from lenvm_vllm.settings import Settings
from lenvm_vllm.target.request import LengthTarget

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PACKAGES = ("lenvm_vllm", "value_server", "trainer", "benchmarks")
_FILE = re.compile(
    rf"\b((?:{'|'.join(PACKAGES)}|tests|docs|deploy|scripts|examples|checkpoints)/[\w./-]*\w)"
)
_MODULE = re.compile(rf"-m ((?:{'|'.join(PACKAGES)})[.\w]*)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_are_there(page: Path) -> None:
    text = page.read_text()
    names = [name for name in _FILE.findall(text) if not name.endswith("NAME.py")]
    modules = [name for name in _MODULE.findall(text) if not name.endswith("NAME")]
    missing = [name for name in names if not (ROOT / name).exists()]
    for module in modules:
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            missing.append(module)
    assert page.name == "CHANGELOG.md" or missing == []  # there some are gone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tree_has_every_folder() -> None:
    readme = (ROOT / "README.md").read_text()
    for package in PACKAGES:
        (own,) = re.findall(rf"^{package}/ .*\n((?:  .*\n)+)", readme, re.MULTILINE)
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert set(re.findall(r"^  (\w+)/ ", own, re.MULTILINE)) == folders - {"examples"}


@pytest.mark.parametrize("key", LengthTarget.model_fields)
def test_every_key_of_the_field(key: str) -> None:
    assert f"`{key}`" in (ROOT / "docs" / "length-target.md").read_text()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_of_the_plugin(name: str) -> None:
    rows = [r for r in (ROOT / "docs" / "deployment.md").read_text().splitlines() if r[:1] == "|"]
    assert any(f"`{name}`" in row.split("|")[1] for row in rows)
