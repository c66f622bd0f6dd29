"""docs/requests.md: every row names the tests that hold it, and they are there."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
TABLE = TESTS.parent / "docs" / "requests.md"
ROWS = [
    line
    for line in TABLE.read_text().splitlines()
    if line.startswith("|") and not line.startswith("|---") and not line.endswith("| test |")
]


@functools.cache
def names_in(file: str) -> set[str]:
    """Names of the tests in the one file of this name."""
    folder = TESTS if file.startswith("e2e/") else TESTS / "lenvm_vllm"
    (path,) = folder.rglob(file)
    body = ast.parse(path.read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_there_are_rows() -> None:
    assert len(ROWS) > 30


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_held_by_its_tests(row: str) -> None:
    *_, tests, _ = row.split("|")
    named = re.findall(r"`((?:e2e/)?test_\w+\.py)::(test_\w+)`", tests)
    assert named, row
    assert re.sub(r"`[^`]*`|,|\s", "", tests) == ""
    for file, name in named:
        assert name in names_in(file)
