"""Pictures of prompts in files of rollouts: each once, named in every row."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support.tiny_vision import png
from tests.support.training import row, write
from trainer.pictures import MAX_PICTURES, check_pictures, with_bytes
from trainer.rollout_files import read_rollouts
from value_server.model.pictures import Picture

ONE, OTHER = Picture.of(png(0)), Picture.of(png(1))


def pictured(number: int, prompt: list[int], *pictures: Picture) -> dict[str, Any]:
    return row(number, prompt, [9, number, 256]) | {"pictures": pictures}


def test_bytes_stand_once_in_a_file(tmp_path: Path) -> None:
    rows = [pictured(i, [1, 258, 2], ONE) for i in range(3)]
    rows += [pictured(3, [1, 258, 258], OTHER, ONE), row(4, [1, 2], [256])]
    path = write(tmp_path / "a.parquet", with_bytes(rows))
    told = pq.read_table(path).to_pylist()
    assert [r["pictures"] for r in told] == [
        *[[ONE.sha256]] * 3,
        [OTHER.sha256, ONE.sha256],
        None,
    ]
    assert [r["picture_bytes"] for r in told] == [
        [ONE.data],
        [None],
        [None],
        [OTHER.data, None],
        None,
    ]
    found = read_rollouts(path)
    assert [r.pictures for r in found] == [(ONE,), (ONE,), (ONE,), (OTHER, ONE), ()]
    assert found[1].pictures[0].data is found[0].pictures[0].data


def test_other_pictures_are_other_prompts(tmp_path: Path) -> None:
    """The bug guarded against: prompts with equal placeholders that count as one."""
    rows = [pictured(0, [1, 258, 2], picture) for picture in (ONE, ONE, OTHER)]
    write(tmp_path / "a.parquet", with_bytes(rows[:2]))
    write(tmp_path / "b.parquet", with_bytes(rows[1:]))
    found = read_rollouts(tmp_path)
    assert [r.pictures for r in found] == [(ONE,), (ONE,), (OTHER,)]
    assert found[0].prompt_id == found[1].prompt_id != found[2].prompt_id


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"picture_bytes": [None]}, f"a.parquet: prompt 0: pictures: {ONE.sha256} has no bytes"),
        ({"picture_bytes": [OTHER.data]}, rf"picture_bytes\[0\] has sha256 {OTHER.sha256}"),
        ({"pictures": ["ab"] * 33}, f"pictures: 33, must be at most {MAX_PICTURES}"),
    ],
)
def test_what_does_not_fit_is_named(columns: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [with_bytes([pictured(0, [1], ONE)])[0] | columns])
    with pytest.raises(ValueError, match=told):
        read_rollouts(path)


def test_one_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    rows = [pictured(0, [1], ONE), pictured(1, [2], ONE, Picture.of(b"GIF89a"))]
    found = read_rollouts(write(tmp_path / "a.parquet", with_bytes(rows)))
    check_pictures(found[:1])
    with pytest.raises(ValueError, match=r"prompt 1: pictures\[1\]: 6 bytes, not a readable"):
        check_pictures(found)
