"""Record of the project's classes and files that one call of a script runs.

    python -m tests.helpers.call_trace TRACE.json merge.py --method ties ...

runs the script's main in this process, writes {"classes": {name: file}, "files": [...]} and ends with its exit code.
"""

from __future__ import annotations

import inspect
import json
import runpy
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("aim", "common", "merging")
FOLDERS = (*(f"{ROOT}/{package}/" for package in PACKAGES), f"{ROOT}/merge.py")
GENERATED = "<string>"
"""File name of the code that `dataclass` generates."""


class CallTrace:
    """Profile function that records which classes and files of the project run; calls of an import are left out.

    A class counts where one of its own or inherited methods runs; its ancestor that defines the method counts, too. The
    methods that `dataclass` generates have no file, so that there the first argument alone tells the class.
    """

    def __init__(self) -> None:
        self.classes: set[type] = set()
        self.files: set[str] = set()
        self._importing = threading.local()

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        """Record a call; the start and the end of a module's code are those of an import."""
        code = frame.f_code
        if code.co_name == "<module>" and event in ("call", "return"):
            self._importing.depth = getattr(self._importing, "depth", 0) + (1 if event == "call" else -1)
        if event != "call" or getattr(self._importing, "depth", 0) or not code.co_flags & inspect.CO_OPTIMIZED:
            return
        if code.co_filename.startswith(FOLDERS):
            self.files.add(code.co_filename.removeprefix(f"{ROOT}/"))
        elif code.co_filename != GENERATED:
            return
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            self._add(first if isinstance(first, type) else type(first), code)

    def _add(self, kind: type, code: CodeType) -> None:
        """Record the class of a method's first argument, and the class that defines the method; no exceptions."""
        if kind.__module__.split(".")[0] not in PACKAGES or issubclass(kind, BaseException):
            return
        if code.co_filename == GENERATED:
            self.classes.add(kind)
            return
        owners = [cls for cls in kind.__mro__ if code.co_qualname == f"{cls.__qualname__}.{code.co_name}"]
        if owners:
            self.classes |= {kind, owners[0]}


def file_of(cls: type) -> str:
    """Return the file that defines a class, relative to the repository's root."""
    return Path(sys.modules[cls.__module__].__file__ or "").relative_to(ROOT).as_posix()


def main(argv: Sequence[str]) -> int:
    """Trace the main function of a script of the root; the first argument is the file for the trace."""
    target, script, *arguments = argv
    import torch  # noqa: F401 - before the trace, which would slow its import

    script_main = runpy.run_path(str(ROOT / script))["main"]
    trace = CallTrace()
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        code: int = script_main(arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    classes = {f"{cls.__module__}.{cls.__qualname__}": file_of(cls) for cls in trace.classes}
    record = {"classes": dict(sorted(classes.items())), "files": sorted(trace.files)}
    Path(target).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
