"""Scenarios of scripts/dev/torture.py: runs of the scripts on tiny checkpoints, and the files that each must leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

VARYING = ("run_record.json",)
"""Files of a result that hold the time of the run."""
WORDS = 96


@dataclass(frozen=True)
class Scenario:
    """One run.

    name: for the table; script: the module whose main runs; flags: with {inputs} and {out}; prepare: puts what is there
    before the run into the output's folder; ranks: processes.
    """

    name: str
    script: str
    flags: tuple[str, ...]
    prepare: Callable[[Path, Path], None] = lambda inputs, out: None
    ranks: int = 1

    def arguments(self, inputs: Path, out: Path) -> list[str]:
        """Return the command line."""
        return [flag.format(inputs=inputs, out=out) for flag in self.flags]


def make_inputs(folder: Path) -> None:
    """Make a base, two fine-tuned models, two adapters and calibration text."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, **{f"w{i}": i for i in range(1, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    for name in ("base", "a", "b"):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    for seed, name in enumerate(("adapter_a", "adapter_b")):
        _make_adapter(folder / name, seed, folder / "base")
    lines = [" ".join(f"w{1 + (i * 7 + j * j) % (WORDS - 1)}" for j in range(24)) for i in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def _make_adapter(folder: Path, seed: int, base: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
              "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
        tensors |= {f"{name}_A.weight": torch.randn(2, 16), f"{name}_B.weight": torch.randn(16, 2)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _copy_earlier(inputs: Path, out: Path) -> None:
    shutil.copytree(inputs / "earlier", out / "out")


MODELS = ("--base_model", "{inputs}/base", "--models_to_merge", "{inputs}/a,{inputs}/b", "--method", "task_arithmetic")
OUT = ("--save_path", "{out}/out", "--no-load_check", "--max_shard_size", "8KB")
RELAX = ("--merged_model", "{inputs}/a", "--pretrained_model_name", "{inputs}/base", *OUT)
TEXT = ("--calibration", "{inputs}/text.jsonl", "--n_samples", "8", "--block_size", "24", "--batch_size", "2")
EARLIER = ("--base_model", "{inputs}/base", "--models_to_merge", "{inputs}/a,{inputs}/b", "--method", "ties", *OUT)
ADAPTERS = ("--save_as", "adapter", "--method", "task_arithmetic", "--base_model", "{inputs}/base", "--models_to_merge",
            "{inputs}/base+{inputs}/adapter_a,{inputs}/base+{inputs}/adapter_b", "--save_path", "{out}/out",
            "--no-load_check")  # fmt: skip
SCENARIOS = (
    Scenario("merge", "merge", (*MODELS, *OUT)),
    Scenario("overwrite", "merge", (*MODELS, *OUT, "--overwrite"), _copy_earlier),
    Scenario("sweep", "merge", (*MODELS, *OUT, "--omega", "0.2,0.6", "--importance", "{inputs}/importance")),
    Scenario("relaxation", "performAIM", (*RELAX, "--importance", "{inputs}/importance")),
    Scenario("calibration", "performAIM", (*RELAX, *TEXT, "--importance", "{out}/importance")),
    Scenario(
        "layerwise calibration", "performAIM",
        (*RELAX, *TEXT, "--calibration_mode", "layerwise", "--hidden_states", "disk",
         "--importance", "{out}/importance"),
    ),
    Scenario("adapters", "merge", ADAPTERS),
    Scenario("two ranks", "merge", (*MODELS, *OUT), ranks=2),
    Scenario("evaluation", "scripts.dev.torture_scenarios", ("{out}/results",)),
)  # fmt: skip


def evaluate(argv: list[str]) -> int:
    """Write the answers and the results of an evaluation as eval does, without a model: known answers are not asked."""
    from dataclasses import replace

    from eval.harness.journal import Journal
    from eval.request_types import Request
    from eval.results.result import EvalResult, Lineage, Score
    from eval.results.store import model_folder, save

    folder = Path(argv[0])
    request = Request("", "task", 0, 0, "generate", "context")
    with Journal(model_folder(folder, "model")) as journal:
        journal.begin({"model": "model"})
        for i in range(6):
            if f"key{i}" not in journal.answers:
                journal.add(replace(request, key=f"key{i}", item=i), f"answer {i}", "task", 0.0)
        answers = dict(sorted(journal.answers.items()))
    result = EvalResult("model", {"task": Score("acc", float(len(answers)), n=len(answers))}, Lineage())
    save(result, {"task": [{"key": key, "answer": answer} for key, answer in answers.items()]}, folder)
    return 0


main = evaluate


def content(out: Path) -> dict[str, bytes]:
    """Return the files of a finished run that another run must repeat byte for byte; of results, what they hold."""
    digests = {}
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if not file.is_file() or file.name in VARYING or file.name.startswith("precious"):
            continue
        if file.name.startswith("results_"):
            name, data = "results", json.dumps(json.loads(file.read_bytes())["aim"]["scores"]).encode()
        elif file.name.startswith("samples_"):
            name, data = "samples", file.read_bytes()
        elif file.name.startswith("generations"):
            name, data = "answers", _answers(file)
        else:
            data = file.read_bytes()
        digests[name] = data
    return digests


def _answers(file: Path) -> bytes:
    """Return the answers in a journal, whose last line of each run may be cut."""
    answers = {}
    for line in file.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "key" in entry:
            answers[entry["key"]] = entry["answer"]
    return json.dumps(sorted(answers.items())).encode()
