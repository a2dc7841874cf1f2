#!/usr/bin/env bash
# All checks that need a CUDA GPU: the tests with the marker gpu, and a small benchmark. It takes eight minutes at most:
#
#     scripts/gpu_check.sh [FOLDER]        # the output also goes to FOLDER
#
# It needs a Python with the test extra of this checkout and a PyTorch for CUDA, and nothing from the network. Python is
# .venv/bin/python (made by 'make setup'), or what the variable PYTHON names; laserlm is taken from src. Where no index can be
# reached, bring such a Python along. Without a GPU it says so in one line and ends with exit code 0.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
out="${1:-$(mktemp -d)}"
mkdir -p "$out"
export PYTHONPATH="$PWD/src" HF_HUB_OFFLINE=1
if ! command -v "$python" >/dev/null; then
  echo "No Python at $python: run 'make setup', or name one that has PyTorch and the test extra with PYTHON=..." >&2
  exit 1
fi
missing="$("$python" -c 'from laserlm.searching.device_check import missing_gpu; print(missing_gpu())')"
if [ -n "$missing" ]; then
  echo "$missing"
  exit 0
fi
status=0
timeout 330 "$python" -m pytest tests/gpu -p no:cacheprovider 2>&1 | tee "$out/tests.txt" || status=1
timeout 140 "$python" benchmarks/gpu.py 2>&1 | tee "$out/benchmark.txt" || status=1
exit "$status"
