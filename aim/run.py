"""One relaxation from importance to finished folder, alone (performAIM.py) or inside a merge (merge.py --omega)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim.calibration import Calibration
from console.cli import say
from console.errors import CalibrationError, CheckpointError, UsageError
from merging.checkpoint import FLOATS, Checkpoint, open_all
from merging.preflight import Plan, check_space, plan
from merging.recipe import MergeRecipe
from merging.registry import Implementation
from merging.run import Output, Relaxing
from merging.sidefiles import copy_tokenizer, describe_inputs, read_lineage, write_card, write_configs, write_record
from merging.vocabulary import INPUT_EMBEDDING
from merging.writer import ShardedWriter, check_target, parse_size, staged

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from aim.importance import Importance
    from merging.tensors import Block

PAPER = "https://arxiv.org/abs/2502.02421"


def check_omega(omega: float) -> None:
    """Raise UsageError for an omega outside [0, 1]."""
    if not 0.0 <= omega <= 1.0:
        raise UsageError(f"--omega must be in [0, 1] (1 leaves the merge as it is, 0 relaxes most), found {omega:g}.")


@dataclass(frozen=True)
class Settings:
    """How importance is measured: text, precision, batch; and where it is kept."""

    calibration: Calibration
    importance_file: Path | None = None
    calibration_dtype: str = "auto"
    batch_size: int | None = None
    reference: bool = False
    relax_tied: bool = False


@dataclass
class Relaxer:
    """The relaxation of the loop over tensors: importance per tensor, and an account of what it did."""

    importance: Importance
    omega: float
    relax_tied: bool
    account: dict[str, str] = field(default_factory=dict)

    def check(self, merge_plan: Plan) -> None:
        """Decide for every tensor whether it is relaxed, and why not.

        Raises CheckpointError where shapes differ, or where nothing would be relaxed.
        """
        tied_head = "lm_head.weight" not in {t.name for t in merge_plan.tensors}
        for tensor in merge_plan.tensors:
            name = tensor.name
            self.account[name] = self._verdict(name, tensor.is_float, tensor.is_embedding, tied_head)
            source = self._source(name)
            if self.account[name] == "relaxed":
                channels = len(self.importance.activations[source])
                if tensor.shape[self.importance.axes[source]] != channels:
                    raise CheckpointError(
                        f"Tensor {name} is {list(tensor.shape)}, and the importance of it has {channels} channels."
                    )
        if "relaxed" not in self.account.values():
            raise CheckpointError(
                f"The importance measured on {self.importance.base['name']} belongs to none of the tensors "
                f"(the first is {merge_plan.tensors[0].name}); nothing would be relaxed."
            )

    def _source(self, name: str) -> str:
        """The tensor whose activation belongs to `name`: the tied head's for the input embedding."""
        return "lm_head.weight" if INPUT_EMBEDDING.search(name) else name

    def _verdict(self, name: str, is_float: bool, is_embedding: bool, tied_head: bool) -> str:
        if not is_float:
            return "not floating point"
        if is_embedding and not (tied_head and self.relax_tied and "lm_head.weight" in self.importance.activations):
            return "embedding"
        if name.endswith(".bias"):
            return "bias"
        source = self._source(name)
        if source not in self.importance.activations:
            return self.importance.unmeasured.get(source, "no activation was measured for it")
        if not float(self.importance.activations[source].max()) > 0:
            return "its activation is zero everywhere"
        return "relaxed"

    def block(self, name: str, block: Block, base: Tensor, merged: Tensor) -> Tensor:
        """Relax the rows of a block, fp32."""
        from aim.relax import importance, relax

        if self.account[name] != "relaxed":
            return merged
        s = importance(self.importance.activations[self._source(name)].to(merged.device))
        return relax(base, merged, self._along(name, s, merged.dim(), block.rows), self.omega)

    def reference(self, name: str, base: Tensor, merged: Tensor) -> Tensor:
        """Relax a whole bf16 tensor with the original's arithmetic."""
        from aim.relax import relax_reference

        if self.account[name] != "relaxed":
            return merged
        activation = self.importance.activations[self._source(name)]
        return relax_reference(base, merged, self._along(name, activation, merged.dim(), slice(None)), self.omega)

    def _along(self, name: str, channels: Tensor, dimensions: int, rows: slice) -> Tensor:
        """Shape (d_in,) so that it broadcasts along the weight's input axis for the given rows."""
        axis = self.importance.axes[self._source(name)]
        if dimensions == 1:
            return channels[rows]
        return channels[rows].reshape(-1, *[1] * (dimensions - 1)) if axis == 0 else channels

    def details(self) -> dict[str, Any]:
        """Return what the run record says: omega, calibration, and each tensor that was not relaxed, by reason."""
        reasons: dict[str, list[str]] = {}
        for name, verdict in self.account.items():
            if verdict != "relaxed":
                reasons.setdefault(verdict, []).append(name)
        return {
            "omega": self.omega,
            "relaxed": sum(verdict == "relaxed" for verdict in self.account.values()),
            "not_relaxed": reasons,
            "calibration": {k: v for k, v in self.importance.calibration.items() if k != "positions"},
            "importance_of": dict(self.importance.base),
        }

    def sentence(self) -> str:
        """Say how many tensors are relaxed and what the others are."""
        counts = Counter(self.account.values())
        relaxed = counts.pop("relaxed", 0)
        rest = "; ".join(f"{count} not ({reason})" for reason, count in counts.most_common())
        return f"Relaxing {relaxed} tensors with omega {self.omega:g}{'; ' + rest if rest else ''}."


def relaxing_of(
    recipe: MergeRecipe, omega: float | None, importance_file: str | Path | None, quiet: bool = False
) -> Relaxing:
    """Return AIM for the loop of a merge. Raises UsageError where omega, importance or base is missing."""
    if omega is None or importance_file is None:
        raise UsageError("AIM in one pass needs both --omega and --importance FILE (performAIM.py makes such a file).")
    check_omega(float(omega))
    if recipe.base_model is None or recipe.method == "linear":
        raise UsageError(f"AIM in one pass needs a method with a base; {recipe.method} has none: use performAIM.py.")
    file = Path(importance_file)
    if not file.is_file():
        raise UsageError(
            f"--importance {file} does not exist; performAIM.py --importance {file} computes and saves it."
        )
    made: list[Relaxer] = []

    def make(base: Checkpoint, merge_plan: Plan) -> Relaxer:
        from aim.importance import Importance, fingerprint

        found = Importance.load(file)
        found.check_base(fingerprint(base), base.name, file)
        made.append(Relaxer(found, float(omega), relax_tied=recipe.numerics == "reference"))
        made[0].check(merge_plan)
        say(made[0].sentence(), quiet)
        return made[0]

    return Relaxing(omega=float(omega), make=make, details=lambda: made[0].details())


def importance_of(base: Checkpoint, settings: Settings, device: torch.device, quiet: bool) -> Importance:
    """Load the importance of a base where its file stands, else compute it and save it.

    Raises CheckpointError for a file of another base, CalibrationError for text that cannot be used.
    """
    from aim.calibration import cut, load_texts, summary
    from aim.importance import Importance, collect, fingerprint

    file = settings.importance_file
    if file is not None and file.is_file():
        found = Importance.load(file)
        found.check_base(fingerprint(base), base.name, file)
        say(f"Importance from {file}. {summary(dict(found.calibration))}", quiet)
        return found
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    texts = load_texts(settings.calibration)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{base.name} has no tokenizer that loads; calibration needs one ({error}).") from error
    sample = cut(texts, tokenizer, settings.calibration)
    say(summary(sample.account), quiet)
    dtype = base_dtype(base) if settings.calibration_dtype == "auto" else settings.calibration_dtype
    if settings.reference:
        dtype = "bfloat16"
    model: Any = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype)
    model = model.to(device).eval()
    batch_size = 1 if settings.reference else settings.batch_size or (8 if device.type == "cuda" else 1)
    activations, axes, unmeasured = collect(
        model, sample.blocks, batch_size=batch_size, reference=settings.reference, quiet=quiet
    )
    measured = Importance(
        activations=activations,
        axes=axes,
        unmeasured=unmeasured,
        calibration={**sample.account, "dtype": dtype, "device": device.type, "batch_size": batch_size},
        base={"name": base.name, "commit": base.commit, "fingerprint": fingerprint(base)},
        numerics="reference" if settings.reference else "float32",
    )
    if file is not None:
        measured.save(file)
        say(f"Importance saved to {file}.", quiet)
    return measured


def base_dtype(base: Checkpoint) -> str:
    """Return the floating-point dtype that most of the base's tensors are stored in."""
    counts = Counter(info.dtype for info in base.tensors.values() if info.dtype in FLOATS)
    return counts.most_common(1)[0][0]


def perform(
    merged_name: str, base_name: str, omega: float, settings: Settings, output: Output, dtype: str | None
) -> Path:
    """Relax a merged checkpoint towards its base and return the folder.

    dtype of the output: None keeps the merged checkpoint's. Raises UsageError, CheckpointError, CalibrationError.
    """
    started = time.perf_counter()
    check_omega(omega)
    settings.calibration.check()
    check_target(output.save_path, output.overwrite)
    max_shard_bytes = parse_size(output.max_shard_size)
    merged, base = open_all([merged_name, base_name])
    if merged.folder.resolve() == base.folder.resolve():
        raise UsageError(f"--merged_model and --pretrained_model_name are both {merged.name}: nothing to relax.")
    relax_plan = plan(merged, [merged, base], "bfloat16" if settings.reference and dtype is None else dtype)
    for note in relax_plan.notes:
        say(note, output.quiet)
    if omega == 1 and not settings.reference:
        say("omega 1: the merged model is left as it is.", output.quiet)
    check_space(output.save_path, relax_plan.bytes)
    from merging import stream  # loads torch

    device = stream.resolve_device(output.device)
    relaxer = Relaxer(importance_of(base, settings, device, output.quiet), omega, settings.relax_tied)
    relaxer.check(relax_plan)
    say(relaxer.sentence(), output.quiet)
    identity = Implementation(lambda base, finetuned: finetuned[0], None, lambda base, finetuned: finetuned[0])
    job = stream.Job(identity, {}, device, reference=settings.reference, relaxation=relaxer)
    lineage: Mapping[str, Any] = {**read_lineage(merged), "omega": omega}
    if lineage["base_model"] is None:
        lineage = {**lineage, "base_model": base_name}
    recipe = {
        "merged_model": merged_name,
        "pretrained_model_name": base_name,
        "omega": omega,
        "numerics": "reference" if settings.reference else "float32",
    }
    with staged(output.save_path, output.overwrite) as folder:
        writer = ShardedWriter(folder, relax_plan.tensors, max_shard_bytes)
        stream.run(relax_plan, job, base, [merged], merged, writer, output.quiet, label="relaxing")
        writer.close()
        donor = merged if copy_tokenizer(merged, folder) else base
        if donor is base:
            copy_tokenizer(base, folder)
            say(f"{merged.name} has no tokenizer; the base's was saved.", output.quiet)
        write_configs(merged, [base], folder, relax_plan)
        write_card(folder, output.save_path.name, lineage, recipe, PAPER)
        details = {
            "recipe": recipe,
            "inputs": describe_inputs([base, merged]),
            "notes": list(relax_plan.notes),
            "relaxation": relaxer.details(),
            "tokenizer": {"from": donor.name},
            "device": str(device),
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_record(folder, lineage, details)
    return output.save_path
