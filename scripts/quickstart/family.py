"""Make the quickstart's family on the spot: a tiny base Llama, three fine-tuned from it, their tasks and texts.

python scripts/quickstart/family.py --save_path quickstart_out/family
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import Parser, add_output_flags, run
from common.errors import UsageError
from common.logging import logger
from merging.output.staging.stage import replacing
from scripts.quickstart.skills import SKILLS, SPLITS, Item, draw_distinct, draw_mixture, write_items
from scripts.quickstart.training import Schedule, Shape, accuracy, make_model, make_tokenizer, train

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TASK_SOURCES = Path(__file__).resolve().parents[2] / "configs" / "quickstart"
RECORD = "family.json"
ONLY_FULL = dict.fromkeys(SKILLS, 1.0)


@dataclass(frozen=True)
class FamilyRecipe:
    """Everything but the seed that decides the bytes of a family.

    The base sees the three skills mixed, mostly in their easy form (`full_share` is the rest), so that it has
    half learnt each; a fine-tuned model then moves little, and task vectors that are small merge well.
    """

    shape: Shape
    base: Schedule
    finetune: Mapping[str, Schedule]
    n_items: Mapping[str, int]
    n_texts: int
    mixture: Mapping[str, float] = field(default_factory=lambda: {"addition": 0.35, "strings": 0.4, "brackets": 0.25})
    full_share: Mapping[str, float] = field(default_factory=lambda: {"addition": 0.1, "strings": 0.15, "brackets": 0.1})


FULL = FamilyRecipe(
    shape=Shape(hidden=128, layers=3, heads=4),
    base=Schedule(steps=360, batch=64, rate=3e-3, muon_rate=0.02),
    finetune={
        # The carry is learnt late and all at once: this skill needs more of both to learn it with every seed.
        "addition": Schedule(steps=150, batch=64, rate=7e-4),
        "strings": Schedule(steps=100, batch=64, rate=5e-4),
        "brackets": Schedule(steps=100, batch=64, rate=5e-4),
    },
    n_items={"train": 1000, "val": 200, "test": 200},
    n_texts=1024,
)
FAST = FamilyRecipe(
    shape=Shape(hidden=96, layers=2, heads=4),
    base=Schedule(steps=280, batch=32, rate=3e-3, muon_rate=0.02),
    finetune=dict.fromkeys(SKILLS, Schedule(steps=80, batch=32, rate=1e-3)),
    n_items={"train": 200, "val": 50, "test": 50},
    n_texts=512,
)


def scaled(recipe: FamilyRecipe, steps: float, rate: float) -> FamilyRecipe:
    """Return a recipe with the steps and rates of fine-tuning multiplied; raises UsageError for factors of 0 or less.

    More and larger steps make larger task vectors, which interfere more.
    """
    if not (steps > 0 and rate > 0):
        raise UsageError(f"--steps_scale and --rate_scale must be above 0, found {steps:g} and {rate:g}.")
    finetune = {
        skill: replace(plan, steps=max(1, round(plan.steps * steps)), rate=plan.rate * rate)
        for skill, plan in recipe.finetune.items()
    }
    return replace(recipe, finetune=finetune)


@dataclass(frozen=True)
class Family:
    """Folders of a trained family, and the losses of its training.

    `tasks` is lm-eval's include_path; `items/<skill>/{train,val,test}.jsonl` hold skill, key, prompt and answer;
    `validation` is model -> skill -> percentage right on the validation items, of the checkpoints as saved.
    """

    base: Path
    models: dict[str, Path]
    calibration: Path
    items: Path
    tasks: Path
    task_names: dict[str, str]
    validation: dict[str, dict[str, float]]
    cpu_seconds: float


def make_family(
    folder: Path,
    *,
    seed: int = 42,
    fast: bool = False,
    quiet: bool = False,
    overwrite: bool = False,
    recipe: FamilyRecipe | None = None,
) -> Family:
    """Train, save and describe a family in `folder`, which appears when it is whole.

    The same seed gives the same bytes on one machine with one number of threads. `fast` (seconds, not a minute)
    promises no accuracy; `recipe` overrides both. `overwrite` replaces an older family, and nothing else.
    Errors: UsageError when `folder` is there and not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / RECORD).is_file():
            raise UsageError(f"{folder} is not empty and holds no {RECORD} of a family; pass another --save_path.")
        if not overwrite:
            raise UsageError(f"{folder} holds a family already; pass --overwrite or another --save_path.")
    with replacing(folder) as staged, _library_bars_off():
        validation, seconds = _fill(staged, folder, recipe or (FAST if fast else FULL), seed, quiet)
    return Family(
        base=folder / "base",
        models={skill: folder / skill for skill in SKILLS},
        calibration=folder / "calibration.jsonl",
        items=folder / "items",
        tasks=folder / "tasks",
        task_names={skill: f"quickstart_{skill}" for skill in SKILLS},
        validation=validation,
        cpu_seconds=seconds,
    )


@contextlib.contextmanager
def _library_bars_off() -> Iterator[None]:
    """Leave the screen to the bars of the training: those of transformers (a blink each) say nothing here."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _fill(
    staged: Path, final: Path, recipe: FamilyRecipe, seed: int, quiet: bool
) -> tuple[dict[str, dict[str, float]], float]:
    """Write everything into `staged`; return the validation accuracies and the CPU seconds of the training."""
    held_out = _write_items(staged / "items", recipe, seed)
    texts = draw_mixture(recipe.n_texts, random.Random(f"{seed} calibration"), recipe.mixture, recipe.full_share)
    lines = [json.dumps({"text": item.prompt + item.answer}) + "\n" for item in texts]
    (staged / "calibration.jsonl").write_text("".join(lines), encoding="utf-8")
    _write_tasks(staged / "tasks", final / "items")
    validation, seconds = {}, 0.0
    for name in ("base", *SKILLS):
        started = time.process_time()
        model = _trained(name, staged, recipe, seed, quiet)
        seconds += time.process_time() - started
        _save(model, staged / name)
        validation[name] = {s: accuracy(model, make_tokenizer(), items) for s, items in held_out.items()}
    record = {"seed": seed, "recipe": asdict(recipe), "validation": validation}
    (staged / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return validation, seconds


def _trained(name: str, staged: Path, recipe: FamilyRecipe, seed: int, quiet: bool) -> LlamaForCausalLM:
    """The base from nothing, or the model of one skill from the saved base; rounded to bf16, held in fp32."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    if name == "base":
        plan, mixture, share = recipe.base, recipe.mixture, recipe.full_share
        model: Any = make_model(recipe.shape, seed)
    else:
        plan, mixture, share = recipe.finetune[name], {name: 1.0}, ONLY_FULL
        model = AutoModelForCausalLM.from_pretrained(staged / "base", dtype=torch.float32, trust_remote_code=False)
    with tqdm(total=plan.steps, desc=f"training {name}", unit="step", disable=True if quiet else None) as bar:
        train(model, lambda rng: draw_mixture(plan.batch, rng, mixture, share), plan, f"{seed} {name}", bar)
    rounded: LlamaForCausalLM = model.bfloat16().float()
    return rounded


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    """Save a checkpoint in bf16, as published models are; `model` itself stays in fp32, with the same values."""
    model.bfloat16().save_pretrained(folder)
    model.float()
    make_tokenizer().save_pretrained(folder)


def _write_items(folder: Path, recipe: FamilyRecipe, seed: int) -> dict[str, list[Item]]:
    """Write <skill>/<split>.jsonl; return the validation items."""
    held_out = {}
    for skill in SKILLS:
        for split in SPLITS:
            items = draw_distinct(skill, split, recipe.n_items[split], random.Random(f"{seed} {skill} {split}"))
            write_items(folder / skill / f"{split}.jsonl", items)
            if split == "val":
                held_out[skill] = items
    return held_out


def _write_tasks(folder: Path, items: Path) -> None:
    """Write configs/quickstart/*.yaml with the paths of their items made absolute."""
    import yaml

    folder.mkdir()
    for source in sorted(TASK_SOURCES.glob("*.yaml")):
        task = yaml.safe_load(source.read_text(encoding="utf-8"))
        files = task["dataset_kwargs"]["data_files"]
        task["dataset_kwargs"]["data_files"] = {split: str(items.resolve() / name) for split, name in files.items()}
        (folder / source.name).write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def summary(family: Family) -> str:
    """A Markdown table of the validation accuracies, in percent."""
    head = "| model | " + " | ".join(SKILLS) + " |\n|---|" + "---:|" * len(SKILLS)
    rows = (f"| {m} | " + " | ".join(f"{row[s]:.1f}" for s in SKILLS) + " |" for m, row in family.validation.items())
    return "\n".join((head, *rows))


def parser() -> Parser:
    p = Parser(prog="scripts/quickstart/family.py", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--save_path", type=Path, default=Path("quickstart_out/family"), help="folder of the family")
    p.add_argument("--seed", type=int, default=42, help="seed of the weights, the batches and the items")
    p.add_argument("--fast", action="store_true", help="a smaller family in seconds, with no promise of accuracy")
    p.add_argument("--steps_scale", type=float, default=1.0, metavar="X", help="factor on the steps of fine-tuning")
    p.add_argument("--rate_scale", type=float, default=1.0, metavar="X", help="factor on the rates of fine-tuning")
    p.add_argument("--overwrite", action="store_true", help="replace what is at --save_path")
    add_output_flags(p)
    return p


def main(argv: Sequence[str]) -> int:
    flags = parser().parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts: spinning threads starve the neighbours
    recipe = scaled(FAST if flags.fast else FULL, flags.steps_scale, flags.rate_scale)
    family = make_family(flags.save_path, seed=flags.seed, quiet=flags.quiet, overwrite=flags.overwrite, recipe=recipe)
    print(summary(family))
    logger.info(f"Percent right on validation items; training took {family.cpu_seconds:.0f} s of CPU.")
    logger.info(f"The family is in {flags.save_path} (lm-eval's include_path: {family.tasks}).")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
