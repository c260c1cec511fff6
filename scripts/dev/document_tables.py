"""Generated parts of the documents that no other script prints: methods, their parameters, and the README's results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from eval.results.reader import load
from eval.results.result import read_json_file
from eval.results.rows import Models
from eval.stats.comparison import compare
from eval.stats.gains import Measure, all_gains
from merging.recipe.method_registry import MergeMethod, Parameter, all_methods
from scripts.experiments.document_tables import MERGE, OMEGA
from scripts.experiments.paired import ALL, differences
from scripts.experiments.results import read_rows

BASE = {"required": "required", "optional": "optional", "template": "tokenizer and config"}
SAMPLED_TEXTS = 64
"""Calibration texts of the README's row on their number."""
LONG_LINE = 120
"""Longer lines of a program's output are notes and paths, which a document leaves out."""


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def methods(_: Path) -> str:
    """Return the table of merge methods from configs/methods/."""
    rows = [
        [f"`{method.name}`", method.summary, BASE[method.base], f"[{_paper_name(method)}]({method.paper})"]
        for method in all_methods().values()
    ]
    return markdown(["`--method`", "result", "base", "source"], rows)


def _paper_name(method: MergeMethod) -> str:
    """Return the arXiv number of a method's paper, or the site of another source."""
    host, _, path = method.paper.removeprefix("https://").partition("/")
    return (
        path.rpartition("/")[2] if host == "arxiv.org" else path.split("/")[0] if host == "huggingface.co" else "code"
    )


def parameters(_: Path) -> str:
    """Return the table of all methods' parameters, those of one meaning and default in one row."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for method in all_methods().values():
        for parameter in method.parameters.values():
            key = (_flag(parameter), parameter.help, _default(parameter))
            groups.setdefault(key, []).append(method.name)
    rows = [[f"`{flag}`", ", ".join(names), text, default] for (flag, text, default), names in sorted(groups.items())]
    return markdown(["flag", "methods", "meaning", "default"], rows)


def _flag(parameter: Parameter) -> str:
    """Return a parameter as it is written on the command line."""
    if parameter.type == "bool":
        return f"--{parameter.name}"
    value = "|".join(parameter.choices) or ("X" if parameter.per_model else "N")
    return f"--{parameter.name} {value}"


def _default(parameter: Parameter) -> str:
    if parameter.default is None:
        return "required"
    return str(parameter.default).lower() if isinstance(parameter.default, bool) else str(parameter.default)


def output(file: Path) -> str:
    """Return a program's output as a code block, without its main headings, rules, blank lines and long notes."""
    lines = file.read_text(encoding="utf-8").splitlines()
    short_lines = [line for line in lines if line and not line.startswith(("## ", "| --")) and len(line) <= LONG_LINE]
    return "\n".join(["```text", *short_lines, "```"])


def results(folder: Path) -> str:
    """Return the six rows of results in the README, from the files of results/."""
    rows = [
        _published(folder), _controls(folder), _real_model(folder),
        _samples(folder), _speed(folder), _calibration(folder),
    ]  # fmt: skip
    return markdown(["question", "measured", "details"], rows)


def gain_pairs(models: Models, population: str = "merged") -> Iterator[tuple[str, float, float]]:
    """Yield the method, the HV gain of a merge, and that of its first relaxation."""
    gains = all_gains(models, Measure(population=population), lambda _: None).values
    for family in models.families:
        if (
            family.unrelaxed is not None
            and family.relaxed
            and {family.unrelaxed.key, family.relaxed[0].key} <= gains.keys()
        ):
            yield family.method, gains[family.unrelaxed.key], gains[family.relaxed[0].key]


def _raised(pairs: list[tuple[str, float, float]]) -> str:
    raised, lowered = (sum(sign * (after - before) > 0 for _, before, after in pairs) for sign in (1, -1))
    return f"HV gain rises for {raised} of {len(pairs)} merges and falls for {lowered}"


def _published(folder: Path) -> list[str]:
    models = load([folder.parent / "configs" / "paper_results.json"], {}, lambda _: None)
    pairs = list(gain_pairs(models, "paper"))
    return [
        "Does AIM help in the published tables (Llama 2 13B)?",
        f"{_raised(pairs)}, from the published scores, not run again",
        "[Reproduction](REPRODUCTION.md#hypervolume-gain)",
    ]


def _controls(folder: Path) -> list[str]:
    pairs = {
        pair.what: pair
        for pair in differences(read_rows(folder / "controls.json"))
        if (pair.method, pair.omega, pair.quantity) == (ALL, OMEGA, "mean")
    }
    lead = pairs["AIM minus uniform"]
    return [
        "Is AIM more than a shrinkage of the task vectors?",
        f"by {lead.value:.1f} points ({lead.low:.1f} to {lead.high:.1f}) of {pairs[MERGE].value:.1f} that it adds to a "
        f"merge of tiny models; a uniform factor adds {pairs['uniform minus merge'].value:.1f} ({lead.replicates} "
        "families)",
        "[Reproduction](REPRODUCTION.md#is-aim-more-than-a-shrinkage-of-the-task-vectors)",
    ]


def _samples(folder: Path) -> list[str]:
    rows = read_json_file(folder / "importance_samples.json")["rows"]
    docstrings = next(row for row in rows if row["source"] == row["against"] and row["texts"] == SAMPLED_TEXTS)
    others = [row["max"]["median"] for row in rows if row["source"] != row["against"]]
    return [
        f"Are {SAMPLED_TEXTS} calibration texts enough, and does other text do (SmolLM2-135M)?",
        f"importance changes by {docstrings['max']['median']:.1%} in the median against other docstrings, by "
        f"{min(others):.0%} to {max(others):.0%} with another kind of text",
        "[Reproduction](REPRODUCTION.md#how-many-calibration-texts-are-enough-and-does-other-text-do)",
    ]


def _real_model(folder: Path) -> list[str]:
    models = load([folder / "real_model_samples.json"], {}, lambda _: None)
    family = next(family for family in models.families if family.unrelaxed is not None and family.relaxed)
    assert family.unrelaxed is not None
    comparison = compare(family.unrelaxed.result, family.relaxed[0].result)
    significant = [d.column for d in comparison.differences if d.is_significant]
    verdict = f"significant: {', '.join(significant)}" if significant else "no benchmark changes significantly"
    counts = [d.n for d in comparison.differences]
    return [
        "Does AIM help TIES of a real small model (SmolLM2-135M)?",
        f"{verdict} (samples of {min(counts)} to {max(counts)} items)",
        "[Reproduction](REPRODUCTION.md#a-real-small-model)",
    ]


def _speed(folder: Path) -> list[str]:
    work = read_json_file(folder / "performance.json")["work"]
    share = {name: costs["ours"]["wall"] / costs["peer"]["wall"] for name, costs in work.items() if costs.get("peer")}
    least, most = (pick(share, key=lambda name: share[name]) for pick in (min, max))
    return [
        "How fast is a merge of three 1.1B models on 2 cores?",
        f"{share[least]:.2f} ({least}) to {share[most]:.2f} ({most}) of the time of mergekit 0.1.5 or the original",
        "[Performance](docs/performance.md)",
    ]


def _calibration(folder: Path) -> list[str]:
    gpu_report = read_json_file(folder / "gpu.json")
    ways = gpu_report["calibration"]["ways"]
    rate, original = (ways[name]["tokens_per_second"] for name in ("ours", "one block at a time"))
    return [
        "How fast is the calibration of a 13B on one H100?",
        f"{rate:,.0f} tokens/s, {rate / original:.1f} times the original program's loop",
        "[Performance](docs/performance.md#gpu)",
    ]
