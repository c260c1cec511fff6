"""Comparisons of two models: counts, tests and intervals, what is refused, the script, and HV gain's uncertainty."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.cli import run
from common.errors import BadInputError, UsageError
from eval.outcomes import Outcomes, TaskOutcomes
from eval.report.comparison_text import shown_p
from eval.results.result import EvalResult
from eval.results.rows import assemble
from eval.stats.comparison import compare, differences
from eval.stats.gain_comparison import compare_gains
from eval.stats.gains import Measure, all_gains, gain_draws
from eval.stats.significance import holm, mcnemar, paired_interval
from eval.stats.uncertainty import uncertainty
from scripts.compare import main as compare_main
from tests.helpers.forked import run_script
from tests.helpers.made_results import SKILLS, column_outcomes, family, made, write_family

ROOT = Path(__file__).resolve().parents[3]


def silent(sentence: str) -> None:
    """Hear no remarks."""


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_script(ROOT / "scripts" / "compare.py", *arguments)


def two() -> tuple[EvalResult, EvalResult]:
    return made("ties"), made("ties_aim")


def test_counts_are_those_of_the_items() -> None:
    """Scores, items that one model alone has right, p and interval are those of the verdicts, counted here by hand."""
    a, b = two()
    found = {d.column: d for d in differences(a, b)}
    right = [r.outcomes["HumanEval"].tasks["humaneval"].verdicts["pass@1"] for r in (a, b)]
    only_a = sum(x > y for x, y in zip(*right, strict=True))
    only_b = sum(x < y for x, y in zip(*right, strict=True))
    d = found["HumanEval"]
    assert (d.n, d.only_a, d.only_b) == (164, only_a, only_b)
    assert d.value == pytest.approx(100 * (only_b - only_a) / 164)
    assert d.a == pytest.approx(a.scores["HumanEval"].value)
    assert d.p == mcnemar(only_a, only_b)
    assert d.interval == pytest.approx([100 * end for end in paired_interval(only_a, only_b, 164)])
    assert d.simultaneous[0] < d.interval[0] < d.interval[1] < d.simultaneous[1]
    assert [x.corrected for x in found.values()] == holm([x.p for x in found.values()])
    assert list(found) == ["HumanEval", "MMLU", "GSM8K", "IFEval"]
    assert found["IFEval"].test == "permutation"
    assert found["IFEval"].only_a is None


def test_exchanging_the_models_changes_signs_only() -> None:
    """B against A is A against B with the sign turned, to the accuracy of the bootstrap."""
    a, b = two()
    for one, other in zip(differences(a, b), differences(b, a), strict=True):
        assert other.value == pytest.approx(-one.value)
        assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]), abs=0.3)
        assert other.p == pytest.approx(one.p, abs=0.02)


def test_a_model_equals_itself() -> None:
    """A model compared with itself differs nowhere: p is 1 everywhere, and each interval holds 0."""
    a, _ = two()
    found = compare(a, a)
    assert all(d.value == 0 and d.p == 1.0 and d.interval[0] <= 0 <= d.interval[1] for d in found.differences)
    assert found.mean is not None
    assert found.mean.p == 1.0


def test_benchmarks_do_not_depend_on_one_another() -> None:
    """Leaving a benchmark out changes the correction of the others, and nothing else of them."""
    a, b = two()
    whole = {d.column: d for d in differences(a, b)}
    without = {c: o for c, o in b.outcomes.items() if c != "MMLU"}
    rest = {d.column: d for d in differences(a, replace(b, outcomes=without))}
    assert set(rest) == {"HumanEval", "GSM8K", "IFEval"}
    for column, d in rest.items():
        assert (d.p, d.interval) == (whole[column].p, whole[column].interval)


def test_only_shared_items_are_compared() -> None:
    """Where one model was asked fewer items, the comparison is on those, and says so; the order of items is nothing."""
    a, b = two()
    task = b.outcomes["GSM8K"].tasks["gsm8k_paper"]
    order = list(range(49, -1, -1))
    part = TaskOutcomes(
        tuple(task.items[i] for i in order),
        tuple(task.docs[i] for i in order),
        {"acc": tuple(task.verdicts["acc"][i] for i in order)},
    )
    short = replace(b, outcomes={**b.outcomes, "GSM8K": Outcomes({"gsm8k_paper": part})})
    found = compare(a, short)
    d = next(d for d in found.differences if d.column == "GSM8K")
    assert d.n == 50
    right = [r.outcomes["GSM8K"].tasks["gsm8k_paper"].verdicts["acc"][:50] for r in (a, b)]
    assert d.only_b == sum(x < y for x, y in zip(*right, strict=True))
    assert "GSM8K: compared on the 50 items that both answered (A 400, B 50)." in found.remarks


def test_what_cannot_be_compared_is_refused() -> None:
    """Another version of the data, another metric, and results without outcomes are one sentence each."""
    a, b = two()
    task = b.outcomes["HumanEval"].tasks["humaneval"]
    other = replace(task, docs=("00000000", *task.docs[1:]))
    with pytest.raises(BadInputError, match="Item 0 of humaneval is another question"):
        compare(a, replace(b, outcomes={**b.outcomes, "HumanEval": Outcomes({"humaneval": other})}))
    scores = {**b.scores, "HumanEval": replace(b.scores["HumanEval"], metric="pass@10")}
    with pytest.raises(UsageError, match="HumanEval is pass@1 of out/ties and pass@10"):
        compare(a, replace(b, scores=scores))
    with pytest.raises(UsageError, match="no benchmark in common"):
        compare(a, replace(b, outcomes={}))


def test_different_settings_are_said() -> None:
    """A setting that changes what is asked is said where A and B differ in it, and where only one has a benchmark."""
    a, b = made("ties"), made("ties_aim", preset="lm-eval", dtype_used="float32")
    remarks = compare(a, replace(b, scores={c: s for c, s in b.scores.items() if c != "MMLU"})).remarks
    assert any(r.startswith("preset is paper for A and lm-eval for B") for r in remarks)
    assert any(r.startswith("dtype_used is bfloat16") for r in remarks)
    assert "MMLU: only A was evaluated on it." in remarks


def test_several_samples_are_graded_items() -> None:
    """pass@1 of several samples per item is a share, not right or wrong: tested by permutation."""
    a, b = two()

    def sampled(result: EvalResult, seed: int) -> EvalResult:
        rng = np.random.default_rng(seed)
        task = result.outcomes["HumanEval"].tasks["humaneval"]
        shares = tuple(float(rng.integers(0, 5)) / 4 for _ in task.items)
        outcomes = Outcomes({"humaneval": replace(task, verdicts={"pass@1": shares})})
        return replace(result, outcomes={"HumanEval": outcomes})

    (d,) = differences(sampled(a, 1), sampled(b, 2))
    assert d.test == "permutation"
    assert d.interval[0] < d.value < d.interval[1]


def test_hv_gain_bootstrap_repeats_by_seed() -> None:
    """Gains drawn again with the same seed are the same, with another seed others; their middle is near the gain."""
    models = assemble(family(), {}, silent)
    gains = all_gains(models, Measure(), silent)
    first, again, other = (gain_draws(models, gains, Measure(), 300, seed) for seed in (1, 1, 2))
    assert set(first) == {"out/ties", "out/ties_aim"}
    for model in first:
        assert np.array_equal(first[model], again[model])
        assert not np.array_equal(first[model], other[model])
        assert np.median(first[model]) == pytest.approx(gains.values[model], abs=0.02)


def test_hv_gain_interval_covers() -> None:
    """Over 60 simulated evaluations of the same models, the interval of a gain holds its true value nearly always."""
    true = {m: [100 * SKILLS[m][c] for c in ("HumanEval", "GSM8K")] for m in ("ties", "code", "maths")}
    expected = Measure().gain(true["ties"], [true["code"], true["maths"]], ("HumanEval", "GSM8K"))
    covered = 0
    for study in range(60):
        rng = np.random.default_rng(study)
        results = []
        for model, scores in true.items():
            columns = {}
            for column, skill in zip(("HumanEval", "GSM8K"), scores, strict=True):
                columns[column] = column_outcomes(column, (rng.random(150) < skill / 100).astype(int).tolist())
            result = made(model, {})
            outcomes = {c: o for c, (o, _) in columns.items()}
            results.append(replace(result, scores={c: s for c, (_, s) in columns.items()}, outcomes=outcomes))
        models = assemble(results, {}, silent)
        gains = all_gains(models, Measure(), silent)
        low, high = np.quantile(gain_draws(models, gains, Measure(), 300, study)["out/ties"], [0.025, 0.975])
        covered += low <= expected <= high
    assert covered >= 53


def test_gain_needs_the_same_items() -> None:
    """A population member without outcomes, or asked other items, leaves the interval of a gain out."""
    results = {r.model: r for r in family()}
    code = results["out/code"]
    task = code.outcomes["GSM8K"].tasks["gsm8k_paper"]
    fewer = TaskOutcomes(task.items[:-1], task.docs[:-1], {"acc": task.verdicts["acc"][:-1]})
    for outcomes in ({}, {**code.outcomes, "GSM8K": Outcomes({"gsm8k_paper": fewer})}):
        changed = [*(r for r in results.values() if r is not code), replace(code, outcomes=outcomes)]
        models = assemble(changed, {}, silent)
        gains = all_gains(models, Measure(), silent)
        assert len(gains.values) == 2
        assert gain_draws(models, gains, Measure(), 100, 0) == {}
        remarks: list[str] = []
        assert compare_gains(models, "out/ties", "out/ties_aim", Measure(), 0, remarks.append) is None
        assert any("same items" in warn for warn in remarks)


def test_gains_over_different_populations_are_not_compared() -> None:
    """Gains whose populations differ are no row of a comparison, and it says so; over one population they are."""
    other = made("ties_code", SKILLS["ties"], replace(made("ties").lineage, models=("out/code", "out/base")))
    models = assemble([*family(), other], {}, silent)
    remarks: list[str] = []
    assert compare_gains(models, "out/ties", "out/ties_code", Measure(), 0, remarks.append) is None
    assert any("{code, maths} and {base, code}" in warn or "{code, base}" in warn for warn in remarks), remarks
    one = Measure({name: ["code"] for name in ("ties", "ties_code", "ties_aim")})
    found = compare_gains(models, "out/ties", "out/ties_code", one, 0, remarks.append)
    assert found is not None
    assert found.population == ("code",)
    assert found.interval[0] <= found.b - found.a <= found.interval[1]


def test_marks_follow_the_comparison() -> None:
    """A row is marked where the comparison with its merge is significant after correction, and nowhere else."""
    models = assemble(family(), {}, silent)
    gains = all_gains(models, Measure(), silent)
    noise = uncertainty(models, gains, Measure(), silent)
    expected = {("out/ties_aim", d.column) for d in differences(*two()) if d.is_significant}
    assert ("out/ties_aim", "GSM8K") in expected
    assert {place for place in noise.significant if place[1] != "HV Gain"} == expected
    low, high = noise.changes["out/ties_aim", "HV Gain"]
    assert (("out/ties_aim", "HV Gain") in noise.significant) == (low > 0 or high < 0)
    assert low < gains.values["out/ties_aim"] - gains.values["out/ties"] < high
    assert (noise.compared, noise.pairs) == (1, 1)


def test_script_by_folder_and_by_name(tmp_path: Path) -> None:
    """Folders of one model, and names or labels with --results, mean the same; the latter have HV gain too."""
    write_family(tmp_path)
    by_folder = script(tmp_path / "out__ties", tmp_path / "out__ties_aim", "--quiet")
    by_name = script("TIES", "out/ties_aim", "--results", tmp_path, "--names", "ties=TIES")
    assert (by_folder.returncode, by_name.returncode) == (0, 0), by_name.stderr
    assert "GSM8K" in by_folder.stdout
    assert "Statistically significant: GSM8K" in by_folder.stdout
    same = [line.split() for line in by_name.stdout.splitlines() if not line.startswith(("HV Gain", "Statistically"))]
    assert same == [line.split() for line in by_folder.stdout.splitlines() if not line.startswith("Statistically")]
    assert "Statistically significant: GSM8K (+10.75), HV Gain (+0.068)." in by_name.stdout.splitlines()
    assert "HV Gain over {code, maths}" in by_name.stdout


def test_a_checkpoint_is_no_results_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without results, as of a checkpoint, does not stand for a model that --results lacks."""
    write_family(tmp_path / "results")
    (tmp_path / "tiess").mkdir()
    assert run(compare_main, [str(tmp_path / "tiess"), "ties_aim", "--results", str(tmp_path / "results")]) == 2
    assert "or a model of --results" in capsys.readouterr().err


def test_example_of_the_document(tmp_path: Path) -> None:
    """The example in docs/analysis.md is what the script prints for the made results, some lines left out."""
    text = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
    example = text.split("```text\nbenchmark ")[1].split("```")[0]
    printed = script("ties", "ties_aim", "--results", write_family(tmp_path)).stdout
    assert [line for line in f"benchmark {example}".splitlines() if line not in printed.splitlines()] == []


def test_script_formats(tmp_path: Path) -> None:
    """JSON holds every number of the table; Markdown is a table; the same command gives the same bytes."""
    write_family(tmp_path)
    arguments = ("ties", "ties_aim", "--results", tmp_path)
    first = script(*arguments, "--format", "json")
    assert first.stdout == script(*arguments, "--format", "json").stdout
    data: dict[str, Any] = json.loads(first.stdout)
    found = {d["column"]: d for d in data["differences"]}
    expected = {d.column: d for d in differences(made("ties"), made("ties_aim"))}
    assert found["GSM8K"]["p"] == expected["GSM8K"].p
    assert found["IFEval"]["interval"] == list(expected["IFEval"].interval)
    assert data["hv_gain"]["population"] == ["code", "maths"]
    markdown = script(*arguments, "--format", "markdown").stdout
    assert markdown.count("| GSM8K | 400 |") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ties", "tys_aim", "--results", "."], "Did you mean 'ties_aim'"),
        ([".", "out__ties"], "means 5 models"),
        (["absent", "out__ties"], "is not there"),
        (["out__ties", "out__ties_aim", "--draws", "5"], "at least 100"),
        (["code", "ties", "--results", ".", "--reference", "2"], "fraction below 1"),
        (["code", "ties", "--results", ".", "--reference", "MMLV=0.2"], "Did you mean 'MMLU'"),
        (["code", "ties", "--results", ".", "--root", "0"], "positive number"),
    ],
)
def test_script_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    """A model that is not there or not one, and gains over different populations: one sentence, exit code 2."""
    write_family(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(compare_main, arguments) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(("p", "shown"), [(0.00001, "<0.0001"), (0.0123, "0.0123"), (0.25, "0.25"), (1.0, "1.00")])
def test_shown_p(p: float, shown: str) -> None:
    """Small p-values keep four decimals; none is shown as 0."""
    assert shown_p(p) == shown
