"""The paper's layout has no lookahead head."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.tiny import tiny_lookahead, tiny_tokenizer
from trainer.paper_checkpoints import export_checkpoint


def test_an_export_leaves_the_lookahead_head_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says so."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    model = tiny_lookahead()
    model.save(ours)
    tiny_tokenizer().save_pretrained(ours)
    export_checkpoint(ours, theirs)
    expected = {f"model.{name}" for name in model.backbone.state_dict()}
    assert load_file(theirs / "model.safetensors").keys() == expected
    assert {file.name for file in theirs.glob("*.safetensors")} == {
        "model.safetensors",
        "value_head.safetensors",
    }
    assert f"{theirs} has no lookahead head" in capsys.readouterr().out


def test_heads_alone_are_no_backbone(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    tiny_lookahead().save(ours)
    (ours / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no backbone in safetensors files"):
        export_checkpoint(ours, tmp_path / "theirs")
