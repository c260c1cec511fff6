"""Recipes in mergekit's form: what mergekit's own reader makes of a file, this project makes of it too."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import UsageError
from merging.recipe import MergeRecipe, make_recipe, read_config, recipe_as_yaml, remarks
from merging.recipe.mergekit.writer import as_mergekit, to_text
from merging.recipe.method_registry import all_methods, find_method
from merging.recipe.schedules import OutputSlice, ParameterSchedule
from merging.recipe.tokens import TokenRequest
from tests.helpers.mergekit_examples import EXAMPLES, MODULES, MODULES_OF_SLICES
from tests.helpers.tiny import make_llama, weights

ALL = {**EXAMPLES, "modules": MODULES, "modules of slices": MODULES_OF_SLICES}
MERGEKIT_METHODS = [name for name, method in all_methods().items() if method.in_mergekit]


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Folders base, a, b, c in the working directory, as the examples name them; their tensors' names."""
    folder = tmp_path_factory.mktemp("models")
    made = make_llama(folder / "base", layers=4, hidden=16, vocab=64)
    for name in "abc":
        shutil.copytree(made, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield list(weights(made))


def recipe_of(text: str, **flags: Any) -> MergeRecipe:
    """The recipe that a YAML gives under some flags."""
    return make_recipe(flags, yaml.safe_load(text))


# ---------------------------------------------------------------------------------------------- mergekit as the oracle


def mergekit_tasks(document: dict[str, Any]) -> dict[str, Any]:
    """What mergekit plans for each output tensor: models, base, names of inputs, resolved parameters."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    config, options = MergeConfiguration.model_validate(document), MergeOptions()
    architecture = get_architecture_info(config, options)
    LoaderCache().setup(options)
    planner = MergePlanner(config, architecture, options, _model_out_config(config, architecture))
    planner._plan()
    return {weight.name: task for weight, task in planner._tensors}


def tensors(recipe: MergeRecipe, names: list[str]) -> Iterator[tuple[str, OutputSlice, float, list[str]]]:
    """Each output tensor of a Llama with its section, depth, and its name in each of the section's models."""
    kinds = sorted({name.split(".", 3)[3] for name in names if name.startswith("model.layers.")})
    yield "model.embed_tokens.weight", recipe.output_slices[0], 0.0, []
    at = 0
    for output_slice in recipe.output_slices:
        ranges = output_slice.layers or ((0, 4),) * len(output_slice.models)
        length = ranges[0][1] - ranges[0][0]
        for i in range(length):
            for kind in kinds:
                inputs = [f"model.layers.{start + i}.{kind}" for start, _ in ranges]
                yield f"model.layers.{at}.{kind}", output_slice, i / (length - 1) if length > 1 else 1.0, inputs
            at += 1
    for name in ("model.norm.weight", "lm_head.weight"):
        yield name, recipe.output_slices[-1], 0.0, []


def compare(recipe: MergeRecipe, document: dict[str, Any], names: list[str], same_defaults: bool) -> None:
    """Hold the recipe against mergekit's plan of the document, tensor by tensor and value by value."""
    method = find_method(recipe.method)
    tasks = mergekit_tasks(document)
    seen = set()
    for name, output_slice, depth, inputs in tensors(recipe, names):
        task = tasks[name]
        seen.add(name)
        contributors = [recipe.models[i] for i in output_slice.models]
        counted = method.mergekit_counts_base
        theirs = [str(m) for m in task.model_order if counted or m != task.base_model]
        # a base that is averaged with weight 0 gives only tokenizer and config
        theirs = [m for m in theirs if m in contributors or m != recipe.base_model]
        assert theirs == contributors, name
        if method.base == "required":
            assert str(task.base_model) == recipe.base_model
        found = {str(m): weight.name for m, weight in task.gather_tensors.weight_info.items()}
        assert [found[m] for m in contributors] == (inputs or [name] * len(contributors))
        values = output_slice.at(name, depth, inputs or None)
        own = {str(m): dict(v.items()) for m, v in task.input_parameters.items()}
        shared = dict(task.parameters.items())
        for key, parameter in method.parameters.items():
            mk = parameter.mergekit
            if mk.name is None:
                assert values[key] == mk.always
                continue
            mine = values[key] if isinstance(values[key], list) else [values[key]]
            other = [own[m][mk.name] for m in contributors] if mk.name in own[contributors[0]] else [shared[mk.name]]
            if mk.values:
                other = [{str(k).lower(): v for k, v in mk.values.items()}[str(value).lower()] for value in other]
            if not same_defaults and recipe.sources[key].startswith("default") and mk.default is not None:
                continue  # ours; test_defaults_of_mergekit and the remarks are about these
            other = [1.0 if value is None else value for value in other]  # passthrough's scale
            assert mine == other, (name, key)
    assert seen == tasks.keys()


@pytest.mark.parametrize("name", ALL)
def test_mergekit_reads_the_same(name: str, models: list[str]) -> None:
    """For every tensor of every example: the models and their order, the base, the inputs' names and each parameter's
    value are those that mergekit 0.1.5 plans from the same file."""
    compare(recipe_of(ALL[name]), yaml.safe_load(ALL[name]), models, same_defaults=False)


@pytest.mark.parametrize("name", ALL)
def test_mergekit_reads_what_is_written(name: str, models: list[str]) -> None:
    """`as_mergekit` of a recipe of mergekit's own methods is a file from which mergekit 0.1.5 plans the recipe's very
    values, our defaults included, and which reads back as the same recipe."""
    recipe = recipe_of(ALL[name])
    document, unsaid = as_mergekit(recipe)
    text = to_text(document)
    assert make_recipe({}, yaml.safe_load(text)) == recipe
    if not any(sentence.startswith("rescale") for sentence in unsaid):
        compare(recipe, yaml.safe_load(text), models, same_defaults=True)


@pytest.mark.parametrize("seed", range(40))
def test_settings_are_mergekit_s(seed: int) -> None:
    """A random setting (values, gradients, filters, of numbers or words) has at every name and depth the value that
    mergekit's evaluate_setting gives, to the bit."""
    from mergekit.config import ConditionalParameter, evaluate_setting

    draw = random.Random(seed)
    one = draw.choice([lambda: draw.uniform(-2, 2), lambda: draw.random() < 0.5, lambda: draw.choice("xyz")])
    rules = [
        (draw.choice([None, "mlp", "attn", "layers.1", "o_proj"]), tuple(one() for _ in range(draw.randint(1, 5))))
        for _ in range(draw.randint(1, 4))
    ]
    theirs = [ConditionalParameter(value=list(values), filter=part) for part, values in rules]
    setting = ParameterSchedule.of(rules)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.11.self_attn.o_proj.weight", "model.norm.weight"):
        for depth in (0.0, 1 / 3, 0.5, 0.7, 1.0):
            assert setting.at(name, depth) == evaluate_setting(name, theirs, depth, validate=lambda value: value)


def test_facts_about_mergekit() -> None:
    """The methods said to be mergekit's are those it registers; each of its parameters is one of ours, of the same
    scope and default unless the YAML says which other, or is listed as idle or as having one value."""
    from mergekit.merge_methods.base import BasePolicy, ParameterScope
    from mergekit.merge_methods.registry import registered_methods

    assert sorted(MERGEKIT_METHODS) == sorted(m.spec.name for m in registered_methods())
    for theirs in registered_methods():
        method = find_method(theirs.spec.name)
        ours = {p.mergekit.name: p for p in method.parameters.values() if p.mergekit.name}
        listed = {*ours, *method.mergekit_idle}
        assert {p.name for p in theirs.spec.parameters} == listed, method.name
        assert method.mergekit_counts_base == (theirs.spec.contract.base == BasePolicy.IGNORED)
        for spec in theirs.spec.parameters:
            if spec.name not in ours:
                continue
            parameter = ours[spec.name]
            per_model = parameter.per_model or parameter.mergekit.per_model
            assert per_model == (spec.scope != ParameterScope.SHARED), (method.name, spec.name)
            if spec.required or (method.name, spec.name) == ("passthrough", "scale"):
                continue
            default = parameter.default if parameter.mergekit.default is None else parameter.mergekit.default
            if parameter.mergekit.values and parameter.mergekit.default is None:
                default = parameter.mergekit.values[str(spec.default).lower()] == default and spec.default
            assert spec.default == default, (method.name, spec.name)


# ----------------------------------------------------------------------------------------------------------- both forms


def flat_and_mergekit(method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """One recipe of a method in both forms, every parameter given."""
    spec = find_method(method)
    n = int(max(spec.min_models, min(2, spec.max_models)))
    names = ["a", "b"][:n]
    base = {"base_model": "base"} if spec.base == "required" else {}
    flat: dict[str, Any] = {"method": method, **base, "models_to_merge": names, "dtype": "float16", "seed": 7}
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in names]
    for name, parameter in spec.parameters.items():
        value = parameter.default if parameter.default is not None else 0.25
        key = parameter.mergekit.name or name
        if parameter.per_model:
            flat[name] = [value * (0.9 if i else 1) for i in range(n)]
            for i, entry in enumerate(own):
                entry[key] = flat[name][i]
        else:
            flat[name] = shared[key] = value
    entries = [{"model": model, "parameters": entry} for model, entry in zip(names, own, strict=True)]
    document = {"merge_method": method, **base, "models": entries, "parameters": shared, "out_dtype": "float16"}
    return flat, {**document, "seed": 7}


@pytest.mark.parametrize("method", all_methods())
def test_one_recipe_in_both_forms(method: str) -> None:
    """The same recipe written with the flags' keys and in mergekit's form is one recipe, for every method."""
    flat, document = flat_and_mergekit(method)
    recipe = make_recipe({}, flat)
    assert recipe == make_recipe({}, document)
    assert recipe == make_recipe({}, recipe_as_yaml(recipe))


@pytest.mark.parametrize("method", all_methods())
def test_flat_recipes_in_mergekit_s_form(method: str) -> None:
    """A recipe of flags written for mergekit reads back as itself, but for what is said to be lost."""
    flat, _ = flat_and_mergekit(method)
    recipe = make_recipe({}, {**flat, "seed": 42})
    document, unsaid = as_mergekit(recipe)
    again = make_recipe({}, yaml.safe_load(to_text(document)))
    lost = {sentence.split()[0] for sentence in unsaid} & set(recipe.parameters)
    assert {k: v for k, v in again.parameters.items() if k not in lost} == {
        k: v for k, v in recipe.parameters.items() if k not in lost
    }
    if not lost:
        assert again == recipe
    assert (not find_method(method).in_mergekit) == any("no method" in sentence for sentence in unsaid)


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_reads_back(name: str) -> None:
    """make_recipe({}, recipe_as_yaml(recipe)) == recipe, with settings of ours that mergekit lacks."""
    extra = {"seed": 9, "tokenizer": "union", "pad_to_multiple_of": 64, "chat_template": "auto", "dtype": "float16"}
    if "rescale" in find_method(yaml.safe_load(ALL[name])["merge_method"]).parameters:
        extra["rescale"] = "l1"
    for flags in ({}, extra):
        recipe = recipe_of(ALL[name], **flags)
        assert make_recipe({}, yaml.safe_load(to_text(recipe_as_yaml(recipe)))) == recipe


def test_settings_of_ours_in_mergekit_s_form() -> None:
    """What only this project has (rescale: paper, trim_scope) is written and read in mergekit's form as well, and is
    said to be lost in the file for mergekit."""
    text = "merge_method: %s\nbase_model: base\nmodels: [{model: a}]\nparameters: {density: [0.2, 0.4]}\n"
    dare = recipe_of(text % "dare_ties", rescale="paper")
    assert recipe_as_yaml(dare)["parameters"]["rescale"] == "paper"
    assert make_recipe({}, recipe_as_yaml(dare)) == dare
    document, unsaid = as_mergekit(dare)
    assert document["parameters"]["rescale"] is True
    assert any(s.startswith("rescale paper: mergekit has only l1 and none") for s in unsaid)
    assert any(s.startswith("seed 42: mergekit draws") for s in unsaid)
    ties = recipe_of((text % "ties").replace("density: [", "density: 0.2, weight: ["), trim_scope="model")
    assert make_recipe({}, recipe_as_yaml(ties)) == ties
    document, unsaid = as_mergekit(ties)
    assert "trim_scope" not in document["parameters"]
    assert unsaid == ["trim_scope model: mergekit always does as trim_scope tensor."]


def test_model_scope_needs_one_density() -> None:
    """trim_scope model has one threshold per model, so that a density which varies over the layers is refused."""
    text = "merge_method: ties\nbase_model: base\nmodels: [{model: a}]\nparameters: {density: [0.2, 0.4]}\n"
    with pytest.raises(UsageError, match="needs one density for each model"):
        recipe_of(text, trim_scope="model")


def test_lists_of_numbers_are_inline() -> None:
    """The text written keeps gradients on one line and never refers to an earlier value."""
    document, _ = as_mergekit(recipe_of(EXAMPLES["slerp"]))
    text = to_text(document)
    assert "value: [0.0, 0.5, 0.3, 0.7, 1.0]" in text
    assert "layer_range: [0, 4]" in text
    assert "&id" not in text


def test_a_base_that_gives_only_the_tokenizer() -> None:
    """Flat: the base of linear is no contributor. For mergekit, which averages it, it stands there with weight 0, and
    reads back as it was; karcher has no weights, and the sentence says that the base is left out."""
    recipe = make_recipe({"method": "linear", "base_model": "base", "models_to_merge": "a,b", "weights": "1,3"}, {})
    document, unsaid = as_mergekit(recipe)
    assert document["models"][-1] == {"model": "base", "parameters": {"weight": 0.0}}
    assert unsaid == []
    assert make_recipe({}, document) == recipe
    karcher = make_recipe({"method": "karcher", "base_model": "base", "models_to_merge": "a,b"}, {})
    document, unsaid = as_mergekit(karcher)
    assert "base_model" not in document
    assert "count the base base among the models" in unsaid[0]


@pytest.mark.parametrize(
    ("name", "starts_from_it"),
    [("ties", True), ("slerp", True), ("nuslerp", False), ("nuslerp of task vectors", True), ("passthrough", False),
     ("passthrough of a base", False), ("karcher of the base too", False)],
)  # fmt: skip
def test_uses_base(name: str, starts_from_it: bool) -> None:
    """A recipe says whether its method starts from the base, or the base gives only tokenizer and config, or is one of
    the models."""
    assert recipe_of(EXAMPLES[name]).uses_base == starts_from_it


def test_a_base_to_relax_towards() -> None:
    """passthrough of one model with another as base (which mergekit refuses) is what AIM relaxes towards that base."""
    recipe = recipe_of("merge_method: passthrough\nbase_model: base\nmodels: [{model: a}]\ndtype: float32")
    assert (recipe.models, recipe.base_model, recipe.uses_base) == (("a",), "base", True)
    document, unsaid = as_mergekit(recipe)
    assert "base_model" not in document
    assert "count the base" in unsaid[0]


def test_precedence() -> None:
    """A value of a model wins over a slice's, that over the recipe's, that over the default; a filter that does not
    match falls to the next (worked by hand)."""
    recipe = recipe_of(EXAMPLES["every level"])
    first, second = recipe.output_slices
    assert (first.layers, first.base_layers, second.base_layers) == (((0, 2), (2, 4)), (1, 3), (3, 4))
    at = first.at("model.layers.1.self_attn.k_proj.weight", 1.0, ["model.layers.1.x", "model.layers.3.k_proj"])
    assert at["weights"] == [0.5, 0.4]  # the slice's fallback; its k_proj at depth 1
    assert at["density"] == [0.8, 0.9]  # the recipe's gradient; the model's own filter on its own name
    assert at["normalize"] is True
    assert second.at("model.layers.2.mlp.up_proj.weight", 1.0)["weights"] == [2.0, 0.7]
    assert second.at("model.norm.weight", 0.0)["normalize"] is False
    assert recipe.models == ("a", "b", "c")


# ---------------------------------------------------------------------------------------------------------------- flags


def test_flags_win() -> None:
    """A flag for a parameter replaces it everywhere; general settings and models too; a model that is kept keeps its
    own parameters."""
    recipe = recipe_of(EXAMPLES["ties"], density="0.4", weights="1,2,3", dtype="bfloat16", seed="5")
    assert recipe.parameters["density"] == [0.4] * 3
    assert recipe.parameters["weights"] == [1, 2, 3]
    assert (recipe.dtype, recipe.seed, recipe.sources["density"]) == ("bfloat16", 5, "flag")
    sliced = recipe_of(EXAMPLES["every level"], density="0.4,0.5,0.6", normalize="true")
    assert [s.at("x", 0)["density"] for s in sliced.output_slices] == [[0.4, 0.5], [0.6, 0.4]]
    assert all(output_slice.at("model.norm.weight", 0)["normalize"] is True for output_slice in sliced.output_slices)
    other = recipe_of(EXAMPLES["breadcrumbs"], models_to_merge="b,c", base_model="a")
    assert (other.models, other.base_model) == (("b", "c"), "a")
    assert other.parameters["weights"] == [0.5, 1.0]


def test_another_method() -> None:
    """--method takes the place of merge_method where the file's parameters are its own; else they are named."""
    assert recipe_of(EXAMPLES["dare_ties"], method="dare_linear").method == "dare_linear"
    said = remarks(recipe_of(EXAMPLES["ram"], method="ties"))
    assert "parameters.epsilon has no effect: ties has no parameter 'epsilon'." in said
    aliased = EXAMPLES["sce"].replace("merge_method: sce", "merge_method: WIDEN").split("parameters")[0]
    assert recipe_of(aliased).method == "widen"


# --------------------------------------------------------------------------------------------------- names and settings

BASE = "merge_method: ties\nbase_model: base\nmodels: [{model: a}]\n"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("a@rev", "a@rev"),
        ("a@rev+lora", "a@rev+lora"),
        ("{model: a}", "a"),
        ("{model: {path: org/a, revision: v1}, lora: {path: l, revision: v2}}", "org/a@v1+l@v2"),
        ("{model: {path: org/a}, lora: null}", "org/a"),
    ],
)
def test_names_of_models(written: str, name: str) -> None:
    """Every form in which mergekit names a model is our one form, and means the same model to mergekit."""
    from mergekit.common import ModelReference

    text = BASE.replace("{model: a}", f"{{model: {written}}}")
    assert recipe_of(text).models == (name,)
    theirs = ModelReference.model_validate(yaml.safe_load(text)["models"][0]["model"])
    assert ModelReference.model_validate(as_mergekit(recipe_of(text))[0]["models"][0]["model"]) == theirs


def test_a_folder_with_an_at_sign(models: list[str]) -> None:
    """A local folder whose name holds @ or + is written so that mergekit does not take a part for a revision."""
    from mergekit.common import ModelReference

    Path("a@b+c").mkdir()
    document, _ = as_mergekit(recipe_of(BASE.replace("model: a", "model: a@b+c")))
    assert document["models"][0]["model"] == {"model": {"path": "a@b+c"}}
    assert recipe_of(yaml.safe_dump(document)).models == ("a@b+c",)
    read = ModelReference.model_validate(document["models"][0]["model"])
    assert (read.model.path, read.model.revision, read.lora) == ("a@b+c", None, None)


@pytest.mark.parametrize(
    ("lines", "setting", "value"),
    [
        ("dtype: float16", "dtype", "float16"),
        ("dtype: torch.float32", "dtype", "float32"),
        ("dtype: float32\nout_dtype: bfloat16", "dtype", "bfloat16"),
        ("", "dtype", "auto"),
        ("tokenizer_source: union", "tokenizer", "union"),
        ("tokenizer_source: {model: {path: a, revision: r}}", "tokenizer", "a@r"),
        ("tokenizer: {source: base, tokens: null, pad_to_multiple_of: null}", "tokenizer", "base"),
        ("tokenizer: {}", "tokenizer", "union"),
        ("tokenizer: {pad_to_multiple_of: 64}", "tokenizer", "union"),
        ("tokenizer: {pad_to_multiple_of: 64}", "pad_to_multiple_of", 64),
        ("", "tokenizer", "base"),
        ("chat_template: auto", "chat_template", "auto"),
        ("chat_template: a", "chat_template", "a"),
        ("chat_template: chatml", "chat_template", "chatml"),
        ("tokenizer: {tokens: {x: {source: a, force: 1}, y: {source: {kind: zero}}, z: {}}}", "tokens",
         (TokenRequest("x", "a", force=True), TokenRequest("y", zero=True), TokenRequest("z"))),
        ("tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: w3}}}}", "tokens",
         (TokenRequest("x", "a", source_token="w3"),)),
        ("chat_template: '{% for m in messages %}{{ m }}{% endfor %}'", "chat_template",
         "{% for m in messages %}{{ m }}{% endfor %}"),
        ("seed: 3", "seed", 3),
        ("numerics: reference\nparameters: {density: 1}", "numerics", "reference"),
    ],
)  # fmt: skip
def test_general_settings(lines: str, setting: str, value: Any) -> None:
    """dtype, out_dtype (which wins), tokenizer in both forms, chat_template, and our own settings beside them."""
    assert getattr(recipe_of(BASE + lines), setting) == value


def test_dtype_auto() -> None:
    """--dtype auto keeps the models' own in either form, and a recipe without a dtype has a default by its form."""
    flat = {"method": "ties", "base_model": "base", "models_to_merge": "a"}
    assert make_recipe({**flat, "dtype": "auto"}, {}).stored_dtype is None
    assert make_recipe(flat, {}).stored_dtype == "bfloat16"
    assert recipe_of(BASE + "dtype: float16", dtype="auto").stored_dtype is None
    assert recipe_of(BASE).stored_dtype is None


def test_remarks() -> None:
    """Once for each parameter left out whose default this project has otherwise; for what has no effect."""
    said = remarks(recipe_of(BASE.replace("}]", "}, {model: b}]") + "parameters: {int8_mask: true}"))
    assert [s for s in said if s.startswith("density is")] == [
        "density is not given: 1.0, as in mergekit; without a file the default is 0.2 (TIES, Yadav et al. 2023, "
        "section 4 (top 20 %))."
    ]
    assert "parameters.int8_mask has no effect on ties." in said
    assert "weight is not given: 1.0 here; mergekit 0.1.5 requires it." in said
    said = remarks(recipe_of(EXAMPLES["dare_ties"].replace(", rescale: true", "")))
    assert any(s.startswith("rescale is not given: true, as in mergekit; without a file") for s in said)
    assert remarks(recipe_of(EXAMPLES["nuslerp of task vectors"])) == []
    assert any(
        "b is the base" in s for s in remarks(recipe_of(EXAMPLES["ties"].replace("base_model: base", "base_model: b")))
    )
    flat = make_recipe({"method": "ties", "base_model": "base", "models_to_merge": "a,b"}, {})
    assert remarks(flat) == []


# --------------------------------------------------------------------------------------------- what has no effect

IDLE = {
    "label": ("name: my-merge", "name has no effect: it is a label."),
    "label of a model": ("models: [{model: a, name: x}]", "models[0].name has no effect: it is a label."),
    "anchor": ("x-common: {density: 1}", "x-common has no effect: it is a label."),
    "option": ("allow_crimes: true", "allow_crimes has no effect: it is an option of mergekit's command line, no key"),
    "unknown": ("gpu_layers: 3", "gpu_layers has no effect: neither mergekit 0.1.5 nor this project knows the key."),
    "of another method": ("parameters: {t: 0.5}", "parameters.t has no effect: ties has no parameter 't'."),
    "of no method": ("parameters: {int_space: cs}", "parameters.int_space has no effect: ties has no parameter"),
    "of early versions": ("parameters: {embed_slerp: true}", "parameters.embed_slerp has no effect: ties has no"),
    "idle": ("parameters: {int8_mask: 1.0}", "parameters.int8_mask has no effect on ties."),
    "shared, of a model": ("models: [{model: a, parameters: {normalize: 1.0, lambda: 0.9}}]",
                           "models[0].parameters.lambda has no effect: lambda is one value for all models, read from"),
    "seed": ("random_seed: 3", "random_seed has no effect: ties draws no random numbers."),
    "layers": ("models: [{model: a, layer_range: [0, 4]}]", "models[0].layer_range has no effect under `models`"),
    "revision of a folder": ("models: [{model: a, revision: v1}]",
                             "models[0].revision has no effect: a is a local folder."),
    "tokenizer": ("tokenizer: {source: base, preserve_embeddings: true}",
                  "tokenizer.preserve_embeddings has no effect: neither mergekit 0.1.5 nor this project"),
}  # fmt: skip


@pytest.mark.parametrize("name", IDLE)
def test_what_has_no_effect_is_reported(name: str) -> None:
    """Labels, options, leftovers of other methods and keys that nobody knows change nothing and are each named."""
    lines, sentence = IDLE[name]
    plain = yaml.safe_load(BASE + "parameters: {weight: 1, density: 0.5}")
    extra = yaml.safe_load(lines)
    merged = {**plain, **extra, "parameters": {**plain["parameters"], **(extra.get("parameters") or {})}}
    recipe = make_recipe({}, merged)
    assert (recipe.output_slices, recipe.models, recipe.seed) == (make_recipe({}, plain).output_slices, ("a",), 42)
    assert any(said.startswith(sentence) for said in remarks(recipe)), remarks(recipe)


def test_flags_of_any_spelling() -> None:
    """1.0, 1 and yes are true where mergekit reads a flag, also where ours is a word; 2 is refused."""
    for word in ("1.0", "1", "true", "'yes'", "'on'"):
        recipe = recipe_of(EXAMPLES["dare_ties"].replace("rescale: true", f"rescale: {word}, normalize: {word}"))
        assert (recipe.parameters["rescale"], recipe.parameters["normalize"]) == ("l1", True)
    assert recipe_of(BASE + "parameters: {rescale: 1}").parameters["rescale"] == "l1"
    with pytest.raises(UsageError, match=r"parameters\.normalize must be true or false, found 2"):
        recipe_of(BASE + "parameters: {normalize: 2}")


def test_seed_and_revision() -> None:
    """random_seed seeds the masks of a method that draws them; a revision beside a hub id is that of the model."""
    assert recipe_of(EXAMPLES["dare_ties"] + "random_seed: 7").seed == 7
    assert recipe_of(EXAMPLES["dare_ties"] + "random_seed: 7", seed="5").seed == 5
    recipe = recipe_of(BASE.replace("{model: a}", "{model: org/a+org/lora, revision: v1}"))
    assert recipe.models == ("org/a@v1+org/lora",)
    assert any("models[0].revision: org/a@v1 is merged; mergekit 0.1.5 ignores" in s for s in remarks(recipe))


def test_repeated_models() -> None:
    """A model that is listed twice counts twice, each entry with its own parameters; the recipe reads back as it is."""
    text = BASE.replace("{model: a}", "{model: a, parameters: {weight: 0.5}}, {model: a, parameters: {weight: 0.2}}")
    recipe = recipe_of(text)
    assert (recipe.models, recipe.output_slices[0].models) == (("a",), (0, 0))
    assert recipe.output_slices[0].at("x", 0.0)["weights"] == [0.5, 0.2]
    assert make_recipe({}, recipe_as_yaml(recipe)) == recipe
    assert any(s.startswith("models[1]: a is listed again (also as models[0])") for s in remarks(recipe))
    condensed = recipe_of(
        S + "slices: [{sources: [{model: base, layer_range: [0, 1]}, {model: base, layer_range: [3, 4]}]}]"
    )
    (output_slice,) = condensed.output_slices
    assert (condensed.models, output_slice.base_layers, output_slice.layers) == (("base",), (0, 1), ((3, 4),))
    assert make_recipe({}, recipe_as_yaml(condensed)) == condensed


def test_only_the_base() -> None:
    """A list with the base alone is a copy of it, in a recipe, a slice or a module; the recipe reads back as it is."""
    recipe = recipe_of(
        BASE.replace("model: a", "model: base+lora").replace("base_model: base", "base_model: base+lora")
    )
    assert (recipe.models, recipe.base_model, recipe.output_slices[0].models) == ((), "base+lora", ())
    assert "models lists only the base base+lora: its tensors are copied." in remarks(recipe)
    assert make_recipe({}, recipe_as_yaml(recipe)) == recipe


# --------------------------------------------------------------------------------------------------------------- errors

S = "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n"
MISTAKES = {
    "misspelt parameter": (BASE.replace("{model: a}", "{model: b}, {model: a, parameters: {densty: 1}}"),
                           r"models\[1\]\.parameters\.densty: ties has no parameter 'densty'\. Did you mean 'density'"),
    "our name": (BASE + "parameters: {scaling: 2}", r"parameters\.scaling: ties .* mergekit calls it 'lambda'"),
    "our name of a weight": (BASE + "parameters: {weights: 2}", "mergekit calls it 'weight'"),
    "out of range": (BASE.replace("{model: a}", "{model: a, parameters: {density: [0.1, 1.5]}}"),
                     r"models\[0\]\.parameters\.density must be in \(0, 1\], found 1.5"),
    "out of range in a filter": (BASE + "parameters: {density: [{filter: mlp, value: 2}]}",
                                 r"parameters\.density\[0\]\.value must be in"),
    "not a number": (BASE + "parameters: {density: dense}", r"parameters\.density must be a float, found 'dense'"),
    "nothing": (BASE + "parameters: {density: }", r"parameters\.density must be a float, found None"),
    "empty list": (BASE + "parameters: {density: []}", r"parameters\.density should be a list with at least one"),
    "mixed list": (BASE + "parameters: {density: [{value: 1}, 0.5]}", r"parameters\.density\[1\] should be `filter`"),
    "pattern": (BASE + "parameters: {density: [{pattern: mlp, value: 1}]}", r"parameters\.density\[0\]\.pattern is no"),
    "filter of a number": (BASE + "parameters: {density: [{filter: 1, value: 1}]}", r"density\[0\]\.filter should be"),
    "whole numbers over layers": (EXAMPLES["karcher"].replace("1000", "[1, 10]"), "max_iter is a whole number"),
    "top key": (BASE + "paramters: {}", r"paramters is no key of a recipe\. Did you mean 'parameters'\?"),
    "misspelt method": ("merge_metod: ties\nmodels: [{model: a}]", r"merge_metod is no key .* 'merge_method'\?"),
    "method": (BASE + "method: ties", "mergekit does not read method there; write it as `merge_method`"),
    "parameter beside a model": (BASE.replace("{model: a}", "{model: a, density: 0.5}"),
                                 r"models\[0\]\.density: .* write it under `models\[0\]\.parameters`"),
    "parameter at the top": (BASE + "weight: 0.5", r"weight: .* write it under `parameters`"),
    "dtype in parameters": (BASE + "parameters: {dtype: bfloat16}", "write it at the top level of the recipe"),
    "base of a model": (BASE.replace("{model: a}", "{model: a, base_model: b}"),
                        r"models\[0\]\.base_model: .* at the top level"),
    "adapter beside a model": (BASE.replace("{model: a}", "{model: a, lora: b}"),
                               r"models\[0\]\.lora: .*BASE\+ADAPTER"),
    "layers beside sources": (S + "slices: [{layer_range: [0, 2], sources: [{model: a, layer_range: [0, 2]}]}]",
                              r"slices\[0\]\.layer_range: .* under `slices\[0\]\.sources`"),
    "method of a slice": (S + "slices: [{merge_method: linear, sources: [{model: a, layer_range: [0, 2]}]}]",
                          r"slices\[0\]\.merge_method is linear; a recipe has one method"),
    "two revisions": (BASE.replace("{model: a}", "{model: o/a@v1, revision: v2}"), "has the revision v1; leave one"),
    "models of flags": (BASE + "models_to_merge: [a]", "models_to_merge: .* write it under `models`"),
    "key of a model": (BASE.replace("{model: a}", "{model: a, parameter: {}}"), r"models\[0\]\.parameter is no key"),
    "models and slices": (BASE + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
                          "exactly one of models, slices, modules, found models and slices"),
    "no models": (S, "exactly one of models, slices, modules, found none"),
    "names, not models": (BASE.replace("{model: a}", "a"), r"models\[0\] should hold keys and values, found 'a'"),
    "no name": (BASE.replace("{model: a}", "{parameters: {}}"), r"models\[0\]\.model should be the name of a model"),
    "architecture": (BASE.replace("{model: a}", "{model: {model: a, override_architecture: X}}"),
                     r"models\[0\]\.model\.override_architecture is not supported"),
    "unknown method": (BASE.replace("merge_method: ties", "merge_method: dare-ties"), "Did you mean 'dare_ties'"),
    "no method": ("models: [{model: a}]", "merge_method is missing"),
    "no base": ("merge_method: ties\nmodels: [{model: a}]", "ties needs --base_model"),
    "no base of two": ("merge_method: slerp\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}",
                       r"slerp needs --base_model \(base_model in a file\)"),
    "t of a model": (S.replace("{t: 0.5}", "{}") + "models: [{model: a, parameters: {t: 0.5}}]",
                     r"parameters\.t must be given: .* models\[0\]\.parameters\.t has no effect: t is one value"),
    "t left out": (S.replace("{t: 0.5}", "{}") + "models: [{model: a}]", r"parameters\.t must be given"),
    "range backwards": (S + "slices: [{sources: [{model: a, layer_range: [4, 2]}, {model: base, layer_range: [0, 2]}"
                        "]}]",
                        r"slices\[0\]\.sources\[0\]\.layer_range should be \[from, to\) with 0 <= from < to"),
    "range of one": (S + "slices: [{sources: [{model: a, layer_range: [4]}]}]", "should be two whole numbers"),
    "no range": (S + "slices: [{sources: [{model: a}]}]", r"layer_range should be two whole numbers, .* found None"),
    "lengths": (S + "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: base, layer_range: [0, 3]}]}]",
                r"slices\[0\]: every source .* found 2 in slices\[0\]\.sources\[0\], 3 in slices\[0\]\.sources\[1\]"),
    "slice without base": (S + "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]",
                           r"slices\[0\] names no layers of the base base, which slerp needs"),
    "two bases": (S + "slices: [{base_model: b, sources: [{model: a, layer_range: [0, 2]}, "
                  "{model: base, layer_range: [0, 2]}]}]", r"slices\[0\]\.base_model is b; .* has one base .*, base"),
    "module of nothing": ("merge_method: linear\nmodules: {text: {parameters: {}}}",
                          r"modules\.text should have either models or slices"),
    "too many models": (S + "models: [{model: a}, {model: b}]", "slerp takes 1 model besides the base, 2 given"),
    "tokens": (BASE + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
               r"tokenizer\.tokens\.x\.source needs either token or token_id"),
    "kind of token": (BASE + "tokenizer: {tokens: {x: {source: {kind: mean}}}}", "must be model_token or zero"),
    "forced without source": (BASE + "tokenizer: {tokens: {x: {force: true}}}", "force needs a source"),
    "id of token": (BASE + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token_id: -1}}}}",
                    "token_id must be a whole number from 0"),
    "padding": (BASE + "tokenizer: {pad_to_multiple_of: 0}", r"pad_to_multiple_of must be a whole number from 1"),
    "two tokenizers": (BASE + "tokenizer: {}\ntokenizer_source: base", "either tokenizer or tokenizer_source"),
    "dtype": (BASE + "dtype: bfloat61", r"dtype must be one of .* Did you mean 'bfloat16'"),
    "out_dtype": (BASE + "out_dtype: float64", "out_dtype must be one of"),
    "unknown template": (BASE + "chat_template: bas", "chat_template must be base, auto.* Did you mean 'base'"),
    "base of linear": (EXAMPLES["linear"] + "base_model: base", "averages the base as well, and base has no weight"),
    "reference gradient": (BASE + "numerics: reference\nparameters: {density: 1, lambda: [1, 2]}",
                           "leave out slices, modules, filters and lists"),
    "weights of sum 0": ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, 1, 2]}}, "
                         "{model: b, parameters: {weight: [1, -1, 1]}}]", "sum of the weights, which is 0"),
    "probabilities": (EXAMPLES["della"].replace("[0.5, 0.7]", "[0.5, 0.95]"), "found 0.95 and 0.1"),
    "our form": ("method: ties\nmodels: [a]\nbase_model: base", "ties has no parameter 'models'. Did you mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    """Each mistake in a file is one sentence that names the key, where it stands, and what is near it."""
    text, sentence = MISTAKES[name]
    with pytest.raises(UsageError, match=sentence) as caught:
        recipe_of(text)
    assert "\n" not in str(caught.value)


def test_mistakes_of_flags() -> None:
    """Flags that do not fit a file in mergekit's form are named."""
    with pytest.raises(UsageError, match="--models_to_merge cannot replace the models of a file with slices"):
        recipe_of(EXAMPLES["slerp"], models_to_merge="a,b")
    with pytest.raises(UsageError, match="ties has no parameter 'gamma'"):
        recipe_of(EXAMPLES["ties"], gamma="0.1")
    with pytest.raises(UsageError, match=r"1 value or one per model \(3\), found 2"):
        recipe_of(EXAMPLES["ties"], density="0.1,0.2")
    with pytest.raises(UsageError, match=re.escape("slices[0] names no layers of the base c")):
        recipe_of(EXAMPLES["every level"], base_model="c")


def test_a_tensor_without_a_value() -> None:
    """A parameter without a default whose filters miss a tensor is an error that names the tensor."""
    recipe = recipe_of(S.replace("{t: 0.5}", "{t: [{filter: mlp, value: 0.5}]}") + "models: [{model: a}]")
    assert recipe.output_slices[0].at("model.layers.0.mlp.up_proj.weight", 0.0) == {"t": 0.5}
    with pytest.raises(UsageError, match=r"t has no value for tensor model\.norm\.weight"):
        recipe.output_slices[0].at("model.norm.weight", 0.0)


def test_files(tmp_path: Path) -> None:
    """A file of several recipes (mergekit-multi) is refused by a sentence; an empty one as well."""
    file = tmp_path / "x.yaml"
    file.write_text("merge_method: ties\n---\nmerge_method: linear\n")
    with pytest.raises(UsageError, match="holds 2 recipes"):
        read_config(file)
    file.write_text("")
    with pytest.raises(UsageError, match="keys and values"):
        read_config(file)


def test_the_script_names_the_key(tmp_path: Path, run_script) -> None:
    """`merge.py --config FILE` says a mistake in mergekit's form in one sentence and writes nothing."""
    file = tmp_path / "x.yaml"
    file.write_text(MISTAKES["misspelt parameter"][0])
    done = run_script("merge.py", "--config", file, "--save_path", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: models[1].parameters.densty: ")
    assert not (tmp_path / "out").exists()
