"""Models from a hub: a real server on the loopback, the hub's own client, and every way in which it can refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import merge as merge_script
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from tests.helpers.hub_server import Hub, Repo, running_hub
from tests.helpers.tiny import fine_tune, make_llama, train

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty hub."""
    with running_hub() as started:
        yield started


@pytest.fixture
def settings(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment that has a fresh cache and asks this hub."""
    return {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, run_script: Run, settings: dict[str, str]) -> Run:
    """Merge models by name; returns the finished process."""

    def start(base: str, models: str, **env: str) -> CompletedProcess[str]:
        return run_script(
            "merge.py", "--method", "task_arithmetic", "--base_model", base, "--models_to_merge", models,
            "--save_path", tmp_path / "out", "--quiet", "--no-load_check", **(settings | env),
        )  # fmt: skip

    return start


@pytest.fixture
def opened(run_script: Run, settings: dict[str, str]) -> Run:
    """Open models by name, without merging them; returns the finished process."""

    def start(*models: str, **env: str) -> CompletedProcess[str]:
        return run_script("-c", OPEN, *models, **(settings | env))

    return start


OPEN = """
import sys
from common.cli import run
from merging.checkpoints.checkpoint import open_all
sys.exit(run(lambda names: open_all(names) and 0))
"""


def merged(base: str, models: str, out: Path) -> bytes:
    """Merge local models in this process; returns the weights."""
    given = {"method": "task_arithmetic", "base_model": base, "models_to_merge": models}
    return (merge(make_recipe(given, {}), OutputConfig(out)) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, sharded and with copies in other formats beside it, and a fine-tuned model."""
    folder = tmp_path_factory.mktemp("models")
    base = make_llama(folder / "base", max_shard_size="60KB")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    tuned = fine_tune(base, folder / "a", seed=1)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "original/params.json", "original/model.safetensors",
                 "onnx/model.onnx", "onnx/config.json"):  # fmt: skip
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"{}")
    return {"base": base, "a": tuned}


def test_download_and_merge(hub: Hub, run: Run, opened: Run, models: dict[str, Path], tmp_path: Path) -> None:
    """Models that are only on the hub are downloaded and merged to the bytes of a local merge: each needed file once,
    small files of all before the first weight, no copy in another format; and afterwards offline, without a request."""
    hub.repos |= {"org/base": Repo(models["base"]), "org/a": Repo(models["a"])}
    done = run("org/base", "org/a")
    assert done.returncode == 0, done.stderr
    result = (tmp_path / "out" / "model.safetensors").read_bytes()
    names = hub.downloads()
    assert len(names) == len(set(names))
    shards = {f"org/base/{file.name}" for file in models["base"].glob("model-*.safetensors")}
    assert len(shards) > 1
    assert set(hub.downloads(".safetensors")) == {*shards, "org/a/model.safetensors"}
    assert not [name for name in names if "onnx" in name or "original" in name or name.endswith(".bin")]
    order = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    first = min(i for i, path in enumerate(order) if path.endswith(".safetensors"))
    assert all(path.endswith(".safetensors") for path in order[first:])
    hub.requests.clear()
    shutil.rmtree(tmp_path / "out")
    done = run("org/base@main", "org/a", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == result
    assert opened("org/base", "org/a@main").returncode == 0
    assert hub.requests == []
    assert merged(str(models["base"]), str(models["a"]), tmp_path / "local") == result


REFUSALS: dict[str, tuple[Repo, int, str]] = {
    "no login": (
        Repo(refusal=(401, "RepoNotFound", "Invalid username or password.")),
        1,
        "only after a login (401: no token here, or one that it does not accept",
    ),
    "a token that is not valid": (
        Repo(refusal=(401, "", "Invalid credentials in Authorization header")),
        1,
        "then run `hf auth login`",
    ),
    "files that need a login": (Repo(files_refusal=(401, "GatedRepo", "Access is restricted")), 1, "`hf auth login`"),
    "license not accepted": (
        Repo(files_refusal=(403, "GatedRepo", "Access to model org/b is restricted")),
        1,
        "/org/b, accept its license as the account that `hf auth whoami` names",
    ),
    "token without the right": (Repo(refusal=(403, "", "Forbidden")), 1, "is not open to this account (403)"),
    "the hub is down": (
        Repo(refusal=(503, "", "down")),
        1,
        "the hub cannot be reached (status 503); run `hf download org/b`",
    ),
}


@pytest.mark.parametrize("how", REFUSALS)
def test_refusals_come_before_the_first_weight(
    hub: Hub, run: Run, models: dict[str, Path], tmp_path: Path, how: str
) -> None:
    """Each answer of the hub is a sentence of its own with what to run next and an exit code; where the last model
    cannot be had, no weight of any model was downloaded, and nothing is written."""
    repo, code, sentence = REFUSALS[how]
    hub.repos |= {"org/base": Repo(models["base"]), "org/a": Repo(models["a"])}
    hub.repos["org/b"] = Repo(models["a"], repo.refusal, repo.files_refusal)
    done = run("org/base", "org/a,org/b", HF_TOKEN="hf_none" if "token" in how else "")
    assert (done.returncode, done.stdout) == (code, "")
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert hub.downloads(".safetensors") == []
    assert hub.downloads("org/a/config.json")
    assert not (tmp_path / "out").exists()


def test_what_is_not_there(hub: Hub, run: Run, models: dict[str, Path]) -> None:
    """A misspelt id and a revision that does not exist are errors of use (exit code 2), each said with the name; a
    model without weights is one of the model. No weight is downloaded for any."""
    bare = shutil.copytree(models["a"], models["a"].parent / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    hub.repos |= {"org/base": Repo(models["base"]), "org/bare": Repo(bare)}
    for model, code, sentence in (
        (
            "org/nmae",
            2,
            "Model org/nmae is neither a local folder nor on the hub (404): check the spelling (`hf models ls",
        ),
        ("org/base@v9", 2, "Model org/base has no revision 'v9' on the hub (404)"),
        ("org/bare", 1, "org/bare holds no weights (model.safetensors or pytorch_model.bin"),
    ):
        done = run("org/base", model)
        assert (done.returncode, sentence in done.stderr) == (code, True), done.stderr
    assert hub.downloads(".safetensors") == []


def test_no_way_to_the_hub(hub: Hub, run: Run, models: dict[str, Path]) -> None:
    """Told to stay offline, and a hub that does not answer, are two sentences, each with the command for a machine with
    internet; neither waits for long, and --revision is in the command."""
    done = run("org/base", "org/a@v1", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "in the hub's cache, and HF_HUB_OFFLINE is set; run `hf download org/a --revision v1` wh" in done.stderr
    done = run("org/base", "org/a", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "the hub cannot be reached (Connect" in done.stderr
    assert "run `hf download org/a` where there is internet" in done.stderr
    assert hub.requests == []


def test_weights_missing_from_the_cache(hub: Hub, opened: Run, models: dict[str, Path], tmp_path: Path) -> None:
    """A cache that has the small files or some shards alone is completed online and refused offline; a cache without
    the model card is enough where the hub cannot be reached."""
    hub.repos |= {"org/base": Repo(models["base"]), "org/huge": Repo(models["a"], sizes={"model.safetensors": 10**18})}
    assert opened("org/base", "org/huge").returncode == 1
    done = opened("org/base", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "org/base is in the hub's cache without all its weights, and HF_HUB_OFFLINE is set" in done.stderr
    assert opened("org/base").returncode == 0
    snapshot = next((tmp_path / "home" / "hub").glob("models--org--base/snapshots/*"))
    gone = sorted(snapshot.glob("model-*.safetensors"))[1]
    gone.resolve().unlink()
    gone.unlink()
    hub.requests.clear()
    assert opened("org/base").returncode == 0
    assert hub.downloads() == [f"org/base/{gone.name}"]
    (snapshot / "README.md").unlink()
    assert opened("org/base", HF_HUB_OFFLINE="1").returncode == 0
    assert opened("org/base", HF_ENDPOINT="http://127.0.0.1:9").returncode == 0


def test_disk_full(
    hub: Hub, run: Run, run_script: Run, settings: dict[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    """Weights that the disk cannot hold are refused before the first is downloaded; a disk that fills up meanwhile
    (injected) is the same sentence, not a traceback."""
    hub.repos |= {"org/base": Repo(models["base"]), "org/a": Repo(models["a"], sizes={"model.safetensors": 10**18})}
    done = run("org/base", "org/a")
    assert done.returncode == 1
    assert "No space for the weights of org/a, org/base in the hub's cache" in done.stderr
    assert "1000000000.00 GB more are needed and" in done.stderr
    assert "set HF_HOME to a folder on a larger disk" in done.stderr
    assert hub.downloads(".safetensors") == []
    code = (
        "import sys, runpy, huggingface_hub.file_download as download\n"
        "def full(url, file, **_):\n"
        "    raise OSError(28, 'No space left on device')\n"
        "download.http_get = full\n"
        "sys.argv = ['merge.py', '--method', 'linear', '--models_to_merge', 'org/base', '--save_path', sys.argv[1]]\n"
        "runpy.run_path('merge.py', run_name='__main__')\n"
    )
    done = run_script("-c", code, tmp_path / "out", **settings)
    assert done.returncode == 1
    assert "No space for the weights of org/base in the hub's cache" in done.stderr
    assert "the disk is full; free some" in done.stderr
    assert "Traceback" not in done.stderr


def test_models_that_do_not_fit_are_not_downloaded(hub: Hub, run: Run, models: dict[str, Path], tmp_path: Path) -> None:
    """Models on the hub whose tensors do not fit together are refused from their headers: no weights are fetched."""
    other = make_llama(tmp_path / "other", layers=3)
    hub.repos |= {"org/base": Repo(models["base"]), "org/other": Repo(other)}
    done = run("org/base", "org/other")
    assert done.returncode == 1
    assert "choose the layers in a recipe with slices" in done.stderr
    assert hub.downloads(".safetensors") == []


def test_a_tokenizer_that_cannot_serve_costs_no_download(
    hub: Hub, run: Run, models: dict[str, Path], tmp_path: Path
) -> None:
    """A base on the hub whose own vocabulary has a token without a row is refused before a weight is fetched."""
    base = shutil.copytree(models["base"], tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["far"] = 999
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    hub.repos |= {"org/base": Repo(base), "org/a": Repo(models["a"])}
    done = run("org/base", "org/a")
    assert done.returncode == 1
    assert "it lists 'far' with the id 999, which has no row" in done.stderr
    assert hub.downloads(".safetensors") == []


def test_headers_without_weights(
    hub: Hub, models: dict[str, Path], tmp_path: Path, run_script: Run, settings: dict[str, str]
) -> None:
    """Opened by headers alone, models of the hub have their true shapes, commit and license, and no weight file was
    fetched whole: only ranges of them were asked for, and none is in the cache. Reading one says so."""
    hub.repos |= {"org/base": Repo(models["base"]), "org/a": Repo(models["a"])}
    code = (
        "import sys\n"
        "from merging.checkpoints.checkpoint import open_all\n"
        "from common.errors import CheckpointError\n"
        "found = open_all(['org/base', 'org/a', *sys.argv[1:]], headers_only=True)\n"
        "assert found[0].tensors.keys() == found[2].tensors.keys() == found[1].tensors.keys()\n"
        "assert all(found[0].tensors[n].shape == i.shape and found[0].tensors[n].dtype == i.dtype\n"
        "           for n, i in found[2].tensors.items())\n"
        "print(found[0].commit, found[0].exact_name, *found[0].licenses)\n"
        "try:\n"
        "    found[1].read('lm_head.weight')\n"
        "except CheckpointError as error:\n"
        "    assert 'only headers were fetched' in str(error)\n"
    )
    done = run_script("-c", code, models["base"], **settings)
    assert done.returncode == 0, done.stderr
    commit = hub.repos["org/base"].commit
    assert done.stdout.split() == [commit, f"org/base@{commit}", "mit"]
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_adapter_and_gguf_on_the_hub(hub: Hub, run: Run, opened: Run, models: dict[str, Path], tmp_path: Path) -> None:
    """`org/base+org/lora` and `org/quantised/model.gguf` are fetched as they are needed, and give what they give from
    folders; a repository of .gguf files asks for the name of one."""
    from tests.merging.checkpoints.test_inputs import train, write_gguf

    train(models["base"], tmp_path / "lora")
    (tmp_path / "gguf").mkdir()
    write_gguf(models["a"], tmp_path / "gguf" / "model.gguf")
    write_gguf(models["a"], tmp_path / "gguf" / "other.gguf")
    hub.repos |= {
        "org/base": Repo(models["base"]), "org/lora": Repo(tmp_path / "lora"), "org/quantised": Repo(tmp_path / "gguf"),
        "org/again": Repo(tmp_path / "gguf"),
    }  # fmt: skip
    done = run("org/base", "org/base+org/lora,org/quantised/model.gguf")
    assert done.returncode == 0, done.stderr
    assert hub.downloads(".gguf") == ["org/quantised/model.gguf"]
    assert hub.downloads("adapter_model.safetensors") == ["org/lora/adapter_model.safetensors"]
    result = (tmp_path / "out" / "model.safetensors").read_bytes()
    local = f"{models['base']}+{tmp_path / 'lora'},{tmp_path / 'gguf' / 'model.gguf'}"
    assert merged(str(models["base"]), local, tmp_path / "local") == result
    for name, code, sentence in (
        ("org/quantised/none.gguf", 2, "Model org/quantised has no file none.gguf on the hub"),
        ("org/quantised", 1, "and no other weights; name one of them: org/quantised/model.gguf"),
        ("org/again", 1, "(one of several .gguf files is named as org/again/file.gguf)"),
    ):
        done = opened("org/base", name)
        assert (done.returncode, sentence in done.stderr) == (code, True), done.stderr


def test_adapters_alone_are_downloaded(
    hub: Hub, run_script: Run, settings: dict[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    """A merge of adapters into an adapter fetches their weights and of the base's only the headers; the result names
    the base as the hub does, and has the bytes of a local merge."""
    for i, name in enumerate("xy"):
        train(models["base"], tmp_path / name, seed=i)
        hub.repos[f"org/{name}"] = Repo(tmp_path / name)
    hub.repos["org/base"] = Repo(models["base"])
    command = ("merge.py", "--method", "linear", "--save_as", "adapter", "--no-load_check", "--quiet")
    done = run_script(*command, "--models_to_merge", "org/base+org/x,org/base+org/y", "--save_path", tmp_path / "out",
                      **settings)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.downloads(".safetensors") == [f"org/{name}/adapter_model.safetensors" for name in "xy"]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    local = ",".join(f"{models['base']}+{tmp_path / name}" for name in "xy")
    assert merge_script.main([*command[1:], "--models_to_merge", local, "--save_path", str(tmp_path / "local")]) == 0
    files = [tmp_path / out / "adapter_model.safetensors" for out in ("out", "local")]
    assert files[0].read_bytes() == files[1].read_bytes()
