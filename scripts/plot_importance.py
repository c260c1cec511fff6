"""Show how importance s is distributed over channels: per kind of layer, as tables and as a figure.

Also prints the share of a task vector's norm that AIM takes back from each kind of layer: of one with the same norm in
every channel ("even"), and of given merges.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aim.scaling import Scaling
from common.cli import Parser, add_output_flags, run
from common.errors import UsageError
from common.figures import COLORS, DPI, WIDTH, check_figure_file, in_style, legend_rows, write_figure
from common.files.json_values import JsonObject, JsonValue
from common.files.paths import read_json, user_path, write_whole
from common.logging import logger
from common.markup import figure_text, markdown
from common.terminal_text import quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aim.importance import Importance

Entry = Mapping[str, JsonValue]
"""The figures of one importance file, as --results stores them."""
MAX = "max"
EVEN = "even"
"""A task vector with the same norm in every channel."""


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="scripts/plot_importance.py", description=__doc__)
    parser.add_argument("files", nargs="+", type=user_path, metavar="FILE", help="importance files")
    group = parser.add_argument_group("importance files")
    group.add_argument("--names", metavar="A,B", help="a name for each file (default: the file's)")
    group.add_argument(
        "--normalizations", default=MAX, metavar="max,X", help="max, and quantiles in (0, 1] (default: max)"
    )
    group = parser.add_argument_group("share of a task vector")
    group.add_argument("--base_model", metavar="BASE", help="base of the importance files and of the merges")
    group.add_argument("--merged_model", metavar="A,B", help="merges of this base")
    group.add_argument("--omega", type=float, default=0.4, help="omega of the relaxation (default: %(default)s)")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print everything as JSON")
    group.add_argument(
        "--results", type=user_path, metavar="FILE.json", help="add the figures to a file, one entry for each name"
    )
    group.add_argument("--out", type=user_path, metavar="FILE", help="a .png, .svg or .pdf file for the plot")
    add_output_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Read, measure, print, store, plot."""
    args = make_parser().parse_args(argv)
    check_figure_file(args.out, "--out")
    names = names_of(args.names, args.files)
    scalings = scalings_of(args.normalizations)
    if (args.base_model is None) != (args.merged_model is None):
        raise UsageError("--base_model and --merged_model belong together; give both, or neither.")
    if not 0 <= args.omega <= 1:
        raise UsageError(f"--omega must be in [0, 1], found {args.omega:g}.")
    entries = {
        name: entry_of(file, scalings, args.base_model, args.merged_model, args.omega)
        for name, file in zip(names, args.files, strict=True)
    }
    print(json.dumps(entries, indent=1) if args.json else as_text(entries))
    if args.results is not None:
        earlier = read_json(args.results, f"{args.results} cannot be read.") if args.results.exists() else {}
        lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in {**earlier, **entries}.items()]
        write_whole(args.results, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    if args.out is not None:
        write_figure(plot(entries), args.out)
        logger.info(f"Plot written to {args.out}.")
    return 0


def names_of(text: str | None, files: Sequence[Path]) -> list[str]:
    """Return a different name for each file. Raises UsageError."""
    names = [file.stem for file in files] if text is None else [name.strip() for name in text.split(",")]
    if len(names) != len(files) or len(set(names)) < len(names) or not all(names):
        raise UsageError(f"--names must be a different name for each of {len(files)} files, found {', '.join(names)}.")
    return names


def scalings_of(text: str) -> dict[str, Scaling]:
    """Return {label: normalization} of a list of max and quantiles. Raises UsageError."""
    scalings = {}
    for part in (part.strip() for part in text.split(",")):
        try:
            scaling = Scaling() if part == MAX else Scaling("quantile", float(part))
            scaling.check()
        except (ValueError, UsageError):
            raise UsageError(f"--normalizations must be max or quantiles in (0, 1], found {quoted(part)}.") from None
        scalings[scaling.label().get("normalization", MAX)] = scaling
    return scalings


def entry_of(
    file: Path, scalings: Mapping[str, Scaling], base_model: str | None, merged_model: str | None, omega: float
) -> Entry:
    """Return the figures of an importance file by normalization. Raises CheckpointError for one of another base."""
    from aim.importance import Importance, fingerprint
    from aim.report.distribution import distributions, even_shares, rounded_shares, taken_back
    from merging.checkpoints.checkpoint import open_checkpoint
    from merging.output.records.card import public_name

    importance = Importance.load(file)
    shares = {label: {EVEN: even_shares(importance, omega, scaling)} for label, scaling in scalings.items()}
    if base_model is not None and merged_model is not None:
        base = open_checkpoint(base_model)
        importance.check_base(fingerprint(base), base.name, file)
        for merged in map(open_checkpoint, merged_model.split(",")):
            for label, scaling in scalings.items():
                shares[label][public_name(merged.name)] = taken_back(importance, base, merged, omega, scaling)
    return {
        **about(importance),
        "omega": omega,
        "distributions": {
            label: [row.as_json() for row in distributions(importance, scaling)] for label, scaling in scalings.items()
        },
        "taken_back": {
            label: {merged: rounded_shares(kinds) for merged, kinds in of_label.items()}
            for label, of_label in shares.items()
        },
    }


def about(importance: Importance) -> JsonObject:
    """Return what an importance file was measured on: base, statistic, text."""
    from merging.output.records.card import public_name

    calibration = importance.calibration
    return {
        "base": public_name(importance.base["name"]),
        "statistic": importance.statistic.removesuffix("_input"),
        "text": [source["source"] for source in calibration["sources"]],
        "tokens": calibration["tokens"],
    }


def as_text(entries: Mapping[str, Entry]) -> str:
    """Return the distributions of all entries, then the entries of each base side by side."""
    return "\n\n".join([*(distribution_text(name, entry) for name, entry in entries.items()), *comparisons(entries)])


def document(file: Path) -> str:
    """Return the part of a document: for each base the distribution of its first entry, then all side by side."""
    entries = read_json(file, f"{file} does not exist.")
    parts = []
    for names in _by_base(entries).values():
        parts.append(distribution_text(names[0], entries[names[0]]))
        parts += comparisons({name: entries[name] for name in names})
    return "\n\n".join(parts)


def draw(file: Path) -> Figure:
    """Return the figure of a document: the first entry of each base."""
    entries = read_json(file, f"{file} does not exist.")
    return plot({names[0]: entries[names[0]] for names in _by_base(entries).values()})


def _by_base(entries: Mapping[str, Entry]) -> dict[tuple[str, ...], list[str]]:
    """Return the names of the entries of each base and text."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault((entry["base"], *entry["text"], str(entry["tokens"])), []).append(name)
    return groups


def distribution_text(name: str, entry: Entry) -> str:
    """Return the heading and the table of an entry's first normalization."""
    label, rows = next(iter(entry["distributions"].items()))
    heading = (
        f"{name}: {entry['statistic']}, normalization {label}, {entry['tokens']} tokens of {', '.join(entry['text'])}."
    )
    return f"{heading}\n\n{distribution_table(rows)}"


def comparisons(entries: Mapping[str, Entry]) -> list[str]:
    """Return for each base the shares of task vectors that AIM takes back, by statistic and normalization."""
    return [comparison_table([entries[name] for name in names]) for names in _by_base(entries).values()]


def distribution_table(rows: Sequence[JsonObject]) -> str:
    """Return a row per kind of layer: quantiles and mean of s, shares of channels above levels, largest to median."""
    from aim.report.distribution import LEVELS, QUANTILES

    heads = ["kind", "channels", *(f"{100 * q:g} %" for q in QUANTILES), "mean s",
             *(f"s > {level:g}" for level in LEVELS), "max(a) / median(a)"]  # fmt: skip
    return markdown(
        heads,
        [
            [row["kind"], f"{row['layers']} x {row['channels']}", *(f"{s:.3f}" for s in row["quantiles"]),
             f"{row['mean']:.3f}", *(_percent(share) for share in row["above"]),
             "-" if row["largest_to_median"] is None else f"{row['largest_to_median']:.1f}"]
            for row in rows
        ],
    )  # fmt: skip


def comparison_table(entries: Sequence[Entry]) -> str:
    """Return the share of task vectors that AIM takes back from each kind of layer, for entries of one base."""
    rows = [
        (f"{entry['statistic']}, {label}", merged, shares)
        for entry in entries
        for label, merges in entry["taken_back"].items()
        for merged, shares in merges.items()
    ]
    kinds = list(dict.fromkeys(kind for *_, shares in rows for kind in shares))
    cells = [
        [label, merged, *(_percent(shares[kind]) if kind in shares else "-" for kind in kinds)]
        for label, merged, shares in rows
    ]
    heading = f"Share of a task vector's norm that AIM takes back at ω = {entries[0]['omega']:g}:"
    return f"{heading}\n\n{markdown(['s', 'task vector', *kinds], cells, text_columns=2)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def plot(entries: Mapping[str, Entry]) -> Figure:
    """Draw s of each kind of layer over the share of channels that lie below it, a panel for each entry."""
    from matplotlib.figure import Figure

    from aim.report.distribution import CURVE

    tables = {name: next(iter(entry["distributions"].values())) for name, entry in entries.items()}
    kinds = list(dict.fromkeys(row["kind"] for rows in tables.values() for row in rows))
    looks = dict(zip(kinds, itertools.cycle(itertools.product(("-", "--", ":"), COLORS)), strict=False))
    columns = 3 if max(map(len, kinds)) < 28 else 2
    with in_style():
        height = 2.4 * -(-len(tables) // 2) + 0.3 + legend_rows(kinds, columns)
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        axes = figure.subplots(-(-len(tables) // 2), min(2, len(tables)), sharex=True, sharey=True, squeeze=False)
        handles = {}
        for ax, (name, rows) in zip(axes.flat, tables.items(), strict=False):
            for row in rows:
                line_style, color = looks[row["kind"]]
                (handles[row["kind"]],) = ax.plot(
                    [100 * q for q in CURVE], row["curve"], color=color, ls=line_style, lw=1.2, label=row["kind"]
                )
            ax.set_title(figure_text(name))
            ax.set_yscale("log")
        for ax in list(axes.flat)[len(tables) :]:
            ax.set_axis_off()
        for ax in axes[-1]:
            ax.set_xlabel("channels with a smaller s (%)")
        for ax in axes[:, 0]:
            ax.set_ylabel("importance s")
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=columns)
    return figure


if __name__ == "__main__":
    sys.exit(run(main))
