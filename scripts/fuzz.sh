#!/usr/bin/env bash
# Try many inputs on every parser: scripts/fuzz.sh [INPUTS], 100,000 each if none is given. More tests of pytest may follow.
set -euo pipefail
cd "$(dirname "$0")/.."
LASER_FUZZ="${1:-100000}" exec .venv/bin/python -m pytest tests/test_fuzz.py -q -k stands "${@:2}"
