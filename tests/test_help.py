"""Help of every script: groups, defaults that the program prints, plain text."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from merging.recipe.flags import make_parser
from merging.recipe.method_registry import all_methods
from tests.conftest import ROOT

SCRIPTS = [
    str(file.relative_to(ROOT))
    for file in (*sorted(ROOT.glob("*.py")), *sorted((ROOT / "scripts").rglob("*.py")))
    if "add_output_flags(" in file.read_text() or file.name == "evaluate_model.py"
]
MOST_FLAGS = 12
"""Flags below one heading, --help, --quiet and --debug aside."""
GENERAL = {"--help", "--quiet", "--debug"}


def help_of(script: str, *words: str) -> str:
    """Return what a script prints for --help, in wide lines."""
    done = subprocess.run(
        [sys.executable, script, *words, "--help"], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "400", "HOME": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def groups_of(text: str) -> Mapping[str, Mapping[str, tuple[str, str]]]:
    """Return {heading: {flag: its spelling with the value, its text}} of a help."""
    groups: dict[str, dict[str, tuple[str, str]]] = {}
    heading, flag = "", ""
    for line in text.splitlines():
        if re.match(r"[\w`(].*:$", line):
            heading, flag = line.removesuffix(":"), ""
        elif found := re.match(r"  (?:-\w, )?(--\w+)", line):
            flag = found[1]
            spelling, _, told = re.sub(r"  +", "  ", line.strip()).partition("  ")
            groups.setdefault(heading, {})[flag] = (spelling, told)
        elif flag and line.startswith(" " * 8):
            spelling, told = groups[heading][flag]
            groups[heading][flag] = (spelling, f"{told} {line.strip()}".strip())
    return groups


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_grouped_and_has_the_defaults(script: str) -> None:
    """A heading has few flags; a flag with a value states its default or that it is required; no path of this machine
    and no fragment such as "of the weights" stands in a text."""
    text = help_of(script)
    assert str(ROOT) not in text
    groups = groups_of(text)
    assert "--debug" in groups["general" if len(groups) > 1 else "options"]
    if len(groups) > 1:
        assert set(groups["general"]) == GENERAL
    for heading, flags in groups.items():
        assert len(flags.keys() - GENERAL) <= MOST_FLAGS, heading
        for flag, (spelling, told) in flags.items():
            assert re.match(r"(?!(?:of|for|as|to|some|which|where|what)\b)\S", told), (flag, told)
            if " " in spelling.removeprefix("-h, ") and "--no-" not in spelling:
                assert len(re.findall(r"\((?:default: |required)", told)) == 1, (flag, told)


def test_general_help_of_merge_has_no_parameters() -> None:
    """The general help lists every method with its summary, and a parameter of none: those differ between methods."""
    text = help_of("merge.py")
    listed = {flag.removeprefix("--") for flags in groups_of(text).values() for flag in flags}
    assert not listed & {name for method in all_methods().values() for name in method.parameters}
    for method in all_methods().values():
        assert re.search(rf"^  {method.name} +{re.escape(method.summary)}$", text, re.MULTILINE)


@pytest.mark.parametrize("name", list(all_methods()))
def test_help_of_a_method_is_its_yaml(name: str) -> None:
    """`--method NAME --help` lists the parameters of the YAML and no others, with its text, default and source."""
    schema = yaml.safe_load((ROOT / "configs" / "methods" / f"{name}.yaml").read_text())
    groups = groups_of(help_of("merge.py", "--method", name))
    listed = groups.get(f"parameters of {name}", {})
    assert [flag.removeprefix("--") for flag in listed] == list(schema["parameters"])
    assert set(groups) <= {f"parameters of {name}"}
    for key, spec in schema["parameters"].items():
        _, told = listed[f"--{key}"]
        assert told.startswith(f"{spec['help']} (")
        assert told.endswith(f"{spec['source']})")
        if spec["default"] is not None:
            value = ("no", "yes")[spec["default"]] if spec["type"] == "bool" else spec["default"]
            assert f"(default: {value}; source: " in told


def test_stated_defaults_are_the_effective_ones() -> None:
    """The defaults that merge.py states are those of a merge without the flags."""
    recipe, output = make_recipe({"method": "linear", "models_to_merge": "a,b"}, {}), OutputConfig(Path())
    effective = {
        "--dtype": recipe.dtype, "--numerics": recipe.numerics, "--seed": recipe.seed, "--tokenizer": recipe.tokenizer,
        "--chat_template": recipe.chat_template, "--max_shard_size": output.max_shard_size, "--device": output.device,
        "--save_as": output.save_as, "--load_check": "yes" if output.load_check else "no",
    }  # fmt: skip
    helps = {flag: action.help or "" for action in make_parser()._actions for flag in action.option_strings}
    for flag, value in effective.items():
        assert re.search(rf"\(default: {re.escape(str(value))}[;)]", helps[flag]), flag


def test_help_of_a_script_without_flags() -> None:
    """A script that has only positional arguments names them."""
    assert "peer" in help_of("scripts/benchmarks/bench_peers.py")
