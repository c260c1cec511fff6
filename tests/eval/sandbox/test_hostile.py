"""Hostile programs: none gets what the sandbox withholds, none holds the grading up, whoever runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eval.sandbox.arena import STALL_SECONDS, canaries
from tests.eval.sandbox.combinations import COMBINATIONS, Combination, run_arena
from tests.eval.sandbox.hostile import GOOD, HOSTILE

QUICK = [c for c in COMBINATIONS if str(c) in ("root, bubblewrap", "uid 65534, namespaces refused")]
"""Two combinations for every run: the strongest layers and the weakest."""

WORKING = {
    "reading": ("a file", "a file by os", "a folder", "a file's size", "its environment", "io.open_code", "linecache"),
    "writing": ("a file", "append", "truncate", "permissions", "times", "a new file", "a new folder", "sqlite"),
    "network": ("tcp", "udp", "unix socket", "abstract socket", "abstract socket by pair", "reconnected pair"),
    "processes": ("fork", "subprocess", "system", "session"),
    "killing": ("owner of a descriptor", "prlimit", "affinity"),
}
"""Attacks that succeed without a sandbox, on canaries alone."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that every user can reach; pytest's own are closed to others whenever a session starts."""
    with tempfile.TemporaryDirectory(prefix="sandbox-canaries-") as outer:
        os.chmod(outer, 0o711)
        path = Path(outer, "canaries")
        path.mkdir()
        path.chmod(0o777)
        yield path


def check(combination: Combination, folder: Path) -> None:
    """Run the arena and fail where a program escapes, holds the grading up, or leaves anything behind."""
    obstacle = combination.obstacle()
    if obstacle:
        pytest.skip(f"{combination}: {obstacle}")
    first, *results, last = run_arena(combination, folder)
    assert first["mode"] == (combination.mode if combination.mode != "best" else "landlock")
    assert {"no_new_privs", "no capabilities", "seccomp", "resource limits"} <= set(first["layers"])
    good, results = results[: len(GOOD)], results[len(GOOD) :]
    assert [(r["name"], r["detail"]) for r in good if r["status"] != "passed"] == []
    assert len(results) == len(HOSTILE)
    assert [(r["family"], r["name"]) for r in results if r["status"] == "passed"] == []
    assert [(r["family"], r["name"], r["seconds"]) for r in results if r["seconds"] > STALL_SECONDS] == []
    assert last == {"damage": []}


@pytest.mark.parametrize("combination", QUICK, ids=str)
def test_no_program_escapes(combination: Combination, folder: Path) -> None:
    """All hostile programs, under the strongest layers as root and the weakest as an ordinary user."""
    check(combination, folder)


@pytest.mark.slow
@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if c not in QUICK], ids=str)
def test_no_program_escapes_under_any_combination(combination: Combination, folder: Path) -> None:
    """All hostile programs, as root, as root without CAP_SYS_ADMIN and as uid 65534, under each mode."""
    check(combination, folder)


def test_programs_are_many_and_distinct() -> None:
    """At least 90 programs in every family that the sandbox is meant to hold."""
    assert len({(h.family, h.name) for h in HOSTILE}) == len(HOSTILE) >= 90
    families = "reading writing network processes killing kernel memory disk stalling forging parser clean-up"
    assert set(Counter(h.family for h in HOSTILE)) == set(families.split())


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_the_attacks_work_without_a_sandbox(folder: Path) -> None:
    """The attacks on canaries succeed in a plain interpreter, so that their failure in the sandbox means something."""
    failed = []
    with canaries(folder) as made:
        names, environment = made.names(), {**os.environ, "SANDBOX_SECRET": "secret"}
        for hostile in (h for h in HOSTILE if h.name in WORKING.get(h.family, ())):
            made.restart_bystander()
            code = hostile.code.format(**{**names, "bystander": made.bystander.pid})
            done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            if done.returncode:
                failed.append((hostile.family, hostile.name, done.stderr[-200:]))
        assert made.damage()
    assert failed == []


def test_without_layers_the_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any mode gets one sentence, and `--sandbox weak` still runs programs with resource limits."""
    from common.errors import EvaluationError
    from eval.sandbox import supervisor

    monkeypatch.setattr(supervisor, "MODES", ())
    monkeypatch.setattr(supervisor, "_containments", {})
    with pytest.raises(EvaluationError, match="--sandbox weak"):
        supervisor.containment()
    assert supervisor.containment(weak=True).mode == "weak"
    assert supervisor.run_program("assert 1", weak=True).passed


def test_a_missing_layer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose layers are not those of the start is no verdict but an error."""
    from common.errors import EvaluationError
    from eval.sandbox import supervisor

    chosen = supervisor.Containment("landlock", ("something else",))
    monkeypatch.setattr(supervisor, "_containments", {False: chosen})
    with pytest.raises(EvaluationError, match="could not be set up as before"):
        supervisor.run_program("x = 1")


def test_a_sandbox_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process tree that ends before the program starts ends the run, and is not counted as a wrong answer."""
    from common.errors import EvaluationError
    from eval.sandbox import supervisor

    supervisor.containment()
    monkeypatch.setattr(supervisor, "_interpreter", lambda: "/bin/false")
    with pytest.raises(EvaluationError, match="before the program started"):
        supervisor.run_program("x = 1")


def test_a_killed_run_leaves_no_process(tmp_path: Path) -> None:
    """When the grading process is killed, the programs it runs end with it."""
    root = Path(__file__).resolve().parents[3]
    code = (
        f"import sys\nsys.path.insert(0, {str(root)!r})\n"
        "from eval.sandbox import supervisor\nfrom eval.sandbox.isolation.limits import Limits\n"
        "supervisor.containment()\nprint('ready', flush=True)\n"
        "supervisor.run_program('import time\\ntime.sleep(60)', Limits(wall_seconds=60))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    import time

    tree: set[int] = set()
    deadline = time.monotonic() + 20
    while len(tree) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        tree = _tree(process.pid)
    assert len(tree) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    while tree and time.monotonic() < deadline + 20:
        time.sleep(0.1)
        tree = {pid for pid in tree if _is_running(pid)}
    assert tree == set()


def _tree(root: int) -> set[int]:
    children = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal() and _parent(int(p.name)) == root]
    return set(children).union(*(_tree(child) for child in children))


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_filters_are_the_same_deny_list_on_both_machines() -> None:
    """The filters of x86_64 and aarch64 refuse every call that exists there, and kill other architectures."""
    from eval.sandbox.isolation import seccomp

    for machine, (architecture, column) in seccomp.ARCHITECTURES.items():
        code = seccomp.deny_list(machine, 1, has_own_root=False)
        assert len(code) < 4096
        for name, numbers in {**seccomp.DENIED, **seccomp.ON_THE_MACHINES_FILES}.items():
            if numbers[column] is not None:
                assert _evaluate(code, architecture, numbers[column], [0] * 6) & 0xFFFF0000 == 0x50000, name
        for number in (0, 1, 3, 60, 63, 93):  # read, write and exit are among them on either
            if number not in {n[column] for n in {**seccomp.DENIED, **seccomp.ON_THE_MACHINES_FILES}.values()}:
                assert _evaluate(code, architecture, number, [0] * 6) == 0x7FFF0000
        assert _evaluate(code, 0x40000003, 1, [0] * 6) == 0x80000000
        kill, clone, sendto = (
            seccomp.CONDITIONAL[name][column] if name != "kill" else seccomp.CONDITIONAL["kill"][column]
            for name in ("kill", "clone", "sendto")
        )
        assert _evaluate(code, architecture, kill, [1, 9, 0, 0, 0, 0]) == 0x7FFF0000
        assert _evaluate(code, architecture, kill, [2, 9, 0, 0, 0, 0]) == 0x50001
        assert _evaluate(code, architecture, clone, [0x3D0F00, 0, 0, 0, 0, 0]) == 0x7FFF0000
        assert _evaluate(code, architecture, clone, [17, 0, 0, 0, 0, 0]) == 0x50001
        assert _evaluate(code, architecture, sendto, [3, 0, 0, 0, 1 << 32, 0]) == 0x50001
        assert _evaluate(code, architecture, sendto, [3, 0, 0, 0, 0, 0]) == 0x7FFF0000


def _evaluate(code: list[tuple[int, int, int, int]], architecture: int, number: int, arguments: list[int]) -> int:
    """Interpret a BPF filter on one system call, independently of the kernel."""
    words = {0: number, 4: architecture}
    for i, value in enumerate(arguments):
        words[16 + 8 * i], words[20 + 8 * i] = value & 0xFFFFFFFF, value >> 32
    place = accumulator = 0
    while True:
        operation, if_true, if_false, constant = code[place]
        if operation == 0x20:
            accumulator = words[constant]
        elif operation == 0x06:
            return constant
        else:
            tests = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: bool(accumulator & constant)}
            place += if_true if tests[operation] else if_false
        place += 1


def test_results_record_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    """The record in a results file names mode and layers, as JSON."""
    from eval.sandbox.supervisor import SandboxSettings, containment
    from eval.tasks.code import SandboxedCodeEval

    record = json.loads(json.dumps(SandboxedCodeEval(SandboxSettings()).record()))
    assert record["mode"] == containment().mode
    assert record["layers"] == list(containment().layers)
    assert SandboxedCodeEval().record() == {}
