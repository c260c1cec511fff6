#!/usr/bin/env bash
# Set up .venv from scratch where needed and run the tests, two at a time. Arguments go to pytest (-n 0: one at a time).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh requirements-dev.txt
# OpenMP threads that spin while they wait make tiny models many times slower beside another busy process; two processes
# of one thread each use two cores better than threads do
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
