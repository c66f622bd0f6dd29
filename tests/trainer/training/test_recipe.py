"""Steps that fit any number of processes, and packs that texts do not share."""

from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import Lfm2Config, Lfm2Model, MambaConfig

from tests.support.tiny import tiny_tokenizer
from tests.support.training import run
from trainer.training.recipe import Recipe
from value_server.model.value_model import ValueModel


def step(processes: int, monkeypatch: pytest.MonkeyPatch, **options: int) -> tuple[int, int]:
    """(passes, packs of a pass) of each process."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    recipe = Recipe(**options)
    recipe.check()
    found = recipe.step()
    assert found.processes == processes
    return found.passes, found.packs_per_pass


@pytest.mark.parametrize(
    ("processes", "tokens", "packs_per_pass", "expected"),
    [
        (1, 16384, 1, (5, 1)),
        (8, 16384, 1, (1, 1)),  # the defaults on 8 GPUs; it was refused
        (2, 16384, 1, (3, 1)),  # 18,000 tokens are nearer than 12,000
        (1, 16384, 32, (1, 5)),  # a pass holds no more than a step
        (1, 72000, 8, (3, 8)),
        (1, 21000, 4, (2, 4)),  # 8 packs: within an eighth of 7, by large passes
        (1, 9000, 2, (3, 1)),  # 3 packs, as 4 are too far off
        (3, 100, 4, (1, 1)),
    ],
)
def test_the_nearest_step_is_taken(
    processes: int,
    tokens: int,
    packs_per_pass: int,
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"tokens_per_step": tokens, "packs_per_pass": packs_per_pass}
    assert step(processes, monkeypatch, **options) == expected


def test_a_step_is_never_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """By no more than half a pack a process, or an eighth, or the least that can be."""
    for processes, tokens, most in product(range(1, 10), range(1000, 90000, 3500), range(1, 12)):
        passes, own = step(processes, monkeypatch, tokens_per_step=tokens, packs_per_pass=most)
        packs = tokens / 3000 / processes
        assert own <= most
        largest = min(most, max(round(packs), 1))
        sizes = range((largest + 1) // 2, largest + 1)
        least = min(abs(size * n - packs) for size in sizes for n in range(1, 40))
        assert abs(passes * own - packs) <= max(0.5, packs / 8, least)
        assert abs(passes * own - packs) <= max(0.5, packs / 4) or passes * own == 1


def test_what_was_possible_before_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that old runs go on, and their facts tell of no other step."""
    for processes, packs, most in product((1, 2, 4), range(1, 33), range(1, 33)):
        if packs % processes == 0 and packs // processes % most == 0:
            own = packs // processes
            options = {"tokens_per_step": 3000 * packs, "packs_per_pass": most}
            assert step(processes, monkeypatch, **options) == (own // most, most)
            assert "packs_per_step" not in Recipe(**options).facts()
            assert Recipe(**options).told() is None


def test_another_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And recorded: a run with another number of processes does not go on with other steps."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    recipe = Recipe()
    assert recipe.told() == (
        "tokens_per_step: 24000 in place of 16384: 8 processes, 1 passes of 1 packs of 3000"
    )
    assert recipe.facts()["packs_per_step"] == 8


def lfm2(folder: Path) -> Path:
    """Two layers of short convolutions around one of attention."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        layer_types=["conv", "full_attention", "conv"],
        eos_token_id=256,
        pad_token_id=256,
        bos_token_id=None,
    )
    Lfm2Model(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_states_would_leak_from_text_to_text(data: Path, tmp_path: Path) -> None:
    """So packing is refused by name, before any work, and training goes without."""
    base = lfm2(tmp_path / "base")
    model = Lfm2Model.from_pretrained(base).eval()
    ids, places = torch.arange(12)[None], torch.cat([torch.arange(6)] * 2)[None]
    with torch.inference_mode():
        packed = model(ids, position_ids=places).last_hidden_state[0, 6:]
        alone = model(ids[:, 6:]).last_hidden_state[0]
    assert not torch.allclose(packed, alone, atol=1e-3)
    with pytest.raises(ValueError, match=r"^packing: True, .*--no-packing.* with conv layers"):
        run(tmp_path / "nothing", tmp_path / "out", base)
    run(data, tmp_path / "out", base, packing=False, max_steps=1, packs_per_pass=2)
    trained = ValueModel.load(tmp_path / "out", str(base))
    assert trained.lenvm.training["packing"] is False


def test_backbones_without_layer_types_are_known_by_name(tmp_path: Path) -> None:
    MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^packing: True, .* with (linear_attention|mamba) layers"
    ):
        run(tmp_path / "nothing", tmp_path / "out", tmp_path)
