"""Planner: the plan of every result tensor, from headers and configs alone; no weights are read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

from common.errors import CheckpointError
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.storage import CODES, FLOATS, TensorInfo
from merging.checkpoints.tensor_names import is_computed, layer_of, role_of, transposed_names
from merging.plan.checks import check_config
from merging.plan.config_meaning import compare_configs, note_differences
from merging.plan.dtypes import wider_dtype
from merging.plan.layer_kinds import check_sources
from merging.plan.prediction import main_depths, prediction_names
from merging.plan.slices import Inputs, Slot, slots_of
from merging.plan.tied_weights import Heads, heads_of
from merging.plan.types import LayerOrigin, Plan, Source, TensorPlan, source_of
from merging.plan.unmerged_tensors import HEAD_KEYS, Exclusion, ExtraTensors
from merging.recipe.merge_recipe import DEFAULTS, PlanOptions
from merging.recipe.schedules import OutputSlice
from merging.tokenizers.choice import extra_rows
from merging.tokenizers.token_ids import read_tokenizer
from merging.tokenizers.vocabulary import Alignment, Vocabulary, alignment_of, describe, is_vocabulary_tensor, listed


def plan(
    inputs: Inputs,
    output_slices: Sequence[OutputSlice],
    dtype: str | None,
    vocabulary: Vocabulary,
    exclusion: Exclusion | None = None,
    options: PlanOptions = DEFAULTS,
) -> Plan:
    """Plan every tensor of the result from headers and configs.

    Args:
        inputs: The checkpoints of the merge.
        output_slices: The layers of the result with their models and parameters.
        dtype: Dtype of the result's floating-point tensors; None keeps the template model's.
        vocabulary: The vocabulary of the result.
        exclusion: Tensors that are copied instead of merged.
        options: Rules for inputs that differ.

    Raises:
        UsageError: The slices do not fit the models.
        CheckpointError: Shapes, names or configs do not fit; names the first three differences.
    """
    for checkpoint in inputs.all:
        check_config(checkpoint)
    planner = _Planner(inputs, dtype, vocabulary, heads_of(inputs), options, exclusion)
    sliced = any(output_slice.layers is not None for output_slice in output_slices)
    predicting = prediction_names(inputs.template_model) if sliced else frozenset[str]()
    slots = slots_of(inputs, output_slices, planner.heads.names(inputs.template_model), predicting)
    if predicting:
        slots = planner.apply_prediction_rule(slots, predicting)
    if not sliced:
        planner.compare_depths()
    if exclusion is not None:
        slots = exclusion.apply(slots, inputs, planner.heads)
        planner.notes += exclusion.notes(slots, inputs)
    tensors = [planner.tensor(slot) for slot in slots]
    planner.report_unused(sliced)
    planner.check_chosen_rows([tensor for tensor in tensors if tensor is not None])
    planner.raise_problems()
    planner.notes += [*planner.wide_note(), *planner.extra.notes(inputs.template_model.name)]
    conflicts, lengths = compare_configs(
        inputs.template_model, inputs.all[1:], by_layer=not sliced, ignored=HEAD_KEYS if exclusion else ()
    )
    planner.notes += note_differences(conflicts, lengths, options.allow_config_mismatch)
    origins = _layer_origins(inputs, slots)
    for sentence in check_sources(origins):
        if not options.allow_config_mismatch:
            raise CheckpointError(
                f"Slices put layers of different kinds together: {sentence}; choose other layers, or add "
                "--allow_config_mismatch."
            )
        planner.notes.append(f"Allowed by --allow_config_mismatch: {sentence}.")
    if vocabulary.added:
        planner.notes.append(f"Vocabulary: {listed(vocabulary.added)} added to {inputs.template_model.name}'s.")
    if extra := extra_rows(inputs.template_model):
        changed = [t for t in tensors if t and is_vocabulary_tensor(t.source.name, t.source.checkpoint) and t.is_float]
        if any(t.shape != t.source.checkpoint.tensors[t.source.name].shape for t in changed):
            raise CheckpointError(
                f"{inputs.template_model.name} has {extra} rows more in its input embedding than in its output head, "
                "so that its vocabulary cannot change; leave --tokenizer base, without --pad_to_multiple_of."
            )
    ends = {t.shape[0] for t in tensors if t and is_vocabulary_tensor(t.source.name, t.source.checkpoint)}
    if vocabulary.multiple > 1 and ends:
        planner.notes.append(
            f"Vocabulary: {' and '.join(map(str, sorted(ends)))} rows, a multiple of {vocabulary.multiple}; rows that "
            "no model has are the mean of the others."
        )
    if vocabulary.tokens is None and read_tokenizer(vocabulary.folder) is not None:
        planner.notes.append(
            f"Vocabulary: the tokenizer of {vocabulary.name} is defined by custom code, which is not run; all models "
            "have the same tokenizer files, or none, and rows are matched by number."
        )
    if vocabulary.tokens_without_rows:
        planner.notes.append(
            f"Tokenizer: {listed(vocabulary.tokens_without_rows)} without a row left out of the result's."
        )
    reading = [note for checkpoint in inputs.all for note in checkpoint.notes]
    return Plan(
        tensors=tuple(tensor for tensor in tensors if tensor is not None),
        vocabulary=vocabulary,
        tied=planner.heads.tied,
        notes=tuple(dict.fromkeys((*reading, *planner.heads.notes, *planner.notes))),
        left_out=planner.left_out,
        layer_origins=origins,
        head_of=exclusion.owner if exclusion and exclusion.changes_head(slots, inputs.template_model) else None,
    )


def _layer_origins(inputs: Inputs, slots: Sequence[Slot]) -> dict[str, tuple[LayerOrigin, ...]]:
    origins: defaultdict[str, dict[int, LayerOrigin]] = defaultdict(dict)
    for slot in slots:
        new, old = layer_of(slot.name), layer_of(slot.source[1])
        if new and old and slot.output_slice is not None and slot.output_slice.layers is not None:
            sources = zip((inputs.models[i] for i in slot.output_slice.models), slot.models, strict=True)
            based = [(inputs.base, slot.base)] if inputs.base is not None else []
            further_sources = [(c, index[1]) for c, name in (*sources, *based) if (index := layer_of(name))]
            origins[new[0]].setdefault(new[1], LayerOrigin(slot.source[0], old[1], tuple(further_sources)))
    return {stack: tuple(origin[i] for i in sorted(origin)) for stack, origin in origins.items()}


class _Planner:
    """Planner of tensors; problems are collected and reported together."""

    def __init__(
        self,
        inputs: Inputs,
        dtype: str | None,
        vocabulary: Vocabulary,
        heads: Heads,
        options: PlanOptions,
        exclusion: Exclusion | None = None,
    ) -> None:
        self.inputs, self.dtype, self.vocabulary, self.heads = inputs, dtype, vocabulary, heads
        self.options, self.exclusion = options, exclusion
        self._kept_wide: dict[str, list[str]] = {}
        self.extra = ExtraTensors(options, inputs.all)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.left_out: dict[str, tuple[str, ...]] = {}
        self._lacking: Counter[str] = Counter()
        self._transposed: dict[int, frozenset[str]] = {}
        self._used: dict[int, set[str]] = {id(checkpoint): set() for checkpoint in inputs.all}

    def raise_problems(self) -> None:
        """Raise CheckpointError where there are problems."""
        template = self.inputs.template_model
        for name, count in self._lacking.items():
            other = next(checkpoint for checkpoint in self.inputs.all if checkpoint.name == name)
            if 2 * count > len(template.tensors) and other.tensors:
                raise CheckpointError(
                    f"{name} names its tensors otherwise than {template.name} (its first is "
                    f"{next(iter(other.tensors))}, there it is {next(iter(template.tensors))}): they are of different "
                    "architectures, or one has to be loaded and saved again with transformers."
                )
        if self.problems:
            problems = list(dict.fromkeys(self.problems))
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise CheckpointError(f"The models do not fit together: {'; '.join(problems[:3])}{more}.")

    def apply_prediction_rule(self, slots: Sequence[Slot], predicting: Collection[str]) -> list[Slot]:
        """Return the slots of slices after the rule for multi-token prediction, which no slice contains."""
        rule, template = self.options.extra_tensors or "keep", self.inputs.template_model
        names = sorted(predicting)
        if rule == "error":
            self.problems.append(f"no slice contains {names[0]} of {template.name} (multi-token prediction)")
        words = {"keep": "copied after the layers of the slices", "drop": "dropped", "error": "refused"}
        self.notes.append(
            f"{template.name} has multi-token prediction: {', '.join(names[:3])} ({len(names)} tensors), "
            f"{words[rule]} (--extra_tensors)."
        )
        return [slot for slot in slots if rule == "keep" or slot.source[1] not in predicting]

    def compare_depths(self) -> None:
        """Report models with another number of layers, instead of every tensor that they lack or have in addition."""
        template = self.inputs.template_model
        depths = main_depths(template)
        for other in self.inputs.all[1:]:
            other_depths = main_depths(other)
            for stack in depths.keys() & other_depths.keys():
                if depths[stack] != other_depths[stack]:
                    self.problems.append(
                        f"{template.name} has {depths[stack]} layers ({stack}*), {other.name} {other_depths[stack]}; "
                        "choose the layers in a recipe with slices"
                    )
        self.raise_problems()

    def tensor(self, slot: Slot) -> TensorPlan | None:
        """Return the plan of one tensor; None where it is dropped or a problem was recorded."""
        checkpoint, name = slot.source
        stored = self.heads.stored(checkpoint, name)
        if stored is None:
            self.problems.append(f"{checkpoint.name} has no tensor {name}")
            return None
        info = checkpoint.tensors[stored]
        if info.dtype not in CODES:
            raise CheckpointError(
                f"{checkpoint.name}: tensor {name} is stored as {info.dtype}, which cannot be merged."
            )
        shape = info.shape
        if is_vocabulary_tensor(stored, checkpoint):
            shape = (self.vocabulary.rows(shape[0]), *shape[1:])
        is_float = info.dtype in FLOATS and not is_computed(slot.name, shape)  # other tensors are copied
        source = self._source(checkpoint, name, slot.name, shape, is_float)
        output_slice, base = slot.output_slice if is_float else None, self.inputs.base
        models_of_slice = [] if output_slice is None else [self.inputs.models[i] for i in output_slice.models]
        lacking = self._lacking_in(models_of_slice, slot, base if output_slice is not None else None)
        rule = self.extra.rule(checkpoint, name, lacking) if lacking else "error"
        if lacking and rule != "error":
            self.extra.note(rule, slot.name, lacking)
            if rule == "drop":
                return None
            output_slice, models_of_slice = None, []
        models = [
            self._source(m, n, slot.name, shape, is_float)
            for m, n in zip(models_of_slice, slot.models if output_slice is not None else (), strict=True)
        ]
        from_base = (
            None if base is None or output_slice is None else self._source(base, slot.base, slot.name, shape, is_float)
        )
        if source is None or None in models or (from_base is None and base is not None and output_slice is not None):
            return None
        sources = [part for part in (source, *models, from_base) if part is not None]
        dtype = self._dtype(slot.name, info.dtype, sources) if is_float else info.dtype
        return TensorPlan(
            name=slot.name,
            shape=shape,
            dtype=dtype,
            source=source,
            models=tuple(model for model in models if model is not None),
            base=from_base,
            parameters=output_slice.at(slot.name, slot.depth, slot.models) if output_slice is not None else {},
            is_float=is_float,
            is_embedding=len(shape) == 2 and role_of(slot.name) == "input",
            transposed=stored in self._transposed_in(checkpoint),
            positions=output_slice.models if output_slice is not None else (),
        )

    def _lacking_in(self, models: Sequence[Checkpoint], slot: Slot, base: Checkpoint | None) -> list[Checkpoint]:
        """Return the inputs that have no tensor for a tensor of the result."""
        names = [*zip(models, slot.models, strict=False), *([(base, slot.base)] if base is not None else [])]
        missing = {id(c): c for c, name in names if self.heads.stored(c, name) is None}
        return list(missing.values())

    def _dtype(self, name: str, stored: str, sources: Sequence[Source]) -> str:
        """Return the dtype of a floating-point tensor. Raises CheckpointError for float64 without --dtype."""
        pairs = [(source.checkpoint, source.name) for source in sources]
        dtype = self.dtype or stored
        if self.options.keep_wide:
            wide = wider_dtype(pairs, dtype)
            if wide != dtype:
                self._kept_wide.setdefault(wide, []).append(name)
            dtype = wide
        double = [c.name for c, n in pairs if c.tensors[n].dtype == "float64"]
        if double and len(pairs) > 1 and (self.options.keep_wide or dtype == "float64"):
            raise CheckpointError(
                f"{double[0]}: tensor {name} is stored as float64, and merging computes in float32; give --dtype "
                "float32 (or less) to have it rounded."
            )
        return dtype

    def wide_note(self) -> list[str]:
        """Return notes on tensors that keep a wider dtype than the rest of the result."""
        return [
            f"Kept in {dtype}, as every input stores them: {', '.join(names[:3])} ({len(names)} tensors); --dtype "
            "gives one dtype to all."
            for dtype, names in self._kept_wide.items()
        ]

    def _transposed_in(self, checkpoint: Checkpoint) -> frozenset[str]:
        key = id(checkpoint)
        if key not in self._transposed:
            self._transposed[key] = transposed_names({name: info.shape for name, info in checkpoint.tensors.items()})
        return self._transposed[key]

    def _source(
        self, checkpoint: Checkpoint, name: str, output: str, shape: tuple[int, ...], is_float: bool
    ) -> Source | None:
        """Return a checkpoint's tensor for the result's tensor `output` of shape `shape`."""
        label = output if name == output else f"{output} (its {name})"
        stored = self.heads.stored(checkpoint, name)
        if stored is None:
            template = self.inputs.template_model.name
            self.problems.append(f"{checkpoint.name} has no tensor {name} {list(shape)}, which {template} has")
            self._lacking[checkpoint.name] += 1
            return None
        self._used[id(checkpoint)].add(stored)
        info = checkpoint.tensors[stored]
        if info.dtype not in CODES:
            raise CheckpointError(
                f"{checkpoint.name}: tensor {stored} is stored as {info.dtype}, which cannot be merged."
            )
        if is_float and info.dtype not in FLOATS:
            self.problems.append(
                f"{label} is stored as {info.dtype} in {checkpoint.name}, a floating-point type was expected"
            )
        if is_vocabulary_tensor(stored, checkpoint) and info.shape[1:] == shape[1:]:
            return Source(checkpoint, stored, self._aligned(checkpoint, label, shape[0], info))
        if info.shape != shape:
            template_model = self.inputs.template_model.name
            self.problems.append(
                f"{label} is {list(shape)} in {template_model} and {list(info.shape)} in {checkpoint.name}"
            )
        return Source(checkpoint, stored)

    def _aligned(self, checkpoint: Checkpoint, label: str, rows: int, info: TensorInfo) -> Alignment | None:
        row_count, template = info.shape[0], self.inputs.template_model
        forced = any(wish.force for wish in self.vocabulary.chosen.values())
        if checkpoint is template and self.vocabulary.folder == template.folder and row_count == rows and not forced:
            return None
        alignment = alignment_of(self.vocabulary, rows, checkpoint.folder, row_count)
        if alignment is None:
            self.problems.append(
                f"{label} has {rows} rows in {self.vocabulary.name} and {row_count} in {checkpoint.name}, and without "
                "a tokenizer in both that transformers reads their rows cannot be matched by token"
            )
            return None
        if len(alignment.missing) > rows / 2:
            self.problems.append(
                f"{checkpoint.name} has only {rows - len(alignment.missing)} of the {rows} tokens of "
                f"{self.vocabulary.name}: their tokenizers are not of one family"
            )
        sentence = describe(checkpoint.name, row_count, alignment)
        if sentence and not (checkpoint is template and self.vocabulary.folder == template.folder):
            self.notes.append(sentence)
        return alignment if alignment.rows is not None or row_count != rows else None

    def check_chosen_rows(self, tensors: Sequence[TensorPlan]) -> None:
        """Report vocabulary tensors without a source in a model whose row `tokenizer.tokens` names."""
        owners = [wish.checkpoint for wish in self.vocabulary.chosen.values() if wish.checkpoint is not None]
        for tensor in tensors if owners else ():
            if is_vocabulary_tensor(tensor.source.name, tensor.source.checkpoint):
                self.problems += [
                    f"tokenizer.tokens names a row of {owner.name}, which {tensor.name} is not merged from"
                    for owner in owners
                    if source_of(tensor, owner) is None
                ]

    def report_unused(self, sliced: bool) -> None:
        """Report unused tensors of the inputs: computed buffers and heads are left out, others are problems."""
        template = self.inputs.template_model
        expected = set(self.heads.names(template))
        for checkpoint in self.inputs.all:
            extra = [
                name
                for name in checkpoint.tensors
                if name not in self._used[id(checkpoint)] and name not in expected
                and not (self.exclusion and self.exclusion.matches(name))
                and not (sliced and layer_of(name) is not None)
            ]  # fmt: skip
            parts = [name for name in extra if self.extra.leaves_out(checkpoint, name)]
            if parts:
                self.left_out[checkpoint.name] = tuple(parts)
                self.notes.append(
                    f"Not in {template.name}: {', '.join(parts[:3])} ({len(parts)} tensors) of {checkpoint.name}, "
                    "left out (--extra_tensors)."
                )
            extra = [name for name in extra if name not in parts]
            for name in extra:
                info = checkpoint.tensors[name]
                needless = info.dtype not in FLOATS or is_computed(name, info.shape) or name in self.heads.dropped
                if not needless and role_of(name) != "head":
                    self.problems.append(
                        f"{checkpoint.name} has a tensor {name}, which {template.name} lacks (--extra_tensors "
                        "keep leaves it out)"
                    )
            if extra and checkpoint is not template:
                self.left_out[checkpoint.name] = (*self.left_out.get(checkpoint.name, ()), *extra)
                self.notes.append(
                    f"{checkpoint.name}: left out {', '.join(extra[:3])}, which {template.name} computes or ties."
                )
