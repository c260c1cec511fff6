"""Models that a server with OpenAI's protocol lists. Standard library only."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import Request as HTTPRequest
from urllib.request import urlopen

from common.errors import BadInputError, EvaluationError, nearest
from common.files.bounded_reading import MAX_INDEX, parse_json

if TYPE_CHECKING:
    from common.files.json_values import JsonObject, JsonValue

KEY = "OPENAI_API_KEY"
CLOCK = 60.0
"""Seconds between two clocks: a model `created` so near to now was not created, but asked about, now."""


class RefusedError(EvaluationError):
    """The server understood a request and refused it; `status` and `said` are its words."""

    def __init__(self, url: str, status: int, reply: str) -> None:
        super().__init__(f"{url} refused a request ({status}): {reply}")
        self.status, self.said = status, reply


@dataclass(frozen=True)
class Server:
    """Address of a server; its key comes from the environment variable OPENAI_API_KEY."""

    base_url: str

    def models(self) -> dict[str, JsonObject] | None:
        """The models it serves by id; None where it does not list them. Raises BadInputError where it is not there."""
        try:
            listing = self._once("models", None, 20.0)
        except RefusedError as error:
            if error.status in (401, 403):
                raise BadInputError(
                    f"{self.base_url} wants a key ({error.status}): put it into the environment variable {KEY}."
                ) from error
            return None
        except (OSError, HTTPException, ValueError) as error:
            raise BadInputError(
                f"There is no server at --base_url {self.base_url} ({reason(error)}); start it, or correct the address."
            ) from error
        listed = listing.get("data") if isinstance(listing, dict) else None
        if not isinstance(listed, list):
            return None
        return {m["id"]: m for m in listed if isinstance(m, dict) and isinstance(m.get("id"), str)}

    def check(self, model: str) -> JsonObject:
        """Return the server's entry for `model`. Raises BadInputError for an unreachable server or an unknown model."""
        models = self.models()
        if models is None:
            return {}
        if models and model not in models:
            raise BadInputError(
                f"The server at {self.base_url} does not serve {model!r} but {', '.join(sorted(models)[:5])}."
                f"{nearest(model, models)}"
            )
        return models.get(model, {})

    def identity(self, model: str) -> str:
        """Return a text that differs between models served by the same name and address.

        It has the model's root, and its time of creation, unless that is the time of the question.
        """
        card = (self.models() or {}).get(model, {})
        created = card.get("created")
        is_now = isinstance(created, int | float) and abs(time.time() - created) < CLOCK
        parts = [f"{name}={value}" for name, value in (("root", card.get("root")), ("created", created))
                 if value is not None and not (name == "created" and is_now)]  # fmt: skip
        return " ".join([f"server:{model}@{self.base_url}", *parts])

    def _once(self, path: str, body: JsonObject | None, seconds: float) -> JsonValue:
        url = f"{self.base_url.rstrip('/')}/{path}"
        data = None if body is None else json.dumps(body).encode("utf-8", "surrogatepass")
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        try:
            with urlopen(HTTPRequest(url, data=data, headers=headers), timeout=seconds) as answer:
                return parse_json(answer.read(MAX_INDEX + 1), url, allow_surrogates=True)
        except HTTPError as error:
            reply = error.read(2000).decode("utf-8", "replace")
            raise RefusedError(url, error.code, " ".join(reply.split())[:300]) from error


def reason(error: Exception) -> str:
    """Return the server's error message, shortened."""
    cause = error.reason if isinstance(error, URLError) else error
    return getattr(cause, "strerror", None) or str(cause) or type(error).__name__
