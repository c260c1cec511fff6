"""A small real server: a checkpoint run by transformers behind OpenAI's protocol, on the loopback.

`transformers serve` speaks the protocol too, but echoes no prompt and gives no log-likelihoods, which multiple-choice
benchmarks need; this server gives both. It can be told to fail.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch


@dataclass
class Served:
    """The running server: its address and model, every request body so far, and how it is to misbehave.

    failures: statuses that the next requests get; most_stops: more stop strings are refused; log_likelihoods: whether
    it gives them; key: the key it wants; card: further entries of its model's card; template: how it renders chats;
    texts: its answers to these prompts (None is no content), in place of its model's.
    """

    name: str
    model: Any
    tokenizer: Any
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    most_stops: int | None = None
    log_likelihoods: bool = True
    key: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    template: str = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    texts: dict[str | tuple[int, ...], str | None] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ids(self, prompt: str | list[int] | list[list[int]]) -> list[int]:
        """Token ids of a prompt, which comes as text, as ids, or as a batch of one."""
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt))
        return [int(i) for one in prompt for i in (one if isinstance(one, list) else [one])]

    def generated(self, prompt: Any, body: dict[str, Any]) -> str | None:
        """The greedy continuation of a prompt, not cut at stop strings that came within its last token."""
        key = prompt if isinstance(prompt, str) else tuple(self.ids(prompt))
        if key in self.texts:
            return self.texts[key]
        ids = torch.tensor([self.ids(prompt)])
        options: dict[str, Any] = {"max_new_tokens": body["max_tokens"], "do_sample": body.get("temperature", 0) > 0}
        if body.get("stop"):
            options |= {"stop_strings": body["stop"], "tokenizer": self.tokenizer}
        if options["do_sample"]:
            torch.manual_seed(body["seed"])
            options["temperature"] = body["temperature"]
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=1, **options)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def echoed(self, prompt: Any) -> dict[str, Any]:
        """Log-likelihoods of a prompt's tokens, with one generated token after them, as completions give them."""
        ids = self.ids(prompt)
        steps = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), dim=-1)
        ids = [*ids, int(steps[-1].argmax())]
        own = [None, *(float(steps[i, t]) for i, t in enumerate(ids[1:]))]
        best = [None, *({self.tokenizer.decode([int(s.argmax())]): float(s.max())} for s in steps)]
        texts = [self.tokenizer.decode([i]) for i in ids]
        return {"tokens": texts, "token_logprobs": own, "top_logprobs": best}


def _handler(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            if self._refused():
                return
            listed = [{"id": served.name, "object": "model", "max_model_len": 512, **served.card}]
            self._send(200, {"object": "list", "data": listed})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append(body)
            if self._refused():
                return
            if served.most_stops is not None and len(body.get("stop", ())) > served.most_stops:
                self._send(400, {"error": {"message": f"stop: at most {served.most_stops} strings"}})
                return
            with served.lock, torch.inference_mode():
                self._send(200, self._completed(body))

        def _completed(self, body: dict[str, Any]) -> dict[str, Any]:
            if self.path.endswith("/chat/completions"):
                prompt = served.tokenizer.apply_chat_template(
                    body["messages"], chat_template=served.template, tokenize=False, add_generation_prompt=True
                )
                message = {"role": "assistant", "content": served.generated(prompt, body)}
                return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
            prompt = body["prompt"]
            if not body.get("echo"):
                choice = {"index": 0, "text": served.generated(prompt, body), "finish_reason": "length"}
                return {"choices": [choice], "usage": {"completion_tokens": body["max_tokens"]}}
            found = served.echoed(prompt) if served.log_likelihoods else None
            usage = {"prompt_tokens": len(served.ids(prompt))}
            return {"choices": [{"index": 0, "text": "", "logprobs": found}], "usage": usage}

        def _refused(self) -> bool:
            if served.key is not None and self.headers.get("Authorization") != f"Bearer {served.key}":
                self._send(401, {"error": {"message": "no key"}})
                return True
            if self.command == "POST" and served.failures:
                self._send(served.failures.pop(0), {"error": {"message": "not now"}})
                return True
            return False

        def _send(self, status: int, data: dict[str, Any]) -> None:
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


@contextmanager
def serving(folder: Path, name: str) -> Iterator[Served]:
    """Serve a checkpoint in float32 under a name on a free port of the loopback."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    served = Served(name, model, AutoTokenizer.from_pretrained(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
