"""Checkpoints in the layout of the paper's own implementation, written here tensor by tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.support.tiny import GAMMA, tiny_model, tiny_tokenizer
from trainer.paper_checkpoints import export_checkpoint, import_checkpoint, linear_as_mlp
from trainer.training.backbone import WEIGHTS, Backbone, LoraShape
from value_server.contract.checkpoint import LenvmConfig, read_config, tokenizer_fingerprint
from value_server.model.value_model import ValueHead, ValueModel

Tensors = dict[str, torch.Tensor]
BASE_NAME = "org/base"
H = 32
SHAPE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
IDS = torch.arange(24).reshape(2, 12) * 7 % 258


def head_tensors(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    shapes = {"fc.weight": (H, H), "fc.bias": (H,), "summary.weight": (1, H), "summary.bias": (1,)}
    return {f"v_head.{n}": torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def language_model(kind: type[PreTrainedConfig], tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"head_dim": 8} if kind is Qwen3Config else {}
    config = kind(**SHAPE, **sizes, initializer_range=0.3, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # not the rotary frequencies, which stay float32
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def write(
    folder: Path,
    kind: type[PreTrainedConfig] = Qwen2Config,
    tied: bool = True,
    layout: str = "own file",
) -> Any:
    """Returns the language model under the head. layout: where the head is; 'shards' puts it
    among two shards of the backbone and keeps of tied embeddings lm_head.weight only.
    """
    model = language_model(kind, tied)
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    if layout == "own file":
        if tied:
            del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors")
        save_file(head_tensors(), folder / "value_head.safetensors")
        return model
    if tied:
        del weights["model.embed_tokens.weight"]
    weights |= head_tensors()
    names = sorted(weights)
    parts = {1: names[::2], 2: names[1::2]}
    index = {}
    for number, part in parts.items():
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return model


def run(source: Path, output: Path, **options: Any) -> ValueModel:
    import_checkpoint(source, output, **{"gamma": 0.997, "base_model": BASE_NAME} | options)
    return ValueModel.load(output)


@torch.inference_mode()
def naive(model: Any, head: Tensors, ids: torch.Tensor = IDS) -> torch.Tensor:
    """z by the formula, from the last hidden state of the language model in float32."""
    h = model.float()(ids, output_hidden_states=True).hidden_states[-1]
    w = {n.removeprefix("v_head."): t.float() for n, t in head.items()}
    if "fc.weight" in w:
        h = h @ w["fc.weight"].T + w["fc.bias"]
        h = h * torch.sigmoid(h)
    return (h @ w["summary.weight"].T + w["summary.bias"])[..., 0]


@torch.inference_mode()
def outputs(model: ValueModel) -> torch.Tensor:
    return model(IDS)


@pytest.mark.parametrize("layout", ["own file", "shards"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_values_are_those_of_the_original(
    kind: type[PreTrainedConfig], tied: bool, layout: str, tmp_path: Path
) -> None:
    original = write(tmp_path / "source", kind, tied, layout)
    model = run(tmp_path / "source", tmp_path / "out")
    torch.testing.assert_close(outputs(model), naive(original, head_tensors()))
    assert outputs(model).std() > 0.1
    facts = read_config(tmp_path / "out")
    assert (facts.gamma, facts.base_model, facts.weights) == (0.997, BASE_NAME, "full")
    assert facts.num_layers == 2
    theirs, ours = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "out"))
    assert facts.tokenizer_fingerprint == tokenizer_fingerprint(theirs)
    assert facts.tokenizer_fingerprint == tokenizer_fingerprint(ours)
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_there_and_back_is_the_same_to_the_bit(
    kind: type[PreTrainedConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = write(tmp_path / "source", kind)
    run(tmp_path / "source", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert capsys.readouterr().out.splitlines()[-1] == "gamma 0.997"
    for folder in (tmp_path / "ours", tmp_path / "back"):
        assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # all may read all
    assert "lenvm" not in json.loads((tmp_path / "back" / "config.json").read_text())
    for name in ("model.safetensors", "value_head.safetensors"):
        before, after = (load_file(tmp_path / f / name) for f in ("source", "back"))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype
            assert torch.equal(tensor, after[key])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    assert type(again) is type(original)
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, original(IDS).logits)


@pytest.mark.parametrize("tune", ["full", "lora", "head"])
def test_a_checkpoint_of_ours_goes_there_and_back(tune: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_tokenizer().save_pretrained(base)
    tiny_model().backbone.save_pretrained(base)
    config = LenvmConfig(
        gamma=GAMMA,
        base_model=BASE_NAME,
        weights=WEIGHTS[tune],
        num_layers=1,
        tokenizer_fingerprint=tokenizer_fingerprint(tiny_tokenizer()),
    )
    backbone = Backbone(model=str(base), tune=tune, lora=LoraShape(rank=4, alpha=8))
    model = backbone.build(config, torch.float32).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save(tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "theirs", base_model=str(base))
    back = run(tmp_path / "theirs", tmp_path / "back", gamma=GAMMA)
    torch.testing.assert_close(outputs(back), outputs(model), rtol=1e-4, atol=1e-5)


# --- vision-language ----------------------------------------------------------------------


def write_vl(folder: Path, prefixes: str, head: Tensors) -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config=SHAPE | {"rope_parameters": rope, "initializer_range": 0.3},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": H,
        },
        tie_word_embeddings=True,
        image_token_id=250,
        video_token_id=251,
        vision_start_token_id=252,
        vision_end_token_id=253,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    del weights["lm_head.weight"]
    if prefixes == "old":
        weights = {
            n.replace("model.visual.", "visual.").replace("model.language_model.", "model."): t
            for n, t in weights.items()
        }
        facts = json.loads((folder / "config.json").read_text())
        text = facts.pop("text_config")
        text["rope_scaling"] = text.pop("rope_parameters")
        text["rope_theta"] = text["rope_scaling"].pop("rope_theta")
        facts = text | facts
        (folder / "config.json").write_text(json.dumps(facts))
    save_file(weights, folder / "model.safetensors")
    save_file(head, folder / "value_head.safetensors")
    return model


@pytest.mark.parametrize("prefixes", ["old", "new"])
def test_the_text_part_of_a_vl_checkpoint_and_its_linear_head(
    prefixes: str, tmp_path: Path
) -> None:
    head = {n: t for n, t in head_tensors(torch.float32).items() if "summary" in n}
    original = write_vl(tmp_path / "source", prefixes, head)
    model = run(tmp_path / "source", tmp_path / "out")
    assert model.config.model_type == "qwen2"
    torch.testing.assert_close(outputs(model), naive(original, head), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_a_vl_head_with_a_hidden_layer_must_be_told(kind: Any, tmp_path: Path) -> None:
    head = head_tensors(torch.float32)
    original = write_vl(tmp_path / "source", "new", head)
    with pytest.raises(ValueError, match=r"^head: .* say 'mlp' or 'linear'"):
        run(tmp_path / "source", tmp_path / "out")
    model = run(tmp_path / "source", tmp_path / "out", head=kind)
    read = {n: t for n, t in head.items() if kind == "mlp" or "summary" in n}
    torch.testing.assert_close(outputs(model), naive(original, read), rtol=1e-4, atol=1e-4)


def test_a_linear_head_as_one_with_a_hidden_layer() -> None:
    linear = torch.nn.Linear(H, 1)
    named = {f"summary.{n}": t.detach() for n, t in linear.state_dict().items()}
    head = ValueHead(H)
    head.load_state_dict(linear_as_mlp(named))
    h = torch.randn(100, H) * 20
    torch.testing.assert_close(head(h), linear(h)[:, 0], rtol=1e-5, atol=1e-5)


# --- refusals -----------------------------------------------------------------------------


def test_gamma_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^gamma: .* does not tell .* \(0\.997"):
        import_checkpoint(tmp_path, tmp_path / "out", base_model=BASE_NAME)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gamma": 1.0}, r"gamma must lie in \(0, 1\)"), ({"head": "deep"}, "^head: 'deep', must be")],
)
def test_a_bad_option_is_named(options: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "source", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    write(tmp_path / "source")
    with pytest.raises(ValueError, match=r"^output: .* is not empty"):
        run(tmp_path / "source", tmp_path / "source")
    with pytest.raises(ValueError, match=r"^output: .* is not empty"):
        export_checkpoint(tmp_path / "source", tmp_path / "source")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("value_head.safetensors", r"no v_head\.summary\.weight .* pickled ones are not read"),
        ("model.safetensors", "no backbone in safetensors files; pickled ones are not read"),
    ],
)
def test_pickled_weights_are_not_read(file: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "source")
    path = tmp_path / "source" / file
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model", {"model.norm.weight": None}, "weight 'norm.weight' is missing"),
        ("model", {"model.extra": torch.zeros(1)}, "weight 'extra' is not known"),
        ("model", {"model.norm.weight": torch.zeros(2)}, r"'norm.weight' is \(2,\), .* \(32,\)"),
        ("model", {"model.embed_tokens.weight": None}, "'embed_tokens.weight' is missing"),
        ("value_head", {"v_head.fc.bias": None}, r"no v_head\.fc\.bias"),
        ("value_head", {"v_head.fc.bias": torch.zeros(3)}, r"v_head\.fc\.bias is \(3,\), not"),
        ("value_head", {"v_head.more": torch.zeros(3)}, r"v_head\.more is \(3,\), not None"),
    ],
)
def test_weights_that_do_not_fit(file: str, change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "source")
    path = tmp_path / "source" / f"{file}.safetensors"
    weights = {n: t for n, t in (load_file(path) | change).items() if t is not None}
    save_file(weights, path)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()
