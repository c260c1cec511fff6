"""Compare the bytes of merges and relaxations before and after a change of the code.

    python scripts/dev/same_bytes.py --folder ../same_bytes --write results/same_bytes.json
    python scripts/dev/same_bytes.py --folder ../same_bytes --compare results/same_bytes.json

makes tiny checkpoints by fixed seeds, runs merge.py and performAIM.py over them as a user does, and prints a digest of
each recipe's output. --write keeps a digest of every output tensor; --compare names each tensor that differs and exits
with 1. Matrix products of calibration depend on the processor: write the list on the machine that compares.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.cli import Parser, add_output_flags, run
from eval.results.result import read_json_file

if TYPE_CHECKING:
    import transformers
    from torch import Tensor

VOCABULARY = 96
DIGEST_LENGTH = 12
RANKS = 2
Digests = dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """One command. script: of the repository's root; flags: with {folder} for the checkpoints and {out} for the output.

    files: {name in the folder: text} written before the run; ranks: processes, by torchrun; env: changes to it.
    """

    name: str
    flags: Sequence[str]
    script: str = "merge.py"
    files: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    env: dict[str, str] = field(default_factory=dict)


class Options(TypedDict, total=False):
    """Further fields of a recipe."""

    files: dict[str, str]
    ranks: int
    env: dict[str, str]


def merge(
    name: str, method: str, models: str, *flags: str, base: str | None = "base", **rest: Unpack[Options]
) -> Recipe:
    """Return a merge of models of the folder, named by comma."""
    listed = ",".join("+".join(f"{{folder}}/{part}" for part in model.split("+")) for model in models.split(","))
    chosen = ["--base_model", f"{{folder}}/{base}"] if base else []
    return Recipe(name, ["--method", method, *chosen, "--models_to_merge", listed, *flags], **rest)


def relax(name: str, merged: str, *flags: str, base: str = "base", **rest: Unpack[Options]) -> Recipe:
    """Return a relaxation of a merged model of the folder."""
    path = "+".join(f"{{folder}}/{part}" for part in merged.split("+"))
    chosen = ["--merged_model", path, "--pretrained_model_name", f"{{folder}}/{base}"]
    return Recipe(name, [*chosen, *flags], script="performAIM.py", **rest)


TEXT = ("--calibration", "{folder}/text.txt", "--block_size", "32", "--calibration_dtype", "float32")
THREE = "math,code,chat"
SLICES = """
slices:
  - sources: [{{model: {folder}/math, layer_range: [0, 2]}}]
  - sources: [{{model: {folder}/code, layer_range: [1, 3]}}]
merge_method: passthrough
dtype: bfloat16
"""
FILTERS = """
merge_method: ties
base_model: {folder}/base
models:
  - {{model: {folder}/math, parameters: {{density: [0.9, 0.5], weight: 0.7}}}}
  - model: {folder}/code
    parameters:
      density: [{{filter: mlp, value: 0.4}}, {{value: 0.6}}]
      weight: [{{filter: self_attn, value: [0.2, 0.8]}}, {{value: 0.5}}]
dtype: float32
"""
MODULES = """
merge_method: slerp
base_model: {folder}/math
slices:
  - sources: [{{model: {folder}/math, layer_range: [0, 3]}}, {{model: {folder}/code, layer_range: [0, 3]}}]
parameters: {{t: [{{filter: mlp, value: [0, 1]}}, {{value: 0.3}}]}}
dtype: bfloat16
"""


def recipes() -> list[Recipe]:
    """Return the matrix: every method, dtype, layout, way of calibration and kind of result."""
    methods: dict[str, tuple[str, ...]] = {
        "linear": ("--weights", "1,2,3"), "task_arithmetic": (), "ties": ("--density", "0.5"),
        "dare_linear": (), "dare_ties": ("--density", "0.4"), "widen": (), "breadcrumbs": (), "breadcrumbs_ties": (),
        "della": (), "della_linear": (), "sce": (), "model_stock": (), "ram": (), "ramplus_tl": (), "tsv_merge": (),
        "iso_c": (), "karcher": (), "multislerp": (), "wudi": ("--solver", "closed_form"),
    }  # fmt: skip
    listed = [merge(f"{name}, bf16", name, THREE, *flags) for name, flags in methods.items()]
    listed += [
        merge(f"{name}, fp32", name, "math32,code32", *flags, "--dtype", "float32", base="base32")
        for name, flags in methods.items()
        if name not in ("linear", "karcher", "wudi")
    ]
    listed += [
        merge(f"linear, reference, {kind}", "linear", "math,code", "--numerics", "reference", base=base)
        for kind, base in (("with a base", "base"), ("without", None))
    ]
    for name in ("task_arithmetic", "ties", "dare_linear", "dare_ties", "widen"):
        density = ("--density", "1") if name not in ("task_arithmetic", "widen") else ()
        listed.append(merge(f"{name}, reference", name, "math,code", *density, "--numerics", "reference"))
    listed += [
        merge("slerp", "slerp", "math", "--t", "0.3"),
        merge("nuslerp, base", "nuslerp", "math,code"),
        merge("nuslerp, no base", "nuslerp", "math,code", base=None),
        merge("nearswap", "nearswap", "math", "--t", "0.01"),
        merge("arcee_fusion", "arcee_fusion", "math"),
        merge("passthrough, fp16", "passthrough", "math", "--dtype", "float16", base=None),
        merge("shards", "ties", THREE, "--density", "0.5", "--max_shard_size", "20KB"),
        merge("kernels off", "ties", THREE, "--density", "0.5", env={"MERGE_KERNELS": "off"}),
        merge("kernels off, DARE", "dare_ties", THREE, "--density", "0.4", env={"MERGE_KERNELS": "off"}),
        merge("two ranks, TIES", "ties", THREE, "--density", "0.5", ranks=RANKS),
        merge("two ranks, DARE", "dare_linear", THREE, ranks=RANKS),
        merge("pickled", "ties", "math-bin,code", "--density", "0.5"),
        merge("GGUF", "task_arithmetic", "math,gguf/model.gguf"),
        merge("tied", "ties", "tied-math", "--density", "0.5", base="tied"),
        merge("tied and untied", "task_arithmetic", "tied-math,math", base="tied"),
        merge("Conv1D", "widen", "gpt2-math", base="gpt2"),
        merge("mixture of experts", "della", "moe-math", base="moe"),
        merge("adapters as models", "ties", "base+lora,base+lora2", "--density", "0.7"),
        merge("adapters as an adapter", "task_arithmetic", "base+lora,base+lora2", "--save_as", "adapter"),
        merge("one adapter written out", "passthrough", "base+lora", base=None),
        merge("more tokens, base's", "ties", "math,more", "--density", "0.5"),
        merge("more tokens, union", "ties", "math,more", "--density", "0.5", "--tokenizer", "union"),
        merge("padded vocabulary", "linear", "math,more", "--tokenizer", "union", "--pad_to_multiple_of", "16"),
        Recipe("slices", ["--config", "{folder}/slices.yaml"], files={"slices.yaml": SLICES}),
        Recipe("filters and gradients", ["--config", "{folder}/filters.yaml"], files={"filters.yaml": FILTERS}),
        Recipe("slerp by parts", ["--config", "{folder}/slerp.yaml"], files={"slerp.yaml": MODULES}),
        merge("merge and relax", "ties", THREE, "--density", "0.5", "--omega", "0.4", *TEXT),
        merge("merge and relax, several omegas", "task_arithmetic", THREE, "--omega", "0,0.2,1", *TEXT),
        relax("relax", "math", *TEXT),
        relax("relax, layer by layer", "math", *TEXT, "--calibration_mode", "layerwise"),
        relax("relax, several omegas", "math", "--omega", "0,0.4,1", *TEXT),
        relax("relax, reference", "math", "--numerics", "reference", "--calibration", "{folder}/text.txt"),
        relax("relax, parts", "math", *TEXT, "--exclude", "mlp", "--keep_base", "norm"),
        relax("relax Conv1D", "gpt2-math", *TEXT, base="gpt2"),
        relax("relax a mixture of experts", "moe-math", *TEXT, "--min_tokens", "1", base="moe"),
        relax("relax a tied head", "tied-math", *TEXT, "--relax_tied", base="tied"),
        relax("relax an adapter", "base+lora", *TEXT, "--save_as", "adapter"),
        relax("relax, two ranks", "math", *TEXT, ranks=RANKS),
    ]
    return listed


def make_checkpoints(folder: Path) -> None:
    """Save the checkpoints that the recipes name; tensors are drawn by numpy from fixed seeds, tokenizers by hand."""
    import numpy as np
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    def tokenizer(target: Path, extra: int = 0) -> None:
        vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        fast.add_tokens([f"<new{i}>" for i in range(extra)])
        fast.save_pretrained(target)

    def fill(model: transformers.PreTrainedModel, base: dict[str, Tensor] | None, seed: int) -> dict[str, Tensor]:
        values = {}
        generator = np.random.default_rng(seed)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                draw = torch.from_numpy(generator.standard_normal(parameter.shape, dtype=np.float32))
                old = None if base is None else base.get(name)
                if old is not None and old.shape != parameter.shape:
                    old = torch.cat([old, draw[len(old) :] * 0.1])
                values[name] = (old + 0.02 * draw) if old is not None else 0.1 * draw + name.endswith("norm.weight")
                parameter.copy_(values[name])
        return values

    common = {"vocab_size": VOCABULARY, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
    llama = {**common, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_key_value_heads": 2}
    moe = {**llama, "num_hidden_layers": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    gpt2 = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    kinds: dict[str, Any] = {
        "": lambda **more: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**llama, **more})),
        "tied": lambda **more: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**llama, "tie_word_embeddings": True, **more})
        ),
        "moe": lambda **more: transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**moe, **more})),
        "gpt2": lambda **more: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**{**gpt2, "bos_token_id": 1, "eos_token_id": 2, **more})
        ),
    }
    for number, (kind, make) in enumerate(kinds.items()):
        model = make()
        base = fill(model, None, 100 * number)
        tuned = {"math": 1, "code": 2, "chat": 3} if not kind else {"math": 1}
        for name, seed in {"base": 0, **tuned}.items():
            if seed:
                fill(model, base, 100 * number + seed)
            label = kind if kind and not seed else f"{kind}-{name}" if kind else name
            model.to(torch.bfloat16).save_pretrained(folder / label)
            tokenizer(folder / label)
            model.float()
            if not kind:
                fill(model, base if seed else None, 100 * number + seed)
                model.save_pretrained(folder / f"{label}32")
                tokenizer(folder / f"{label}32")
        if not kind:
            more = make(vocab_size=VOCABULARY + 3)
            fill(more, base, 7)
            more.to(torch.bfloat16).save_pretrained(folder / "more")
            tokenizer(folder / "more", extra=3)
    _make_pickled(folder / "math", folder / "math-bin")
    for name, seed in (("lora", 11), ("lora2", 12)):
        _make_adapter(folder / name, seed)
    _make_gguf(folder / "math32", folder / "gguf" / "model.gguf")
    words = np.random.default_rng(5).integers(3, VOCABULARY, (400, 20))
    (folder / "text.txt").write_text("\n\n".join(" ".join(f"w{i}" for i in row) for row in words) + "\n")


def _make_pickled(source: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, target)
    torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()


def _make_adapter(target: Path, seed: int) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    generator = np.random.default_rng(seed)
    sizes = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 48)}
    factors = {}
    for layer in range(3):
        for module, (out, width) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            for side, shape in (("A", (2, width)), ("B", (out, 2))):
                draw = generator.standard_normal(shape, dtype=np.float32)
                factors[f"{stem}.lora_{side}.weight"] = torch.from_numpy(draw) * 0.1
    target.mkdir()
    save_file(factors, target / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
    settings |= {"target_modules": ["q_proj", "down_proj"], "base_model_name_or_path": "base"}
    (target / "adapter_config.json").write_text(json.dumps(settings))


def _make_gguf(source: Path, target: Path) -> None:
    """Write a Llama in llama.cpp's format, unquantized; its query and key rows are permuted as llama.cpp has them."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    target.parent.mkdir()
    writer = gguf.GGUFWriter(target, "llama")
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in load_file(source / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        layer = re.match(r"model\.layers\.(\d+)\.(.+)", stem)
        key = f"blk.{layer[1]}.{names[layer[2]]}.weight" if layer else f"{names[stem]}.weight"
        if key.endswith(("attn_q.weight", "attn_k.weight")):
            count = heads if "attn_q" in key else shared
            tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(key, np.ascontiguousarray(tensor.astype(np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def digests_of(folder: Path) -> Digests:
    """Return {file without folder and number of shard / tensor: dtype, shape and SHA-256 of its bytes, shortened}."""
    import torch
    from safetensors import safe_open

    digests = {}
    for file in sorted(folder.rglob("*.safetensors")):
        place = file.parent.relative_to(folder).as_posix()
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensor = opened.get_tensor(name).contiguous()
                data = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
                shape = "x".join(map(str, tensor.shape))
                kind = str(tensor.dtype).removeprefix("torch.")
                digest = hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]
                digests[f"{place}/{name}" if place != "." else name] = f"{kind} {shape} {digest}"
    return digests


def run_recipe(recipe: Recipe, folder: Path, out: Path) -> str | None:
    """Run a recipe's command; return None, or the end of what it printed where it failed."""
    shutil.rmtree(out, ignore_errors=True)
    for name, text in recipe.files.items():
        (folder / name).write_text(text.format(folder=folder))
    flags = [flag.format(folder=folder, out=out) for flag in recipe.flags]
    command = [recipe.script, *flags, "--save_path", str(out), "--device", "cpu", "--quiet"]
    log = out.with_suffix(".log")
    if recipe.ranks > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(recipe.ranks),
        ]
        with log.open("w") as stream:
            done = subprocess.run(
                [*launcher, *command], cwd=ROOT, env={**os.environ, **recipe.env}, stdout=stream, stderr=stream
            )
        return None if done.returncode == 0 else log.read_text()[-400:]
    child = os.fork()
    if child == 0:
        _run_here(recipe, command, log)
    _, status = os.waitpid(child, 0)
    return None if status == 0 else log.read_text()[-400:]


def _run_here(recipe: Recipe, command: Sequence[str], log: Path) -> None:
    """Run a script in this process, which was forked for it, and end the process."""
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.chdir(ROOT)
        os.environ.update(recipe.env)
        sys.argv, sys.path[0] = list(command), str(ROOT)
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def differences(before: dict[str, Digests], after: dict[str, Digests]) -> Iterator[str]:
    """Yield a line for each recipe or tensor that is not the same."""
    for name in before.keys() | after.keys():
        if name not in before or name not in after:
            yield f"{name}: only {'before' if name in before else 'after'}"
            continue
        for tensor in sorted(before[name].keys() | after[name].keys()):
            old, new = before[name].get(tensor, "missing"), after[name].get(tensor, "missing")
            if old != new:
                yield f"{name}: {tensor}: {old} before, {new} after"


def main(argv: Sequence[str]) -> int:
    """Run the matrix; print a digest per recipe, then what differs."""
    parser = Parser(prog="scripts/dev/same_bytes.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder of checkpoints and outputs, 30 MB, made anew"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="only recipes whose name matches (default: all)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the digests of all tensors to this file")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="name the tensors that differ from this file")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    import torch
    import transformers  # noqa: F401 - imported once, for all the processes that are forked

    torch.set_num_threads(1)
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        try:
            make_checkpoints(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        return 1
    chosen = [recipe for recipe in recipes() if re.search(args.only, recipe.name)]
    results: dict[str, Digests] = {}
    failed = 0
    for number, recipe in enumerate(chosen):
        out = folder / f"out-{number}"
        problem = run_recipe(recipe, folder, out)
        if problem is not None:
            failed += 1
            print(f"{recipe.name}: failed: {problem.strip()}", flush=True)
            continue
        results[recipe.name] = digests_of(out)
        whole = hashlib.sha256(json.dumps(results[recipe.name], sort_keys=True).encode()).hexdigest()
        print(f"{whole[:DIGEST_LENGTH]}  {len(results[recipe.name]):3d} tensors  {recipe.name}", flush=True)
        shutil.rmtree(out)
    if args.write:
        text = json.dumps(results, indent=0, separators=(",", ":"), sort_keys=True)
        args.write.write_text(text + "\n")
    lines: list[str] = []
    if args.compare:
        before = read_json_file(args.compare)
        selected = {name: before[name] for name in before if re.search(args.only, name)}
        lines = sorted(differences(selected, results))
        print("\n".join(lines) or f"All {len(results)} recipes have the same bytes.")
    return 1 if failed or lines else 0


if __name__ == "__main__":
    sys.exit(run(main))
