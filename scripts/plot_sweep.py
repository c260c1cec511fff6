"""Plot how far each omega of a sweep stays from the base, layer by layer, and print it as a table.

Reads the run records of OUT/omega-* (or of several outputs of one merge), made with `--layer_stats`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, add_output_flags, run
from common.errors import UsageError
from common.figures import DPI, MARKERS, WIDTH, check_figure_file, in_style, legend_rows, ordered_colors, write_figure
from common.files.json_types import Fields, ListOf, Maybe, check_shape
from common.files.json_values import JsonObject
from common.files.paths import read_json, user_path
from common.logging import logger
from common.markup import markdown
from merging.output.staging.output_path import RECORD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Sweep = Mapping[float, Sequence[JsonObject]]
"""{omega: its layer statistics, one row per layer}."""


ROW = Fields({"layer": str, "merged": float, "norms": ListOf(Maybe(float))})
SWEPT = Fields({"lineage": Fields({"omega": Maybe(float)}), "inputs": Any}, {"layer_statistics": Maybe(ListOf(ROW))})
"""Types in a run record that are read here."""


def main(argv: Sequence[str]) -> int:
    """Read, print, plot."""
    parser = Parser(prog="scripts/plot_sweep.py", description=__doc__)
    parser.add_argument("outputs", nargs="+", type=user_path, metavar="OUT", help="a sweep's folder, or single outputs")
    parser.add_argument("--out", type=user_path, metavar="FILE", help="a .png, .svg or .pdf file for the plot")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    check_figure_file(args.out, "--out")
    sweep = read_sweep(args.outputs)
    print(table(sweep))
    if args.out is not None:
        write_figure(plot(sweep), args.out)
        logger.info(f"Plot written to {args.out}.")
    return 0


def read_sweep(outputs: Sequence[Path]) -> Sweep:
    """Return the figures of every omega, in order. Raises UsageError for outputs without them, or of several merges."""
    folders = [result_folder for out in outputs for result_folder in (sorted(out.glob("omega-*")) or [out])]
    sweep: dict[float, Sequence[JsonObject]] = {}
    origin = None
    for folder in folders:
        record = read_json(folder / RECORD, f"{folder} is no output of merge.py or performAIM.py: it has no {RECORD}.")
        check_shape(record, SWEPT, str(folder / RECORD))
        omega, rows = record["lineage"]["omega"], record.get("layer_statistics")
        if omega is None or not rows:
            raise UsageError(f"{folder} has no layer statistics of an omega; make it with --omega and --layer_stats.")
        of = ({**record["lineage"], "omega": None}, record["inputs"])
        origin = origin or of
        if of != origin:
            raise UsageError(f"{folder} is of another merge than {folders[0]}; a plot shows one.")
        first = next(iter(sweep.values()), rows)
        if [row["layer"] for row in rows] != [row["layer"] for row in first]:
            raise UsageError(f"{folder} has other layers than {folders[0]}; a plot shows those of one model.")
        if omega in sweep:
            raise UsageError(f"{folder} has omega {omega:g}, which is there already.")
        sweep[omega] = rows
    return dict(sorted(sweep.items()))


def table(sweep: Sweep) -> str:
    """Return a row per layer: the norm of the merge's task vector, and for each omega how much of it is left."""
    first = next(iter(sweep.values()))
    rows = []
    for i, row in enumerate(first):
        whole = merged_norm(row)
        shares = [rows_of[i]["merged"] / whole if whole else None for rows_of in sweep.values()]
        cells = ["-" if share is None else f"{100 * share:.1f} %" for share in shares]
        rows.append([row["layer"], f"{whole:.4g}", *cells])
    heads = ["layer", "norm of the merge", *(f"omega {omega:g}" for omega in sweep)]
    return markdown(heads, rows)


def merged_norm(row: JsonObject) -> float:
    """The norm of the merged task vector before it was relaxed: performAIM.py's one model is the merge."""
    if len(row["norms"]) != 1:
        raise UsageError("A plot of a sweep needs the outputs of performAIM.py, whose one model is the merge.")
    result: float = row["norms"][0] or 0.0
    return result


def plot(sweep: Sweep) -> Figure:
    """Draw the norm that is left of each layer's task vector, and its part of the merge's, a line for each omega."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    first = next(iter(sweep.values()))
    layers = [i for i, row in enumerate(first) if row["layer"].rpartition(".")[2].isdigit()]
    stacks = list(dict.fromkeys(first[i]["layer"].rpartition(".")[0] for i in layers))
    numbers = [int(first[i]["layer"].rpartition(".")[2]) for i in layers] if len(stacks) == 1 else range(len(layers))
    along = "layer" if len(stacks) == 1 else f"layer of {', then '.join(stacks)}"
    labels = [f"ω = {omega:g}" for omega in sweep]
    with in_style():
        figure = Figure(figsize=(WIDTH, 2.5 + legend_rows(labels, 6)), dpi=DPI, layout="constrained")
        left, right = figure.subplots(1, 2)
        looks = zip(ordered_colors(len(sweep)), itertools.cycle(MARKERS[:8]), labels, strict=False)
        for rows, (color, marker, label) in zip(sweep.values(), looks, strict=False):
            look: dict[str, Any] = {"color": color, "marker": marker, "ms": 2.5, "lw": 1.0, "label": label}
            norms = [rows[i]["merged"] for i in layers]
            whole = [merged_norm(rows[i]) for i in layers]
            left.plot(numbers, norms, **look)
            right.plot(numbers, [100 * n / w if w else float("nan") for n, w in zip(norms, whole, strict=True)], **look)
        left.set(xlabel=along, ylabel="distance from the base ‖θ − θ₀‖", ylim=(0, None))
        right.set(xlabel=along, ylabel="part of the merge's task vector (%)", ylim=(0, None))
        for ax in (left, right):
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


if __name__ == "__main__":
    sys.exit(run(main))
