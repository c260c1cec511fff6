"""The closing line of a run: how its result is loaded, served, uploaded and converted."""

from __future__ import annotations

import shlex
from pathlib import Path

from common.files.paths import read_json
from common.logging import logger
from merging.output.hub_upload import Push, push_results, results_in
from merging.plan.merge_plan import OutputConfig


def finish(folder: Path, output: OutputConfig, push: Push | None) -> None:
    """Upload a run's results where that is asked for, and print the closing line; on rank 0 only.

    Raises FailureError where the upload fails; the results are kept.
    """
    if not output.process_group.is_main:
        return
    for url in push_results(folder, push) if push else ():
        logger.info(f"Pushed to {url}.")
    logger.info(next_steps(folder, output.save_as, pushed=push is not None))


def next_steps(folder: Path, save_as: str, pushed: bool = False) -> str:
    """Return one line of commands for the result in a folder (the first of several).

    Args:
        folder: of the run's result or results.
        save_as: "model" or "adapter".
        pushed: whether it was uploaded already.
    """
    results = results_in(folder) or [folder]
    place = shlex.quote(str(results[0]))
    steps = _of_adapter(place) if save_as == "adapter" else _of_model(results[0], place)
    if not pushed:
        steps.append(f"`hf upload ORG/NAME {place}`")
    several = f" (each of {len(results)} folders)" if len(results) > 1 else ""
    return f"Next{several}: {', '.join(steps)}."


def _of_model(result: Path, place: str) -> list[str]:
    config = result / "config.json"
    architecture = ((read_json(config, "").get("architectures") if config.is_file() else None) or ["AutoModel"])[0]
    generates = architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    loader = "AutoModelForCausalLM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else architecture
    steps = [f"`{loader}.from_pretrained('{result}')` in transformers"]
    if generates:
        steps += [f"`vllm serve {place}`", f"`python convert_hf_to_gguf.py {place}` of llama.cpp"]
    return steps


def _of_adapter(place: str) -> list[str]:
    return [
        f"`PeftModel.from_pretrained(base, {place!r})` in PEFT",
        f"`vllm serve BASE --enable-lora --lora-modules merged={place}`",
        f"`python convert_lora_to_gguf.py {place}` of llama.cpp",
    ]
