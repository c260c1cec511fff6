#!/usr/bin/env bash
# Make .venv and install one requirements file into it, unless that was done already. Usage: scripts/setup.sh FILE
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=${1:-requirements.txt}
python=${PYTHON:-python3}
"$python" - <<'PY'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"error: Python 3.11 to 3.13 is needed, found {sys.version.split()[0]}; set PYTHON=python3.12, say.")
PY
if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv
fi
stamp=".venv/.installed-$(cat requirements.txt "$requirements" | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
  echo "Installing $requirements into .venv (a few minutes, once) ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  touch "$stamp"
fi
