"""Models that a server with OpenAI's protocol lists. Standard library only."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, build_opener
from urllib.request import Request as HTTPRequest

from common.errors import BadInputError, EvaluationError, nearest
from common.files.bounded_reading import MAX_CONFIG, LimitError, parse_json
from common.processes.execution_limits import time_limit
from common.terminal_text import foreign

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.files.json_values import JsonObject, JsonValue

KEY = "OPENAI_API_KEY"
CLOCK = 60.0
"""Seconds between two clocks: a model `created` so near to now was not created, but asked about, now."""

TOTAL_SECONDS = 60.0
"""Time for a whole list of models."""
MAX_NAME, MAX_PATH = 300, 4096
"""Characters of a model's id and of its root; what is longer does not count."""


class _NoRedirect(HTTPRedirectHandler):
    """No redirection is followed: it could lead the key to another server."""

    def redirect_request(self, *_: object) -> None:
        """Follow none: the status becomes an HTTPError."""


OPENER = build_opener(_NoRedirect)


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
            if 300 <= error.status < 400:
                raise BadInputError(
                    f"{self.base_url} leads elsewhere ({error.said}); give that address as --base_url."
                ) from error
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
        return {m["id"]: m for m in listed if isinstance(m, dict) and _is_text(m.get("id"), MAX_NAME)}

    def check(self, model: str) -> JsonObject:
        """Return the server's entry for `model`. Raises BadInputError for an unreachable server or an unknown model."""
        models = self.models()
        if models is None:
            return {}
        if models and model not in models:
            raise BadInputError(
                f"The server at {self.base_url} does not serve {model!r} but {_names(models)}.{nearest(model, models)}"
            )
        return models.get(model, {})

    def identity(self, model: str) -> str:
        """Return a text that differs between models served by the same name and address.

        It has the model's root, and its time of creation, unless that is the time of the question.
        """
        card = (self.models() or {}).get(model, {})
        created = card.get("created")
        is_now = isinstance(created, int | float) and abs(time.time() - created) < CLOCK
        parts = [f"root={card['root']}"] if _is_text(card.get("root"), MAX_PATH) else []
        parts += [f"created={created}"] if isinstance(created, int | float) and not is_now else []
        return " ".join([f"server:{model}@{self.base_url}", *parts])

    def _once(self, path: str, body: JsonObject | None, seconds: float) -> JsonValue:
        url = f"{self.base_url.rstrip('/')}/{path}"
        data = None if body is None else json.dumps(body).encode("utf-8", "surrogatepass")
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        request = HTTPRequest(url, data=data, headers=headers)
        late = f"no complete answer within {TOTAL_SECONDS:g} s"
        try:
            with time_limit(TOTAL_SECONDS, late), OPENER.open(request, timeout=seconds) as answer:
                content = answer.read(MAX_CONFIG + 1)
        except HTTPError as error:
            with time_limit(TOTAL_SECONDS, late):
                reply = error.headers.get("Location") or error.read(2000).decode("utf-8", "replace")
            raise RefusedError(url, error.code, foreign(reply, 300)) from error
        if len(content) > MAX_CONFIG:
            raise LimitError(f"more than {MAX_CONFIG} bytes")
        return parse_json(content, "its answer", allow_surrogates=True)


def reason(error: Exception) -> str:
    """Return the server's error message, shortened."""
    cause = error.reason if isinstance(error, URLError) else error
    return foreign(getattr(cause, "strerror", None) or str(cause) or type(error).__name__, 200).rstrip(".")


def _is_text(value: object, most: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= most


def _names(models: Iterable[str]) -> str:
    return ", ".join(foreign(name) for name in sorted(models)[:5])
