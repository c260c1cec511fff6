"""Environments that people have: no home, an unwritable cache, no compiler, foreign modules in the current folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aim.calibration.packing import _encoded
from common.cli import explain, run, unsupported_platform
from common.distributed import launcher_ranks
from common.errors import CalibrationError, UsageError
from common.files.cache_folder import cache_folder
from common.processes.child_process import run_python
from merging.ops.kernels import build
from merging.tokenizers.loading import load_in_subprocess
from tests.helpers.tiny import make_llama, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
USER = 54321
"""A user id without an entry in the password database."""


@pytest.fixture
def fresh_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and kernels that are not loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MERGE_KERNELS", raising=False)
    build.library.cache_clear()
    yield tmp_path / "cache" / "activation-informed-merging"
    build.library.cache_clear()


def cached(folder: Path) -> list[Path]:
    return sorted(folder.glob("kernels-*.so"))


needs_compiler = pytest.mark.skipif(
    not any(os.access(Path(p) / "cc", os.X_OK) for p in os.get_exec_path()), reason="needs cc"
)


@needs_compiler
def test_a_damaged_or_foreign_library_is_compiled_anew(fresh_library: Path) -> None:
    """Cut short, overwritten, replaced by a link or writable by others: it is not loaded, and a whole one is there."""
    assert build.library() is not None
    (file,) = cached(fresh_library)
    whole = file.read_bytes()
    assert fresh_library.stat().st_mode & 0o777 == 0o700

    def cut() -> None:
        file.write_bytes(whole[: len(whole) // 2])

    def other() -> None:
        file.write_bytes(b"\x7fELF" + whole[4:-1] + b"x")

    def link() -> None:
        (fresh_library / "elsewhere").write_bytes(whole)
        file.unlink()
        file.symlink_to(fresh_library / "elsewhere")

    def writable() -> None:
        file.chmod(0o777)

    for damage in (cut, other, link, writable):
        damage()
        build.library.cache_clear()
        assert build.library() is not None, damage.__name__
        (file,) = cached(fresh_library)
        assert not file.is_symlink()
        assert file.stat().st_mode & 0o022 == 0
        assert file.read_bytes() == whole or build._is_whole(file)


def test_a_cache_of_others_is_not_used(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is a link, belongs to another user or cannot be made is no cache; one open to all is closed."""
    fresh_library.mkdir(parents=True, mode=0o755)
    assert cache_folder() == fresh_library
    assert fresh_library.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: USER)
    assert cache_folder() is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh_library.parent / "link"))
    (fresh_library.parent / "link").mkdir()
    (fresh_library.parent / "link" / fresh_library.name).symlink_to(fresh_library)
    assert cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() is None


@needs_compiler
def test_kernels_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be kept they are compiled for this run, and nothing is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    build.library.cache_clear()
    try:
        assert build.library() is not None
    finally:
        build.library.cache_clear()


def test_no_compiler(fresh_library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a compiler and a cached library the kernels are left out, in one true sentence."""
    monkeypatch.setenv("PATH", str(fresh_library))
    assert build.library() is None
    assert "there is no C compiler" in capsys.readouterr().err


NO_ENTRY = f"""
import pwd, runpy, sys
def unknown(*_): raise KeyError('uid not found')
pwd.getpwuid = pwd.getpwnam = unknown
sys.argv[0] = {str(ROOT / "merge.py")!r}
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path(sys.argv[0], run_name='__main__')
"""
"""Runs merge.py as a user without an entry in the password database."""


@pytest.mark.parametrize(
    "variables",
    [{}, {"HOME": "/proc/none"}, {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "HF_HOME": "/proc/none"}],
    ids=["no HOME", "no such HOME", "unwritable caches"],
)
def test_a_user_without_home(variables: dict[str, str], tmp_path: Path) -> None:
    """A user without an entry in the password database and without a home that can be written merges."""
    models = ",".join(str(make_llama(tmp_path / name, seed=seed, layers=1)) for seed, name in enumerate("ab"))
    out = tmp_path / "out"
    out.mkdir()
    flags = ["--method", "linear", "--models_to_merge", models, "--no-load_check", "--save_path", str(out / "merged")]
    done = subprocess.run(
        [sys.executable, "-c", NO_ENTRY, *flags],
        env={"PATH": os.environ["PATH"], **variables},
        cwd=out,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert (out / "merged" / "model.safetensors").is_file()
    assert sorted(path.name for path in out.iterdir()) == ["merged"]


def test_modules_in_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A json.py and a transformers.py lie in the current folder: the process that loads tokenizers ignores them."""
    make_tokenizer(tmp_path / "model")
    for name in ("json", "transformers", "tokenizers"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", "", os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "json.py"))
    found = load_in_subprocess([tmp_path / "model"])
    assert found[tmp_path / "model"] is not None
    assert not (tmp_path / "executed").exists()


def test_bounds_of_a_child() -> None:
    """A child has an empty standard input, ends at its time limit and cannot allocate beyond its memory."""
    assert run_python("print(sys.stdin.read() == '')", [], 60, 1 << 30).strip() == b"True"
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("import time; time.sleep(60)", [], 0.5, 1 << 30)
    with pytest.raises(subprocess.CalledProcessError):
        run_python("bytearray(1 << 31)", [], 60, 1 << 30)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "4"}, "RANK is not set"),
        ({"WORLD_SIZE": "many", "RANK": "0"}, "WORLD_SIZE is 'many'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is 0"),
    ],
)
def test_a_contradicting_launcher(
    variables: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 2; without WORLD_SIZE it is one process, whatever else is set."""
    from merge import main

    monkeypatch.setenv("RANK", "7")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launcher_ranks() == (0, 1, 0)
    monkeypatch.delenv("RANK")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=sentence):
        launcher_ranks()
    assert run(main, ["--method", "linear"]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown
    assert len(shown.splitlines()) == 1


def test_a_removed_current_folder_is_named(tmp_path: Path) -> None:
    """A run in a folder that was removed is refused by name: relative paths and child processes would fail in it."""
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); os.rmdir({str(gone)!r})\n"
    code += "from common.cli import run; sys.exit(run(lambda _: print('ran'), []))"
    done = subprocess.run([sys.executable, "-c", code], cwd=gone, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: The current folder was removed; change to a folder that exists and start again.\n"


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@needs_dev_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_a_sentence(unbuffered: str) -> None:
    """What was printed to a full disk is lost: the exit code and one sentence say so, whoever buffers it."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "from common.cli import run; sys.exit(run(lambda _: print('a table')))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(("error: Standard output cannot be written (No space", "error: No space left on"))
    assert done.stderr.count("\n") == 1


def test_the_full_disk_of_a_copy_is_that_of_the_copy() -> None:
    """The error of a copy names both of its files: a full disk is the target's, a broken one the source's."""
    for number, name in ((errno.ENOSPC, "copy"), (errno.EFBIG, "copy"), (errno.EROFS, "copy"), (errno.EIO, "source")):
        sentence, code = explain(OSError(number, os.strerror(number), "source", None, "copy"))
        assert code == 1
        assert sentence.endswith(f" {name}.")


@pytest.mark.parametrize("module", ["merge", "performAIM", "evaluate_model", "scripts.verify", "scripts.compare"])
@pytest.mark.parametrize(("platform", "code"), [("win32", 2), ("cygwin", 2), ("darwin", 0)])
def test_programs_start_or_are_refused_by_name(module: str, platform: str, code: int) -> None:
    """On Windows a program imports, and ends with one sentence; on macOS, where functions that only Linux has are
    missing, it prints its help."""
    missing = ["spwd", "ossaudiodev", *(["fcntl", "resource", "pwd", "grp", "termios"] if platform == "win32" else [])]
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import ctypes, importlib, os, select, signal
for name in {missing}: sys.modules[name] = None
for name in ("pidfd_open", "memfd_create", "sched_getaffinity", "posix_fallocate", "posix_fadvise", "pipe2",
             "listxattr", "setxattr", "getxattr", "sendfile", "unshare", "setns", "waitid"):
    if hasattr(os, name): delattr(os, name)
if {platform!r} == "win32":
    for name in ("geteuid", "register_at_fork", "fork", "getuid", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY"):
        if hasattr(os, name): delattr(os, name)
    for name in ("SIGHUP", "SIGALRM", "setitimer"):
        if hasattr(signal, name): delattr(signal, name)
sys.platform = {platform!r}
program = importlib.import_module({module!r})
sys.argv = ["program", "--help"]
from common.cli import run
sys.exit(run(program.main))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == code, done.stderr[-2000:]
    if code:
        assert done.stderr.startswith("error: Windows is not supported")
        assert done.stderr.count("\n") == 1
    else:
        assert done.stdout.startswith("usage: ")


def test_platforms() -> None:
    """Windows is refused by name; Linux and macOS are not."""
    assert "Windows is not supported" in str(unsupported_platform("win32"))
    assert unsupported_platform("linux") is unsupported_platform("darwin") is None


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% set k = j %}{% endfor %}{% endfor %}"
HUGE = "{{ 'x' * 10000000000 }}"


@pytest.mark.parametrize(("template", "reason"), [(ENDLESS, "more than 1 s"), (HUGE, "MemoryError")])
def test_chat_templates_without_end(
    template: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that does not end, or that fills the memory, is one sentence that names the row."""
    from transformers import AutoTokenizer

    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    tokenizer.chat_template = template
    monkeypatch.setattr("aim.calibration.packing.TEMPLATE_SECONDS", 1.0)

    class Texts:
        def where(self, row: int) -> str:
            return f"texts.jsonl, line {row}"

    with pytest.raises(CalibrationError, match=rf"texts.jsonl, line 3: .*{reason}"):
        _encoded([{"role": "user", "content": "w3"}], tokenizer, Texts(), 3)  # type: ignore[arg-type]
