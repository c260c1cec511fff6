"""--backend openai: a served checkpoint answers as the same checkpoint in this process; what servers do wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.cli import run
from common.errors import BadInputError, EvaluationError
from eval.harness.journal import Journal
from eval.outcomes import Outcomes
from eval.results.store import model_folder
from eval.settings import Settings
from evaluate_model import main
from tests.helpers.completions_server import Served, serving


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    """The tiny checkpoint behind HTTP."""
    with serving(checkpoint, "tiny-llama") as server:
        yield server


@pytest.fixture
def settings(data_dir: Path, served: Served, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A subject of MMLU and GSM8K, asked of the server."""
    from lm_eval.models import api_models
    from tenacity import wait_none

    monkeypatch.setattr(api_models, "wait_exponential", lambda **_: wait_none())
    served.requests.clear()
    return Settings(
        benchmarks=("mmlu_anatomy",), math_benchmarks=("gsm8k",), data_dir=data_dir, offline=True, dtype="float32",
        math_max_tokens=8, quiet=True, backend="openai", base_url=served.url, model_args={"tokenizer": str(checkpoint)},
    )  # fmt: skip


def test_a_server_answers_as_the_model_here(
    checkpoint: Path, served: Served, settings: Settings, tmp_path: Path
) -> None:
    """The same texts and outcomes, and log-likelihoods to 1e-4, as from the checkpoint in this process."""
    from eval.harness.evaluation import evaluate

    remote = evaluate("tiny-llama", settings, save_path=tmp_path)
    local = evaluate(str(checkpoint), replace(settings, backend="hf", base_url=None, model_args={}), save_path=tmp_path)
    assert remote.scores == local.scores
    for column, outcomes in local.outcomes.items():
        assert isinstance(outcomes, Outcomes)
        assert remote.outcomes[column] == outcomes
    pairs = [_answers(model_folder(tmp_path, name)) for name in ("tiny-llama", str(checkpoint))]
    assert pairs[0].keys() == pairs[1].keys()
    for place, answer in pairs[1].items():
        assert pairs[0][place] == (answer if isinstance(answer, str) else pytest.approx(answer, abs=1e-4))
    assert remote.digest == f"server:tiny-llama@{served.url}"
    assert (remote.settings["backend"], remote.settings["max_length"]) == ("openai", 512)
    before = len(served.requests)
    again = evaluate("tiny-llama", settings, save_path=tmp_path)
    assert len(served.requests) == before
    assert again.scores == remote.scores


def _answers(folder: Path) -> dict[tuple[str, int, int], object]:
    import json

    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    return {(e["task"], e["item"], e["n"]): e["answer"] for e in lines if "key" in e}


def test_another_model_behind_the_same_name_is_asked_again(
    served: Served, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of a served model are not used for another `root` or `created`; a server that gives the time of the
    question as `created` is one model."""
    from eval.harness.evaluation import evaluate

    one = replace(settings, benchmarks=(), limits={"": 1})

    def new(**card: object) -> int:
        monkeypatch.setattr(served, "card", card)
        return int(evaluate("tiny-llama", one, save_path=tmp_path).settings["answers"]["new"])

    assert [new(created=1), new(created=1), new(created=2), new(created=2, root="/models/b")] == [1, 0, 1, 1]
    assert [new(created=time.time()), new(created=time.time() + 1)] == [1, 0]


def test_samples_are_drawn_by_seeds_of_their_own(served: Served, settings: Settings) -> None:
    """Three draws of each question are sent with three seeds, the same in a second run, and with nothing else that
    changes the distribution."""
    from eval.harness.evaluation import evaluate_with_samples

    drawn = replace(settings, benchmarks=(), n_samples=3, temperature=1.0, limits={"": 2})
    _, samples = evaluate_with_samples("tiny-llama", drawn)
    seeds = [body["seed"] for body in served.requests]
    assert len(set(seeds)) == 6
    assert not {"top_k", "top_p", "repetition_penalty"} & set(served.requests[0])
    assert all(len(set(s["resps"][0])) == 3 for s in samples["gsm8k_paper"])
    assert all(s["tokens"] == [[8, 8, 8]] for s in samples["gsm8k_paper"])
    served.requests.clear()
    _, again = evaluate_with_samples("tiny-llama", drawn)
    assert [s["resps"] for s in again["gsm8k_paper"]] == [s["resps"] for s in samples["gsm8k_paper"]]


def test_log_likelihoods_need_the_tokenizer(served: Served, settings: Settings) -> None:
    """Without it, multiple choice is refused in a sentence that says what to give; generations run."""
    from eval.harness.evaluation import evaluate

    bare = replace(settings, model_args={})
    with pytest.raises(EvaluationError, match="--model_args tokenizer=FOLDER"):
        evaluate("tiny-llama", bare)
    assert evaluate("tiny-llama", replace(bare, benchmarks=())).scores["GSM8K"].n == 4


def test_chats_are_sent_as_messages(served: Served, settings: Settings) -> None:
    """With --apply_chat_template the server renders the chat: messages go to it, their answers come back; benchmarks
    of log-likelihoods cannot be asked so."""
    from eval.harness.evaluation import evaluate_with_samples

    chat = replace(settings, benchmarks=(), apply_chat_template=True, limits={"": 1})
    _, samples = evaluate_with_samples("tiny-llama", chat)
    (body,) = served.requests
    assert body["messages"][0]["role"] == "user"
    assert "How many are left?" in body["messages"][0]["content"]
    prompt = f"user: {body['messages'][0]['content']}\nassistant:"
    assert samples["gsm8k_paper"][0]["resps"] == [[served.generated(prompt, {"max_tokens": 8})]]
    with pytest.raises(EvaluationError, match="Servers do not give log-likelihoods of chats"):
        evaluate_with_samples("tiny-llama", replace(chat, benchmarks=("mmlu_anatomy",)))


def test_a_server_that_fails_now_and_then_is_asked_again(served: Served, settings: Settings, tmp_path: Path) -> None:
    """Failures of the moment (429, 503) are repeated; lasting ones end the run, keeping what was answered, and the
    next run goes on from there."""
    from eval.harness.evaluation import evaluate

    expected = evaluate("tiny-llama", settings).scores
    served.failures[:] = [503, 429, 500]
    assert evaluate("tiny-llama", settings).scores == expected
    served.failures[:] = [503] * 400
    with pytest.raises(EvaluationError, match="stopped answering"):
        evaluate("tiny-llama", replace(settings, batch_size="1"), save_path=tmp_path)
    served.failures.clear()
    assert evaluate("tiny-llama", settings, save_path=tmp_path).scores == expected
    assert Journal(model_folder(tmp_path, "tiny-llama")).answers


@pytest.mark.parametrize("at_once", [1, 8])
def test_a_refused_request_is_not_repeated(
    served: Served, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """A request that the server refuses (400, 404, 413, 422) is sent once and ends the run with the server's words,
    where plain lm-eval sends it again and again; 429 and 503 are sent again by both."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from eval.harness.evaluation import evaluate

    one = replace(
        settings, benchmarks=(), limits={"": 1}, model_args={**settings.model_args, "num_concurrent": at_once}
    )
    for status in (400, 404, 413, 422):
        monkeypatch.setattr(served, "failures", [status] * 20)
        served.requests.clear()
        with pytest.raises(EvaluationError, match=f"refused a request: {status}: .*not now"):
            evaluate("tiny-llama", one, save_path=tmp_path)
        assert len(served.requests) == 1
    for status in (429, 503):
        monkeypatch.setattr(served, "failures", [status] * 3)
        served.requests.clear()
        evaluate("tiny-llama", replace(one, no_cache=True), save_path=tmp_path)
        assert len(served.requests) == 4
    monkeypatch.setattr(served, "failures", [400] * 20)
    served.requests.clear()
    theirs = LocalCompletionsAPI(
        base_url=f"{served.url}/completions", model="tiny-llama", tokenizer_backend=None, num_concurrent=at_once,
        max_retries=3, tokenized_requests=False,
    )  # fmt: skip
    with pytest.raises(Exception, match="400"):
        theirs.generate_until([_instance("hello", ["Q"])], disable_tqdm=True)
    assert len(served.requests) == 3


def _instance(context: str, until: list[str]) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, (context, {"until": until, "max_gen_toks": 8}), 0)


@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.parametrize("tokenized", [True, False])
def test_canonical_solutions_round_trip(
    checkpoint: Path, served: Served, settings: Settings, tokenized: bool, at_once: int
) -> None:
    """HumanEval's 164 and MBPP's 500 solutions, decoded by a server after their prompts, arrive as they are: with
    their first spaces and last newlines, and without the stop string and what follows it, where the server sends
    these; plain lm-eval keeps both."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from eval.harness.backends.openai import make
    from eval.request_types import Facts, Request
    from tests.eval.harness.test_corrections import solutions

    pairs = [(f"{i}\n{prompt[-200:]}", solution) for i, (prompt, solution) in enumerate(solutions())]
    pairs = pairs if at_once == 8 else pairs[::20]
    if at_once == 8 and len(pairs) < 664:
        pytest.skip("no MBPP; set AIM_DATA_DIR")
    rest = ("", "[DONE]", "[DONE]\n  more", "\n#Q")
    served.texts.clear()
    for i, (prompt, solution) in enumerate(pairs):
        before, after = (served.tokenizer.encode(text) for text in (prompt, solution + rest[i % 4]))
        start = len(served.tokenizer.decode(before))
        key = tuple(before) if tokenized else prompt
        served.texts[key] = served.tokenizer.decode([*before, *after])[start:]
    until = ("[DONE]", "\n#Q")
    requests = [
        Request(str(i), "t", i, 0, "generate", prompt, until=until, max_tokens=8) for i, (prompt, _) in enumerate(pairs)
    ]
    options = {"num_concurrent": at_once, **(settings.model_args if tokenized else {})}
    backend = make("tiny-llama", 4096, replace(settings, model_args=options))
    found: dict[str, tuple[Any, Facts]] = {}
    backend.answer(requests, lambda r, a, f: found.update({r.key: (a, f)}))
    assert len(served.requests) == len(pairs)
    assert [found[r.key][0] for r in requests] == [solution for _, solution in pairs]
    assert all(found[str(i)][1].finish == ("stop" if i % 4 else "length") for i in range(len(pairs)))
    theirs = LocalCompletionsAPI.parse_generations({"choices": [{"index": 0, "text": " x[DONE]"}]})
    assert theirs == [" x[DONE]"]
    served.texts.clear()


def test_no_content_is_an_empty_answer(served: Served, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message without content, as of a reasoning model that was cut, is "", not lm-eval's placeholder."""
    from eval.harness.evaluation import evaluate_with_samples

    def nothing(prompt: Any, body: dict[str, Any]) -> None:
        return None

    monkeypatch.setattr(served, "generated", nothing)
    for is_chat in (True, False):
        for at_once in (1, 8):
            options = {**settings.model_args, "num_concurrent": at_once}
            one = replace(settings, benchmarks=(), limits={"": 1}, apply_chat_template=is_chat, model_args=options)
            _, samples = evaluate_with_samples("tiny-llama", one)
            assert samples["gsm8k_paper"][0]["resps"] == [[""]]


def test_a_server_with_few_stop_strings_gives_the_same(
    served: Served, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a server refuses more than four stop strings, four are sent and the rest is cut off here."""
    from eval.harness.evaluation import evaluate_with_samples

    code = replace(settings, benchmarks=("humaneval",), math_benchmarks=(), limits={"": 2}, allow_code_execution=True)
    code = replace(code, max_gen_toks=12)
    _, free = evaluate_with_samples("tiny-llama", code)
    monkeypatch.setattr(served, "most_stops", 4)
    _, few = evaluate_with_samples("tiny-llama", code)
    assert [s["resps"] for s in few["humaneval"]] == [s["resps"] for s in free["humaneval"]]


def test_a_server_without_log_likelihoods_is_told(
    served: Served, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark that needs what a server does not give ends with a sentence that says so."""
    from eval.harness.evaluation import evaluate

    monkeypatch.setattr(served, "log_likelihoods", False)
    with pytest.raises(EvaluationError, match="echo with logprobs"):
        evaluate("tiny-llama", settings)


def test_servers_that_cannot_be_used(
    served: Served,
    settings: Settings,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nobody there, another model, no key, too long a sequence: a sentence and exit code 2 before anything is asked."""
    common = [
        "--data_dir",
        str(data_dir),
        "--benchmarks",
        "mmlu_anatomy",
        "--math_benchmarks",
        "",
        "--backend",
        "openai",
    ]
    for model, url, more, sentence in (
        ("tiny-llama", "http://127.0.0.1:9/v1", [], "There is no server at --base_url"),
        ("tiny-lama", served.url, [], "Did you mean 'tiny-llama'?"),
        ("tiny-llama", served.url, ["--max_model_len", "4096"], "more than the 512 positions"),
        ("tiny-llama", served.url, ["--model_args", "tokenizer=/nowhere"], "tokenizer=/nowhere could not be loaded"),
    ):
        assert run(main, ["--model", model, "--base_url", url, *common, *more]) == 2
        assert sentence in capsys.readouterr().err
    monkeypatch.setattr(served, "key", "secret")
    assert run(main, ["--model", "tiny-llama", "--base_url", served.url, *common]) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    from eval.harness.server import Server

    assert set(Server(served.url).models() or {}) == {"tiny-llama"}
    with pytest.raises(BadInputError, match="does not serve"):
        Server(served.url).check("other")
    assert served.requests == []
