"""The quickstart's family: honest splits, the same bytes for a seed, checkpoints and tasks that load."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from common.errors import FailureError, UsageError
from scripts.quickstart.family import FAST, TASK_SOURCES, Family, main, make_family, parser
from scripts.quickstart.skills import ALPHABET, SKILLS, SPLITS, draw, draw_distinct, split_of
from scripts.quickstart.training import BOS, EOS, PAD, VOCABULARY, Schedule, Shape, make_tokenizer, orthogonalise

TINY = replace(
    FAST,
    shape=Shape(hidden=32, layers=1, heads=2),
    base=Schedule(steps=6, batch=8, rate=3e-3, muon_rate=0.02),
    finetune=dict.fromkeys(SKILLS, Schedule(steps=3, batch=8, rate=1e-3)),
    n_items={"train": 40, "val": 10, "test": 20},
    n_texts=30,
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("quickstart") / "family", seed=3, quiet=True, recipe=TINY)


def rows(family: Family, skill: str, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (family.items / skill / f"{split}.jsonl").read_text().splitlines()]


def fingerprints(folder: Path) -> dict[str, str]:
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.parent.name != "tasks"]
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def right_answer(skill: str, prompt: str) -> str:
    """The answer, found another way than by the code that made the question."""
    question = prompt.removesuffix("=")
    if skill == "addition":
        a, b = (int("".join(reversed(n))) for n in question.split("+"))
        return "".join(reversed(str(a + b)))
    if skill == "strings":
        command, word = question.split(" ")
        n = len(word)
        order = {"rev": range(n - 1, -1, -1), "dup": [*range(n), *range(n)], "rot": [*range(1, n), 0]}[command]
        return "".join(word[i] for i in order)
    closed = question
    while any(pair in closed for pair in ("()", "[]", "{}", "<>")):
        for pair in ("()", "[]", "{}", "<>"):
            closed = closed.replace(pair, "")
    return closed[::-1].translate(str.maketrans("([{<", ")]}>"))


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_are_disjoint(skill: str, family: Family) -> None:
    """No question's content is in two splits: in the files by item, and for all draws because content decides."""
    keys = {split: {row["key"] for row in rows(family, skill, split)} for split in SPLITS}
    assert not (keys["train"] & keys["val"])
    assert not (keys["train"] & keys["test"])
    assert not (keys["val"] & keys["test"])
    for split in SPLITS:
        assert {split_of(skill, key) for key in keys[split]} == {split}
        assert len({row["prompt"] for row in rows(family, skill, split)}) == TINY.n_items[split]
    rng = random.Random(0)
    assert {split_of(skill, draw(skill, "train", rng, full).key) for full in (True, False) for _ in range(500)} == {
        "train"
    }


def test_questions_asked_otherwise_share_a_split() -> None:
    """a+b and b+a have one key, and so does a word under each command."""
    keys: dict[str, set[str]] = {}
    rng = random.Random(0)
    for _ in range(4000):
        a, b = draw("addition", "train", rng).prompt.rstrip("=").split("+")
        keys.setdefault("+".join(sorted((a, b))), set()).add(split_of("addition", "+".join(sorted((a[::-1], b[::-1])))))
        item = draw("strings", "test", rng)
        assert item.key == item.prompt.split()[1].rstrip("=")
    assert all(found == {"train"} for found in keys.values())


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_right_and_reachable(skill: str, family: Family) -> None:
    """Every gold answer equals an independent computation, and the tokenizer encodes each of its characters."""
    tokenizer = make_tokenizer()
    for split in SPLITS:
        for row in rows(family, skill, split):
            assert row["answer"] == right_answer(skill, row["prompt"])
            ids = tokenizer(row["prompt"] + row["answer"], add_special_tokens=False)["input_ids"]
            assert len(ids) == len(row["prompt"] + row["answer"])
            assert min(ids) > VOCABULARY[EOS]
            assert len(row["answer"]) < 12  # and the end token: within the tasks' max_gen_toks


def test_same_seed_same_bytes(family: Family, tmp_path: Path) -> None:
    """The same seed gives the same bytes in every file (tasks name their folder); another seed gives others."""
    again = make_family(tmp_path / "again", seed=3, quiet=True, recipe=TINY)
    other = make_family(tmp_path / "other", seed=4, quiet=True, recipe=TINY)
    first = fingerprints(family.base.parent)
    assert first == fingerprints(again.base.parent)
    assert len(first) == 4 * 5 + 9 + 2
    for name in ("base/model.safetensors", "addition/model.safetensors", "items/strings/test.jsonl"):
        assert first[name] != fingerprints(other.base.parent)[name]


def test_checkpoints_load(family: Family) -> None:
    """Each checkpoint is a whole bf16 Llama of transformers that differs from its base, with its tokens set."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = load_file(family.base / "model.safetensors")
    assert {t.dtype for t in base.values()} == {torch.bfloat16}
    for folder in (family.base, *family.models.values()):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert tokenizer.is_fast
        for name, token in {"pad": PAD, "bos": BOS, "eos": EOS}.items():
            assert getattr(tokenizer, f"{name}_token") == token
            assert getattr(model.generation_config, f"{name}_token_id") == VOCABULARY[token]
        tensors = load_file(folder / "model.safetensors")
        assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in base.items()}
        moved = [name for name in base if not torch.equal(base[name], tensors[name])]
        assert bool(moved) == (folder != family.base)


def test_tokenizer_round_trips(family: Family) -> None:
    """A saved tokenizer gives back every text of the alphabet, one token a character after <s>."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family.base)
    texts = [json.loads(line)["text"] for line in family.calibration.read_text().splitlines()]
    assert len(texts) == TINY.n_texts
    for text in (ALPHABET, *texts):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert len(ids) == 1 + len(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tasks_point_at_the_items(family: Family) -> None:
    """Each written task is its source with absolute paths of files that are there."""
    assert {f.stem for f in family.tasks.iterdir()} == set(SKILLS) == {f.stem for f in TASK_SOURCES.glob("*.yaml")}
    for skill, name in family.task_names.items():
        task = yaml.safe_load((family.tasks / f"{skill}.yaml").read_text())
        assert task["task"] == name
        for path in task["dataset_kwargs"]["data_files"].values():
            assert Path(path).is_absolute()
            assert Path(path).is_file()


def test_lm_eval_accepts_the_tasks(family: Family) -> None:
    """lm-eval reads each task and asks its questions as they are written, answers beside them."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    for skill in SKILLS:
        task = ConfigurableTask(config=yaml.safe_load((family.tasks / f"{skill}.yaml").read_text()))
        docs = list(task.test_docs())
        assert [task.doc_to_text(d) for d in docs] == [row["prompt"] for row in rows(family, skill, "test")]
        assert [task.doc_to_target(d) for d in docs] == [row["answer"] for row in rows(family, skill, "test")]
        assert task.process_results(docs[0], [docs[0]["answer"]]) == {"exact_match": 1.0}


def test_orthogonalise_evens_singular_values() -> None:
    """Muon's step brings every singular value of a matrix to between 0.5 and 1.5, tall or wide."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 24, 8), (2, 8, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert 0.5 < float(values.min()) <= float(values.max()) < 1.5


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    """A folder that holds something is refused and left as it was, with --overwrite too unless it is a family."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        make_family(tmp_path, quiet=True, recipe=TINY)
    with pytest.raises(UsageError, match="not empty"):
        main(["--save_path", str(tmp_path), "--overwrite", "--quiet"])
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_family_is_replaced_only_when_asked(tmp_path: Path) -> None:
    """A family is refused without `overwrite` and replaced whole with it, leaving nothing else beside it."""
    folder = tmp_path / "family"
    make_family(folder, seed=3, quiet=True, recipe=TINY)
    with pytest.raises(UsageError, match="--overwrite"):
        make_family(folder, seed=5, quiet=True, recipe=TINY)
    assert json.loads((folder / "family.json").read_text())["seed"] == 3
    make_family(folder, seed=5, quiet=True, overwrite=True, recipe=TINY)
    assert json.loads((folder / "family.json").read_text())["seed"] == 5
    assert [f.name for f in tmp_path.iterdir()] == ["family"]


def test_small_split_is_refused() -> None:
    """Asking for more different questions than a split holds ends in a sentence, not in an endless loop."""
    with pytest.raises(FailureError, match="fewer than 8100"):
        draw_distinct("addition", "test", 90 * 90, random.Random(0))


def test_flags_have_defaults() -> None:
    """The script runs without flags."""
    assert parser().parse_args([]).seed == 42
