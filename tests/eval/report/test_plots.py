"""Plots: files that are whole and hold what they should; fronts; labels that do not hide one another."""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from common.figures import method_looks
from eval.report.fronts import GAINED, LOST, pareto_front, variants
from eval.report.labels import Label, place
from eval.report.plots import curved, plot_omega_curves, plot_pareto, save
from eval.results.reader import load
from eval.results.result import EvalResult, Lineage, Score
from eval.results.rows import Models, assemble
from eval.stats.gains import Measure, all_gains
from eval.stats.uncertainty import uncertainty
from tests.helpers.forked import run_script
from tests.helpers.made_results import sweep

ROOT = Path(__file__).resolve().parents[3]
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
            name = f"{method}{omega}-{len(results)}" if omega in omegas else method
            results.append(result(name, scores, Lineage(method, "base", ("one", "two"), omega)))
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
    assert size(content)[0] == 1650  # 5.5 in at 300 dpi
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


@pytest.mark.parametrize("omegas", [(0.4,), (0.8, 0.4, 0.0)])
def test_text_is_readable_in_a_column(omegas: tuple[float, ...]) -> None:
    """Every text of every figure is at least 7 pt when the figure is printed 5.5 in wide."""
    from matplotlib.text import Text

    models = made(omegas)
    pairs = list(itertools.combinations(models.columns, 2))
    figures = [plot_pareto(models, pairs, silent), plot_pareto(models, pairs[:1], silent)]
    figures += [plot_omega_curves(models, all_gains(models, Measure(), silent).values)] if len(omegas) > 1 else []
    for figure in figures:
        figure.draw_without_rendering()
        scale = min(1.0, 5.5 / figure.get_figwidth())
        texts_of = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_text() and t.get_visible()]
        assert len(texts_of) > 10
        assert min(t.get_fontsize() * scale for t in texts_of) >= 7


def test_each_omega_is_its_own_front() -> None:
    """With several omegas a front holds the rows of one of them, never the best of all; with one each, one front."""
    models = made((0.8, 0.4, 0.0))
    sets = variants(models)
    assert [v.label for v in sets] == ["AIM, omega 0.8", "AIM, omega 0.4", "AIM, omega 0"]
    assert all({row.lineage.omega for row in v.rows} == {float(v.label.split()[-1])} for v in sets)
    assert len({v.color for v in sets}) == 3
    figure = plot_pareto(models, [("task0", "task2")], silent)
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    colors = {line.get_color() for line in lines if len(list(line.get_xdata())) > 2}  # type: ignore[arg-type]
    assert colors == {v.color for v in sets}
    assert not figure.axes[0].collections  # no area between the front without AIM and the best of all
    (single,) = variants(made((0.4,)))
    assert len(single.rows) == 2
    twice = made((0.4, 0.4))
    assert [len(v.rows) for v in variants(twice)] == [2, 2]


def test_methods_keep_their_marker() -> None:
    """A method has one marker and color in every figure, whichever other methods are drawn; no two share a marker."""
    every = sorted(f.stem for f in (ROOT / "configs" / "methods").glob("*.yaml"))
    looks = method_looks(every)
    assert len({marker for marker, _ in looks.values()}) == len(every) == len(looks)
    for i in range(len(every)):
        some = every[i : i + 3]
        assert method_looks(some) == {name: looks[name] for name in some}
        assert method_looks(reversed(some)) == method_looks(some)
    assert method_looks(["Ties Merging"])["Ties Merging"] == looks["ties"]
    assert method_looks(["DARE Task Arithmetic"])["DARE Task Arithmetic"] == looks["dare_linear"]
    assert method_looks(["my_own"]) == {"my_own": method_looks(["my_own", "ties"])["my_own"]}
    crowd = method_looks([f"method{i}" for i in range(60)])
    assert len(crowd) == 60


def test_gains_and_losses_differ_in_color() -> None:
    """The areas gained and lost have colors of their own, and differ in gray by a hatch."""
    figure = plot_pareto(made((0.4,)), [("task0", "task2")], silent)
    faces = [tuple(area.get_facecolor()[0][:3]) for area in figure.axes[0].collections]
    assert len(faces) == len(set(faces)) == 2
    assert GAINED["facecolor"][:7] != LOST["facecolor"][:7]
    assert LOST["hatch"]
    assert not GAINED.get("hatch")


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_one_format(tmp_path: Path, kind: str) -> None:
    """A file name with a format's ending is written in that format alone, to the same bytes each time."""
    models = made((0.4,))
    starts = {"png": PNG, "svg": b"<?xml", "pdf": b"%PDF"}
    files = [save(plot_pareto(models, [("task0", "task1")], silent), tmp_path / f"{n}.{kind}") for n in "ab"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a.{kind}", f"b.{kind}"]
    first, second = (file.read_bytes() for (file,) in files)
    assert first == second
    assert first.startswith(starts[kind])


NASTY = ("$x$ and $y", "_hidden", "two\nlines", "x" * 200, "<b>", "模型 ω", "a\\b", "50 %")


def test_any_label_and_number_of_models(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Sixty merges by sixty methods, and labels of any characters, are drawn without a warning."""
    none = Lineage()
    results = [EvalResult(f"out/s{i}", {"a$": Score("acc", 10.0 + i), "_b": Score("acc", 40.0 - i)}) for i in range(8)]
    for i in range(60):
        lineage = Lineage(NASTY[i % 8] + str(i), "out/base", (f"out/s{i % 7}", f"out/s{i % 7 + 1}"), None)
        scores = {"a$": Score("acc", 20.0 + i % 13), "_b": Score("acc", 20.0 + i % 7)}
        results.append(EvalResult(f"out/m{i}", scores, lineage))
        results.append(EvalResult(f"out/m{i}_aim", scores, replace(lineage, omega=0.4)))
    models = assemble(results, {f"s{i}": name for i, name in enumerate(NASTY)}, silent)
    assert none not in [row.lineage for row in models.rows if row.merged]
    files = save(plot_pareto(models, [("a$", "_b")], silent), tmp_path / "many")
    assert all(file.stat().st_size > 1000 for file in files)
    assert [str(w.message) for w in recwarn.list] == []


def test_bands_are_the_intervals() -> None:
    """A band of an omega curve runs along the 95 % intervals of its points; without intervals there is none."""
    models = assemble(sweep(), {}, silent)
    gains = all_gains(models, Measure(), silent)
    noise = uncertainty(models, gains, Measure(), silent)
    figure = plot_omega_curves(models, gains.values, noise.intervals)
    titles = {ax.get_title(): ax for ax in figure.axes if ax.lines}
    assert list(titles) == ["HV Gain", "HumanEval (%)", "MMLU (%)", "GSM8K (%)", "IFEval (%)"]
    (band,) = titles["GSM8K (%)"].collections
    vertices = {(round(x, 6), round(y, 6)) for x, y in band.get_paths()[0].vertices}  # type: ignore[union-attr]
    for row in models.families[0].rows:
        omega = 1.0 if row.lineage.omega is None else row.lineage.omega
        for end in noise.intervals[row.key, "GSM8K"]:
            assert (omega, round(end, 6)) in vertices
    assert len(titles["HV Gain"].collections) == 1
    bare = plot_omega_curves(models, gains.values)
    assert not any(ax.collections for ax in bare.axes)


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
    return run_script(ROOT / "scripts" / "plot_pareto.py", *arguments)


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
