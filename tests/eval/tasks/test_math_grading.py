"""GSM8K and MATH as the paper graded them: prompts, extraction, normal form, equality, time limit."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from eval.tasks.answers import extract, normalise
from eval.tasks.equality import equal, number, quickly_equal
from eval.tasks.grader import Grader, process_results
from eval.tasks.prompts import STOPS, TEMPLATES, prompt

DATA = Path(os.environ.get("AIM_DATA_DIR", Path(__file__).resolve().parents[4] / "shared" / "data"))


def items(path: str) -> list[dict[str, str]]:
    """The rows of a benchmark's JSONL files; skips the test where they are missing."""
    files = sorted((DATA / "hub").glob(path))
    if not files:
        pytest.skip(f"no {path} in {DATA}/hub; set AIM_DATA_DIR")
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_prompts_are_the_reference_ones_character_for_character() -> None:
    """Each of the four prompts equals the published template, stripped at both ends."""
    below = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWhat is 1+1?\n\n### Response:"
    )
    assert prompt("wcot", "What is 1+1?") == below + " Let's think step by step."
    assert prompt("wiz", "What is 1+1?") == below
    zero_shot = "### Instruction:\nWhat is 1+1?\n\n### Response: Let's think step by step."
    assert prompt("wizard_zs", "What is 1+1?") == zero_shot
    assert prompt("cot", "What is 1+1?") == "Question: What is 1+1?\nAnswer:"
    assert prompt("wiz", "a {input} {0} b").count("{input}") == 1
    assert set(TEMPLATES) == set(STOPS)


def test_stop_strings_are_the_reference_ones() -> None:
    """Three end markers for all prompts, and each prompt's own."""
    ends = ("</s>", "<|im_end|>", "<|endoftext|>")
    assert STOPS["wiz"] == ends
    assert STOPS["cot"] == STOPS["wcot"] == (*ends, "\n\nQuestion:")
    assert STOPS["wizard_zs"] == (*ends, "Instruction", "Response")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the final answer is $42$. I hope it is correct. The answer is 3.", "42"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}} and 7", r"\frac{1}{2}"),
        (r"$\boxed 7$ cookies", "7"),
        (r"\boxed{\{1, 2\}} left", r"\{1,2\}"),
        ("The answer is 5. No, the answer is: 12.", "12"),
        ("the answer is\n  9", "9"),
        ("I have 3 apples and 1,234.50 more", "1234.5"),
        ("it costs -7", "-7"),
        ("no number here", ""),
        ("", ""),
    ],
)
def test_extraction_takes_the_first_rule_that_applies(text: str, answer: str) -> None:
    """Final-answer form, last box, last "he answer is", last number, in that order."""
    assert extract(text) == answer


EQUAL = [
    ("1/2", r"\frac{1}{2}"), (r"\dfrac12", r"\frac{1}{2}"), ("0.5", r"\frac{1}{2}"), ("0.50", ".5"), ("1,000", "1000"),
    ("11,\\! 100", "11100"), (r"\$32,348", "32348"), (r"90^\circ", "90"), (r"90^{\circ}", "90"), (r"25\%", "25"),
    ("50", "0.5"), ("50%", "0.5"), (r"10\text{ cm}", "10"), (r"5\text{ cm}^2", "5"), ("5 square units", "5"),
    ("x=5", "5"), (r"x \in [1,2]", "[1,2]"), (r"\left(1,2\right)", "(1, 2)"), ("(1,2)", "(1,2.0)"), ("E", "e"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), (r"3\sqrt2", r"\sqrt{18}"), ("sqrt(2)/2", r"\frac{\sqrt{2}}{2}"),
    (r"\frac{\pi}{4}", "pi/4"), ("x^2+2x+1", "(x+1)^2"), ("2x+3=y", "y=2x+3"), ("x+y=1", "1=x+y"), ("1.5e3", "1500"),
    (r"\text{Evelyn}", "Evelyn"), (r"(-\infty, 2]", r"(-\infty,2]"), (r"(0,\frac12)", "(0,0.5)"),
    (r"2\pi r", r"2\cdot\pi r"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
    ("6:30 p.m.", "6:30"),
    (r"\begin{pmatrix}\frac12&2\end{pmatrix}", r"\begin{pmatrix}0.5&2.0\end{pmatrix}"), ("3.00001", "3"), ("-0", "0"),
    (r"\sqrt{x^2y}", r"\sqrt{yx^2}"), ("10^{3}", "1000"), ("5 dollars", "5"), (r"\mbox{odd}", "odd"),
]  # fmt: skip
UNEQUAL = [
    ("1/2", "1/3"), ("5", "6"), ("5", "-5"), ("", "5"), ("5", ""), ("[0,1)", "(0,1)"), ("(1,2)", "(2,1)"),
    ("1,2", "1,2,3"), ("listen", "silent"), (r"\text{east}", r"\text{seat}"), (r"\sqrt{2}", r"\sqrt{3}"),
    ("x^2", "x^3"),
    ("y=2x", "y=3x"),
    (r"\frac{\pi}{4}", r"\frac{\pi}{3}"), (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1&3\end{pmatrix}"),
    ("3.01", "3"), ("1000", "1001"), (r"2\pi r", r"\pi r"), ("(A)", "(B)"), ("nan", "0"), ("inf", "1"), ("x", "y"),
]  # fmt: skip


def test_equality_agrees_with_the_list() -> None:
    """Pairs in varied spellings: numbers, percent, units, fractions, roots, intervals, matrices, equations, words."""
    grader = Grader()
    wrong = [(a, b) for a, b in EQUAL if not grader.equal(normalise(a), normalise(b))]
    wrong += [(a, b) for a, b in UNEQUAL if grader.equal(normalise(a), normalise(b))]
    grader.close()
    assert wrong == []
    assert grader.timeouts == 0


def test_numbers_are_lenient_as_the_reference_is() -> None:
    """A number equals gold, gold/100 and gold x 100 within 1e-4 of each, and nothing else."""
    assert all(quickly_equal(a, "50") for a in ("50", "0.5", "5000", "50.004", "50%"))
    assert not any(quickly_equal(a, "50") for a in ("5", "500", "50.01", "0.51", "-50"))
    assert number("12%") == 0.12
    assert number("1,234.5") == 1234.5
    assert number("1x") is None


def test_gold_answers_of_gsm8k_score_100_and_wrong_ones_0() -> None:
    """All 1319 gold solutions, and their answers in other phrasings, are right; another number (2 g + 1) never is."""
    docs = items("openai/gsm8k/main/test.jsonl")
    assert len(docs) == 1319
    phrases = (
        "The answer is {}.",
        r"Thus \boxed{{{}}}",
        "So the final answer is ${}$. I hope it is correct.",
        "That makes ${}",
    )
    for i, doc in enumerate(docs):
        gold = doc["answer"].split("####")[-1].strip()
        assert process_results(doc, [doc["answer"]])["acc"] == 1.0
        assert process_results(doc, [phrases[i % 4].format(gold)])["acc"] == 1.0
        other = str(2 * int(gold.replace(",", "")) + 1)
        assert process_results(doc, [doc["answer"].replace("####", "") + "\nThe answer is " + other])["acc"] == 0.0


def test_answers_of_math500_match_their_solutions() -> None:
    """The data set's own answer field and the extraction from its solution have the same normal form, 500 of 500."""
    docs = items("HuggingFaceH4/MATH-500/default/test.jsonl")
    assert [d["answer"] for d in docs if normalise(d["answer"]) != extract(d["solution"])] == []


def test_an_endless_comparison_is_cut_off_and_the_next_one_works() -> None:
    """What sympy cannot decide within the limit is wrong, its worker is replaced, and the next item is graded."""
    grader = Grader(seconds=1.0)
    assert grader.equal(r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}")
    started = time.monotonic()
    assert not grader.equal("9^{9^{9^{9}}}", "9^{9^{9^{8}}}")
    assert time.monotonic() - started < 5
    assert grader.timeouts == 1
    assert grader.equal("x^2-1", "(x-1)(x+1)")
    grader.close()


def test_an_answer_is_never_run_as_code(tmp_path: Path) -> None:
    """Text that is Python is not executed by the comparison."""
    target = tmp_path / "touched"
    for text in (f"__import__('os').system('touch {target}')", f"open('{target}','w')", "exit()"):
        assert not equal(normalise(text), "5")
        assert not equal(text, "x+1")
    assert not target.exists()
