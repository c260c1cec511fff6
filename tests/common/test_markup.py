"""Labels of any characters stay what they are in Markdown, CSV, LaTeX, HTML and figures."""

from __future__ import annotations

import csv
import html
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from common.markup import csv_text, figure_text, markdown_text, one_line
from eval.report.card import update_card
from eval.report.comparison_text import to_markdown as comparison_markdown
from eval.report.comparison_text import to_text
from eval.report.latex import escaped, to_latex
from eval.report.page_html import tables
from eval.report.report import Report, make_report, ranking
from eval.report.tables import to_csv, to_markdown, to_ranking
from eval.results.reader import parse_names
from eval.results.result import Lineage
from eval.results.rows import assemble
from eval.results.store import table
from eval.stats.comparison import compare
from eval.stats.gains import Measure
from tests.helpers.made_results import family

NASTY = (
    "a|b", "<b>bold</b><script>", "=1+1", "+1", "-1", "@SUM(A1)", "[1] first", "[link](http://x)", "![i](x)", "*star*",
    "_under_score_", "snake_case", "`code`", "```", "# head", "$x$ and $y$", "50 % & more", "R&amp;D", "~~gone~~",
    "back\\slash", "a\\|b", "line\nbreak", "tab\there", "\r=cmd", "1. one", "{brace}", "^hat", "quo\"te's", "a--b",
    "ünïcødé ω 模型", "\u202eturned", "x" * 200, "\ud800half", "---", "===", "> quote", "\x07bell", "a,b;c",
)  # fmt: skip
MARKDOWN = MarkdownIt("commonmark").enable("table").enable("strikethrough")


def silent(sentence: str) -> None:
    """Hear no remarks."""


def shown(cell: str) -> str:
    """A rendered cell as a reader sees it."""
    return html.unescape(re.sub(r"<[^<>]*>", "", cell)).strip()


def cells(markdown: str) -> list[list[str]]:
    """The rows of every table of a Markdown text, as an independent parser renders them."""
    rows = re.findall(r"<tr>(.*?)</tr>", MARKDOWN.render(markdown), re.DOTALL)
    return [[shown(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def report_of(label: str) -> Report:
    """A family whose fine-tuned models, benchmark and method are called `label`."""
    results = []
    for r in family():
        lineage = replace(r.lineage, method=label) if r.lineage.method else Lineage()
        scores = {**{c: s for c, s in r.scores.items() if c != "MMLU"}, label: r.scores["MMLU"]}
        outcomes = {c: o for c, o in r.outcomes.items() if c != "MMLU"}
        results.append(replace(r, lineage=lineage, scores=scores, outcomes=outcomes))
    return make_report(assemble(results, {"code": label, "maths": f"{label} 2"}, silent), Measure(), silent)


@pytest.mark.parametrize("label", NASTY)
def test_markdown(label: str) -> None:
    """A label in a cell, a header and a heading is rendered as itself, and no table gains or loses a cell."""
    report = report_of(label)
    rows = cells(to_markdown(report))
    assert len(rows) == 7
    assert {len(row) for row in rows} == {8}
    assert one_line(label) in rows[0]
    assert [row[1] for row in rows[2:4]] == [one_line(label), f"{one_line(label)} 2"]
    assert rows[5][0].startswith(one_line(label))
    assert rows[5][-1] == f"{one_line(label)}, {one_line(label)} 2"
    rendered = MARKDOWN.render(to_markdown(report))
    assert one_line(label) in [shown(head) for head in re.findall(r"<h3>(.*?)</h3>", rendered)]
    assert "<script" not in to_markdown(report)
    ranked = cells(to_ranking(report, ranking(report, label), label))
    assert one_line(label) in ranked[0]
    assert {len(row) for row in ranked} == {5}


@pytest.mark.parametrize("label", NASTY)
def test_screen_and_comparison(label: str) -> None:
    """The table on the screen and a comparison hold labels as one line each, in as many cells as there are."""
    results = [replace(r, model=f"out/{label}") for r in family()[3:]]
    rows = cells(table(results))
    assert {len(row) for row in rows} == {5}
    assert rows[1][0] == one_line(Path(f"out/{label}").name)
    found = compare(*results, draws=100)
    text = to_text(found, None, 100, 0)
    assert text.splitlines()[0] == f"A: {one_line(f'out/{label}')}"
    text = comparison_markdown(found, None, 100, 0)
    assert {len(row) for row in cells(text)} == {12}
    assert f"A: {one_line(f'out/{label}')}" in shown(MARKDOWN.render(text))


@pytest.mark.parametrize("label", NASTY)
def test_csv(label: str) -> None:
    """No cell begins as a formula, labels are one line, and every row has the header's number of cells."""
    rows = list(csv.reader(io.StringIO(to_csv(report_of(label)))))
    assert len(rows) == 6
    assert len({len(row) for row in rows}) == 1
    for row in rows:
        for cell in row:
            assert not re.match(r"[=+@\t\r]|-(?![\d.]|$|inf)", cell), cell
            assert "\n" not in cell
            assert "\r" not in cell
    assert rows[2][1] == csv_text(label)
    assert rows[2][1].removeprefix("'") == one_line(label)


@pytest.mark.parametrize("label", NASTY)
def test_latex_is_balanced(label: str) -> None:
    """Each special character is escaped, braces are balanced, no row begins as an argument, rows have all cells."""
    text = to_latex(report_of(label))
    body = re.sub(r"\\[\\{}&%$#_]|\\text\w+\{\}", "", text.split("\\fi\n")[1])
    assert body.count("{") == body.count("}")
    assert body.count("$") % 2 == 0
    assert not re.search(r"(\\\\|\\midrule|\\addlinespace|\\toprule)\s*[\[*]", text)
    for environment in text.split(r"\toprule")[1:]:
        lines = [line for line in environment.split(r"\bottomrule")[0].splitlines() if line.endswith(r"\\")]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in lines}) == 1
    labels = re.findall(r"\\label\{([^}]*)\}", text)
    assert len(set(labels)) == len(labels)
    assert "tab:aim-" not in labels


def test_latex_characters() -> None:
    """Characters that LaTeX reads as commands, arguments, ligatures or other fonts."""
    assert escaped("[a]*") == "{[}a{]}{*}"
    assert escaped("a--b `c`") == r"a-{}-b \textasciigrave{}c\textasciigrave{}"
    assert escaped("λ = 0.4\nω") == r"$\lambda$ = 0.4 $\omega$"


@pytest.mark.parametrize("label", NASTY)
def test_html(label: str) -> None:
    """The page's tables hold a label as text."""
    text = tables(report_of(label))
    assert "<script" not in text
    assert "<b>bold" not in text


@pytest.mark.parametrize("label", ["a|b", "<b>x", "[x](y)", "=1", "line\nbreak", "*s*"])
def test_card(tmp_path: Path, label: str) -> None:
    """The section of a model card holds names as text."""
    results = [replace(r, model=r.model.replace("code", f"code{label}")) for r in family()]
    lineage = Lineage("ties", "out/base", (f"out/code{label}", "out/maths"), None)
    results[3:] = [replace(r, lineage=replace(lineage, omega=r.lineage.omega)) for r in results[3:]]
    report = make_report(assemble(results, {}, silent), Measure(), silent)
    update_card(tmp_path / "card.md", "ties", report)
    rows = cells((tmp_path / "card.md").read_text(encoding="utf-8").split("---\n", 2)[2])
    assert {len(row) for row in rows} == {7}
    assert rows[3][0] == f"{one_line(f'code{label}')} (merged in it)"


@pytest.mark.parametrize("label", NASTY)
def test_figures(label: str) -> None:
    """A label in a figure is no mathematics, one line, and at most 40 characters."""
    from matplotlib.cbook import is_math_text

    text = figure_text(label)
    assert "\n" not in text
    assert len(text.replace(r"\$", "$").lstrip("\u200b")) <= 40
    assert not is_math_text(text)[1] if isinstance(is_math_text(text), tuple) else not is_math_text(text)
    assert not text.startswith("_")


def test_names_with_equals_signs() -> None:
    """A label or a path may hold an equals sign; which part is the model follows from the results."""
    results = [replace(r, model=r.model.replace("code", "omega=0.4")) for r in family()[:3]]
    given = parse_names(["base=omega=1", "omega=0.4=Code=x", "out/maths=Math"])
    labels = [row.label for row in assemble(results, given, silent).sources]
    assert sorted(labels) == ["Code=x", "Math", "omega=1"]


def test_markdown_text_keeps_names() -> None:
    """Ordinary names of models stay as they are."""
    for name in ("ties_aim_0.4", "Llama-2-13b", "Code + Math", "org/name@v1", "TIES (omega 0.4)", "a.b:c"):
        assert markdown_text(name) == csv_text(name) == figure_text(name) == name
