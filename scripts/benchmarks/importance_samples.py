"""Measure how importance depends on the number and kind of calibration texts, from one run over each block of text.

Importance of the first n texts is the mean over their blocks, so each block runs once. The first n texts of the first
source are compared with its other texts, and those of another source with all of the first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from aim.calibration.flags import add_calibration_flags, calibration_of
from aim.scaling import Scaling
from common.cli import Parser, add_output_flags, run
from common.errors import UsageError
from common.files.json_values import JsonObject
from common.files.paths import user_path
from common.logging import logger
from common.markup import markdown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from aim.calibration.config import Calibration
    from merging.checkpoints.checkpoint import Checkpoint

    Means = Mapping[str, Tensor]
    """Mean |x| per weight, (channels,)."""

COUNTS = (8, 16, 32, 64, 128)
OMEGA = 0.4
SCALINGS = {"max": Scaling(), "quantile 0.99": Scaling("quantile", 0.99), "quantile 0.9": Scaling("quantile", 0.9)}


@dataclass(frozen=True)
class Source:
    """Texts of one source, run block by block.

    Attributes:
        name: Of the source, as a record has it.
        counts: {number of texts: (number of blocks that they fill, number of blocks that hold any of them)}.
        block_size: Tokens of a block.
        means: Mean |x| per weight, (blocks, channels).
    """

    name: str
    counts: Mapping[int, tuple[int, int]]
    block_size: int
    means: Means

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(next(iter(self.means.values())))

    def mean(self, blocks: slice) -> Means:
        """Return the statistics of some blocks."""
        return {name: means[blocks].mean(0) for name, means in self.means.items()}


def main(argv: Sequence[str]) -> int:
    """Run the base over every block of every source, compare, print."""
    parser = Parser(prog="scripts/benchmarks/importance_samples.py", description=__doc__)
    parser.add_argument("base", help="base model: a folder or hub id")
    group = parser.add_argument_group("benchmark")
    group.add_argument("--counts", default=",".join(map(str, COUNTS)), help="numbers of texts (default: %(default)s)")
    group.add_argument("--other_texts", type=int, default=64, help="texts of the other sources (default: %(default)s)")
    group.add_argument("--results", type=user_path, metavar="FILE", help="also write the figures to this JSON file")
    add_calibration_flags(parser)
    add_output_flags(parser)
    args = parser.parse_args(argv)
    if not all(count.isdigit() and int(count) > 0 for count in args.counts.split(",")):
        raise UsageError(f"--counts must be whole numbers of at least 1, separated by commas, found {args.counts}.")
    counts = sorted({int(count) for count in args.counts.split(",")})
    entry: JsonObject = {}
    for entry in measure(args.base, calibration_of(vars(args)), counts, args.other_texts):
        if args.results:
            args.results.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    print(as_text(entry))
    return 0


def measure(base_name: str, calibration: Calibration, counts: Sequence[int], other_texts: int) -> Iterator[JsonObject]:
    """Yield the figures after each source: all numbers of texts of the first, then one number of each other."""
    import torch

    from aim.capture.base_model import load_whole
    from merging.checkpoints.checkpoint import open_checkpoint
    from merging.output.records.card import public_name

    base = open_checkpoint(base_name)
    model = load_whole(base, "float32", torch.device("cpu"))
    first: Source | None = None
    rows: list[JsonObject] = []
    for spec in calibration.sources():
        texts = replace(
            calibration, source=spec.spec, text_field=spec.field, weights=None,
            n_samples=spec.count if first is None else other_texts,
        )  # fmt: skip
        source = run_source(base, model, texts, counts if first is None else [other_texts])
        for count, (filled, touched) in source.counts.items():
            blocks, other = slice(0, filled), slice(touched if first is None else 0, None)
            reference = source if first is None else first
            rows.append({
                "source": source.name, "texts": count, "tokens": filled * source.block_size, "against": reference.name,
                "against_tokens": (reference.blocks - other.start) * reference.block_size,
                **{name: compare(reference.mean(other), source.mean(blocks), s) for name, s in SCALINGS.items()},
            })  # fmt: skip
        first = first or source
        yield {"base": public_name(base.name), "omega": OMEGA, "rows": rows}


def run_source(base: Checkpoint, model: nn.Module, calibration: Calibration, counts: Sequence[int]) -> Source:
    """Run the base over each block of a source's texts.

    Raises UsageError where no block is left behind the texts of the largest of several counts.
    """
    import torch
    from transformers import AutoTokenizer

    from aim.calibration.packing import cut
    from aim.calibration.text_sources import load_texts
    from aim.capture.attribution import by_stored_tensor
    from aim.capture.whole_model import calibrate
    from aim.relaxer import Rule

    tokenizer = AutoTokenizer.from_pretrained(base.folder, model_max_length=sys.maxsize, trust_remote_code=False)
    sample = cut(load_texts(calibration), tokenizer, calibration)
    texts, blocks = sample.account["texts_kept"], sample.blocks
    filled = {}
    for count in dict.fromkeys(min(count, texts) for count in counts):
        part = replace(calibration, n_samples=count)
        account = cut(load_texts(part), tokenizer, part).account
        filled[count] = (account["blocks"], account["blocks"] + bool(account["tokens_dropped_at_the_end"]))
    if len(counts) > 1 and max(touched for _, touched in filled.values()) >= len(blocks):
        raise UsageError(
            f"{calibration.source} has {texts} texts in {len(blocks)} blocks, and --counts up to {max(counts)} leave "
            "no block to compare with; raise --n_samples, or give smaller --counts."
        )
    rows: list[dict[str, Tensor]] = []
    for block in blocks:
        importance = by_stored_tensor(calibrate(model, block[None], batch_size=1), model, base)
        unrelaxed = set(importance.heads.values())
        rows.append({n: a for n, a in importance.activations.items() if n not in unrelaxed and not Rule().verdict(n)})
    name = str(calibration.recorded()["source"])
    logger.info(f"{name}: {texts} texts, {len(blocks)} blocks")
    means = {name: torch.stack([row[name] for row in rows]).double() for name in rows[0]}
    return Source(name, filled, calibration.block_size, means)


def compare(reference: Means, other: Means, scaling: Scaling) -> dict[str, float]:
    """Return how the importance s of two calibrations differs, over all weights.

    Returns:
        cosine: The lowest cosine of a weight's two s.
        median, largest: |difference| of s over all channels, relative to the reference's.
        importance: The largest |difference| of s.
        factor, factor_99: The largest and the 99 % quantile of the |difference| of the factor 1 - (1 - OMEGA) s that
            the task vector is multiplied by, over all channels.
    """
    import torch

    cosine, relative, absolute = 1.0, [], []
    for name, a in reference.items():
        s, t = (scaling.normalize(x.float()).double() for x in (a, other[name]))
        cosine = min(cosine, float((s @ t) / (s.norm() * t.norm())))
        relative.append(((s - t).abs() / s)[s > 0])
        absolute.append((s - t).abs())
    relatives, differences = torch.cat(relative), torch.cat(absolute)
    values: dict[str, float | torch.Tensor] = {
        "cosine": cosine,
        "median": relatives.median(),
        "largest": relatives.max(),
        "importance": differences.max(),
        "factor_99": (1 - OMEGA) * differences.quantile(0.99),
        "factor": (1 - OMEGA) * differences.max(),
    }
    return {key: float(f"{float(value):.4g}") for key, value in values.items()}


def as_text(entry: JsonObject) -> str:
    """Return the table."""
    heads = ["text", "texts", "tokens", "against", "lowest cosine of s", "median change of s",
             "the same, quantile 0.99", f"change of the factor at ω = {entry['omega']:g}, 99 % of channels below",
             "largest"]  # fmt: skip
    rows = [
        [row["source"], str(row["texts"]), str(row["tokens"]), f"{row['against_tokens']} tokens of {row['against']}",
         f"{row['max']['cosine']:.4f}", f"{100 * row['max']['median']:.1f} %",
         f"{100 * row['quantile 0.99']['median']:.1f} %", f"{row['max']['factor_99']:.3f}",
         f"{row['max']['factor']:.3f}"]
        for row in entry["rows"]
    ]  # fmt: skip
    return f"{entry['base']}:\n\n{markdown(heads, rows)}"


if __name__ == "__main__":
    sys.exit(run(main))
