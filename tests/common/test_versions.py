"""Version and commit of the project: one place, and in everything that a run writes."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from common import versions as module
from common.versions import EVALUATION, MERGING, UNKNOWN, VERSION, commit_of, package_versions, project_line, versions
from merging.output.records.run_record import RECORD
from tests.conftest import ROOT


def git(folder: Path, *words: str) -> str:
    """Run git in a folder as somebody, and return its output."""
    who = ["-c", "user.name=N", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path):
    """A repository of one commit."""
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit_of.cache_clear()
    yield tmp_path
    commit_of.cache_clear()


def test_commit_of_a_checkout(checkout: Path) -> None:
    """The commit is git's, in full, also where a tag names it; a changed tracked file marks it, a new file does not."""
    head = git(checkout, "rev-parse", "HEAD")
    git(checkout, "tag", "v9")
    (checkout / "new.txt").write_text("x")
    assert commit_of(checkout) == head
    commit_of.cache_clear()
    (checkout / "a.py").write_text("2\n")
    assert commit_of(checkout) == f"{head}-dirty"


def test_commit_is_of_this_folder(checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    """Variables that git hooks set do not lead to another repository, and a folder inside a foreign one has none."""
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert commit_of(checkout) == git_head(checkout)
    (checkout / "inner").mkdir()
    assert commit_of(checkout / "inner") is None


def git_head(folder: Path) -> str:
    """Return the commit of a folder by its files alone."""
    ref = (folder / ".git" / "HEAD").read_text().strip().removeprefix("ref: ")
    return (folder / ".git" / ref).read_text().strip()


def test_without_git(checkout: Path, monkeypatch) -> None:
    """A checkout whose git is missing has the commit "unknown", which is recorded."""
    monkeypatch.setenv("PATH", str(checkout))
    assert commit_of(checkout) == UNKNOWN
    monkeypatch.setattr(module, "ROOT", checkout)
    assert versions(MERGING)["commit"] == UNKNOWN
    assert "commit" not in package_versions(MERGING)
    assert project_line() == f"activation-informed-merging {VERSION}, commit {UNKNOWN}"


def test_one_version() -> None:
    """pyproject.toml does not repeat the version of common/versions.py, and CHANGELOG.md has it as the newest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert "version" in project["project"]["dynamic"]
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    released = [heading for heading in headings if heading != "## [Unreleased]"]
    assert released[0].startswith(f"## [{VERSION}] - 20")
    assert package_versions(EVALUATION)["lm_eval"]


def test_everything_written_has_version_and_commit(family, tmp_path: Path, run_script) -> None:
    """Lock, run record and model card of a merge and of a relaxation, and the importance file, have both."""
    merged, relaxed, importance = tmp_path / "merged", tmp_path / "relaxed", tmp_path / "importance"
    done = run_script(
        "merge.py", "--method", "task_arithmetic", "--base_model", family["base"], "--models_to_merge",
        f"{family['a']},{family['b']}", "--save_path", merged,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run_script(
        "performAIM.py", "--merged_model", merged, "--pretrained_model_name", family["base"], "--save_path", relaxed,
        "--calibration", family["text"], "--block_size", "64", "--importance", importance,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = versions(MERGING)
    assert expected["project"] == VERSION
    for folder in (merged, relaxed):
        for name in ("merge.lock.json", RECORD):
            assert json.loads((folder / name).read_text())["versions"] == expected
        assert f"Made by {project_line()}." in (folder / "README.md").read_text()
    done = run_script("scripts/importance.py", "--importance", importance, "--json")
    assert json.loads(done.stdout)["versions"] == expected
