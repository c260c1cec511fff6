"""MATH as the `lm-eval` preset grades it: the exact string of the final answer first, then math-verify.

Nothing of the paper's leniency: no factor of 100, no units or variables dropped by us, no change of case. What needs
math-verify takes arbitrarily long and runs in grader.py's worker.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from eval.tasks.equality import based_equal, commands, has_words

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_HOPE = re.compile(r"final answer is:?\s*(.*?)\.?\s*I hope it is correct", re.IGNORECASE | re.DOTALL)
_SAID = re.compile(r"answer(?:\s+is|:)\s*:?\s*([^\n]+)", re.IGNORECASE)
_MATHS = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|(?<!\\)\$((?:\\\$|[^$\n])+?)(?<!\\)\$|\\\((.+?)\\\)", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_PLAIN = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
_FENCES = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))


def final_answer(text: str) -> str:
    """Return the final answer that a generation or a gold solution states, as it is written; "" where there is none.

    The first of: the last "final answer is ... I hope it is correct"; the last \\boxed whose braces are balanced; what
    follows the last "answer is"; the last formula; the last number.
    """
    hoped = _HOPE.findall(text)
    if hoped:
        return _bare(hoped[-1])
    boxed = list(_boxes(text))
    if boxed:
        return _bare(boxed[-1])
    said = _SAID.findall(text)
    if said:
        formulas = list(_formulas(said[-1]))
        return _bare(formulas[0] if formulas else re.split(r"\.(?:\s|$)", said[-1])[0])
    formulas = list(_formulas(text))
    numbers = _NUMBER.findall(text)
    return _bare(formulas[-1] if formulas else numbers[-1] if numbers else "")


def _boxes(text: str) -> Iterator[str]:
    """The contents of every \\boxed whose braces are balanced (or that stands before one token), in order."""
    for start in (match.end() for match in _BOX.finditer(text)):
        if text[start : start + 1] != "{":
            token = re.match(r"[^\s$\\{}]+", text[start:])
            if token:
                yield token[0].rstrip(".,;")
            continue
        end = _closing(text, start)
        if end is not None:
            yield text[start + 1 : end]


def _closing(text: str, start: int) -> int | None:
    """Where the brace that opens at `start` closes; escaped braces do not count."""
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
        place += 1
    return None


def _formulas(text: str) -> Iterator[str]:
    return (next(group for group in match.groups() if group is not None) for match in _MATHS.finditer(text))


def _bare(answer: str) -> str:
    """The answer without the marks of inline or display mathematics around it, a box in it, and a full stop."""
    text = answer.strip().removesuffix(".").strip()
    for opening, closing in _FENCES:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip().removesuffix(".").strip()
            break
    box = _BOX.match(text)
    if box and text[box.end() : box.end() + 1] == "{" and _closing(text, box.end()) == len(text) - 1:
        return _bare(text[box.end() + 1 : -1])
    return text


def spelled(answer: str) -> str:
    """One spelling of what LaTeX sets alike: spaces, sizes of fractions and brackets, upright and bold text."""
    text = re.sub(r"\\(?:text|textrm|textbf|textit|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", answer)
    text = re.sub(r"\\(?:displaystyle|left|right)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\\[A-Za-z]+|\d)\s*(\\[A-Za-z]+|\d)(?![A-Za-z{])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(leq|geq|neq)(?![A-Za-z])", lambda m: "\\" + m[1][:-1], text)
    text = re.sub(r"(?<!\\)\\[!,;: ]|~", "", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", "\\1\0", text)
    return re.sub(r"\s+", "", text).replace("\0", " ").replace("\\$", "").replace("$", "")


def quickly_verified(answer: str, gold: str) -> bool | None:
    """Decide by the string, as plain numbers, or as words; None where only math-verify can tell.

    Words are decided here because the grammar reads them as products of letters, in which "listen" is "silent".
    """
    a, g = spelled(answer), spelled(gold)
    if not a or not g:
        return False
    if a == g:
        return True
    as_numbers = _number_equal(a, g)
    if as_numbers is not None:
        return as_numbers
    if any(has_words(text) and not re.search(r"\d", text) for text in (a, g)):
        return False
    return based_equal(a, g)


def _number_equal(a: str, g: str) -> bool | None:
    """Compare plain numbers exactly; 25% is 25 and 0.25, as in math-verify. None where one is no plain number."""
    plain = [re.sub(r"\\?%$", "", text) for text in (a, g)]
    if not all(_PLAIN.fullmatch(text) for text in plain):
        return None
    values = [Decimal(text.replace(",", "")) for text in plain]
    if values[0] == values[1]:
        return True
    percent = plain[0] != a, plain[1] != g
    return percent[0] != percent[1] and values[percent[0]] == values[percent[1]] / 100


def verified(answer: str, gold: str) -> bool:
    """Whether math-verify calls two final answers equal; may take arbitrarily long, so that callers run it in a worker.

    Only the whole answer counts, never a number found inside one that the grammar cannot read. Time limits of
    math-verify's own are off: they need signals, and the worker's parent keeps the time.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    whole = {"extraction_config": [LatexExtractionConfig()], "extraction_mode": "first_match"}
    parsed = [
        parse(_formula(text), **whole, fallback_mode="no_fallback", parsing_timeout=None) for text in (gold, answer)
    ]
    return bool(verify(parsed[0], parsed[1], timeout_seconds=None)) and _near(*parsed)


def _near(gold: Sequence[Any], answer: Sequence[Any]) -> bool:
    """Whether two plain numbers agree to 1e-5 of the gold: math-verify compares 6 decimals, all 0 for tiny numbers."""
    from sympy import Expr, UnevaluatedExpr

    g, a = gold[0], answer[0]
    if not all(isinstance(x, Expr) and x.is_number and not x.has(UnevaluatedExpr) for x in (g, a)):
        return True
    return bool(abs((a - g).evalf()) <= 1e-5 * abs(g.evalf()))


def _formula(answer: str) -> str:
    """The answer as a formula, its percent sign behind it, where math-verify looks for one."""
    plain = re.sub(r"\\?%$", "", answer.strip())
    return f"${commands(plain)}$" + ("%" if plain != answer.strip() else "")
