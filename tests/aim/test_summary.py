"""Laws of the summary of an importance file, of scripts/importance.py, and of what is pushed to the hub."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from aim.importance import Importance
from aim.relaxer import Rule
from aim.report.hub_upload import card
from aim.report.summary import by_kind, entropy, summarise, together, top_share
from aim.report.text import as_text, grouped
from common.cli import run
from tests.helpers.hub_server import Hub, running_hub

CALIBRATION = {
    "source": ["mit-han-lab/pile-val-backup", "org/chat:en@v1", "mine.jsonl"],
    "block_size": 8, "blocks": 3, "tokens": 24, "dtype": "float32", "device": "cpu",
    "sources": [{"source": s, "kept": 2, "asked": 2, "read": 3, "too_long": 1, "empty": 0, "blocks": 1, "tokens": 8}
                for s in ("mit-han-lab/pile-val-backup", "org/chat:en@v1", "mine.jsonl")],
}  # fmt: skip


def made(activations: dict[str, Any], **about: Any) -> Importance:
    """An importance of these activations."""
    tensors = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in activations.items()}
    given = {
        "axes": dict.fromkeys(tensors, -1),
        "tokens": {name: 500 if t.dim() == 1 else [500] * len(t) for name, t in tensors.items()},
        "stability": {name: 0.9 if t.dim() == 1 else [0.9] * len(t) for name, t in tensors.items()},
        "unmeasured": {}, "calibration": CALIBRATION, "versions": {"torch": "2"},
        "base": {"name": "org/base", "commit": "c0ffee", "fingerprint": "f"},
    }  # fmt: skip
    return Importance(activations=tensors, **{**given, **about})


def test_figures_are_the_definitions() -> None:
    """Share of the top 1 %, entropy and mean importance, in fp64 with numpy from their definitions; neither share nor
    entropy changes with the scale; alike channels have entropy 1, a single active one 0."""
    a = np.random.default_rng(0).lognormal(0, 2, 300)
    expected = np.sort(a)[::-1][:3].sum() / a.sum()
    p = a / a.sum()
    for scale in (1.0, 1e6):
        scaled = torch.tensor(a * scale)
        assert top_share(scaled) == pytest.approx(expected, rel=1e-12)
        assert entropy(scaled) == pytest.approx(-(p * np.log(p)).sum() / np.log(300), rel=1e-12)
    assert entropy(torch.full((64,), 3.0)) == pytest.approx(1)
    assert entropy(torch.tensor([0.0, 2.0, 0.0])) == 0
    assert entropy(torch.tensor([2.0])) is None
    assert top_share(torch.tensor([1.0, 3.0])) == 0.75
    (row,) = summarise(made({"model.layers.0.mlp.up_proj.weight": [1.0, 2.0, 4.0, 0.0]})).rows
    assert (row.maximum, row.mean, row.top_share) == (4.0, pytest.approx(7 / 16), pytest.approx(4 / 7))


def test_rows_by_layer_and_kind() -> None:
    """Layers in the order of their numbers, what is in no layer behind them; kinds with one input are one row, under
    one name; their figures are those of the one vector."""
    same = torch.rand(8)
    activations = {f"model.layers.{i}.self_attn.{k}_proj.weight": same + i for i in range(12) for k in "qkv"}
    activations |= {f"model.layers.{i}.self_attn.o_proj.weight": torch.rand(8) for i in range(12)}
    activations |= {"lm_head.weight": torch.rand(8), "model.norm.weight": torch.rand(8)}
    rows = summarise(made(activations)).rows
    places = [(row.layer, row.kind) for row in rows]
    assert places[:4] == [
        (0, "self_attn.{k,q,v}_proj"), (0, "self_attn.o_proj"), (1, "self_attn.{k,q,v}_proj"), (1, "self_attn.o_proj"),
    ]  # fmt: skip
    assert places[-3:] == [(11, "self_attn.o_proj"), (None, "lm_head"), (None, "model.norm")]
    assert (rows[0].tensors, rows[1].tensors, rows[0].experts) == (3, 1, 0)
    kinds = by_kind(rows)
    assert (kinds[0].kind, kinds[0].layers) == ("model.layers.*.self_attn.{k,q,v}_proj", 12)
    assert kinds[0].maximum == pytest.approx(float(same.max()) + 11)


def test_names_together() -> None:
    """Names that share a parent are braced, and an ending that all of them share is told once."""
    assert together(["self_attn.q_proj", "self_attn.k_proj"]) == "self_attn.{q,k}_proj"
    assert together(["mlp.w1", "mlp.w3"]) == "mlp.{w1,w3}"
    assert together(["mlp.gate", "mlp.shared.gate_proj", "mlp.shared.up_proj"]) == "mlp.gate, mlp.shared.{gate,up}_proj"
    assert grouped(["a.1.b", "a.2.b", "c"]) == "a.*.b (2), c"


def test_experts_are_one_row() -> None:
    """Experts in one fused tensor and the same experts as modules have the same row: means, largest maximum, lowest
    stability, fewest tokens; those with too few tokens have no part in it and are told."""
    values = torch.tensor([[1.0, 1.0, 2.0], [4.0, 0.0, 4.0], [9.0, 9.0, 0.0]])
    tokens, stability = [100, 80, 5], [0.9, 0.5, None]
    name = "model.layers.0.mlp.experts"
    fused = made({f"{name}.down_proj": values}, tokens={f"{name}.down_proj": tokens},
                 stability={f"{name}.down_proj": stability})  # fmt: skip
    names = [f"{name}.{i}.down_proj.weight" for i in range(3)]
    modules = made(dict(zip(names, values, strict=True)), tokens=dict(zip(names, tokens, strict=True)),
                   stability=dict(zip(names, stability, strict=True)))  # fmt: skip
    one, other = summarise(fused), summarise(modules)
    (row,), (same,) = one.rows, other.rows
    assert row.kind == "mlp.experts.down_proj"
    assert same.kind == "mlp.experts.*.down_proj"
    assert (row.tensors, same.tensors) == (1, 2)
    for found in (row, same):
        assert (found.experts, found.tokens, found.maximum, found.stability) == (2, 80, 4.0, 0.5)
        assert found.top_share == pytest.approx((0.5 + 0.5) / 2)
        assert found.mean == pytest.approx((4 / 6 + 2 / 3) / 2)
        assert found.entropy == pytest.approx((1.5 * math.log(2) + math.log(2)) / 2 / math.log(3))
    assert one.few_tokens == {f"{name}.down_proj": 1}
    assert other.not_relaxed == {"an expert with fewer than 64 tokens": (names[2],)}
    assert summarise(fused, Rule(min_tokens=1)).rows[0].experts == 3
    assert "Not relaxed: 1 experts with too few tokens, in model.layers.*.mlp.experts.down_proj." in as_text(fused, one)


def test_what_is_not_relaxed_is_told() -> None:
    """Weights that no activation was seen for, that the rule leaves out, or that are zero everywhere are told with the
    reason, layers together, and have no row."""
    importance = made(
        {"model.layers.0.a.weight": [0.0, 0.0], "model.layers.0.b.weight": [1.0, 2.0], "model.norm.weight": [1.0, 1.0]},
        unmeasured={f"model.layers.{i}.conv.weight": "no calibration token reached it" for i in range(3)},
    )
    found = summarise(importance, Rule(exclude="norm"))
    assert [row.kind for row in found.rows] == ["b"]
    assert found.not_relaxed == {
        "its activation is zero everywhere": ("model.layers.0.a.weight",),
        "no calibration token reached it": tuple(f"model.layers.{i}.conv.weight" for i in range(3)),
        "excluded": ("model.norm.weight",),
    }
    said = as_text(importance, found)
    assert "- Not relaxed: model.layers.*.conv.weight (3) (no calibration token reached it)." in said
    assert "nan" not in said


# the script


@pytest.fixture(scope="module")
def measured(family, tmp_path_factory) -> tuple[Path, Path, str]:
    """An importance file and a plot that the script made, and what it printed."""
    from scripts.importance import main

    folder = tmp_path_factory.mktemp("importance")
    file, plot = folder / "base.safetensors", folder / "plot.png"
    arguments = [family["base"], "--importance", file, "--calibration", family["text"], "--block_size", 64]
    with redirect_stdout(StringIO()) as printed:
        assert main([*map(str, arguments), "--plot", str(plot), "--quiet"]) == 0
    return file, plot, printed.getvalue()


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Call the script in this process: its exit code, stdout and stderr."""
    from scripts.importance import main

    capsys.readouterr()
    code = run(main, [str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_script_measures_prints_and_plots(measured, family, capsys) -> None:
    """The file holds what is printed of it; a second call needs no base, prints the same, and with --include only what
    would be relaxed; as JSON with the sample ids and without paths."""
    file, plot, printed = measured
    importance = Importance.load(file)
    assert printed == as_text(importance, summarise(importance)) + "\n"
    assert "| 1     | self_attn.{k,q,v}_proj" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert called(capsys, "--importance", file) == (0, printed, "")
    code, again, remarks = called(capsys, family["base"], "--importance", file)
    assert (code, again) == (0, printed)
    assert f"Importance from {file}. Calibration on text.jsonl: 60 texts kept of 60 read" in remarks
    told = json.loads(called(capsys, "--importance", file, "--json", "--include", "norm")[1])
    assert {row["kind"] for row in told["rows"]} == {"input_layernorm", "post_attention_layernorm", "model.norm"}
    assert sorted(told["calibration"]["sources"][0]["row_ids"]) == list(range(60))
    assert set(told["not_relaxed"]) == {"not included"}
    assert str(family["text"].parent) not in json.dumps(told["calibration"])


def test_plot_shows_every_row(measured) -> None:
    """Each panel has a line for every kind with as many points as it has layers, at the values of the rows."""
    from aim.report.plot import PANELS, plot_summary

    found = summarise(Importance.load(measured[0]))
    figure = plot_summary(found, "title")
    kinds = [row.kind for row in found.rows if row.layer == 0] + [row.kind for row in found.rows if row.layer is None]
    assert next(iter(PANELS)) == "mean"
    assert len(figure.axes) == len(PANELS) + 1  # the last place is empty
    for ax, name in zip(figure.axes, PANELS, strict=False):
        assert [line.get_label() for line in ax.lines] == kinds
        shown = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
        assert shown == {k: [getattr(row, name) for row in found.rows if row.kind == k] for k in kinds}


def test_script_refuses(family, measured, capsys, tmp_path: Path) -> None:
    """Flags that cannot go together are one sentence before anything is measured."""
    file = measured[0]
    for arguments, expected, sentence in (
        ([family["base"]], 2, "--importance FILE is missing"),
        (["--importance", tmp_path / "none"], 2, "does not exist: give the BASE to measure"),
        (["--importance", file, "--plot", "x.gif"], 2, "--plot must be a .png, .svg or .pdf file"),
        (["--importance", file, "--private"], 2, "--private goes with --push_to_hub"),
        (["--importance", file, "--push_to_hub", "name"], 2, "--push_to_hub must be ORG/NAME"),
        (["--importance", file, "--push_to_hub", "org/name"], 2, "HF_HUB_OFFLINE is set"),
        ([family["a"], "--importance", file], 1, "whose weights are not those of"),
    ):
        code, printed, errors = called(capsys, *arguments)
        assert (code, printed, errors.count("error: ")) == (expected, "", 1)
        assert sentence in errors


# the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a writer, a reader, and nobody else, which this process asks."""
    from huggingface_hub import constants

    with running_hub() as started:
        started.tokens |= {"writer": 200, "reader": 403}
        monkeypatch.setattr(constants, "ENDPOINT", started.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield started


def test_push(hub: Hub, measured, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file arrives byte for byte with its card, in a private repository where that is asked for; a public one is
    not taken for private; without token, with a wrong one, without the right, or without a hub, nothing arrives, the
    file stands, and one sentence says what to do."""
    from huggingface_hub import constants

    file = measured[0]

    def pushed(repo: str, token: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setenv("HF_TOKEN", token)
        return called(capsys, "--importance", file, "--push_to_hub", repo, *flags)

    for token, expected, sentence in (
        ("", 2, "needs a token that may write: run `hf auth login`"),
        ("stranger", 1, "does not accept the token here (401)"),
        ("reader", 1, "may not write to org/private (403)"),
    ):
        code, _, errors = pushed("org/private", token)
        assert (code, errors.count("error: ")) == (expected, 1)
        assert sentence in errors
    assert hub.pushed == {}
    assert pushed("org/private", "writer", "--private")[0] == 0
    assert hub.public == set()
    assert hub.pushed["org/private"][file.name] == file.read_bytes()
    text = hub.pushed["org/private"]["README.md"].decode()
    assert text == card(Importance.load(file), summarise(Importance.load(file)), "org/private", file.name)
    assert str(file.parent) not in text
    assert pushed("org/public", "writer")[0] == 0
    assert hub.public == {"org/public"}
    before = dict(hub.pushed["org/public"])
    assert "org/public exists and is public" in pushed("org/public", "writer", "--private")[2]
    assert hub.pushed["org/public"] == before
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, errors = pushed("org/other", "writer")
    assert (code, "org/other could not be pushed to the hub" in errors, "is kept; the same" in errors) == (
        1,
        True,
        True,
    )
    assert file.is_file()


def test_card() -> None:
    """The front matter names base, tags and the hub's data sets without local files; the body shows the commands with
    the base's name, the counts of each source and the tables."""
    importance = made({f"model.layers.{i}.mlp.up_proj.weight": torch.rand(8) + 0.1 for i in range(2)})
    front, body = card(importance, summarise(importance), "org/imp", "base.safetensors").split("---\n", 2)[1:]
    assert yaml.safe_load(front) == {
        "base_model": "org/base",
        "tags": ["activation-informed-merging", "importance", "calibration"],
        "datasets": ["mit-han-lab/pile-val-backup", "org/chat"],
    }
    assert "hf download org/imp base.safetensors --local-dir .\n" in body
    assert "--pretrained_model_name org/base --omega 0.4 --save_path OUT --importance base.safetensors\n" in body
    assert "\n- mine.jsonl: 2 texts kept of 3 read (1 longer than 8 tokens), 1 blocks, 8 tokens." in body
    assert "| model.layers.*.mlp.up_proj" in body
    local = made({"a.weight": [1.0, 2.0]}, base={"name": "/data/mine/llama", "commit": None, "fingerprint": "f"})
    front, body = card(local, summarise(local), "org/imp", "x").split("---\n", 2)[1:]
    assert "base_model" not in yaml.safe_load(front)
    assert "/data" not in body
