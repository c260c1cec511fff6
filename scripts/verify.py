"""Check an output against its lock: the digest of every tensor and file, and with --recompute the merge itself.

Exit code 0: everything matches the lock. 1: something is not. 3: it could not be checked
(no lock, or inputs that are gone).
"""

from __future__ import annotations

import os
import random
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, add_output_flags, run
from common.errors import FailureError, ProjectError
from common.files.json_values import JsonObject
from common.files.paths import read_json, user_path
from common.logging import logger
from common.terminal_text import message_line
from merging.checkpoints.headers import header_of
from merging.checkpoints.storage import StoredWeights, TensorInfo
from merging.output.digests import tensor_digest
from merging.output.records.lock import LOCK_FILE, read_lock, small_files
from merging.output.shards import INDEX

COULD_NOT = 3


def main(argv: Sequence[str]) -> int:
    """Check, say what was found, return the exit code."""
    parser = Parser(prog="scripts/verify.py", description=__doc__)
    parser.add_argument("folder", type=user_path, help="an output of merge.py or performAIM.py")
    parser.add_argument(
        "--recompute", metavar="N|all", help="merge N tensors (or all) again from the inputs and compare their bytes"
    )
    parser.add_argument(
        "--tensors", metavar="REGEX", help="with --recompute: only tensors whose name matches (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of the N tensors")
    parser.add_argument("--base_model", help="path of the base (default: that in the lock)")
    parser.add_argument("--models_to_merge", metavar="A,B,C", help="paths of the models (default: those in the lock)")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    try:
        return check(args)
    except ProjectError as error:
        print(f"could not check: {error}", file=sys.stderr)
        return COULD_NOT


def check(args: Namespace) -> int:
    """Compare with the lock, then perhaps with the inputs. Raises ProjectError for what cannot be checked."""
    lock = read_lock(args.folder)
    parts = len(lock["tensors"]) + len(lock["files"])
    if bad(damage(args.folder, lock), f"of {parts} parts differ from {LOCK_FILE}"):
        return 1
    logger.info(f"{len(lock['tensors'])} tensors and {len(lock['files'])} files match the lock.")
    if args.recompute or args.tensors:
        names = chosen(lock, args.recompute or "all", args.tensors, args.seed)
        if bad(recomputed(lock, names, args), f"of {len(names)} tensors do not come out of the inputs"):
            return 1
        logger.info(f"{len(names)} tensors recomputed from the inputs, bit for bit the same.")
    print("GOOD")
    return 0


def bad(wrong: Sequence[str], what: str) -> bool:
    """Print what is wrong, if anything is, and say whether."""
    for sentence in wrong:
        print(message_line(sentence))
    if wrong:
        print(f"BAD: {len(wrong)} {what}.")
    return bool(wrong)


def damage(folder: Path, lock: JsonObject) -> list[str]:
    """Return a sentence for each tensor or file of the output that is not as its lock says."""
    wrong, missing = missing_files(folder)
    stored: dict[str, TensorInfo] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            stored.update(header_of(file))
        except ProjectError as error:
            wrong.append(str(error))
    weights = StoredWeights(stored)
    for name, expected in lock["tensors"].items():
        if name not in stored and name in missing:
            continue
        if name not in stored:
            wrong.append(f"Tensor {name} is missing.")
            continue
        info = stored[name]
        if (info.dtype, list(info.shape)) != (expected["dtype"], expected["shape"]):
            description = f"{info.dtype} {list(info.shape)}"
            wrong.append(f"Tensor {name} is {description}, expected {expected['dtype']} {expected['shape']}.")
        elif tensor_digest([weights.rows(name)[:] if info.shape else weights.rows(name)]) != expected["digest"]:
            wrong.append(f"Tensor {name} in {info.file.name} has other bytes than when it was written.")
    wrong += [f"Tensor {name} is not in the lock." for name in stored if name not in lock["tensors"]]
    files = small_files(folder)
    wrong += [f"File {name} was changed or is missing." for name, d in lock["files"].items() if files.get(name) != d]
    return wrong


def missing_files(folder: Path) -> tuple[list[str], set[str]]:
    """Return a sentence for each weights file that the index names and that is gone, and the tensors that were in them.

    An index that cannot be read counts as none: its own digest is compared anyway.
    """
    try:
        entries = read_json(folder / INDEX, "")["weight_map"].items()
        missing = {name: file for name, file in entries if not os.path.isfile(folder / file)}
    except (ProjectError, KeyError, AttributeError, TypeError):
        return [], set()
    lost_tensors = Counter(missing.values())
    return [f"File {file} is missing, with {n} tensors." for file, n in sorted(lost_tensors.items())], set(missing)


def chosen(lock: JsonObject, count: str, pattern: str | None, seed: int) -> list[str]:
    """Return the tensors to recompute. Raises FailureError for a count or pattern that chooses none."""
    try:
        names = [name for name in lock["tensors"] if pattern is None or re.search(pattern, name)]
        number = len(names) if count == "all" else min(len(names), int(count))
    except (ValueError, re.error) as error:
        raise FailureError(f"--recompute takes a number or all, --tensors a regular expression ({error}).") from error
    if number < 1:
        raise FailureError("No tensor is chosen; --recompute takes a number or all.")
    return sorted(random.Random(seed).sample(names, number))


def recomputed(lock: JsonObject, names: Sequence[str], args: Namespace) -> list[str]:
    """Return a sentence for each of the tensors that the inputs do not give."""
    from aim.replay import plan_from_lock
    from merging.plan.merge_plan import OutputConfig
    from merging.replay import check_lock_inputs, recompute

    models = args.models_to_merge.split(",") if args.models_to_merge else ()
    output = OutputConfig(args.folder, device=lock["device"], load_check=False)
    plan = plan_from_lock(lock, output, models, args.base_model)
    check_lock_inputs(plan, lock)
    wrong = []
    for name, blocks in recompute(plan, output, names):
        if tensor_digest(blocks) != lock["tensors"][name]["digest"]:
            wrong.append(f"Tensor {name} comes out differently from the inputs.")
    return wrong


if __name__ == "__main__":
    sys.exit(run(main))
