"""Files of candidates."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import GAMMA
from tests.support.training import candidates
from trainer.candidates import count, is_written, read_candidates, text_key, write_candidates
from value_server.contract.values import length_from_logit

MADE = {"gamma": GAMMA}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """From all files of a folder, and from one; a text without positions is left out."""
    texts = {name: candidates(i, [1, 4, 9]) for i, name in enumerate("ab")}
    write_candidates(tmp_path / "0.parquet", {"a": texts["a"], "none": candidates(0, [0])}, MADE)
    write_candidates(tmp_path / "1.parquet", {"b": texts["b"], "c": texts["b"].within(0)}, MADE)
    found = read_candidates(tmp_path, GAMMA)
    assert found.keys() == {"a", "none", "b"}
    for name, own in texts.items():
        for field in ("positions", "ids", "p", "z"):
            np.testing.assert_array_equal(getattr(found[name], field), getattr(own, field))
    assert read_candidates(tmp_path / "1.parquet", GAMMA).keys() == {"b"}
    assert count([*found.values(), None]) == 7


def test_a_teacher_of_another_gamma_tells_the_same_lengths(tmp_path: Path) -> None:
    own = candidates(0, [1, 4])
    write_candidates(tmp_path / "0.parquet", {"a": own}, MADE)
    z = torch.from_numpy(read_candidates(tmp_path, 0.9)["a"].z)
    lengths = (length_from_logit(*it) for it in ((z, 0.9), (torch.from_numpy(own.z), GAMMA)))
    torch.testing.assert_close(*lengths, rtol=1e-4, atol=1e-4)


def test_within_keeps_those_of_the_first_tokens() -> None:
    own = candidates(0, [1, 4, 9])
    assert [len(own.within(length).ids) for length in (1, 2, 4, 5, 9, 10)] == [0, 1, 1, 2, 2, 3]
    np.testing.assert_allclose(own.shares.sum(-1), 1, rtol=1e-6)


def test_a_file_remembers_what_it_was_made_with(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    assert not is_written(path, {"share": 0.1})
    write_candidates(path, {"a": candidates(0, [1])}, {"share": 0.1})
    assert is_written(path, {"share": 0.1})
    with pytest.raises(ValueError, match=r"^share: .* made with 0.1, this run has 0.2"):
        is_written(path, {"share": 0.2})


@pytest.mark.parametrize("content", [b"", b"text"])
def test_what_is_no_file_of_candidates_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "0.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.parquet: holds no candidates"):
        read_candidates(tmp_path, GAMMA)
    with pytest.raises(ValueError, match=r"^.*nothing: holds no candidates"):
        read_candidates(tmp_path / "nothing", GAMMA)


def test_candidates_of_several_numbers_do_not_mix(tmp_path: Path) -> None:
    for number in (3, 4):
        own = {str(number): candidates(0, [1], number)}
        write_candidates(tmp_path / f"{number}.parquet", own, MADE)
    with pytest.raises(ValueError, match="equally many"):
        read_candidates(tmp_path, GAMMA)


def test_a_text_is_found_by_its_tokens() -> None:
    keys = {text_key(np.array(ids)) for ids in ([1, 2], [2, 1], [1, 2, 0])}
    assert len(keys) == 3
    assert text_key(np.array([1, 2], np.int32)) in keys
