"""The experiment runner: its files, plans, states, resumption, and whole runs on miniatures of every experiment."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.cli import run
from common.errors import CheckpointError, FailureError, UsageError
from common.files.paths import read_json
from scripts.experiments import results
from scripts.experiments.commands import SCRIPTS, parser_of
from scripts.experiments.paired import AIM, ALL, curves, differences, interval_half
from scripts.experiments.plan import Cell, Plan, plan_experiment
from scripts.experiments.results import compact, read_rows
from scripts.experiments.schema import KEYS, MANAGED, Relaxation, read_experiment
from scripts.experiments.slurm import chains, slurm_script
from scripts.experiments.state import State
from scripts.quickstart.family import Family, make_family
from scripts.run_experiment import main
from tests.helpers.forked import redirect, server
from tests.scripts.test_quickstart_family import TINY

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "experiments"
FILES = sorted(file for file in FOLDER.glob("*.yaml") if file.stem != "as_shipped")
EVALUATE = {
    "benchmarks": "quickstart_addition,quickstart_strings", "math_benchmarks": "", "dtype": "float32", "device": "cpu",
    "batch_size": "20", "limit": "8",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny trained family: its base and three models, tasks and calibration text."""
    return make_family(tmp_path_factory.mktemp("trained") / "family", seed=3, quiet=True, recipe=TINY)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder of the test's own, and leave the process's thread settings alone."""
    monkeypatch.chdir(tmp_path)


def small(trained: Family, **changes: Any) -> dict[str, Any]:
    """An experiment on the tiny family: one method, one combination, AIM at one omega."""
    content = {
        "title": "A small experiment",
        "base": str(trained.base),
        "models": {"Code": str(trained.models["addition"]), "Instruction Tuned": str(trained.models["strings"])},
        "methods": ["task_arithmetic"],
        "aim": {"omegas": [0.4]},
        "calibration": {"calibration": str(trained.calibration), "n_samples": 24, "block_size": 32},
        "evaluate": {**EVALUATE, "include_path": str(trained.tasks)},
        "jobs": "in_process",
        **changes,
    }
    return {key: value for key, value in content.items() if value is not None}


def write(content: dict[str, Any], file: Path = Path("small.yaml")) -> Path:
    """Write an experiment's file."""
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def plan_of(content: dict[str, Any], file: Path = Path("small.yaml")) -> Plan:
    """Return the plan of an experiment."""
    return plan_experiment(read_experiment(write(content, file)), Path("out"))


def scores(folder: Path) -> dict[str, dict[str, float]]:
    """Return {model: {column: score}} of all results in a state folder."""
    found = {}
    for file in sorted(folder.glob("cells/*/scores/*/results_*.json")):
        ours = json.loads(file.read_text())["aim"]
        name = "/".join(Path(ours["model"]).parts[-2:])
        found[name] = {column: score["value"] for column, score in ours["scores"].items()}
    return found


# --- files and schema


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_each_file_is_planned(file: Path) -> None:
    """Every experiment of the folder has a valid schema and a plan whose commands its scripts' parsers accept."""
    plan = plan_experiment(read_experiment(file), Path("out"))
    sections = [cell.section for cell in plan.cells]
    merges = len(plan.experiment.methods) * sum(
        len(plan.experiment.combinations_of(list(r.models))) for r in plan.replicates
    )
    assert sections.count("merge") == merges
    assert sections.count("aim") == merges * len(plan.experiment.relaxations) * len(plan.experiment.calibrations)
    seen: set[str] = set()
    for cell in plan.cells:
        assert set(cell.needs) <= seen, f"{cell.name} comes before what it needs"
        seen.add(cell.name)
    for section in set(sections):
        cell = next(cell for cell in plan.cells if cell.section == section)
        words = shlex.split(cell.command)
        assert words[0] == "python"
        assert words[1].endswith(SCRIPTS[section])
        parser_of(section).parse_args(words[2:])


def test_the_papers_grid() -> None:
    """paper.yaml: four combinations by five methods, once merged and once relaxed, and the authors' 40 checkpoints."""
    plan = plan_experiment(read_experiment(FOLDER / "paper.yaml"), Path("out"))
    counts = {section: sum(cell.section == section for cell in plan.cells) for section in SCRIPTS}
    assert counts == {"merge": 20, "aim": 20, "calibration": 1, "evaluate": 4 + 20 + 20 + 40, "family": 0}


def test_dry_run_prints_commands_disk_and_time(run_script) -> None:
    """--dry_run prints every command, the disk and the time, and writes nothing."""
    done = run_script("scripts/run_experiment.py", FOLDER / "paper.yaml", "--dry_run", "--save_path", "nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n  python merge.py --method") == 20
    assert "125 cells: 84 evaluations, 1 importance files, 20 merges, 20 relaxations." in done.stdout
    assert "Disk: 52 GB of merged weights at most; 2.73 TB read, 1.04 TB written." in done.stdout
    assert "Time of merging and relaxing: 1 h 2 min." in done.stdout
    assert not (ROOT / "nowhere").exists()


def test_grids_and_relaxations(trained: Family) -> None:
    """Lists of parameters are grids; each statistic, normalization and control stands beside the first of the others;
    omega 1 is the merge itself."""
    methods = ["ties", {"method": "dare_ties", "density": [0.2, 0.5], "weights": [1.0]}]
    aim = {"omegas": [0, 0.4, 1], "statistics": ["mean_abs", "rms"], "normalizations": ["max", {"quantile": 0.9}],
           "controls": ["uniform"]}  # fmt: skip
    plan = plan_of(small(trained, methods=methods, aim=aim))
    labels = [method.label for method in plan.experiment.methods]
    assert labels == ["ties", "dare_ties-density0.2", "dare_ties-density0.5"]
    names = [relaxation.name for relaxation in plan.experiment.relaxations]
    assert names == ["AIM", "AIM-rms", "AIM-quantile0.9", "uniform"]
    assert Relaxation(control="permuted", normalization="quantile", quantile=0.9).flags() == {
        "normalization": "quantile", "quantile": 0.9, "control": "permuted",
    }  # fmt: skip
    (command,) = (c.command for c in plan.cells if c.name == "main__ties__Code-Instruction_Tuned__AIM-rms")
    assert "--omega 0,0.4 " in command
    assert "--statistic rms" in command
    assert sum(cell.section == "calibration" for cell in plan.cells) == 2  # one file per statistic
    assert "omega 1" in plan.notes[0]


def test_seeds_of_a_family() -> None:
    """A trained family is a cell of its own; all recipes have all seeds, or the recipes take turns."""
    content = {"family": {"fast": True, "rate_scale": [1.0, 3.0]}, "seeds": [1, 2, 3], "methods": ["ties"]}
    names = [r.name for r in plan_of(content).replicates]
    assert names == [f"rate_scale{rate}-s{seed}" for seed in (1, 2, 3) for rate in ("1.0", "3.0")]
    in_turn = plan_of({**content, "deal_seeds": True})
    assert [r.name for r in in_turn.replicates] == ["rate_scale1.0-s1", "rate_scale3.0-s2", "rate_scale1.0-s3"]
    assert [c.name for c in in_turn.cells if c.section == "family"] == [f"{r.name}__family" for r in in_turn.replicates]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metods": ["ties"]}, "there is no key 'metods'. Did you mean 'methods'"),
        ({"methods": [{"method": "dare_ties", "densty": 0.2}]}, "Did you mean 'density'"),
        ({"methods": ["tyes"]}, "Did you mean 'ties'"),
        ({"methods": []}, "methods must be a list"),
        ({"aim": {"omega": 0.4}}, "aim.omega is set by the runner"),
        ({"aim": {"omegas": 2}}, "--omega must be in"),
        ({"aim": {"controls": ["permute"]}}, "Did you mean 'permuted'"),
        ({"aim": {"min_token": 3}}, "Did you mean 'min_tokens'"),
        ({"evaluate": {"limits": 3}}, "Did you mean 'limit'"),
        ({"evaluate": {"max_gen_toks": "many"}}, "evaluate: argument --max_gen_toks: invalid int"),
        ({"keep": "none"}, "keep must be one of all, scores"),
        ({"jobs": 0}, "jobs must be in_process or a whole number from 1"),
        ({"base": None}, "base must be a folder or hub id"),
        ({"models": None}, "give one of models"),
        ({"combinations": [["Code", "Maths"]]}, "combinations[0][1] must be one of Code,"),
        ({"bytes": "big"}, "bytes must be a number"),
        ({"calibration": {"calibration": "{family}/x"}}, "{family} is of experiments that train a family"),
    ],
)
def test_mistakes_are_one_sentence(trained: Family, changes: dict[str, Any], message: str) -> None:
    """An unknown key, a value out of its range or a flag that the runner sets is refused by file and key."""
    with pytest.raises(UsageError) as caught:
        plan_of(small(trained, **changes))
    assert message in str(caught.value)


def test_the_schema_is_documented() -> None:
    """docs/experiments.md names each key of the YAML with the text of the program."""
    text = (ROOT / "docs" / "experiments.md").read_text()
    for key, meaning in KEYS.items():
        assert f"| `{key}` | {meaning} |" in text
    for section, flags in MANAGED.items():
        known = {action.dest for action in parser_of(section)._actions} | {"omega", "importance"}
        assert set(flags) <= known, section


# --- runs


def test_a_run_keeps_a_readable_state(trained: Family) -> None:
    """Every cell has its command, log and status; merges a lock, evaluations scores; tables follow."""
    file = write(small(trained, keep="scores"))
    assert main([str(file), "--quiet", "--collect", "rows.json"]) == 0
    out = Path("experiments/small")
    plan = plan_experiment(read_experiment(file), out)
    for cell in plan.cells:
        folder = out / "cells" / cell.name
        assert (folder / "command").read_text() == cell.command + "\n"
        assert (folder / "log").is_file()
        assert read_json(folder / "status.json", "")["state"] == "done"
        assert (folder / "lock").is_file() == (cell.section in ("merge", "aim"))
        assert (folder / "scores").is_dir() == (cell.section == "evaluate")
        assert cell.weights is None or not cell.weights.exists()
    rows = list(csv.DictReader((out / "report" / "cells.csv").open()))
    assert [row["relaxation"] for row in rows] == ["", "", "", "", "AIM"]
    assert rows[-1]["omega"] == "0.4"
    assert all(row["quickstart_addition"] and row["mean"] for row in rows)
    assert "Task Arithmetic" in (out / "report" / "tables.md").read_text()
    assert (out / "report" / "report.html").is_file()
    packed = json.loads(Path("rows.json").read_text())
    assert len(packed["rows"]) == len(rows)
    assert main([str(file), "--status"]) == 0
    with pytest.raises(UsageError, match="--resume goes on with it"):
        main([str(file), "--quiet"])
    assert main([str(file), "--quiet", "--resume"]) == 0


def test_collected_rows_are_divided(trained: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows above the limit are divided into files of whole replicates, all below it, and read back as they were."""
    plan = plan_of(small(trained))
    rows: list[dict[str, Any]] = [
        {"replicate": f"s{seed}", "method": "ties", "mean": 50.0 + item, "checkpoint": "models/x"}
        | ({"relaxation": AIM, "omega": 0.4} if item else {})
        for seed in range(5) for item in range(20)
    ]  # fmt: skip
    expected = [{key: value for key, value in row.items() if key != "checkpoint"} for row in rows]
    assert compact(plan, rows, Path("rows.json")) == [Path("rows.json")]
    assert read_rows(Path("rows.json")) == expected
    monkeypatch.setattr(results, "MOST_BYTES", 1800)
    files = compact(plan, rows, Path("rows.json"))
    assert files == [Path("rows.json"), Path("rows-2.json"), Path("rows-3.json")]
    assert all(file.stat().st_size <= 1800 for file in files)
    assert [len(json.loads(file.read_text())["rows"]) for file in files] == [40, 40, 20]
    assert read_rows(Path("rows.json")) == expected
    Path("rows-3.json").unlink()
    with pytest.raises(CheckpointError, match=r"rows-3\.json does not exist: part 3 of 3"):
        read_rows(Path("rows.json"))
    shutil.copyfile("rows-2.json", "rows-3.json")
    with pytest.raises(UsageError, match=r"rows-3\.json is not part 3"):
        read_rows(Path("rows.json"))
    monkeypatch.setattr(results, "MOST_BYTES", 600)
    with pytest.raises(UsageError, match="replicate s0 would take"):
        compact(plan, rows, Path("rows.json"))


def test_deleted_weights_come_back_by_their_lock(trained: Family, run_script) -> None:
    """The lock that `keep: scores` leaves rebuilds the deleted weights, by the ordinary script."""
    file = write(small(trained, keep="scores"))
    assert main([str(file), "--quiet", "--no_report"]) == 0
    name = "main__task_arithmetic__Code-Instruction_Tuned__merge"
    lock = Path("experiments/small/cells") / name / "lock"
    again = run_script(ROOT / "merge.py", "--from_lock", lock, "--save_path", "again", "--quiet", cwd=Path.cwd())
    assert again.returncode == 0, again.stderr
    assert (Path("again") / "model.safetensors").is_file()


def test_a_failed_cell_does_not_stop_the_rest(trained: Family) -> None:
    """The failure is recorded with its sentence, what needs it is skipped, the rest goes on, and the exit code is 1;
    --resume runs it once more, alone with what is missing."""
    broken = Path("broken")
    shutil.copytree(trained.models["brackets"], broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:100])
    content = small(trained, combinations="pairs")
    content["models"]["Math"] = str(broken)
    file = write(content)
    with pytest.raises(FailureError, match="cells failed or were skipped"):
        main([str(file), "--quiet"])
    out = Path("experiments/small")
    plan, state = plan_experiment(read_experiment(file), out), State(out)
    states = {cell.name: state.status(cell) for cell in plan.cells}
    bad = {name: s for name, s in states.items() if s.state != "done"}
    assert all("Math" in name for name in bad)
    failed = states["main__task_arithmetic__Code-Math__merge"]
    assert failed.state == "failed"
    assert "broken" in (failed.sentence or "")
    assert states["main__task_arithmetic__Code-Math__AIM"].state == "skipped"
    assert "main__task_arithmetic__Code-Math__merge" in (states["main__task_arithmetic__Code-Math__AIM"].sentence or "")
    assert "failed: main__task_arithmetic__Code-Math__merge: " in state.table(plan)
    before = {name: state.status(plan.find(name)).seconds for name in states if name not in bad}
    (broken / "model.safetensors").write_bytes(weights)
    assert main([str(file), "--quiet", "--resume"]) == 0
    assert {state.status(cell).state for cell in plan.cells} == {"done"}
    assert before == {name: state.status(plan.find(name)).seconds for name in before}  # not run again


def test_only_runs_what_matches_and_its_needs(trained: Family) -> None:
    """--only takes the cells of a chain and what they need, nothing else."""
    file = write(small(trained, methods=["ties", "linear"]))
    pattern = "main__ties__Code-Instruction_Tuned"
    assert main([str(file), "--quiet", "--only", pattern, "--no_report"]) == 0
    out = Path("experiments/small")
    plan, state = plan_experiment(read_experiment(file), out), State(out)
    done = {cell.name for cell in plan.cells if state.status(cell).state == "done"}
    assert done == {c.name for c in plan.cells if c.name.startswith(pattern)} | {"main__importance-mean_abs"}
    with pytest.raises(UsageError, match="no cell has such a name"):
        main([str(file), "--quiet", "--resume", "--only", "main__tyes*"])


def runner_that_waits(marker: Path, cells: int, arguments: list[str]) -> None:
    """Be a runner that waits, to be killed, once it has begun so many cells; its marker is there by then."""
    begin, begun = State.begin, itertools.count(1)

    def begin_and_wait(state: State, cell: Cell) -> None:
        begin(state, cell)
        if next(begun) == cells:
            marker.touch()
            time.sleep(600)

    State.begin = begin_and_wait  # type: ignore[method-assign]
    redirect(marker.parent)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv[1:] = arguments
    sys.exit(run(main))


@pytest.mark.parametrize("jobs", ["in_process", "2"])
def test_killed_and_resumed_runs_have_the_same_scores(trained: Family, jobs: str) -> None:
    """Killed twice at different cells, with SIGKILL and SIGTERM, and resumed: the scores of a run in one go. A cell
    that outlives the killed runner is waited for, not run beside itself."""
    changes = {} if jobs == "in_process" else {"aim": None, "calibration": None}  # each cell is a process that starts
    file = write(small(trained, methods=["dare_ties"], keep="scores", **changes))
    out = Path("killed")
    arguments = [str(file), "--save_path", str(out), "--jobs", jobs, "--no_report"]
    for number, cells in ((signal.SIGKILL, 2), (signal.SIGTERM, 3)):
        marker = Path(f"waits-{number}").resolve()
        process = server().Process(target=runner_that_waits, args=(marker, cells, arguments))
        process.start()
        deadline = time.monotonic() + 240
        while not marker.exists():
            assert process.is_alive(), Path("err").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, number)  # type: ignore[arg-type]
        process.join(60)
        assert process.exitcode not in (0, None)
        if "--resume" not in arguments:
            arguments.append("--resume")
    assert main([*arguments, "--quiet"]) == 0
    assert main([str(file), "--quiet", "--no_report", "--save_path", "whole"]) == 0
    assert scores(out) == scores(Path("whole"))
    assert len(scores(out)) == 3 + (2 if jobs == "in_process" else 1)


def test_pinned_revisions(trained: Family, tmp_path: Path) -> None:
    """Models of the hub can be pinned by @REVISION: each cell reads that commit, and the tables have their labels."""
    cache, commits = tmp_path / "hub", {}
    for name, source in {
        "base": trained.base,
        "one": trained.models["addition"],
        "two": trained.models["strings"],
    }.items():
        commits[name] = f"{len(commits) + 1:040x}"
        repo = cache / f"models--org--{name}"
        shutil.copytree(source, repo / "snapshots" / commits[name])
        (repo / "refs").mkdir()
        (repo / "refs" / ("main" if name == "two" else "v1")).write_text(commits[name])
    models = {"Code": f"org/one@{commits['one']}", "Instruction Tuned": "org/two@main"}
    file = write(small(trained, base="org/base@v1", models=models))
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "run_experiment.py"), str(file), "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = Path("experiments/small")
    rows = list(csv.DictReader((out / "report" / "cells.csv").open()))
    assert [row["model"] for row in rows if row["model"]] == ["Base", "Code", "Instruction Tuned"]
    assert len(rows) == 5
    (record,) = out.glob("models/main/merged/*/run_record.json")
    assert {entry["commit"] for entry in json.loads(record.read_text())["inputs"]} == set(commits.values())
    text = (out / "report" / "tables.md").read_text()
    assert "Code + Instruction Tuned" in text
    assert "org/" not in text


def test_slurm_script(trained: Family, tmp_path: Path) -> None:
    """The array has one task per chain, its patterns cover all cells, and the shell accepts it."""
    file = write(small(trained, methods=["ties", "linear"], combinations="pairs"))
    assert main([str(file), "--slurm", "run.sbatch", "--quiet"]) == 0
    text = Path("run.sbatch").read_text()
    plan = plan_experiment(read_experiment(file), Path("experiments/small"))
    patterns = chains(plan)
    assert f"--array=0-{len(patterns) - 1}" in text
    assert len(patterns) == 3 + 2
    assert subprocess.run(["bash", "-n", "run.sbatch"]).returncode == 0
    covered = {cell.name for cell in plan.cells for p in patterns if cell.name == p or cell.name.startswith(f"{p}__")}
    assert {cell.name for cell in plan.cells} - covered == {"main__importance-mean_abs"}
    assert slurm_script(plan, file, Path("experiments/small")) == text


def miniature(file: Path, trained: Family, folder: Path) -> dict[str, Any]:
    """The experiment of a file with the same labels, names of models, methods and relaxations, on tiny models.

    Each model is a copy of a tiny one under its own name; a family becomes a base with models. One combination, one
    method and one omega are kept (of omega.yaml two of each), and of grids of calibration two values.
    """
    content = yaml.safe_load(file.read_text())

    def model(reference: str, number: int) -> str:
        target = folder / reference
        source = [trained.base, *trained.models.values()][number % 4]
        if not target.exists():
            shutil.copytree(source, target)
        return str(target)

    def models(references: dict[str, str]) -> dict[str, str]:
        return {label: model(reference, 1 + i % 3) for i, (label, reference) in enumerate(references.items())}

    if "family" in content:
        del content["family"]
        content = {k: v for k, v in content.items() if k not in ("seeds", "deal_seeds", "columns")}
        content |= {"base": "base", "models": {"Addition": "addition", "Strings": "strings", "Brackets": "brackets"}}
    if "pools" in content:
        for pool in content["pools"].values():
            pool |= {"base": model(pool["base"], 0), "models": models(pool["models"])}
    else:
        content |= {"base": model(content["base"], 0), "models": models(content["models"])}
    count = 2 if file.stem == "omega" else 1
    content["methods"] = content["methods"][:count]
    if content["combinations"] != "whole":
        content["combinations"] = [list(content["models"])[:2]]
    content["aim"] = {**content["aim"], "omegas": content["aim"]["omegas"][:count]}
    content["calibration"] = {"calibration": str(trained.calibration), "n_samples": 24, "block_size": 32}
    if file.stem == "calibration":
        other = folder / "other.jsonl"
        shutil.copyfile(trained.calibration, other)
        content["calibration"] |= {"calibration": [str(trained.calibration), str(other)], "n_samples": [12, 24]}
    answers = {"answers": True} if content["evaluate"].get("answers") else {}
    content["evaluate"] = {**EVALUATE, "include_path": str(trained.tasks), **answers}
    content.pop("published", None)  # needs the hub; planned in test_the_papers_grid
    content["jobs"] = "in_process"
    return content


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_each_file_runs_whole_on_a_miniature(file: Path, trained: Family, tmp_path: Path) -> None:
    """Every experiment of the folder runs from merges to tables on tiny models of the same names."""
    content = miniature(file, trained, tmp_path / "hub")
    assert main([str(write(content, Path(file.name))), "--quiet"]) == 0
    out = Path("experiments") / file.stem
    plan = plan_experiment(read_experiment(Path(file.name)), out)
    rows = list(csv.DictReader((out / "report" / "cells.csv").open()))
    assert len(rows) == len(plan.models)
    assert {row["relaxation"] for row in rows} == {"", *(r.name for r in plan.experiment.relaxations)}
    controls = {row["control"] for row in rows if row.get("control")}
    text = "".join(table.read_text() for table in out.glob("report/**/tables.md"))
    assert all(f"control {control}" in text for control in controls)
    if file.stem == "long_to_short":
        assert "## Answers" in text


# --- differences over replicates


def test_curves_by_kind_of_relaxation() -> None:
    """AIM and its variants have a row of panels, AIM and the controls another, and AIM minus each control a third;
    without controls there is one row. Each line goes through the differences."""
    rows: list[dict[str, Any]] = []
    for seed in range(3):
        common = {"replicate": f"s{seed}", "method": "ties", "models": "A + B", "mean": 50.0, "HV Gain": 0.5}
        rows.append(common)
        for number, name in enumerate((AIM, "AIM-rms", "uniform")):
            rows += [
                {**common, "relaxation": name, "omega": omega, "mean": 50.0 + number + omega} for omega in (0.0, 0.4)
            ]
    figure = curves(differences(rows))
    assert len(figure.subfigs) == 3
    labels = [[c.get_label() for c in part.axes[0].containers] for part in figure.subfigs]
    assert labels == [["AIM", "AIM-rms"], ["AIM", "uniform"], ["uniform"]]
    line = figure.subfigs[1].axes[0].containers[1].lines[0]
    assert list(line.get_ydata()) == pytest.approx([2.0, 2.4])
    line = figure.subfigs[2].axes[0].containers[0].lines[0]
    assert list(line.get_ydata()) == pytest.approx([-2.0, -2.0])
    alone = curves(differences([row for row in rows if row.get("relaxation") != "uniform"]))
    assert len(alone.subfigs) == 1


def test_paired_differences_by_hand() -> None:
    """Differences of 1, 2 and 3 points over three replicates: mean 2, half width t(0.975, 2) * 1 / sqrt(3) = 2.484."""
    rows: list[dict[str, Any]] = []
    for replicate, rise in (("s1", 1.0), ("s2", 2.0), ("s3", 3.0)):
        common = {"replicate": replicate, "method": "ties", "models": "A + B"}
        rows.append({**common, "mean": 50.0, "HV Gain": 0.5})
        rows.append({**common, "mean": 50.0 + rise, "HV Gain": 0.5, "relaxation": AIM, "omega": 0.4})
        rows.append({**common, "mean": 50.0, "HV Gain": 0.5, "relaxation": "uniform", "omega": 0.4})
    found = {(d.what, d.quantity): d for d in differences(rows) if d.method == ALL}
    difference = found["AIM minus uniform", "mean"]
    assert difference.value == pytest.approx(2.0)
    assert difference.high - difference.value == pytest.approx(2.4841, abs=1e-4)
    assert difference.replicates == 3
    assert not difference.is_significant
    assert found["AIM minus merge", "mean"].value == pytest.approx(2.0)
    assert found["uniform minus merge", "mean"].value == 0.0
    assert interval_half([1.0]) == float("inf")
