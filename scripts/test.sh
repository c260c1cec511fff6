#!/usr/bin/env bash
# Set up .venv from scratch where needed and run the tests, two at a time.
# Usage: scripts/test.sh [FOLDER ...] [pytest's arguments]
#   scripts/test.sh merging/methods runs tests/merging/methods, the tests of that folder; -n 0 runs one test at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
arguments=() previous=
for argument in "$@"; do
  if [[ "$previous" == -[kmnp] ]]; then
    : # the value of a pytest option
  elif [[ "$argument" != -* && "$argument" != tests* && -e "tests/${argument%/}" ]]; then
    argument="tests/${argument%/}"
  elif [[ "$argument" != tests* && -d "$argument" ]]; then
    echo "error: $argument has no folder of tests; choose one of: $(cd tests && find . -name '__init__.py' -mindepth 2 -printf '%h ' | sed 's#\./##g')" >&2
    exit 2
  fi
  arguments+=("$argument") previous=$argument
done
scripts/setup.sh requirements-dev.txt
# OpenMP threads that spin while they wait make tiny models many times slower beside another busy process; two processes
# of one thread each use two cores better than threads do
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# files keep the order of tests/conftest.py, the longest first
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder ${arguments[@]+"${arguments[@]}"}
