"""Are two answers equal? Strings, then numbers, then mathematics. What needs sympy runs in grader.py's worker.

No text is ever evaluated as Python: LaTeX goes through latex2sympy's grammar, which only builds expressions.
"""

from __future__ import annotations

import re
from typing import Any

RELATIVE_TOLERANCE = 1e-4
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_FUNCTIONS = "sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|infty|frac"
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")
_MATRIX = re.compile(r"^\\begin\{pmatrix\}(.*)\\end\{pmatrix\}$", re.DOTALL)


def number(text: str) -> float | None:
    """Read a plain number: commas dropped, a trailing % divides by 100; None for anything else."""
    plain = text.replace(",", "").strip()
    percent = plain.endswith("%")
    plain = plain.removesuffix("%").removesuffix("\\")
    if not _NUMBER.fullmatch(plain):
        return None
    return float(plain) / 100 if percent else float(plain)


def quickly_equal(answer: str, gold: str) -> bool | None:
    """Decide by strings and numbers; None where only mathematics can tell.

    A number also equals gold/100 and gold x 100: the reference's leniency for percentages, kept in its preset.
    """
    if answer.lower() == gold.lower():
        return True
    if not answer or not gold:
        return False
    based = based_equal(answer, gold)
    if based is not None:
        return based
    a, g = number(answer), number(gold)
    if a is None or g is None:
        return None
    return any(abs(a - value) <= RELATIVE_TOLERANCE * abs(value) for value in (g, g / 100, g * 100))


def based_equal(answer: str, gold: str) -> bool | None:
    """Compare numerals with their base, such as 1011_2, digit by digit; None where neither is one.

    The grammars read the subscript as a name's, and drop it.
    """
    a, g = _BASED.fullmatch(answer), _BASED.fullmatch(gold)
    if not any(match and match[1][0].isdigit() for match in (a, g)):
        return None
    return a is not None and g is not None and a.groups() == g.groups()


def equal(answer: str, gold: str) -> bool:
    """The whole decision; may take arbitrarily long, so that callers run it in the worker."""
    quick = quickly_equal(answer, gold)
    if quick is not None:
        return quick
    a_matrix, g_matrix = _MATRIX.match(answer), _MATRIX.match(gold)
    if a_matrix and g_matrix:
        return _pairwise(*(re.split(r"(\\\\|&)", m.group(1).removesuffix("\\\\")) for m in (a_matrix, g_matrix)))
    a_parts, g_parts = _parts(answer), _parts(gold)
    if len(a_parts) > 1 or len(g_parts) > 1:
        same_brackets = (answer[0], answer[-1]) == (gold[0], gold[-1]) or not (_bracketed(answer) and _bracketed(gold))
        if _bracketed(answer) != _bracketed(gold) or same_brackets:
            return _pairwise(a_parts, g_parts)
        return False
    if answer.count("=") == gold.count("=") == 1:
        (al, ar), (gl, gr) = answer.split("="), gold.split("=")
        return _same_equation((al, ar), (gl, gr))
    return symbolically_equal(_without_variable(answer), _without_variable(gold))


def _without_variable(text: str) -> str:
    """`2x+3=y` -> `2x+3`: an equation with a lone variable on one side is what it equals."""
    left, equals, right = text.partition("=")
    if not equals:
        return text
    return left if re.fullmatch(r"[A-Za-z]", right) else right if re.fullmatch(r"[A-Za-z]", left) else text


def _pairwise(answers: list[str], golds: list[str]) -> bool:
    return len(answers) == len(golds) and all(equal(a, g) for a, g in zip(answers, golds, strict=True))


def _bracketed(text: str) -> bool:
    return text[:1] in "([" and text[-1:] in ")]" if text else False


def _parts(text: str) -> list[str]:
    """Split a tuple, interval or list at its top-level commas."""
    inner = text[1:-1] if _bracketed(text) else text
    parts, depth, start = [], 0, 0
    for place, character in enumerate(inner):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(inner[start:place])
            start = place + 1
    return [*parts, inner[start:]] if depth == 0 else [text]


def _same_equation(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether lhs - rhs agree up to sign."""
    sides = [parse(side) for side in (*first, *second)]
    if any(side is None for side in sides):
        return False
    al, ar, gl, gr = sides
    return _same(al - ar, gl - gr) or _same(al - ar, gr - gl)


def symbolically_equal(answer: str, gold: str) -> bool:
    """Whether both are readable mathematics and equal; plain words are never mathematics."""
    a, g = parse(answer), parse(gold)
    return a is not None and g is not None and _same(a, g)


def commands(text: str) -> str:
    """Spell functions and constants as LaTeX commands: `sqrt(2)/pi` -> `\\sqrt{2}/\\pi`."""
    text = re.sub(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1", text)
    return re.sub(r"\\sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)


def has_words(text: str) -> bool:
    """Whether plain words stand in a formula, which the grammar would read as products of letters."""
    return bool(_WORD.search(re.sub(r"\\(?:begin|end)\{\w+\}", "", commands(text))))


def parse(text: str) -> Any:
    """Read LaTeX or plain mathematics into sympy; None where it is neither."""
    from latex2sympy2_extended import latex2sympy

    text = commands(text).replace("**", "^").replace("*", "\\cdot ")
    if has_words(text):
        return None
    try:
        return latex2sympy(text)
    except Exception:  # the grammar raises plain Exception for what it cannot read
        return None


def _same(a: Any, g: Any) -> bool:
    import sympy

    if a == g:
        return True
    if isinstance(a, sympy.FiniteSet) and isinstance(g, sympy.FiniteSet):
        return len(a) == len(g) and all(any(_same(x, y) for x in a) for y in g)
    if isinstance(a, sympy.core.relational.Relational) and isinstance(g, sympy.core.relational.Relational):
        return bool(a.canonical == g.canonical)
    if not (isinstance(a, sympy.Expr) and isinstance(g, sympy.Expr)):
        return False
    if a.is_number and g.is_number and (a.has(sympy.Float) or g.has(sympy.Float)):
        gold = complex(sympy.N(g))
        return abs(complex(sympy.N(a)) - gold) <= RELATIVE_TOLERANCE * abs(gold)
    return bool(sympy.simplify(a - g) == 0)
