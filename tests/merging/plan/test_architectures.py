"""Any architecture: tiny real checkpoints merged, against oracles in plain torch and transformers' own classes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merging.checkpoints.checkpoint import open_all
from merging.checkpoints.tensor_names import role_of
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.plan.slices import Inputs
from merging.plan.tied_weights import heads_of
from merging.recipe import make_recipe
from merging.recipe.method_registry import all_methods
from tests.helpers.architectures import (
    ARCHITECTURES,
    TIED,
    VOCAB,
    computed_buffers,
    fine_tuned,
    forms_of,
    load,
    logits,
    make_word_tokenizer,
    quiet,
    renumber,
    save,
    tied_names,
)
from tests.helpers.tiny import weights

FORMS = [(name, form) for name in ARCHITECTURES for form in forms_of(name)]
FORM_IDS = [f"{name}-{form}" for name, form in FORMS]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Half the distance between neighbours, relative: the error of one rounding."""
MATRIX = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
SAMPLE = {"t": 0.3, "iterations": 20}
"""Values for parameters that have no default, and for those that cost time."""
OLD = ("dare_ties", "karcher", "linear")
"""Methods tried on old forms too, which planning deals with: random masks by name, no base, a base for its names."""

Family = dict[str, Path]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Family]:
    """Give {"base", "a", "b"}: folders of an architecture's base and two fine-tuned models, made once each."""
    made: dict[tuple[str, str, torch.dtype], Family] = {}

    def make(name: str, form: str = "hub", dtype: torch.dtype = torch.float32) -> Family:
        key = (name, form, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{form}")
            base = ARCHITECTURES[name].build().to(dtype)
            models = {"base": base, "a": fine_tuned(base, 1), "b": fine_tuned(base, 2)}
            made[key] = {role: save(model, folder / role, form) for role, model in models.items()}
        return made[key]

    return make


def ours(
    method: str, base: Path, models: Sequence[Path], out: Path, load_check: bool = False, **parameters: object
) -> Path:
    """Merge with this project into the folder `out`, in float32 unless told; most tests load the result themselves."""
    known = {"base_model": base} if all_methods()[method].base != "template" else {}
    flags = {"method": method, **known, "models_to_merge": list(map(str, models)), "dtype": "float32", **parameters}
    return merge(make_recipe(flags, {}), OutputConfig(out, load_check=load_check))


def task_arithmetic(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """theta_0 + sum_t (theta_t - theta_0), in float64."""
    return base.double() + sum((model.double() - base.double()) for model in models)


def ties(base: Tensor, models: Sequence[Tensor], density: float = 0.2) -> Tensor:
    """Trim, elect sign, disjoint mean, in float64, the task vectors in float32.

    The max(1, floor(density n)) largest entries of each task vector are kept; of those equal to the smallest kept,
    as many as the count needs, evenly in index order.
    """
    kept = []
    for model in models:
        tau = (model.float() - base.float()).flatten()
        count = max(1, math.floor(density * tau.numel()))
        limit = tau.abs().sort(descending=True).values[count - 1]
        chosen = tau.abs() > limit
        equal = (tau.abs() == limit).nonzero().flatten().tolist()
        wanted = count - int(chosen.sum())
        spread = [i for r, i in enumerate(equal) if (r + 1) * wanted // len(equal) > r * wanted // len(equal)]
        chosen[spread] = True
        kept.append(torch.where(chosen, tau, 0.0).double())
    stacked = torch.stack(kept)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == elected
    mean = (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
    return base.double() + mean.view(base.shape)


ORACLES = {"task_arithmetic": task_arithmetic, "ties": ties}


def assert_rounded_once(found: Tensor, oracle: Tensor, inputs: Sequence[Tensor], name: str) -> None:
    """The float64 oracle to one rounding of the tensor's dtype, and that of a sum in float32 before it."""
    size = sum(tensor.double().abs() for tensor in inputs)
    allowed = UNIT[found.dtype] * oracle.abs() + 4 * UNIT[torch.float32] * size
    worst = ((found.double() - oracle).abs() - allowed).max()
    assert worst <= 0, f"{name} {list(found.shape)}: {worst:.3g} beyond one rounding"


@pytest.mark.parametrize(
    ("method", "dtype"), [("task_arithmetic", torch.float32), ("ties", torch.bfloat16)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(("name", "form"), FORMS, ids=FORM_IDS)
def test_every_tensor_is_the_equation(family, tmp_path: Path, name: str, form: str, method: str, dtype) -> None:
    """Every floating tensor of the checkpoint is in the result and equals the oracle; buffers of whole numbers are
    copied; what is tied is stored once, under the name that transformers saves it by."""
    folders = family(name, form, dtype)
    base, models = weights(folders["base"]), [weights(folders[role]) for role in "ab"]
    kind = str(dtype).removeprefix("torch.")
    found = weights(ours(method, folders["base"], [folders["a"], folders["b"]], tmp_path / "out", dtype=kind))
    model = ARCHITECTURES[name].build()
    copies, computed = (set(tied_names(model)), computed_buffers(model)) if form == "old" else (set(), {})
    assert found.keys() - computed.keys() == base.keys() - copies - computed.keys()
    for key, tensor in found.items():
        if not base[key].is_floating_point() or key in computed:
            assert torch.equal(tensor, base[key]), key
            continue
        assert tensor.dtype == dtype
        assert any(not torch.equal(other[key], base[key]) for other in models), f"{key} was not fine-tuned"
        inputs = [base[key], *(other[key] for other in models)]
        assert_rounded_once(tensor, ORACLES[method](inputs[0], inputs[1:]), inputs, key)
    whole = {key for key, tensor in base.items() if not tensor.is_floating_point()}
    assert whole <= found.keys()


@pytest.mark.parametrize(("name", "form"), FORMS, ids=FORM_IDS)
def test_result_loads_and_computes_what_the_weights_say(family, tmp_path: Path, name: str, form: str) -> None:
    """transformers' own class finds every key and no other; the logits are those of the oracle's parameters in memory;
    tied weights are one tensor, and there are as many parameters as in the base."""
    folders = family(name, form)
    out = ours("task_arithmetic", folders["base"], [folders["a"], folders["b"]], tmp_path / "out", load_check=True)
    loaded, info = load(out)
    assert not any(info.values()), info
    architecture = ARCHITECTURES[name]
    expected, tuned = architecture.build(), [fine_tuned(architecture.build(), seed) for seed in (1, 2)]
    others = [dict(model.named_parameters()) for model in tuned]
    with torch.no_grad():
        for key, parameter in expected.named_parameters():
            parameter.copy_(task_arithmetic(parameter, [other[key] for other in others]))
    found, wanted = logits(loaded, architecture), logits(expected, architecture)
    assert found.isfinite().all()
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5), (found - wanted).abs().max()
    assert not torch.allclose(found, logits(architecture.build(), architecture), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in expected.parameters())
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert (head.weight is embedding.weight) == (name in TIED)


@pytest.mark.parametrize("old", ["base", "models"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "old" in forms_of(name)])
def test_copies_and_buffers_of_old_checkpoints_change_nothing(family, tmp_path: Path, name: str, old: str) -> None:
    """A base from an old .bin (each tied tensor under all its names, computed buffers) and fine-tuned models saved
    today, or the other way round: the result is that of inputs which store each tensor once."""
    once, stale = family(name), family(name, "old")
    base = (stale if old == "base" else once)["base"]
    models = [(stale if old == "models" else once)[role] for role in "ab"]
    found = weights(ours("task_arithmetic", base, models, tmp_path / "mixed"))
    wanted = weights(ours("task_arithmetic", once["base"], [once["a"], once["b"]], tmp_path / "once"))
    assert found.keys() - computed_buffers(ARCHITECTURES[name].build()).keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("gpt_neox", False), ("qwen2", True)])
def test_a_plan_without_the_weights_is_that_of_the_run(tmp_path: Path, name: str, tied: bool) -> None:
    """From headers alone a stored head is a copy only where the config says so; transformers 4 left defaults out."""
    models = (ARCHITECTURES[name].build(), fine_tuned(ARCHITECTURES[name].build(), 1))
    base, model = (save(model, tmp_path / str(i), "old") for i, model in enumerate(models))
    template_model, other = open_all([str(base), str(model)])
    inputs = Inputs(template_model, (other,), template_model)
    planned = heads_of(inputs)
    for folder in (base, model):
        (folder / "model.safetensors").unlink()
    assert planned.tied == tied
    assert (heads_of(inputs).head, heads_of(inputs).dropped) == (planned.head, planned.dropped)


def test_layers_that_predict_further_tokens_do_not_contradict_the_config(family, tmp_path: Path) -> None:
    """DeepSeek-V3 and GLM-4.5 store such a layer behind those that num_hidden_layers counts; it is merged like any."""
    folders = {}
    for role, folder in family("llama").items():
        stored, config = weights(folder), json.loads((folder / "config.json").read_text())
        further = {key.replace(".1.", ".2."): v.clone() for key, v in stored.items() if ".layers.1." in key}
        folders[role] = tmp_path / role
        folders[role].mkdir()
        save_file({**stored, **further}, folders[role] / "model.safetensors", metadata={"format": "pt"})
        (folders[role] / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    found = weights(ours("linear", folders["base"], [folders["a"], folders["b"]], tmp_path / "out"))
    same = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(found[same.format(2)], found[same.format(1)])


@pytest.mark.parametrize("form", ["hub", "old"])
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mamba", "falcon", "opt"])
def test_a_model_with_a_head_of_its_own_unties_the_result(family, tmp_path: Path, name: str, form: str) -> None:
    """Where one model has a head of its own, the embedding of those that tie stands for theirs; the result stores both
    and says so in its config, whatever the base's config leaves unsaid."""
    folders, architecture = family(name, form), ARCHITECTURES[name]
    model = fine_tuned(architecture.build(), 2)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    head.weight = torch.nn.Parameter(embedding.detach().flip(0))
    model.config.tie_word_embeddings = False
    own = save(model, tmp_path / "own")
    out = ours("task_arithmetic", folders["base"], [folders["a"], own], tmp_path / "out")
    loaded, info = load(out)
    assert not any(info.values()), info
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    base, tied = weights(folders["base"]), weights(folders["a"])
    table = next(key for key in base if role_of(key) == "input")
    inputs = [base[table], tied[table], head.weight.detach()]
    assert_rounded_once(loaded.get_output_embeddings().weight, task_arithmetic(inputs[0], inputs[1:]), inputs, "head")
    inputs = [base[table], tied[table], weights(own)[table]]
    assert_rounded_once(loaded.get_input_embeddings().weight, task_arithmetic(inputs[0], inputs[1:]), inputs, table)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_are_matched_by_token(family, tmp_path: Path, name: str) -> None:
    """A model that numbers its tokens otherwise and one with a token more give the result of models with the base's
    rows: in embeddings, output heads and their biases alike, and nowhere else (as many positions, as many channels)."""
    plain, architecture = family(name), ARCHITECTURES[name]
    base = architecture.build()
    order = [0, 1, 2, *(torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(4)) + 3).tolist()]
    larger = fine_tuned(base, 1)
    with quiet():
        larger.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
    models = {"base": base, "larger": larger, "renumbered": renumber(fine_tuned(base, 2), order)}
    folders = {role: save(model, tmp_path / role) for role, model in models.items()}
    make_word_tokenizer(folders["base"], range(VOCAB))
    make_word_tokenizer(folders["larger"], range(VOCAB), extra=["[PAD]"])
    make_word_tokenizer(folders["renumbered"], order)
    out = ours("task_arithmetic", folders["base"], [folders["larger"], folders["renumbered"]], tmp_path / "out")
    found = weights(out)
    base_weights, others = weights(plain["base"]), [weights(plain[role]) for role in "ab"]
    assert found.keys() == base_weights.keys()
    for key, tensor in base_weights.items():
        inputs = [tensor, *(other[key] for other in others)]
        assert found[key].shape == tensor.shape, key
        assert_rounded_once(found[key], task_arithmetic(tensor, inputs[1:]), inputs, key)
    loaded, info = load(out)
    assert not any(info.values()), info
    assert loaded.get_input_embeddings().weight.shape[0] == VOCAB


def model_count(method: str) -> int:
    """Return 2, or as near as the method takes."""
    known = all_methods()[method]
    return int(max(known.min_models, min(2, known.max_models)))


CASES = [
    (method, form)
    for method in sorted(set(all_methods()) - set(ORACLES))
    for form in ("hub", "own", "old")
    if form != "old" or method in OLD
]


@pytest.mark.parametrize(("method", "form"), CASES)
def test_every_method_takes_every_architecture(family, tmp_path: Path, method: str, form: str) -> None:
    """Each method gives a finite result with the base's tensors, which transformers loads whole by the test above:
    experts of their own or fused, convolutions, transposed matrices, vectors, tables; tied tensors stay one even under
    random masks."""
    known = all_methods()[method]
    given = {name: value for name, value in SAMPLE.items() if name in known.parameters}
    for name in [name for name in ARCHITECTURES if form in forms_of(name)]:
        folders = family(name, form)
        models = [folders[role] for role in "ab"][: model_count(method)]
        out = ours(method, folders["base"], models, tmp_path / name, **given)
        found, stored = weights(out), weights(folders["base"])
        model = ARCHITECTURES[name].build()
        tied, computed = tied_names(model).keys(), computed_buffers(model).keys() if form == "old" else set()
        assert not tied & found.keys(), name
        assert found.keys() - computed == stored.keys() - tied - computed, name
        assert {k: v.shape for k, v in found.items()}.items() <= {k: v.shape for k, v in stored.items()}.items(), name
        assert all(tensor.isfinite().all() for tensor in found.values()), name


ROLES = {
    "input": [
        "model.embed_tokens.weight",  # Llama, Mistral, Qwen, Gemma, Phi-3
        "model.language_model.embed_tokens.weight",  # Gemma 3, LLaVA, as transformers 5 names them
        "language_model.model.embed_tokens.weight",  # the same on the hub
        "model.language_model.embed_tokens_per_layer.weight",  # Gemma 3n
        "transformer.wte.weight",  # GPT-2, MPT, Falcon's successors
        "wte.weight",  # GPT-2 on the hub
        "gpt_neox.embed_in.weight",
        "backbone.embeddings.weight",  # Mamba
        "backbone.embedding.weight",  # Mamba, its authors' files
        "rwkv.embeddings.weight",
        "bert.embeddings.word_embeddings.weight",
        "roberta.embeddings.word_embeddings.weight",
        "transformer.word_embeddings.weight",  # BLOOM, Falcon
        "word_embeddings.weight",  # BLOOM on the hub
        "transformer.embedding.word_embeddings.weight",  # ChatGLM
        "transformer.word_embedding.weight",  # XLNet
        "transformer.tokens_embed.weight",  # GPT
        "transformer.embeddings.weight",  # XLM
        "text_model.embeddings.token_embedding.weight",  # CLIP
        "shared.weight",  # T5
        "model.shared.weight",  # BART
        "encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",  # OPT, Whisper
        "model.tok_embeddings.weight",  # InternLM 2
    ],
    "head": [
        "lm_head.weight",
        "language_model.lm_head.weight",
        "embed_out.weight",  # GPT-NeoX
        "cls.predictions.decoder.weight",  # BERT
        "predictions.decoder.weight",  # ALBERT
        "lm_head.decoder.weight",  # RoBERTa
        "generator_lm_head.weight",  # ELECTRA
        "vocab_projector.weight",  # DistilBERT
        "lm_loss.weight",  # XLNet
        "pred_layer.proj.weight",  # XLM
        "proj_out.weight",  # Whisper
        "output.weight",  # InternLM 2
        "transformer.output_layer.weight",  # ChatGLM
        "head.weight",  # RWKV
        "model.transformer.ff_out.weight",  # OLMo
    ],
    "bias": [
        "cls.predictions.bias",
        "cls.predictions.decoder.bias",
        "predictions.bias",
        "lm_head.bias",  # GPT-J, Phi-2, RoBERTa
        "lm_head.decoder.bias",
        "generator_lm_head.bias",
        "vocab_projector.bias",
        "lm_loss.bias",
        "pred_layer.proj.bias",
    ],
    None: [
        "transformer.wpe.weight",
        "transformer.positions_embed.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.embeddings.position_ids",
        "bert.embeddings.LayerNorm.weight",
        "transformer.position_embeddings.weight",
        "model.decoder.embed_positions.weight",
        "text_model.embeddings.position_embedding.weight",
        "transformer.word_embeddings_layernorm.weight",
        "transformer.word_embeddings_layernorm.bias",
        "deberta.encoder.rel_embeddings.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "vision_tower.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.embeddings.position_embedding.weight",
        "visual.patch_embed.proj.weight",
        "vision_tower.head.mlp.fc1.bias",
        "visual.head.weight",
        "multi_modal_projector.linear_1.weight",
        "model.layers.0.mlp.shared_expert.gate_proj.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "bert.encoder.layer.0.attention.output.dense.weight",
        "bert.encoder.layer.0.output.LayerNorm.bias",
        "model.transformer.blocks.0.ff_out.weight",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.LayerNorm.bias",
        "cls.seq_relationship.weight",
        "lm_head.dense.weight",  # RoBERTa's head before its decoder
        "lm_head.layer_norm.bias",
        "predictions.dense.bias",
        "generator_predictions.dense.weight",
        "vocab_transform.weight",
        "classifier.weight",
        "score.weight",
        "qa_outputs.weight",
        "final_logits_bias",  # BART: a row per batch, a column per token
        "model.norm.weight",
        "embed_tokens",  # no parameter of a table
    ],
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in ROLES.items() for name in names])
def test_what_has_an_entry_per_token_is_told_by_whole_words_of_its_name(role: str | None, name: str) -> None:
    """Input embeddings, output heads and their biases are known by name outside layers and outside what sees; tables of
    positions, token types and patches, norms beside an embedding and layers that only sound alike are none of them."""
    assert role_of(name) == role


@pytest.mark.skipif("own" not in forms_of("qwen3_moe"), reason="transformers 4 stores experts one by one")
def test_widen_takes_each_fused_expert_as_a_matrix(family, tmp_path: Path) -> None:
    """WIDEN ranks the columns of one expert among themselves: fused or stored one by one, the result is the same."""
    apart, fused = family("qwen3_moe", "hub"), family("qwen3_moe", "own")
    one_by_one = weights(ours("widen", apart["base"], [apart["a"], apart["b"]], tmp_path / "apart"))
    at_once = weights(ours("widen", fused["base"], [fused["a"], fused["b"]], tmp_path / "fused"))
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        stacked = torch.stack([one_by_one[f"{experts}.{i}.down_proj.weight"] for i in range(3)])
        assert torch.equal(at_once[f"{experts}.down_proj"], stacked)


@pytest.mark.parametrize("method", ["widen", "wudi"])
def test_methods_that_tell_inputs_from_outputs_know_how_gpt2_stores_them(family, tmp_path: Path, method: str) -> None:
    """GPT-2's matrices are [in, out]: stored the other way round, as torch.nn.Linear does, the result is the same."""
    folders, turned = family("gpt2"), {}
    for role, folder in folders.items():
        turned[role] = tmp_path / role
        turned[role].mkdir()
        stored = {key: v.T.contiguous() if MATRIX.search(key) else v for key, v in weights(folder).items()}
        save_file(stored, turned[role] / "model.safetensors", metadata={"format": "pt"})
        (turned[role] / "config.json").write_bytes((folder / "config.json").read_bytes())
    found = weights(ours(method, folders["base"], [folders["a"], folders["b"]], tmp_path / "out"))
    wanted = weights(ours(method, turned["base"], [turned["a"], turned["b"]], tmp_path / "turned"))
    for key, tensor in found.items():
        same = wanted[key].T if MATRIX.search(key) else wanted[key]
        assert torch.allclose(tensor, same, rtol=1e-6, atol=1e-7), key
