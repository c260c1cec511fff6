"""Plots: files that are whole and hold what they should; fronts; labels that do not hide one another."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from eval.report.fronts import pareto_front
from eval.report.labels import Label, place
from eval.report.plots import curved, plot_omega_curves, plot_pareto, save
from eval.results.reader import load
from eval.results.result import EvalResult, Lineage, Score
from eval.results.rows import Models, assemble
from eval.stats.gains import Measure, all_gains

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "configs" / "paper_results.json"
PNG = b"\x89PNG\r\n\x1a\n"


def silent(sentence: str) -> None:
    """Hear no remarks."""


def made(omegas: tuple[float, ...], tasks: int = 3) -> Models:
    """A base, two fine-tuned models, and merges of both by two methods with AIM at `omegas`."""

    def result(model: str, scores: list[float], lineage: Lineage) -> EvalResult:
        return EvalResult(model, {f"task{i}": Score("acc", s) for i, s in enumerate(scores[:tasks])}, lineage)

    none = Lineage()
    results = [result("base", [20, 30, 25], none), result("one", [90, 25, 20], none), result("two", [15, 95, 30], none)]
    for at, method in enumerate(("ties", "widen")):
        for omega in (None, *omegas):
            gain = 0.0 if omega is None else 10.0 * (1.0 - omega)
            scores = [60.0 + gain, 60.0 + 5 * at + gain, 40.0 - gain]
            results.append(result(f"{method}{omega}", scores, Lineage(method, "base", ("one", "two"), omega)))
    return assemble(results, {}, silent)


def size(png: bytes) -> tuple[int, int]:
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def texts(svg: str) -> str:
    return " ".join(re.findall(r">([^<>]+)</(?:text|tspan)>", svg))


def test_front() -> None:
    """The front is what nothing else equals or beats in both, by rising x."""
    points = [(1.0, 9.0), (5.0, 5.0), (5.0, 4.0), (4.0, 5.0), (9.0, 1.0), (5.0, 5.0), (2.0, 2.0)]
    assert pareto_front(points) == [(1.0, 9.0), (5.0, 5.0), (9.0, 1.0)]
    assert pareto_front([]) == []
    front = pareto_front([(float(x * 37 % 101), float(x * x % 89)) for x in range(60)])
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(front))


def test_paper_grid(tmp_path: Path) -> None:
    """All pairs of the published results: both files, print resolution, all labels as text in the SVG."""
    models = load([PAPER], {}, silent)
    png, svg = save(
        plot_pareto(models, list(itertools.combinations(models.columns, 2)), pytest.fail), tmp_path / "grid.v1"
    )
    assert (png.name, svg.name) == ("grid.v1.png", "grid.v1.svg")
    content = png.read_bytes()
    assert content.startswith(PNG)
    assert size(content) == (1650, 2620)
    words = texts(svg.read_text(encoding="utf-8"))
    for label in ("Base", "Code", "Math", "Instruction Tuned"):
        assert words.count(label) >= 15, label
    for label in (*models.columns, "front with AIM", "front without AIM", "merge with AIM", "WIDEN", "Ties Merging"):
        assert label in words


def test_same_results_same_bytes(tmp_path: Path) -> None:
    """A plot depends on the results alone: drawn twice, both files are the same bytes."""
    models = made((0.4,))
    first = save(plot_pareto(models, [("task0", "task1")], pytest.fail), tmp_path / "a")
    second = save(plot_pareto(models, [("task0", "task1")], pytest.fail), tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_labels_do_not_touch() -> None:
    """In a crowd no two placed labels overlap, none covers a marker, all are inside; those without room are counted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), dpi=100)
    ax = figure.subplots()
    points = [(x * 0.07 % 1, x * x * 0.031 % 1) for x in range(24)]
    ax.plot(*zip(*points, strict=True), "o", ms=3)
    figure.draw_without_rendering()
    left_out = place(ax, [Label(f"label number {i}", p, "black") for i, p in enumerate(points)], points, [])
    figure.draw_without_rendering()
    assert len(ax.texts) == len(points) - left_out
    assert left_out < 8
    assert not any(a.overlaps(b) for a, b in itertools.combinations(_text_boxes(ax), 2))
    frame = ax.get_window_extent().padded(3)
    for box in _text_boxes(ax):
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1
        assert not any(box.contains(*ax.transData.transform(point)) for point in points)


def _text_boxes(ax: Axes) -> list[Bbox]:
    """Extents of the words alone, without the lines that lead to their points."""
    from matplotlib.text import Text

    return [Text.get_window_extent(text) for text in ax.texts]


def test_single_panel_names_the_front(tmp_path: Path) -> None:
    """One pair: the merges on the fronts are named, by their method where all merge the same models."""
    _, svg = save(plot_pareto(made((0.4,)), [("task0", "task1")], pytest.fail), tmp_path / "one")
    words = texts(svg.read_text(encoding="utf-8"))
    assert words.count("WIDEN") == 2  # on the front and in the legend
    _, svg = save(plot_pareto(load([PAPER], {}, silent), [("GSM8K", "MBPP")], pytest.fail), tmp_path / "paper")
    assert "Code + Instruction" in texts(svg.read_text(encoding="utf-8"))


@pytest.mark.parametrize("omegas", [(), (0.4,), (1.0, 0.4, 0.0)])
def test_any_family_is_drawn(tmp_path: Path, omegas: tuple[float, ...]) -> None:
    """Without AIM rows, with one omega, with several: a plot comes out, and its legend says only what is in it."""
    _, svg = save(plot_pareto(made(omegas), [("task0", "task1"), ("task0", "task2")], pytest.fail), tmp_path / "p")
    words = texts(svg.read_text(encoding="utf-8"))
    assert ("front with AIM" in words) == bool(omegas)
    assert "front without AIM" in words


def test_omega_curves(tmp_path: Path) -> None:
    """Curves of HV gain and each score over omega, with the merge itself at omega 1."""
    models = made((0.8, 0.4, 0.0))
    gains = all_gains(models, Measure(), silent).values
    assert len(gains) == 8
    figure = plot_omega_curves(models, gains)
    drawn = [ax for ax in figure.axes if ax.lines]
    assert [ax.get_title() for ax in drawn] == ["HV Gain", "task0 (%)", "task1 (%)", "task2 (%)"]
    curve = drawn[1].lines[0]
    assert list(curve.get_xdata(orig=True)) == [0.0, 0.4, 0.8, 1.0]  # type: ignore[arg-type]
    assert curve.get_ydata(orig=True) == pytest.approx((70.0, 66.0, 62.0, 60.0))
    png, svg = save(figure, tmp_path / "omega")
    assert png.read_bytes().startswith(PNG)
    assert "omega" in texts(svg.read_text(encoding="utf-8"))
    assert curved(made((0.4,))) == []


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "plot_pareto.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)


def test_script(tmp_path: Path) -> None:
    """The script prints the two files it wrote, for one pair and for one set of models."""
    stem = tmp_path / "sub" / "p"
    done = script(PAPER, "--x", "HumanEval", "--y", "MATH", "--only", "Code + Math", "--out", stem)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{stem}.png", f"{stem}.svg"]
    assert sorted(path.name for path in stem.parent.iterdir()) == ["p.png", "p.svg"]
    assert "Instruction" not in texts(Path(f"{stem}.svg").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--x", "Human"], "Did you mean 'HumanEval'"),
        (["--x", "MATH", "--y", "MATH"], "both MATH"),
        (["--only", "Code + Maths"], "Did you mean 'Code + Math'"),
        (["--omega_curves"], "two omegas or more"),
    ],
)
def test_script_refuses(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    """A benchmark, a set of models or curves that the results do not have: one sentence, exit code 2, no file."""
    done = script(PAPER, *arguments, "--out", tmp_path / "p")
    assert done.returncode == 2
    assert sentence.lower() in done.stderr.lower()
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
