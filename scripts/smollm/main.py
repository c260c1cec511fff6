"""Make a real family: a small language model as base, three fine-tuned from it (math, code, instructions)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import Parser, add_output_flags, run
from common.errors import UsageError, nearest
from common.logging import logger
from scripts.smollm.base import NAME, prepare_base
from scripts.smollm.code_examples import build_code
from scripts.smollm.instructions import build_instructions
from scripts.smollm.training import Settings, fine_tune
from scripts.smollm.training_data import SkillData, build_math, read_user_examples, write_examples

SKILLS = ("math", "code", "instructions")
# Four to five minutes a model on two cores (a step of 1024 tokens takes about 4 s there).
CPU_STEPS, CPU_BATCH_TOKENS = 70, 1024
GPU_STEPS, GPU_BATCH_TOKENS = 400, 8192


def parser() -> Parser:
    p = Parser(prog="scripts/smollm/main.py", description=__doc__)
    g = p.add_argument_group("models and data")
    g.add_argument(
        "--save_path", type=Path, default=Path("real_model_out"), help="folder of base/, one folder per skill, data/"
    )
    g.add_argument("--base", default="wheel", help=f"wheel ({NAME}), a folder, a .gguf file, or a hub id")
    g.add_argument(
        "--skills", default=",".join(SKILLS), help='models to train, separated by commas; "" for the base alone'
    )
    g.add_argument(
        "--data_dir", type=Path, help="folder of data laid out like the hub (openai/gsm8k/main/train.jsonl, ...)"
    )
    g.add_argument(
        "--code", type=Path, help="own code data: JSON or JSONL of prompt and completion, or Alpaca's fields"
    )
    g.add_argument("--instructions", type=Path, help="own instruction data, in the same forms")
    g = p.add_argument_group("training")
    g.add_argument(
        "--steps", type=int, help=f"optimizer steps per model (default: {CPU_STEPS} on a CPU, {GPU_STEPS} on a GPU)"
    )
    g.add_argument(
        "--batch_tokens",
        type=int,
        help=f"tokens per step (default: {CPU_BATCH_TOKENS} on a CPU, {GPU_BATCH_TOKENS} on a GPU)",
    )
    g.add_argument(
        "--max_tokens", type=int, default=512, help="tokens of an example at most; longer ones are dropped and counted"
    )
    g.add_argument("--learning_rate", type=float, default=5e-5, help="peak of the cosine schedule")
    g.add_argument("--seed", type=int, default=42, help="seed of the data's order and of the generated instructions")
    g.add_argument("--device", default="auto", help="auto, cpu, or cuda[:n]")
    g.add_argument("--overwrite", action="store_true", help="replace finished folders")
    add_output_flags(p)
    return p


def build(skill: str, data_dir: Path | None, file: Path | None, seed: int) -> SkillData:
    """The data of one skill: the user's file, or the permissively licensed default."""
    if file is not None:
        return SkillData(skill, str(file), "the user's own", read_user_examples(file))
    if skill == "math":
        return build_math(data_dir)
    return build_code(data_dir) if skill == "code" else build_instructions(data_dir, seed)


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    skills = [s for s in args.skills.split(",") if s]
    for skill in skills:
        if skill not in SKILLS:
            raise UsageError(f"Unknown skill {skill!r}; the skills are {', '.join(SKILLS)}.{nearest(skill, SKILLS)}")
    for flag in ("steps", "batch_tokens", "max_tokens", "learning_rate"):
        if getattr(args, flag) is not None and not getattr(args, flag) > 0:
            raise UsageError(f"--{flag} should be above 0, found {getattr(args, flag)}.")
    for path in (args.data_dir, args.code, args.instructions):
        if path is not None and not path.exists():
            raise UsageError(f"{path} does not exist.")
    if args.device not in ("auto", "cpu") and args.device.partition(":")[0] != "cuda":
        raise UsageError(f"Unknown device {args.device!r}; use auto, cpu or cuda[:n].")
    # Spinning OpenMP threads make a step many times slower when anything else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if args.quiet:
        os.environ["TQDM_DISABLE"] = "1"  # transformers has bars of its own, too
    data = []
    for skill in skills:
        data.append(build(skill, args.data_dir, getattr(args, skill, None), args.seed))
        logger.info(f"{skill}: {len(data[-1].examples)} examples, {data[-1].source} ({data[-1].license})")
        for warning in data[-1].remarks:
            logger.info(f"  {warning}.")
    base = args.save_path / "base"
    record = prepare_base(args.base, base, overwrite=args.overwrite)
    license_name = record.get("license", "license not recorded")
    print(f"base: {base} ({record['base']}, {record['n_parameters'] / 1e6:.1f}M parameters, {license_name})")
    if not data:
        return 0
    device = pick_device(args.device)
    on_gpu = device.startswith("cuda")
    settings = Settings(
        steps=args.steps or (GPU_STEPS if on_gpu else CPU_STEPS),
        learning_rate=args.learning_rate,
        batch_tokens=args.batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS),
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    (args.save_path / "data").mkdir(exist_ok=True)
    for skill_data in data:
        write_examples(args.save_path / "data" / f"{skill_data.skill}.jsonl", skill_data.examples)
        target = args.save_path / skill_data.skill
        done = fine_tune(base, skill_data, target, settings, device=device, overwrite=args.overwrite, quiet=args.quiet)
        held_out, train_loss = done["held_out"], done["train_loss"]
        print(
            f"{skill_data.skill}: {target} ({done['n_seen']} examples in {settings.steps} steps, "
            f"{done['seconds']:.0f} s; training loss {train_loss['first']:.3f} to {train_loss['last']:.3f}; "
            f"on {held_out['n']} held-out examples {held_out['loss_before']:.3f} to {held_out['loss_after']:.3f})",
            flush=True,
        )
    return 0


def pick_device(name: str) -> str:
    """`auto` is cuda where there is one. Errors: UsageError for a device that this machine lacks."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"This machine has no {name} that torch can use; use --device cpu.")
    return name


if __name__ == "__main__":
    sys.exit(run(main))
