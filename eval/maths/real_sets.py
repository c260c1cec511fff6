"""Sets of real numbers: intervals, unions and the solutions of inequalities, compared as disjoint intervals."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from eval.maths.numeric import equal_values
from eval.maths.values import Items, Relation, Union, Value, Words, expressions, name_of, steps

if TYPE_CHECKING:
    from sympy import Expr, Set

Piece = tuple["Expr", "Expr", bool, bool]
"""An interval: lower end, upper end, whether each is left out."""


def same_sets(a: Value, g: Value) -> bool:
    """Return whether two values are the same set of real numbers; False where one is not such a set."""
    pieces = _pieces(a), _pieces(g)
    if pieces[0] is None or pieces[1] is None or len(pieces[0]) != len(pieces[1]):
        return False
    return all(
        x[2:] == y[2:] and equal_values(x[0], y[0], 0.0) and equal_values(x[1], y[1], 0.0)
        for x, y in zip(pieces[0], pieces[1], strict=True)
    )


def _pieces(value: Value) -> list[Piece] | None:
    """Return a set of real numbers as disjoint intervals from low to high; None for what is none."""
    import sympy

    real_set = _real_set(value)
    if real_set is None:
        return None
    real_set = real_set.simplify() if isinstance(real_set, sympy.ConditionSet) else real_set
    parts = real_set.args if isinstance(real_set, sympy.Union) else (real_set,)
    pieces: list[Piece] = []
    for part in parts:
        if isinstance(part, sympy.Interval):
            pieces.append((part.start, part.end, bool(part.left_open), bool(part.right_open)))
        elif isinstance(part, sympy.FiniteSet):
            pieces += [(point, point, False, False) for point in part]
        elif part is not sympy.S.EmptySet:
            return None
    return sorted(pieces, key=lambda piece: (float(piece[0]), float(piece[1])))


def _real_set(value: Value) -> Set | None:
    """Return sympy's set of a value; None where it is no set of real numbers."""
    import sympy

    if isinstance(value, Words):
        return sympy.S.Reals if re.fullmatch(r"\\mathbb\s*\{?R\}?|all real numbers", value.text) else None
    if isinstance(value, Union):
        parts = [_real_set(part) for part in value.parts]
        without = [_real_set(part) for part in value.without]
        if any(part is None for part in (*parts, *without)):
            return None
        return sympy.Union(*parts) - sympy.Union(*without)
    if isinstance(value, Relation):
        return _solutions(value)
    if not isinstance(value, Items):
        return None
    if value.brackets in ("", "{}"):
        ends = expressions(value.items)
        if len(ends) == len(value.items):
            return sympy.FiniteSet(*ends) if all(end.is_real for end in ends) else None
        parts = [_real_set(item) for item in value.items]
        return None if any(part is None for part in parts) or value.brackets else sympy.Union(*parts)
    ends = expressions(value.items)
    if len(value.items) != 2 or len(ends) != 2 or not all(end.is_extended_real for end in ends):
        return None
    if not ends[0] < ends[1]:
        return None
    return sympy.Interval(*ends, value.brackets[0] == "(", value.brackets[1] == ")")


def _solutions(relation: Relation) -> Set | None:
    """Return the real numbers that satisfy a chain of inequalities in one variable."""
    import sympy

    chain = steps(relation)
    if relation.signs == ("in",):
        return _real_set(relation.sides[1]) if name_of(relation.sides[0]) else None
    if chain is None or "=" in relation.signs:
        return None
    symbols = set().union(*(left.free_symbols | right.free_symbols for _, left, right in chain))
    if len(symbols) != 1:
        return None
    (symbol,) = symbols
    real = sympy.Symbol("real", real=True)
    kinds = {"<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "!=": sympy.Ne}
    try:
        solutions = sympy.S.Reals
        for sign, left, right in chain:
            solutions = solutions & kinds[sign](left.subs(symbol, real), right.subs(symbol, real)).as_set()
    except Exception:  # sympy raises several kinds for what it cannot solve
        return None
    return solutions
