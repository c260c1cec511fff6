"""The plan before a run: `--dry_run`, and that memory does not grow with the tensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scripts.benchmarks.bench_memory import peak
from tests.helpers.tiny import fine_tune, weights


def command(family, *more: object) -> list[object]:  # type: ignore[no-untyped-def]
    """TIES of a and b."""
    return ["merge.py", "--method", "ties", "--base_model", family["base"], "--models_to_merge",
            f"{family['a']},{family['b']}", *more]  # fmt: skip


def test_dry_run_says_what_the_run_does(family, tmp_path: Path, run_script) -> None:
    """--dry_run --json: one object whose counts and sizes are those of the run that follows; nothing is written."""
    out = tmp_path / "out"
    planned = run_script(*command(family, "--dry_run", "--json", "--save_path", out))
    assert planned.returncode == 0, planned.stderr
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(planned.stdout)
    assert run_script(*command(family, "--save_path", out, "--quiet")).returncode == 0
    state, record = weights(out), json.loads((out / "run_record.json").read_text())
    assert plan["tensors"]["total"] == len(state)
    assert plan["tensors"]["merged"] == record["tensors"]["merged"]
    assert plan["bytes_to_write"] == sum(t.numel() * t.element_size() for t in state.values())
    read = [weights(family[name]) for name in ("base", "a", "b")]
    assert plan["bytes_to_read"] == sum(t.numel() * t.element_size() for s in read for t in s.values())
    assert plan["result"]["parameters"] == sum(t.numel() for t in state.values())
    assert plan["recipe"] == record["recipe"]
    assert "TIES" in plan["sources"]["density"]
    assert [model["role"] for model in plan["models"]] == ["base", "model", "model"]


def test_dry_run_says_what_is_relaxed(family, tmp_path: Path, run_script) -> None:
    """With --omega the plan says what will be measured; with an importance file what will be relaxed, in the words of
    the run that follows, and it writes nothing."""
    text = ["--calibration", family["text"], "--block_size", "64", "--omega", "0.4"]
    said = run_script(*command(family, "--dry_run", *text)).stdout
    assert f"AIM: the importance of {family['base']} is measured first, on {family['text']}." in said
    kept = ["--omega", "0.4", "--importance", tmp_path / "base.safetensors"]
    made = run_script(*command(family, "--save_path", tmp_path / "out", *text, *kept[2:]))
    (sentence,) = [line for line in made.stderr.splitlines() if line.startswith("Relaxing ")]
    before = sorted(tmp_path.rglob("*"))
    said = run_script(*command(family, "--dry_run", *kept)).stdout
    assert f"  {sentence}" in said.splitlines()
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_for_people(family, tmp_path: Path, run_script) -> None:
    """The plan names models, parameters with their sources, cost and what does nothing."""
    said = run_script(*command(family, "--dry_run", "--density", 1)).stdout
    for part in ("LlamaForCausalLM", "density: [1.0, 1.0]  (flag)", "normalize: true  (default:", "peak memory about",
                 "density 1: ties trims nothing."):  # fmt: skip
        assert part in said


def test_dry_run_reads_no_weights(family, tmp_path: Path, run_script) -> None:
    """Headers suffice: with every weight's bytes replaced by NaN the plan is the same, where the run fails."""
    spoiled = fine_tune(family["base"], tmp_path / "spoiled", seed=1)
    good = json.loads(run_script(*command({**family, "a": spoiled}, "--dry_run", "--json")).stdout)
    state = {name: torch.full_like(tensor, float("nan")) for name, tensor in weights(spoiled).items()}
    save_file(state, spoiled / "model.safetensors", {"format": "pt"})
    planned = run_script(*command({**family, "a": spoiled}, "--dry_run", "--json"))
    again = json.loads(planned.stdout)
    assert {**again, "bytes_free": 0} == {**good, "bytes_free": 0}
    run = run_script(*command({**family, "a": spoiled}, "--save_path", tmp_path / "out"))
    assert run.returncode == 1
    assert "NaN" in run.stderr


def test_dry_run_refuses_what_the_run_would(family, tmp_path: Path, run_script) -> None:
    """A plan that cannot work exits as the run would, with the same sentence."""
    other = fine_tune(family["base"], tmp_path / "other", seed=1)
    state = weights(other)
    del state["model.norm.weight"]
    save_file(state, other / "model.safetensors", {"format": "pt"})
    results = [
        run_script(*command({**family, "a": other}, *end)) for end in (("--dry_run",), ("--save_path", tmp_path / "o"))
    ]
    assert [result.returncode for result in results] == [1, 1]
    assert results[0].stderr == results[1].stderr
    assert "has no tensor model.norm.weight" in results[0].stderr


def peak_anonymous(arguments: list[object]) -> float:
    """Run a script; returns the highest anonymous memory seen, in MiB."""
    memory, _, code = peak([sys.executable, *map(str, arguments)])
    assert code == 0
    return memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read a process's memory")
@pytest.mark.parametrize("extra", [("--method", "ties"), ("--method", "dare_ties", "--density", "0.5")])
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, extra: tuple[str, ...]) -> None:
    """A tensor of 128 MiB in bf16 takes at most 160 MiB more than one of 8 MiB: less than one copy of it in
    fp32, of which a whole-tensor merge holds several."""
    peaks = []
    for rows in (1024, 16384):
        for seed, name in enumerate(("base", "a", "b")):
            folder = tmp_path / f"{name}-{rows}"
            folder.mkdir()
            generator = torch.Generator().manual_seed(seed)
            tensor = torch.randn(rows, 4096, generator=generator).bfloat16()
            save_file({"body.weight": tensor}, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text('{"model_type": "synthetic"}')
        models = f"{tmp_path / f'a-{rows}'},{tmp_path / f'b-{rows}'}"
        peaks.append(peak_anonymous(["merge.py", *extra, "--base_model", tmp_path / f"base-{rows}", "--models_to_merge",
                                     models, "--save_path", tmp_path / f"out-{rows}", "--no-load_check"]))  # fmt: skip
    assert peaks[1] < peaks[0] + 160


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read a process's memory")
def test_memory_of_stacked_experts(tmp_path: Path) -> None:
    """A stack of two experts of 32 MiB each, of a base and four models, is not held whole, expert by expert: in fp32
    that would be 320 MiB for one copy of one expert of each alone."""
    for seed, name in enumerate(("base", "a", "b", "c", "d")):
        (tmp_path / name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randn(2, 4096, 4096, generator=generator).bfloat16()
        save_file({"mlp.experts.up_proj": tensor}, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"model_type": "synthetic"}')
    models = ",".join(str(tmp_path / name) for name in "abcd")
    peak = peak_anonymous(["merge.py", "--method", "task_arithmetic", "--base_model", tmp_path / "base",
                           "--models_to_merge", models, "--save_path", tmp_path / "out",
                           "--no-load_check"])  # fmt: skip
    assert peak < 450
    tensors = [weights(tmp_path / name)["mlp.experts.up_proj"].float() for name in ("base", "a", "b", "c", "d", "out")]
    expected = tensors[0] + sum(t - tensors[0] for t in tensors[1:5])
    assert torch.equal(tensors[5], expected.bfloat16().float())
