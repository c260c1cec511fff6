"""Documents: tables equal the committed results, commands parse, links lead somewhere."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.cli import Parser
from merging.recipe import make_recipe, read_config
from merging.recipe.method_registry import all_methods

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "REPRODUCTION.md", "CONTRIBUTING.md", *PAGES]
LAUNCHERS = ("accelerate", "torchrun", "srun")
EXECUTED = ["docs/add_a_benchmark.md", "docs/add_a_method.md", "docs/add_a_statistic.md"]
"""Pages that tests/test_worked_examples.py executes."""
OTHER_PROGRAMS = ("python3", "cd", "git", "export", "pip", ".venv/bin/pip", ".venv/bin/pre-commit")
"""First words of commands that run none of this project's scripts."""
OTHER_MODULES = ("pytest", "pip", "venv")
"""What `python -m` runs in documents."""
TOOLS = (".venv/bin/ruff", ".venv/bin/mypy")


def blocks(name: str, *languages: str) -> list[str]:
    """Return the contents of a document's fenced blocks in any of `languages`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [
        body for tag, body in re.findall(r"^```(\S*).*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if tag in languages
    ]


def commands(name: str) -> Iterator[list[str]]:
    """Yield the words of each command of a document's shell blocks: lines joined, comments and assignments dropped."""
    for block in blocks(name, "bash", "sh"):
        for line in re.sub(r"^\w+=\$\(.*\)$", "", block.replace("\\\n", " "), flags=re.MULTILINE).splitlines():
            for part in re.split(r"\s&&\s", line):
                words = shlex.split(part, comments=True)
                while words and re.match(r"[A-Za-z_]\w*=", words[0]):
                    words = words[1:]
                if words:
                    yield words


def script_of(words: list[str]) -> tuple[Path, list[str]] | None:
    """Return the script of this project that a command runs, with its arguments; None for another program."""
    for i, word in enumerate(words):
        if re.fullmatch(r"(\./)?(scripts/(\w+/)*)?\w+\.(py|sh)", word):
            return ROOT / word, words[i + 1 :]
        if i == 0 and word not in ("python", ".venv/bin/python", *LAUNCHERS):
            return (ROOT / word, words[1:]) if word.startswith("scripts/") else None
    return None


def help_of(script: Path) -> str:
    """Return the help of a script."""
    command = [sys.executable, str(script), "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_tables_come_from_results() -> None:
    """Every generated table and figure equals what update_docs.py makes of the results; no placeholder is left."""
    for name in DOCUMENTS:
        assert not re.search(r"\b[A-Z]+_(TEXT|SECTION)\b", (ROOT / name).read_text(encoding="utf-8")), name
    done = subprocess.run(
        [sys.executable, "scripts/dev/update_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_quickstart_is_worth_looking_at() -> None:
    """The committed quickstart: each fine-tuned model above 80 % on its skill and above the base; task arithmetic and
    TIES of all three keep at least 60 % on each."""
    results = json.loads((ROOT / "results" / "quickstart.json").read_text())["results"]
    scores = {r["model"]: {name: score["value"] for name, score in r["scores"].items()} for r in results}
    for skill in ("addition", "strings", "brackets"):
        own, base = scores[skill][skill.title()], scores["base"][skill.title()]
        assert own > 80
        assert own > base + 10
    for method in ("task_arithmetic", "ties"):
        assert min(scores[f"{method}___addition-strings-brackets"].values()) >= 60


def parse_only(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Run a script until its command line is parsed; returns its exit code, 0 for arguments that it takes."""

    def stop_after(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
            parse(self, *args, **kwargs)
            raise SystemExit(0)

        return parse_args

    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        for kind in (argparse.ArgumentParser, Parser):
            patch.setattr(kind, "parse_args", stop_after(kind.parse_args))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name not in EXECUTED])
def test_commands_parse(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command of a document is taken by the parser of its script; programs of others are listed."""
    listed = list(commands(name))
    assert listed
    for words in listed:
        found = script_of(words)
        if found is None:
            module = words[2] if words[:2] in (["python", "-m"], [".venv/bin/python", "-m"]) else None
            assert words[0] in (*OTHER_PROGRAMS, *TOOLS) or module in OTHER_MODULES, words
            continue
        script, arguments = found
        assert script.is_file(), words
        if script.suffix == ".py":
            assert parse_only(script, arguments, monkeypatch) == 0, (words, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--methd", "ties"], ["--method", "ties", "--numerics", "float31"]])
def test_wrong_commands_do_not_parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown flag and an invalid choice are found by the check above."""
    assert parse_only(ROOT / "merge.py", arguments, monkeypatch) == 2


@pytest.mark.parametrize("name", DOCUMENTS)
def test_data_blocks_parse(name: str) -> None:
    """YAML and JSON in a document are valid."""
    for block in blocks(name, "yaml", "yml"):
        assert yaml.safe_load(block) is not None
    for block in blocks(name, "json"):
        json.loads(block)


def test_recipes_are_valid(tmp_path: Path) -> None:
    """Every recipe in docs/recipes.md is one that merge.py takes."""
    for block in blocks("docs/recipes.md", "yaml"):
        (tmp_path / "recipe.yml").write_text(block, encoding="utf-8")
        assert make_recipe({}, read_config(tmp_path / "recipe.yml")).method == "ties"


@pytest.mark.parametrize("name", PAGES)
def test_page_begins_with_a_command(name: str) -> None:
    """A page of docs/ has its title, then the command that most readers look for."""
    assert re.match(r"# [^\n]+\n\n```bash\n", (ROOT / name).read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    """Every relative link names a file that exists, and a heading of it where it has an anchor."""
    file = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


NAMED = re.compile(r"`((?:merging|aim|eval|common|configs|scripts|tests)/[\w/.]*)`")
"""A file or folder of the repository in a document."""


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name not in EXECUTED])
def test_named_files_exist(name: str) -> None:
    """Every file and folder of the code that a document names exists."""
    named = NAMED.findall((ROOT / name).read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists() and "NAME" not in path] == []


def test_types_of_the_architecture_exist() -> None:
    """Every type that docs/architecture.md names is a class of the code."""
    named = set(re.findall(r"`([A-Z]\w+[a-z])`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
    code = "\n".join(
        file.read_text(encoding="utf-8")
        for room in ("common", "merging", "aim")
        for file in (ROOT / room).rglob("*.py")
    )
    assert named
    assert {name for name in named if not re.search(rf"^class {name}\b", code, re.MULTILINE)} == set()


def test_readme_is_short_and_names_every_page() -> None:
    """README.md has at most 200 lines; each page of docs/ is linked from README.md, CONTRIBUTING.md or another page."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    assert len(texts["README.md"].splitlines()) <= 200
    for page in PAGES:
        file = Path(page).name
        others = (text for name, text in texts.items() if name != page)
        assert any(re.search(rf"\]\((docs/)?{re.escape(file)}(#[^)]*)?\)", text) for text in others), page


def test_no_paths_of_a_machine() -> None:
    """No committed text names a folder of somebody's machine."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files or DOCUMENTS:
        found = re.search(rb"/(root|home|Users)/\w", (ROOT / name).read_bytes())
        assert not found, (name, found)


def test_no_file_is_large() -> None:
    """Nothing over 1 MB is committed, no figure over 100 KB in docs/figures."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert all((ROOT / name).stat().st_size < 1_000_000 for name in files)
    assert all(file.stat().st_size < 100_000 for file in (ROOT / "docs" / "figures").iterdir())


def test_original_commands_are_in_the_readme() -> None:
    """The three commands of the original README stand in ours as they were printed there."""
    text = (ROOT / "README.md").read_text()
    trio = "WizardLMTeam/WizardLM-13B-V1.2,vanillaOVO/WizardMath-13B-V1.0,layoric/llama-2-13b-code-alpaca"
    for command in (
        f"python merge.py --method dare_ties --base_model unsloth/llama-2-13b --models_to_merge {trio} "
        "--save_path ./DARE_TIES_InstructMathCode",
        "python evaluate_model.py --model ./DARE_TIES_InstructMathCode",
        "python performAIM.py --merged_model ./DARE_TIES_InstructMathCode --pretrained_model_name unsloth/llama-2-13b "
        "--omega 0.4 --save_path ./DARE_TIES_AIM_InstructMathCode",
    ):
        assert command in text
    assert "./scripts/test.sh" in text
    assert importlib.util.find_spec("mergekit"), "the parity tests need mergekit (requirements-dev.txt)"


@pytest.mark.parametrize("script", ["merge.py", "performAIM.py", "evaluate_model.py"])
def test_every_flag_is_documented(script: str) -> None:
    """Each flag in a script's --help is named in README.md or in a page of docs/."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", *PAGES))
    flags = set(re.findall(r"^ +(--[a-z]\w*)", help_of(ROOT / script), re.MULTILINE)) - {"--help"}
    if script == "merge.py":
        flags |= {f"--{parameter}" for method in all_methods().values() for parameter in method.parameters}
    assert len(flags) > 30
    assert [flag for flag in sorted(flags) if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)] == []
