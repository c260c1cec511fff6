"""The quickstart's three skills: items drawn at random, split by their content, written as JSON lines. No torch.

| skill    | prompt      | answer     | easy (most of what the base sees) | full (fine-tuning and every test) |
|----------|-------------|------------|-----------------------------------|-----------------------------------|
| addition | 74+53=      | 28         | the lowest digits do not carry    | any two two-digit numbers         |
| strings  | rev abcd=   | dcba       | 3-4 letters                       | 4-5 letters                       |
| brackets | ([{}<=      | >])        | 1-4 brackets                      | 5-9 brackets                      |

Numbers are written lowest digit first: 47 + 35 = 82 reads 74+53=28.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import FailureError

LETTERS = "abcdefghijklmnop"
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
COMMANDS: dict[str, Callable[[str], str]] = {
    "rev": lambda s: s[::-1],
    "dup": lambda s: s + s,
    "rot": lambda s: s[1:] + s[0],
}
SPLITS = ("train", "val", "test")
MAX_DRAWS = 1000  # in vain, before a split is called too small


@dataclass(frozen=True)
class Item:
    """One question. `key` is what decides its split: items with one key are the same question asked otherwise."""

    skill: str
    key: str
    prompt: str
    answer: str


def lowest_first(n: int) -> str:
    """Write `n` with its lowest digit first, so that a carry runs in reading order."""
    return str(n)[::-1]


def addition(rng: random.Random, full: bool) -> Item:
    """a+b for a and b in 10..99; a+b and b+a share a key, so that neither gives the other away."""
    while True:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        if full or a % 10 + b % 10 < 10:
            break
    prompt = f"{lowest_first(a)}+{lowest_first(b)}="
    return Item("addition", f"{min(a, b)}+{max(a, b)}", prompt, lowest_first(a + b))


def strings(rng: random.Random, full: bool) -> Item:
    """A command on a word; the word is the key, so that a tested word was never seen under any command."""
    word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(4, 5) if full else rng.randint(3, 4)))
    command = rng.choice(sorted(COMMANDS))
    return Item("strings", word, f"{command} {word}=", COMMANDS[command](word))


def brackets(rng: random.Random, full: bool) -> Item:
    """A line of open and closed brackets; the answer closes what is open, innermost first."""
    while True:
        line, waiting = "", ""
        for _ in range(rng.randint(5, 9) if full else rng.randint(1, 4)):
            if waiting and rng.random() < 0.3:
                line, waiting = line + waiting[0], waiting[1:]
            else:
                opening = rng.choice("([{<")
                line, waiting = line + opening, CLOSING[opening] + waiting
        if waiting:
            return Item("brackets", line, f"{line}=", waiting)


SKILLS: dict[str, Callable[[random.Random, bool], Item]] = {
    "addition": addition,
    "strings": strings,
    "brackets": brackets,
}
ALPHABET = "".join(
    sorted(set("0123456789+= " + LETTERS + "".join(COMMANDS) + "".join(k + v for k, v in CLOSING.items())))
)


def split_of(skill: str, key: str) -> str:
    """The split that owns an item: test 20 %, val 10 %, train the rest, by a hash of its content.

    It depends on nothing else, so the splits are disjoint whatever is drawn, with whatever seed.
    """
    bucket = int.from_bytes(hashlib.sha256(f"{skill}:{key}".encode()).digest()[:4], "big") % 10
    return "test" if bucket < 2 else "val" if bucket < 3 else "train"


def draw(skill: str, split: str, rng: random.Random, full: bool = True) -> Item:
    """Draw one item of `split` from the full or the easy distribution."""
    for _ in range(MAX_DRAWS):
        item = SKILLS[skill](rng, full)
        if split_of(skill, item.key) == split:
            return item
    raise FailureError(f"The {split} split of {skill} holds no such item; draw from the full distribution.")


def draw_distinct(skill: str, split: str, n: int, rng: random.Random) -> list[Item]:
    """Draw `n` different questions of `split` from the full distribution."""
    items: dict[str, Item] = {}
    misses = 0  # draws in a row that brought nothing new
    while misses < MAX_DRAWS:
        item = draw(skill, split, rng)
        misses = misses + 1 if item.prompt in items else 0
        items[item.prompt] = item
        if len(items) == n:
            return list(items.values())
    raise FailureError(f"The {split} split of {skill} holds fewer than {n} different questions; ask for fewer.")


def draw_mixture(
    n: int, rng: random.Random, mixture: Mapping[str, float], full_share: Mapping[str, float]
) -> list[Item]:
    """Draw `n` training items, each skill as often as `mixture` says and in full as often as `full_share` says."""
    chosen = rng.choices(list(mixture), list(mixture.values()), k=n)
    return [draw(skill, "train", rng, rng.random() < full_share[skill]) for skill in chosen]


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write one JSON object a line: skill, key, prompt, answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")
