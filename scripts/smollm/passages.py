"""Passages of real sentences that generated instructions are answered with. No torch."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.smollm.training_data import gsm8k_train

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
# Markup and symbols, references to a page's other parts, titles that look like a sentence's end, and requests.
UNFIT = re.compile(
    r"[^A-Za-z0-9 ,.!?'$%-]"
    r"|\b(see|section|chapter|version|above|below|following|e\.g|i\.e|etc|mr|mrs|ms|dr|calculate|determine|find)\b",
    re.IGNORECASE,
)
# A story's first word is its hero's name unless it is one of these.
NO_NAMES = (
    "A An The In On At If There After Before Every Each When While For One Two Three Four Five Six It He She They His",
    "Her Their As To Of All Some Since Today Yesterday During By From With This That Last Half Out Only Because Once",
    "How What Your You My I We Our Not Many Most",
)
FIRST_WORDS = frozenset(word for line in NO_NAMES for word in line.split())


@dataclass(frozen=True)
class Passage:
    """Two to five sentences on one topic, and ways to ask for them."""

    topic: str
    requests: tuple[str, ...]
    sentences: tuple[str, ...]


def good_sentences(prose: str) -> list[str]:
    """The sentences of `prose` that can stand in an answer: plain English of 5 to 30 words, no markup."""
    # The pages break lines inside hyphenated words.
    flat = re.sub(r"(?<=\w)- (?=[a-z])", "-", " ".join(prose.split())).replace('"', "").replace("\u2019", "'")
    sentences = []
    for sentence in SENTENCE_END.split(flat):
        ends_once = sentence.endswith((".", "!")) and not re.search(r"[.!?]", sentence[:-1].replace("...", ""))
        plain_numbers = not re.search(r"\d\.\d|\.\.\.", sentence)
        if sentence[:1].isupper() and ends_once and plain_numbers and not UNFIT.search(sentence):
            words = len(sentence.split())
            if 5 <= words <= 30:
                sentences.append(sentence)
    return sentences


def prose_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a reStructuredText page that are running text: not indented, no list, no heading."""
    for block in text.split("\n\n"):
        lines = block.strip("\n").split("\n")
        if not any(re.match(r"\s|[*=~^.-]|\d+\.", line) or "::" in line for line in lines):
            yield " ".join(lines)


def windows(sentences: Sequence[str], rng: random.Random) -> Iterator[tuple[str, ...]]:
    """Cut a run of sentences into groups of two to five; a single one left over is dropped."""
    start = 0
    while len(sentences) - start >= 2:
        group = tuple(dict.fromkeys(sentences[start : start + rng.randint(2, 5)]))
        start += len(group)
        if len(group) >= 2:
            yield group


def python_passages(rng: random.Random) -> list[Passage]:
    """Passages of the language reference that Python carries for its `help()` (PSF license)."""
    from pydoc_data.topics import topics

    passages = []
    for _, page in sorted(topics.items()):
        topic = page.strip().split("\n")[0].replace('"', "").strip()
        if not re.fullmatch(r"[A-Z][a-z]+( [A-Za-z]+)*", topic):
            continue
        topic = topic[0].lower() + topic[1:]
        requests = (
            f"Explain {topic} in Python.",
            f"What should I know about {topic} in Python?",
            f"Tell me about {topic} in the Python language.",
            f"Write a short note on {topic} for a Python programmer.",
        )
        for paragraph_group in grouped(good_sentences(p) for p in prose_paragraphs(page)):
            passages += [Passage(topic, requests, group) for group in windows(paragraph_group, rng)]
    return passages


def grouped(paragraphs: Iterable[list[str]]) -> Iterator[list[str]]:
    """Join neighbouring paragraphs until there are enough sentences for a passage."""
    run: list[str] = []
    for paragraph in paragraphs:
        run += paragraph
        if len(run) >= 5:
            yield run
            run = []
    if run:
        yield run


def story_passages(rng: random.Random, data_dir: Path | None) -> list[Passage]:
    """The little stories of GSM8K's training questions (MIT), without their questions."""
    passages = []
    for row in gsm8k_train(data_dir):
        good = good_sentences(row["question"])
        name = good[0].split()[0].removesuffix("'s") if good else ""
        if 2 <= len(good) <= 5 and name.isalpha() and name not in FIRST_WORDS:
            requests = (
                f"Tell me a short story about {name}.",
                f"Write a few sentences about {name}.",
                f"What happened to {name}? Make something up.",
                f"Write a small scene from the life of {name}.",
            )
            passages.append(Passage(name, requests, tuple(dict.fromkeys(good))))
    return [p for p in passages if len(p.sentences) >= 2]
