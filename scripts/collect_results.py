"""Put the newest results of several models into one small file, without samples, settings of machines or paths."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from console.cli import Parser, add_output_flags, run, say
from console.files import write_whole
from eval.result import EvalResult, Lineage
from eval.rows import COLLECTION, parse_names, read_results

KEPT = ("limit", "max_gen_toks", "math_max_tokens", "math_prompt_type", "dtype_used", "device", "backend", "seed")


def parser() -> Parser:
    p = Parser(prog="scripts/collect_results.py", description=__doc__)
    p.add_argument("results", nargs="+", type=Path, help="results files, or folders searched for the newest per model")
    p.add_argument("--out", type=Path, required=True, help="the file to write")
    p.add_argument("--names", action="append", default=[], metavar="PATH=LABEL,...", help="labels to keep with it")
    add_output_flags(p)
    return p


def slim(result: EvalResult) -> EvalResult:
    """Keep scores, lineage by the models' own names, versions, and the settings that scores depend on."""
    lineage = result.lineage
    names = Lineage(
        lineage.method,
        Path(lineage.base_model).name if lineage.base_model else None,
        tuple(Path(model).name for model in lineage.models),
        lineage.omega,
    )
    settings = {key: result.settings[key] for key in KEPT if key in result.settings}
    return replace(result, model=Path(result.model).name, lineage=names, settings=settings, harness={})


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    found = [result for path in args.results for result in read_results(path, lambda text: say(text, args.quiet))[0]]
    entries = [json.dumps(slim(result).to_json()["aim"], separators=(",", ":")) for result in found]
    names = json.dumps(parse_names(args.names))
    listed = ",\n".join(entries)  # a line per model, so that a change shows as one
    write_whole(args.out, f'{{"format":"{COLLECTION}","names":{names},"results":[\n{listed}\n]}}\n'.encode())
    say(f"{len(found)} results in {args.out}.", args.quiet)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
