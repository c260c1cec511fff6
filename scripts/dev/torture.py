"""Interrupt runs at every file operation, and let file operations fail: nothing may be lost, broken or left behind.

    python scripts/dev/torture.py --results results/torture.json        every operation of every scenario: hours
    python scripts/dev/torture.py --sample 60                           that many of them
    python scripts/dev/torture.py --sample 500 --skip 60 --seconds 3600 --results FILE     the next ones, into one file

Each case is a run of a script in a process of its own, forked from one that has imported torch. A library that is
loaded before the C library's functions (LD_PRELOAD, scripts/dev/fault_shim.c, compiled by cc) counts the operations on
the files of the output and of the inputs; at the chosen one it kills the process, or returns an error. Other cases are
killed or terminated at random moments. Then the same command is given with --resume. A case is a problem where a file
that was there is lost, a result is incomplete or has other bytes than an undisturbed run's, an error is not one
sentence, a run hangs, or something is left behind.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.cli import Parser, add_output_flags, run
from common.errors import FailureError
from common.files.json_values import JsonObject
from common.files.paths import user_path, write_whole
from common.logging import logger
from scripts.dev.torture_scenarios import EARLIER, SCENARIOS, Scenario, content, make_inputs

WRITES, READS = 0, 1
FAULTS: dict[str, tuple[int, int]] = {
    "killed": (WRITES, 0),
    "ENOSPC": (WRITES, errno.ENOSPC),
    "EIO on writing": (WRITES, errno.EIO),
    "EIO on reading": (READS, errno.EIO),
    "ESTALE on reading": (READS, errno.ESTALE),
    "EMFILE on reading": (READS, errno.EMFILE),
    "ENOMEM on reading": (READS, errno.ENOMEM),
}
"""Name -> which operations are counted, and the error that one of them gets; 0 kills the process."""
SIGNALS = {"SIGKILL at a random moment": signal.SIGKILL, "SIGTERM at a random moment": signal.SIGTERM}
RANDOM_MOMENTS = 10
SECONDS = 120.0
"""Time after which a run counts as hung."""
PRECIOUS = b"a file of the user's\n"


@dataclass(frozen=True)
class Case:
    """One run to disturb: number of the operation, or of the random moment; rank: which of several processes."""

    scenario: Scenario
    fault: str
    number: int
    rank: int = 0


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: its files, its operations by kind, and its seconds."""

    files: dict[str, bytes]
    operations: tuple[int, int]
    seconds: float


class Torture:
    """The folders of all cases. earlier: files of the result that is replaced with --overwrite."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inputs, self.out, self.temporary = folder, folder / "in", folder / "out", folder / "tmp"
        self.inputs.mkdir()
        make_inputs(self.inputs)
        for name, flags in (("earlier", EARLIER), ("importance", SCENARIOS[4].flags)):
            self._clean()
            script = "merge" if name == "earlier" else "performAIM"
            code, error = self._run(Scenario(name, script, flags), [], None)
            if code:
                raise FailureError(f"The inputs cannot be made: {error}")
            (self.out / ("out" if name == "earlier" else name)).rename(self.inputs / name)
        self.earlier = content(self.inputs / "earlier")
        self.inputs_digest = digest(self.inputs)

    def reference(self, scenario: Scenario) -> Reference:
        """Run a scenario without a fault."""
        self._prepare(scenario)
        started = time.monotonic()
        counted = self.folder / "counted"
        code, error = self._run(scenario, [], Case(scenario, "killed", 0), counted)
        if code:
            raise FailureError(f"{scenario.name}: the undisturbed run fails: {error}")
        operations = json.loads(counted.read_text())
        return Reference(content(self.out), (operations[0], operations[1]), time.monotonic() - started)

    def problems(self, case: Case, reference: Reference) -> list[str]:
        """Run a case, then the same command with --resume; returns what is wrong."""
        scenario = case.scenario
        self._prepare(scenario)
        delay = reference.seconds * random.Random(f"{scenario.name}{case.number}").random()
        code, error = self._run(scenario, [], case, delay=delay)
        wrong = [*sentence_problems(code, error), *self._target_problems(scenario, reference)]
        if code == 0 and "cannot be removed" not in error:
            wrong += self._result_problems(reference)
            return wrong
        partial = self.out / ".out.partial"
        if code > 0 and "--resume" not in error and any(f.stat().st_size > 200 for f in partial.glob("journal-*")):
            wrong.append(f"finished work is not mentioned: {error.strip()[-200:]}")
        more = [] if scenario.name == "evaluation" else ["--resume"]
        code, error = self._run(scenario, more, None)
        if code == 2 and "is a finished result" in error:
            self._clear_temporary()  # that run refused before it looked for what a killed one left there
        elif code:
            wrong.append(f"the next run fails with {code}: {error.strip()[-300:]}")
        return wrong + self._result_problems(reference)

    def _clear_temporary(self) -> None:
        shutil.rmtree(self.temporary)
        self.temporary.mkdir()

    def _target_problems(self, scenario: Scenario, reference: Reference) -> list[str]:
        """Return what is wrong with the target of a disturbed run."""
        target = self.out / "out"
        if (self.out / "precious.txt").read_bytes() != PRECIOUS:
            return ["a file beside the output was changed"]
        before = self.earlier if scenario.name == "overwrite" else {}
        after = {name.removeprefix("out/"): data for name, data in reference.files.items() if name.startswith("out/")}
        contents = content(target) if target.exists() else {}
        return (
            []
            if contents in (before, after)
            else [f"--save_path holds neither the old nor the new: {sorted(contents)}"]
        )

    def _result_problems(self, reference: Reference) -> list[str]:
        """Return what is wrong once a run has ended well."""
        contents, wrong = content(self.out), []
        for name in {**contents, **reference.files}:
            if contents.get(name) != reference.files.get(name):
                wrong.append(f"{name} is {'missing' if name not in contents else 'not that of an undisturbed run'}")
        hidden = [str(path.relative_to(self.out)) for path in self.out.rglob(".*")]
        leftovers = [path.name for path in self.temporary.iterdir()]
        return wrong + [f"left behind: {', '.join(names)}" for names in (hidden, leftovers) if names]

    def _clean(self) -> None:
        for folder in (self.out, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def _prepare(self, scenario: Scenario) -> None:
        self._clean()
        (self.out / "precious.txt").write_bytes(PRECIOUS)
        scenario.prepare(self.inputs, self.out)

    def _run(
        self, scenario: Scenario, more: Sequence[str], case: Case | None, counted: Path | None = None, delay: float = 0
    ) -> tuple[int, str]:
        """Run a scenario's processes; returns the exit code of the first that failed, and all that they wrote."""
        port = free_port() if scenario.ranks > 1 else 0
        logs = [self.folder / f"stderr-{rank}" for rank in range(scenario.ranks)]
        arguments = [*scenario.arguments(self.inputs, self.out), *more]
        children = []
        for rank, log in enumerate(logs):
            armed = case if case is not None and case.rank == rank else None
            child = os.fork()
            if not child:
                self._be(scenario, arguments, armed, counted, log, rank, port)
            children.append(child)
        if case is not None and case.fault in SIGNALS:
            time.sleep(delay)
            os.kill(children[case.rank], SIGNALS[case.fault])
        codes = [wait_for(child) for child in children]
        text = "".join(log.read_text(errors="replace") for log in logs)
        return next((code for code in codes if code), 0), text

    def _be(
        self,
        scenario: Scenario,
        arguments: list[str],
        case: Case | None,
        counted: Path | None,
        log: Path,
        rank: int,
        port: int,
    ) -> None:
        """Be a process of a run, and end."""
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if scenario.ranks > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": scenario.ranks, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
        tempfile.tempdir = str(self.temporary)
        import torch

        import aim.capture.state

        torch.set_num_threads(1)  # replaces torch's pool, which a fork breaks, before there are threads that would race
        aim.capture.state.EVERY_SECONDS = 0.0
        sys.argv = [scenario.script, *arguments]
        shim = ctypes.CDLL(None)
        if case is not None and case.fault in FAULTS:
            which, error = FAULTS[case.fault]
            shim.fault_arm(os.fsencode(self.out) + b"/", os.fsencode(self.inputs) + b"/", which, case.number, error)
        code = run(importlib.import_module(scenario.script).main)
        atexit._run_exitfuncs()
        if counted is not None and case is not None:
            counts = [shim.fault_count(WRITES), shim.fault_count(READS)]
            shim.fault_arm(b"", b"", 0, -1, 0)
            counted.write_text(json.dumps(counts))
        os._exit(code)


def sentence_problems(code: int, error: str) -> list[str]:
    """Return what is wrong with how a run ended: a hang, a traceback, more or less than one sentence."""
    if code == -signal.SIGALRM:
        return [f"hung for {SECONDS:.0f} s"]
    if code < 0 and code != -signal.SIGKILL:
        return [f"ended by signal {-code}"]
    if "Traceback" in error or "Unexpected" in error:
        return [f"no sentence: {error.strip()[-300:]}"]
    sentences = sum(line.startswith("error: ") for line in error.splitlines())
    if code > 0 and sentences != 1:
        return [f"{sentences} sentences: {error.strip()[-300:]}"]
    return []


def wait_for(child: int) -> int:
    """Return a child's exit code, or minus the signal that ended it; one that hangs counts as ended by SIGALRM."""
    deadline = time.monotonic() + SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGALRM
        time.sleep(0.002)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def digest(folder: Path) -> str:
    """Return a digest of every file below a folder."""
    sha256 = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        sha256.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return sha256.hexdigest()


def cases_of(scenario: Scenario, reference: Reference) -> list[Case]:
    """Return every case of a scenario."""
    ranks = range(scenario.ranks)
    cases = [
        Case(scenario, fault, number, number % scenario.ranks)
        for fault, (which, _) in FAULTS.items()
        for number in range(1, reference.operations[which] + 1)
    ]
    return cases + [Case(scenario, name, i, ranks[i % len(ranks)]) for name in SIGNALS for i in range(RANDOM_MOMENTS)]


def main(argv: Sequence[str]) -> int:
    """Run the cases, print a table, write the results; 1 where there is a problem."""
    parser = Parser(prog="scripts/dev/torture.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, metavar="N", help="number of cases, chosen by --seed (default: all)")
    parser.add_argument(
        "--skip",
        type=int,
        default=0,
        metavar="N",
        help="leave out the first N of the sample, which an earlier run tried",
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="begin no case after S seconds (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of cases")
    parser.add_argument(
        "--scenario", action="append", metavar="NAME", help="run only this scenario; may be repeated (default: all)"
    )
    parser.add_argument(
        "--results",
        type=user_path,
        metavar="FILE",
        help="also write the figures to this JSON file, with --skip add them to those in it",
    )
    add_output_flags(parser)
    args = parser.parse_args(argv)
    if "fault_shim" not in os.environ.get("LD_PRELOAD", ""):
        return in_shim(argv)
    for name in (
        "merge",
        "performAIM",
        "aim.pipeline",
        "aim.capture.layerwise",
        "aim.capture.whole_model",
        "aim.capture.base_model",
        "merging.engine.loop",
        "transformers",
        "transformers.models.llama.modeling_llama",
        "merging.lora.tensors",
        "eval.results.store",
        "eval.harness.journal",
    ):
        importlib.import_module(name)
    folder = Path(tempfile.mkdtemp(prefix="torture-")).resolve()  # no context manager: children run its end
    try:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        torture = Torture(folder)
        chosen = [s for s in SCENARIOS if args.scenario is None or s.name in args.scenario]
        references = {scenario.name: torture.reference(scenario) for scenario in chosen}
        everything = [case for s in chosen for case in cases_of(s, references[s.name])]
        sampled = everything if args.sample is None else sample(everything, args.sample, random.Random(args.seed))
        cases: list[Case] = []
        failed_cases = {}
        started = time.monotonic()
        for i, case in enumerate(sampled[args.skip :]):
            if args.seconds is not None and time.monotonic() - started > args.seconds:
                break
            cases.append(case)
            if problems := torture.problems(case, references[case.scenario.name]):
                failed_cases[case] = problems
                logger.warning(f"{case.scenario.name}, {case.fault} {case.number}: {'; '.join(problems)}")
            if not args.quiet and i % 100 == 99:
                logger.warning(f"{i + 1} of {len(sampled) - args.skip} cases, {len(failed_cases)} with problems")
        if digest(torture.inputs) != torture.inputs_digest:
            raise FailureError("An input was changed.")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = summary(cases, everything, failed_cases)
    print(as_text(results))
    if args.results:
        if args.skip:
            results = added(json.loads(args.results.read_text(encoding="utf-8")), results)
        write_whole(args.results, (json.dumps(results, indent=1) + "\n").encode())
    return 1 if failed_cases else 0


def sample(cases: Sequence[Case], count: int, chance: random.Random) -> list[Case]:
    """Return cases of every run and fault in turn, chosen at random within each, until there are `count`."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in chance.sample(list(cases), len(cases)):
        groups.setdefault((case.scenario.name, case.fault), []).append(case)
    rounds = itertools.zip_longest(*groups.values())
    return [case for cases in rounds for case in cases if case is not None][:count]


def in_shim(argv: Sequence[str]) -> int:
    """Compile the library of faults and start this script with it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        raise FailureError("Faults are injected by a library that needs Linux and a C compiler (cc).")
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        shim = f"{folder}/fault_shim.so"
        source = str(Path(__file__).with_name("fault_shim.c"))
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", shim, "-ldl"], check=True)
        environment = {
            **os.environ,
            "LD_PRELOAD": shim,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        return subprocess.run([sys.executable, __file__, *argv], env=environment, check=False).returncode


def summary(cases: Sequence[Case], everything: Sequence[Case], problems: dict[Case, list[str]]) -> JsonObject:
    """Return the figures as JSON's types."""
    tried = Counter((case.scenario.name, case.fault) for case in cases)
    possible = Counter((case.scenario.name, case.fault) for case in everything)
    wrong = Counter((case.scenario.name, case.fault) for case in problems)
    rows = [
        {"scenario": name, "fault": fault, "cases": tried[name, fault], "of": count, "problems": wrong[name, fault]}
        for (name, fault), count in possible.items()
    ]
    texts = [
        f"{c.scenario.name}, {c.fault} {c.number}: {'; '.join(texts_of_case)}" for c, texts_of_case in problems.items()
    ]
    return {"cases": len(cases), "of": len(everything), "problems": texts, "rows": rows}


def added(earlier: JsonObject, later: JsonObject) -> JsonObject:
    """Return the figures of two runs that tried different cases of the same ones.

    Raises FailureError where the runs have other numbers of operations now.
    """
    rows = []
    before = {(row["scenario"], row["fault"]): row for row in earlier["rows"]}
    for row in later["rows"]:
        other = before.get((row["scenario"], row["fault"]), {"of": None})
        if other["of"] != row["of"]:
            raise FailureError(
                f"{row['scenario']}, {row['fault']}: {row['of']} cases now, {other['of']} in the file; leave out "
                "--skip."
            )
        rows.append(row | {key: row[key] + other[key] for key in ("cases", "problems")})
    problems = [*earlier["problems"], *later["problems"]]
    return {"cases": sum(row["cases"] for row in rows), "of": later["of"], "problems": problems, "rows": rows}


def as_text(results: JsonObject) -> str:
    """Return the figures as a table: a row per scenario, cases of all that there are, and problems."""
    names = list(dict.fromkeys(row["scenario"] for row in results["rows"]))
    faults = list(dict.fromkeys(row["fault"] for row in results["rows"]))
    by_place = {(row["scenario"], row["fault"]): row for row in results["rows"]}
    lines = [["run", *faults, "problems"], ["---", *["---:"] * (len(faults) + 1)]]
    for name in names:
        rows = [by_place.get((name, fault)) for fault in faults]
        cells = [f"{row['cases']} of {row['of']}" if row else "-" for row in rows]
        lines.append([name, *cells, str(sum(row["problems"] for row in rows if row))])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{results['cases']} cases of {results['of']}, {len(results['problems'])} with problems."


if __name__ == "__main__":
    sys.exit(run(main))
