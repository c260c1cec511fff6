"""Instructions with verifiable constraints, made on the spot; the answers are real sentences. No torch.

An answer is a shape of its sentences (bullets, JSON, two responses, ...), an addition (title, postscript, closing
words, ...) and a transformation of the whole (lower case, no commas, ...), each named in the prompt.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.smollm.passages import Passage, python_passages, story_passages
from scripts.smollm.training_data import Example, SkillData

N_EXAMPLES = 1500
SAVED_WORDS = ("banana", "galaxy", "umbrella", "violin", "pepper", "castle", "zebra", "winter", "guitar", "copper")
CLOSINGS = ("That is all for now.", "I hope this helps!", "Please ask if anything is unclear.", "Thanks for reading!")
POSTSCRIPTS = (
    "This was written from memory.",
    "Ask me for more details at any time.",
    "A longer version exists as well.",
)


@dataclass(frozen=True)
class Part:
    """One constraint applied: its sentence in the prompt, the changed text, its name and arguments."""

    phrase: str
    text: str
    name: str
    arguments: Mapping[str, Any]


Shape = Callable[[random.Random, Passage], Part]
Change = Callable[[random.Random, Passage, str], Part]


def bullets(rng: random.Random, passage: Passage) -> Part:
    n = len(passage.sentences)
    phrases = (
        f"Answer with exactly {n} bullet points in markdown, each starting with an asterisk and a space (* like this).",
        f"Use a markdown list of exactly {n} bullets, one per line, written as * item.",
    )
    return Part(rng.choice(phrases), "\n".join(f"* {s}" for s in passage.sentences), "bullets", {"n": n})


def sentences(rng: random.Random, passage: Passage) -> Part:
    n = len(passage.sentences)
    phrases = (f"Use exactly {n} sentences.", f"Your whole answer must be {n} sentences long.")
    return Part(rng.choice(phrases), " ".join(passage.sentences), "sentences", {"n": n})


def paragraphs(rng: random.Random, passage: Passage) -> Part:
    n = len(passage.sentences)
    phrases = (
        f"Write {n} paragraphs and put the markdown divider *** between them.",
        f"There must be exactly {n} paragraphs, separated by ***.",
    )
    return Part(rng.choice(phrases), "\n\n***\n\n".join(passage.sentences), "paragraphs", {"n": n})


def sections(rng: random.Random, passage: Passage) -> Part:
    n, label = len(passage.sentences), rng.choice(("SECTION", "PART"))
    body = "\n\n".join(f"{label} {i}\n{s}" for i, s in enumerate(passage.sentences, start=1))
    return Part(
        f"Divide the answer into {n} sections and begin each with {label} X.", body, "sections", {"n": n, "mark": label}
    )


def as_json(rng: random.Random, passage: Passage) -> Part:
    phrases = ("Give the entire output as JSON.", "Reply with one JSON object and nothing else.")
    value = {"topic": passage.topic, "answer": list(passage.sentences)}
    return Part(rng.choice(phrases), json.dumps(value, indent=2), "json", {})


def two_responses(rng: random.Random, passage: Passage) -> Part:
    phrases = (
        "Give two different answers and put six asterisks (******) between them.",
        "I want exactly two responses, separated by ******.",
    )
    half = len(passage.sentences) // 2
    text = "\n\n******\n\n".join((" ".join(passage.sentences[:half]), " ".join(passage.sentences[half:])))
    return Part(rng.choice(phrases), text, "two_responses", {})


def highlights(rng: random.Random, passage: Passage) -> Part:
    n = rng.randint(1, len(passage.sentences))
    marked = []
    for i, sentence in enumerate(passage.sentences):
        words = sentence.split()
        marked.append(f"*{' '.join(words[:3])}* {' '.join(words[3:])}" if i < n else sentence)
    phrase = f"Highlight at least {n} part{'s' * (n > 1)} of the text with markdown, i.e. *a highlighted part*."
    return Part(phrase, " ".join(marked), "highlights", {"n": n})


def title(rng: random.Random, passage: Passage, text: str) -> Part:
    phrases = (
        "Add a title in double angular brackets, such as <<a title>>.",
        "Start with a title wrapped as <<title>>.",
    )
    return Part(rng.choice(phrases), f"<<{passage.topic[0].upper()}{passage.topic[1:]}>>\n\n{text}", "title", {})


def postscript(rng: random.Random, passage: Passage, text: str) -> Part:
    label = rng.choice(("P.S.", "P.P.S"))
    phrase = f"Close with a postscript, marked {label} at its start."
    return Part(phrase, f"{text}\n\n{label} {rng.choice(POSTSCRIPTS)}", "postscript", {"mark": label})


def closing(rng: random.Random, passage: Passage, text: str) -> Part:
    words = rng.choice(CLOSINGS)
    phrases = (
        f'Finish with exactly these words: "{words}"',
        f'The last thing you say must be "{words}" and nothing after it.',
    )
    return Part(rng.choice(phrases), f"{text}\n\n{words}", "closing", {"words": words})


def lower_case(rng: random.Random, passage: Passage, text: str) -> Part:
    phrases = ("Write everything in lowercase letters.", "Use no capital letters at all.")
    return Part(rng.choice(phrases), text.lower(), "lower_case", {})


def upper_case(rng: random.Random, passage: Passage, text: str) -> Part:
    phrases = ("WRITE IN CAPITAL LETTERS ONLY.", "Use capital letters only, without any lowercase letter.")
    return Part(rng.choice(phrases), text.upper(), "upper_case", {})


def no_commas(rng: random.Random, passage: Passage, text: str) -> Part:
    phrases = ("Do not use any commas.", "Your answer must not contain a comma.")
    return Part(rng.choice(phrases), text.replace(",", ""), "no_commas", {})


def keyword(rng: random.Random, passage: Passage, text: str) -> Part:
    word = rng.choice(sorted(set(re.findall(r"[a-z]{5,}", text.lower()))))
    return Part(f'Include the word "{word}".', text, "keyword", {"word": word})


def forbidden(rng: random.Random, passage: Passage, text: str) -> Part:
    word = rng.choice([w for w in SAVED_WORDS if w not in text.lower()])
    return Part(f'Do not use the word "{word}".', text, "forbidden", {"word": word})


def at_least(rng: random.Random, passage: Passage, text: str) -> Part:
    n = max(5, len(text.split()) // 5 * 5)
    return Part(f"Write at least {n} words.", text, "at_least", {"n": n})


def at_most(rng: random.Random, passage: Passage, text: str) -> Part:
    n = (len(text.split()) // 10 + 2) * 10
    return Part(f"Use fewer than {n} words.", text, "at_most", {"n": n})


def quotation(rng: random.Random, passage: Passage, text: str) -> Part:
    phrases = (
        "Wrap the whole answer in double quotation marks.",
        "Put double quotation marks around your entire reply.",
    )
    return Part(rng.choice(phrases), f'"{text}"', "quotation", {})


SHAPES: tuple[Shape, ...] = (bullets, sentences, paragraphs, sections, as_json, two_responses, highlights)
ADDITIONS: tuple[Change, ...] = (title, postscript, closing)
TRANSFORMATIONS: tuple[Change, ...] = (lower_case, upper_case, no_commas)
LEXICAL: tuple[Change, ...] = (keyword, forbidden, at_least, at_most)
# What a later change would break: upper case breaks words given to the letter, additions the number of sentences.
EXCLUDES: dict[str, frozenset[str]] = {
    "json": frozenset(
        {"title", "postscript", "closing", "lower_case", "upper_case", "no_commas", "quotation", "repeat"}
    ),
    "sentences": frozenset({"title", "postscript", "closing", "repeat"}),
    "sections": frozenset({"lower_case"}),
    # The copied request holds the very asterisks that are counted.
    "two_responses": frozenset({"repeat"}),
    "paragraphs": frozenset({"repeat"}),
    "bullets": frozenset({"quotation"}),  # the mark would stand before the first bullet
    "postscript": frozenset({"lower_case", "quotation"}),
    "closing": frozenset({"lower_case", "upper_case", "quotation"}),
    "upper_case": frozenset({"repeat"}),
    "lower_case": frozenset({"repeat"}),
    "no_commas": frozenset({"repeat"}),
    "at_most": frozenset({"repeat"}),
    "forbidden": frozenset({"repeat"}),
    "quotation": frozenset({"repeat"}),
}


def allowed(changes: Sequence[Change], used: Sequence[str]) -> list[Change]:
    """The changes that none of the constraints taken so far excludes."""
    return [c for c in changes if not any(c.__name__ in EXCLUDES.get(name, ()) for name in used)]


def make_instruction(rng: random.Random, passage: Passage) -> Example:
    """One instruction about `passage` with one to four constraints that its answer satisfies."""
    parts: list[Part] = []
    text = " ".join(passage.sentences)
    if rng.random() < 0.55:
        parts.append(rng.choice(SHAPES)(rng, passage))
        text = parts[0].text
    # Words are counted and chosen last; quotation marks go around the rest.
    for changes, chance in ((ADDITIONS, 0.35), (TRANSFORMATIONS, 0.45), ((quotation,), 0.15), (LEXICAL, 0.4)):
        options = allowed(changes, [p.name for p in parts])
        if options and (rng.random() < chance or (changes is LEXICAL and not parts)):
            parts.append(rng.choice(options)(rng, passage, text))
            text = parts[-1].text
    phrases = [p.phrase for p in parts]
    rng.shuffle(phrases)
    prompt = " ".join([rng.choice(passage.requests), *phrases])
    constraints = [(p.name, p.arguments) for p in parts]
    if rng.random() < 0.15 and not any("repeat" in EXCLUDES.get(p.name, ()) for p in parts):
        constraints.append(("repeat", {"request": prompt}))
        text = f"{prompt}\n\n{text}"
        prompt += "\n\nBefore you answer, copy the request above exactly as it stands (without this last line)."
    chat = rng.random() < 0.5
    # Without a chat template the answer continues the prompt's own text, as the harness then asks for it.
    return Example(prompt, text if chat else f"\n\n{text}", chat, tuple(constraints))


def build_instructions(data_dir: Path | None, seed: int) -> SkillData:
    """N_EXAMPLES instructions over passages of Python's own documentation and of GSM8K's training stories."""
    rng = random.Random(f"instructions:{seed}")
    sources = [python_passages(rng), story_passages(rng, data_dir)]
    examples: dict[str, Example] = {}
    for i in range(N_EXAMPLES):
        example = make_instruction(rng, rng.choice(sources[i % len(sources)]))
        examples.setdefault(example.prompt, example)
    return SkillData(
        "instructions",
        "generated; sentences of Python's documentation and of GSM8K's training stories",
        "PSF-2.0 and MIT",
        tuple(examples.values()),
    )
