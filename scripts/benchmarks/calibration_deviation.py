"""Measure how calibrations of one base differ by batch size, precision, pass and the original's bf16 sums.

For every weight the activations of two calibrations are compared entry by entry, relative to those of the first; the
table has the median and the largest over all weights, and the same of importance, a / max a.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from aim.calibration.flags import add_calibration_flags, calibration_of
from common.cli import Parser, add_output_flags, run
from common.files.paths import user_path
from common.logging import logger
from common.markup import markdown

if TYPE_CHECKING:
    from torch import Tensor

    from aim.capture.statistics import Activations
    from common.files.json_values import JsonObject
    from merging.checkpoints.checkpoint import Checkpoint

PAIRS = {
    "float32: batch of 4 against 1": (("float32", 1, "whole"), ("float32", 4, "whole")),
    "float32: by layers against whole": (("float32", 1, "whole"), ("float32", 4, "layerwise")),
    "bfloat16: batch of 4 against 1": (("bfloat16", 1, "whole"), ("bfloat16", 4, "whole")),
    "bfloat16: by layers against whole": (("bfloat16", 4, "whole"), ("bfloat16", 4, "layerwise")),
    "bfloat16 against float32": (("float32", 1, "whole"), ("bfloat16", 1, "whole")),
    "the original's bfloat16 sums against bfloat16": (("bfloat16", 1, "whole"), ("bfloat16", 1, "original")),
}


def main(argv: Sequence[str]) -> int:
    """Calibrate in each way once, compare, print."""
    parser = Parser(prog="scripts/benchmarks/calibration_deviation.py", description=__doc__)
    parser.add_argument("base", help="base model: a folder or hub id")
    parser.add_argument_group("output").add_argument(
        "--results", type=user_path, metavar="FILE", help="also write the figures to this JSON file"
    )
    add_calibration_flags(parser)
    add_output_flags(parser)
    args = parser.parse_args(argv)
    from transformers import AutoTokenizer

    from aim.calibration.packing import cut, summary
    from aim.calibration.text_sources import load_texts
    from merging.checkpoints.checkpoint import open_checkpoint
    from merging.output.records.card import public_name

    base, calibration = open_checkpoint(args.base), calibration_of(vars(args))
    tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
    sample = cut(load_texts(calibration), tokenizer, calibration)
    logger.info(summary(sample.account))
    settings = dict.fromkeys(setting for pair in PAIRS.values() for setting in pair)
    importances = {setting: calibrated(base, sample.blocks, *setting) for setting in settings}
    rows = {what: compare(importances[one], importances[other]) for what, (one, other) in PAIRS.items()}
    entry = {"base": public_name(base.name), "blocks": sample.account["blocks"], "tokens": sample.account["tokens"],
             "source": sample.account["source"], "rows": rows}  # fmt: skip
    print(as_text(entry))
    if args.results:
        args.results.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    return 0


def calibrated(base: Checkpoint, blocks: Tensor, dtype: str, batch_size: int, way: str) -> Activations:
    """Calibrate once."""
    import torch

    from aim.capture import reference_statistic
    from aim.capture.base_model import Skeleton, load_whole
    from aim.capture.layerwise import calibrate_layerwise
    from aim.capture.whole_model import calibrate

    logger.warning(f"{dtype}, batches of {batch_size}, {way}")
    cpu = torch.device("cpu")
    if way == "layerwise":
        return calibrate_layerwise(Skeleton(base, dtype, cpu), blocks, batch_size=batch_size)
    model = load_whole(base, dtype, cpu)
    return (
        reference_statistic.collect(model, blocks)
        if way == "original"
        else calibrate(model, blocks, batch_size=batch_size)
    )


def compare(one: Activations, other: Activations) -> dict[str, float]:
    """Return median and largest relative difference of activations, and the largest difference of importance.

    Over the weights that both have; channels that are zero in both are left out.
    """
    import torch

    relative, importance = [], 0.0
    for name in one.means.keys() & other.means.keys():
        a, b = one.means[name].double(), other.means[name].double()
        b = b * (a.sum() / b.sum())  # the original's are sums over blocks: only ratios mean anything
        relative.append(((a - b).abs() / a.clamp(min=1e-300))[a > 0])
        importance = max(importance, float((a / a.max() - b / b.max()).abs().max()))
    together = torch.cat(relative)
    return {"median": float(together.median()), "largest": float(together.max()), "importance": importance}


def as_text(entry: JsonObject) -> str:
    """Return the table."""
    heads = ["calibrations", "median", "largest", "largest of importance"]
    keys = ("median", "largest", "importance")
    rows = [[what, *(f"{row[key]:.1e}" for key in keys)] for what, row in entry["rows"].items()]
    heading = f"{entry['base']} on {entry['source']}: {entry['blocks']} blocks, {entry['tokens']} tokens.\n\n"
    return heading + markdown(heads, rows)


if __name__ == "__main__":
    sys.exit(run(main))
