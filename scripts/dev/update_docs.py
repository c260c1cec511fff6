"""Fill the generated tables of README.md, REPRODUCTION.md and docs/ from the committed results.

A table stands between `<!-- tables: ARGUMENTS -->` and `<!-- end of tables -->`; it is what
`python scripts/make_tables.py ARGUMENTS` prints. Other parts are `<!-- KIND: FILE -->` to `<!-- end of KIND -->`: the
runs of a script of scripts/benchmarks/ or scripts/dev/, the methods and their parameters (from configs/methods), the
README's rows of results, a program's output, an experiment's differences. Figures are drawn from their results too. A
test fails where a document differs from its results.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.cli import Parser, add_output_flags, run
from common.errors import FailureError
from common.figures import write_figure
from common.files.json_values import JsonValue
from eval.results.result import read_json_file
from scripts.benchmarks.bench_gpu import as_text as gpu
from scripts.benchmarks.bench_tables import performance
from scripts.benchmarks.calibration_deviation import as_text as deviation
from scripts.benchmarks.growth_report import document as growth
from scripts.benchmarks.importance_samples import as_text as samples
from scripts.dev import document_tables, quickstart_figure
from scripts.dev.fuzz import summary as fuzz
from scripts.dev.torture import as_text as torture
from scripts.experiments import document_tables as experiment_tables
from scripts.plot_importance import document as importance
from scripts.plot_importance import draw as importance_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCUMENTS = ("README.md", "REPRODUCTION.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))))
TABLES = re.compile(r"(<!-- tables: (?P<arguments>.*?) -->\n).*?(<!-- end of tables -->)", re.DOTALL)


def tables(arguments: str) -> str:
    """Return what make_tables.py prints for the arguments, headings one level deeper. Raises FailureError."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "scripts/make_tables.py", *shlex.split(arguments), "--csv", f"{scratch}/tables.csv"]
        done = subprocess.run([*command, "--quiet"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise FailureError(f"make_tables.py {arguments}: {done.stderr.strip()}")
    return re.sub(r"^#", "##", done.stdout, flags=re.MULTILINE)


def memory(file: Path) -> str:
    """Return the runs of bench_memory.py as a table: a row per method, a column per run, peak anonymous MiB."""
    runs = read_json_file(file)
    heads = [f"{r['name']}: {r['models']} models, largest tensor {r['largest_mib']} MiB" for r in runs]
    lines = [["method", *heads], ["---", *["---:"] * len(runs)]]
    for method in sorted({method for r in runs for method in r["peak_mib"]}):
        lines.append([method, *(str(r["peak_mib"].get(method, "")) for r in runs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def calibration(file: Path) -> str:
    """Return the runs of bench_calibration.py as a table: a row per run and way."""
    lines = [
        ["checkpoint", "way", "s", "least to most", "peak anonymous MiB", "mapped from files MiB"],
        ["---", "---", *["---:"] * 4],
    ]
    for entry in read_json_file(file):
        tokens = f"{entry['blocks']} x {entry['block_size']} tokens"
        what = f"{entry['name']}, {entry['weights_mib']} MiB, {tokens}, {entry['dtype']}"
        for way, figures in entry["ways"].items():
            spread = f"{figures['seconds_least']:.0f} to {figures['seconds_most']:.0f}"
            memory = [f"{figures[kind]:.0f}" for kind in ("RssAnon", "RssFile")]
            lines.append([what, way, f"{figures['seconds']:.0f}", spread, *memory])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _performance(file: Path) -> str:
    report = read_json_file(file)
    about = report["machine"]
    runs = f"{report['shape']}, {report['models']} models and a base, {about['processor']}, {about['cores']} cores"
    return f"{runs}, {about['date']}:\n\n{performance(report)}"


def _of_json(as_text: Callable[[JsonValue], str]) -> Callable[[Path], str]:
    """Return the function of a results file whose text `as_text` makes of its content."""
    return lambda file: as_text(read_json_file(file))


RESULTS: Mapping[str, Callable[[Path], str]] = {
    "memory": memory, "calibration": calibration, "performance": _performance,
    "deviation": _of_json(deviation),
    "growth": growth, "gpu": _of_json(gpu), "torture": _of_json(torture), "fuzz": _of_json(fuzz),
    "importance": importance, "samples": _of_json(samples),
    "methods": document_tables.methods, "parameters": document_tables.parameters, "results": document_tables.results,
    "output": document_tables.output, "controls": experiment_tables.controls,
}  # fmt: skip
SINGLE = ("methods", "parameters", "results", "output")
"""Kinds of a single table or block."""
FIGURES = re.compile(
    rf"(<!-- (?P<kind>{'|'.join(RESULTS)}): (?P<file>.*?) -->\n).*?(<!-- end of (?P=kind) -->)", re.DOTALL
)


def _spaced(kind: str, part: str) -> str:
    """Return a generated part with blank lines around it where it may be more than one table or block."""
    return f"{part}\n" if kind in SINGLE else f"\n{part}\n\n"


def filled(text: str) -> str:
    """Return a document with its tables made anew."""
    text = FIGURES.sub(lambda m: f"{m[1]}{_spaced(m['kind'], RESULTS[m['kind']](ROOT / m['file']))}{m[4]}", text)
    return TABLES.sub(lambda m: f"{m[1]}\n{tables(m['arguments'])}\n{m[3]}", text)


DRAWN: Mapping[Path, tuple[Callable[[Path], Figure], Path]] = {
    quickstart_figure.FIGURE: (quickstart_figure.draw, quickstart_figure.RESULTS),
    Path("docs/figures/controls.svg"): (experiment_tables.curves_of_results, Path("results/controls.json")),
    Path("docs/figures/importance_distribution.svg"): (importance_figure, Path("results/importance_distribution.json")),
}
"""Figure: the function that draws it, and its results."""


def update_figures(check: bool) -> None:
    """Draw the figures anew. With `check`, raise FailureError where one differs and write nothing."""
    for name, (draw, results) in DRAWN.items():
        file = ROOT / name
        with tempfile.TemporaryDirectory() as scratch:
            drawn = Path(scratch) / name.name
            write_figure(draw(ROOT / results), drawn)
            content = drawn.read_bytes()
        if file.is_file() and file.read_bytes() == content:
            continue
        if check:
            raise FailureError(f"{name} differs from its results; run python scripts/dev/update_docs.py.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="scripts/dev/update_docs.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document differs")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    update_figures(args.check)
    for name in DOCUMENTS:
        file = ROOT / name
        before = file.read_text(encoding="utf-8")
        after = filled(before)
        if before != after and args.check:
            raise FailureError(f"{name} differs from its results; run python scripts/dev/update_docs.py.")
        if before != after:
            file.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
