"""One notation for maths answers: Unicode signs, Markdown, LaTeX fonts and spaces, units. Strings only, no mathematics.

Nothing here changes what an answer says; each rule maps spellings that are set or read alike onto one of them. Every
function takes time linear in its input, up to a bounded number of passes.
"""

from __future__ import annotations

import re

LONGEST = 1000
"""Characters of the longest answer that is read; a longer one only equals the same string."""

_SIGNS = {
    **dict.fromkeys("−‒–—－", "-"),
    **dict.fromkeys("\xa0\u2002\u2003\u2009\u200a\u202f\u3000\t\r\n", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    **dict.fromkeys("\u2018\u2019\u2032", "'"),
    **dict.fromkeys("\u201c\u201d", '"'),
    "\u00d7": r"\times ", "\u00f7": "/", "\u2215": "/", "\u2044": "/", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
    "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b1": r"\pm ", "\u2213": r"\mp ",
    "\u221e": r"\infty ", "\u00b0": r"^\circ ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ",
    "\u2205": r"\emptyset ", "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u2026": r"\ldots ",
    "\u03c0": r"\pi ", "\u03b1": r"\alpha ", "\u03b2": r"\beta ", "\u03b3": r"\gamma ", "\u03b4": r"\delta ",
    "\u03b8": r"\theta ", "\u03bb": r"\lambda ", "\u03bc": r"\mu ", "\u03c6": r"\phi ", "\u03c3": r"\sigma ",
    "\u03c9": r"\omega ", "\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}",
    "\u2153": r"\frac{1}{3}", "\u2154": r"\frac{2}{3}",
    "\u00a2": " cents",
    "\u27e8": r"\langle ", "\u27e9": r"\rangle ", "\uff1a": ":", "\uff0c": ",", "\uff08": "(", "\uff09": ")",
}  # fmt: skip
_UNICODE = str.maketrans(_SIGNS)
_ROOT = re.compile(r"\u221a(?:\(([^()]*)\)|(\d+|[A-Za-z]))")
_FENCES = (
    ("$$", "$$"),
    ("\\[", "\\]"),
    ("\\(", "\\)"),
    ("$", "$"),
    ("**", "**"),
    ("__", "__"),
    ("*", "*"),
    ("`", "`"),
    ('"', '"'),
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SIZES = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?)(?![A-Za-z])"
)
_NAMES = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge",
    "neq": "ne", "lt": "<", "gt": ">", "land": " and ", "wedge": " and ", "lor": " or ", "vee": " or ",
    "varnothing": "emptyset", "div": "/", "ast": "cdot", "colon": ":", "mid": "|", "vert": "|", "lvert": "|",
    "rvert": "|", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "dots": "ldots", "cdots": "ldots",
    "degree": "^\\circ", "varphi": "phi", "quad": " ", "qquad": " ", "implies": "\\Rightarrow", "to": "\\to",
    "arcsin": "arcsin", "bmatrix": "pmatrix", "euro": " euro ", "textdollar": "\\$", "dollar": "\\$",
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_ROMAN = re.compile(r"\\(?:mathrm|mathbf|mathit|mathsf|mathnormal|boldsymbol|bm|bf|rm|operatorname)\*?\s*\{([^{}]*)\}")
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|textsf|textnormal|mbox|hbox|emph)\*?\s*\{([^{}]*)\}")
_JOINED = re.compile(r"(?<=\d)(?:,\s{0,3}\\!\s{0,3}|\{,\}\s{0,3}|\s{0,3}\\[,;:!]\s{0,3}|~)(?=\d{3}(?!\d))")
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")


def clean(answer: str) -> str:
    """Return an answer in one notation; words, units and single spaces stay.

    Without the marks of formulas, boxes and Markdown around it, sizes of brackets and fractions, fonts and spacing;
    Unicode signs become LaTeX commands, a degree sign the word, and a final full stop goes.
    """
    text = answer[: LONGEST + 1].translate(_UNICODE)
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = bare(text)
    if re.sub(r"\\\$", "", text).count("$") % 2 == 0:  # formulas within the answer, not money
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = _SIZES.sub("", text)
    text = re.sub(r"\{([^{}\\]*)\\choose([^{}\\]*)\}", r"\\binom{\1}{\2}", text)
    text = _COMMAND.sub(_renamed, text)
    text = _JOINED.sub("", text)
    text = re.sub(r"(?<!\\)\\\\(?=\s*\\end)", "", text)  # a row break behind the last row
    text = re.sub(r"\\begin\s*\{(?:bmatrix|array|matrix)\}(?:\s*\{[lcr| ]*\})?", r"\\begin{pmatrix}", text)
    text = re.sub(r"\\end\s*\{(?:bmatrix|array|matrix)\}", r"\\end{pmatrix}", text)
    text = re.sub(r"\(\s*(\\begin\{pmatrix\}.*\\end\{pmatrix\})\s*\)", r"\1", text)
    text = re.sub(r"(?<!\\)((?:\\\\)*)(?:\\[,!;: ]|~|\\hspace\s*\{[^{}]*\})", r"\1 ", text)
    for _ in range(3):  # a font within a font
        text = _TEXT.sub(r" \1 ", _ROMAN.sub(r"\1", text))
    text = re.sub(r"\\%|\bper\s?cent\b", "%", text)
    text = _DEGREES.sub(" degrees ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return bare(text.strip(" ;,"))


def _renamed(match: re.Match[str]) -> str:
    name = _NAMES.get(match[1])
    if name is None:
        return match[0]
    return f"\\{name} " if name.isalpha() and name not in ("frac",) else f"\\{name}" if name.isalpha() else name


def bare(answer: str) -> str:
    """Return an answer without the marks of formulas, boxes and Markdown around all of it, and a final full stop."""
    text = answer.strip()
    for _ in range(8):
        before = text
        text = text.rstrip(".").strip() if not text.endswith("..") else text
        for opening, closing in _FENCES:
            inside = text[len(opening) : -len(closing)]
            if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
                if opening in inside.replace("\\" + opening, "") or text.endswith("\\" + closing):
                    continue
                text = inside.strip()
                break
        box = _BOX.match(text)
        if box and closing_brace(text, box.end() - 1) == len(text) - 1:
            text = text[box.end() : -1].strip()
        if text == before:
            break
    return text


def closing_brace(text: str, start: int) -> int | None:
    """Return where the brace that opens at `start` closes; escaped braces do not count. None where it does not."""
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


_UNIT_NAMES = {
    "cm": "cm", "centimeter": "cm", "centimetre": "cm", "mm": "mm", "millimeter": "mm", "millimetre": "mm",
    "km": "km", "kilometer": "km", "kilometre": "km", "meter": "m", "metre": "m", "m": "m", "inch": "in",
    "inches": "in", "in": "in", "foot": "ft", "feet": "ft", "ft": "ft", "yard": "yd", "yd": "yd", "mile": "mi",
    "mi": "mi", "second": "s", "sec": "s", "s": "s", "minute": "min", "min": "min", "hour": "h", "hr": "h", "h": "h",
    "gram": "g", "g": "g", "kg": "kg", "kilogram": "kg", "pound": "lb", "lb": "lb", "ounce": "oz", "oz": "oz",
    "liter": "l", "litre": "l", "l": "l", "ml": "ml", "milliliter": "ml", "gallon": "gal", "degree": "degree",
    "deg": "degree", "dollar": "dollar", "usd": "dollar", "buck": "dollar", "cent": "cent", "euro": "euro",
    "radian": "rad", "rad": "rad", "newton": "n", "n": "n", "joule": "j", "j": "j", "watt": "w", "w": "w",
    "volt": "v", "v": "v", "hertz": "hz", "hz": "hz", "day": "day", "week": "week", "month": "month", "year": "year",
    "yr": "year", "people": "person", "person": "person", "children": "child", "men": "man", "women": "woman",
}  # fmt: skip
_COMPOUND = {
    "mph": ("mi", "per", "h"),
    "kph": ("km", "per", "h"),
    "kmh": ("km", "per", "h"),
    "km/h": ("km", "per", "h"),
}
_NO_UNIT = frozenset(
    (
        *("and", "or", "if", "for", "when", "where", "mod", "modulo", "to", "than", "less", "more", "plus", "minus"),
        *("over", "is", "are", "not", "no", "choose", "divided", "multiplied", "equals", "but", "with", "without"),
        *("sin", "cos", "tan", "cot", "csc", "log", "ln", "exp", "pi", "sqrt", "infty", "base", "infinity"),
        *("am", "pm", "a.m", "p.m", "times", "squared", "cubed", "through", "between", "except", "all", "any", "each"),
        *("thousand", "million", "billion", "hundred", "dozen", "half", "quarter", "percent", "st", "nd", "rd", "th"),
        *("by", "approximately", "about"),
    )
)
_WORDS = re.compile(r"(?<![A-Za-z\\])(?<!\\[A-Za-z])[A-Za-z]{3,}")
_MONEY = re.compile(r"^([-+]?)\s*(?:\\?\$|USD\s|US\\?\$|\u20ac|\u00a3)\s*(?=[\d.])")
_TAIL = re.compile(
    r"(?:(?<=[\d)\}\]!%])|(?<=\\pi)|(?<=\w )|(?<=[\d)\}\]!%] ))"
    r"\s*((?:[A-Za-z][A-Za-z.]*(?:\s*\^\s*\{?-?\d\}?|[23](?!\d))?(?:\s*[/\u00b7]\s*|\s+|$))+)$"
)


def split_unit(text: str) -> tuple[str, tuple[str, ...]]:
    """Split a cleaned answer into its value and the words of its unit: `73 dollars per day` -> `73`, ("dollar", ...).

    A unit is any phrase of words behind a number or formula with one, money signs before it included; a word of
    arithmetic or logic in it (`5 less than x`) makes the whole no quantity. Returns the text and () where none is.
    """
    money = _MONEY.match(text)
    if money:
        value, unit = split_unit(money[1] + text[money.end() :])
        return value, unit or ("dollar" if "$" in money[0] or "USD" in money[0] else money[0].strip(),)
    for match in re.finditer(r"(?<![A-Za-z\\])(?<!\\[A-Za-z])[A-Za-z]", text):
        tail = _TAIL.match(text, match.start())
        if tail is None:
            continue
        value = text[: match.start()].strip()
        if (
            not re.search(r"\d|\\pi", value)
            or _WORDS.search(value)
            or re.search(r"[-+*/=<>,^_({\[|]$|\\(?:cdot|times|frac|sqrt|pm|le|ge)$", value)
        ):
            continue
        words = _words(tail[1], spaced=text[match.start() - 1] == " ")
        return (value, words) if words else (text, ())
    return text, ()


def _words(phrase: str, spaced: bool) -> tuple[str, ...]:
    """Return the canonical words of a unit phrase; () where it is none."""
    phrase = phrase.strip().rstrip(".")
    if phrase.lower() in _COMPOUND:
        return _COMPOUND[phrase.lower()]
    words: list[str] = []
    power = ""
    for token in re.findall(r"[A-Za-z.]+(?:\s*\^\s*\{?-?\d\}?|[23](?!\d))?|[/\u00b7]", phrase):
        if token in "/\u00b7":
            words.append("per" if token == "/" else "of")
            continue
        word, _, exponent = token.replace(" ", "").partition("^")
        if word[-1] in "23":
            word, exponent = word[:-1], word[-1]
        word = word.lower().strip(".")
        if word in _NO_UNIT:
            return ()
        if word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word.startswith("sq") else "^3"
            continue
        name = _UNIT_NAMES.get(word) or _UNIT_NAMES.get(word.removesuffix("s")) or word
        if len(word) == 1 and ((name == word and word not in _UNIT_NAMES) or not spaced):
            return ()
        if name == word and len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
            name = word[:-1]
        exponent = exponent.strip("{}")
        words.append(name + (f"^{exponent}" if exponent else power))
        power = ""
    if power:
        words.append(power)
    if not spaced and not all(word.partition("^")[0] in set(_UNIT_NAMES.values()) | {"per", "of"} for word in words):
        return ()
    return tuple(words)


def units_agree(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    """Return whether two units may be of one answer: alike, one missing, or one with words the other leaves out.

    `dollars` agrees with `dollars per day`; `cm` neither with `m` nor with `square cm`.
    """
    one, other = ({word for word in words if word != "unit"} for words in (first, second))
    one, other = (
        {w for w in words if not w.startswith("^") and w != "unit^2" and w != "unit^3"} for words in (one, other)
    )
    return one <= other or other <= one
