#!/usr/bin/env bash
# Set up .venv from scratch where needed, then run the whole pipeline on tiny models made on the spot.
# Usage: scripts/quickstart.sh [--fast] [--save_path quickstart_out]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh requirements.txt
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
exec .venv/bin/python scripts/quickstart/main.py "$@"
