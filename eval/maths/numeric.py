"""Equality of formulas by value: exactly for numbers, else at fixed points of their variables to 22 digits."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from eval.maths.values import Formula, Rules

if TYPE_CHECKING:
    from sympy import Expr, Rational, Symbol


def same_formulas(a: Formula, g: Formula, rules: Rules) -> bool:
    """Return whether an answer's formula `a` has the value of the gold formula `g`."""
    decimal = a.decimals is not None or g.decimals is not None
    relative = (
        rules.relative
        if rules.relative and (decimal or (a.expression.is_Rational and g.expression.is_Rational))
        else 0.0
    )
    golds = [g.expression, *((g.expression / 100, g.expression * 100) if rules.hundredfold and _rational(a, g) else ())]
    if any(equal_values(a.expression, gold, relative) for gold in golds):
        return True
    return not rules.relative and (_rounded(a, g) or _rounded(g, a))


def _rational(a: Formula, g: Formula) -> bool:
    return bool(a.expression.is_Rational and g.expression.is_Rational)


def _rounded(decimal: Formula, exact: Formula) -> bool:
    """Return whether a number of six or more decimals is an exact number, rounded or cut at its last one."""
    if decimal.decimals is None or decimal.decimals < 6 or exact.decimals is not None or not exact.expression.is_number:
        return False
    value = number_at(exact.expression, {})
    if value is None or not value.is_real or value == 0:
        return False
    error = abs(number_at(decimal.expression, {}) - value)
    return bool(error <= 10.0**-decimal.decimals and error <= 1e-5 * abs(value))


def equal_values(a: Expr, g: Expr, relative: float) -> bool:
    """Return whether two expressions are equal: as they stand, as numbers, or at points of their variables."""
    import sympy

    if a == g:
        return True
    if a.is_Rational and g.is_Rational:
        return bool(abs(a - g) <= sympy.Rational(relative) * abs(g))
    if a.has(sympy.oo, -sympy.oo) or g.has(sympy.oo, -sympy.oo):
        return False
    symbols = a.free_symbols | g.free_symbols
    informed = 0
    imaginary = a.has(sympy.I) or g.has(sympy.I)
    for point in points(symbols) if symbols else [{}]:
        x, y = number_at(a, point), number_at(g, point)
        if x is None or y is None:
            continue
        if symbols and not imaginary and not (x.is_real and y.is_real):
            continue  # another branch of a root or logarithm
        if abs(x - y) > max(relative, 1e-22) * max(abs(x), abs(y)):
            if min(abs(x), abs(y)) < 1e-30:
                return bool(sympy.simplify(a - g) == 0)
            return False
        informed += 1
    if informed >= (3 if symbols else 1):
        return True
    return bool(sympy.simplify(a - g) == 0)


def points(symbols: set[Symbol]) -> list[dict[Symbol, Rational]]:
    """Return fixed values for variables: positive ones above and below 1, then negative ones."""
    import sympy

    generator = random.Random(0)
    names = sorted(symbols, key=str)
    ranges = [(1, 5)] * 3 + [(0, 1)] * 2 + [(-3, 3)] * 4 + [(-5, -1)] * 2

    def value(low: int, high: int) -> Rational:
        return sympy.Rational(generator.randint(low * 997, high * 997) * 2 + 1, 1994)

    return [{name: value(*limits) for name in names} for limits in ranges]


def number_at(expression: Expr, point: dict[Symbol, Rational]) -> Expr | None:
    """Return an expression's value to 30 digits at a point; None where it has none."""
    import sympy

    try:
        value = expression.subs(point).evalf(30, maxn=200)
    except Exception:  # sympy raises several kinds for what it cannot evaluate
        return None
    if not value.is_number or value.has(sympy.zoo, sympy.nan, sympy.oo) or value.free_symbols:
        return None
    parts = value.as_real_imag()
    return value if all(part.is_Float or part.is_Rational for part in parts) else None


def proportion(a: Expr, g: Expr) -> float | None:
    """Return the constant a / g; None where it is none, or where one of them has no variable left."""
    if not a.free_symbols or not g.free_symbols:
        return None
    ratios = []
    for point in points(a.free_symbols | g.free_symbols):
        x, y = number_at(a, point), number_at(g, point)
        if x is None or y is None or not (x.is_real and y.is_real):
            continue
        if y == 0 or x == 0:
            if x != y:
                return None
            continue
        ratios.append(x / y)
    if len(ratios) < 3 or any(abs(ratio - ratios[0]) > 1e-15 * abs(ratios[0]) for ratio in ratios):
        return None
    return float(ratios[0])
