"""Benchmark data for places without internet: fetched by pins, checked by digests, read from a folder or the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from common.cli import run
from common.errors import BadInputError
from eval.data.dataset_revisions import MANIFEST, check_manifest, facts, items_digest, pinned
from evaluate_model import main
from scripts import fetch_benchmarks
from tests.helpers.evaluation import DATA, ROOT, SUBJECTS
from tests.helpers.hub_server import Hub, Repo, running_hub

CARDS = {
    "openai/gsm8k": {"main": {"train": "main/train.parquet", "test": "main/test.parquet"}},
    "cais/mmlu": {s: {"test": f"{s}/test.jsonl", "dev": f"{s}/dev.jsonl"} for s in SUBJECTS}
    | {"auxiliary_train": {"train": "auxiliary_train/train.parquet"}},
}


@pytest.fixture(scope="module")
def hub(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with the made GSM8K (as parquet) and MMLU at the commits that evaluations ask for."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("published")
    with running_hub() as server:
        for name, configs in CARDS.items():
            target = folder / name
            shutil.copytree(data_dir / "hub" / name, target)
            for file in target.glob("main/*.jsonl"):
                rows = [json.loads(line) for line in file.read_text().splitlines()]
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file.with_suffix(".parquet"))
                file.unlink()
            listed = [
                {"config_name": c, "data_files": [{"split": s, "path": p} for s, p in splits.items()]}
                for c, splits in configs.items()
            ]
            (target / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")
            server.repos[f"datasets/{name}"] = Repo(target, tags=(pinned()[name].revision,))
        yield server


@pytest.fixture(scope="module")
def nltk_index(tmp_path_factory: pytest.TempPathFactory) -> str:
    """nltk's index of packages with punkt_tab, as files (nltk refuses servers on the loopback)."""
    if not (DATA / "nltk_data").is_dir():
        pytest.skip(f"no nltk_data in {DATA}; set AIM_DATA_DIR")
    folder = tmp_path_factory.mktemp("nltk")
    archive = folder / "punkt_tab.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as whole:
        for file in sorted((DATA / "nltk_data/tokenizers/punkt_tab/english").iterdir()):
            whole.write(file, f"punkt_tab/english/{file.name}")

    content = archive.read_bytes()
    unzipped = sum(entry.file_size for entry in zipfile.ZipFile(archive).infolist())
    url = archive.as_uri()
    entry = {"id": "punkt_tab", "subdir": "tokenizers", "url": url, "unzip": "1", "name": "Punkt"}
    entry |= {"size": str(len(content)), "unzipped_size": str(unzipped), "checksum": hashlib.md5(content).hexdigest()}
    entry["sha256_checksum"] = hashlib.sha256(content).hexdigest()
    attributes = " ".join(f'{key}="{value}"' for key, value in entry.items())
    (folder / "index.xml").write_text(f"<nltk_data><packages><package {attributes}/></packages></nltk_data>")
    return (folder / "index.xml").as_uri()


def fetch(hub: Hub, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does, with this hub for the hub."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder.parent / "home")}
    command = [sys.executable, "scripts/fetch_benchmarks.py", str(folder), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def evaluate(checkpoint: Path, folder: Path, out: Path, *flags: str) -> int:
    """Evaluate the tiny model on GSM8K and an MMLU subject from a folder."""
    common = ["--model", str(checkpoint), "--data_dir", str(folder), "--save_path", str(out), "--quiet"]
    asked = [
        "--benchmarks",
        "mmlu_anatomy",
        "--math_benchmarks",
        "gsm8k",
        "--math_max_tokens",
        "4",
        "--dtype",
        "float32",
    ]
    return run(main, [*common, *asked, *flags])


def test_a_fetched_folder_is_evaluated_and_checked(
    hub: Hub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder filled from the hub evaluates without it; a second fetch fetches nothing; other revisions, files changed
    or cut short are refused by evaluations (exit code 2) and mended by fetching again."""
    folder = tmp_path / "folder"
    done = fetch(hub, folder, "--benchmarks", "gsm8k,mmlu")
    assert done.returncode == 0, done.stderr
    found = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert {MANIFEST, "hub/openai/gsm8k/main/test.parquet", "hub/cais/mmlu/anatomy/dev.jsonl"} - found == {
        "hub/cais/mmlu/anatomy/dev.jsonl"  # the real files of MMLU have other names
    }
    assert not [name for name in found if "auxiliary" in name or "/." in name]
    again = fetch(hub, folder, "--benchmarks", "gsm8k,mmlu")
    assert "openai/gsm8k: 3 files at 740312add88f, 0 fetched" in again.stderr
    assert evaluate(checkpoint, folder, tmp_path / "out", "--benchmarks", "") == 0
    assert "GSM8K: acc of 4 items" in capsys.readouterr().out
    assert run(fetch_benchmarks.main, [str(folder), "--check", "--benchmarks", "gsm8k"]) == 0
    file = folder / "hub/openai/gsm8k/main/test.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    manifest = json.loads((folder / MANIFEST).read_text())
    capsys.readouterr()
    for change, sentence in (
        (None, "is not the file that was fetched"),
        ({"revision": "0" * 40}, "of revision 000000000000"),
    ):
        if change:
            manifest["sets"]["openai/gsm8k"] |= change
            (folder / MANIFEST).write_text(json.dumps(manifest))
        assert evaluate(checkpoint, folder, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert "fetch_benchmarks.py" in error
    assert fetch(hub, folder, "--benchmarks", "gsm8k").returncode == 0
    assert file.read_bytes() == whole
    assert evaluate(checkpoint, folder, tmp_path / "out", "--benchmarks", "") == 0
    for odd in (
        "[]",
        "3",
        '{"sets": 3}',
        '{"sets": {"openai/gsm8k": []}}',
        '{"sets": {"x": {"revision": 3, "files": {}}}}',
        '{"sets": {"x": {"revision": "r", "files": {"f": 3}}}}',
        "[" * 100_000,
    ):
        (folder / MANIFEST).write_text(odd)
        with pytest.raises(BadInputError, match=MANIFEST):
            check_manifest(folder, folder / "hub", ["openai/gsm8k"])
    (folder / MANIFEST).write_text('{"schema": 99, "sets": {}}')
    with pytest.raises(BadInputError, match="schema 99"):
        check_manifest(folder, folder / "hub", ["openai/gsm8k"])


def test_bytes_that_are_not_those_listed_are_not_kept(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that comes spoilt, a hub that refuses, an unknown benchmark: a sentence, and nothing half is left."""
    repo = hub.repos["datasets/openai/gsm8k"]
    for file in ("main/test.parquet", "README.md"):
        monkeypatch.setattr(repo, "spoilt", {file})
        folder = tmp_path / Path(file).stem
        done = fetch(hub, folder, "--benchmarks", "gsm8k")
        assert done.returncode == 1
        assert f"openai/gsm8k/{file} came with another digest" in done.stderr
        assert not (folder / "hub/openai/gsm8k" / file).exists()
        assert not (folder / MANIFEST).exists()
    monkeypatch.setattr(repo, "refusal", (503, "", "Service unavailable"))
    done = fetch(hub, tmp_path / "b", "--benchmarks", "gsm8k")
    assert (done.returncode, done.stdout) == (1, "")
    assert "The hub's list of openai/gsm8k could not be had" in done.stderr
    done = fetch(hub, tmp_path / "b", "--benchmarks", "gsm")
    assert done.returncode == 2
    assert "Did you mean 'gsm8k'?" in done.stderr


def test_the_sentence_splitter_is_fetched_too(nltk_index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nltk's punkt_tab is put where evaluations look for it, and an archive of another digest is refused."""
    from common.errors import FailureError
    from eval.data.data_sources import _punkt

    monkeypatch.setenv("NLTK_DATA", str(Path(nltk_index.removeprefix("file://")).parent))
    fetch_benchmarks.fetch_punkt(tmp_path, nltk_index)
    assert _punkt(tmp_path) == tmp_path / "nltk_data"
    assert (tmp_path / fetch_benchmarks.PUNKT / "english" / "sent_starters.txt").is_file()
    assert not (tmp_path / "nltk_data/tokenizers/punkt_tab.zip").exists()
    with pytest.raises(FailureError, match="punkt_tab could not be fetched"):
        fetch_benchmarks.fetch_punkt(tmp_path / "other", nltk_index.replace("index.xml", "nothing.xml"))


def test_the_hubs_cache_serves_without_the_hub(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """What an evaluation read from the hub, at the pinned commit, a later one reads from its cache with
    HF_HUB_OFFLINE=1, and says nothing of it."""
    flags = ["--model", str(checkpoint), "--math_max_tokens", "4", "--dtype", "float32", "--benchmarks", ""]
    flags += ["--math_benchmarks", "gsm8k", "--save_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    environment = {k: v for k, v in environment.items() if k not in ("HF_HUB_CACHE", "HF_DATASETS_CACHE")}
    tables = []
    for offline in ("0", "1"):
        endpoint = hub.url if offline == "0" else "http://127.0.0.1:9"
        done = subprocess.run(
            [sys.executable, str(ROOT / "evaluate_model.py"), *flags], cwd=tmp_path, capture_output=True, text=True,
            env={**environment, "HF_HUB_OFFLINE": offline, "HF_ENDPOINT": endpoint},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout)
        # two remarks on GSM8K, one on wcot, the backend, the place of the results
        assert len(done.stderr.splitlines()) == 5, done.stderr
    assert tables[0] == tables[1]
    assert any(pinned()["openai/gsm8k"].revision in path for _, path in hub.requests)


def test_all_that_is_missing_is_named_at_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the hub (as all tests run) and without data, every data set that lacks is named, with exit code 2."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(checkpoint), "--math_benchmarks", "math,gsm8k", "--benchmarks", "mbpp", "--mmlu_pro"]
    assert run(main, [*flags, "--allow_code_execution"]) == 2
    error = capsys.readouterr().err
    names = ("EleutherAI/hendrycks_math", "TIGER-Lab/MMLU-Pro", "openai/gsm8k", "google-research-datasets/mbpp")
    assert all(f"The data set {name}" in error for name in names)


def test_pins_know_the_published_items() -> None:
    """The real data here are the published ones by count and digest; one changed word is told apart."""
    if not (DATA / "hub").is_dir():
        pytest.skip(f"no hub in {DATA}; set AIM_DATA_DIR")
    rows = [json.loads(x) for x in (DATA / "hub/openai/gsm8k/main/test.jsonl").read_text().splitlines()]
    assert facts("openai/gsm8k", "main", "test", rows)[::2] == (1319, True)
    rows[7] = {**rows[7], "question": rows[7]["question"] + " "}
    assert facts("openai/gsm8k", "main", "test", rows)[2] is False
    assert facts("openai/gsm8k", "main", "test", rows[:-1])[2] is False
    rows = [json.loads(x) for x in (DATA / "hub/cais/mmlu/virology/test.jsonl").read_text().splitlines()]
    assert facts("cais/mmlu", "virology", "test", rows)[2] is True
    assert facts("TIGER-Lab/MMLU-Pro", None, "test", [])[2] is False
    assert items_digest([{"a": 1, "b": 2}], ["a"]) == items_digest([{"a": 1}], ["a"])
    assert sum(count for place, (count, _) in pinned()["cais/mmlu"].items.items() if place.endswith("/test")) == 14042
    assert sum(count for count, _ in pinned()["EleutherAI/hendrycks_math"].items.values()) == 5000


def test_data_of_another_version_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Items without the columns that a benchmark reads are another version of it: a sentence and exit code 2."""
    file = tmp_path / "openai/gsm8k/main/test.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"problem": "1+1?", "solution": "2"}\n')
    assert evaluate(checkpoint, tmp_path, tmp_path / "out", "--benchmarks", "") == 2
    assert "is another version of openai/gsm8k: it has no question, answer" in capsys.readouterr().err
