"""An importance file on the hub: its card, and the upload with every refusal as a sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from aim.calibration import HUB_SET
from aim.importance import Importance
from aim.summary import Summary
from aim.summary_text import described, kinds_table, layers_table, left_out, legend
from console.errors import FailureError, ProjectError, UsageError
from merging.card import TAGS, public_name
from merging.hub import CheckpointRef

REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PAPER = "https://arxiv.org/abs/2502.02421"


def card(importance: Importance, found: Summary, repo: str, file: str) -> str:
    """Return the README.md that goes with an importance file: base, data sets, how to use it, the summary."""
    base = CheckpointRef.parse(importance.base["name"])
    sets = [match["repo"] for name in _sources(importance.calibration) if (match := HUB_SET.fullmatch(name))]
    front = {
        **({"base_model": base.repo} if base.is_hub_id else {}),
        "tags": [*TAGS[1:], "importance", "calibration"],
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
        legend(found),
        kinds_table(found),
        *left_out(found),
        f"<details><summary>Every layer</summary>\n\n{layers_table(found)}\n\n</details>",
    ]
    return "\n\n".join(parts) + "\n"


def _sources(calibration: Mapping[str, Any]) -> list[str]:
    source = calibration.get("source", [])
    return [source] if isinstance(source, str) else list(source)


def check_push(repo: str) -> None:
    """Raise before anything is measured what the hub would refuse afterwards: a name that is none, no token."""
    from huggingface_hub import constants, get_token

    if not REPO.fullmatch(repo):
        raise UsageError(f"--push_to_hub must be ORG/NAME, found {repo!r}.")
    if constants.HF_HUB_OFFLINE:
        raise UsageError("--push_to_hub needs the hub, and HF_HUB_OFFLINE is set.")
    if not get_token():
        raise UsageError(f"--push_to_hub {repo} needs a token that may write: run `hf auth login`, or set HF_TOKEN.")


def push(file: Path, text: str, repo: str, private: bool) -> str:
    """Upload an importance file and its card in one commit, making the model repository; returns its address.

    Raises FailureError where the hub refuses or is not reached; the file here stands in any case.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise FailureError(
                f"{repo} exists and is public: make it private on the hub, give another name, or leave --private out. "
                "Nothing was uploaded."
            )
        operations = [
            CommitOperationAdd(file.name, str(file)),
            CommitOperationAdd("README.md", text.encode()),
        ]
        api.create_commit(repo, operations, commit_message="Importance for Activation-Informed Merging")
    except Exception as error:
        raise _explained(error, repo, file) from error
    return str(url)


def _explained(error: Exception, repo: str, file: Path) -> ProjectError:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, ProjectError):
        return error
    again = f"{file} is kept; the same command pushes it without measuring again."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return FailureError(f"The hub does not accept the token here (401): run `hf auth login`. {again}")
    if status == 403:
        return FailureError(
            f"The token here may not write to {repo} (403): take one with the right to write, and an organisation that "
            f"it belongs to. {again}"
        )
    said = " ".join(str(error).split())
    return FailureError(f"{repo} could not be pushed to the hub ({type(error).__name__}: {said}). {again}")
