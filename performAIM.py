"""Relax a merged checkpoint towards its base where the base's activations are large (AIM, arXiv:2502.02421)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from aim.calibration import Calibration
from aim.measure import Settings
from aim.run import perform
from console.cli import Parser, add_output_flags, run, say
from console.errors import UsageError
from console.files import user_path
from merging.flags import OUTPUT_KEYS, add_run_flags
from merging.recipe import DTYPES
from merging.run import Output


def expanded(text: str) -> str:
    """A local file with ~ expanded; pile stays itself."""
    return text if text == "pile" else str(user_path(text))


def make_parser() -> Parser:
    """Return the parser; the first four flags are the original's."""
    parser = Parser(prog="performAIM.py", description=__doc__)
    parser.add_argument("--merged_model", required=True, help="the merged checkpoint: a folder or hub id")
    parser.add_argument("--pretrained_model_name", required=True, help="its base: a folder or hub id")
    parser.add_argument("--omega", type=float, default=0.4, help="relaxation floor: 1 leaves the merge, 0 is strongest")
    parser.add_argument("--save_path", required=True, type=user_path, help="folder for the relaxed checkpoint")
    parser.add_argument(
        "--calibration",
        type=expanded,
        default="pile",
        help="pile (mit-han-lab/pile-val-backup) or a local .jsonl or .txt file",
    )
    parser.add_argument("--n_samples", type=int, default=256, help="texts to keep")
    parser.add_argument("--block_size", type=int, default=512, help="tokens per block; longer texts are dropped")
    parser.add_argument("--text_field", default="text", help="of a .jsonl file's lines")
    parser.add_argument("--seed", type=int, default=42, help="of the shuffling of the calibration texts")
    parser.add_argument("--batch_size", type=int, help="blocks at a time (default: 1 on a CPU, 8 on a GPU)")
    parser.add_argument(
        "--importance",
        type=user_path,
        metavar="FILE",
        help="reuse this importance file, or compute it and save it there",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="of the output (default: the merged checkpoint's)")
    parser.add_argument(
        "--calibration_dtype", choices=("auto", *DTYPES), default="auto", help="auto: as the base is stored"
    )
    parser.add_argument(
        "--numerics",
        choices=("float32", "reference"),
        default="float32",
        help="reference: the original's bf16 arithmetic, batch 1, tied embeddings relaxed",
    )
    parser.add_argument(
        "--relax_tied", action="store_true", help="relax a tied embedding as the output head it also is"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="of one weights file")
    add_run_flags(parser)
    add_output_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Parse, relax, say where."""
    args = make_parser().parse_args(argv)
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, found {args.batch_size}.")
    reference = args.numerics == "reference"
    settings = Settings(
        calibration=Calibration(args.calibration, args.n_samples, args.block_size, args.seed, args.text_field),
        importance_file=args.importance,
        calibration_dtype=args.calibration_dtype,
        batch_size=args.batch_size,
        reference=reference,
        relax_tied=args.relax_tied or reference,
    )
    given = {key: getattr(args, key) for key in OUTPUT_KEYS if getattr(args, key) is not None}
    output = Output(**given, quiet=args.quiet)
    folder = perform(args.merged_model, args.pretrained_model_name, args.omega, settings, output, args.dtype)
    say(f"Relaxed {args.merged_model} with omega {args.omega:g} into {folder}.", args.quiet)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
