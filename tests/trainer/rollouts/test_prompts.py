"""Prompts: from files, from hub data sets and by presets, of which rows are made here."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.support.prompts import PROMPTS, write_prompts
from trainer.rollouts.prompts import PRESETS, Hub, Prompt, Selection


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.jsonl.gz"])
def test_read_prompts(name: str, tmp_path: Path) -> None:
    assert list(Selection().read(write_prompts(tmp_path / name))) == PROMPTS


def test_what_is_null_is_missing(tmp_path: Path) -> None:
    """As tables have it where they are written as JSON; 0 is an id."""
    rows = [{"prompt": "a", "id": None, "domain": None, "system": None}, {"prompt": "b", "id": 0}]
    found = list(Selection().read(write_prompts(tmp_path / "p.jsonl", rows)))
    assert found == [Prompt("0", "", "a"), Prompt("0", "", "b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl: line 2: "),
        ("", r"a\.jsonl: line 2: "),
        ("[]", r"a\.jsonl: line 2: expected an object, got \[\]"),
        ('{"text": "hi"}', r"a\.jsonl: line 2: prompt: missing or not a text"),
        ('{"prompt": 3}', r"a\.jsonl: line 2: prompt: missing or not a text"),
        ('{"prompt": null}', r"a\.jsonl: line 2: prompt: missing or not a text"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        list(Selection().read(tmp_path / "a.jsonl"))


PROBLEM = {
    "description": "Add two numbers.",
    "input_format": "Two numbers.",
    "output_format": "",
    "examples": [{"input": "1 2", "output": "3"}],
    "note": None,
}
ASSEMBLED = (
    "Add two numbers.\n\nInput\n\nTwo numbers.\n\nExample input\n\n1 2\n\nExample output\n\n3"
)
HUB: dict[str, list[dict[str, Any]]] = {
    "nvidia/OpenCodeReasoning-2": [
        {"question": "-", "dataset": "taco", "split": "train", "index": "1"},
        {"question": "-", "dataset": "taco", "split": "train", "index": "1"},
        {"question": "-", "dataset": "code_contests", "split": "train", "index": "0"},
        {"question": "-", "dataset": "open-r1/codeforces", "split": "train", "index": "0"},
        {"question": "-", "dataset": "unknown", "split": "train", "index": "0"},
        {"question": "Told here.", "dataset": "apps", "split": "train", "index": "7"},
    ],
    "BAAI/TACO": [{"question": "zero"}, {"question": "Sort a list."}],
    "deepmind/code_contests": [{"description": ""}],
    "open-r1/codeforces": [PROBLEM],
    "allenai/WildChat": [
        {"conversation": [{"role": "user", "content": "Hi {you}"}, {"role": "assistant"}]},
        {"conversation": [{"role": "assistant", "content": "Yes?"}]},
    ],
    "zwhe99/DeepMath-103K": [{"question": "1 + 1?"}],
}


@pytest.mark.parametrize(
    ("preset", "domain", "questions"),
    [
        ("opencodereasoning-2-python", "code", ["Sort a list.", ASSEMBLED, "Told here."]),
        ("wildchat", "instruct", ["Hi {you}"]),
        ("deepmath-103k", "math", ["1 + 1?"]),
    ],
)
def test_presets_read_rows_of_their_data_sets(
    preset: str, domain: str, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_options: HUB[name])
    prompts = list(Selection().read(Path(preset)))
    template = PRESETS[preset].template
    assert [p.text for p in prompts] == [template.format(prompt=text) for text in questions]
    assert {p.domain for p in prompts} == {domain}
    assert len({p.id for p in prompts}) == len(prompts)
    plain = [p.text for p in Selection(template="{prompt}").read(Path(preset))]
    assert plain == questions


def test_any_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*names: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((names, options))
        return [{"question": "1 + 1?", "domain": "math", "answer": "2"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = Hub(subset="main", split="test")
    selection = Selection(template="{prompt}!", column="question", hub=hub)
    prompts = list(selection.read(Path("hub:org/name")))
    assert prompts == [Prompt("0", "math", "1 + 1?!")]
    assert asked == [(("org/name", "main"), {"split": "test", "streaming": True})]
    with pytest.raises(ValueError, match=r"^hub:org/name: row 1: prompt: missing or not a text"):
        list(Selection().read(Path("hub:org/name")))
