"""What a merge will cost in time: the formula, the file of bandwidths, `--dry_run --bandwidths`, docs/scale.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from console.cli import explain
from console.errors import ProjectError
from merging.bandwidths import Bandwidths, Rate, bandwidths_at, read_bandwidths
from merging.estimate import Amounts, as_sentence, duration, estimate
from scripts.bench_memory import make
from scripts.scale import LLAMAS, amounts, parameters
from scripts.update_docs import filled
from tests.conftest import ROOT
from tests.tiny import train

MACHINE = Bandwidths(
    "made", cores=4, read=2.0, write=1.0, digest=5.0, output=4.0, start=3.0, cached=50.0,
    methods={"ties": Rate(blocks=10.0, before=20.0)},
)  # fmt: skip
MOVED = Amounts(read=100, written=20, method="ties")
SHIPPED = ROOT / "configs" / "bandwidths.json"


def test_formula_by_hand() -> None:
    """Reading 100 / 2; digests 100 / 5; computing (100 / 10 + 100 / 20 + 100 / 5 + 20 / 4) / 4 cores; writing the
    larger of 20 / 1 and 20 / 4 + 100 / 20 / 4; all at once, after 3 s of start."""
    found = estimate(MOVED, MACHINE)
    assert (found.start, found.read, found.digest, found.compute, found.write) == (3, 50, 20, 10, 20)
    assert (found.total, found.binding) == (53, "read")
    buffered = estimate(MOVED, replace(MACHINE, buffer=15.0))
    assert buffered.write == 20 / 4 + 100 / 20 / 4
    assert estimate(replace(MOVED, cached=True), MACHINE).read == 2


@pytest.mark.parametrize(
    ("slow", "binds"), [("read", "read"), ("digest", "digest"), ("write", "write"), ("output", "write")]
)
def test_the_slowest_binds(slow: str, binds: str) -> None:
    """A machine that is slow in one thing waits for that one thing alone; a longer start than all of it binds too."""
    fast = replace(MACHINE, **dict.fromkeys(("read", "digest", "write", "output"), 1e6), methods={"ties": Rate(1e6)})
    found = estimate(MOVED, replace(fast, **{slow: 0.1}))
    assert found.binding == binds
    assert found.total == found.start + found.seconds[binds]
    assert estimate(MOVED, replace(fast, methods={"ties": Rate(0.1)})).binding == "compute"
    assert estimate(MOVED, fast).binding == "start"


def test_time_is_linear_in_bytes() -> None:
    """N times the bytes take N times as long, start-up and what the system buffers aside."""
    once = estimate(MOVED, MACHINE)
    for times in (2, 7, 1000):
        many = estimate(Amounts(100 * times, 20 * times, "ties"), MACHINE)
        assert many.total - many.start == pytest.approx(times * (once.total - once.start))
        assert many.binding == once.binding


def test_machines_share_the_work_and_not_the_disk() -> None:
    """8 machines of 2 processes: digests a 16th, computing an 8th; the file system is one, and nothing stays in a
    buffer that others must read. Of 64 cores 8 take digests."""
    one, many = estimate(MOVED, MACHINE), estimate(MOVED, replace(MACHINE, machines=8, processes=2, buffer=1e9))
    assert many.read == one.read
    assert many.digest == one.digest / 16
    assert one.compute is not None
    assert many.compute == one.compute / 8
    assert many.write == 20
    assert estimate(MOVED, replace(MACHINE, cores=64)).digest == one.digest / 8


def test_a_method_without_a_rate() -> None:
    """No rate, no seconds of computing: they are None, the sentence says so, and the rest stands as "at least"."""
    found = estimate(replace(MOVED, method="wudi"), MACHINE)
    assert found.compute is None
    assert found.as_dict()["compute"] is None
    told = as_sentence(found.as_dict())
    assert told.startswith('takes at least 53 s on "made": ')
    assert "computing not measured for this merge" in told
    assert as_sentence(estimate(MOVED, MACHINE).as_dict()) == (
        'takes about 53 s on "made": starting 3.0 s, reading 50 s (binds), digests 20 s, computing 10 s, writing 20 s'
    )


def test_durations_read_well() -> None:
    """Seconds below a hundred, minutes below a hundred, then hours; one decimal below ten."""
    told = [duration(s) for s in (0.04, 9.94, 9.96, 99.4, 99.6, 594, 600, 5940, 6000, 360000)]
    assert told == ["0.0 s", "9.9 s", "10 s", "99 s", "1.7 min", "9.9 min", "10 min", "99 min", "1.7 h", "100.0 h"]


WHOLE = {"cores": 2, "read": 1, "write": 1, "digest": 1, "output": 1, "start": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not valid JSON"),
        ("[1]", "should hold a JSON object"),
        ("{}", "has no machines in it"),
        ('{"machines": {"here": 3}}', "has no machines in it"),
        (json.dumps({"machines": {"her": WHOLE}}), "Did you mean 'her'?"),
        (json.dumps({"machines": {"here": {**WHOLE, "read": 0}}}), "here: read must be a positive number, found 0"),
        (json.dumps({"machines": {"here": {**WHOLE, "write": "fast"}}}), "write must be a positive number, found 'fa"),
        (json.dumps({"machines": {"here": {**WHOLE, "cores": 1.5}}}), "cores must be a whole number, found 1.5"),
        (json.dumps({"machines": {"here": {"read": 1}}}), "cores must be a positive number, found None"),
        (json.dumps({"machines": {"here": {**WHOLE, "methods": {"ties": 3}}}}), "methods must map names to rates"),
        (json.dumps({"machines": {"here": {**WHOLE, "methods": {"ties": {}}}}}), "here, ties: blocks must be"),
        (json.dumps({"machines": {"here": {"like": "there"}}}), "like 'there', which is no measured machine"),
    ],
)  # fmt: skip
def test_bad_files_are_one_sentence(tmp_path: Path, content: str, said: str) -> None:
    """Whatever is wrong with the file, one sentence names the file and what is wrong."""
    file = tmp_path / "bandwidths.json"
    file.write_text(content)
    with pytest.raises(ProjectError) as raised:
        read_bandwidths(file)
    sentence, _ = explain(raised.value)
    assert said in sentence
    assert str(file) in sentence
    assert "\n" not in sentence


def test_a_machine_like_another(tmp_path: Path) -> None:
    """What a machine does not say is that of the one it is like; FILE:MACHINE names it, FILE alone names "here"."""
    file = tmp_path / "b.json"
    file.write_text(json.dumps({"machines": {"here": WHOLE, "twice": {"like": "here", "read": 2, "machines": 8}}}))
    here, twice = bandwidths_at(str(file)), bandwidths_at(f"{file}:twice")
    assert here.name == "here"
    assert twice == replace(here, name="twice", read=2.0, machines=8)
    with pytest.raises(ProjectError, match=r"none\.json does not exist"):
        bandwidths_at(str(tmp_path / "none.json"))


def test_the_shipped_file() -> None:
    """Every machine of configs/bandwidths.json can be read, and says that it was measured or what is assumed of it."""
    machines = json.loads(SHIPPED.read_text())["machines"]
    assert {"here", "laptop", "server", "cluster"} <= set(machines)
    for name, entry in machines.items():
        found = read_bandwidths(SHIPPED, name)
        assert {"task_arithmetic", "ties", "dare_ties", "widen"} <= set(found.methods)
        assert ("measured" in entry) != ("assumed" in entry), name
        own = {"cores", "read", "write", "buffer", "processes", "machines"} & set(entry)
        assert "measured" in entry or own <= {key for told in entry["assumed"] for key in told.split(", ")}, name


def test_the_table_comes_from_the_file() -> None:
    """docs/scale.md holds what scripts/scale.py makes of configs/bandwidths.json."""
    text = (ROOT / "docs" / "scale.md").read_text()
    assert "<!-- scale: configs/bandwidths.json -->\n\n| machine" in text
    assert filled(text) == text


def test_shapes_are_the_published_ones() -> None:
    """The Llamas of the table have the published numbers of parameters."""
    found = {name: parameters(shape) for name, shape in LLAMAS.items()}
    published = {"7B": 6738415616, "13B": 13015864320, "70B": 68976648192, "405B": 405853388800}
    assert found == published


def command(base: object, models: str, *more: object) -> list[object]:
    """TIES, looked at only."""
    return ["merge.py", "--method", "ties", "--base_model", base, "--models_to_merge", models, "--dry_run", *more]


def test_dry_run_agrees_with_the_table(tmp_path: Path, run_script) -> None:
    """--dry_run of checkpoints of 7B, from their headers, estimates what the table's function does from the shape."""
    names = [str(make(tmp_path / str(i), LLAMAS["7B"], None)) for i in range(4)]
    done = run_script(*command(names[0], ",".join(names[1:]), "--json", "--bandwidths", f"{SHIPPED}:laptop"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["estimate"]
    assert found == estimate(amounts(LLAMAS["7B"], 3, "ties"), read_bandwidths(SHIPPED, "laptop")).as_dict()


def test_dry_run_with_and_without(family, run_script) -> None:
    """--bandwidths adds one line to the cost, and one key to the JSON; nothing else changes."""
    models = f"{family['a']},{family['b']}"
    plain = run_script(*command(family["base"], models)).stdout.splitlines()
    more = run_script(*command(family["base"], models, "--bandwidths", SHIPPED)).stdout.splitlines()
    added = [line for line in more if line.startswith("  takes about ")]
    assert len(added) == 1
    assert '" (binds)' not in added[0]
    assert added[0].count("(binds)") == 1
    assert more[more.index(added[0]) - 1].startswith("  reads ")
    assert [line.split("(")[0] for line in more if line not in added] == [line.split("(")[0] for line in plain]
    found = json.loads(run_script(*command(family["base"], models, "--json", "--bandwidths", SHIPPED)).stdout)
    assert found.pop("estimate")["machine"] == "here"
    bare = json.loads(run_script(*command(family["base"], models, "--json")).stdout)
    assert {**found, "bytes_free": 0} == {**bare, "bytes_free": 0}


def test_what_was_not_measured_is_said(family, run_script) -> None:
    """Thresholds over the whole model, and the original's numerics, have no measured rate: no seconds are made up."""
    for more in (["--trim_scope", "model"], ["--numerics", "reference", "--density", "1"]):
        done = run_script(*command(family["base"], family["a"], "--bandwidths", SHIPPED, *more))
        assert done.returncode == 0, done.stderr
        assert "computing not measured for this merge" in done.stdout


def test_mistakes(family, tmp_path: Path, run_script) -> None:
    """--bandwidths without --dry_run, of an unknown machine, or with --save_as adapter, is a usage error: exit 2."""
    train(family["base"], tmp_path / "lora")
    adapted = f"{family['base']}+{tmp_path / 'lora'}"
    without = [
        word for word in command(family["base"], family["a"], "--save_path", tmp_path / "o") if word != "--dry_run"
    ]
    for words, said in (
        ([*without, "--bandwidths", SHIPPED], "--bandwidths goes with --dry_run"),
        (command(family["base"], family["a"], "--bandwidths", f"{SHIPPED}:laptpo"), "Did you mean 'laptop'?"),
        (["merge.py", "--method", "linear", "--models_to_merge", adapted, "--save_as", "adapter", "--dry_run",
          "--bandwidths", SHIPPED], "estimates merges of models, not of adapters"),
    ):  # fmt: skip
        done = run_script(*words)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()
