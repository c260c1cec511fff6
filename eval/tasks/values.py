"""Maths answers as values: numbers, formulas, lists, intervals, sets, matrices, equations, times, ratios, words.

`same` says whether two answers are equal as a mathematician reads them. Structure (commas, brackets, relations, units)
is read here; formulas go to sympy through latex2sympy's grammar, which only builds expressions: no text is evaluated as
Python. What cannot be read is equal to the same string only. Comparing may take arbitrarily long: callers run it in a
worker with a time limit (grader.py).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from eval.tasks.notation import LONGEST, clean, split_unit, units_agree

DEPTH = 6
"""Levels of brackets and lists that are read."""


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

    expression: Any
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


# Reading


def read_all(text: str) -> Iterator[Value]:
    """Read a cleaned answer; `100,200` is read as a number and as a list."""
    if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d*)?", text):
        text = text.replace(" ", "")
    number, unit = split_unit(re.sub(r"\s*%$", "", text))
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", number):
        yield read(text.replace(",", ""))
        parts = number.split(",") if number == text and not unit else ["0"]
        if not any(part.startswith("0") for part in parts):
            yield Items("", tuple(read(part) for part in parts))
        return
    yield read(text)


def read(text: str, depth: int = 0) -> Value:
    """Read a cleaned answer or a part of it as a value."""
    text = text.strip()
    if depth > DEPTH or not text:
        return Words(text)
    for reader in (_braced, _listed, _union, _relation, _matrix, _bracketed, _colons, _numeral, _signs):
        value = reader(text, depth)
        if value is not None:
            return value
    plain = re.sub(r"\s*%$", "", text)
    if plain != text:
        return Quantity(read(plain, depth + 1), percent=True)
    number, unit = split_unit(text)
    if unit and not (unit == ("degree",) and re.search(r"\\?(?:sin|cos|tan|cot|sec|csc)", number)):
        return Quantity(read(number, depth + 1), unit)
    return formula(text) or Words(text)


_OPENING, _CLOSING = "([{", ")]}"


def _split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Split at a separator outside all brackets; return the parts and the separators. One part where there is none."""
    depth, start, place = 0, 0, 0
    parts: list[str] = []
    separators: list[str] = []
    while place < len(text):
        for environment in (r"\begin", r"\langle", r"\lfloor", r"\lceil"):
            if text.startswith(environment, place):
                depth += 1
        for environment in (r"\end", r"\rangle", r"\rfloor", r"\rceil"):
            if text.startswith(environment, place):
                depth -= 1
        if depth == 0:
            match = separator.match(text, place)
            if match and match.end() > place:
                parts.append(text[start:place])
                separators.append(match[0])
                start = place = match.end()
                continue
        if text[place] == "\\" and text[place + 1 : place + 2] in ("{", "}"):
            place += 1
        depth += (text[place] in _OPENING) - (text[place] in _CLOSING)
        place += 1
    if depth != 0:
        return [text], []
    return [*parts, text[start:]], separators


_LIST = re.compile(r"\s*(?:[,;]\s*(?:and|or)\b|[,;]|(?<=[\s\d})\]])(?:and|or)\b)\s*")
_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d|,\d)")


def _listed(text: str, depth: int) -> Value | None:
    """Read a list without brackets: items between commas, semicolons, `and` or `or`."""
    parts, _ = _split(_spaced_thousands(text), _LIST)
    parts = [part.strip() for part in parts]
    if len(parts) < 2:
        return None
    if not all(parts):
        return Words(text)
    items = [read(part, depth + 1) for part in parts]
    if any(isinstance(item, Words) and _WORD.search(item.text) for item in items) and "," not in text:
        return Words(text)
    first = items[0]
    named = isinstance(first, Relation) and first.signs == ("=",) and _name_of(first.sides[0])
    if named and not any(isinstance(item, Relation) for item in items[1:]):
        items[0] = first.sides[1]  # type: ignore[union-attr]
    units = [item.unit for item in items if isinstance(item, Quantity)]
    if units and isinstance(items[-1], Quantity):
        items = [item if isinstance(item, Quantity) else Quantity(item, units[-1], items[-1].percent) for item in items]
    return Items("", tuple(items))


def _spaced_thousands(text: str) -> str:
    """Remove the commas of thousands from a list whose own commas have spaces behind them."""
    return _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text) if re.search(r",\s|;|\band\b|\bor\b", text) else text


_CUP = re.compile(r"\s*\\cup(?![A-Za-z])\s*")
_MINUS = re.compile(r"\s*\\(?:setminus|backslash)(?![A-Za-z])\s*")


def _union(text: str, depth: int) -> Value | None:
    parts, _ = _split(text, _MINUS)
    unions, _ = _split(parts[0], _CUP)
    if len(parts) == 1 and len(unions) == 1:
        return None
    return Union(tuple(read(part, depth + 1) for part in unions), tuple(read(part, depth + 1) for part in parts[1:]))


_SIGN = re.compile(r"\s*(?:\\(?:le|ge|ne|in|equiv|approx)(?![A-Za-z])|<=|>=|!=|=|<|>)\s*")
_SIGN_NAMES = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in", r"\equiv": "mod", r"\approx": "~"}


def _relation(text: str, depth: int) -> Value | None:
    sides, signs = _split(text, _SIGN)
    if len(sides) == 2 and not sides[0].strip():
        return read(sides[1], depth + 1) if signs[0].strip() == "=" else None
    if len(sides) < 2 or not all(side.strip() for side in sides):
        return None
    names = tuple(_SIGN_NAMES.get(sign.strip(), sign.strip()) for sign in signs)
    if "mod" in names or "~" in names:
        return Words(text)
    values = tuple(read(side, depth + 1) for side in sides)
    return Words(text) if any(isinstance(value, Words) for value in values) else Relation(values, names)


def _matrix(text: str, depth: int) -> Value | None:
    match = re.fullmatch(r"\\begin\s*\{([pv])matrix\}(.*)\\end\s*\{\1matrix\}", text)
    if match is None or r"\begin" in match[2]:
        return None
    rows, _ = _split(match[2].strip().removesuffix(r"\\"), re.compile(r"\s*\\\\\s*"))
    cells = [[read(cell, depth + 1) for cell in _split(row, re.compile(r"\s*&\s*"))[0]] for row in rows]
    if match[1] == "p":
        return Matrix(tuple(map(tuple, cells)))
    if any(len(row) != len(cells) or not all(isinstance(cell, Formula) for cell in row) for row in cells):
        return Words(text)
    import sympy

    return Formula(sympy.Matrix([_expressions(row) for row in cells]).det())


def _whole(text: str, opening: str, closing: str) -> str | None:
    """Return what stands between brackets that enclose the whole text; None where they do not."""
    if not (text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing)):
        return None
    inner = text[len(opening) : len(text) - len(closing)]
    depth, place = 0, 0
    while place < len(inner):
        if inner[place] == "\\" and inner[place + 1 : place + 2] in ("{", "}"):
            place += 1
        depth += (inner[place] in _OPENING) - (inner[place] in _CLOSING)
        if depth < 0:
            return None
        place += 1
    return inner.strip() if depth == 0 else None


_COMMA = re.compile(r"\s*[,;]\s*")


def _braced(text: str, depth: int) -> Value | None:
    """Read a set in braces, by its elements or by a condition."""
    if text == r"\emptyset":
        return Items("{}", ())
    group = _whole(text, "{", "}")
    if group is not None:
        return read(group, depth + 1)
    inner = _whole(text, r"\{", r"\}")
    if inner is None:
        return None
    if not inner:
        return Items("{}", ())
    parts, separators = _split(inner, re.compile(r"\s*[:|]\s*"))
    if len(separators) == 1 and _name_of(formula(parts[0])):
        return read(parts[1], depth + 1)
    items, _ = _split(_spaced_thousands(inner), _COMMA)
    return Items("{}", tuple(read(item, depth + 1) for item in items))


def _bracketed(text: str, depth: int) -> Value | None:
    """Read a tuple, an interval, or one value in brackets."""
    for opening in ("(", "[", r"\langle"):
        for closing in (")", "]", r"\rangle"):
            inner = _whole(text, opening, closing)
            if inner is None:
                continue
            parts, separators = _split(_spaced_thousands(inner), _COMMA)
            if separators:
                brackets = "()" if r"\langle" in (opening, "") else opening + closing
                return Items(brackets, tuple(read(part, depth + 1) for part in parts))
            if opening + closing in ("()", "[]"):
                value = read(inner, depth + 1)
                return None if isinstance(value, Formula) and value.decimals is None else value
    return None


_HALF = re.compile(r"\s*([ap])\.?\s?m\.?$", re.IGNORECASE)


def _colons(text: str, depth: int) -> Value | None:
    """Read a time of day or a ratio."""
    half = _HALF.search(text)
    rest = re.sub(r"\s*:\s*", ":", text[: half.start()] if half else text)
    if half and re.fullmatch(r"\d{1,2}", rest):
        return Parts((read(rest), Formula(_integer(0))), True, half[1].lower())
    if re.fullmatch(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?", rest):
        return Parts(tuple(read(part) for part in rest.split(":")), True, half[1].lower() if half else "")
    parts, separators = _split(text, re.compile(r"\s*:\s*"))
    if not separators or half:
        return None
    values = tuple(read(part, depth + 1) for part in parts)
    return Parts(values) if all(isinstance(value, Formula) for value in values) else Words(text)


_NUMBER_NAMES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def _numeral(text: str, depth: int) -> Value | None:
    match = re.fullmatch(
        r"\(?([0-9A-Z]*\d[0-9A-Z]*(?:\.\d+)?)\)?\s*(?:_\s*\{?\s*(\d+|[a-z]+)\s*\}?| base (\d+|[a-z]+))", text
    )
    if match is None:
        return None
    base = match[2] or match[3]
    number = int(base) if base.isdecimal() else _NUMBER_NAMES.index(base) + 2 if base in _NUMBER_NAMES else 0
    return Numeral(match[1].lstrip("0") or "0", number) if number else None


def _signs(text: str, depth: int) -> Value | None:
    """Read plus-minus as the set of both values."""
    if not re.search(r"\\(?:pm|mp)(?![A-Za-z])", text):
        return None
    both = [re.sub(r"\\pm(?![A-Za-z])", one, re.sub(r"\\mp(?![A-Za-z])", other, text)) for one, other in ("+-", "-+")]
    return Items("{}", tuple(read(part, depth + 1) for part in both))


# Formulas

_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_PLAIN = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_FUNCTIONS = "sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|pi|infty|frac|theta|alpha|beta"
_KNOWN = frozenset(
    (
        *("frac", "sqrt", "binom", "cdot", "times", "pi", "infty", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin"),
        *("arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "exp", "lfloor", "rfloor", "lceil", "rceil", "sum"),
        *("prod", "int", "lim", "infty", "to", "max", "min", "gcd", "alpha", "beta", "gamma", "delta", "epsilon"),
        *("theta", "lambda", "mu", "nu", "rho", "sigma", "tau", "phi", "psi", "omega", "Omega", "Delta", "Gamma"),
        *("vec", "hat", "overline", "bar", "overrightarrow", "pmatrix", "vmatrix", "begin", "end", "xi", "eta", "zeta"),
    )
)


def _integer(number: int) -> Any:
    import sympy

    return sympy.Integer(number)


def formula(text: str) -> Formula | None:
    """Read a formula into sympy; None for what is none: words, unknown commands, undefined values."""
    import sympy

    text = text.strip()
    if _PLAIN.fullmatch(text):
        number = Fraction(text.rstrip("."))
        decimals = len(text.partition(".")[2]) if "." in text else None
        return Formula(sympy.Rational(number.numerator, number.denominator), decimals)
    source = _source(text)
    if source is None:
        return None
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    try:
        expression = latex2sympy(
            source, conversion_config=ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
        )
    except Exception:  # the grammar raises plain Exception for what it cannot read
        return None
    if isinstance(expression, sympy.MatrixBase) and expression.shape == (1, 1):
        expression = expression[0]
    if not isinstance(expression, sympy.Expr) or expression.has(sympy.zoo, sympy.nan):
        return None
    expression = expression.replace(lambda e: isinstance(e, sympy.UnevaluatedExpr), lambda e: e.args[0])
    if not expression.has(sympy.Sum, sympy.Product):
        expression = expression.subs(sympy.Symbol("i"), sympy.I)
    decimal = re.fullmatch(r"[-+]?\d*\.(\d+)(?:[eE].*|\s*\\(?:cdot|times).*)", text)
    return Formula(expression, len(decimal[1]) if decimal else None)


def _source(text: str) -> str | None:
    """Return a formula in the notation that the grammar reads without guessing; None where it would guess."""
    text = re.sub(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1", text)
    text = re.sub(r"\binfinity\b", r"\\infty", text)
    text = text.replace("**", "^").replace("*", r" \cdot ").replace(r"\times", r"\cdot").replace("$", "")
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s*degrees", r"(\1 \\cdot \\pi/180)", text)
    if re.search(r"['\"#&~?]|\.\.|\\ldots|[^\x00-\x7f]", text):
        return _repeating_dots(text)
    without = re.sub(r"\\[A-Za-z]+|\\(?:begin|end)\{\w+\}", " ", text)
    if any(set(word) - set("xyzw") and word not in ("abc", "abcd") for word in _WORD.findall(without)):
        return None
    if set(re.findall(r"\\([A-Za-z]+)", text)) - _KNOWN or re.search(
        r"[-+/*^_]$|^[/*^_]|[-+]\s*[/*^]|\^\s*[-+]?\s*$", text
    ):
        return None
    text = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,3})(?!\w)", r"(\1 \\cdot 10^{\2})", text)
    text = re.sub(r"\\log\s*_\s*\{?\s*e\s*\}?", r"\\ln ", text)
    text = re.sub(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", _repeating, text)
    text = re.sub(r"(\d*)\.(\d*)\((\d+)\)(?!\d)", _repeating, text)
    text = re.sub(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])", _decimal, text)
    text = re.sub(r"(?<=\d)\.(?!\d)", "", text)
    text = re.sub(r"(?<![\d.\w}^)])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])", r"\1\\frac{\2}{\3}", text)
    arguments = _Arguments(text).spelled()
    if arguments is None:
        return None
    text = re.sub(r"(?<![\w.}^)_])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}(?!\^)", _mixed, arguments)
    if re.search(r"\d\s+\d", text):
        return None
    return re.sub(r"(?<![A-Za-z\\])([A-Za-eh-z])\s*\((?=[^()]*[-+])", r"\1 \\cdot (", text)


def _repeating_dots(text: str) -> str | None:
    """Read `0.333...` and `0.1666\\ldots`; None for other formulas with what the grammar does not know."""
    match = re.fullmatch(r"([-+]?)(\d*)\.(\d*?)(\d+?)\4{2,}\s*(?:\.{2,}|\\ldots)", text.strip())
    return None if match is None else match[1] + _fraction(match[2], match[3], match[4])


def _repeating(match: re.Match[str]) -> str:
    return _fraction(match[1], match[2], match[3])


def _fraction(whole: str, start: str, period: str) -> str:
    """Return the repeating decimal whole.start(period) as a fraction."""
    nines = 10 ** len(start) * (10 ** len(period) - 1)
    value = Fraction(int((whole or "0") + start + period) - int((whole or "0") + start), nines)
    return rf"(\frac{{{value.numerator}}}{{{value.denominator}}})"


def _decimal(match: re.Match[str]) -> str:
    value = Fraction(f"{match[1] or 0}.{match[2]}")
    return rf"(\frac{{{value.numerator}}}{{{value.denominator}}})"


def _mixed(match: re.Match[str]) -> str:
    """Read 1\\frac{1}{4} as 1 + 1/4; a number before an improper fraction is a factor."""
    whole, above, below = match.groups()
    sign = "+" if int(above) < int(below) and whole != "0" else r" \cdot "
    return rf"({whole}{sign}\frac{{{above}}}{{{below}}})"


_ARGUMENTS = {"frac": 2, "sqrt": 1, "binom": 2}


class _Arguments:
    """Writes the arguments of \\frac, \\sqrt, \\binom and of exponents in braces, as LaTeX reads them."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def spelled(self) -> str | None:
        """Return the whole text; None where an argument is missing or a brace does not close."""
        try:
            text = self._until("")
        except (IndexError, RecursionError):
            return None
        return text if self.at >= len(self.text) else None

    def _until(self, end: str) -> str:
        parts = []
        while self.at < len(self.text) and self.text[self.at] != end:
            parts.append(self._next())
        return "".join(parts)

    def _next(self) -> str:
        character = self.text[self.at]
        if character == "{":
            self.at += 1
            inner = self._until("}")
            if self.at >= len(self.text):
                raise IndexError
            self.at += 1
            return f"{{{inner}}}"
        if character == "}":
            raise IndexError
        command = re.compile(r"\\([A-Za-z]+)\s*").match(self.text, self.at)
        if command:
            self.at = command.end()
            count = _ARGUMENTS.get(command[1], 0)
            option = re.compile(r"\[[^\[\]]*\]\s*").match(self.text, self.at) if command[1] == "sqrt" else None
            self.at = option.end() if option else self.at
            shown = option[0].strip() if option else ""
            return f"\\{command[1]}{shown}" + (
                "".join(self._argument(command[1]) for _ in range(count)) if count else " "
            )
        self.at += 1
        if character in "^_":
            return character + self._argument(character)
        return character

    def _argument(self, of: str) -> str:
        while self.text[self.at] == " ":
            self.at += 1
        start = self.at
        if self.text[start] == "(" and of in ("sqrt", "^"):
            depth = 0
            for place in range(start, len(self.text)):
                depth += (self.text[place] == "(") - (self.text[place] == ")")
                if depth == 0:
                    self.at = place + 1
                    inner = _Arguments(self.text[start + 1 : place]).spelled()
                    if inner is None:
                        raise IndexError
                    return f"{{{inner}}}"
            raise IndexError
        digits = re.compile(r"[-+]?\d+" if of == "^" else r"\d+" if of == "sqrt" else r"\d").match(self.text, start)
        if digits:
            self.at = digits.end()
            return f"{{{digits[0]}}}"
        argument = self._next()
        return argument if argument.startswith("{") else f"{{{argument.strip()}}}"


# Comparing


def same(a: Value, g: Value, rules: Rules = EXACT) -> bool:
    """Return whether an answer equals a gold value by `rules`."""
    if isinstance(a, Quantity) or isinstance(g, Quantity):
        return _same_quantities(a, g, rules)
    if isinstance(a, Relation) or isinstance(g, Relation):
        return _same_relations(a, g, rules)
    if isinstance(a, Union) or isinstance(g, Union):
        return _same_sets(a, g)
    if isinstance(a, Formula) and isinstance(g, Formula):
        return _same_formulas(a, g, rules)
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
        return _same_parts(a, g, rules)
    if isinstance(a, Words) and isinstance(g, Words):
        return _plain_words(a.text) == _plain_words(g.text) != ""
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
    return _same_formulas(one, other, rules)


def _same_items(a: Items, g: Items, rules: Rules) -> bool:
    if a.brackets != g.brackets and a.brackets and g.brackets:
        return False
    if len(a.items) != len(g.items):
        return not g.brackets and not a.brackets and not rules.ordered and _same_sets(a, g)
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
    left = list(g)
    for item in a:
        place = next((i for i, other in enumerate(left) if same(item, other, rules)), None)
        if place is None:
            return False
        del left[place]
    return True


def _same_parts(a: Value, g: Value, rules: Rules) -> bool:
    if isinstance(a, Parts) and isinstance(g, Parts):
        if a.clock and g.clock:
            halves = a.half == g.half or not (a.half and g.half)
            return halves and len(a.items) == len(g.items) and all(map(same, a.items, g.items))
        if len(a.items) != len(g.items) or a.half or g.half:
            return False
        pairs = list(pairwise(zip(_expressions(a.items), _expressions(g.items), strict=True)))
        nonzero = all(not x.is_zero for x in (*_expressions(a.items), *_expressions(g.items)))
        return nonzero and all(_equal(x * v, u * y, 0.0) for (x, y), (u, v) in pairs)
    ratio, other = (a, g) if isinstance(a, Parts) else (g, a)
    if not isinstance(ratio, Parts) or ratio.clock or len(ratio.items) != 2 or not isinstance(other, Formula):
        return False
    one, two = _expressions(ratio.items)
    return not two.is_zero and _equal(one / two, other.expression, 0.0)


def _expressions(values: Sequence[Value]) -> list[Any]:
    return [value.expression for value in values if isinstance(value, Formula)]


# Relations


def _name_of(value: Value | None) -> str:
    """Return the name that an assignment gives a value to, such as x, x_1, f(x) or (x, y); "" for other sides."""
    import sympy

    if isinstance(value, Formula):
        expression = value.expression
        if isinstance(expression, sympy.Symbol) or (
            expression.is_Function and expression.free_symbols == set(expression.args)
        ):
            return str(expression)
    if isinstance(value, Items) and value.items and all(_name_of(item) for item in value.items):
        return ",".join(_name_of(item) for item in value.items)
    return ""


def _assigned(relation: Relation) -> Value | None:
    """Return the value that a relation states: of `x = 5`, `5 = x`, `x \\in [1, 2]`, `2 + 3 = 5`; None for others."""
    if relation.signs == ("in",):
        return relation.sides[1] if _name_of(relation.sides[0]) else None
    if set(relation.signs) != {"="}:
        return None
    first, *middle, last = relation.sides
    if _name_of(first) and not _name_of(last):
        return last if all(same(value, last) for value in middle) else None
    if _name_of(last) and not _name_of(first):
        return first if not middle else None
    formulas = [side for side in relation.sides if isinstance(side, Formula) and not side.expression.free_symbols]
    if len(formulas) == len(relation.sides) and all(same(x, y) for x, y in pairwise(relation.sides)):
        return last
    return None


def _same_relations(a: Value, g: Value, rules: Rules) -> bool:
    if isinstance(a, Relation) and isinstance(g, Relation):
        if a.signs == g.signs == ("in",):
            return _name_of(a.sides[0]) == _name_of(g.sides[0]) and same(a.sides[1], g.sides[1], rules)
        if a.signs == g.signs and all(same(x, y, rules) for x, y in zip(a.sides, g.sides, strict=True)):
            return True
        steps = _steps(a), _steps(g)
        if steps[0] is None or steps[1] is None:
            return _same_sets(a, g)
        left = list(steps[1])
        for step in steps[0]:
            match = next((other for other in left if _same_step(step, other)), None)
            if match is None:
                break
            left.remove(match)
        else:
            return not left
        return _same_sets(a, g)
    relation, other = (a, g) if isinstance(a, Relation) else (g, a)
    assert isinstance(relation, Relation)
    value = _assigned(relation)
    if value is not None:
        return same(value, other, rules) if relation is a else same(other, value, rules)
    return _same_sets(a, g)


def _steps(relation: Relation) -> list[tuple[str, Any, Any]] | None:
    """Return (sign, left, right) of each step of a chain of formulas."""
    sides = _expressions(relation.sides)
    if len(sides) != len(relation.sides) or "in" in relation.signs:
        return None
    return [(sign, *pair) for sign, pair in zip(relation.signs, pairwise(sides), strict=True)]


_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def _same_step(a: tuple[str, Any, Any], g: tuple[str, Any, Any]) -> bool:
    """Return whether two relations of two sides say the same: their differences are proportional.

    An identity says nothing of its sides, so that one is another only where the sides are equal.
    """
    (a_sign, a_left, a_right), (g_sign, g_left, g_right) = a, g
    ratio = _proportion(a_left - a_right, g_left - g_right)
    if ratio is None:
        return a_sign == g_sign and _equal(a_left, g_left, 0.0) and _equal(a_right, g_right, 0.0)
    return g_sign == (a_sign if ratio > 0 else _TURNED[a_sign])


def _proportion(a: Any, g: Any) -> float | None:
    """Return the constant a / g; None where it is none, or where one of them has no variable left."""
    if not a.free_symbols or not g.free_symbols:
        return None
    ratios = []
    for point in _points(a.free_symbols | g.free_symbols):
        x, y = _number_at(a, point), _number_at(g, point)
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


# Sets of real numbers

Piece = tuple[Any, Any, bool, bool]
"""An interval: lower end, upper end, whether each is left out."""


def _same_sets(a: Value, g: Value) -> bool:
    pieces = _pieces(a), _pieces(g)
    if pieces[0] is None or pieces[1] is None or len(pieces[0]) != len(pieces[1]):
        return False
    return all(
        x[2:] == y[2:] and _equal(x[0], y[0], 0.0) and _equal(x[1], y[1], 0.0)
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


def _real_set(value: Value) -> Any:
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
        ends = _expressions(value.items)
        if len(ends) == len(value.items):
            return sympy.FiniteSet(*ends) if all(end.is_real for end in ends) else None
        parts = [_real_set(item) for item in value.items]
        return None if any(part is None for part in parts) or value.brackets else sympy.Union(*parts)
    ends = _expressions(value.items)
    if len(value.items) != 2 or len(ends) != 2 or not all(end.is_extended_real for end in ends):
        return None
    if not ends[0] < ends[1]:
        return None
    return sympy.Interval(*ends, value.brackets[0] == "(", value.brackets[1] == ")")


def _solutions(relation: Relation) -> Any:
    """Return the real numbers that satisfy a chain of inequalities in one variable."""
    import sympy

    steps = _steps(relation)
    if relation.signs == ("in",):
        return _real_set(relation.sides[1]) if _name_of(relation.sides[0]) else None
    if steps is None or "=" in relation.signs:
        return None
    symbols = set().union(*(left.free_symbols | right.free_symbols for _, left, right in steps))
    if len(symbols) != 1:
        return None
    (symbol,) = symbols
    real = sympy.Symbol("real", real=True)
    kinds = {"<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "!=": sympy.Ne}
    try:
        solutions = sympy.S.Reals
        for sign, left, right in steps:
            solutions = solutions & kinds[sign](left.subs(symbol, real), right.subs(symbol, real)).as_set()
    except Exception:  # sympy raises several kinds for what it cannot solve
        return None
    return solutions


# Formulas: equality by value


def _same_formulas(a: Formula, g: Formula, rules: Rules) -> bool:
    decimal = a.decimals is not None or g.decimals is not None
    relative = (
        rules.relative
        if rules.relative and (decimal or (a.expression.is_Rational and g.expression.is_Rational))
        else 0.0
    )
    golds = [g.expression, *((g.expression / 100, g.expression * 100) if rules.hundredfold and _rational(a, g) else ())]
    if any(_equal(a.expression, gold, relative) for gold in golds):
        return True
    return not rules.relative and (_rounded(a, g) or _rounded(g, a))


def _rational(a: Formula, g: Formula) -> bool:
    return bool(a.expression.is_Rational and g.expression.is_Rational)


def _rounded(decimal: Formula, exact: Formula) -> bool:
    """Return whether a number of six or more decimals is an exact number, rounded or cut at its last one."""
    if decimal.decimals is None or decimal.decimals < 6 or exact.decimals is not None or not exact.expression.is_number:
        return False
    value = _number_at(exact.expression, {})
    if value is None or not value.is_real or value == 0:
        return False
    error = abs(_number_at(decimal.expression, {}) - value)
    return bool(error <= 10.0**-decimal.decimals and error <= 1e-5 * abs(value))


def _equal(a: Any, g: Any, relative: float) -> bool:
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
    for point in _points(symbols) if symbols else [{}]:
        x, y = _number_at(a, point), _number_at(g, point)
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


def _points(symbols: set[Any]) -> list[dict[Any, Any]]:
    """Return fixed values for variables: positive ones above and below 1, then negative ones."""
    import sympy

    generator = random.Random(0)
    names = sorted(symbols, key=str)
    ranges = [(1, 5)] * 3 + [(0, 1)] * 2 + [(-3, 3)] * 4 + [(-5, -1)] * 2

    def value(low: int, high: int) -> Any:
        return sympy.Rational(generator.randint(low * 997, high * 997) * 2 + 1, 1994)

    return [{name: value(*limits) for name in names} for limits in ranges]


def _number_at(expression: Any, point: dict[Any, Any]) -> Any:
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
