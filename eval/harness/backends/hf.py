"""lm-eval's `hf` model with the corrections of `eval/harness/corrections`."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from common.errors import EvaluationError
from common.hardware import ran_out
from eval.harness.backends import batches
from eval.harness.backends.answering import Arguments, arguments_of, not_enough_memory
from eval.harness.corrections import VERSION, batch_invariance, generation_config
from eval.harness.corrections.decoding import ContextDecoder
from eval.harness.corrections.encoding import CorrectedEncoding, TokenRequest, check_choice_lengths, check_vocabulary
from eval.harness.corrections.logits import FiniteLogits, check_logits
from eval.harness.corrections.sampling import settings_without_seed, take_sampling
from eval.harness.corrections.stop_strings import StopCriteria, cut, end_ids
from eval.harness.corrections.weights import check_loading_info
from eval.request_types import Facts, Request

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from common.files.json_values import JsonObject

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Generation:
    """One generation request: its place, arguments and prompt ids."""

    place: int
    context: str
    settings: JsonObject
    prompt: list[int]


class HFModel(CorrectedEncoding, HFLM):  # type: ignore[misc]
    """transformers in this process.

    `rows` is the number of rows of a batch, or None for an estimate by memory; `uses_detection` leaves that to
    lm-eval's own `auto`. Each launched process has a model of its own: the evaluation shares out the requests.
    """

    _model: Any
    think_end_token: Any
    batch_schedule: Any

    def __init__(
        self, pretrained: str | PreTrainedModel, *, rows: int | None = None, uses_detection: bool = False,
        adapter: str | None = None, label: str = "the model", **arguments: object,
    ) -> None:  # fmt: skip
        self._adapter, self._label = adapter, label
        self.remarks: list[str] = []
        with _single_process():
            super().__init__(pretrained, **arguments)
        self._rows, self._uses_detection = rows, uses_detection
        self._row_limit: int | None = None
        self._last_batch = (0, 0)
        self._most_rows: dict[str, int] = {}
        self._sizes: tuple[Sequence[TokenRequest] | None, list[int]] = (None, [])
        self._generated: dict[tuple[str, str], Facts] = {}
        self._truncated: set[tuple[str, ...]] = set()
        self._kind = self.device.type if self.device.type in batches.MOST_ROWS else "cpu"
        self._settings = self.config.to_dict()
        self._decoder = ContextDecoder(self.tokenizer)
        embeddings = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        self._embeddings = int(embeddings or batches.vocabulary(self._settings))
        self._pad = batches.padding_id(self.tokenizer, self._embeddings)
        if isinstance(self.think_end_token, str):
            self.think_end_token = self.tokenizer.convert_tokens_to_ids(self.think_end_token)
        config = getattr(self.model, "generation_config", None)
        self._ends = config
        self.left_out = generation_config.left_out(config)
        self.remarks += [s for s in [generation_config.sentence(self.left_out)] if s]
        self.invariance = batch_invariance.Invariance()
        if self.backend == "causal":
            size = min(len(self.tokenizer), self._embeddings or len(self.tokenizer))
            self.invariance = batch_invariance.probe(self.model, size, self._pad, self.max_length)
            self.remarks += self.invariance.sentences()

    # Loading

    def _create_model(self, pretrained: str, peft: str | None = None, **arguments: object) -> None:
        """Load the weights as lm-eval does; refuse those that are not complete, then add the adapter."""
        quantized = _quantization(arguments)
        if quantized is not None:
            arguments["quantization_config"] = quantized
        if arguments.get("autogptq") or arguments.get("gptqmodel"):
            super()._create_model(pretrained, **arguments)
        else:
            # mismatched tensors are then listed too, and refused by name below
            super()._create_model(pretrained, output_loading_info=True, ignore_mismatched_sizes=True, **arguments)
            self._model, info = self._model
            self.remarks += check_loading_info(info, self._label)
        if self._adapter is not None:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, self._adapter)

    # Batches

    @property
    def batch_size(self) -> str:
        """Return "auto", so that lm-eval asks `_batch_scheduler` for the size of each batch."""
        return "auto"

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[TokenRequest]) -> int:
        """Return the size of the scoring batch that the request at `pos` belongs to."""
        requests = n_reordered_requests
        if self._uses_detection and self._row_limit is None and self.invariance.scoring.any_batch:
            self.batch_schedule = min(self.batch_schedule, len(requests))
            return int(super()._batch_scheduler(pos, requests))
        if self._sizes[0] is not requests:
            lengths = [len(self._input(r[1], r[2])) for r in requests]
            equal = not self.invariance.scoring.any_batch
            self._sizes = requests, batches.batch_sizes(lengths, self._scoring_rows, equal)
        return self._sizes[1][pos]

    def _detect_batch_size(self, requests: Sequence[TokenRequest] | None = None, pos: int = 0) -> int:
        """Return the rows of a scoring batch; without requests, of windows of the full length."""
        if self._uses_detection and requests is not None:
            return int(super()._detect_batch_size(requests, pos))
        if not self.invariance.scoring.any_batch:
            return 1
        return self._scoring_rows(self.max_length)

    def _input(self, context: list[int], continuation: list[int]) -> list[int]:
        return (context + continuation)[-(self.max_length + 1) :][:-1]

    def _scoring_rows(self, length: int) -> int:
        available = batches.available_bytes(self.device)
        if self.invariance.scoring.one_row:
            return 1
        rows = self._rows or batches.scoring_rows(self._settings, length, available, self._kind)
        return min(rows, self._row_limit or rows)

    def _generation_rows(self, length: int) -> int:
        if self.invariance.generation.one_row:
            return 1
        element = self.model.dtype.itemsize
        available = batches.available_bytes(self.device)
        rows = self._rows or batches.generation_rows(self._settings, element, length, available, self._kind)
        return min(rows, self._row_limit or rows)

    def adapt(self, error: Exception) -> bool:
        """Halve the rows of a batch after an out-of-memory error.

        Raises:
            EvaluationError: The batch had a single row.
        """
        if not ran_out(error):
            return False
        rows, tokens = self._last_batch
        if rows <= 1:
            raise not_enough_memory(tokens, self.device) from error
        self._row_limit = max(1, rows // 2)
        self._sizes = (None, [])
        return True

    def _note_batch(self, kind: str, rows: int, tokens: int) -> None:
        self._last_batch = (rows, tokens)
        self._most_rows[kind] = max(rows, self._most_rows.get(kind, 0))

    def release(self) -> None:
        """Give memory that nothing refers to any more back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def used(self) -> JsonObject:
        """Return what the results file records: dtype, rows of the largest batches, and what the corrections found."""
        return {
            "dtype_used": str(self.model.dtype).removeprefix("torch."),
            "batch_size_used": dict(self._most_rows),
            "generation_config_left_out": {k: str(v) for k, v in self.left_out.items()},
            "batch_invariance": asdict(self.invariance),
            "corrections": VERSION,
        }

    # Answers

    @property
    def prefix_token_id(self) -> int:
        """Id before an empty prompt. Raises EvaluationError where the tokenizer has neither begin nor end token."""
        prefix: int | None = super().prefix_token_id
        if prefix is None:
            raise EvaluationError(
                f"The tokenizer of {self._label} has no begin or end token for an empty prompt; name one "
                "with --model_args prefix_token_id=ID."
            )
        return prefix

    def arguments(self, request: Request) -> Arguments:
        """Return lm-eval's arguments of a request."""
        return arguments_of(request)

    def group_of(self, request: Request) -> int:
        """All requests of a kind may be asked together."""
        return 0

    def facts(self, method: str, arguments: Arguments) -> Facts:
        """Return what is known of an answer besides its text or number."""
        if method == "generate_until":
            return self._generated.pop((str(arguments[0]), repr(arguments[1])), Facts())
        return Facts(prompt_truncated=tuple(arguments) in self._truncated)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the logits of a batch."""
        self._note_batch("score", inps.shape[0], inps.shape[1])
        logits: Tensor = super()._model_call(inps, attn_mask, labels)
        return logits

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """Return the log-probabilities of one row's choice. Raises EvaluationError where they are not finite."""
        selected: Tensor = super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)
        check_logits(selected, self.model.dtype)
        return selected

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        check_choice_lengths(requests, self.max_length)
        for key, context, continuation in requests:
            check_vocabulary([*context, *continuation], self._embeddings, self._label)
            if key is not None and self.backend == "causal" and len(context) + len(continuation) > self.max_length + 1:
                self._truncated.add(tuple(key))
        return list(super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate as lm-eval does, longest prompts first, requests of equal settings together."""
        groups: dict[str, list[_Generation]] = {}
        for place, (context, settings) in enumerate(r.args for r in requests):
            one = _Generation(place, context, settings, self.tok_encode(context) or [self.prefix_token_id])
            groups.setdefault(repr(sorted(settings_without_seed(settings).items())), []).append(one)
        texts: list[str] = [""] * len(requests)
        for group in groups.values():
            for batch in self._generation_batches(group):
                for one, (text, facts) in zip(batch, self._generate(batch), strict=True):
                    texts[one.place] = text
                    self._generated[one.context, repr(one.settings)] = facts
                    self.cache_hook.add_partial("generate_until", (one.context, one.settings), text)
        return texts

    def _generation_batches(self, group: list[_Generation]) -> Iterator[list[_Generation]]:
        most = normalize_gen_kwargs(dict(group[0].settings), self.max_gen_toks)["max_gen_toks"]
        group.sort(key=lambda one: (-len(one.prompt), one.context, one.settings.get("seed") or 0))
        lengths = [len(one.prompt) for one in group]
        equal = not self.invariance.generation.any_batch
        sizes = batches.batch_sizes(lengths, lambda length: self._generation_rows(length + most), equal)
        start = 0
        while start < len(group):
            yield group[start : start + sizes[start]]
            start += sizes[start]

    def _generate(self, batch: Sequence[_Generation]) -> list[tuple[str, Facts]]:
        """Generate one batch; return each text with its facts."""
        settings: JsonObject = dict(normalize_gen_kwargs(dict(batch[0].settings), self.max_gen_toks))
        until = handle_stop_sequences(list(settings.pop("until")), eos=self.tokenizer.eos_token)
        most, beams = settings.pop("max_gen_toks"), int(settings.get("num_beams") or 1)
        settings.pop("seed", None)
        room = self.max_length - (most if self.backend == "causal" else 0)
        if room < 1:
            raise EvaluationError(f"{most} new tokens leave no room for a prompt in {self.max_length}; ask for fewer.")
        prompts = [one.prompt[-room:] for one in batch]
        width = max(map(len, prompts))
        check_vocabulary((i for prompt in prompts for i in prompt), self._embeddings, self._label)
        self._note_batch("generate", len(batch), width + most)
        ids = torch.full((len(batch), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            first = width - len(prompt) if self.backend == "causal" else 0  # encoders may count positions from the left
            ids[row, first : first + len(prompt)] = torch.tensor(prompt)
            mask[row, first : first + len(prompt)] = 1
        start = width if self.backend == "causal" else 1
        ends = end_ids(self.tokenizer, self._ends, until)
        stops = StopCriteria(self._decoder, start, len(batch), until, ends, self.think_end_token)
        processors = LogitsProcessorList([FiniteLogits(self.model.dtype)])
        processors += take_sampling(settings, [int(one.settings.get("seed") or 0) for one in batch])
        with (
            torch.inference_mode(),
            generation_config.neutral_config(self.model),
            torch.autocast(
                self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            out = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=most,
                do_sample=False,
                use_cache=True,
                pad_token_id=self._pad,
                eos_token_id=sorted(ends) or None,
                stopping_criteria=StoppingCriteriaList([stops] if beams == 1 else []),
                logits_processor=processors,
                **settings,
            )
        rows = out[:, start:].tolist()
        continuations = []
        for row, (one, prompt) in enumerate(zip(batch, prompts, strict=True)):
            new = rows[row][: stops.lengths[row]] if beams == 1 else rows[row]
            text, count, is_stopped = self._text(prompt, new, until, ends)
            finish = "stop" if is_stopped else "length"
            continuations.append((text, Facts(count, finish, len(one.prompt) > room)))
        return continuations

    def _text(
        self, prompt: list[int], new: list[int], until: Sequence[str], ends: frozenset[int]
    ) -> tuple[str, int, bool]:
        """Return the answer's text, its number of generated tokens, and whether it ended before the limit."""
        end = next((at for at, i in enumerate(new) if i in ends), None)
        count = len(new) if end is None else end + 1
        new_ids = new[:end]
        context = prompt if self.backend == "causal" else []
        if self.think_end_token is not None and self.think_end_token in new_ids:
            after = len(new_ids) - new_ids[::-1].index(self.think_end_token)
            context, new_ids = new_ids[:after], new_ids[after:]
            text = self._decoder.decode(context, new_ids).lstrip()
        else:
            text = self._decoder.decode(context, new_ids)
        shortened = cut(text, until)
        return shortened, count, end is not None or shortened != text


@contextmanager
def _single_process() -> Iterator[None]:
    """Hide a launcher's variables while lm-eval sets up its model, which would wait for the other processes."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _quantization(arguments: JsonObject) -> BitsAndBytesConfig | None:
    """Take load_in_4bit and its like out of the arguments; return them as transformers' configuration, or None."""
    names = [n for n in arguments if n.startswith(("load_in_", "bnb_", "llm_int8_"))]
    options = {n: arguments.pop(n) for n in names}
    if not any(options.get(n) for n in ("load_in_4bit", "load_in_8bit")):
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)
