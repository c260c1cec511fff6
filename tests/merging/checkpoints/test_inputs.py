"""What people have: folders, adapters, GGUF files; and what is refused before anything is merged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aim.importance import fingerprint
from common.errors import CheckpointError, FailureError, UsageError
from merging.checkpoints.adapters.adapter_keys import find_stored
from merging.checkpoints.adapters.adapter_rows import LowRankRows
from merging.checkpoints.checkpoint import CheckpointRef, open_checkpoint
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from tests.helpers.tiny import VOCABULARY, fine_tune, make_gpt2, make_llama, train, weights

# names


def test_how_models_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`base+adapter`, each side a path or hub id with its own @revision; a path that exists is never cut."""
    monkeypatch.chdir(tmp_path)
    for folder in ("a+b", "c", "with@at"):
        Path(folder).mkdir()
    parse = CheckpointRef.parse
    assert parse("org/base@v1+me/lora@v2") == CheckpointRef("org/base", "v1", CheckpointRef("me/lora", "v2"))
    assert str(parse("org/base@v1+me/lora@v2")) == "org/base@v1+me/lora@v2"
    assert parse("a+b") == CheckpointRef("a+b")
    assert parse("a+b+c") == CheckpointRef("a+b", None, CheckpointRef("c"))
    assert parse("with@at+org/lora") == CheckpointRef("with@at", None, CheckpointRef("org/lora"))
    assert parse("c+org/lora@x").full_name == f"{tmp_path / 'c'}+org/lora@x"
    assert parse("./none+./nothing") == CheckpointRef("./none+./nothing")
    quantised = parse("org/name/sub/model.q8_0.gguf@main")
    assert (quantised.repo, quantised.file, quantised.revision) == ("org/name", "sub/model.q8_0.gguf", "main")
    for empty in ("", "  ", "c+", "+c"):
        with pytest.raises(UsageError, match="name is empty"):
            parse(empty)


@pytest.mark.parametrize(
    ("name", "stored", "found"),
    [
        ("model.layers.3.q.weight", ["model.layers.3.q.weight", "layers.3.q.weight"], "model.layers.3.q.weight"),
        ("transformer.h.0.attn.c_attn.weight", ["h.0.attn.c_attn.weight"], "h.0.attn.c_attn.weight"),
        ("layers.3.q.weight", ["model.layers.3.q.weight"], "model.layers.3.q.weight"),
        ("model.layers.40.q.weight", ["model.layers.4.q.weight"], None),
        ("model.layers.3.q.weight", ["encoder.layers.3.q.weight", "decoder.layers.3.q.weight"], None),
        (
            "model.language_model.layers.3.q.weight",
            ["language_model.model.layers.3.q.weight", "vision_tower.layers.3.q.weight"],
            "language_model.model.layers.3.q.weight",
        ),
        ("classifier.dense.weight", ["pooler.dense.weight"], None),
        ("model.norm.weight", ["norm.weight"], "norm.weight"),
    ],
)
def test_names_in_the_model_and_in_the_file(name: str, stored: list[str], found: str | None) -> None:
    """A name is found under another prefix where that is unambiguous, and never in another layer."""
    assert find_stored(name, stored) == found


# adapters


def merged(models: list[str], out: Path, base: Path | None = None, **flags: Any) -> Path:
    """Merge quietly; `linear` without a base unless told otherwise."""
    given = {"method": "linear", "models_to_merge": models, "dtype": "float32", **flags}
    return merge(make_recipe(given | ({"base_model": str(base)} if base else {}), {}), OutputConfig(out))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bf16 Llama, one whose embeddings are tied, and a GPT-2."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": make_llama(folder / "llama"),
        "tied": make_llama(folder / "tied", tied=True),
        "gpt2": make_gpt2(folder / "gpt2"),
    }


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha over r": ("llama", {}),
    "every linear layer": ("llama", {"target_modules": "all-linear"}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"down_proj": 3, "^model.layers.0.mlp.down_proj": 5},
        },
    ),
    "patterns with rsLoRA": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 9}}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "whole modules": ("llama", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "whole modules of a tied base": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "head of a tied base": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D without saying so": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": False}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapted_model_is_what_peft_computes(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """A checkpoint written from base+adapter gives, in transformers, the logits that PEFT computes with the two."""
    base, settings = bases[ADAPTERS[kind][0]], ADAPTERS[kind][1]
    train(base, tmp_path / "lora", **settings)
    plain_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    out = merged([f"{base}+{tmp_path / 'lora'}"], tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        plain = plain_model(tokens).logits
        model = peft.PeftModel.from_pretrained(plain_model, tmp_path / "lora").eval()
        expected, found = model(tokens).logits, ours(tokens).logits
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_product_by_hand() -> None:
    """theta_0 + scaling * B A on numbers that are exact: straight, and turned for weights stored (in, out)."""
    a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [20.0]])
    assert LowRankRows(torch.ones(2, 3), b, a, 0.5)[0:2].tolist() == [[6, 11, 16], [11, 21, 31]]
    assert LowRankRows(torch.zeros(3, 2), a.T, b.T, 2.0)[1:3].tolist() == [[40, 80], [60, 120]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_how_they_are_read(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of an adapted tensor has the same bits whatever rows are read with it, on one thread or on several; and
    it is the fp64 result rounded once."""
    torch.manual_seed(0)
    own, left, right = torch.randn(61, 301).to(dtype), torch.randn(61, 24).to(dtype), torch.randn(24, 301).to(dtype)
    adapted = LowRankRows(own, left, right, 1 / 3)
    whole = adapted[:]
    assert whole.dtype == torch.float32
    assert adapted.shape == own.shape
    monkeypatch.setattr("merging.checkpoints.adapters.adapter_rows.BLOCK_ELEMENTS", 301 * 5)
    threads = torch.get_num_threads()
    for size, used in ((1, 1), (3, 1), (7, 2), (60, 2)):
        torch.set_num_threads(used)
        parts = [adapted[start : start + size] for start in range(0, 61, size)]
        assert torch.equal(torch.cat(parts), whole)
    torch.set_num_threads(threads)
    exact = own.double() + (left.double() @ right.double()) / 3
    torch.testing.assert_close(whole.double(), exact, rtol=2**-24, atol=1e-12)


def test_adapters_merge_like_the_models_they_make(bases: dict[str, Path], tmp_path: Path) -> None:
    """Merging base+adapter, the adapter as .bin or with its name in its keys too, gives the bytes that merging the
    adapted model itself gives; and the base's own folder is as it was."""
    base, lora, full = bases["llama"], tmp_path / "lora", tmp_path / "full"
    train(base, lora, target_modules="all-linear")
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    adapted = open_checkpoint(f"{base}+{lora}")
    shutil.copytree(base, full)
    save_file({name: adapted.read(name) for name in adapted.tensors}, full / "model.safetensors", {"format": "pt"})
    keys = load_file(lora / "adapter_model.safetensors")
    named = shutil.copytree(lora, tmp_path / "named")
    save_file(
        {k.replace(".weight", ".default.weight"): v for k, v in keys.items()}, named / "adapter_model.safetensors"
    )
    pickled = shutil.copytree(lora, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").unlink()
    torch.save(keys, pickled / "adapter_model.bin")
    other = str(fine_tune(base, tmp_path / "other", seed=1))
    results = [
        merged([model, other], tmp_path / f"out{i}", base, method="ties", density=0.5) / "model.safetensors"
        for i, model in enumerate([str(full), *(f"{base}+{adapter}" for adapter in (lora, named, pickled))])
    ]
    assert len({file.read_bytes() for file in results}) == 1
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    assert not list(tmp_path.rglob("*.partial*"))


def test_what_an_adapted_checkpoint_says(bases: dict[str, Path], tmp_path: Path) -> None:
    """Adapted tensors count as fp32, the others as stored; files, licenses and fingerprint are of base and adapter."""
    base, lora = shutil.copytree(bases["llama"], tmp_path / "base"), tmp_path / "lora"
    train(base, lora)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (lora / "README.md").write_text("---\nlicense: [cc-by-nc-4.0, apache-2.0]\ntags: [x]\n---\n# Card\n---\n")
    plain, adapted = open_checkpoint(str(base)), open_checkpoint(f"{base}+{lora}")
    changed = {name for name, info in adapted.tensors.items() if info.dtype == "float32"}
    assert changed == {name for name in plain.tensors if "q_proj" in name or "down_proj" in name}
    assert adapted.tensors.keys() == plain.tensors.keys()
    assert [file.name for file in adapted.files] == [
        "model.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert adapted.places == (base, lora)
    assert adapted.place == base
    assert adapted.exact_name == adapted.ref.full_name == f"{base}+{lora}"
    assert (plain.licenses, adapted.licenses) == (("apache-2.0",), ("apache-2.0", "cc-by-nc-4.0"))
    assert fingerprint(plain) != fingerprint(adapted)
    assert (plain.loads_from_folder, adapted.loads_from_folder) == (True, False)


@pytest.mark.parametrize(
    ("card", "licenses"),
    [
        ("---\nlicense: mit\n---\n", ("mit",)),
        ("---\nlicense: other\nlicense_name: my-own\n---\n", ("my-own",)),
        ("---\nlicense: {a: [\n---\n", ()),
        ("---\nlicense: mit\n", ()),
        ("# Card\nlicense: mit\n", ()),
        ("---\n- license\n---\n", ()),
        ("", ()),
    ],
)
def test_licenses_of_broken_cards(bases: dict[str, Path], tmp_path: Path, card: str, licenses: tuple[str, ...]) -> None:
    """A card's front matter that is missing, open, or no YAML mapping states no license and stops nothing."""
    model = shutil.copytree(bases["llama"], tmp_path / "model")
    (model / "README.md").write_text(card)
    assert open_checkpoint(str(model)).licenses == licenses


def test_adapter_with_more_tokens_than_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """An adapter that was trained with a new token brings rows, vocabulary size and tokenizer with it."""
    base, lora, grown = bases["llama"], tmp_path / "lora", tmp_path / "grown"
    fine_tune(base, grown, seed=1, extra=("<new>",))
    train(grown, lora, modules_to_save=["embed_tokens", "lm_head"])
    AutoTokenizer.from_pretrained(grown).save_pretrained(lora)
    adapted = open_checkpoint(f"{base}+{lora}")
    assert adapted.tensors["lm_head.weight"].shape[0] == adapted.config["vocab_size"] == VOCABULARY + 1
    out = merged([f"{base}+{lora}"], tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<new>") == VOCABULARY
    saved = load_file(lora / "adapter_model.safetensors")
    assert torch.equal(weights(out)["lm_head.weight"], saved["base_model.model.lm_head.weight"])


def spoil(folder: Path, **changes: Any) -> None:
    """Change keys of an adapter's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rename(folder: Path, old: str, new: str) -> None:
    """Rename an adapter's keys."""
    file = folder / "adapter_model.safetensors"
    save_file({key.replace(old, new): tensor for key, tensor in load_file(file).items()}, file)


REFUSED_ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "DoRA without magnitudes": (
        lambda f: spoil(f, use_dora=True),
        "states use_dora True and it has no magnitude vectors",
    ),
    "a magnitude for an A": (lambda f: rename(f, "lora_A.weight", "lora_magnitude_vector"), "holds only .*lora_B"),
    "another type": (lambda f: spoil(f, peft_type="LOHA"), "is of type LOHA"),
    "prefix tuning": (lambda f: spoil(f, peft_type="PREFIX_TUNING"), "is of type PREFIX_TUNING"),
    "layer replication": (
        lambda f: spoil(f, layer_replication=[[0, 2], [1, 2]]),
        "uses replicated layers \\(layer_replication\\)",
    ),
    "a key of the future": (lambda f: spoil(f, use_marvel=True), "uses use_marvel, which is not supported"),
    "PiSSA": (lambda f: spoil(f, init_lora_weights="pissa_niter_4"), "started by pissa_niter_4"),
    "no rank": (lambda f: spoil(f, r=None), "r must be a whole number from 1 to 1048576, found None"),
    "another rank": (lambda f: spoil(f, r=5), r"gives model\.layers\.\d\.\w+\.\w+ rank 5 and its tensors have 4"),
    "a bad pattern": (lambda f: spoil(f, alpha_pattern={"(": 3}), r"alpha_pattern .*is not a regular expression"),
    "a bad value": (
        lambda f: spoil(f, rank_pattern={"q_proj": 0}),
        "rank_pattern.q_proj must be a whole number",
    ),
    "half a pair": (lambda f: rename(f, "layers.0.self_attn.q_proj.lora_A", "x.lora_A"), "of the pair A, B"),
    "unknown keys": (lambda f: rename(f, "lora_A.weight", "lokr_w1"), "holds .*lokr_w1, which is not supported"),
    "more layers": (
        lambda f: rename(f, "layers.1.", "layers.7."),
        r"does not fit .*llama: the base has no tensor model\.layers\.7\..*; it was trained on ",
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no weights"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "is not an adapter .*separate models by commas"),
}


@pytest.mark.parametrize("how", REFUSED_ADAPTERS)
def test_refused_adapters(bases: dict[str, Path], tmp_path: Path, how: str) -> None:
    """What is not plain LoRA, or not whole, or does not fit, is refused by name, and nothing is written."""
    train(bases["llama"], tmp_path / "lora")
    REFUSED_ADAPTERS[how][0](tmp_path / "lora")
    with pytest.raises(CheckpointError, match=REFUSED_ADAPTERS[how][1]):
        merged([f"{bases['llama']}+{tmp_path / 'lora'}"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_adapter_for_another_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """An adapter whose shapes are not the base's is refused, and the base that it names is said."""
    train(bases["llama"], tmp_path / "lora")
    spoil(tmp_path / "lora", base_model_name_or_path="org/wide")
    narrow = make_llama(tmp_path / "narrow", hidden=32)
    with pytest.raises(CheckpointError, match=r"\[32, 64\] in the base .*\(and 3 more\); it was trained on org/wide\."):
        open_checkpoint(f"{narrow}+{tmp_path / 'lora'}")
    other = open_checkpoint(f"{bases['llama']}+{tmp_path / 'lora'}")  # another name alone is reported, not refused
    assert other.notes == (
        f"{tmp_path / 'lora'} was trained on org/wide, by its config; it is added to {bases['llama']}.",
    )
    spoil(tmp_path / "lora", base_model_name_or_path=f"org/{bases['llama'].name}")
    assert open_checkpoint(f"{bases['llama']}+{tmp_path / 'lora'}").notes == ()


def test_embedding_of_a_tied_base_cannot_change_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    """An adapter of the input embedding alone, on a base that uses it as output head too, is refused."""
    train(bases["tied"], tmp_path / "lora", target_modules=["embed_tokens"])
    with pytest.raises(
        CheckpointError, match=r"it changes model\.embed_tokens\.weight, which the base has for its output"
    ):
        open_checkpoint(f"{bases['tied']}+{tmp_path / 'lora'}")


def test_adapter_given_as_a_model(bases: dict[str, Path], tmp_path: Path) -> None:
    """An adapter's folder without its base is told from a model's, and the base that it names is said."""
    train(bases["llama"], tmp_path / "lora")
    with pytest.raises(UsageError, match=r"is an adapter; give it with its base \(.*llama\) as BASE\+"):
        open_checkpoint(str(tmp_path / "lora"))


# GGUF

KINDS = gguf.GGMLQuantizationType


def write_gguf(
    model: Path, file: Path, kind: gguf.GGMLQuantizationType = KINDS.F32, skip: str = "", parts: int = 1
) -> Path:
    """Write a Llama as llama.cpp's converter does: rows of q and k permuted, matrices in `kind`, the rest in F32."""
    config = json.loads((model / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(layers)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if parts > 1:
        writer.add_uint16("split.count", parts)
    tokens = sorted((ids := AutoTokenizer.from_pretrained(model).get_vocab()), key=ids.__getitem__)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in weights(model).items():
        data = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            n = heads if "q_proj" in name else config["num_key_value_heads"]
            data = data.reshape(n, 2, len(data) // n // 2, -1).swapaxes(1, 2).reshape(data.shape)
        stored = kind if data.ndim > 1 else KINDS.F32
        if name != skip:
            target = names.get_name(name, try_suffixes=(".weight",))
            assert target is not None
            writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(data), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Llamas in fp32, fp16 and with tied embeddings, and bases; with rows of 64, as quantised blocks need them."""
    folder = tmp_path_factory.mktemp("wide")
    return {
        "base": make_llama(folder / "base", hidden=64, dtype=torch.float32),
        "fp32": make_llama(folder / "fp32", seed=1, hidden=64, dtype=torch.float32),
        "fp16": make_llama(folder / "fp16", seed=1, hidden=64, dtype=torch.float16),
        "tied": make_llama(folder / "tied", seed=1, hidden=64, dtype=torch.float32, tied=True),
        "tied base": make_llama(folder / "tied_base", hidden=64, dtype=torch.float32, tied=True),
    }


@pytest.mark.parametrize(("source", "kind"), [("fp32", KINDS.F32), ("fp16", KINDS.F16), ("tied", KINDS.F32)])
def test_unquantised_gguf_is_the_model(
    wide: dict[str, Path], tmp_path: Path, source: str, kind: gguf.GGMLQuantizationType
) -> None:
    """A GGUF in F32 or F16 holds exactly the tensors of the safetensors checkpoint that it was made from, and merging
    it gives the same bytes, whether the file, or a folder with it alone, is named."""
    (tmp_path / "gguf").mkdir()
    file = write_gguf(wide[source], tmp_path / "gguf" / "model.gguf", kind)
    original, found = open_checkpoint(str(wide[source])), open_checkpoint(str(file))
    assert {name: info.shape for name, info in found.tensors.items()} == {
        name: info.shape for name, info in original.tensors.items()
    }
    assert all(torch.equal(found.read(name), original.read(name).float()) for name in original.tensors)
    assert (found.place, found.files, found.loads_from_folder) == (file, (file,), False)
    base = wide["tied base"] if source == "tied" else wide["base"]
    outs = [
        merged([str(model)], tmp_path / f"out{i}", base, method="ties", density=0.5)
        for i, model in enumerate([wide[source], file, file.parent])
    ]
    assert len({(out / "model.safetensors").read_bytes() for out in outs}) == 1


def test_quantised_gguf_is_near_the_model(wide: dict[str, Path], tmp_path: Path) -> None:
    """A Q8_0 file gives every weight within half a step of its block: |w| / 127 of the largest of 32, its fp16 rounding
    added."""
    found = open_checkpoint(str(write_gguf(wide["fp32"], tmp_path / "model.gguf", KINDS.Q8_0)))
    for name, tensor in weights(wide["fp32"]).items():
        ours = found.read(name)
        if tensor.dim() == 1:
            assert torch.equal(ours, tensor)
            continue
        step = tensor.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
        error = (ours - tensor).reshape(-1, 32).abs()
        assert (error <= step * (0.5 + 127 * 2**-11)).all()
        assert error.any()


def test_gguf_alone_makes_a_model(wide: dict[str, Path], tmp_path: Path) -> None:
    """A merge whose only input is a GGUF file has its config and tokenizer, ends where it ends, and answers as the
    original does."""
    file = write_gguf(wide["fp32"], tmp_path / "model.gguf")
    out = merged([str(file)], tmp_path / "out")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out, wide["fp32"]))
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(wide["fp32"]).get_vocab()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2


def test_adapter_on_gguf(wide: dict[str, Path], tmp_path: Path) -> None:
    """An adapter is added to a GGUF base as to the checkpoint that it was made from."""
    train(wide["fp32"], tmp_path / "lora")
    file = write_gguf(wide["fp32"], tmp_path / "model.gguf")
    one, two = (open_checkpoint(f"{base}+{tmp_path / 'lora'}") for base in (wide["fp32"], file))
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.tensors)


def test_opening_gguf_reads_no_weights(wide: dict[str, Path], tmp_path: Path) -> None:
    """A GGUF file whose weights are zeroed out opens with the same names and shapes: only metadata is read."""
    file = write_gguf(wide["fp32"], tmp_path / "model.gguf")
    before = open_checkpoint(str(file)).tensors
    data = file.read_bytes()
    start = gguf.GGUFReader(file).data_offset
    file.write_bytes(data[:start] + bytes(len(data) - start))
    found = open_checkpoint(str(file))
    assert found.tensors == before
    assert not found.read("lm_head.weight").any()


def test_broken_gguf(wide: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no GGUF, cut short, one of several parts, or without a tensor is refused in one sentence; so is
    any where the gguf package is missing."""
    whole = write_gguf(wide["fp32"], tmp_path / "whole.gguf").read_bytes()
    file = tmp_path / "model.gguf"
    for content in (b"", b"cut" * 50, whole[:100], whole[:-1000]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read as GGUF by transformers"):
            open_checkpoint(str(file))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"is one of 3 parts; join them with `llama-gguf-split --merge`"):
        open_checkpoint(str(write_gguf(wide["fp32"], file, parts=3)))
    file.unlink()
    lacking = write_gguf(wide["fp32"], file, skip="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        CheckpointError, match=r"does not hold model\.layers\.1\.mlp\.up_proj\.weight as its metadata says"
    ):
        merged([str(lacking)], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "whole.gguf"]
    with pytest.raises(CheckpointError, match=r"and no other weights; name one of them: .*/model\.gguf"):
        open_checkpoint(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(FailureError, match=r"the gguf package is missing: `pip install gguf`"):
        open_checkpoint(str(file))


# what is refused of a folder


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a safetensors file, its data left as it is."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    """Put tensors into a safetensors file besides its own."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file)


def to_fp8(folder: Path) -> None:
    """Store one matrix in 8-bit floats."""
    name = "model.layers.0.mlp.up_proj.weight"
    add_tensors(folder, **{name: weights(folder)[name].to(torch.float8_e4m3fn)})


def shard(folder: Path, index: dict[str, str] | None, *names: str) -> None:
    """Name the weights file otherwise (a copy for each name), and write an index."""
    for name in names:
        shutil.copy(folder / "model.safetensors", folder / name)
    (folder / "model.safetensors").unlink()
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def configure(folder: Path, **keys: Any) -> None:
    """Add keys to config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


NORM = "model.norm.weight"
GATE = "model.layers.0.mlp.gate_proj"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "fp8": (
        lambda f: (to_fp8(f), configure(f, quantization_config={"quant_method": "fp8"})),
        r"up_proj\.weight is quantized and .*up_proj\.weight_scale_inv is missing",
    ),
    "GPTQ": (
        lambda f: add_tensors(f, **{f"{GATE}.qweight": torch.zeros(2, 2, dtype=torch.int32)}),
        r"qweight is quantized and .*gate_proj\.scales is missing",
    ),
    "fp8 scales": (
        lambda f: add_tensors(f, **{f"{GATE}.weight_scale_inv": torch.ones(1)}),
        r"weight_scale_inv \(float32\) is quantized in a format that is not read here",
    ),
    "4 bits in bytes": (
        lambda f: add_tensors(f, **{f"{GATE}.weight": torch.zeros(9, 1, dtype=torch.uint8)}),
        r"gate_proj\.weight \(uint8\) is quantized in a format that is not read here",
    ),
    "8 bits": (
        lambda f: add_tensors(f, **{f"{GATE}.SCB": torch.ones(3)}),
        r"gate_proj\.weight has shape .* and dtype bfloat16, expected a matrix of int8",
    ),
    "a gap": (
        lambda f: edit_header(f, lambda h: h.pop(NORM)),
        r"starts at byte \d+ of the data, \d+ expected|of data expect",
    ),
    "overlap": (
        lambda f: edit_header(f, lambda h: h[NORM].update(data_offsets=h["lm_head.weight"]["data_offsets"])),
        r"tensor .* (starts at byte|has) \d+",
    ),
    "shape against length": (
        lambda f: edit_header(f, lambda h: h[NORM].update(shape=[47])),
        r"tensor model\.norm\.weight \[47\] has 96 bytes, 94 expected",
    ),
    "bytes too many": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"more"),
        r"\d+ bytes of data expected, \d+ found\)",
    ),
    "index to the outside": (
        lambda f: shard(f, {NORM: "../other/model.safetensors"}, "x.safetensors"),
        r"puts tensor model\.norm\.weight into '\.\./other/model\.safetensors', outside the folder",
    ),
    "index to the root": (lambda f: shard(f, {NORM: "/etc/passwd"}), r"into '/etc/passwd', outside the folder"),
    "index of a tensor that is not there": (
        lambda f: shard(f, {NORM: "a.safetensors", "model.ghost.weight": "a.safetensors"}, "a.safetensors"),
        r"names tensor model\.ghost\.weight, which is in no file \(1 such\)",
    ),
    "one tensor twice": (
        lambda f: shard(
            f, {NORM: "a.safetensors", "lm_head.weight": "b.safetensors"}, "a.safetensors", "b.safetensors"
        ),
        r"is in both a\.safetensors and b\.safetensors of .*; remove one",
    ),
    "a shard missing, no index": (
        lambda f: shard(f, None, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"),
        r"has model-00001-of-00003\.safetensors and not model-00002-of-00003\.safetensors",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_refused_folders(bases: dict[str, Path], tmp_path: Path, how: str) -> None:
    """Broken quantized weights, and files that contradict themselves, are refused by name as they are opened."""
    model = shutil.copytree(bases["llama"], tmp_path / "model")
    REFUSED[how][0](model)
    with pytest.raises(CheckpointError, match=REFUSED[how][1]):
        open_checkpoint(str(model))


def test_a_file_is_no_model(bases: dict[str, Path]) -> None:
    """A weights file given instead of its folder is told so; a path that is not here is no hub id."""
    with pytest.raises(UsageError, match=r"model\.safetensors is a file; give its folder"):
        open_checkpoint(str(bases["llama"] / "model.safetensors"))
    with pytest.raises(UsageError, match="is neither a local folder nor a hub id"):
        open_checkpoint("./none")


def test_stray_files_are_left_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    """A copy in another naming, an adapter and another format beside the weights change nothing."""
    model = shutil.copytree(bases["llama"], tmp_path / "model")
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "model.gguf"):
        (model / name).write_bytes(b"something else")
    (model / "original").mkdir()
    shutil.copy(model / "model.safetensors", model / "original" / "params.safetensors")
    assert [file.name for file in open_checkpoint(str(model)).files] == ["model.safetensors"]


def test_scaling_is_of_the_rank(bases: dict[str, Path], tmp_path: Path) -> None:
    """Independent of PEFT: theta - theta_0 is alpha / r, or alpha / sqrt(r), times B A."""
    train(bases["llama"], tmp_path / "lora", target_modules=["o_proj"], r=3, lora_alpha=5)
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    a, b = (keys[f"base_model.model.model.layers.1.self_attn.o_proj.lora_{side}.weight"] for side in "AB")
    base = weights(bases["llama"])["model.layers.1.self_attn.o_proj.weight"].float()
    for stabilised, scaling in ((False, 5 / 3), (True, 5 / math.sqrt(3))):
        spoil(tmp_path / "lora", use_rslora=stabilised)
        adapted = open_checkpoint(f"{bases['llama']}+{tmp_path / 'lora'}")
        found = adapted.read("model.layers.1.self_attn.o_proj.weight")
        torch.testing.assert_close(found, base + scaling * (b @ a), rtol=1e-6, atol=1e-7)
