"""An importance file on the hub: its card, and the upload with every refusal as a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from aim.calibration.config import HUB_SET
from aim.importance import Importance
from aim.report.summary import Summary
from aim.report.text import described, kinds_table, layers_table, left_out, legend
from common.files.json_values import JsonValue
from merging.checkpoints.hub import CheckpointRef
from merging.output.hub_upload import explained, make_repo
from merging.output.records.card import AIM_TAG, public_name

PAPER = "https://arxiv.org/abs/2502.02421"


def card(importance: Importance, summary: Summary, repo: str, file: str) -> str:
    """Return the README.md that goes with an importance file: base, data sets, how to use it, the summary."""
    base = CheckpointRef.parse(importance.base["name"])
    sets = [match["repo"] for name in _sources(importance.calibration) if (match := HUB_SET.fullmatch(name))]
    front = {
        **({"base_model": base.repo} if base.is_hub_id else {}),
        "tags": [AIM_TAG, "importance", "calibration"],
        **({"datasets": sets} if sets else {}),
    }
    name = public_name(importance.base["name"])
    numerics = " --numerics reference" if importance.numerics == "reference" else ""
    use = [
        f"hf download {repo} {file} --local-dir .",
        f"python performAIM.py --merged_model MERGED --pretrained_model_name {name} --omega 0.4 --save_path OUT "
        f"--importance {file}{numerics}",
        f"python merge.py --method ties --base_model {name} --models_to_merge A,B,C --omega 0.4 --save_path OUT "
        f"--importance {file}{numerics}",
    ]
    versions = ", ".join(f"{package} {version}" for package, version in importance.versions.items())
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# Importance of {name}",
        f"Mean absolute activation of every input channel of {name}, for Activation-Informed Merging ({PAPER}): it "
        "relaxes any merge of models fine-tuned from this base, at any omega, without running the base again. It "
        "belongs to these very weights; for others it is refused.",
        "## How to use it",
        "```bash\n" + "\n".join(use) + "\n```",
        "## What it was measured on",
        described(importance).replace("\n  ", "\n- "),
        *([f"Versions: {versions}."] if versions else []),
        "## Summary",
        legend(summary),
        kinds_table(summary),
        *left_out(summary),
        f"<details><summary>Every layer</summary>\n\n{layers_table(summary)}\n\n</details>",
    ]
    return "\n\n".join(parts) + "\n"


def _sources(calibration: Mapping[str, JsonValue]) -> list[str]:
    source = calibration.get("source", [])
    return [source] if isinstance(source, str) else list(source)


def push(file: Path, text: str, repo: str, private: bool) -> str:
    """Upload an importance file and its card in one commit, making the model repository; returns its address.

    Raises FailureError where the hub refuses or is not reached; the file here stands in any case.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        url = make_repo(api, repo, private)
        operations = [
            CommitOperationAdd(file.name, str(file)),
            CommitOperationAdd("README.md", text.encode()),
        ]
        api.create_commit(repo, operations, commit_message="Importance for Activation-Informed Merging")
    except Exception as error:
        again = f"{file} is kept; the same command pushes it without measuring again."
        raise explained(error, repo, again) from error
    return url
