"""Training with pictures: what only a picture tells is learnt, and read back by the commands.

The toy task: prompts are the same tokens, and the picture says how long the answer is. Without it
no model can do better than a constant.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny_vision import BACKBONES, PLACEHOLDER, as_png, write_backbone
from tests.support.training import row, run, toy_rows, write
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.tokens import tokens
from trainer.pictures import with_bytes
from trainer.reading import Reading
from value_server.contract.checkpoint import read_config
from value_server.model.backbone import load_sight
from value_server.model.pictures import Picture
from value_server.model.value_model import ValueModel

SHORT, LONG = 2, 7  # the last token is within the tiny windows of Gemma
LENGTHS = {0: SHORT, 255: LONG}
GAMMA = 0.8
# Who sees no picture knows the length from the third token on.
GAPS = [GAMMA ** (SHORT - k) - GAMMA ** (LONG - k) for k in range(SHORT)]
BLIND_LOSS = sum(gap**2 / 2 for gap in GAPS) / (SHORT + LONG)
OPTIONS: dict[str, Any] = {
    "max_steps": 40,
    "tokens_per_step": 400,
    "max_length": 100,
    "tune": "lora",
    "learning_rate": 3e-3,
    "gamma": GAMMA,
    "save_steps": 100,
}


def plain(shade: int) -> Picture:
    """A picture of one shade."""
    return Picture.of(as_png(Image.new("RGB", (64, 64), (shade, shade, shade))))


def pictured_rows(base: Path, count: int = 24) -> list[dict[str, Any]]:
    """Dark pictures have short answers and light ones long ones, of one token all."""
    sight = load_sight(str(base))
    found = []
    for number in range(count):
        shade = [*LENGTHS][number % 2]
        picture = plain(abs(shade - number))  # each prompt has another
        length = LENGTHS[shade]
        opened = Image.new("RGB", (64, 64))
        rows = len(sight.look(sight.pixels(opened)).rows)
        prompt = [259, *[PLACEHOLDER] * rows, 259, 7]
        found.append(row(number, prompt, [5] * (length - 1) + [256]) | {"pictures": [picture]})
    return with_bytes(found)


def losses(checkpoint: Path) -> list[float]:
    curve: list[float] = read_config(checkpoint).training["loss_curve"]
    return curve


@pytest.mark.parametrize("name", BACKBONES)
def test_what_only_the_picture_tells_is_learnt(name: str, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    write_backbone(base, name)
    data = write(tmp_path / "a.parquet", pictured_rows(base))
    run(data, out, base, **OPTIONS)
    assert losses(out)[-1] < 0.1 * BLIND_LOSS
    assert read_config(out).pictures
    assert "It sees the pictures" in (out / "README.md").read_text()


def test_without_pictures_it_cannot_be(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    write_backbone(base, "qwen2.5-vl")
    data = write(tmp_path / "a.parquet", pictured_rows(base))
    run(data, out, base, pictures=False, **OPTIONS)
    assert losses(out)[-1] > 0.9 * BLIND_LOSS
    assert not read_config(out).pictures
    assert "pictures of a prompt are blanks to it" in (out / "README.md").read_text()
    assert type(ValueModel.load(out, str(base)).backbone).__name__ == "Qwen2Model"


def test_the_commands_see_them_too(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    write_backbone(base, "qwen3-vl")
    data = write(tmp_path / "a.parquet", pictured_rows(base))
    run(data, out, base, **OPTIONS | {"holdout": 0.3, "eval_steps": 20})
    assert read_config(out).training["held_out_loss"] < 0.5 * BLIND_LOSS
    reading = Reading(base_model=str(base), only_json=True, dtype="float32")
    assert evaluate(out, data, reading=reading)["rank_correlation"]["all"] > 0.8
    scored = tokens(out, data, reading=reading, min_count=2)
    assert [s["id"] for s in scored["lengthen"] + scored["shorten"]] == [5]


def test_texts_without_pictures_are_learnt_beside(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_backbone(base, "qwen2.5-vl")
    rows = [
        *pictured_rows(base, 6),
        *(r | {"prompt_id": f"t{r['prompt_id']}"} for r in toy_rows(6)),
    ]
    data = write(tmp_path / "a.parquet", rows)
    run(data, tmp_path / "out", base, packs_per_pass=3, max_length=120, tokens_per_step=720)
    model = ValueModel.load(tmp_path / "out", str(base))
    assert model.sight
    assert np.isfinite(losses(tmp_path / "out")).all()
    run(data, tmp_path / "more", base, start=tmp_path / "out", max_length=120)
    assert read_config(tmp_path / "more").pictures
    with pytest.raises(ValueError, match=r"pictures: False, must be True \(--pictures\), as"):
        run(data, tmp_path / "other", base, start=tmp_path / "out", pictures=False)


def test_what_does_not_fit_is_named(tmp_path: Path, base: Path) -> None:
    seeing = tmp_path / "seeing"
    write_backbone(seeing, "llava")
    rows = pictured_rows(seeing, 2)
    data = write(tmp_path / "a.parquet", rows)
    with pytest.raises(ValueError, match=r"pictures: model_type: 'llama'.* --no-pictures takes"):
        run(data, tmp_path / "out", base)
    rows[0]["prompt_ids"].remove(PLACEHOLDER)
    data = write(tmp_path / "b.parquet", rows)
    with pytest.raises(ValueError, match=r"pictures: 2 with 32 rows for 31 placeholder tokens"):
        run(data, tmp_path / "out", seeing, max_length=100)
