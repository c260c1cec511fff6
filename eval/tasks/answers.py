"""From a generation to its final answer, and the answer to a normal form: strings only, no mathematics.

The rules are those of the reference's evaluation (in the line of the MATH data set's public grading code and ToRA's).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from eval.maths.notation import LONGEST, clean, split_unit
from eval.tasks.strict import without_reasoning

NUMBER = re.compile(r"-?\d*\.?\d+")
_UNITS = (
    "degrees?|cm|mm|km|meters?|metres?|centimeters?|feet|foot|ft|inch|inches|miles?|yards?|units?|square|sq|cubic|"
    "seconds?|minutes?|hours?|days?|weeks?|months?|years?|dollars?|cents?|percent|mph|kph|grams?|kg|pounds?|ounces?|"
    "liters?|gallons?|people|students?|points?|ways|times"
)
_SHORT_UNITS = "m|s|g|h|l|L|ml|mL|min|sec|hr|hrs|rad|N|J|W|V|Hz"  # units only where the text is set upright
_WRAPPED_UNIT = re.compile(
    rf"(?<=[\w}})])\\?\s*\\(?:text|mbox|mathrm|textrm)\s*\{{\s*(?:{_UNITS}|{_SHORT_UNITS})(?:\s+(?:{_UNITS}))*\.?\s*\}}"
    r"(?:\^\{?\d\}?)?"
)
_BARE_UNIT = re.compile(rf"(?<=[\d}})])\s*(?:{_UNITS})(?:\s+(?:{_UNITS}))*(?:\^\{{?\d\}}?)?$")
_WRAPPER = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|textit)\s*\{([^{}]*)\}")
_LEADING_VARIABLE = re.compile(r"^\s*\\?[A-Za-z]{1,2}(?:_\{?\w\}?)?\s*(?:=|\\in(?![a-z]))\s*")


def extract(text: str) -> str:
    r"""Return the final answer of a generation or a gold solution, normalised; "" where it has none.

    First rule that applies: the "final answer is $...$. I hope" form, the last \boxed, the text after the last
    "he answer is", after the last "final answer is", the last number. Reasoning in <think> is no part of the answer.
    """
    text = without_reasoning(text)
    if "final answer is $" in text and "$. I hope" in text:
        answer = text.split("final answer is $", 1)[1].split("$. I hope", 1)[0].strip()
    elif "boxed" in text:
        answer = _boxed(text.split("boxed")[-1])
    elif "he answer is" in text:
        answer = text.split("he answer is")[-1].strip()
    elif "final answer is" in text:  # cannot follow the rule above it, kept because the reference lists it
        answer = text.split("final answer is")[-1].strip()
    else:
        numbers = NUMBER.findall(text.replace(",", ""))
        answer = numbers[-1] if numbers else ""
    answer = re.sub(r"\n\s*", " ", answer).strip().removeprefix(":").removesuffix(".").removesuffix("/")
    return normalise(answer)


def _boxed(rest: str) -> str:
    """Return the text after "boxed": the content of the balanced braces, or everything up to the next dollar sign."""
    rest = rest.lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:place]
    return rest[1:]


def normalise(answer: str) -> str:
    """Return the answer in normal form: one spelling for fractions, roots, spaces, degrees, percent and units."""
    if len(answer) > LONGEST:
        return answer.strip()
    text = _without_last_text(_without_stop(answer.strip().replace("\n", " ")))
    text, _ = split_unit(clean(text))
    if not re.search(r"(?<![A-Za-z\\])(?!and\b|or\b)[A-Za-z]{2,}", text):
        text = re.sub(r",?\s+(?:and|or)\s+", ",", text)
    text = re.sub(r"(?<![\d.}])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}", text)  # a mixed number
    text = re.sub(r"(?<!\\)\\[!,;:]|(?<!\\)\\[()]", "", text)  # spacing and inline-mathematics marks
    text = re.sub(r"(?<!\\)\\ ", " ", text)  # but not the row break of a matrix
    for old, new in (
        ("~", " "),
        ("{,}", ","),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("cfrac", "frac"),
        ("\\left", ""),
        ("\\right", ""),
        ("bmatrix", "pmatrix"),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\degree", ""),
        ("\\$", ""),
        ("$", ""),
        ("\\%", "%"),
    ):
        text = text.replace(old, new)
    text = re.sub(r"\{array\}(\{[lcr|]*\})?", "{pmatrix}", text)
    text = _WRAPPED_UNIT.sub("", text)
    text = _WRAPPER.sub(r"\1", text).strip()
    text = _BARE_UNIT.sub("", text)
    text = text.replace("%", "")
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    text = re.sub(r"(\d+\.\d*?)0+(?!\d)", r"\1", text)
    text = re.sub(r"(?<=\d)\.(?![\d.\\])", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text) if not re.search(r"[(\[{]", text) else text
    if text.count("=") == 1:
        text = _LEADING_VARIABLE.sub("", text)
    elif "\\in" in text:
        text = re.sub(r"^\s*[A-Za-z]\s*\\in(?![a-z])\s*", "", text)
    text = re.sub(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", "\\1\0", text).replace(" ", "").replace("\0", " ")
    text = text.replace("\u2212", "-").replace("\u03c0", "\\pi")
    text = re.sub(r"\\sqrt(?=[^{\[(])(\\[A-Za-z]+|.)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\a-z])sqrt\(?(\d+)\)?", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(\d)(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\\[A-Za-z]+)\s?(\w|\\[A-Za-z]+)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{\\])(\{[^{}]*\})", r"\\frac{\1}\2", text)
    text = re.sub(r"\\frac(\{[^{}]*\})([^{\\])", r"\\frac\1{\2}", text)
    text = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    return _without_stop(text)


def _without_stop(text: str) -> str:
    """Drop a full stop at the end; three dots stay."""
    return text if text.endswith("..") else text.rstrip(".").strip()


def _without_last_text(answer: str) -> str:
    r"""Drop a \text{...} at the end, as the reference does, where something is left in front of it."""
    shorter = re.sub(r"\s*\\text\s*\{[^{}]*\}(\$?)$", r"\1", answer)
    return shorter if shorter.strip(" $") else answer


def gold_of(doc: Mapping[str, str]) -> str:
    """The gold answer of an item: what follows #### in GSM8K, the answer extracted from the solution in MATH."""
    if "solution" in doc:
        return extract(doc["solution"])
    return normalise(doc["answer"].split("####")[-1])
