"""Tables: significance, populations, rankings, the paper's rows; LaTeX, model cards, collections."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from common.errors import BadInputError, UsageError
from eval.report.card import update_card
from eval.report.latex import escaped, to_latex
from eval.report.report import Report, make_report, ranking
from eval.report.tables import to_csv, to_markdown, to_ranking
from eval.results.collection import packed, unpacked
from eval.results.reader import PAPER, load, read_all, together
from eval.results.result import EvalResult, Lineage, Score
from eval.results.rows import assemble, only
from eval.stats.gains import Measure
from eval.stats.hypervolume import hv_gain
from tests.helpers.forked import run_script
from tests.helpers.made_results import SKILLS, family, made, write, write_family

ROOT = Path(__file__).resolve().parents[3]
NAMES = {"code": "Code", "maths": "Math"}


def silent(sentence: str) -> None:
    """Hear no remarks."""


def report_of(results: list[EvalResult]) -> Report:
    return make_report(assemble(results, NAMES, silent), Measure(), silent)


@pytest.fixture(scope="module")
def family_report() -> Report:
    return report_of(family())


def script(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run_script(ROOT / "scripts" / "make_tables.py", *arguments, cwd=cwd)


def test_marks_and_intervals_in_every_form() -> None:
    """A significant change is marked in Markdown, CSV and LaTeX alike; intervals follow numbers with --intervals."""
    report = report_of(family())
    plain, wide = to_markdown(report), to_markdown(report, intervals=True)
    row = next(line for line in plain.splitlines() if line.startswith("| | Yes"))
    gsm8k = row.split(" | ")[4]
    assert gsm8k.endswith("%)†")
    assert "†" not in row.split(" | ")[2]
    assert re.search(r"\*\*\d+\.\d\d\*\* \[\d+\.\d\d, \d+\.\d\d\] \(\+\d+\.\d\d%\)†", wide)
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert rows[-1]["GSM8K (significant)"] == "yes"
    assert rows[-1]["HumanEval (significant)"] == "no"
    assert rows[-2]["GSM8K (significant)"] == rows[-2]["GSM8K (change low)"] == ""
    low, value, high = (float(rows[-1][f"GSM8K ({name})"]) for name in ("low", "unrounded", "high"))
    assert low < value < high
    assert float(rows[-1]["GSM8K (change low)"]) > 0
    assert r"$^\dagger$" in to_latex(report)
    assert "†" in report.note


def test_without_outcomes_nothing_is_marked() -> None:
    """Without outcomes per item there is no mark, interval or note on significance; partial outcomes are reported."""
    bare = [replace(r, outcomes={}) for r in family()]
    assert "†" not in to_markdown(report_of(bare), intervals=True)
    other = made("ties_low", SKILLS["ties"], Lineage("ties", "out/base", ("out/code", "out/maths"), 0.2))
    assert "1 of 2 AIM rows have no outcomes" in report_of([*family(), replace(other, outcomes={})]).note


def test_results_on_other_data_are_not_compared() -> None:
    """An AIM row that was asked another version of a benchmark is said, and not marked; its scores still print."""
    remarks: list[str] = []
    results = {r.model: r for r in family()}
    aim = results["out/ties_aim"]
    tasks = aim.outcomes["GSM8K"].tasks
    changed = {t: replace(o, docs=tuple("f" * 8 for _ in o.docs)) for t, o in tasks.items()}
    moved = replace(aim, outcomes={**aim.outcomes, "GSM8K": replace(aim.outcomes["GSM8K"], tasks=changed)})
    models = assemble([*(r for r in results.values() if r is not aim), moved], NAMES, silent)
    text = to_markdown(make_report(models, Measure(), remarks.append))
    assert any("another question" in warn for warn in remarks)
    assert "†" not in text.split("HV Gain:")[0]


def test_gains_lead_within_their_population() -> None:
    """The largest gain is bold among rows of one population; only the published tables rank all gains together."""
    models = load([PAPER], {}, silent)
    merged = make_report(models, Measure(), silent)
    led = [line for line in merged.lines if line.cells[-1].lead]
    assert len({line.population for line in led}) == len(led) == 4
    paper = make_report(models, Measure("paper"), silent)
    assert len([line for line in paper.lines if line.cells[-1].lead]) == 1


def test_ranking_refuses_different_populations() -> None:
    """Rows are ranked by a benchmark; by HV gain only where all are over one population, which stands beside each."""
    models = load([PAPER], {}, silent)
    report = make_report(models, Measure(), silent)
    best = ranking(report, "GSM8K")
    assert [line.cells[4].value for line in best] == sorted((line.cells[4].value for line in best), reverse=True)
    assert len(best) == 44
    with pytest.raises(UsageError, match="different populations"):
        ranking(report, "HV Gain")
    with pytest.raises(UsageError, match="Did you mean 'GSM8K'"):
        ranking(report, "GSM8")
    some = make_report(only(models, "Code + Math"), Measure(), silent)
    text = to_ranking(some, ranking(some, "HV Gain"), "HV Gain")
    assert text.count("| Code, Math |") == 10
    one = {label: ["Code"] for label in {f.label for f in models.families}}
    assert len(ranking(make_report(models, Measure(one), silent), "HV Gain")) == 40


def test_reference_and_root() -> None:
    """--reference and --root are those of hv_gain: a corner by benchmark, and the plain volume with root 1."""
    models = load([PAPER], {}, silent)
    corner = {"MMLU": 0.25, "GSM8K": 0.01}
    report = make_report(models, Measure("merged", corner, 1), silent)
    line = next(line for line in report.lines if line.method == "WIDEN" and line.label == "Code + Math")
    scores = {s.label: [s.scores[c] for c in models.columns] for s in models.sources}
    expected = hv_gain(
        [line.row.scores[c] for c in models.columns],
        [scores["Code"], scores["Math"]],
        reference=[0, 0, 0.25, 0, 0.01, 0],
        root=1,
    )
    assert line.cells[-1].value == expected
    assert line.cells[-1].number == f"{expected:.3g}"
    assert "reference at MMLU 0.25, GSM8K 0.01" in report.note
    assert "HV Gain: hypervolume that" in report.note


def test_own_results_in_the_papers_tables(tmp_path: Path) -> None:
    """--with_paper puts a measured merge beside the published ones: marked, paired with its own merge, its gain over
    the published models that it merges, and the published cells as they were."""
    merged = ("vanillaOVO/WizardMath-13B-V1.0", "layoric/llama-2-13b-code-alpaca")
    scores = {"HumanEval": 20.0, "MBPP": 30.0, "MMLU": 53.0, "MATH": 14.0, "GSM8K": 63.0, "IFEval": 25.0}
    for name, omega, more in (("mine", None, 0.0), ("mine_aim", 0.4, 1.0)):
        values = {c: Score("acc", v + more) for c, v in scores.items()} | {"arc": Score("acc", 1.0)}
        write(EvalResult(f"out/{name}", values, Lineage("ties", "unsloth/llama-2-13b", merged, omega)), tmp_path)
    done = script(tmp_path, "--with_paper", "--csv", tmp_path / "t.csv")
    assert done.returncode == 0, done.stderr
    assert "left out: arc" in done.stderr
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("| Code + Math ‡ | No | 20.00"))
    assert lines[at + 1].startswith("| | Yes | 21.00 (+5.00%)")
    assert lines[at].endswith("| Code, Math |")
    alone = script(PAPER, "--csv", tmp_path / "p.csv").stdout
    published = [line.replace("*", "") for line in alone.splitlines() if line.startswith("|")]
    assert [line for line in published if line not in done.stdout.replace("*", "")] == []
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [row["Published"] for row in rows].count("no") == 2
    population = [[row[c] for c in scores] for row in rows if row["Model(s)"] in ("Code", "Math")]
    expected = hv_gain(list(scores.values()), [[float(v) for v in row] for row in population])
    assert [float(row["HV Gain (unrounded)"]) for row in rows if row["Checkpoint"] == "out/mine"] == [expected]


def test_a_published_model_measured_again_has_two_rows(tmp_path: Path) -> None:
    """A source model that was evaluated here stands beside its published self; measured merges gain over the former."""
    scores = {"HumanEval": 10.0, "MBPP": 10.0, "MMLU": 10.0, "MATH": 10.0, "GSM8K": 10.0, "IFEval": 10.0}
    write(EvalResult("layoric/llama-2-13b-code-alpaca", {c: Score("acc", v) for c, v in scores.items()}), tmp_path)
    lineage = Lineage("ties", "unsloth/llama-2-13b", ("layoric/llama-2-13b-code-alpaca",), None)
    write(EvalResult("out/mine", {c: Score("acc", 2 * v) for c, v in scores.items()}, lineage), tmp_path)
    models = load([tmp_path], {}, silent, with_paper=True)
    assert [row.label for row in models.sources].count("Code") == 2
    report = make_report(models, Measure(), silent)
    mine = next(line for line in report.lines if line.row.model == "out/mine")
    assert mine.cells[-1].value == hv_gain([20.0] * 6, [[10.0] * 6])


needs_latex = pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex here (texlive-latex-recommended)")


@needs_latex
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "by input"])
def test_latex_compiles(tmp_path: Path, inside: bool) -> None:
    """The file compiles as it is and by \\input, whatever characters labels hold, with marks and intervals."""
    results = [replace(r, model=r.model.replace("maths", r"m_a%t$h#s&~^\{}<>|")) for r in family()]
    lineage = Lineage("ties", "out/base", ("out/code", r"out/m_a%t$h#s&~^\{}<>|"), None)
    results[3] = replace(results[3], lineage=lineage)
    results[4] = replace(results[4], lineage=replace(lineage, omega=0.4))
    report = make_report(assemble(results, {"code": "Code 100 %"}, silent), Measure({"ties": ["Code 100 %"]}), silent)
    (tmp_path / "tables.tex").write_text(to_latex(report, intervals=True), encoding="utf-8")
    (tmp_path / "whole.tex").write_text(
        "\\documentclass[twocolumn]{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs,graphicx}\n"
        "\\begin{document}\nBefore.\n\\input{tables}\nAfter.\n\\end{document}\n"
    )
    name = "whole" if inside else "tables"
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", f"{name}.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / f"{name}.log").read_text(errors="replace")
    assert "Overfull" not in log
    assert "Missing character" not in log


def test_latex_escapes() -> None:
    """Each special character is set as itself."""
    assert escaped(r"a_b & 5% \x{}") == r"a\_b \& 5\% \textbackslash{}x\{\}"


CARD = """---
license: llama2   # as the base
base_model:
- a/b
- c/d
model-index:
- name: old
  results:
  - task:
      type: text-generation
    dataset:
      name: ARC
      type: ai2_arc
    metrics:
    - type: accuracy
      value: 51.0
tags: [merge]
---

# Title

Text with --- in it.

## Recipe

```yaml
model-index: no
```
"""


def test_card_has_what_the_hub_reads(tmp_path: Path, family_report: Report) -> None:
    """The hub's own reader finds each score in the card; other entries, keys, comments and text stay as they were."""
    folder = tmp_path / "ties_aim"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    done = update_card(folder, None, family_report)
    assert (done.model, done.path) == ("out/ties_aim", folder / "README.md")
    text = (folder / "README.md").read_text()
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model, card.data.tags) == ("llama2", ["a/b", "c/d"], ["merge"])
    assert "license: llama2   # as the base\n" in text
    found = {(r.dataset_name, r.metric_value) for r in card.data.eval_results}
    scores = made("ties_aim").scores
    assert found == {(c, round(s.value, 4)) for c, s in scores.items()} | {("ARC", 51.0)}
    types = {r.dataset_name: r.dataset_type for r in card.data.eval_results}
    assert types["HumanEval"] == "openai/openai_humaneval"
    index = yaml.safe_load(text.split("---")[1])["model-index"]
    name, results = model_index_to_eval_results(index)
    assert (name, len(results)) == ("ties_aim", 5)
    arguments = next(r.metric_args for r in results if r.dataset_name == "GSM8K")
    assert arguments["n"] == 400
    assert arguments["ci95"][0] < scores["GSM8K"].value < arguments["ci95"][1]
    for part in CARD.split("---\n", 2)[2].split("\n\n"):
        assert part.strip() in text


def test_card_section_shows_what_was_gained(tmp_path: Path, family_report: Report) -> None:
    """The section has the model, its merge without AIM and the models merged, marks, settings, and the population."""
    (tmp_path / "card.md").write_text("# T\n")
    update_card(tmp_path / "card.md", "ties_aim", family_report)
    text = (tmp_path / "card.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| **ties_aim**",
        "| ties (without AIM)",
        "| code (merged in it)",
        "| maths (merged in it)",
    ]
    assert "†" in rows[2]
    assert rows[2].endswith("| Code, Math |")
    assert "preset paper" in text
    assert "lm-eval 0.4.13" in text


def test_card_twice_is_card_once(tmp_path: Path, family_report: Report) -> None:
    """Writing again changes no byte; newer results replace older ones, and nothing around them moves."""
    path = tmp_path / "README.md"
    for text in (CARD, "# Bare\n", "", "---\nlicense: mit\n---\n"):
        path.write_text(text)
        update_card(path, "ties", family_report)
        once = path.read_bytes()
        update_card(path, "ties", family_report)
        assert path.read_bytes() == once
        path.write_text(once.decode() + "\nLater words.\n")
        update_card(path, "ties", family_report)
        assert path.read_text().endswith("<!-- end of evaluation -->\n\nLater words.\n")
        assert path.read_text().count("## Evaluation") == 1
    path.unlink()
    update_card(tmp_path, "base", family_report)
    assert path.read_text().startswith("---\nmodel-index:")
    assert "HV" not in path.read_text()


@pytest.mark.parametrize(
    ("text", "model", "error", "match"),
    [
        ("# x", "tys", UsageError, "Did you mean 'ties'"),
        ("# x", None, UsageError, "--card_model"),
        ("---\na: [\n---\n", "ties", BadInputError, "not valid YAML"),
        ("---\n- a\n---\n", "ties", BadInputError, "keys and values"),
        ("---\n{license: mit}\n---\n", "ties", BadInputError, "cannot be added|not valid YAML"),
    ],
)
def test_bad_cards_stay_as_they_are(
    tmp_path: Path, family_report: Report, text: str, model: str | None, error: type[Exception], match: str
) -> None:
    """A card that cannot be read, or a model that is not one of the results: one sentence, no byte changed."""
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(error, match=match):
        update_card(path, model, family_report)
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_script_writes_all_forms(tmp_path: Path) -> None:
    """One run prints Markdown with a ranking and writes CSV, LaTeX and the card; a wrong flag writes none of them."""
    write_family(tmp_path / "results")
    (tmp_path / "ties_aim").mkdir()
    outputs = ("--csv", tmp_path / "t.csv", "--latex", tmp_path / "t.tex", "--update_card", tmp_path / "ties_aim")
    bad = script(tmp_path / "results", *outputs, "--rank", "MMLV")
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results", "ties_aim"]
    done = script(tmp_path / "results", *outputs, "--rank", "HV Gain", "--intervals")
    assert done.returncode == 0, done.stderr
    assert "## Ranking by HV Gain" in done.stdout
    assert (tmp_path / "t.csv").is_file()
    assert r"\toprule" in (tmp_path / "t.tex").read_text()
    assert "model-index" in (tmp_path / "ties_aim" / "README.md").read_text()


def test_collections_keep_outcomes() -> None:
    """A collection gives back scores, outcomes and names of every model, with what was asked written once."""
    results = family()
    text = packed(results, NAMES)
    found, names = unpacked(json.loads(text), "c.json")
    assert names == NAMES
    for before, after in zip(results, found, strict=True):
        assert after.scores == before.scores
        assert after.outcomes == before.outcomes
        assert after.model == Path(before.model).name
        assert after.digest == before.digest
    assert text.count('"items"') == 5
    assert len(text.splitlines()) == len(results) + 2
    assert make_report(assemble(found, names, silent), Measure(), silent).note == report_of(results).note


@pytest.mark.parametrize("broken", ['{"format":"results_collection"}', '{"format":"results_collection","results":[3]}'])
def test_broken_collections(tmp_path: Path, broken: str) -> None:
    """A collection without a part is one sentence that names the file."""
    (tmp_path / "c.json").write_text(broken)
    with pytest.raises(BadInputError, match=r"c\.json"):
        read_all([tmp_path / "c.json"], silent)


def test_results_of_the_same_weights_are_put_together(tmp_path: Path) -> None:
    """Benchmarks evaluated in two runs of the same weights make one row; of other weights the newest run counts."""
    whole = made("ties")
    first = replace(whole, scores={"MMLU": whole.scores["MMLU"]}, outcomes={"MMLU": whole.outcomes["MMLU"]})
    second = replace(whole, scores={"GSM8K": whole.scores["GSM8K"]}, outcomes={"GSM8K": whole.outcomes["GSM8K"]})
    write(first, tmp_path, "2026-01-01T00-00-00.0")
    write(second, tmp_path, "2026-01-02T00-00-00.0")
    (found,) = read_all([tmp_path], silent)[0]
    assert set(found.scores) == set(found.outcomes) == {"MMLU", "GSM8K"}
    assert found.scores == together(first, second).scores
    write(replace(second, digest="sha256:other"), tmp_path, "2026-01-03T00-00-00.0")
    remarks: list[str] = []
    (found,) = read_all([tmp_path], remarks.append)[0]
    assert set(found.scores) == {"GSM8K"}
    assert any("is left out (MMLU of" in warn for warn in remarks)
