"""Evaluation conditions: the settings and versions that a score depends on, and where two results differ in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from eval.benchmarks import LM_EVAL, MATHS, MMLU_PRO
from eval.outcomes import Outcomes
from eval.results.result import EvalResult

if TYPE_CHECKING:
    from common.files.json_values import JsonValue

GENERATION = ("gen_kwargs", "max_gen_toks", "n_samples", "temperature", "think_end_token", "enable_thinking")
"""Settings of a run that change generated answers. Those that are part of `model_args` are found there."""
SHARED = (
    *("preset", "backend", "dtype_used", "apply_chat_template", "chat_template_args", "system_instruction"),
    *("add_bos_token", *GENERATION),
)
"""Settings of a run that change questions or answers; scores under other ones do not compare."""
LIKELIHOOD_COLUMNS = frozenset(("MMLU",))
"""Columns without generated answers."""
MATHS_ONLY = ("math_prompt_type", "math_max_tokens")
"""Settings that change questions or answers of MATH and GSM8K alone."""
BY_BENCHMARK = {"limits": "limit", "num_fewshot": "num_fewshot"}
"""Settings with a value for each benchmark -> the flag."""
EVERY = ""
"""The name in these of benchmarks without a value of their own."""
OF_MODEL = ("max_length", "model_args", "seed")
"""Settings that may differ between models whose scores compare, not between two results of one row."""
UNSCORED = (
    *("benchmarks", "math_benchmarks", "mmlu_pro", "base_url", "device", "n_gpu", "data_parallel", "dtype"),
    *("max_model_len", "batch_size", "data_dir", "offline", "include_path", "allow_code_execution"),
    *("no_cache", "quiet", "debug", "sandbox"),
)
"""Settings that do not change a score, or that another recorded value stands for (dtype: dtype_used)."""
RECORDED = (*SHARED, *MATHS_ONLY, *BY_BENCHMARK, "limit", *OF_MODEL, "prompts_sha256", "data")
"""Settings that a collection of results keeps."""
VERSIONS = ("lm_eval", "transformers", "tokenizers", "torch", "datasets", "vllm", "math_verify", "project", "commit")
"""Packages whose version may change a score."""
MATHS_COLUMNS = frozenset(benchmark.column for benchmark in MATHS["paper"].values())
_NAMES = {b.column: name for name, b in (*LM_EVAL.items(), *MATHS["paper"].items(), (MMLU_PRO.name, MMLU_PRO))}
Differences = dict[str, tuple[object, object]]
"""Condition -> its values in the two results."""


def run_differences(a: EvalResult, b: EvalResult) -> Differences:
    """Conditions that one command cannot have given to both results; results that differ in one are not joined.

    A limit or number of shots for one benchmark (`--limit mmlu=10`) counts where both results have that benchmark.
    """
    differences = {name: (_setting(a, name), _setting(b, name)) for name in (*SHARED, *OF_MODEL)}
    if all(MATHS_COLUMNS & set(result.scores) for result in (a, b)):
        differences |= {name: (a.settings.get(name), b.settings.get(name)) for name in MATHS_ONLY}
    for setting, flag in BY_BENCHMARK.items():
        differences[flag] = (_by_benchmark(a, setting, EVERY), _by_benchmark(b, setting, EVERY))
    differences["lm_eval"] = (a.versions.get("lm_eval"), b.versions.get("lm_eval"))
    shared = [column for column in a.scores if column in b.scores]
    for column in shared:
        differences |= {f"{flag} of {column}": pair for flag, pair in _of_column(a, b, column).items()}
    return _unequal(differences)


def column_differences(a: EvalResult, b: EvalResult, column: str) -> Differences:
    """Conditions of one benchmark under which two models' scores do not compare, where both were measured.

    Items stand for the limit where both results have outcomes per item: a limit above the benchmark's size is none.
    """
    if a.published or b.published:
        return {}
    names = [name for name in SHARED if not (column in LIKELIHOOD_COLUMNS and name in GENERATION)]
    differences = {name: (_setting(a, name), _setting(b, name)) for name in names}
    if column in MATHS_COLUMNS:
        differences |= {name: (a.settings.get(name), b.settings.get(name)) for name in MATHS_ONLY}
    differences["lm_eval"] = (a.versions.get("lm_eval"), b.versions.get("lm_eval"))
    differences |= _of_column(a, b, column)
    return _unequal(differences)


def _setting(result: EvalResult, name: str) -> JsonValue:
    """A setting of a run, or the part of its `model_args` of that name."""
    arguments = result.settings.get("model_args")
    inside = arguments.get(name) if isinstance(arguments, Mapping) else None
    return result.settings.get(name, inside)


def _of_column(a: EvalResult, b: EvalResult, column: str) -> Differences:
    differences = {
        flag: tuple(_by_benchmark(r, setting, column) for r in (a, b)) for setting, flag in BY_BENCHMARK.items()
    }
    if column in a.scores and column in b.scores:
        differences["metric"] = (a.scores[column].metric, b.scores[column].metric)
    if column in a.outcomes and column in b.outcomes:
        differences["items"] = items = _items(a.outcomes[column], b.outcomes[column])
        if items == (None, None):
            differences.pop("limit")
    return {name: (pair[0], pair[1]) for name, pair in differences.items()}


def _items(a: Outcomes, b: Outcomes) -> tuple[int | None, int | str | None]:
    """The numbers of items, with a word where they are as many but others; None for the same items in any order."""
    if [(t, o.items, o.docs) for t, o in a.tasks.items()] == [(t, o.items, o.docs) for t, o in b.tasks.items()]:
        return None, None
    first, second = a.keys(), b.keys()
    if set(first) == set(second):
        return None, None
    if len(first) != len(second):
        return len(first), len(second)
    same = {key[:2] for key in first} == {key[:2] for key in second}
    return len(first), f"{len(second)} with another question under a number" if same else f"{len(second)} others"


def _by_benchmark(result: EvalResult, setting: str, column: str) -> JsonValue:
    """The value for one column, or for benchmarks without a value of their own (`EVERY`)."""
    values = result.settings.get(setting)
    if isinstance(values, Mapping):
        return values.get(_NAMES.get(column, column), values.get(EVERY))
    return result.settings.get("limit") if setting == "limits" else None


def _unequal(pairs: Mapping[str, tuple[object, object]]) -> Differences:
    """Pairs whose values differ. Where all answers came from the journal, dtype and backend may be unknown."""
    return {
        name: (a, b)
        for name, (a, b) in pairs.items()
        if _key(a) != _key(b) and not (name in ("dtype_used", "backend") and {a, b} & {None, "None", "auto"})
    }


def _key(value: object) -> str:
    """One text for equal values; "", {} and False are no value."""
    return json.dumps(value or None, sort_keys=True, default=str)


def listed(differences: Mapping[str, tuple[object, object]]) -> str:
    """Return differences as text: "limit 10 and 20, preset paper and lm-eval"."""
    return ", ".join(f"{name} {_format(a)} and {_format(b)}" for name, (a, b) in differences.items())


def _format(value: object) -> str:
    return "none" if value in (None, "", {}) else str(value)


def column_conflicts(results: Iterable[EvalResult], column: str) -> Differences:
    """Return the conditions of a column in which any of several measured results differs from another one."""
    measured = [r for r in results if column in r.scores and not r.published]
    differences: Differences = {}
    for other in measured[1:]:
        for name, pair in column_differences(measured[0], other, column).items():
            differences.setdefault(name, pair)
    dtypes = {r.settings.get("dtype_used") for r in measured} - {None}
    if len(dtypes) > 1:
        first, second, *_ = sorted(map(str, dtypes))
        differences.setdefault("dtype_used", (first, second))
    return differences


def prompt_hash(result: EvalResult, column: str) -> str | None:
    """Return the SHA-256 over a column's prompts; None where the result has none."""
    hashes = result.settings.get("prompts_sha256")
    if not isinstance(hashes, Mapping):
        return None
    preset = str(result.settings.get("preset") or "paper")
    known_tasks = [b.task for b in (*LM_EVAL.values(), MMLU_PRO, *MATHS.get(preset, {}).values()) if b.column == column]
    tasks: Sequence[str] = list(result.outcomes[column].tasks) if column in result.outcomes else []
    for name in (*known_tasks, column, *(tasks if len(tasks) == 1 else ())):
        if name in hashes:
            return str(hashes[name])
    return None
