"""MATH as the `lm-eval` preset grades it: the final answer of a generation, compared as a mathematician would.

Nothing of the paper's leniency: no factor of 100, no digits of lists run together, no variables dropped. Formulas are
read by math-verify's grammar; structure, units and degenerate cases, where math-verify errs, by eval/maths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

from eval.maths.comparison import same_answers, unspaced
from eval.maths.notation import LONGEST, bare, clean

_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,8}")
_HOPE = re.compile(r"I hope it is correct", re.IGNORECASE)
_FINAL = re.compile(r"final answer is", re.IGNORECASE)
_STATED = re.compile(r"answer(?:\*\*|__)?\s{0,8}(?:is\b|:|=)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_PLAIN = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
_REASON = re.compile(r",?\s(?:because|since|as|so|which|where|when|not|i\.e\.|hence|therefore|thus)\b")
_CLOSERS = {"$$": "$$", "\\[": "\\]", "\\(": "\\)", "$": "$"}
_OPENER = re.compile(r"\$\$|\\\[|\\\(|\$|\\.", re.DOTALL)


def without_reasoning(text: str) -> str:
    """Return a generation without its <think>...</think>; "" where the reasoning that it begins with does not end."""
    end = text.rfind("</think>")
    if end >= 0:
        return text[end + len("</think>") :]
    return "" if text.lstrip().startswith("<think>") else text


def final_answer(text: str) -> str:
    r"""Return the final answer that a generation or a gold solution states, as it is written; "" where there is none.

    The first of: the last "final answer is ... I hope it is correct"; the last \boxed whose braces are balanced; what
    follows the last "answer is" or "answer:"; the last formula; the last number. Takes time linear in the text.
    """
    text = without_reasoning(text)
    hope = _last(_HOPE, text)
    final = _last(_FINAL, text[: hope.start()]) if hope else None
    if hope and final:
        return bare(text[final.end() : hope.start()].strip().removeprefix(":").strip().removesuffix("."))
    box = _last_box(text)
    if box is not None:
        return bare(box)
    statement = _last(_STATED, text)
    if statement:
        return bare(_statement(text[statement.end() :]))
    formula = next(_formulas_backwards(text), None)
    if formula is not None:
        return bare(formula)
    number = _last(_NUMBER, text)
    return number[0] if number else ""


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for match in pattern.finditer(text):
        last = match
    return last


def _last_box(text: str) -> str | None:
    r"""Return the content of the last \boxed or \fbox whose braces are balanced, or that stands before one token."""
    closing = _closing_braces(text)
    for box in reversed(list(_BOX.finditer(text))):
        start = box.end()
        if text[start : start + 1] != "{":
            token = re.compile(r"[^\s$\\{}]+").match(text, start)
            if token and token[0].rstrip(".,;"):
                return token[0].rstrip(".,;")
        elif start in closing:
            return text[start + 1 : closing[start]]
    return None


def _closing_braces(text: str) -> dict[int, int]:
    """Return where each brace that opens closes; braces with a backslash do not count."""
    closing: dict[int, int] = {}
    stack: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            stack.append(match.start())
        elif match[0] == "}" and stack:
            closing[stack.pop()] = match.start()
    return closing


def _statement(rest: str) -> str:
    """Return the answer from what follows "answer is": the first formula of its sentence, or the sentence."""
    rest = rest.lstrip(" :*_\n\t\r")
    line = rest.partition("\n")[0]
    if line.strip() in ("$$", "\\[", ""):
        line = rest[: 2 * LONGEST].replace("\n", " ")
    line = line[: 4 * LONGEST]
    line = re.sub(r"(?<![\w)])\*\*|\*\*(?![\w(])", "", line)  # bold text, but not a power
    sentence = re.split(r"(?<=[^.])\.(?:\s|$)", line, maxsplit=1)[0]
    sentence = re.sub(r"(?<=\w)\s{1,4}\([a-z][a-z -]+\)$", "", sentence)  # a number in words behind it
    formulas = list(_formulas(line))
    if not formulas:
        return _REASON.split(sentence, maxsplit=1)[0].strip().removesuffix("**").removesuffix(".")
    listed = re.fullmatch(r"(?:\s*(?:and|or|,|;|\\?\x00)\s*)+", _masked(sentence))
    return ", ".join(formulas) if listed and len(formulas) > 1 else formulas[0]


def _masked(sentence: str) -> str:
    """Return a sentence with each formula replaced by one mark."""
    parts, at = [], 0
    for start, end in _spans(sentence):
        parts += [sentence[at:start], "\0"]
        at = end
    return "".join([*parts, sentence[at:]])


def _formulas(text: str) -> Iterator[str]:
    """Yield what stands between the marks of inline and display mathematics, in order."""
    for start, end in _spans(text):
        marker = next(m for m in _CLOSERS if text.startswith(m, start))
        yield text[start + len(marker) : end - len(_CLOSERS[marker])]


def _formulas_backwards(text: str) -> Iterator[str]:
    return reversed(list(_formulas(text)))


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each formula with its marks; `$...$` lies on one line.

    Linear in the text: a closing mark that is missing once is not looked for again.
    """
    place = 0
    missing: set[str] = set()
    while True:
        opener = _OPENER.search(text, place)
        if opener is None:
            return
        marker = opener[0]
        place = opener.end()
        if marker not in _CLOSERS or marker in missing:
            continue
        end = _closer(text, place, marker)
        if end is None:
            if marker != "$":
                missing.add(marker)
            continue
        if text[place:end].strip():
            yield opener.start(), end + len(_CLOSERS[marker])
        place = end + len(_CLOSERS[marker])


def _closer(text: str, start: int, marker: str) -> int | None:
    """Return where a formula's closing mark stands; None where it is missing, for `$` on its line."""
    if marker != "$":
        end = text.find(_CLOSERS[marker], start)
        return end if end >= 0 else None
    for match in re.compile(r"\\.|[$\n]", re.DOTALL).finditer(text, start):
        if match[0] == "$":
            return match.start()
        if match[0] in ("\n", "\\\n"):
            return None
    return None


def quickly_verified(answer: str, gold: str) -> bool | None:
    """Decide by the string or as plain numbers; None where only mathematics can tell."""
    if max(len(answer), len(gold)) > LONGEST:
        return answer == gold
    a, g = clean(answer), clean(gold)
    if not a or not g:
        return False
    if unspaced(a) == unspaced(g):
        return True
    if not (_PLAIN.fullmatch(a) and _PLAIN.fullmatch(g)):
        return None
    return Decimal(a.replace(",", "")) == Decimal(g.replace(",", ""))


def verified(answer: str, gold: str) -> bool:
    """Return whether two final answers are equal; may take arbitrarily long, so that callers run it in a worker."""
    return same_answers(answer, gold)
