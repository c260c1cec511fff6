"""Config and generation config of the result: the template model's, changed to the result's tensors and tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path

from common.errors import CheckpointError
from common.files.json_values import JsonObject, JsonValue
from common.files.paths import read_json
from common.terminal_text import quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.tensor_names import role_of
from merging.plan.layer_config import adapt_layers
from merging.plan.layer_kinds import check_kinds
from merging.plan.prediction import prediction_names, without_prediction
from merging.plan.slices import Inputs
from merging.plan.tied_weights import main_of
from merging.plan.types import Plan
from merging.plan.unmerged_tensors import HEAD_KEYS
from merging.tokenizers.choice import embedding_rows, extra_rows
from merging.tokenizers.config_ids import Numbering, renumber
from merging.tokenizers.token_ids import token_ids

GENERATION = (
    "max_length", "min_length", "early_stopping", "do_sample", "num_beams", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
)  # fmt: skip
"""Generation keys of older configs, used where there is no generation_config.json."""


def make_configs(inputs: Inputs, plan: Plan) -> tuple[dict[str, JsonObject], list[str]]:
    """Return {file name: content} of config.json and generation_config.json, and notes on them.

    The config is the template model's, with dtype, vocabulary, tying and layers of the result's tensors. The generation
    config is the template model's, with the end-of-sequence tokens of all inputs. Both have the result's token ids.

    Raises:
        CheckpointError: A token id is no number or has no row in the result, or the config cannot express the layers.
    """
    template_model = inputs.template_model
    config, generation = deepcopy(dict(template_model.config)), deepcopy(_generation_config(template_model))
    if plan.head_of is not None:
        config = {key: value for key, value in config.items() if key not in HEAD_KEYS}
        config |= {key: value for key, value in plan.head_of.config.items() if key in HEAD_KEYS}
    dtypes = {tensor.dtype for tensor in plan.tensors if tensor.is_float}
    if len(dtypes) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = dtypes.pop()
    predicting = prediction_names(template_model)
    if not any(tensor.source.name in predicting for tensor in plan.tensors):
        config = without_prediction(config)
    rows, extra = rows_of(template_model, plan), extra_rows(template_model)
    parts = list(_parts(config, (embedding_rows(template_model) or 0) - extra or None))
    for part in parts:
        if rows is not None and "vocab_size" in part:
            part["vocab_size"] = rows - extra
        if plan.tied and part.get("tie_word_embeddings") is False:
            part["tie_word_embeddings"] = True
        if not plan.tied and ("tie_word_embeddings" in part or part is config):  # an absent key may default to true
            part["tie_word_embeddings"] = False
    if plan.layer_origins:
        adapt_layers(config, template_model, plan.layer_origins)
        check_kinds(config, template_model, plan.layer_origins)
    numbering = _numbering(template_model, plan, rows)
    lost = {
        "config.json": [key for part in parts for key in renumber(part, numbering, template_model.name)],
        "generation_config.json": renumber(generation, numbering, template_model.name),
    }
    ends = dict.fromkeys(i for checkpoint in inputs.all for i in _end_ids(checkpoint, plan, rows))
    if ends or "eos_token_id" in generation:
        generation["eos_token_id"] = list(ends) if len(ends) > 1 else next(iter(ends), None)
    notes = [
        f"{file}: {', '.join(dict.fromkeys(keys))} named tokens without a row in the result, which were removed."
        for file, keys in lost.items()
        if keys
    ]
    return {"config.json": config, "generation_config.json": generation}, notes


def rows_of(template_model: Checkpoint, plan: Plan) -> int | None:
    """Return the number of rows of the result's input embedding; None where there is none."""
    table = main_of(template_model, "input")
    return next((t.shape[0] for t in plan.tensors if t.source.name == table and role_of(t.name) == "input"), None)


def _parts(config: JsonObject, rows: int | None) -> Iterator[JsonObject]:
    """Yield the config, and nested configs of the same vocabulary: the language model's, or one of equal size."""
    yield config
    for name, part in config.items():
        if isinstance(part, dict) and (name == "text_config" or (rows is not None and part.get("vocab_size") == rows)):
            yield part


def write_configs(folder: Path, configs: Mapping[str, Mapping[str, JsonValue]]) -> None:
    """Write the configs of `make_configs` into a folder."""
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _generation_config(checkpoint: Checkpoint) -> JsonObject:
    """Return the checkpoint's generation config, or the generation keys of its config."""
    file = checkpoint.folder / "generation_config.json"
    if file.is_file():
        return read_json(file, "")
    settings = {**checkpoint.text_config, **{key: v for key, v in checkpoint.config.items() if v is not None}}
    return {"_from_model_config": True, **{key: settings[key] for key in GENERATION if settings.get(key) is not None}}


def _end_ids(checkpoint: Checkpoint, plan: Plan, rows: int | None) -> list[int]:
    """Return the checkpoint's end-of-sequence ids in the result's numbering, without tokens that the result lacks."""
    ids = _generation_config(checkpoint).get("eos_token_id")
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) for i in listed):
        raise CheckpointError(
            f"{checkpoint.name}: eos_token_id should be a number or a list of them, found {quoted(ids)}."
        )
    numbering = _numbering(checkpoint, plan, rows)
    return [new_id for i in listed if (new_id := numbering.of(i)) is not None]


def _numbering(checkpoint: Checkpoint, plan: Plan, rows: int | None) -> Numbering:
    return Numbering(token_ids(checkpoint.folder), plan.vocabulary.tokens, embedding_rows(checkpoint), rows)
