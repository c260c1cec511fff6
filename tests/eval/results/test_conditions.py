"""Evaluation conditions: what is joined in one row, what tables and comparisons do where conditions differ."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from eval.report.comparison_text import verdict
from eval.report.report import make_report, ranking
from eval.results import conditions
from eval.results.collection import packed, unpacked
from eval.results.reader import load, read_all
from eval.results.result import EvalResult, Lineage, Score
from eval.results.rows import assemble
from eval.settings import Settings
from eval.stats.comparison import compare
from eval.stats.gains import Measure, all_gains
from eval.stats.hypervolume import hv_gain
from tests.helpers.made_results import family, made, write

CHANGES: dict[str, dict[str, Any]] = {
    "limit": {"limit": 50, "limits": {"": 50}},
    "preset": {"preset": "lm-eval"},
    "apply_chat_template": {"apply_chat_template": True},
    "num_fewshot": {"num_fewshot": {"": 5}},
    "dtype_used": {"dtype_used": "float32"},
    "max_gen_toks": {"max_gen_toks": 64},
    "n_samples": {"n_samples": 10},
    "temperature": {"temperature": 0.8},
    "system_instruction": {"system_instruction": "Think."},
    "enable_thinking": {"model_args": {"enable_thinking": True}},
    "add_bos_token": {"model_args": {"add_bos_token": True}},
}


def silent(sentence: str) -> None:
    """Hear no remarks."""


def part(result: EvalResult, *columns: str, **settings: Any) -> EvalResult:
    """The result of some columns, under other settings."""
    lm_eval = settings.pop("lm_eval", None)
    return replace(
        result,
        scores={c: result.scores[c] for c in columns},
        outcomes={c: result.outcomes[c] for c in columns},
        settings={**result.settings, **settings},
        versions={**result.versions, **({"lm_eval": lm_eval} if lm_eval else {})},
    )


def test_every_setting_has_its_place() -> None:
    """A setting either counts among the conditions of a score or is listed as one that changes none."""
    known = {*conditions.RECORDED, *conditions.UNSCORED}
    assert {field.name for field in fields(Settings)} - known == set()


@pytest.mark.parametrize("name", [*CHANGES, "lm_eval"])
def test_results_of_other_conditions_are_not_joined(tmp_path: Path, name: str) -> None:
    """A run of the same weights under another condition adds no benchmark to the newest result, and the remark names
    the condition; the same run without the change is joined."""
    whole = made("ties")
    change = CHANGES.get(name, {"lm_eval": "0.4.9"})
    write(part(whole, "GSM8K", **change), tmp_path / "a", "2026-01-01T00-00-00.0")
    write(part(whole, "MMLU"), tmp_path / "a", "2026-01-02T00-00-00.0")
    remarks: list[str] = []
    (found,) = read_all([tmp_path / "a"], remarks.append)[0]
    assert set(found.scores) == set(found.outcomes) == {"MMLU"}
    assert len(remarks) == 1
    assert f"{name} " in remarks[0]
    assert "GSM8K" in remarks[0]
    (by_files,) = read_all(sorted((tmp_path / "a").rglob("results_*.json")), silent)[0]
    assert set(by_files.scores) == {"MMLU"}
    write(part(whole, "GSM8K"), tmp_path / "b", "2026-01-01T00-00-00.0")
    write(part(whole, "MMLU"), tmp_path / "b", "2026-01-02T00-00-00.0")
    (joined,) = read_all([tmp_path / "b"], pytest.fail)[0]
    assert set(joined.scores) == {"MMLU", "GSM8K"}


def test_settings_of_one_benchmark_are_joined(tmp_path: Path) -> None:
    """Shots and limits that name a benchmark are what one command could have given: joined, and kept by benchmark."""
    whole = made("ties")
    write(part(whole, "MMLU", num_fewshot={"mmlu": 5}), tmp_path, "2026-01-01T00-00-00.0")
    write(part(whole, "GSM8K", num_fewshot={"gsm8k": 8}, limits={"gsm8k": 40}), tmp_path, "2026-01-02T00-00-00.0")
    (found,) = read_all([tmp_path], pytest.fail)[0]
    assert found.settings["num_fewshot"] == {"mmlu": 5, "gsm8k": 8}
    assert set(found.scores) == {"MMLU", "GSM8K"}


def test_newest_by_time_of_the_run(tmp_path: Path) -> None:
    """Within a folder the run that began last counts, also where the names of files of two machines say otherwise."""
    early, late = (
        replace(made("ties"), harness={"date": 100.0 + hour}, scores={"MMLU": Score("acc", 10.0 + hour)}, outcomes={})
        for hour in (0.0, 1.0)
    )
    write(late, tmp_path, "2026-01-01T00-00-00.0")
    write(early, tmp_path, "2026-01-02T00-00-00.0")
    (found,) = read_all([tmp_path], silent)[0]
    assert found.scores["MMLU"].value == 11.0


def test_published_and_measured_results_stay_apart(tmp_path: Path) -> None:
    """A measured model of a published one's name is another row, wherever both are read."""
    scores = {c: Score("acc", 10.0) for c in ("HumanEval", "GSM8K")}
    write(EvalResult("layoric/llama-2-13b-code-alpaca", scores), tmp_path)
    models = load([Path("configs/paper_results.json"), tmp_path], {}, silent)
    found = [row for row in models.sources if "code-alpaca" in row.model]
    assert [(row.published, len(row.scores)) for row in found] == [(True, 6), (False, 2)]


@pytest.mark.parametrize("name", [*CHANGES, "lm_eval"])
def test_tables_do_not_compare_across_conditions(name: str) -> None:
    """An AIM row under another condition than its merge has no change, no mark, no gain over the others and no bold in
    its column; the note names the condition. Scores still print."""
    results = family()
    change = CHANGES.get(name, {"lm_eval": "0.4.9"})
    results[-1] = part(results[-1], *results[-1].scores, **change)
    if name == "limit":  # the items are fewer, as they would be
        short = made("ties_aim").outcomes["GSM8K"].tasks["gsm8k_paper"]
        short = replace(
            short, items=short.items[:50], docs=short.docs[:50], verdicts={"acc": short.verdicts["acc"][:50]}
        )
        outcomes = {"GSM8K": replace(results[-1].outcomes["GSM8K"], tasks={"gsm8k_paper": short})}
        results[-1] = replace(part(results[-1], "GSM8K"), outcomes=outcomes)
    remarks: list[str] = []
    report = make_report(assemble(results, {}, silent), Measure(), remarks.append)
    (unrelaxed, aim) = report.methods[0].lines
    at = report.columns.index("GSM8K")
    assert aim.cells[at].value == results[-1].scores["GSM8K"].value
    assert aim.cells[at].change is None
    assert aim.cells[at].is_significant is not True
    assert aim.cells[-1].text == "-"
    assert not any(line.cells[at].lead for line in (unrelaxed, aim))
    assert f"{name} " in report.note
    assert any(f"{name} " in warn for warn in remarks)
    with pytest.raises(UsageError, match=f"--rank GSM8K: .*{name} "):
        ranking(report, "GSM8K")


def test_comparison_names_what_differs() -> None:
    """Conditions, prompts, versions, tasks' versions and machines that differ are named; nothing where all agree."""
    hashes = {"prompts_sha256": {"humaneval": "a", "mmlu": "b", "gsm8k_paper": "c", "ifeval": "d"}}
    a = made("ties", **hashes)
    assert compare(a, made("ties_aim", **hashes)).remarks == ()
    other = {"prompts_sha256": {**hashes["prompts_sha256"], "mmlu": "x"}}
    changed = made("ties_aim", **other, preset="lm-eval", num_fewshot={"mmlu": 5}, max_length=2048)
    remarks = compare(
        replace(a, harness={"versions": {"ifeval": 4.0}}, hardware={"cpu": "one"}),
        replace(
            changed,
            versions={"lm_eval": "0.4.9", "torch": "2.13.0"},
            harness={"versions": {"ifeval": 5.0}},
            hardware={"cpu": "two"},
        ),
    ).remarks
    text = "\n".join(remarks)
    assert "preset is paper for A and lm-eval for B" in text
    assert "num_fewshot of MMLU is None for A and 5 for B" in text
    assert "max_length is None for A and 2048 for B" in text
    assert "MMLU: the prompts of A and B differ" in text
    assert "lm_eval 0.4.13 and 0.4.9" in text
    assert "ifeval 4.0 and 5.0" in text
    assert "A was measured on one, B on two." in text
    assert "prompts of A and B could not be compared" not in text
    assert "could not be compared" in "\n".join(compare(made("ties"), made("ties_aim")).remarks)


def test_collections_keep_conditions_and_names() -> None:
    """A collection keeps the conditions, so that the rows of two collections are told apart as the results were; two
    models of one name in different folders stay two."""
    results = [
        replace(made("ties", num_fewshot={"mmlu": 5}), model="a/ties"),
        replace(made("ties_aim"), model="b/ties"),
    ]
    found, _ = unpacked(json.loads(packed(results, {})), "c.json")
    assert len({r.model for r in found}) == 2
    assert found[0].settings["num_fewshot"] == {"mmlu": 5}
    before, after = (conditions.column_differences(*pair, "MMLU") for pair in (results, found))
    assert before == after != {}


def perplexities(result: EvalResult, value: float, **kind: Any) -> EvalResult:
    score = Score("word_perplexity", value, 0.5, 62, **{"higher_is_better": False, "is_fraction": False, **kind})
    return replace(result, scores={**result.scores, "wikitext": score})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({}, "less of word_perplexity is better"),
        ({"is_fraction": True}, "less of word_perplexity is better"),
        ({"higher_is_better": True}, "word_perplexity is no fraction"),
        (
            {"higher_is_better": None, "is_fraction": True},
            "the direction of word_perplexity (higher or lower is better) is unknown",
        ),
    ],
)
def test_other_directions_and_scales_lead_nothing(kind: dict[str, Any], reason: str) -> None:
    """A column of which less is better, that is no fraction, or whose direction is not known has no bold and no part in
    HV gain: the gains are those without it. A fall of a perplexity is an improvement."""
    plain = assemble(family(), {}, silent)
    results = [perplexities(r, 12.3456 - i, **kind) for i, r in enumerate(family())]
    models = assemble(results, {}, silent)
    assert models.gain_columns == plain.columns
    assert all_gains(models, Measure(), silent).values == all_gains(plain, Measure(), silent).values
    report = make_report(models, Measure(), silent)
    at = report.columns.index("wikitext")
    assert not any(line.cells[at].lead for line in report.lines)
    assert f"wikitext ({reason})" in report.note
    assert "4 scores as fractions" in report.note
    assert models.unit("wikitext") == ("wikitext (%)" if kind.get("is_fraction") else "wikitext")
    aim = report.methods[0].lines[1].cells[at]
    assert aim.better == {False: True, True: False, None: None}[kind.get("higher_is_better", False)]
    assert aim.number == ("8.35" if kind.get("is_fraction") else "8.346")
    with pytest.raises(UsageError, match=re.escape(f"no part in HV gain; {reason}")):
        Measure(reference={"wikitext": 0.1}).check(models)


def test_percent_is_no_part_of_a_name() -> None:
    """A metric with "percent" or "perplexity" in its name is what its direction and scale say."""
    results = []
    for i, r in enumerate(family()):
        score = Score("percent_error", 10.0 + i, higher_is_better=True, is_fraction=True)
        results.append(replace(r, scores={"perplexity_quiz": score}, outcomes={}))
    models = assemble(results, {}, silent)
    assert models.gain_columns == ("perplexity_quiz",)
    report = make_report(models, Measure(), silent)
    assert [line.cells[0].lead for line in report.lines] == [False, False, True, False, True]


def test_no_column_counts() -> None:
    """Results of perplexities alone have no HV gain, and it is reported."""
    results = [perplexities(replace(r, scores={}, outcomes={}), 10.0 + i) for i, r in enumerate(family())]
    remarks: list[str] = []
    report = make_report(assemble(results, {}, silent), Measure(), remarks.append)
    assert {line.cells[-1].text for line in report.lines} == {"-"}
    assert any("No HV gain" in warn for warn in remarks)


def test_lower_is_better_in_a_comparison() -> None:
    """Of an error rate the lower score is the better one; such a benchmark is no part of the mean."""
    a, b = made("ties"), made("ties_aim")
    changed = [
        replace(r, scores={**r.scores, "GSM8K": replace(r.scores["GSM8K"], higher_is_better=False)}) for r in (a, b)
    ]
    found = compare(*changed)
    (gsm8k,) = (d for d in found.differences if d.column == "GSM8K")
    assert gsm8k.value > 0
    assert verdict(gsm8k) == "B worse"
    assert found.mean is not None
    rest = [d for d in found.differences if d.column != "GSM8K"]
    assert found.mean.value == pytest.approx(sum(d.value for d in rest) / 3)


def test_equal_scores_share_bold() -> None:
    """All rows whose score prints as the best one are bold; one that prints lower is not."""
    lineage = Lineage("ties", "out/base", ("out/code",), None)
    results = [
        EvalResult(f"out/{name}", {"a": Score("acc", value)}, replace(lineage, method=name))
        for name, value in (("one", 50.001), ("two", 49.999), ("three", 49.99), ("four", 50.0))
    ]
    report = make_report(assemble(results, {}, silent), Measure(), silent)
    assert {line.row.name for line in report.lines if line.cells[0].lead} == {"one", "two", "four"}


def test_gain_of_one_model_by_hand() -> None:
    """HV gain over one model in two benchmarks is the square root of the L-shaped area, by hand."""
    assert hv_gain([60.0, 40.0], [[50.0, 30.0]]) == pytest.approx((0.6 * 0.4 - 0.5 * 0.3) ** 0.5)
    assert hv_gain([60.0, 40.0], [[70.0, 30.0], [30.0, 80.0]]) == pytest.approx((0.3 * 0.1) ** 0.5)
    assert hv_gain([60.0, 40.0], [[60.0, 40.0]]) == 0.0
