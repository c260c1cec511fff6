"""Files beside the weights: those of the template model are copied, and what is not copied is reported by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import CheckpointError
from merging.output.records.lock import read_lock
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from tests.helpers.tiny import fine_tune, make_llama

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
COPIED = {
    "modules.json": json.dumps(MODULES), "1_Pooling/config.json": '{"word_embedding_dimension": 16}',
    "2_Dense/config.json": '{"in_features": 16}', "config_sentence_transformers.json": "{}",
    "sentence_bert_config.json": '{"max_seq_length": 512}', "additional_chat_templates/tools.jinja": "{{ tools }}",
    "chat_template.jinja": "{{ messages }}", "preprocessor_config.json": '{"size": 4}',
    "processor_config.json": "{}", "video_preprocessor_config.json": '{"fps": 2}', "LICENSE": "terms",
    "NOTICE.txt": "notice", "USE_POLICY.md": "policy", "entity_vocab.json": "{}", "qwen.tiktoken": "IQ== 0",
}  # fmt: skip
LEFT = {"modeling_own.py": "x = 1", "extra.json": "{}", "stats/numbers.csv": "1"}
IGNORED = {
    "optimizer.pt": "x", "trainer_state.json": "{}", "all_results.json": "{}", ".gitattributes": "", "curve.png": "",
    "onnx/model.onnx": "x", "training_args.bin": "x",
}  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base with everything beside its weights, and a model fine-tuned from it."""
    base = make_llama(tmp_path / "base", hidden=16, layers=1)
    tuned = fine_tune(base, tmp_path / "tuned", seed=1)
    for name, text in {**COPIED, **LEFT, **IGNORED}.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    save_file({"linear.weight": torch.ones(2, 2)}, base / "2_Dense" / "model.safetensors")
    return base, tuned


def recipe_of(base: Path, tuned: Path, **more: str) -> object:
    """Task arithmetic of the tuned model."""
    return make_recipe(
        {"method": "task_arithmetic", "base_model": str(base), "models_to_merge": str(tuned), **more}, {}
    )


def test_what_is_copied_and_what_is_reported(pair: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    """Every companion file has the base's bytes and is in the lock; a module's weights and files that are not copied
    are reported by name; traces of training are passed over."""
    base, tuned = pair
    merge(recipe_of(base, tuned), OutputConfig(tmp_path / "out"))
    said = capsys.readouterr().err
    for name in (*COPIED, "2_Dense/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
        assert name in read_lock(tmp_path / "out" / "merge.lock.json")["files"]
    assert "Copied from" in said
    assert "2_Dense/model.safetensors" in said
    (left,) = [line for line in said.splitlines() if line.startswith("Not copied from")]
    assert all(name.split("/")[0] in left for name in LEFT)
    assert not any(name.split("/")[0] in said for name in IGNORED)
    assert not any((tmp_path / "out" / name).exists() for name in (*LEFT, *IGNORED))


def test_files_of_another_tokenizer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """With another model's tokenizer the base's vocabulary files and further templates stay behind; its processors and
    licenses are copied."""
    base, tuned = pair
    merge(recipe_of(base, tuned, tokenizer=str(tuned)), OutputConfig(tmp_path / "out"))
    assert not any((tmp_path / "out" / name).exists() for name in ("entity_vocab.json", "additional_chat_templates"))
    assert all((tmp_path / "out" / name).exists() for name in ("processor_config.json", "LICENSE", "1_Pooling"))


@pytest.mark.parametrize(("path", "sentence"), [("../other", "no folder in the model's folder"), ("9_Gone", "missing")])
def test_modules_that_cannot_be_copied(pair: tuple[Path, Path], tmp_path: Path, path: str, sentence: str) -> None:
    """A module outside the folder, and one that is missing, are refused before anything is written."""
    base, tuned = pair
    (base / "modules.json").write_text(json.dumps([{**MODULES[1], "path": path}]))
    with pytest.raises(CheckpointError, match=sentence):
        merge(recipe_of(base, tuned), OutputConfig(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
