"""Tables: the published ones cell by cell, pairing, populations, columns, files in and out, bad files."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.errors import EvaluationError, ProjectError, UsageError
from common.files.paths import write_whole
from eval.report.report import Report, make_report, percentage
from eval.report.tables import to_csv, to_markdown
from eval.results.reader import load, parse_names
from eval.results.result import COLUMNS, EvalResult, Lineage, Score
from eval.results.rows import Models
from eval.stats.gains import Measure
from eval.stats.hypervolume import PAPER_POPULATION
from tests.helpers.forked import run_script

ROOT = Path(__file__).resolve().parents[3]
PAPER = ROOT / "configs" / "paper_results.json"
NEW, OLD = "results_2026-02-01T10-00-00.000001.json", "results_2026-01-01T10-00-00.000001.json"
TASKS = ("adding", "reversing", "coding")
FAMILY = {"base": (20.0, 30.0, 25.0), "one": (90.0, 25.0, 20.0), "two": (15.0, 95.0, 30.0)}


def silent(sentence: str) -> None:
    """Hear no remarks."""


def put(
    folder: Path, model: str, scores: Sequence[float] | Mapping[str, float], lineage: Lineage | None = None, **more: Any
) -> Path:
    """Write a results file as evaluate_model.py does; return its path."""
    named = scores if isinstance(scores, Mapping) else dict(zip(TASKS, scores, strict=True))
    result = EvalResult(
        f"out/{model}",
        {name: Score("exact_match", value, 1.0, 100) for name, value in named.items()},
        lineage or Lineage(),
        settings=more.get("settings", {}),
    )
    path = folder / f"out__{model}" / more.get("file", NEW)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result.to_json()))
    return path


def merge_of(*models: str, method: str = "ties", omega: float | None = None) -> Lineage:
    return Lineage(method, "out/base", tuple(f"out/{model}" for model in models), omega)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A base, two fine-tuned models, and TIES of both without AIM and at omega 0.4."""
    for model, scores in FAMILY.items():
        put(tmp_path, model, scores)
    put(tmp_path, "ties_12", (60.0, 64.0, 32.0), merge_of("one", "two"))
    put(tmp_path, "ties_12_aim", (63.0, 64.0, 30.0), merge_of("one", "two", omega=0.4))
    return tmp_path


def report_of(models: Models, rule: Any = "merged") -> tuple[Report, list[str]]:
    remarks: list[str] = []
    return make_report(models, Measure(rule), remarks.append), remarks


def cells(report: Report) -> dict[tuple[str, str, str], list[str]]:
    """(method, models, AIM) -> cells as printed in Markdown."""
    found = {}
    for line in report.lines:
        texts = [c.text.replace(c.number, f"**{c.number}**", 1) if c.lead else c.text for c in line.cells]
        found[line.method, line.label, line.aim] = texts
    return found


def script(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run_script(ROOT / "scripts" / "make_tables.py", *arguments, cwd=cwd)


def test_paper_tables_cell_by_cell(tmp_path: Path) -> None:
    """The command of docs/analysis.md prints each cell of the 44 published rows, bold included, in the published order,
    and behind each gain the population that it is over."""
    done = script(PAPER, "--population", "paper", "--csv", tmp_path / "t.csv")
    assert done.returncode == 0, done.stderr
    expected, title, above = [], "", ""
    names = {"dare_linear": "DARE Task Arithmetic", "dare_ties": "DARE Ties", "ties": "Ties Merging"}
    names |= {"task_arithmetic": "Task Arithmetic", "widen": "WIDEN"}
    data = json.loads(PAPER.read_text(encoding="utf-8"))
    for row in data["rows"]:
        method = names.get(row["method"], "Base Models")
        if method != title:
            title, above = method, ""
            expected.append(("## " if row["method"] is None else "### ") + title)
        label = " + ".join(data["names"][model] for model in row["models"] or [row["model"]])
        start = ["-", label, "-"] if row["method"] is None else [label, "No"] if row["omega"] is None else ["", "Yes"]
        assert row["omega"] is None or label == above
        above = label
        over = [", ".join(PAPER_POPULATION[frozenset(label.split(" + "))])] if row["method"] else []
        expected.append("|" + "".join(f" {c} |" if c else " |" for c in (*start, *row["printed"].values(), *over)))
    found = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("### ", "## Base", "|")) and "---" not in line and "HV Gain" not in line
    ]
    assert found == expected
    assert len([line for line in expected if line.startswith("|")]) == 44


def test_printed_cells_are_only_test_data() -> None:
    """The tables come from the scores: without the published cells, and with other ones, they are the same."""
    data = json.loads(PAPER.read_text(encoding="utf-8"))
    for row in data["rows"]:
        for name, value in row["scores"].items():
            assert row["printed"][name].split(" ")[0].strip("*") == f"{value:.2f}"
    for file in [*(ROOT / "eval" / "results").glob("*.py"), *(ROOT / "eval" / "stats").glob("*.py")]:
        assert '"printed"' not in file.read_text(), file


def test_default_population_is_said_and_differs() -> None:
    """Over the models merged, the TIES gain of Code + Instruction Tuned is 0 with and without AIM, so no percentage."""
    report, _ = report_of(load([PAPER], {}, silent))
    found = cells(report)
    assert found["Ties Merging", "Code + Instruction Tuned", "Yes"][-1] == "0.00"
    assert found["Task Arithmetic", "Code + Instruction Tuned", "Yes"][-1] == "0.23 (-2.43%)"
    assert '"merged"' in report.note
    assert "6th root" in report.note
    paper, _ = report_of(load([PAPER], {}, silent), "paper")
    assert '"paper"' in paper.note
    assert "print the largest of all in bold" in paper.note
    over = {line.label: line.population for line in paper.lines if line.population}
    assert over["Instruction Tuned + Math"] == ("Code", "Instruction Tuned")


def test_own_benchmarks(family: Path) -> None:
    """Results without the paper's benchmarks get columns of their own, and a gain over just these."""
    report, remarks = report_of(load([family], parse_names(["one=One,./out/two/=Two"]), silent))
    assert report.columns == TASKS
    assert remarks == []
    found = cells(report)
    assert found["-", "One", "-"] == ["**90.00**", "25.00", "20.00", "-"]
    assert found["Ties Merging", "One + Two", "No"][:3] == ["60.00", "**64.00**", "**32.00**"]
    assert found["Ties Merging", "One + Two", "Yes"][:3] == ["**63.00** (+5.00%)", "**64.00**", "30.00 (-6.25%)"]
    # Inclusion-exclusion by hand: the box of the merge less what One and Two take of it, in thousandths.
    volume = 600 * 640 * 320 - 600 * 250 * 200 - 150 * 640 * 300 + 150 * 250 * 200
    assert found["Ties Merging", "One + Two", "No"][-1].strip("*") == f"{(volume / 1e9) ** (1 / 3):.2f}"
    assert "cube root" in report.note
    assert report.sources is not None
    assert [line.label for line in report.sources.lines] == ["base", "One", "Two"]


def test_csv_round_trip(family: Path) -> None:
    """Reading the CSV back gives the printed cells of every row, the populations, and the unrounded numbers."""
    put(family, "ties, odd", (61.23456, 64.0, 31.0), merge_of("one", "two", method='my "method", odd'))
    report, _ = report_of(load([family], {}, silent))
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    lines = [line for table in (report.sources, *report.methods) if table for line in table.lines]
    assert len(rows) == len(lines) == 6
    for row, line in zip(rows, lines, strict=True):
        assert (row["Method"], row["Model(s)"], row["AIM"]) == (line.method, line.label, line.aim)
        assert [row[name] for name in (*TASKS, "HV Gain")] == [cell.text for cell in line.cells]
        for name, cell in zip((*TASKS, "HV Gain"), line.cells, strict=True):
            assert row[f"{name} (unrounded)"] == ("" if cell.value is None else repr(cell.value))
        assert tuple(filter(None, row["Population"].split("; "))) == (line.population or ())
        assert row["Checkpoint"] == line.row.model
    assert rows[-1]["Omega"] == "0.4"
    assert [float(row["adding (unrounded)"]) for row in rows if "odd" in row["Method"]] == [61.23456]


def test_missing_scores_stay_empty(family: Path) -> None:
    """A benchmark that a row lacks is '-', its gain too, with a remark; a column no result has is left out."""
    put(family, "two", {"MMLU": 50.0, "adding": 15.0})
    put(family, "widen_12", {"adding": 40.0, "MMLU": 60.0}, merge_of("one", "two", method="widen"))
    report, remarks = report_of(load([family], {}, silent))
    assert report.columns == ("MMLU", *TASKS)
    found = cells(report)
    assert found["-", "two", "-"][2:] == ["-", "-", "-"]
    assert found["WIDEN", "one + two", "No"] == ["60.00", "40.00", "-", "-", "-"]
    assert any("one has no score for MMLU" in warn for warn in remarks)


def test_population_member_without_result(family: Path) -> None:
    """A fine-tuned model without a result leaves the gain '-' and says so once; the scores are still compared."""
    (family / "out__two" / NEW).unlink()
    report, remarks = report_of(load([family], {}, silent))
    assert cells(report)["Ties Merging", "one + two", "Yes"][0::3] == ["**63.00** (+5.00%)", "-"]
    assert remarks == ["HV gain over one, two: no result of two was given, so the cell stays '-'."]
    assert script(family, "--csv", family / "t.csv").returncode == 0


def test_population_file(family: Path) -> None:
    """A file sets the population by row label or checkpoint; rows it leaves out stay '-'; unknown rows are refused."""
    models = load([family], {}, silent)
    report, _ = report_of(models, {"one + two": ["one"], "ties_12_aim": ["base", "two"]})
    assert report.methods[0].lines[0].population == ("one",)
    assert report.methods[0].lines[1].population == ("base", "two")
    left_out, remarks = report_of(models, {"ties_12": []})
    assert [line.cells[-1].text == "-" for line in left_out.methods[0].lines] == [False, True]
    assert any("no population is known" in warn for warn in remarks)
    with pytest.raises(UsageError, match=r"(?i)did you mean 'one \+ two'"):
        report_of(models, {"one + tow": ["one"]})
    with pytest.raises(UsageError, match="--population paper"):
        report_of(models, "paper")


def test_several_omegas(family: Path) -> None:
    """Each omega has its row after the unrelaxed merge, weak to strong; percentages are relative to it."""
    put(family, "ties_12_aim0", (66.0, 60.0, 28.0), merge_of("one", "two", omega=0.0))
    put(family, "ties_12_aim1", (60.0, 64.0, 32.0), merge_of("one", "two", omega=1.0))
    report, _ = report_of(load([family], {}, silent))
    lines = report.methods[0].lines
    assert [line.aim for line in lines] == ["No", "Yes (1)", "Yes (0.4)", "Yes (0)"]
    assert [line.cells[0].text for line in lines] == ["60.00", "60.00", "63.00 (+5.00%)", "66.00 (+10.00%)"]


def test_two_merges_of_the_same_models(family: Path) -> None:
    """Two merges by one method are told apart by name; an AIM row belongs to the one that its name begins with."""
    put(family, "ties_12b", (50.0, 50.0, 50.0), merge_of("one", "two"))
    put(family, "ties_12b_aim", (55.0, 50.0, 50.0), merge_of("two", "one", omega=0.4))
    put(family, "other_aim", (70.0, 70.0, 70.0), merge_of("one", "two", omega=0.4))
    remarks: list[str] = []
    found = cells(report_of(load([family], {}, remarks.append))[0])
    assert found["Ties Merging", "one + two (ties_12)", "Yes"][0] == "63.00 (+5.00%)"
    assert found["Ties Merging", "one + two (ties_12b)", "Yes"][0] == "55.00 (+10.00%)"
    assert found["Ties Merging", "one + two (other_aim)", "Yes"][0] == "**70.00**"
    assert any("other_aim" in warn for warn in remarks)


def test_newest_result_counts(family: Path) -> None:
    """In a folder the newest file of a model counts; files given one by one are put together, the later one first."""
    old = put(family, "one", {"adding": 1.0, "MMLU": 9.0}, file=OLD)
    remarks: list[str] = []
    models = load([family], {}, remarks.append)
    assert models.find("one").scores["adding"] == 90.0  # type: ignore[union-attr]
    assert models.columns == TASKS
    assert any("is left out (MMLU of" in warn for warn in remarks)
    models = load([family, old], {}, remarks.append)
    assert models.find("one").scores == {"adding": 1.0, "reversing": 25.0, "coding": 20.0, "MMLU": 9.0}  # type: ignore[union-attr]
    assert any("several results for adding" in warn for warn in remarks)


def test_limited_scores_are_said(family: Path) -> None:
    """Scores of a part of a benchmark are called that beside the tables."""
    put(family, "one", FAMILY["one"], settings={"limit": 50})
    assert (
        "Samples, not whole benchmarks (adding 100, reversing 100, coding 100 items)"
        in report_of(load([family], {}, silent))[0].note
    )
    put(family, "one", FAMILY["one"], settings={"limit": None})
    assert "items" not in report_of(load([family], {}, silent))[0].note


def test_paths_that_moved(family: Path) -> None:
    """A merge that names its models by another path finds them by the last part of it, where that is unique."""
    lineage = Lineage("widen", "/old/place/base", ("/old/place/two/", "./one"), None)
    put(family, "w", (50.0, 50.0, 50.0), lineage)
    report, remarks = report_of(load([family], {}, silent))
    assert ("WIDEN", "one + two", "No") in cells(report)
    assert remarks == []


def test_merge_without_record_keeps_its_name(family: Path) -> None:
    """AIM on a checkpoint without a run record has no method and no models: its name stands, and no gain."""
    put(family, "found_aim", (50.0, 50.0, 50.0), Lineage(None, "out/base", (), 0.4))
    report, remarks = report_of(load([family], {}, silent))
    assert cells(report)["Unrecorded method", "found_aim", "Yes"][-1] == "-"
    assert any("no population is known" in warn for warn in remarks)


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (34.4, 36.0, "+4.65%"),
        (8.6, 8.6, None),
        (0.0, 0.05, "+inf%"),
        (0.0, 0.0, None),
        (4.0, 0.0, "-100.00%"),
        (0.3, 0.3 + 1e-12, None),
        (0.3, 0.3 - 1e-12, None),
    ],
)
def test_percentage(before: float, after: float, shown: str | None) -> None:
    """Relative change to 2 decimals; none where nothing changed; from 0 it is +inf, and 0 to 0 is no change."""
    assert percentage(before, after) == shown


def test_percentages_are_those_of_printed_scores(tmp_path: Path) -> None:
    """A benchmark's percentage is that of the two printed values, which a reader can check."""
    put(tmp_path, "m", (0.004, 33.334, 33.3349), merge_of("one", "two"))
    put(tmp_path, "m_aim", (0.001, 33.336, 33.3251), merge_of("one", "two", omega=0.4))
    found = cells(report_of(load([tmp_path], {}, silent))[0])["Ties Merging", "one + two", "Yes"]
    assert found[:3] == ["**0.00**", "**33.34** (+0.03%)", "**33.33**"]


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("absent.json", None, UsageError, "does not exist"),
        ("empty", None, UsageError, "no results_"),
        ("cut.json", '{"aim": {"schema": 1, "mod', EvaluationError, "not valid JSON"),
        ("bytes.json", b"\xff\xfe\x00", EvaluationError, "not valid JSON"),
        ("plain.json", '{"results": {}}', EvaluationError, "not a results file"),
        ("list.json", "[1, 2]", EvaluationError, "not a results file"),
        ("paper.json", '{"format": "paper_results", "rows": [{}]}', EvaluationError, "published results' format"),
    ],
)
def test_bad_files(
    tmp_path: Path, name: str, content: str | bytes | None, error: type[ProjectError], match: str
) -> None:
    """A file that is absent, cut short or of another kind is one sentence that names it; nothing is written."""
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(error, match=match) as caught:
        load([path], {}, silent)
    assert name in str(caught.value)
    done = script(path, "--csv", tmp_path / "out.csv")
    assert done.returncode == caught.value.exit_code
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()


def test_score_that_is_no_number(family: Path) -> None:
    """A score that is not finite is refused with its file and benchmark, not printed as nan."""
    put(family, "one", (float("nan"), 1.0, 2.0))
    with pytest.raises(EvaluationError, match="adding is nan"):
        load([family], {}, silent)


def test_names() -> None:
    """--names takes path=Label, several parted by commas; a path no result knows is refused with the nearest."""
    assert parse_names(["a/b=C, d=E + F", "x=Y"]) == {"a/b": "C", "d": "E + F", "x": "Y"}
    for bad in ("a", "=b", "a="):
        with pytest.raises(UsageError, match="path=Label"):
            parse_names([bad])
    with pytest.raises(UsageError, match="no result or lineage"):
        load([PAPER], {"widen": "W"}, silent)


def test_scripts_output(family: Path) -> None:
    """stdout holds the tables alone; --quiet silences remarks; the CSV replaces an older one whole."""
    out = family / "deep" / "t.csv"
    first = script(family, "--csv", out)
    assert first.returncode == 0
    assert str(out) in first.stderr
    before = out.read_bytes()
    again = script(family, "--csv", out, "--quiet")
    assert (again.returncode, again.stderr, again.stdout) == (0, "", first.stdout)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["t.csv"]
    assert script(family, "--csv", family).returncode == 1
    assert script("--populations", "x", family).returncode == 2


def test_write_whole_leaves_old_file(tmp_path: Path) -> None:
    """A write that fails leaves the old file as it was and no other one behind."""
    path = tmp_path / "t.csv"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_whole(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["t.csv"]


def test_markdown_escapes_pipes(tmp_path: Path) -> None:
    """A pipe in a label stays one cell."""
    put(tmp_path, "a", FAMILY["one"])
    text = to_markdown(report_of(load([tmp_path], {"a": "A|B"}, silent))[0])
    assert "| A\\|B |" in text
    assert text.startswith("## Base Models")
    assert "Merged" not in text


def test_columns_are_the_papers() -> None:
    """Published results have the paper's six columns in its order."""
    assert load([PAPER], {}, silent).columns == COLUMNS
