"""Merge mutated inputs: each is refused in one sentence, or gives the result that its content says.

    python scripts/dev/fuzz.py --cases 20000 --results results/fuzz.json      the long run: an hour
    python scripts/dev/fuzz.py --cases 500                                    what the tests run

Kinds: safetensors headers, indexes, configs, tokenizers, adapters, importance files, locks and recipes. A case changes
one file of a small real input in one to three places (odd types, duplicate and renamed keys, deep nesting, long and
hostile text, flipped and missing bytes), or puts a FIFO, a device, a folder, a link out of the model or an endless file
in its place, and merges. A case is a problem where it hangs, ends in "Unexpected ...", takes more than 1 GiB, prints
more than one line or control characters or more than 300 characters of the input, or gives other tensors than an
independent computation. Case i of a kind is the same for the same --seed. The cases run one after another in a process
of their own, which is started again after a case that hangs in it or ends it.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.cli import Parser, add_output_flags, run
from common.files.json_values import JsonObject, JsonValue
from common.files.paths import user_path, write_whole
from common.logging import logger
from common.terminal_text import escape_controls

if TYPE_CHECKING:
    from torch import Tensor

Check = Callable[[Path], None]
"""Raises AssertionError where the result in a folder is not the expected one."""
StoredTensor = tuple[tuple[int, ...], str, bytes | float]
"""Shape, dtype and bytes of a tensor; the number itself where it has no dimension."""

KINDS = ("header", "index", "config", "tokenizer", "adapter", "importance", "lock", "recipe")
SECONDS = 30.0
"""Time after which a case counts as hung and its process is ended; on an idle machine the slowest take three."""
MAX_MIB = 1024
"""Memory of the process that runs a case; torch and transformers alone take about 400 MiB."""
STARTING = 300.0
"""Seconds that a process has to import the libraries and make the inputs of a kind."""
MARK = "\u0436"
HOSTILE = "\x1b[31m\u202e\x9b" + (MARK * 40 + " ") * 125
"""Text of an input that must not reach the terminal as it is: ANSI, a bidirectional override, 5000 characters."""
POOL: tuple[JsonValue, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 64, 1.5, -0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**30,
    "", "a", "x" * 300, HOSTILE, "..", "/etc/passwd", "../../x", "(a+)+$", "((((a{99}){99}){99}){99})", "F32", "I64",
    "llama", "gpt2", "LlamaForCausalLM", [], {}, [[]], [{}], {"a": {}}, [0], [-1], [1, 2], ["a", "b"], [None],
    {"": 0}, {HOSTILE: 1}, [HOSTILE], [1] * 5000, {"a": [1, {"b": [2]}]},
)  # fmt: skip


INSERTED = (b"\x00", b'"', b"{", b"}", b"[", b",", b":", b"\xff", b"1", b"-", b"&a *a")


@dataclass(frozen=True)
class Outcome:
    """The end of one case: its counter in Tally, the problem if it is one, seconds, and peak memory in MiB."""

    counter: str
    problem: str | None = None
    seconds: float = 0.0
    peak_mib: int = 0


@dataclass
class Tally:
    """Outcomes of the cases of one kind. peak_mib: of the case that took most; memory: cases over MAX_MIB."""

    cases: int = 0
    refused: int = 0
    identical: int = 0
    verified: int = 0
    hangs: int = 0
    unexpected: int = 0
    wrong: int = 0
    memory: int = 0
    slowest: float = 0.0
    peak_mib: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count a case."""
        self.cases += 1
        setattr(self, outcome.counter, getattr(self, outcome.counter) + 1)
        self.slowest, self.peak_mib = max(self.slowest, outcome.seconds), max(self.peak_mib, outcome.peak_mib)
        if outcome.problem:
            self.problems.append(outcome.problem)

    def as_dict(self) -> JsonObject:
        """Return the counts for JSON."""
        return {**vars(self), "slowest": round(self.slowest, 2), "problems": self.problems[:20]}


@dataclass(frozen=True)
class Target:
    """Input that a kind of case mutates, and the merge that reads it.

    files: of which one is mutated in each case; command: flags of merge.py; expected(out) raises AssertionError where
    an accepted mutant gave a result that its content does not say; reference: the tensors without a mutation;
    run(command) returns the exit code, standard output and standard error.
    """

    files: Sequence[Path]
    command: Sequence[str]
    expected: Check
    reference: Mapping[str, StoredTensor]
    run: Callable[[Sequence[str]], tuple[int, str, str]]


def main(argv: Sequence[str]) -> int:
    """Run the cases, print the table; exit code 1 where there is a problem."""
    parser = Parser(prog="scripts/dev/fuzz.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=500, help="number of cases, shared by the kinds")
    parser.add_argument("--seed", type=int, default=15, help="seed of the mutations")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of inputs to mutate, separated by commas")
    parser.add_argument(
        "--only", type=int, metavar="N", help="run only case N of each kind, and print its output (default: all)"
    )
    parser.add_argument("--results", type=user_path, metavar="FILE", help="also write the counts to this JSON file")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    kinds = args.kinds.split(",")
    tallies = fuzz(kinds, args.cases // len(kinds), args.seed, args.only)
    print(table({kind: tally.as_dict() for kind, tally in tallies.items()}))
    for kind, tally in tallies.items():
        for problem in tally.problems[:20]:
            print(f"{kind} {problem}")
    if args.results:
        report = {"seed": args.seed, "kinds": {kind: tally.as_dict() for kind, tally in tallies.items()}}
        write_whole(args.results, (json.dumps(report, indent=2) + "\n").encode())
    return int(any(tally.problems for tally in tallies.values()))


def table(kinds: Mapping[str, JsonObject]) -> str:
    """Return the counts as Markdown."""
    lines = [
        "| kind | cases | refused in one sentence | accepted, same result | accepted, result as the mutant says "
        '| hang | "Unexpected" | wrong | over 1 GiB | peak memory |',
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = ("cases", "refused", "identical", "verified", "hangs", "unexpected", "wrong", "memory")
    rows = {**kinds, "all": {key: sum(tally.get(key, 0) for tally in kinds.values()) for key in keys}}
    rows["all"] = {**rows["all"], "peak_mib": max(tally["peak_mib"] for tally in kinds.values())}
    for kind, tally in rows.items():
        counts = " | ".join(str(tally.get(key, 0)) for key in keys)
        lines.append(f"| {kind} | {counts} | {tally['peak_mib']} MiB |")
    return "\n".join(lines)


def fuzz(
    kinds: Sequence[str],
    cases: int,
    seed: int,
    only: int | None = None,
    inputs: Callable[[Path], Inputs] | None = None,
    seconds: float = SECONDS,
) -> dict[str, Tally]:
    """Run `cases` cases of each kind and return what became of them.

    Args:
        kinds: names of KINDS.
        cases: number of cases of each kind.
        seed: of the mutations.
        only: number of the one case of each kind to run, with what it prints.
        inputs: maker of the inputs in a folder, importable by name; Inputs by default.
        seconds: time after which a case counts as hung.
    """
    tallies = {}
    runner = Runner(inputs or Inputs, seed, seconds, only is not None)
    try:
        for kind in kinds:
            tallies[kind] = tally = Tally()
            for number in [only] if only is not None else range(cases):
                tally.add(runner.run(kind, number))
            logger.info(f"{kind}: {tally.cases} cases, {len(tally.problems)} problems, slowest {tally.slowest:.1f} s")
    finally:
        runner.close()
    return tallies


class Runner:
    """A process that runs cases, started again after one that hangs in it or ends it."""

    def __init__(self, inputs: Callable[[Path], Inputs], seed: int, seconds: float, is_shown: bool) -> None:
        self._inputs, self._seed, self._seconds, self._is_shown = inputs, seed, seconds, is_shown
        self._process: BaseProcess | None = None
        self._ready: set[str] = set()

    def run(self, kind: str, number: int) -> Outcome:
        """Run a case. Raises RuntimeError where the inputs of its kind cannot be made."""
        process = self._process or self._start()
        if kind not in self._ready:
            self._connection.send((kind, None))
            if not self._connection.poll(STARTING) or self._connection.recv() != kind:
                raise RuntimeError(f"The inputs of the kind {kind} cannot be made.")
            self._ready.add(kind)
        self._connection.send((kind, number))
        try:
            if self._connection.poll(2 * self._seconds):  # the process ends itself after half of that, with a traceback
                outcome: Outcome = self._connection.recv()
                return outcome
        except (EOFError, ConnectionResetError):
            process.join(self._seconds)
        main_thread = self._log.read_text(errors="replace").rpartition("(most recent call first):")[2]  # it is the last
        where, code = " ".join(main_thread.split())[:300], process.exitcode
        self.close()
        if where or code is None:
            return Outcome("hangs", f"case {number} hung for {self._seconds:.0f} s: {where}", self._seconds)
        return Outcome("unexpected", f"case {number} ended the process with exit code {code}")

    def _start(self) -> BaseProcess:
        context = multiprocessing.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self._log = self._folder / "hung"
        self._connection, child_end = context.Pipe()
        arguments = (child_end, self._folder, self._inputs, self._seed, self._seconds, self._is_shown)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        child_end.close()
        self._process = process
        return process

    def close(self) -> None:
        """End the process and remove its folder."""
        if self._process is None:
            return
        self._connection.close()
        self._process.kill()
        self._process.join()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._process, self._ready = None, set()


def _serve(
    connection: Connection, folder: Path, make: Callable[[Path], Inputs], seed: int, seconds: float, is_shown: bool
) -> None:
    """Run the cases that the connection names, until it is closed."""
    (scratch := folder / "scratch").mkdir()
    with (folder / "hung").open("w") as log, _at(scratch), contextlib.suppress(EOFError):
        inputs, targets = make(scratch), dict[str, Target]()
        while True:
            kind, number = connection.recv()
            if number is None:
                targets[kind] = getattr(inputs, kind)()
                connection.send(kind)
                continue
            faulthandler.dump_traceback_later(seconds, exit=True, file=log)
            outcome = _case(scratch, targets[kind], number, random.Random(f"{seed}-{kind}-{number}"), is_shown)
            faulthandler.cancel_dump_traceback_later()
            connection.send(outcome)


@contextlib.contextmanager
def _at(folder: Path) -> Iterator[None]:
    """Work in a folder, without the hub, and with its own cache."""
    before, variables = Path.cwd(), dict(os.environ)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)


def _case(scratch: Path, target: Target, number: int, chance: random.Random, is_shown: bool) -> Outcome:
    """Mutate a file, run the target, judge how it ended, and put the file back."""
    file = chance.choice(target.files)
    before = file.read_bytes()
    what = mutate(file, chance, scratch)
    out = scratch / "out"
    began = time.monotonic()
    _forget_peak()
    code, printed, errors = target.run([*target.command, "--save_path", str(out)])
    seconds, peak = time.monotonic() - began, _peak_mib()
    try:
        counter, problem = _judge(code, printed, errors, target, out)
    finally:
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        file.write_bytes(before)
        for leftover in (*scratch.glob("out*"), *scratch.glob(".out*")):
            shutil.rmtree(leftover, ignore_errors=True)
    if is_shown:
        print(what, code, printed, errors, f"{seconds:.2f} s, {peak} MiB", sep="\n", flush=True)
    if not problem and peak > MAX_MIB:
        counter, problem = "memory", f"took {peak} MiB"
    if problem:
        problem = f"case {number} ({file.name}: {what}): {escape_controls(problem)[:400]}"
    return Outcome(counter, problem, seconds, peak)


def _forget_peak() -> None:
    """Let the system count this process's peak memory from now on, where it can (Linux)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_mib() -> int:
    """Return the peak resident memory of this process in MiB since _forget_peak, 0 where it is unknown."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        match = None
    return int(match[1]) // 1024 if match else 0


def _judge(code: int, printed: str, errors: str, target: Target, out: Path) -> tuple[str, str | None]:
    """Return the counter of a case, and what is wrong with it, if anything is."""
    if "Unexpected " in errors:
        return "unexpected", errors
    output = printed + errors
    if output.count(MARK) > 300 or escape_controls(output) != output:
        return "wrong", f"prints text of the input as it is: {output[:300]!r}"
    if code == 0:
        try:
            target.expected(out)
        except Exception as error:  # also of the libraries that read the result
            return "wrong", f"accepted with a wrong result: {type(error).__name__} {error}; {errors[:200]}"
        return "identical" if _tensors(out) == target.reference else "verified", None
    complaint = [line for line in errors.splitlines() if line.startswith("error: ")]
    if len(complaint) != 1 or errors.splitlines()[-1:] != complaint or code not in (1, 2) or len(complaint[0]) > 1300:
        return "wrong", f"refused with code {code} in other than one sentence: {errors[:300]}"
    if out.exists():
        return "wrong", f"refused, and left {out.name}"
    return "refused", None


def run_merge(command: Sequence[str]) -> tuple[int, str, str]:
    """Run merge.py in this process; returns exit code, standard output and standard error."""
    import merge

    printed, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            return run(merge.main, list(command)), printed.getvalue(), errors.getvalue()
    except SystemExit as leaving:
        return int(leaving.code or 0), printed.getvalue(), errors.getvalue()


# mutations


def mutate(file: Path, chance: random.Random, scratch: Path) -> str:
    """Change a file in place; returns what was done."""
    if chance.random() < 0.04:
        return _replace(file, chance, scratch)
    data = file.read_bytes()
    if file.suffix == ".safetensors" or data[8:9] == b"{":
        (length,) = struct.unpack("<Q", data[:8])
        head, what = _mutated(data[8 : 8 + length], chance)
        claimed = chance.choice(POOL[9:20]) if chance.random() < 0.05 else len(head)
        claimed = claimed if isinstance(claimed, int) and 0 <= claimed < 2**64 else len(head)
        tail = data[8 + length :]
        if chance.random() < 0.05:
            tail = tail[: chance.randrange(len(tail) + 1)]
        file.write_bytes(struct.pack("<Q", claimed) + head + tail)
        return what
    changed, what = _mutated(data, chance, is_yaml=file.suffix == ".yaml")
    file.write_bytes(changed)
    return what


def _replace(file: Path, chance: random.Random, scratch: Path) -> str:
    """Put something that is no regular file of the model in its place."""
    way = chance.choice(["FIFO", "folder", "device", "link out", "empty", "endless", "deep", "bomb"])
    file.unlink()
    if way == "FIFO":
        os.mkfifo(file)
    elif way == "folder":
        file.mkdir()
    elif way == "device":
        file.symlink_to("/dev/zero")
    elif way == "link out":
        (scratch / "secret").write_text("{}")
        file.symlink_to(scratch / "secret")
    elif way == "endless":
        with file.open("wb") as stream:
            stream.truncate(1 << 40)
    elif way == "deep":
        file.write_text('{"a":' * 50_000)
    else:
        names = ["a: &a0 [x]"] + [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
        file.write_text("\n".join(names) if way == "bomb" else "")
    return way


def _mutated(data: bytes, chance: random.Random, is_yaml: bool = False) -> tuple[bytes, str]:
    """Return text changed as bytes or by its structure, and what was done."""
    if chance.random() < 0.25:
        return _flipped(data, chance)
    import yaml

    value = yaml.safe_load(data) if is_yaml else json.loads(data)
    done = [_edit(value, chance) for _ in range(chance.choice([1, 1, 1, 2, 3]))]
    if is_yaml:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=False).encode(), "; ".join(done)
    text = json.dumps(value)
    if chance.random() < 0.05 and isinstance(value, dict) and value:
        key = chance.choice(list(value))
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(chance.choice(POOL))}}}"
        done.append(f"{key[:40]} twice")
    return text.encode(), "; ".join(done)


def _flipped(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    changed, place = bytearray(data), chance.randrange(len(data) + 1)
    way = chance.choice(["flip", "cut", "insert", "repeat", "remove"])
    if way == "flip" and place < len(data):
        changed[place] ^= 1 << chance.randrange(8)
    elif way == "cut":
        del changed[place:]
    elif way == "insert":
        changed[place:place] = chance.choice(
            [b"\x00", b'"', b"{", b"}", b"[", b",", b":", b"\xff", b"1", b"-", b"&a *a"]
        )
    elif way == "repeat":
        changed[place:place] = changed[max(0, place - 50) : place]
    else:
        del changed[place : place + chance.randrange(1, 40)]
    return bytes(changed), f"{way} at byte {place}"


def _edit(value: JsonValue, chance: random.Random) -> str:
    """Change one place of a JSON value; returns what was done."""
    places = list(_places(value))
    if not places:
        return "nothing"
    holder, key = chance.choice(places)
    way = chance.choice(["replace", "replace", "replace", "remove", "rename", "number", "copy"])
    name = str(key)[:40]
    if way == "remove":
        del holder[key]
    elif way == "rename" and isinstance(holder, dict):
        holder[chance.choice([f"{key}x", "", HOSTILE, "0", str(key).upper()])] = holder.pop(key)
    elif way == "number" and isinstance(holder[key], int | float):
        holder[key] = chance.choice(
            [holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 1000, float(holder[key])]
        )
    elif way == "copy":
        other, other_key = chance.choice(places)
        holder[key] = json.loads(json.dumps(other.get(other_key) if isinstance(other, dict) else None))
    else:
        holder[key] = copy.deepcopy(chance.choice(POOL))  # a later edit may change it in place
        return f"{name} = {holder[key]!r}"[:120]
    return f"{way} {name}"


def _places(value: JsonValue) -> Iterator[tuple[JsonValue, JsonValue]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


# inputs, and what their content says


class Inputs:
    """Small real inputs in a folder: models, a sharded one, an adapter, an importance file, a lock and a recipe."""

    def __init__(self, folder: Path) -> None:
        make_llama = importlib.import_module("tests.helpers.tiny").make_llama

        self.folder = folder
        for seed, name in enumerate(("base", "a", "b")):
            make_llama(folder / name, seed=seed, vocab=32, layers=1, hidden=16)
        make_llama(folder / "sharded", seed=1, vocab=32, layers=1, hidden=16, max_shard_size="4KB")
        self._adapter()
        recipe = {
            "merge_method": "linear",
            "models": [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 1.5}}],
            "parameters": {"normalize": True},
            "dtype": "float32",
        }
        import yaml

        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

    def _adapter(self) -> None:
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(9)
        (self.folder / "lora").mkdir()
        prefix = "base_model.model.model.layers.0."
        tensors = {}
        for module, rows, columns in (("self_attn.q_proj", 16, 16), ("mlp.down_proj", 16, 32)):
            tensors[f"{prefix}{module}.lora_A.weight"] = torch.randn(4, columns)
            tensors[f"{prefix}{module}.lora_B.weight"] = torch.randn(rows, 4)
        save_file(tensors, self.folder / "lora" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"],
                  "bias": "none",
                  "rank_pattern": {}, "alpha_pattern": {"down_proj": 4}, "base_model_name_or_path": "base",
                  "use_rslora": False, "fan_in_fan_out": False, "modules_to_save": None}  # fmt: skip
        (self.folder / "lora" / "adapter_config.json").write_text(json.dumps(config))

    def _target(
        self, name: str, files: Sequence[Path], command: Sequence[str], expected: Check | None = None
    ) -> Target:
        """Make the reference result of a command; an accepted mutant must give it unless `expected` says otherwise."""
        reference = self.folder / f"reference-{name}"
        code, _, errors = run_merge([*command, "--save_path", str(reference)])
        assert code == 0, errors
        target_values = _tensors(reference)

        def same(out: Path) -> None:
            assert _tensors(out) == target_values, "other tensors than before"

        return Target(list(files), list(command), expected or same, target_values, run_merge)

    def _pair(self, first: str, second: str = "b") -> list[str]:
        return ["--method", "linear", "--models_to_merge", f"{first},{second}", "--dtype", "float32", "--no-load_check"]

    def _mean(self, first: str) -> Callable[[Path], None]:
        """The mean of two models as safetensors' own library reads them."""

        def expected(_out: Path) -> None:
            import torch

            ours, second, result = (_loaded(self.folder / name) for name in (first, "b", "out"))
            assert set(result) == set(second) == set(ours), "other names of tensors"
            for name, tensor in result.items():
                target_values = (ours[name].double() + second[name].double()) / 2
                assert torch.allclose(tensor.double(), target_values, rtol=1e-5, atol=1e-6), f"{name} is not the mean"

        return expected

    def header(self) -> Target:
        """Headers of safetensors files."""
        return self._target("header", [self.folder / "a" / "model.safetensors"], self._pair("a"), self._mean("a"))

    def index(self) -> Target:
        """Indexes of sharded models."""
        files = [self.folder / "sharded" / "model.safetensors.index.json"]
        return self._target("index", files, self._pair("sharded"), self._mean("sharded"))

    def config(self) -> Target:
        """config.json and generation_config.json of the model that the result's come from."""
        files = [self.folder / "a" / name for name in ("config.json", "config.json", "generation_config.json")]
        command = ["--method", "linear", "--models_to_merge", "a,b", "--dtype", "float32"]

        def expected(out: Path) -> None:
            from transformers import AutoConfig

            self._mean("a")(out)
            AutoConfig.from_pretrained(out, trust_remote_code=False, local_files_only=True)

        return self._target("config", files, command, expected)

    def tokenizer(self) -> Target:
        """Tokenizer files of the model that the result's come from: rows are matched by token."""
        files = [self.folder / "a" / name for name in ("tokenizer.json", "tokenizer_config.json")]

        def expected(out: Path) -> None:
            import torch
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(out, trust_remote_code=False, local_files_only=True)
            result, first = _loaded(out), _loaded(self.folder / "a")
            other = _loaded(self.folder / "b")
            for name, tensor in result.items():
                if tensor.shape == first[name].shape and "embed" not in name and "head" not in name:
                    target_values = (first[name].double() + other[name].double()) / 2
                    assert torch.allclose(tensor.double(), target_values, rtol=1e-5, atol=1e-6), (
                        f"{name} is not the mean"
                    )

        return self._target("tokenizer", files, self._pair("a"), expected)

    def adapter(self) -> Target:
        """Configs and headers of LoRA adapters."""
        files = [self.folder / "lora" / name for name in ("adapter_config.json",) * 2 + ("adapter_model.safetensors",)]
        command = ["--method", "passthrough", "--models_to_merge", "base+lora", "--dtype", "float32", "--no-load_check"]
        return self._target("adapter", files, command, self._adapted)

    def _adapted(self, out: Path) -> None:
        """theta_0 + alpha / r B A, in float64, as the adapter's config says."""
        import re

        import torch

        config = json.loads((self.folder / "lora" / "adapter_config.json").read_text())
        base, adapter, result = (_loaded(self.folder / name) for name in ("base", "lora", "out"))
        factors = {key.removeprefix("base_model.model."): tensor for key, tensor in adapter.items()}
        changed = {key.partition(".lora_A")[0] for key in factors if ".lora_A" in key}
        for name, tensor in result.items():
            target_values, module = base[name].double(), name.removesuffix(".weight")
            if module in changed:
                a, b = factors[f"{module}.lora_A.weight"].double(), factors[f"{module}.lora_B.weight"].double()
                values = {"r": config["r"], "lora_alpha": config["lora_alpha"]}
                for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
                    for expression, value in (config.get(pattern) or {}).items():
                        if re.match(rf"(.*\.)?({expression})$", module):
                            values[key] = value
                            break
                root = values["r"] ** 0.5 if config.get("use_rslora") else values["r"]
                target_values = target_values + values["lora_alpha"] / root * (b @ a)
            assert torch.allclose(tensor.double(), target_values, rtol=1e-4, atol=1e-5), f"{name} is not theta + s B A"

    def importance(self) -> Target:
        """Headers and metadata of importance files."""
        import torch

        from aim.importance import Importance, fingerprint
        from merging.checkpoints.checkpoint import open_checkpoint

        with open_checkpoint("base") as base:
            base_key = fingerprint(base)
            measured = {n: i.shape[1] for n, i in base.tensors.items() if "proj" in n}
        saved = {
            name: torch.rand(channels, generator=torch.Generator().manual_seed(1))
            for name, channels in measured.items()
        }
        file = self.folder / "base.importance"
        fields = {
            "unmeasured": {},
            "calibration": {},
            "base": {"name": "base", "commit": None, "fingerprint": base_key},
        }
        Importance(saved, dict.fromkeys(saved, 1), **fields, tokens=dict.fromkeys(saved, 100)).save(file)  # type: ignore[arg-type]
        command = ["--method", "task_arithmetic", "--base_model", "base", "--models_to_merge", "a", "--omega", "0.4",
                   "--importance", str(file), "--dtype", "float32", "--no-load_check"]  # fmt: skip
        return self._target("importance", [file], command)

    def lock(self) -> Target:
        """Locks, whose result must have the digests in them."""
        code, _, errors = run_merge([*self._pair("a"), "--save_path", str(self.folder / "locked")])
        assert code == 0, errors
        file = self.folder / "locked" / "merge.lock.json"
        return self._target("lock", [file], ["--from_lock", str(file), "--no-load_check"])

    def recipe(self) -> Target:
        """Recipes in mergekit's YAML."""
        file = self.folder / "recipe.yaml"
        return self._target("recipe", [file], ["--config", str(file), "--no-load_check"], self._by_recipe)

    def _by_recipe(self, out: Path) -> None:
        """The weighted mean that the YAML says, where it is still one of two whole models with one weight each."""
        import torch
        import yaml

        content = yaml.safe_load((self.folder / "recipe.yaml").read_bytes())
        parts = content.get("models") or []
        try:
            weights = {str(part["model"]): float(part["parameters"]["weight"]) for part in parts}
        except (KeyError, TypeError, ValueError):
            return
        normalize = (content.get("parameters") or {}).get("normalize", True)
        plain = content.get("merge_method") == "linear" and set(content) <= {
            "merge_method",
            "models",
            "parameters",
            "dtype",
        }
        if not plain or not isinstance(normalize, bool) or content.get("dtype") != "float32":
            return
        models, result = {name: _loaded(self.folder / name) for name in weights}, _loaded(out)
        total = sum(weights.values()) if normalize else 1.0
        for name, tensor in result.items():
            target_values = sum(weight * models[model][name].double() for model, weight in weights.items()) / total
            assert torch.allclose(tensor.double(), torch.as_tensor(target_values), rtol=1e-4, atol=1e-5), (
                f"{name} is not it"
            )


def _loaded(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by safetensors' own library."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    """Shape, dtype and bytes of every tensor of a result, by name."""
    import torch

    return {
        name: (
            tuple(t.shape),
            str(t.dtype),
            t.contiguous().view(torch.uint8).numpy().tobytes() if t.dim() else t.item(),
        )
        for name, t in _loaded(folder).items()
    }


def summary(report: JsonObject) -> str:
    """Return the table of a results file, for docs/reliability.md."""
    return table(report["kinds"])


if __name__ == "__main__":
    sys.exit(run(main))
