"""Maths answers as values: formulas, quantities, lists, intervals, sets, matrices, equations, times, ratios, words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sympy import Expr


@dataclass(frozen=True)
class Rules:
    """Rules by which two values are equal.

    Attributes:
        relative: Relative tolerance of two numbers of which one is a decimal; 0 for exact numbers.
        hundredfold: Whether a number also equals a hundredth and a hundredfold of the gold.
        ordered: Whether lists without brackets are compared in order.
        units: Whether units have to agree.
    """

    relative: float = 0.0
    hundredfold: bool = False
    ordered: bool = False
    units: bool = True


EXACT = Rules()
PAPER = Rules(relative=1e-4, hundredfold=True, ordered=True, units=False)


@dataclass(frozen=True)
class Formula:
    """A sympy expression; `decimals` is the number of decimals of a plain decimal number, None for other formulas."""

    expression: Expr
    decimals: int | None = None


@dataclass(frozen=True)
class Quantity:
    """A value with a unit, or with a percent sign."""

    value: Value
    unit: tuple[str, ...] = ()
    percent: bool = False


@dataclass(frozen=True)
class Words:
    """Text that is not mathematics."""

    text: str


@dataclass(frozen=True)
class Items:
    """Several values: `brackets` "()", "[)", ... for tuples and intervals, "{}" for sets, "" for lists without any."""

    brackets: str
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Union:
    """A union of sets, and what is taken out of it."""

    parts: tuple[Value, ...]
    without: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Relation:
    """A chain such as a < b <= c: the sides and the signs between them ("=", "<", "<=", ">", ">=", "!=", "in")."""

    sides: tuple[Value, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of values."""

    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Parts:
    """Numbers between colons: a time of day where `clock`, else a ratio; `half` is "a" or "p" for a.m. and p.m."""

    items: tuple[Value, ...]
    clock: bool = False
    half: str = ""


@dataclass(frozen=True)
class Numeral:
    """Digits with the base they are written in."""

    digits: str
    base: int


Value = Formula | Quantity | Words | Items | Union | Relation | Matrix | Parts | Numeral


def expressions(values: Sequence[Value]) -> list[Expr]:
    """Return the expressions of the formulas among `values`."""
    return [value.expression for value in values if isinstance(value, Formula)]


def name_of(value: Value | None) -> str:
    """Return the name that an assignment gives a value to, such as x, x_1, f(x) or (x, y); "" for other sides."""
    import sympy

    if isinstance(value, Formula):
        expression = value.expression
        if isinstance(expression, sympy.Symbol) or (
            expression.is_Function and expression.free_symbols == set(expression.args)
        ):
            return str(expression)
    if isinstance(value, Items) and value.items and all(name_of(item) for item in value.items):
        return ",".join(name_of(item) for item in value.items)
    return ""


def steps(relation: Relation) -> list[tuple[str, Expr, Expr]] | None:
    """Return (sign, left, right) of each step of a chain of formulas."""
    sides = expressions(relation.sides)
    if len(sides) != len(relation.sides) or "in" in relation.signs:
        return None
    return [(sign, *pair) for sign, pair in zip(relation.signs, pairwise(sides), strict=True)]
