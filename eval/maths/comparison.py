"""Equality of two answers as a mathematician reads them, by rules: exact ones, or the paper's lenient ones.

What cannot be read is equal to the same string only. Comparing may take arbitrarily long: callers run it in a worker
with a time limit (grader.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from eval.maths.notation import LONGEST, clean, units_agree
from eval.maths.numeric import equal_values, proportion, same_formulas
from eval.maths.reading import read_all
from eval.maths.real_sets import same_sets
from eval.maths.values import (
    EXACT,
    Formula,
    Items,
    Matrix,
    Numeral,
    Parts,
    Quantity,
    Relation,
    Rules,
    Union,
    Value,
    Words,
    expressions,
    name_of,
    steps,
)

if TYPE_CHECKING:
    from sympy import Expr


def same_answers(answer: str, gold: str, rules: Rules = EXACT) -> bool:
    """Return whether two answers are equal; both as written. May take arbitrarily long."""
    if max(len(answer), len(gold)) > LONGEST:
        return answer == gold and bool(answer)
    a_text, g_text = clean(answer), clean(gold)
    if not a_text or not g_text:
        return False
    if unspaced(a_text) == unspaced(g_text):
        return True
    readings = [list(read_all(text)) for text in (a_text, g_text)]
    return any(same(a, g, rules) for a in readings[0] for g in readings[1])


def unspaced(text: str) -> str:
    """Return a text without spaces, but for those between digits: `1 1/4` is not `11/4`."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def same(a: Value, g: Value, rules: Rules = EXACT) -> bool:
    """Return whether an answer equals a gold value by `rules`."""
    if isinstance(a, Quantity) or isinstance(g, Quantity):
        return _same_quantities(a, g, rules)
    if isinstance(a, Relation) or isinstance(g, Relation):
        return _same_relations(a, g, rules)
    if isinstance(a, Union) or isinstance(g, Union):
        return same_sets(a, g)
    if isinstance(a, Words) or isinstance(g, Words):
        words = isinstance(a, Words) and isinstance(g, Words) and _plain_words(a.text) == _plain_words(g.text) != ""
        return words or same_sets(a, g)
    if isinstance(a, Formula) and isinstance(g, Formula):
        return same_formulas(a, g, rules)
    if isinstance(a, Items) and isinstance(g, Items):
        return _same_items(a, g, rules)
    if isinstance(a, Items) and not a.brackets.strip("{}") and len(a.items) == 1:
        return a.brackets == "" and same(a.items[0], g, rules)
    if isinstance(a, Matrix) and isinstance(g, Matrix):
        return [len(row) for row in a.rows] == [len(row) for row in g.rows] and all(
            same(x, y, rules)
            for one, other in zip(a.rows, g.rows, strict=True)
            for x, y in zip(one, other, strict=True)
        )
    if isinstance(a, Parts) or isinstance(g, Parts):
        return _same_parts(a, g)
    return isinstance(a, Numeral) and a == g


def _plain_words(text: str) -> str:
    words = re.sub(r"[\s{}\"'().!?]+", " ", text).strip()
    words = re.sub(r"^(?:the|an?)\s+(?=\w{2})", "", words, flags=re.IGNORECASE)
    return words.casefold() if re.search(r"[A-Za-z]{2}", words) else words


def _same_quantities(a: Value, g: Value, rules: Rules) -> bool:
    (a_value, a_unit, a_percent), (g_value, g_unit, g_percent) = (
        (v.value, v.unit, v.percent) if isinstance(v, Quantity) else (v, (), False) for v in (a, g)
    )
    if rules.units and not units_agree(a_unit, g_unit):
        return False
    if (a_percent and g_unit) or (g_percent and a_unit):
        return False
    if same(a_value, g_value, rules):
        return True
    if a_percent == g_percent or not (isinstance(a_value, Formula) and isinstance(g_value, Formula)):
        return False
    one, other = (
        Formula(value.expression / 100 if percent else value.expression)
        for value, percent in ((a_value, a_percent), (g_value, g_percent))
    )
    return same_formulas(one, other, rules)


def _same_items(a: Items, g: Items, rules: Rules) -> bool:
    if a.brackets != g.brackets and a.brackets and g.brackets:
        return False
    if len(a.items) != len(g.items):
        return not g.brackets and not a.brackets and not rules.ordered and same_sets(a, g)
    if all(same(x, y, rules) for x, y in zip(a.items, g.items, strict=True)):
        return True
    kinds = {a.brackets, g.brackets}
    return (
        kinds <= {"", "{}"} and (not rules.ordered or "{}" in kinds) and _matched(list(a.items), list(g.items), rules)
    )


def _matched(a: Sequence[Value], g: Sequence[Value], rules: Rules) -> bool:
    """Return whether the items are equal in some order."""
    if len(a) != len(g) or len(a) > 40:
        return False
    unmatched = list(g)
    for item in a:
        place = next((i for i, other in enumerate(unmatched) if same(item, other, rules)), None)
        if place is None:
            return False
        del unmatched[place]
    return True


def _same_parts(a: Value, g: Value) -> bool:
    if isinstance(a, Parts) and isinstance(g, Parts):
        if a.clock and g.clock:
            halves = a.half == g.half or not (a.half and g.half)
            return halves and len(a.items) == len(g.items) and all(map(same, a.items, g.items))
        if len(a.items) != len(g.items) or a.half or g.half:
            return False
        pairs = list(pairwise(zip(expressions(a.items), expressions(g.items), strict=True)))
        nonzero = all(not x.is_zero for x in (*expressions(a.items), *expressions(g.items)))
        return nonzero and all(equal_values(x * v, u * y, 0.0) for (x, y), (u, v) in pairs)
    ratio, other = (a, g) if isinstance(a, Parts) else (g, a)
    if not isinstance(ratio, Parts) or ratio.clock or len(ratio.items) != 2 or not isinstance(other, Formula):
        return False
    one, two = expressions(ratio.items)
    return not two.is_zero and equal_values(one / two, other.expression, 0.0)


def _assigned(relation: Relation) -> Value | None:
    r"""Return the value that a relation states: of `x = 5`, `5 = x`, `x \in [1, 2]`, `2 + 3 = 5`; None for others."""
    if relation.signs == ("in",):
        return relation.sides[1] if name_of(relation.sides[0]) else None
    if set(relation.signs) != {"="}:
        return None
    first, *middle, last = relation.sides
    if name_of(first) and not name_of(last):
        return last if all(same(value, last) for value in middle) else None
    if name_of(last) and not name_of(first):
        return first if not middle else None
    formulas = [side for side in relation.sides if isinstance(side, Formula) and not side.expression.free_symbols]
    if len(formulas) == len(relation.sides) and all(same(x, y) for x, y in pairwise(relation.sides)):
        return last
    return None


def _same_relations(a: Value, g: Value, rules: Rules) -> bool:
    if isinstance(a, Relation) and isinstance(g, Relation):
        if a.signs == g.signs == ("in",):
            return name_of(a.sides[0]) == name_of(g.sides[0]) and same(a.sides[1], g.sides[1], rules)
        if a.signs == g.signs and all(same(x, y, rules) for x, y in zip(a.sides, g.sides, strict=True)):
            return True
        a_steps, g_steps = steps(a), steps(g)
        if a_steps is None or g_steps is None:
            return same_sets(a, g)
        unmatched = list(g_steps)
        for step in a_steps:
            match = next((other for other in unmatched if _same_step(step, other)), None)
            if match is None:
                break
            unmatched.remove(match)
        else:
            return not unmatched
        return same_sets(a, g)
    relation, other = (a, g) if isinstance(a, Relation) else (g, a)
    assert isinstance(relation, Relation)
    value = _assigned(relation)
    if value is not None:
        return same(value, other, rules) if relation is a else same(other, value, rules)
    return same_sets(a, g)


_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def _same_step(a: tuple[str, Expr, Expr], g: tuple[str, Expr, Expr]) -> bool:
    """Return whether two relations of two sides say the same: their differences are proportional.

    An identity says nothing of its sides, so that one is another only where the sides are equal.
    """
    (a_sign, a_left, a_right), (g_sign, g_left, g_right) = a, g
    ratio = proportion(a_left - a_right, g_left - g_right)
    if ratio is None:
        return a_sign == g_sign and equal_values(a_left, g_left, 0.0) and equal_values(a_right, g_right, 0.0)
    return g_sign == (a_sign if ratio > 0 else _TURNED[a_sign])
