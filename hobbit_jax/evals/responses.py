"""Finished requests of a long evaluation, kept so that an interrupted one goes on.

lm-eval's own cache keys a request by its text alone; here a folder belongs to everything that an
answer depends on. Each batch is one file that appears whole or not at all, so several processes may
share a folder.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hobbit_jax.atomic import replacing


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Responses:
    """Answers by request, in a folder or, with None, in memory alone.

    `identity` is whatever they depend on besides the request (model, plan, limits), as JSON.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]):
        self._folder = None
        self._answers: dict[str, Any] = {}
        self._fresh: dict[str, Any] = {}
        if folder is not None:
            self._folder = folder / _digest(identity)[:16]
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self._folder.glob("*.json")):
                # Another process's clean-up or a damaged file costs its requests, nothing more.
                with contextlib.suppress(OSError, ValueError):
                    self._answers.update(json.loads(path.read_text(encoding="utf-8")))

    def find(self, *request: Any) -> Any | None:
        """The answer to `request` (kind, texts, options), or None."""
        return self._answers.get(_digest(request))

    def add(self, answer: Any, *request: Any) -> None:
        """Remembers an answer, which is any JSON but null."""
        key = _digest(request)
        self._answers[key] = self._fresh[key] = answer

    def flush(self) -> None:
        """Writes what was added since the last time."""
        if self._folder is not None and self._fresh:
            path = self._folder / f"{_digest(sorted(self._fresh))[:16]}.json"
            with replacing(path) as partial:
                partial.write_text(json.dumps(self._fresh), encoding="utf-8")
        self._fresh = {}
