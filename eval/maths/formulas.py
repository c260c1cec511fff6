"""Formulas from text to sympy, by math-verify's grammar (latex2sympy2_extended), which only builds expressions.

No text is evaluated as Python. What the grammar would guess at (products of words, unknown commands, digits with spaces
between them) is not given to it.
"""

from __future__ import annotations

import re
from fractions import Fraction

from eval.maths.values import Formula

_WORDS_OF_TWO = ("no", "or", "is", "if", "in", "on")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
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


def formula(text: str) -> Formula | None:
    """Read a formula into sympy; None for what is none: words, unknown commands, undefined values."""
    import sympy

    text = text.strip()
    if _PLAIN.fullmatch(text):
        number = Fraction(text.rstrip("."))
        decimals = len(text.partition(".")[2]) if "." in text else None
        return Formula(sympy.Rational(number.numerator, number.denominator), decimals)
    source = None if text.lower() in _WORDS_OF_TWO else _source(text)
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
    if any(set(word) - set("xyzw") and word not in ("abc", "abcd") for word in WORD.findall(without)):
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
    text = re.sub(r"(?<![A-Za-z\\])I(?![A-Za-z_])", r"\\zeta_{99}", text)  # a name, not i as the grammar has it
    return re.sub(r"(?<![A-Za-z\\])([A-Za-eh-z])\s*\((?=[^()]*[-+])", r"\1 \\cdot (", text)


def _repeating_dots(text: str) -> str | None:
    r"""Read `0.333...` and `0.1666\ldots`; None for other formulas with what the grammar does not know."""
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
    r"""Read 1\frac{1}{4} as 1 + 1/4; a number before an improper fraction is a factor."""
    whole, above, below = match.groups()
    sign = "+" if int(above) < int(below) and whole != "0" else r" \cdot "
    return rf"({whole}{sign}\frac{{{above}}}{{{below}}})"


_ARGUMENTS = {"frac": 2, "sqrt": 1, "binom": 2}


class _Arguments:
    r"""Writes the arguments of \frac, \sqrt, \binom and of exponents in braces, as LaTeX reads them."""

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
            text = option[0].strip() if option else ""
            return f"\\{command[1]}{text}" + (
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
