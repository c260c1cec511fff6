"""Files that were made to run code, hang the program, fill its memory or mean two things: refused in one sentence."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from common.cli import explain, run
from common.errors import CheckpointError
from common.files.bounded_reading import LimitError, UnreadableError, parse_json, parse_yaml, read_text
from common.terminal_text import MAX_MESSAGE, MAX_WORD, foreign, message_line, quoted
from merge import main
from merging.checkpoints.headers import header_of, layout_of
from merging.output.load_check import check_architecture
from tests.helpers.tiny import fine_tune, make_llama

ROOT = Path(__file__).resolve().parents[3]


def yaml_bomb(merge_keys: bool) -> str:
    """Nine aliases of nine aliases of ..., eleven levels: 31 billion values."""
    lines = ["a0: &a0 {k: v}" if merge_keys else "a0: &a0 [v]"]
    for i in range(1, 12):
        names = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{names}]}}" if merge_keys else f"a{i}: &a{i} [{names}]")
    return "\n".join(lines) + "\n"


YAML_BOMBS = [
    (yaml_bomb(True), "stands for more than"),
    (yaml_bomb(False), "stands for more than"),
    ("a: &a [*a]\n", "inside itself"),
    ("[" * 100_000, "nested more than"),
    ("- " * 100_000, "nested more than"),
    ("a: 1\nb: {c: 1, c: 2}\n", "the key 'c' twice"),
    ("a: 0x" + "f" * 5000, "digits"),
    ("a: " + "1:" * 5000 + "1", "digits"),
    ("a: !!int abc", "not valid YAML"),
    ("a: 2020-99-99", "not valid YAML"),
    ("a: !!python/object/apply:os.system [touch x]", "not valid YAML"),
    ("a: \x00", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), YAML_BOMBS, ids=[text[:20].strip() for text, _ in YAML_BOMBS])
def test_hostile_yaml_is_refused(text: str, message: str) -> None:
    """Each is refused before anything is built from it, naming the file."""
    with pytest.raises(UnreadableError, match=message) as refused:
        parse_yaml(text, "recipe.yaml")
    assert "recipe.yaml" in str(refused.value)
    assert len(str(refused.value)) < 400


def test_anchors_and_merge_keys_are_read() -> None:
    """YAML's own means of saying a thing once keep their meaning."""
    assert parse_yaml("x: &a {q: 1}\ny: {<<: *a, z: 3}\nv: [*a, *a]\n", "f") == [
        {"x": {"q": 1}, "y": {"q": 1, "z": 3}, "v": [{"q": 1}, {"q": 1}]}
    ]


JSON_BOMBS = [
    ("[" * 1_000_000, "nested more than"),
    ("[" * 100 + "]" * 100, "nested more than"),
    ('{"a":' * 70 + "1" + "}" * 70, "nested more than"),
    ('{"a": 1, "a": 2}', "the key 'a' is in it twice"),
    ("[" + "[]," * 1_000_000 + "[]]", "values"),
    ('"\\ud800"', "surrogate"),
    ("1" * 5000, "5000 digits"),
    (b"\xff\xfe", "not valid JSON"),
    ("", "not valid JSON"),
]


@pytest.mark.parametrize(("text", "message"), JSON_BOMBS, ids=[str(text[:12]) for text, _ in JSON_BOMBS])
def test_hostile_json_is_refused(text: str | bytes, message: str) -> None:
    """Each is refused in one sentence that names the file."""
    with pytest.raises(UnreadableError, match=message) as refused:
        parse_json(text, "config.json")
    assert "config.json" in str(refused.value)
    assert len(str(refused.value)) < 400


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    """FIFOs, sockets, devices, folders and files without end are refused and not waited for."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        (tmp_path / "endless").symlink_to("/dev/zero")
        for name in ("fifo", "socket", "endless", "."):
            with pytest.raises(UnreadableError, match="regular file was expected"):
                read_text(tmp_path / name)
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(LimitError, match="at most"):
        read_text(tmp_path / "large")


def test_foreign_text_reaches_no_terminal_raw() -> None:
    """Controls, ANSI, bidirectional overrides and surrogates are escaped; long words, texts and messages shortened."""
    text = "a\x1b[31mb\x07\x9b\u202ec\u2066\u200b\ud800\r\x7f"
    for safe in (message_line(text), quoted(text), foreign(text)):
        assert safe.isprintable()
        assert safe.encode("utf-8")
    assert message_line("one\ntwo") == "one two"
    assert len(message_line("x" * 10_000)) == MAX_WORD
    assert len(message_line("x " * 10_000)) == MAX_MESSAGE
    assert len(quoted("x " * 10_000)) <= 100
    assert len(foreign("x " * 10_000)) <= 100
    assert quoted({i: i for i in range(1000)}) == "a dict of 1000 entries"


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
SECOND = {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}


def write_safetensors(file: Path, header: Any, data: int = 32) -> Path:
    """Write a file with this header (an object, text or bytes) and `data` bytes of data."""
    text = header if isinstance(header, bytes | str) else json.dumps(header)
    encoded = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(data))
    return file


def library_reads(file: Path) -> bool:
    """Return whether safetensors' own library reads every tensor of a file."""
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            return all(opened.get_slice(name).get_shape() is not None for name in opened.keys())  # noqa: SIM118
    except Exception:
        return False


REPLACEMENTS: list[Any] = [
    None, True, False, 0, -1, 1.0, 2.5, 1e400, 2**31, 2**63, 2**64, "", "F32", "x", "\n", [], {}, [0], [-1, -4],
    [2.0, 2],
    [True, 4], [None], [4], [2, 2], [0, 16], [16, 0], [0, 17], [8, 24], [0, 0], [[0, 16]], {"a": 1},
    ["F32", [2], [0, 8]],
    "F64", "I8", "BOOL", "BF16", "F4", "F8_E4M3", "Q8", [0, 2**63], [2**32, 2**32], [1] * 100, [16, 32], [0, 32],
]  # fmt: skip


def mutants(count: int) -> list[Any]:
    """Headers of two tensors with one to three places changed, always the same ones."""
    chance = random.Random(15)
    made: list[Any] = []
    while len(made) < count:
        header: dict[str, Any] = {"a": dict(ENTRY), "b": dict(SECOND), "__metadata__": {"format": "pt"}}
        for _ in range(chance.randint(1, 3)):
            name = chance.choice(["a", "b", "__metadata__", "c"])
            if chance.random() < 0.3 or not isinstance(header.get(name), dict):
                header[name] = chance.choice(REPLACEMENTS)
            else:
                header[name][chance.choice(["dtype", "shape", "data_offsets", "format"])] = chance.choice(REPLACEMENTS)
        text = json.dumps(header)
        if chance.random() < 0.3:
            place = chance.randrange(len(text))
            text = text[:place] + chance.choice(['"', "{", "}", ",", "\\", "1", "-", "e", "\x00", "NaN"]) + text[place:]
        made.append(text)
    return made


def test_what_safetensors_refuses_is_refused(tmp_path: Path) -> None:
    """Whatever is accepted of 1500 mutated headers, safetensors' own library reads too, with the same shapes."""
    accepted = 0
    for text in mutants(1500):
        file = write_safetensors(tmp_path / "model.safetensors", text)
        try:
            tensors = header_of(file)
        except CheckpointError:
            continue
        accepted += 1
        assert library_reads(file), text
        with safetensors.safe_open(file, framework="np") as opened:
            assert {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()} == {  # noqa: SIM118
                name: info.shape for name, info in tensors.items()
            }
    assert accepted > 20


BAD_HEADERS: list[tuple[Any, str]] = [
    ({"a": {**ENTRY, "shape": [2.0, 2]}, "b": SECOND}, "2.0"),
    ({"a": {**ENTRY, "shape": [-2, -2]}, "b": SECOND}, "-2"),
    ({"a": {**ENTRY, "shape": [True, 4]}, "b": SECOND}, "tensor a has the shape"),
    ({"a": ENTRY, "b": {**SECOND, "data_offsets": [8, 24]}}, "overlaps"),
    ({"a": ENTRY, "b": {**SECOND, "data_offsets": [20, 36]}}, "hole"),
    ({"a": {**ENTRY, "dtype": ["F32"]}, "b": SECOND}, "dtype"),
    ({"a": ENTRY, "b": SECOND, "__metadata__": {"x": 1}}, "__metadata__"),
    ({"a\x1b[31m": ENTRY, "b": SECOND}, "control characters"),
    ({"a" * 5000: ENTRY, "b": SECOND}, "300 characters"),
    (f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(SECOND)}}}', "twice"),
    ("[" * 200 + "]" * 200, "nested"),
    ({"a": {**ENTRY, "shape": [2**62, 2**62]}, "b": SECOND}, "larger than any file"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "message"), BAD_HEADERS, ids=[message for _, message in BAD_HEADERS])
def test_headers_are_refused_naming_the_key(header: Any, message: str, tmp_path: Path) -> None:
    """The sentence names file and tensor, and fits on a line."""
    file = write_safetensors(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError) as refused:
        header_of(file)
    assert message in str(refused.value)
    assert message_line(str(refused.value)) == str(refused.value)


def test_numbers_of_shards_without_end(tmp_path: Path) -> None:
    """A name that promises 99,999,999 shards is answered at once."""
    with pytest.raises(CheckpointError, match="not model-00002-of-99999999"):
        layout_of(tmp_path, ["model-00001-of-99999999.safetensors"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and a fine-tuned model."""
    folder = tmp_path_factory.mktemp("models")
    fine_tune(make_llama(folder / "base", layers=1), folder / "tuned", 1)
    return folder


def fifo(name: str) -> Callable[[Path, Path], Any]:
    def place(model: Path, outside: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return place


def link(name: str, target: str | None = None) -> Callable[[Path, Path], Any]:
    def place(model: Path, outside: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target or outside)

    return place


def text(name: str, content: str) -> Callable[[Path, Path], Any]:
    return lambda model, outside: (model / name).write_text(content)


def endless(name: str) -> Callable[[Path, Path], Any]:
    def place(model: Path, outside: Path) -> None:
        with (model / name).open("wb") as stream:
            stream.truncate(1 << 36)

    return place


def odd_pickle(state: Any) -> Callable[[Path, Path], Any]:
    def place(model: Path, outside: Path) -> None:
        (model / "model.safetensors").unlink()
        torch.save(state, model / "pytorch_model.bin")

    return place


CASES: list[tuple[str, Callable[[Path, Path], Any], str]] = [
    ("FIFO for a config", fifo("config.json"), "config.json is a FIFO"),
    ("FIFO for a tokenizer", fifo("tokenizer.json"), "tokenizer.json is a FIFO"),
    ("FIFO for weights", fifo("model.safetensors"), "model.safetensors is a FIFO"),
    ("a device", link("generation_config.json", "/dev/zero"), "generation_config.json is a FIFO, device"),
    ("a secret as tokenizer file", link("tokenizer_extra.bin"), "tokenizer_extra.bin is a link that leads out"),
    ("a secret as card", link("README.md"), "README.md is a link that leads out"),
    ("a config without end", endless("config.json"), "config.json has 68719476736 bytes"),
    ("a template without end", endless("chat_template.jinja"), "chat_template.jinja has 68719476736 bytes"),
    ("a deep config", text("config.json", '{"a":' * 5000 + "1" + "}" * 5000), "config.json is nested"),
    ("a config twice", text("config.json", '{"model_type": "llama", "model_type": "gpt2"}'), "is in it twice"),
    ("a bomb in the card", text("README.md", f"---\n{yaml_bomb(True)}---\n# Model\n"), "README.md stands for more"),
    ("shards without end", text("model-00001-of-99999999.safetensors", ""), "and not model-00002-of-99999999"),
    ("a .bin with an expanded tensor", odd_pickle({"a": torch.zeros(1).expand(1 << 40)}), "larger than the numbers"),
    ("a .bin with numbers for names", odd_pickle({1: torch.zeros(1)}), "tensor name 1"),
    ("a sparse .bin", odd_pickle({"a": torch.eye(3).to_sparse()}), "sparse_coo"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_hostile_folders_are_refused(
    models: Path,
    place: Callable[[Path, Path], Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A plan alone is refused in one sentence naming the file, without waiting, and nothing is written."""
    model, secret = tmp_path / "model", tmp_path / "secret"
    secret.write_text("secret")
    model.mkdir()
    for file in (models / "tuned").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    if message.startswith("and not model-00002"):
        (model / "model.safetensors").unlink()
    place(model, secret)
    started = time.monotonic()
    flags = ["--method", "linear", "--models_to_merge", f"{models / 'tuned'},{model}", "--dry_run"]
    assert run(main, flags) == 1
    assert time.monotonic() - started < 30  # it is a watchdog, no benchmark: a hang would last for ever
    shown = capsys.readouterr()
    assert message in shown.err, shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_hidden_layers": 61, "n_routed_experts": 256, "num_experts_per_tok": 8},
        {"num_hidden_layers": 94, "num_experts": 512, "shared_experts_intermediate_size": 20480},
        {"text_config": {"num_hidden_layers": 126}, "vision_config": {"depth": 32, "depths": [2, 2, 18, 2]}},
    ],
)
def test_numbers_of_modules_of_real_models(numbers: dict[str, Any]) -> None:
    """Fused experts, where 61 layers of 256 experts are a thousand tensors, and sizes are no numbers of modules."""
    check_architecture({"model_type": "deepseek_v3", **numbers}, "model", 1000)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts", "depth", "encoder_layers"])
def test_modules_beyond_the_tensors_are_refused(key: str) -> None:
    """A config of a million modules beside a thousand tensors is refused, naming the key."""
    with pytest.raises(CheckpointError, match=rf"{key} is 1000000, and the checkpoint has 1000 tensors"):
        check_architecture({"model_type": "llama", "text_config": {key: 1_000_000}}, "model", 1000)


def test_names_of_files_in_errors_are_cut(tmp_path: Path) -> None:
    """The file of an error of the system is shown with at most 300 characters, none of them control characters."""
    name = "/".join(["\x1b[31m" + "x" * 50] * 40)
    sentence, code = explain(FileNotFoundError(errno.ENOENT, "No such file or directory", name))
    assert code == 1
    assert sentence.startswith("No such file or directory: ")
    assert sentence.isprintable()
    assert len(sentence) <= len("No such file or directory: .") + 300
