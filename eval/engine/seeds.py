"""Seeds of single requests, for models whose draws are made elsewhere."""

from __future__ import annotations

import hashlib

from eval.harness.request_types import Request


def seed_of(request: Request) -> int:
    """A seed of this request's own, from the run's seed, its key and the number of its sample."""
    text = f"{request.seed}:{request.key}:{request.number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
