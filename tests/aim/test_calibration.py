"""Laws of the calibration text: which texts are taken, in which order, how they are cut, and what is refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim.calibration.config import PILE, Calibration, contradiction, shares
from aim.calibration.flags import add_calibration_flags, calibration_of
from aim.calibration.packing import Sample, cut, summary
from aim.calibration.text_sources import load_texts
from common.errors import CalibrationError, UsageError
from tests.helpers.hub_server import Repo, running_hub


class Words:
    """A tokenizer of one id per word (its length), with a first token 1, as Llama's has."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return 1 and the words' lengths."""
        return [1] * add_special_tokens + [len(word) for word in text.split()]


def sample_of(source: Any, tokenizer: Any = None, **settings: Any) -> Sample:
    """Load and cut what a calibration asks for."""
    calibration = Calibration(source if isinstance(source, tuple) else str(source), **settings)
    calibration.check()
    return cut(load_texts(calibration), tokenizer or Words(), calibration)


def write_rows(file: Path, rows: Sequence[Any]) -> Path:
    """Write rows as the file's kind has them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".txt":
        file.write_text("\n\n".join(row["text"] for row in rows))
    elif file.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".zst":
        import zstandard

        file.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pile_rows(count: int = 440) -> list[dict[str, Any]]:
    """Rows like the Pile's: texts of 1 to 800 words, blanks around them, one of blanks alone."""
    lengths = np.random.default_rng(0).integers(1, 800, count)
    rows = [{"text": f" {'w ' * n}id{i}\n", "meta": {"pile_set_name": "x"}} for i, n in enumerate(lengths)]
    rows[int(np.random.default_rng(42).permutation(count)[3])]["text"] = " \n"
    return rows


def reference(texts: Sequence[str], n_samples: int = 256, block_size: int = 512) -> tuple[list[int], list[list[int]]]:
    """The published recipe, written again from its description: the kept rows and the blocks."""
    rows, tokens = [], []
    for row in np.random.default_rng(42).permutation(len(texts)):
        ids = Words().encode(texts[row].strip())
        if len(ids) > block_size or len(rows) == n_samples:
            continue
        rows.append(int(row))
        tokens += ids
    return rows, [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]


@pytest.fixture(scope="module")
def pile() -> list[dict[str, Any]]:
    """A made Pile."""
    return pile_rows()


# the paper's text, and the hub


def test_pile_is_the_reference(pile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pile` is read by datasets.load_dataset from a mirror here, packed as on the hub; its samples are the published
    recipe's, row by row and block by block."""
    import datasets

    write_rows(tmp_path / PILE / "val.jsonl.zst", pile)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sample = sample_of("pile")
    rows, blocks = reference([row["text"] for row in pile])
    (account,) = sample.account["sources"]
    assert len(rows) == 256
    assert account["row_ids"] == rows
    assert sample.blocks.tolist() == blocks
    order = np.random.default_rng(42).permutation(len(pile)).tolist()
    assert [order[i] for i in account["positions"]] == rows
    assert (account["source"], account["rows"], account["split"]) == (PILE, len(pile), "validation")


def test_order_is_that_of_datasets(tmp_path: Path) -> None:
    """Any source is shuffled as `datasets.Dataset.shuffle` shuffles it, for any seed."""
    import datasets

    file = write_rows(tmp_path / "t.jsonl", [{"text": str(i)} for i in range(500)])
    for seed in (0, 42, 7):
        (texts,) = load_texts(Calibration(str(file), seed=seed))
        expected = datasets.Dataset.from_dict({"i": list(range(500))}).shuffle(seed=seed)["i"]
        assert list(texts.order) == list(expected)
        assert [texts.sample(row) for row in texts.order[:5]] == [str(i) for i in expected[:5]]


ASK = """
import json, sys
from common.errors import ProjectError
from aim.calibration.packing import cut
from aim.calibration.config import Calibration
from aim.calibration.text_sources import load_texts
from tests.aim.test_calibration import Words
for line in sys.stdin:
    calibration = Calibration(**json.loads(line))
    try:
        calibration.check()
        sample = cut(load_texts(calibration), Words(), calibration)
        print(json.dumps({"account": sample.account, "blocks": sample.blocks.tolist()}))
    except ProjectError as error:
        print(json.dumps({"error": str(error), "code": error.exit_code}))
"""


def ask(questions: Sequence[dict[str, Any]], env: dict[str, str]) -> list[dict[str, Any]]:
    """Load calibrations in a process with this environment; one answer each."""
    import os
    import subprocess
    import sys

    from tests.conftest import ROOT

    done = subprocess.run(
        [sys.executable, "-c", ASK], input="".join(json.dumps(q) + "\n" for q in questions), text=True, cwd=ROOT,
        capture_output=True, env={**os.environ, **env}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_data_sets(pile, tmp_path: Path) -> None:
    """From a hub: the Pile, a configuration at a tag, splits by name and by slice, each with its commit in the account;
    what the hub has not is one sentence that lists what it has. Afterwards the same offline, to the same samples, and
    an offline cache that cannot be what was asked for is refused."""
    write_rows(tmp_path / "pile" / "val.jsonl.zst", pile)
    chats = tmp_path / "chats"
    for config in ("short", "long"):
        rows = [{"prompt": f"{config} {i} a b c"} for i in range(40)]
        write_rows(chats / config / "train.jsonl", rows)
        write_rows(chats / config / "test.jsonl", rows[:20])
    listed = [
        {"config_name": c, "data_files": [{"split": s, "path": f"{c}/{s}.jsonl"} for s in ("train", "test")]}
        for c in ("short", "long")
    ]
    (chats / "README.md").write_text(f"---\n{json.dumps({'configs': listed})}\n---\n")
    small = {"block_size": 8, "text_field": "prompt"}
    questions = [
        {"source": "pile"},
        {"source": "org/chats:long@v1", "split": "test", **small},
        {"source": "org/chats:short", "split": "train[:10]", **small},
        {"source": "org/chats:short", "split": "validation", **small},
        {"source": "org/chats", **small},
        {"source": "org/chats:medium", **small},
        {"source": "org/chats:short", "block_size": 8},
        {"source": "org/chats:short@v2", **small},
        {"source": "org/none"},
        {"source": "org/gated"},
    ]
    with running_hub() as hub:
        hub.repos["datasets/" + PILE] = Repo(tmp_path / "pile")
        hub.repos["datasets/org/chats"] = Repo(chats, tags=("v1",))
        hub.repos["datasets/org/gated"] = Repo(chats, refusal=(403, "GatedRepo", "Access is restricted"))
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        online = ask(questions, env)
        commit = hub.repos["datasets/org/chats"].commit
    rows, blocks = reference([row["text"] for row in pile])
    assert online[0]["account"]["sources"][0]["row_ids"] == rows
    assert online[0]["blocks"] == blocks
    assert online[0]["account"]["sources"][0]["commit"] != commit
    tagged, sliced = (answer["account"]["sources"][0] for answer in online[1:3])
    assert (tagged["source"], tagged["rows"], tagged["commit"]) == ("org/chats:long@v1", 20, commit)
    assert (sliced["rows"], sliced["kept"], sliced["split"]) == (10, 10, "train[:10]")
    sentences = [
        (2, "has no split 'validation'; give --calibration_split one of 'train', 'test'"),
        (2, "give one of the configurations 'short', 'long' as org/chats:CONFIG"),
        (2, "org/chats:medium: give one of the configurations 'short', 'long'"),
        (1, "has no field 'text', it has prompt; name one with --text_field"),
        (2, "org/chats has no revision 'v2' on the hub"),
        (2, "no data set org/none on the hub"),
        (1, "org/gated is not open to this account"),
    ]
    for answer, (code, sentence) in zip(online[3:], sentences, strict=True):
        assert answer["code"] == code, answer
        assert sentence in answer["error"], answer

    other = "0" * 40
    offline = ask(
        [*questions[:1], questions[2], {"source": f"org/chats:long@{commit}", "split": "test", **small},
         {"source": f"org/chats:long@{other}", "split": "test", **small}, questions[1], {"source": "org/none"}],
        {**env, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert offline[0] == online[0]
    assert offline[1] == online[2]
    assert offline[2]["blocks"] == online[1]["blocks"]
    assert f"is commit {other}, and the cache holds {commit}" in offline[3]["error"]
    for answer in offline[4:]:
        assert "cannot be read from the hub or its cache" in answer["error"]
        assert "pass a local file with --calibration FILE.jsonl" in answer["error"]


# local files


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.parquet", "t.txt"])
def test_every_kind_gives_the_same_samples(tmp_path: Path, name: str) -> None:
    """The same rows in any kind of file give the same rows and blocks, which are those of the recipe."""
    rows = [{"text": f"row {i} " + "w " * (i % 7), "n": i} for i in range(60)]
    sample = sample_of(write_rows(tmp_path / name, rows), n_samples=20, block_size=7)
    kept, blocks = reference([row["text"] for row in rows], 20, 7)
    assert sample.account["sources"][0]["row_ids"] == kept
    assert sample.blocks.tolist() == blocks
    assert sample.account["source"] == name


def test_a_folder_is_its_files_one_after_the_other(tmp_path: Path) -> None:
    """A folder gives the samples of one file with all its rows in the order of the paths; other files are counted."""
    rows = [{"text": f"row {i} " + "w " * (i % 5)} for i in range(60)]
    folder = tmp_path / "set"
    write_rows(folder / "a.parquet", rows[:10])
    write_rows(folder / "b" / "b.json", rows[10:30])
    write_rows(folder / "c.txt", rows[30:50])
    write_rows(folder / "d.jsonl", rows[50:])
    (folder / "README.md").write_text("# text")
    (folder / ".hidden.txt").write_text("hidden")
    several = sample_of(folder, block_size=16)
    one = sample_of(write_rows(tmp_path / "one.jsonl", rows), block_size=16)
    assert several.blocks.tolist() == one.blocks.tolist()
    (account,) = several.account["sources"]
    assert account["files"] == {"a.parquet": 10, "b/b.json": 20, "c.txt": 20, "d.jsonl": 10}
    assert "(1 files of other kinds left out)" in summary(several.account)


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """A .jsonl line may hold other signs that Python counts as line ends; blank lines are no rows; a mark at the front
    is no text; a list in a .jsonl's clothes (.json) is read as lines."""
    content = '\ufeff{"text": "a\u2028b c"}\n\n  \n{"text": "d\x85e f"}\n'
    for name in ("t.jsonl", "t.json"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        (texts,) = load_texts(Calibration(str(tmp_path / name)))
        assert [texts.sample(i) for i in range(texts.rows.count)] == ["a\u2028b c", "d\x85e f"]
        assert texts.where(1).endswith("line 4")


def test_a_path_with_a_comma_is_one_source(tmp_path: Path) -> None:
    """A file that exists is one source whatever its name; the record keeps its name without its folder."""
    file = write_rows(tmp_path / "a,b.jsonl", [{"text": "x y z"}] * 4)
    sample = sample_of(file, block_size=4)
    assert sample.account["source"] == "a,b.jsonl"
    assert str(tmp_path) not in json.dumps(sample.account)


# cutting


def test_cut_by_hand(tmp_path: Path) -> None:
    """Long and empty texts are dropped, the first n others kept, joined, cut, the tail dropped: counted by hand."""
    texts = ["a bb ccc", "x " * 9, None, "dddd ee", "  ", "f", "g g g"]
    file = write_rows(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    calibration = Calibration(str(file), n_samples=3, block_size=4)
    (loaded,) = load_texts(calibration)
    sample = cut([type(loaded)(loaded.source, loaded.rows, range(7))], Words(), calibration)
    assert sample.blocks.tolist() == [[1, 1, 2, 3], [1, 4, 2, 1]]
    (account,) = sample.account["sources"]
    assert [account[key] for key in ("read", "too_long", "empty", "kept")] == [6, 1, 2, 3]
    assert account["row_ids"] == account["positions"] == [0, 3, 5]
    assert account["tokens_dropped_at_the_end"] == 1
    assert summary(sample.account) == (
        "Calibration on t.jsonl: 3 texts kept of 6 read (1 longer than 4 tokens, 2 empty), 2 blocks, 8 tokens."
    )


def test_too_little_text(tmp_path: Path) -> None:
    """Text for less than one block is an error that says how much there is, and of what it comes."""
    file = write_rows(tmp_path / "t.jsonl", [{"text": "a b"}, {"text": ""}])
    with pytest.raises(
        CalibrationError, match=r"t.jsonl has 1 texts kept of 2 read .*, which give 3 tokens, less than"
    ):
        sample_of(file, block_size=100)


# several sources


def test_shares_by_largest_remainder() -> None:
    """Counts add up to n, each within one of its exact share, decimals taken as they are written; worked by hand."""
    assert shares(256, (0.7, 0.3)) == [179, 77]
    assert shares(10, (1, 1, 1)) == [4, 3, 3]
    assert shares(10, (0.15, 0.35, 0.5)) == [2, 3, 5]  # 1.5 and 3.5: the earlier of equal remainders
    assert shares(3, (0.1, 0.2)) == [1, 2]
    generator = np.random.default_rng(1)
    for _ in range(200):
        weights, n = generator.integers(1, 9, 4), int(generator.integers(1, 300))
        found = shares(n, tuple(weights.tolist()))
        assert sum(found) == n
        assert (np.abs(np.array(found) - n * weights / weights.sum()) < 1).all()


def test_mixture_is_its_parts(tmp_path: Path) -> None:
    """Several sources give the blocks that each gives alone with its share, one after the other, none of two texts."""
    a = write_rows(tmp_path / "a.jsonl", [{"text": f"a{i} b c"} for i in range(50)])
    b = write_rows(tmp_path / "b.json", [{"body": f"{'b' * 9}{i} c d e"} for i in range(50)])
    mixed = sample_of(f"{a},{b}", n_samples=20, block_size=6, weights=(0.7, 0.3), text_field="text,body")
    one = sample_of(a, n_samples=14, block_size=6)
    other = sample_of(b, n_samples=6, block_size=6, text_field="body")
    assert mixed.blocks.tolist() == [*one.blocks.tolist(), *other.blocks.tolist()]
    assert [source["asked"] for source in mixed.account["sources"]] == [14, 6]
    assert mixed.account["texts_kept"] == 20
    said = summary(mixed.account).splitlines()
    assert said[0] == "Calibration on 2 sources: 14 blocks, 84 tokens."
    assert said[2] == "  b.json: 6 texts kept of 6 read (0 longer than 6 tokens), 5 blocks, 30 tokens."


def test_weights_hold_or_are_refused(tmp_path: Path) -> None:
    """A source that cannot give its weighted share is an error that says which --n_samples would hold; that number
    works and one more does not. Without weights what is there is taken, and said."""
    a = write_rows(tmp_path / "a.jsonl", [{"text": "x y z"}] * 200)
    b = write_rows(tmp_path / "b.jsonl", [{"text": "x y z"}] * 7)
    both, weights = f"{a},{b}", (0.7, 0.3)
    message = r"b.jsonl cannot give the 77 texts of its --calibration_weights: 7 texts kept of 7 read .*; lower --n_s"
    with pytest.raises(CalibrationError, match=message) as raised:
        sample_of(both, block_size=4, weights=weights)
    most = int(str(raised.value).split("lower --n_samples to ")[1].split(",")[0])
    assert sample_of(both, block_size=4, weights=weights, n_samples=most).account["texts_kept"] == most
    with pytest.raises(CalibrationError, match="cannot give"):
        sample_of(both, block_size=4, weights=weights, n_samples=most + 1)
    assert "7 texts kept of 7 read (0 longer than 4 tokens, 128 asked for)" in summary(
        sample_of(both, block_size=4).account
    )


# chats


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):  # type: ignore[no-untyped-def]
    """A real tokenizer whose encode puts <s> first, and whose chat template writes <s> too, as Llama 3's does."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    from tests.helpers.tiny import make_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, extra=("user", "assistant"))
    made = AutoTokenizer.from_pretrained(folder)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.chat_template = (
        "{{ '<s>' }}{% for m in messages %} {{ m.role }} {{ m.content }}"
        "{% if m.tools is defined %} w9{% endif %}{% endfor %}{{ '</s>' }}"
    )
    assert made.encode("w5") == [1, 5]
    return made


def chat(i: int) -> dict[str, Any]:
    """A row with a chat of two messages."""
    return {"messages": [{"role": "user", "content": f"w{i + 3}"}, {"role": "assistant", "content": "w4 w5"}], "id": i}


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_chats_are_rendered_by_the_base(tokenizer, tmp_path: Path, name: str) -> None:
    """`messages` become the ids that the tokenizer's own apply_chat_template gives, with one <s>; a key that a table
    gives to every message (tools, null where it was not there) stays undefined for the template."""
    rows = [chat(i) for i in range(12)]
    rows[5]["messages"][0]["tools"] = "w9"
    sample = sample_of(write_rows(tmp_path / name, rows), tokenizer, n_samples=12, block_size=9)
    expected = []
    for i in np.random.default_rng(42).permutation(12):
        rendered = tokenizer.apply_chat_template(rows[i]["messages"], tokenize=True, return_dict=True)
        expected += rendered["input_ids"]
        assert rendered["input_ids"].count(1) == 1
    tokens = sample.blocks.flatten().tolist()
    assert tokens == expected[: len(tokens)]
    assert len(tokens) > len(expected) - 9
    assert sample.account["sources"][0]["field"] == "messages"


def test_a_base_without_template(tokenizer, tmp_path: Path) -> None:
    """Chats for a base without a template, chats that its template refuses, and other shapes of chats are named."""
    import copy

    file = write_rows(tmp_path / "t.jsonl", [chat(i) for i in range(3)])
    bare, strict = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    bare.chat_template = None
    strict.chat_template = "{{ raise_exception('the system speaks first') }}"
    with pytest.raises(CalibrationError, match=r"The base has no chat template, which the chats in t.jsonl need"):
        sample_of(file, bare, block_size=4)
    with pytest.raises(CalibrationError, match=r"line \d: the base's chat template refuses .*the system speaks first"):
        sample_of(file, strict, block_size=4)
    write_rows(file, [{"messages": [{"from": "human", "value": "hi"}]}])
    with pytest.raises(CalibrationError, match=r"line 1: the text must be a string, or a chat as a list of \{role"):
        sample_of(file, tokenizer, block_size=4)


# bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b"{broken\n", "line 1 is not valid JSON"),
        ("t.jsonl", b'{"text": "x"}\n{"text": "y', "line 2 is not valid JSON"),
        ("t.jsonl", b'{"body": "x", "id": 1}\n', "line 1 has no field 'text', it has body, id; name one with --text_"),
        ("t.jsonl", b'{"text": "x"}\n{"body": "x"}\n', "line 2 has no field 'text', it has body"),
        ("t.jsonl", b"[1]\n", "line 1 has no field 'text': it is no object"),
        ("t.jsonl", b'{"text": "\xff"}\n', "line 1 is not text in UTF-8"),
        ("t.jsonl", b'{"text": 5}\n', "line 1: the text must be a string"),
        ("t.jsonl", b"", "is empty: it holds no text"),
        ("t.json", b"", "is empty: it holds no text"),
        ("t.json", b"[]", "is empty: it holds no text"),
        ("t.json", b'[{"text": "x"}, {"body": "x"}]', "entry 1 has no field 'text'"),
        ("t.json", b'{\n"data": []}', "must be a list of objects"),
        ("t.json", b'[{"text": "x"},', "is not valid JSON"),
        ("t.txt", b"\xff\xfe\x00", "is not text in UTF-8"),
        ("t.txt", b" \n\n \n", "is empty: it holds no text"),
        ("t.parquet", b"PAR1 no", "is not a whole Parquet file"),
        ("t.jsonl", b'{"text": "a \\ud800 b"}\n', r"line 1: the text has half of a surrogate pair \(U\+D800\)"),
        ("t.jsonl", b'{"text": ' + b"[" * 5000 + b"\n", "line 1 is nested more than"),
        ("t.jsonl", b'{"text": "a", "text": "b"}\n', "the key 'text' is in it twice"),
        ("t.json", b'[{"text": ' + b"1" * 5000 + b"}]", "digits"),
    ],
)
def test_bad_calibration_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A broken, empty or foreign file is an error that names file and row, and the fields that there are."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as raised:
        sample_of(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"calibration": "none.jsonl"}, "none.jsonl does not exist"),
        ({"calibration": "./nothing"}, "./nothing does not exist"),
        ({"calibration": "t.csv"}, r"t.csv is not a local file; give pile, a hub data set"),
        ({"calibration": "README.md"}, r"README.md must be a .jsonl, .json, .parquet or .txt file"),
        ({"calibration": "pile,"}, "has an empty name"),
        ({"calibration": "pile,pile"}, "lists pile twice"),
        ({"calibration": "pile,org/x", "calibration_weights": "1"}, r"must be one per source \(2\), found 1"),
        ({"calibration": "pile,org/x", "calibration_weights": "0.7,-0.3"}, "must be positive numbers, found 0.7,-0.3"),
        (
            {"calibration": "pile,org/x", "calibration_weights": "1,nan"},
            r"--calibration_weights\[1\] must be a number, found nan",
        ),
        ({"calibration": "pile,org/x", "calibration_weights": "a,b"}, "must be numbers, one per source, found 'a,b'"),
        ({"calibration": "pile,org/x", "n_samples": 1}, "org/x: none of 1 samples; raise --n_samples"),
        ({"calibration": "pile,org/x", "text_field": "a,b,c"}, r"must be one name, or one per source \(2\)"),
        ({"calibration": ".", "calibration_split": "test"}, "--calibration_split is for hub data sets"),
        ({"n_samples": 0}, "--n_samples must be a whole number from 1 to 1000000, found 0"),
        ({"block_size": 0}, "--block_size must be a whole number from 1 to"),
        ({"seed": -1}, "--seed of the calibration must be a whole number from 0, found -1"),
        ({"n_samples": "many"}, "n_samples must be a whole number from 1 to 1000000, found 'many'"),
        ({"calibration": 5}, "calibration must be a name, or a list of names, found 5"),
    ],
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    """What flags or a YAML cannot ask for is one sentence, before anything is read."""
    with pytest.raises(UsageError, match=message):
        calibration_of(given)


def test_a_folder_without_text(tmp_path: Path) -> None:
    """A folder without any file of the known kinds is named with the kinds."""
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(CalibrationError, match=r"holds no .jsonl, .json, .parquet or .txt file"):
        sample_of(tmp_path)


# flags and records


def test_flags_give_the_settings() -> None:
    """Flags, and the same keys of a YAML, give the same Calibration; none of them gives the defaults; another flag may
    carry the seed."""
    parser = argparse.ArgumentParser()
    add_calibration_flags(parser, seed="calibration_seed")
    command = (
        "--calibration pile,org/chat:en@v1 --calibration_weights 0.7,0.3 --calibration_split test --text_field text,m "
        "--n_samples 10 --block_size 64 --calibration_seed 7"
    )
    by_flags = calibration_of(vars(parser.parse_args(command.split())), seed="calibration_seed")
    by_yaml = calibration_of({"calibration": ["pile", "org/chat:en@v1"], "calibration_weights": [0.7, 0.3],
                              "calibration_split": "test", "text_field": ["text", "m"], "n_samples": 10,
                              "block_size": 64, "seed": 7})  # fmt: skip
    assert by_flags == by_yaml
    assert by_flags == Calibration(("pile", "org/chat:en@v1"), 10, 64, 7, "text,m", "test", (0.7, 0.3))
    assert calibration_of(vars(parser.parse_args([])), seed="calibration_seed") == Calibration()


def test_a_record_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lock keeps leads to the same files from another folder, through JSON; hub names stay themselves."""
    from dataclasses import asdict

    write_rows(tmp_path / "t.jsonl", [{"text": "x"}])
    monkeypatch.chdir(tmp_path)
    asked = Calibration("t.jsonl,pile,org/chat@v1", weights=(1, 2, 3))
    kept = json.loads(json.dumps(asdict(asked.lasting())))
    monkeypatch.chdir("/")
    again = Calibration(**kept)
    assert again.names == (str(tmp_path / "t.jsonl"), "pile", "org/chat@v1")
    assert again.weights == (1, 2, 3)
    assert again.files() == [tmp_path / "t.jsonl"]
    again.check()


def test_contradictions_are_found(tmp_path: Path) -> None:
    """An account, through JSON, contradicts exactly the settings that differ and are not defaults."""
    a = write_rows(tmp_path / "a.jsonl", [{"text": "x y z"}] * 9)
    b = write_rows(tmp_path / "b.jsonl", [{"text": "x y z"}] * 9)
    asked = {"source": f"{a},{b}", "n_samples": 6, "block_size": 4, "weights": (2, 1)}
    account = json.loads(json.dumps(sample_of(**asked).account))
    assert contradiction(Calibration(**asked), account) is None
    assert contradiction(Calibration(), account) is None
    assert contradiction(Calibration(**{**asked, "weights": (1, 1)}), account) == (
        "calibration_weights", [2.0, 1.0], [1.0, 1.0],
    )  # fmt: skip
    assert contradiction(Calibration(str(a), block_size=4), account) == (
        "calibration", ["a.jsonl", "b.jsonl"], "a.jsonl",
    )  # fmt: skip
