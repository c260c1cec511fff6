"""Build backend that refuses `pip install .`, because the programs run from a clone.

The configs and the three scripts lie outside the packages, and the packages' names (`common`, `eval`) are too general
for site-packages. Without a backend pip would guess a list of packages and install a part of the project.
"""

from __future__ import annotations

import sys
from typing import NoReturn


def refuse(*_arguments: object, **_options: object) -> NoReturn:
    """End the build with one sentence that says to clone."""
    sys.exit(
        "error: this project is not installed as a package; clone it, run `pip install -r requirements.txt` in the "
        "clone, and start its scripts from there (python merge.py --help)."
    )


# the hooks of PEP 517 and PEP 660 that pip, uv and build call first
get_requires_for_build_wheel = get_requires_for_build_sdist = get_requires_for_build_editable = refuse
build_wheel = build_sdist = build_editable = refuse
