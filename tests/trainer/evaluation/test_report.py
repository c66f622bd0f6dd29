"""The page of `lenvm evaluate --html`: what stands in it, and what may not."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import training as support
from tests.support.tiny import GAMMA, tiny_checkpoint
from tests.support.training import row
from trainer.data import Rollout, known_values
from trainer.evaluation.evaluate import evaluate, summarise_all
from trainer.evaluation.figures import Predicted
from trainer.evaluation.report import SHOWN, WORST, write_report
from trainer.reading import Reading
from value_server.contract.checkpoint import read_config
from value_server.contract.values import logit_from_length

HOSTILE = '<script src="http://evil.example/x.js"></script><img onerror="x"> & "quoted"'
VOID = {"meta"}


class Page(HTMLParser):
    """Rows of its tables, and all tags with their attributes. Each tag that begins ends."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open += [tag] * (tag not in VOID)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data


def text(
    number: int,
    length: int,
    foretold: float,
    prompt: str = "",
    domain: str = "d",
    finished: bool = True,
) -> Predicted:
    """A text whose forecast is `foretold` at its prompt's end, and right behind it."""
    ids = np.arange(length)
    rollout = Rollout(f"p{number}", domain, np.arange(3), ids, finished, prompt=prompt)
    u = known_values(rollout, GAMMA, 999)
    lengths = torch.tensor([foretold, *range(len(u) - 1, 0, -1)], dtype=torch.float64)
    return Predicted(rollout, u, logit_from_length(lengths, GAMMA).numpy())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def page_of(checkpoint: Path, texts: list[Predicted], path: Path) -> Page:
    figures = summarise_all({"this": texts, "twin": texts}, GAMMA)
    write_report(path, checkpoint, read_config(checkpoint), figures, texts)
    return Page(path.read_text())


def test_domains_positions_and_the_worst_prompts(checkpoint: Path, tmp_path: Path) -> None:
    texts = [text(i, 40, 40 + i, f"prompt {i}") for i in range(30)]
    texts += [text(90, 40, 20, "too short", "e"), text(91, 20, 63, "", "e", finished=False)]
    _, domains, worst = page_of(checkpoint, texts, tmp_path / "r.html").tables
    head = ["domain", "prompts", "completions", "mean length", "forecast"]
    assert domains[0] == [*head, "at 0%", "at 25%", "at 50%", "at 75%", "R²"]
    assert [line[:4] for line in domains[1:]] == [
        ["d", "30", "30", "40"],
        ["e", "2", "2", "30"],
        ["all", "32", "32", "39"],
    ]
    assert domains[2][4:9] == ["125%", "50%", "0%", "0%", "0%"]  # of 50% and 200%; of the first
    assert len(worst) == 1 + WORST
    assert worst[:4] == [
        ["prompt", "domain", "length", "foretold", "factor"],
        ["prompt_id p91", "e", "≥ 21", "63", "3.0"],
        ["too short", "e", "40", "20", "2.0"],
        ["prompt 29", "d", "40", "69", "1.7"],
    ]


def test_what_prompts_say_is_text_alone(checkpoint: Path, tmp_path: Path) -> None:
    long = HOSTILE + "x" * 2 * SHOWN
    texts = [text(0, 9, 30, long, "<b>bold</b>"), text(1, 9, 9, "fine")]
    page = page_of(checkpoint, texts, tmp_path / "r.html")
    assert page.tables[-1][1][0] == long[:SHOWN] + "…"
    assert page.tables[-1][1][1] == "<b>bold</b>"
    names = {name for name, _ in page.tags}
    assert "svg" in names
    assert not names & {"script", "img", "b", "link", "iframe", "object", "image"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith("#")
    shown = re.sub(r'xmlns(:\w+)?="[^"]*"', "", (tmp_path / "r.html").read_text())
    assert re.findall("https?:[^ ]*", shown) == [
        "http://evil.example/x.js&quot;&gt;&lt;/script&gt;&lt;img"
    ]


def test_the_command_writes_it(checkpoint: Path, tmp_path: Path) -> None:
    rows = [row(i, [i] * 3, [*range(i % 9 + 1), 256]) | {"prompt": f"no {i}"} for i in range(9)]
    data = support.write(tmp_path / "a.parquet", rows)
    evaluate(checkpoint, data, html=tmp_path / "r.html", reading=Reading(only_json=True))
    page = Page((tmp_path / "r.html").read_text())
    assert {line[0] for line in page.tables[-1][1:]} == {f"no {i}" for i in range(9)}
    assert "9 completions of 9 prompts (a.parquet)" in (tmp_path / "r.html").read_text()
    for wrong in ("r.pdf", "none/r.html"):
        with pytest.raises(
            ValueError, match=rf"^html: .*{wrong}.*, must be a name in \.html, in a"
        ):
            evaluate(tmp_path / "no checkpoint", data, html=tmp_path / wrong)
