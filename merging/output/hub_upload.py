"""Upload of finished results to the hub: the checks before a run, and one commit for each folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import FailureError, ProjectError, UsageError
from common.files.json_values import JsonObject
from merging.output.records.lock import LOCK_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Push:
    """Destination of uploads: `repo` is ORG/NAME, `private` applies to new repositories."""

    repo: str
    private: bool = False

    @classmethod
    def of(cls, repo: object, private: object, dry_run: bool = False) -> Push | None:
        """Return what --push_to_hub and --private ask for; None where nothing is pushed.

        dry_run: whether the name alone is checked. Raises UsageError for a name that is none, --private alone, no
        token, or a run that is offline.
        """
        if repo is None:
            if private:
                raise UsageError("--private goes with --push_to_hub.")
            return None
        check_push(str(repo), name_only=dry_run)
        return cls(str(repo), bool(private))

    def targets(self, results: Sequence[Path]) -> list[tuple[Path, str]]:
        """Return each result with its repository: ORG/NAME for one, ORG/NAME-FOLDER for each of several omegas."""
        if len(results) == 1:
            return [(results[0], self.repo)]
        return [(result, f"{self.repo}-{result.name}") for result in results]


def check_push(repo: str, name_only: bool = False) -> None:
    """Raise UsageError before a run for what the hub would refuse afterwards: a name that is none, no token."""
    from huggingface_hub import constants, get_token

    if not REPO.fullmatch(repo):
        raise UsageError(f"--push_to_hub must be ORG/NAME, found {repo!r}.")
    if name_only:
        return
    if constants.HF_HUB_OFFLINE:
        raise UsageError("--push_to_hub needs the hub, and HF_HUB_OFFLINE is set.")
    if not get_token():
        raise UsageError(f"--push_to_hub {repo} needs a token that may write: run `hf auth login`, or set HF_TOKEN.")


def take_push(flags: JsonObject, config: JsonObject, dry_run: bool) -> Push | None:
    """Remove --push_to_hub and --private from flags and YAML and return the upload that they define.

    Args:
        flags: The flags, which override the YAML.
        config: Content of the YAML.
        dry_run: Check only the name.

    Raises:
        UsageError: As `Push.of`.
    """
    repo, private = (flags.pop(key, config.pop(key, None)) for key in ("push_to_hub", "private"))
    return Push.of(repo, private, dry_run) if repo is not None or private else None


def results_in(folder: Path) -> list[Path]:
    """Return the finished results of a run: the folder itself, or its folders where it made several."""
    if (folder / LOCK_FILE).is_file():
        return [folder]
    return sorted(file.parent for file in folder.glob(f"*/{LOCK_FILE}"))


def push_results(folder: Path, push: Push) -> list[str]:
    """Upload every result of a run in one commit each, making the repositories, and return their addresses.

    Raises FailureError where the hub refuses or is not reached; the results here are kept in any case, and the
    sentence has the command that uploads what is left.
    """
    targets = push.targets(results_in(folder))
    urls = []
    for i, (result, repo) in enumerate(targets):
        try:
            urls.append(_push(result, repo, push.private))
        except Exception as error:
            commands = "; ".join(_command(*target, push.private) for target in targets[i:])
            raise explained(error, repo, f"The result is kept in {folder}; upload it by `{commands}`.") from error
    return urls


def _push(result: Path, repo: str, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    url = make_repo(api, repo, private)
    api.upload_folder(
        repo_id=repo,
        folder_path=result,
        ignore_patterns=[".*"],
        commit_message="Upload the result of a merge",
    )
    return url


def make_repo(api: HfApi, repo: str, private: bool) -> str:
    """Make a model repository where there is none and return its address.

    Raises FailureError where it exists, is public, and `private` is asked for.
    """
    url = api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise FailureError(
            f"{repo} exists and is public: make it private on the hub, give another name, or leave --private out. "
            "Nothing was uploaded."
        )
    return str(url)


def _command(result: Path, repo: str, private: bool) -> str:
    return f"hf upload {repo} {result}{' --private' if private else ''}"


def explained(error: Exception, repo: str, again: str) -> ProjectError:
    """Return the sentence for a push that failed. again: what is kept, and how the push is repeated."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, ProjectError):
        return FailureError(f"{error} {again}")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return FailureError(f"The hub does not accept the token here (401): run `hf auth login`. {again}")
    if status == 403:
        return FailureError(
            f"The token here may not write to {repo} (403): take one with the right to write, and an organization that "
            f"it belongs to. {again}"
        )
    reason = " ".join(str(error).split())
    return FailureError(f"{repo} could not be pushed to the hub ({type(error).__name__}: {reason}). {again}")
