"""Laws of publication: what was there stays, only what was checked appears, and a killed run is completed or undone."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.errors import FailureError, UsageError
from common.files import atomic, locks
from common.files.locks import HeldError, Lock
from common.files.work_folder import MARK, claim, claimed, is_work_folder
from merging.output.staging import publication_check, stage
from merging.output.staging.journal import Stage, read_lines
from merging.output.staging.stage import replacing, staged
from merging.pipeline import merge
from merging.plan import checks
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from tests.merging.output.test_output import files, stop_after


def recipe_of(family):  # type: ignore[no-untyped-def]
    """Task arithmetic of a and b, cut into three files."""
    models = f"{family['a']},{family['b']}"
    return make_recipe({"method": "task_arithmetic", "base_model": str(family["base"]), "models_to_merge": models}, {})


def output(folder: Path, **more: object) -> OutputConfig:
    """An output in several files, without the load check."""
    return OutputConfig(folder, max_shard_size="60KB", load_check=False, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    return files(merge(recipe_of(family), output(tmp_path_factory.mktemp("whole") / "out")))


def at_the_end(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something when all is written and nothing is published."""
    real = stage._publish

    def publish(*arguments: object) -> None:
        action()
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "_publish", publish)


def in_a_child(action: Callable[[], object]) -> int:
    """Run something in a forked process that ends without cleaning up; returns its exit code, or minus a signal."""
    child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# what was there


@pytest.mark.parametrize("kind", ["a file in the folder", "a file at the path", "a link", "a folder of its own"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_the_run_survives(
    family, tmp_path: Path, monkeypatch, whole: dict[str, bytes], kind: str, overwrite: bool
) -> None:
    """Whatever comes to --save_path during the run stays; the result stays staged, is named, and --resume publishes."""
    out = tmp_path / "out"

    def appear() -> None:
        if kind == "a file at the path":
            out.write_bytes(b"precious")
        elif kind == "a link":
            (tmp_path / "elsewhere").write_bytes(b"precious")
            out.symlink_to(tmp_path / "elsewhere")
        else:
            (out / "deep").mkdir(parents=True) if kind == "a folder of its own" else out.mkdir()
            (out / "notes.txt").write_bytes(b"precious")

    with monkeypatch.context() as patch:
        at_the_end(patch, appear)
        with pytest.raises(FailureError, match="the complete result is in") as stopped:
            merge(recipe_of(family), output(out, overwrite=overwrite))
    assert (out / "notes.txt" if out.is_dir() else out).read_bytes() == b"precious"
    staged_result = tmp_path / ".out.partial" / "result"
    assert str(staged_result) in str(stopped.value)
    assert files(staged_result) == whole
    out.rename(tmp_path / "moved")
    merge(recipe_of(family), output(out, resume=True))
    assert files(out) == whole
    assert not (tmp_path / ".out.partial").exists()


def test_overwrite_keeps_what_came_into_the_old_result(family, tmp_path: Path, monkeypatch, whole) -> None:
    """--overwrite replaces the result that was there when the run began: a file that came into it meanwhile stays."""
    out = merge(recipe_of(family), output(tmp_path / "out"))
    with monkeypatch.context() as patch:
        at_the_end(patch, lambda: (out / "evaluation.json").write_text("scores"))
        with pytest.raises(FailureError, match="was changed during the run"):
            merge(recipe_of(family), output(out, overwrite=True))
    assert (out / "evaluation.json").read_text() == "scores"
    merge(recipe_of(family), output(out, overwrite=True, resume=True))  # it is seen now, and may go
    assert files(out) == whole


def test_a_prepared_folder_keeps_mode_and_group(family, tmp_path: Path) -> None:
    """Mode, set-group-ID bit and group of a prepared folder stay, and of one that is replaced; its files take its
    group."""
    out = tmp_path / "out"
    out.mkdir()
    group = 12345 if os.geteuid() == 0 else os.getegid()
    os.chown(out, -1, group)
    os.chmod(out, 0o2750)
    for overwrite in (False, True):
        merge(recipe_of(family), output(out, overwrite=overwrite))
        info = out.stat()
        assert (stat.S_IMODE(info.st_mode), info.st_gid) == (0o2750, group)
        assert {file.stat().st_gid for file in out.iterdir()} == {group}


def test_files_follow_the_umask(family, tmp_path: Path) -> None:
    """Every file and folder of a result has the permissions of a new file under the user's umask."""
    before = os.umask(0o027)
    try:
        out = merge(recipe_of(family), output(tmp_path / "out"))
    finally:
        os.umask(before)
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in out.iterdir()} == {"0o640"}
    assert stat.S_IMODE(out.stat().st_mode) == 0o750


# killed while it publishes


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_killed_while_overwriting(family, tmp_path: Path, monkeypatch, whole, exchanges: bool, moment: str) -> None:
    """Killed at any step of --overwrite: the old or the new result is whole under its name after the next run has
    begun, nothing stays beside it, and the next run ends as ever."""
    out = merge(recipe_of(family), output(tmp_path / "out"))
    (out / "README.md").write_text("old")

    def kill_at(step: str, count: list[int]) -> Callable[..., object]:
        real = os.rename

        def rename(*paths: object) -> None:
            if step == "before" or (step == "between" and count):
                os.kill(os.getpid(), signal.SIGKILL)
            count.append(1)
            real(*paths)  # type: ignore[arg-type]

        return rename

    def run() -> None:
        if not exchanges:
            atomic.exchange = lambda *_: False
        real = stage._swap

        def swap(*arguments: object) -> None:
            os.rename = kill_at(moment, [])  # type: ignore[assignment]
            if exchanges and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGKILL)

        stage._swap = swap
        merge(recipe_of(family), output(out, overwrite=True))

    assert in_a_child(run) == -signal.SIGKILL
    assert (tmp_path / ".out.partial").exists()
    stage.recover(out)
    published = moment == "after" or (exchanges and moment == "between")
    assert ((out / "README.md").read_text() == "old") is not published
    if published:
        assert files(out) == whole
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    merge(recipe_of(family), output(out, overwrite=True, resume=True))
    assert files(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_recovery_never_guesses(tmp_path: Path) -> None:
    """Where something else came to the place of an old result that a killed run had moved, both stay and are named."""
    out, work = tmp_path / "out", tmp_path / ".out.partial"
    with claimed(work, "out"):
        (work / "replaced").mkdir()
        (work / "replaced" / "old").write_text("old")
        (work / "publishing.json").write_text("{}")
    out.mkdir()
    with pytest.raises(UsageError, match="move one of them elsewhere"):
        stage.recover(out)
    assert (work / "replaced" / "old").read_text() == "old"


# stages and locks


@pytest.mark.parametrize("kind", ["folder", "link", "file", "marked link"])
def test_a_foreign_stage_is_not_touched(family, tmp_path: Path, kind: str) -> None:
    """A folder of another's at the stage's name, a link or a file is refused by name and left as it is."""
    work, elsewhere = tmp_path / ".out.partial", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious.txt").write_text("precious")
    if kind == "folder":
        elsewhere.rename(work)
    elif kind == "file":
        work.write_text("precious")
    else:
        if kind == "marked link":
            with claimed(tmp_path / "real", "x"):
                (tmp_path / "real" / "precious.txt").write_text("precious")
        work.symlink_to(tmp_path / "real" if kind == "marked link" else elsewhere)
    with pytest.raises(UsageError, match=r"\.out\.partial is a"):
        merge(recipe_of(family), output(tmp_path / "out"))
    assert (work if kind == "file" else work / "precious.txt").read_text() == "precious"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to give a folder away")
@pytest.mark.parametrize(("mode", "is_refused"), [(0o1777, True), (0o755, False)])
def test_a_stage_of_another_user_in_a_shared_folder_is_refused(tmp_path: Path, mode: int, is_refused: bool) -> None:
    """In a place like /tmp somebody else's work folder is a trap, by root as well; elsewhere (a file system that maps
    all users to one) it counts as this program's."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with claimed(shared / ".out.partial", "x"):
        (shared / ".out.partial" / "precious").write_text("precious")
    os.chown(shared / ".out.partial", 12345, 12345)
    if is_refused:
        with pytest.raises(UsageError, match="is another user's in a place where anybody may write"):
            claim(shared / ".out.partial", "x")
    else:
        claim(shared / ".out.partial", "x").lock.release()
    assert (shared / ".out.partial" / "precious").read_text() == "precious"


@pytest.mark.parametrize("letter", ["n", "é"])
def test_a_name_without_room_for_the_stage_is_refused(tmp_path: Path, letter: str) -> None:
    """The longest name of a result is the one whose stage still has a name; a longer one is refused by its length."""
    longest = letter * (246 // len(letter.encode()))
    with claimed(stage.work_folder_of(tmp_path / longest), "x") as work:
        work.remove()
    with pytest.raises(UsageError, match="a name of at most 246 bytes is needed"):
        stage.work_folder_of(tmp_path / (longest + "n"))


def test_a_lock_counts_by_inode(tmp_path: Path) -> None:
    """A lock file that was removed and made again is another lock: who holds the old one holds nothing."""
    first = Lock.acquire(tmp_path / "lock")
    with pytest.raises(HeldError):
        Lock.acquire(tmp_path / "lock")
    (tmp_path / "lock").unlink()
    assert not first.is_valid()
    second = Lock.acquire(tmp_path / "lock")
    assert second.is_valid()
    first.release(remove=True)
    assert second.is_valid()
    second.release()


@pytest.mark.parametrize("number", [None, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_one_at_a_time(tmp_path: Path, monkeypatch, number: int | None) -> None:
    """Of many that claim and remove one folder, one is in it at a time, with and without flock."""
    if number is not None:

        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(locks.fcntl, "flock", flock)
    inside, most, served = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, served
        deadline = time.monotonic() + 20
        for _ in range(15):
            while time.monotonic() < deadline:
                try:
                    folder = claim(tmp_path / "work", "x")
                except FailureError:
                    time.sleep(0.0005)
                    continue
                with guard:
                    inside += 1
                    most = max(most, inside)
                (folder.path / "file").write_text("x")
                with guard:
                    inside -= 1
                    served += 1
                folder.remove()
                break

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, served) == (1, 60)
    assert list(tmp_path.iterdir()) == []


def test_without_flock_a_dead_holder_is_found(tmp_path: Path, monkeypatch) -> None:
    """Without flock the lock of a killed process is taken over, also where its number is in use again; that of a live
    one, or of another machine, is refused with a sentence that names the file."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no flock here")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    file = tmp_path / "lock"
    assert in_a_child(lambda: Lock.acquire(file)) == 0
    held = tmp_path / "lock.held"
    assert held.exists()
    lock = Lock.acquire(file)
    with pytest.raises(HeldError, match=f"number {os.getpid()} on .*remove {held}"):
        Lock.acquire(file)
    lock.release()
    data = locks._this_process()
    for change, taken in (({"started": "1"}, True), ({"machine": "another"}, False)):
        held.write_text(__import__("json").dumps(data | change))
        if taken:
            Lock.acquire(file).release()
        else:
            with pytest.raises(HeldError):
                Lock.acquire(file)


def test_the_system_says_why_a_lock_fails(tmp_path: Path, monkeypatch) -> None:
    """Another error of flock is that error, with the file, and not "another process"."""

    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"Input/output error: .*lock"):
        Lock.acquire(tmp_path / "lock")


# published only after a check


def damage_first(folder: Path, how: str) -> None:
    """Damage the first weight file of a folder."""
    file = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "longer":
        file.write_bytes(data + b"\0")
    elif how == "another one":
        (folder / "model-extra.safetensors").write_bytes(data)
    elif how == "config":
        (folder / "config.json").write_text("{}")
    else:
        data[9 if how == "header" else -1] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize("how", ["gone", "longer", "header", "tensor", "another one", "config"])
def test_a_damaged_stage_is_not_published(family, tmp_path: Path, monkeypatch, whole, how: str) -> None:
    """What is not on the disk as it was written is named and not published; --resume writes it again."""
    from merging import pipeline

    real = pipeline.finalize

    def finished(result, output, variant, place, *rest):  # type: ignore[no-untyped-def]
        sentences = real(result, output, variant, place, *rest)
        damage_first(place.folder, how)
        return sentences

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "finalize", finished)
        with pytest.raises(publication_check.DamagedError):
            merge(recipe_of(family), output(out))
    assert not out.exists()
    if how == "another one":
        (tmp_path / ".out.partial" / "result" / "model-extra.safetensors").unlink()
    merge(recipe_of(family), output(out, resume=True))
    assert files(out) == whole


@pytest.mark.parametrize("how", ["gone", "longer", "header", "tensor"])
def test_a_resumed_run_checks_what_it_found(family, tmp_path: Path, monkeypatch, whole, how: str) -> None:
    """Damage of the finished part between two runs is repaired, header and size too, which no digest covers."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 12, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(recipe_of(family), output(out))
    damage_first(tmp_path / ".out.partial" / "result", how)
    merge(recipe_of(family), output(out, resume=True))
    assert files(out) == whole


# journals


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n", b"[]\n", b"3\n", b'{"key": 5}\n', b"[" * 100_000 + b"\n"])
def test_an_unreadable_journal_stops_no_run(family, tmp_path: Path, monkeypatch, whole, content: bytes) -> None:
    """A journal of whatever bytes counts as none, with --resume and without."""
    for resume in (True, False):
        out = tmp_path / str(resume) / "out"
        with monkeypatch.context() as patch:
            stop_after(patch, 3, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                merge(recipe_of(family), output(out))
        (out.parent / ".out.partial" / "journal-0-0.jsonl").write_bytes(content)
        merge(recipe_of(family), output(out, resume=resume))
        assert files(out) == whole


@pytest.mark.parametrize("name", ["journal-0-0.jsonl", "publishing.json", "work_folder.json"])
def test_a_fifo_among_the_files_of_a_stage_stops_no_run(tmp_path: Path, name: str) -> None:
    """Files of a work folder are read as any foreign file: a FIFO in the place of one counts as an unreadable one."""
    work = tmp_path / ".out.partial"
    with claimed(work, "x"):
        (work / "result").mkdir()
    (work / name).unlink(missing_ok=True)
    os.mkfifo(work / name)

    def look() -> None:
        stage.finished(work)
        stage.recover(tmp_path / "out")

    assert in_a_child(look) == 0
    assert is_work_folder(work) == (name != "work_folder.json" and work.exists())


def test_the_holder_of_a_lock_is_not_waited_for(tmp_path: Path) -> None:
    """A FIFO or a device at a lock's name, held by another, is reported as held by another process."""
    os.mkfifo(tmp_path / "lock")
    lock = Lock.acquire(tmp_path / "lock")

    def acquire() -> None:
        with pytest.raises(HeldError, match="another process"):
            Lock.acquire(tmp_path / "lock")

    assert in_a_child(acquire) == 0
    lock.release()


def test_a_journal_ends_where_it_is_no_journal(tmp_path: Path) -> None:
    """Entries of odd types, and all after them, are not taken for finished tensors; the file is replaced, so that at no
    moment it lacks an entry that it had."""
    file = tmp_path / "journal"
    good = '{"key": "k"}\n{"name": "a", "digest": "1"}\n'
    for odd in (
        '{"name": 1, "digest": "2"}',
        '{"name": "b"}',
        "null",
        '{"name": "b", "digest": "2", "layer_statistics": 1}',
    ):
        file.write_text(f'{good}{odd}\n{{"name": "c", "digest": "3"}}\n')
        assert [line.get("name") for line in read_lines(file)] == [None, "a"]
    inode = file.stat().st_ino
    stage = Stage(tmp_path, file, "k")
    assert file.stat().st_ino != inode
    assert file.read_text() == good
    stage.add({"name": "b", "digest": "2"})
    stage.close()
    assert len(read_lines(file)) == 3


# space


def test_a_resumed_run_asks_for_what_is_missing(family, tmp_path: Path, monkeypatch) -> None:
    """With room for the rest alone a resumed run goes on; a new run of that size is refused before its first byte."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 15, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space") as stopped:
            merge(recipe_of(family), output(out))
    assert str(tmp_path / ".out.partial") in stopped.value.__notes__[0]
    written = stage.written_bytes(out)
    from merging.planning import plan_merge

    total = plan_merge(recipe_of(family), output(out)).bytes
    assert 0 < written < total
    monkeypatch.setattr(checks, "free_space", lambda _: total - written)
    with pytest.raises(FailureError, match="No space for the output"):
        merge(recipe_of(family), output(tmp_path / "other"))
    merge(recipe_of(family), output(out, resume=True))


def test_the_full_disk_is_named_by_its_file(family, tmp_path: Path, monkeypatch) -> None:
    """The error of sending to the disk, which comes from another thread, names the weight file."""
    from merging.output import writer

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*\.partial") as stopped:
        merge(recipe_of(family), output(tmp_path / "out"))
    assert stopped.value.filename.startswith(str(tmp_path))


# folders that scripts replace, and small files


def test_replacing_a_folder(tmp_path: Path) -> None:
    """A folder is replaced when the new one is whole; on an error the old one stays, and nothing else."""
    target = tmp_path / "folder"
    with replacing(target) as new:
        (new / "one").write_text("1")
    with pytest.raises(FileNotFoundError), replacing(target) as new:
        (new / "nowhere" / "two").write_text("2")
    assert [path.name for path in target.iterdir()] == ["one"]
    with replacing(target) as new:
        (new / "two").write_text("2")
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_killed_writing_leaves_nothing_for_long(tmp_path: Path) -> None:
    """What a killed process left of a file is removed by the next writing in that folder; one that is on stays."""

    def killed() -> None:
        with atomic.written(tmp_path / "first.json") as stream:
            stream.write(b"half")
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(killed) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with atomic.written(tmp_path / "long.json") as stream:
        stream.write(b"long")
        atomic.write_file(tmp_path / "second.json", b"2")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"long.json": b"long", "second.json": b"2"}


@pytest.fixture
def terminated() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a process that works in a stage until it gets a signal."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signals_clean_up_and_say_resume(tmp_path: Path, terminated, name: str) -> None:
    """SIGTERM and SIGHUP end a run as Ctrl-C does: exit code 128 + signal, temporary folders gone, the sentence on
    --resume."""
    code = f"""
import sys, time
from pathlib import Path
from common.files.temporary import new_folder
from common.cli import run
from merging.output.staging.stage import staged

def main(argv):
    print(new_folder("x"), flush=True)
    with staged(Path({str(tmp_path / "out")!r}), False, "key") as (stage,):
        stage.add({{"name": "a", "digest": "b"}})
        print("ready", flush=True)
        time.sleep(60)

sys.exit(run(main))
"""
    process = terminated(code)
    folder = Path(process.stdout.readline().strip())
    assert process.stdout.readline() == "ready\n"
    assert folder.is_dir()
    number = getattr(signal, name)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    sentence = process.stderr.read()
    assert sentence.count("\n") == 1, sentence
    assert f"kept in {tmp_path / '.out.partial'}: the same command with --resume" in sentence
    assert not folder.parent.exists()
    assert (tmp_path / ".out.partial" / MARK).is_file()


def test_the_cache_stays_small_and_is_never_needed(tmp_path: Path, monkeypatch) -> None:
    """Of what is remembered the newest stay, readable by their user alone; a cache that cannot be written is no
    error."""
    from common.files import cache_folder

    monkeypatch.setattr(cache_folder, "MOST_REMEMBERED", 3)
    (tmp_path / "kernels-x.so").write_text("another kind")
    for i in range(6):
        cache_folder.remember(tmp_path / f"auto-{i}", str(i))
        os.utime(tmp_path / f"auto-{i}", (i, i))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["auto-3", "auto-4", "auto-5", "kernels-x.so"]
    assert stat.S_IMODE((tmp_path / "auto-5").stat().st_mode) == 0o600
    cache_folder.remember(tmp_path / "auto-5" / "auto-6", "in a file")


def test_a_lock_is_given_back_once(tmp_path: Path) -> None:
    """A second release does not close a file that got the number meanwhile."""
    lock = Lock.acquire(tmp_path / "lock")
    lock.release()
    with (tmp_path / "other").open("w") as stream:
        lock.release()
        stream.write("x")
        stream.flush()
    assert not lock.is_valid()


def test_signals_wait_for_the_end_of_a_short_part() -> None:
    """A signal within `deferred` is handled at its end, by the handler that is there then."""
    from common.processes.interrupts import Terminated, deferred, handle_stop_signals

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    done = []

    def part() -> None:
        with deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            done.append(1)

    try:
        handle_stop_signals()
        with pytest.raises(Terminated):
            part()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert done


def test_an_unwritten_stage_is_discarded_by_a_failure(tmp_path: Path) -> None:
    """A run that fails before its first tensor leaves nothing."""
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "out", False, "key"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
