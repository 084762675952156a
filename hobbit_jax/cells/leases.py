"""Leases: which of several workers, on one machine or many, makes a thing in a shared folder.

Owns the claim, the heartbeat, and the count of deaths. A lease spares work and nothing else: if two
workers come to make one thing after all, both make it right, and the first to be whole stays
(`atomic.place_first`).

A lease is a file `<name>.<generation>`, made by a hard link, so of several claims one succeeds.
Its owner touches it while it lives. A lease has ended when `<name>.<generation>.end` is there, or
when it was not touched for `stale_s`; the next owner then makes the next generation. A generation
is never taken over in place, so nobody can end a lease that is not the one it looked at.

Ages compare modification times of one file system with each other, so no two clocks are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hobbit_jax.atomic import place_first

STALE_S = 60.0
_BEATS = 6  # while a lease grows stale; a network file system may swallow some
_LEASE_NAME = re.compile(r"(?P<name>.+)\.(?P<generation>\d+)(?P<end>\.end)?")


@dataclass(frozen=True)
class Lease:
    """One claim.

    Attributes:
        name: what is claimed.
        generation: how many claims there were before.
        deaths: owners that died in a row before this one without storing anything.
        reason: of the last death.
    """

    name: str
    generation: int
    deaths: int
    reason: str


class Leases:
    """The leases of one working directory, as one owner sees them.

    Args:
        workdir: the folder that all workers see.
        owner: unique among all workers of all time.
        stale_s: a lease not touched for so long is given up.
    """

    def __init__(self, workdir: Path, owner: str, stale_s: float = STALE_S):
        self.directory = workdir / "leases"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.owner, self.stale_s = owner, stale_s
        self._held: list[Lease] = []
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None

    def claim(self, names: Iterable[str]) -> Lease | None:
        """Takes the first of `names` that nobody alive holds; None if all are held."""
        newest, now = self._newest(), self._now()
        for name in names:
            generation = newest.get(name, -1)
            deaths, reason = 0, ""
            if generation >= 0:
                found = self._read(name, generation)
                # Gone between the listing and now: finished, or free for a claim later.
                if found is None or self._lives(found, now):
                    continue
                deaths, reason = _after(found)
            record = {"owner": self.owner, "deaths": deaths, "reason": reason}
            lease = Lease(name, generation + 1, deaths, reason)
            if place_first(self._path(name, lease.generation), json.dumps(record) + "\n"):
                self._held.append(lease)
                self._beat()
                return lease
        return None

    def advance(self) -> None:
        """Notes in everything held that something was stored: a death after it costs less."""
        for lease in list(self._held):
            with (
                contextlib.suppress(FileNotFoundError),
                self._path(lease.name, lease.generation).open("r+") as file,
            ):
                file.seek(0, os.SEEK_END)
                file.write(".")

    def finish(self, lease: Lease) -> None:
        """Drops a lease whose thing is there, with the generations before it.

        A claim may still succeed afterwards: whoever has claimed looks for the thing first.
        """
        self._held = [held for held in self._held if held != lease]
        for generation in range(lease.generation + 1):
            path = self._path(lease.name, generation)
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.end").unlink(missing_ok=True)

    def end(self, lease: Lease, reason: str = "", counts: bool = False) -> None:
        """Gives a lease back with its thing unmade; it `counts` as a death, or it does not."""
        self._held = [held for held in self._held if held != lease]
        self._end(lease.name, lease.generation, reason, counts)

    def end_all(self, reason: str = "", counts: bool = False) -> None:
        """`end` for everything that is held."""
        for lease in list(self._held):
            self.end(lease, reason, counts)

    def bury(self, owner: str, reason: str = "", counts: bool = False) -> int:
        """`end` for everything that another owner held, who is known to be dead; how many."""
        buried = 0
        for name, generation in self._newest().items():
            found = self._read(name, generation)
            if found is not None and found.owner == owner and found.end is None:
                self._end(name, generation, reason, counts)
                buried += 1
        return buried

    def holders(self) -> dict[str, str]:
        """Owners by name of what is held by the living."""
        now = self._now()
        found = {n: self._read(n, generation) for n, generation in self._newest().items()}
        return {n: f.owner for n, f in found.items() if f is not None and self._lives(f, now)}

    def _path(self, name: str, generation: int) -> Path:
        return self.directory / f"{name}.{generation}"

    def _newest(self) -> dict[str, int]:
        newest: dict[str, int] = {}
        for file_name in os.listdir(self.directory):
            match = _LEASE_NAME.fullmatch(file_name)
            if match and not match["end"] and not file_name.startswith("."):
                newest[match["name"]] = max(int(match["generation"]), newest.get(match["name"], -1))
        return newest

    def _read(self, name: str, generation: int) -> _Found | None:
        path = self._path(name, generation)
        end = None
        with contextlib.suppress(FileNotFoundError):
            end = json.loads(path.with_name(f"{path.name}.end").read_text(encoding="utf-8"))
        try:
            # Opened, not only looked up: NFS asks its server for attributes at an open.
            with path.open(encoding="utf-8") as file:
                touched_s = os.fstat(file.fileno()).st_mtime
                line, _, marks = file.read().partition("\n")
        except FileNotFoundError:
            return None
        return _Found(**json.loads(line), advanced=bool(marks), touched_s=touched_s, end=end)

    def _lives(self, found: _Found, now_s: float) -> bool:
        # A time far ahead is as wrong as one far behind.
        return found.end is None and abs(now_s - found.touched_s) < self.stale_s

    def _now(self) -> float:
        """The file system's own idea of the time."""
        clock = self.directory / f".{secrets.token_hex(6)}.clock"
        descriptor = os.open(clock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            os.utime(descriptor)
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            clock.unlink(missing_ok=True)

    def _end(self, name: str, generation: int, reason: str, counts: bool) -> None:
        path = self._path(name, generation)
        end = json.dumps({"reason": reason, "counts": counts})
        place_first(path.with_name(f"{path.name}.end"), end)

    def _beat(self) -> None:
        if self._heart is None:
            self._heart = threading.Thread(target=self._live, daemon=True, name="heartbeat")
            self._heart.start()

    def _live(self) -> None:
        while not self._closed.wait(self.stale_s / _BEATS):
            for lease in list(self._held):
                # A failure is no reason to stop: what is lost is made twice, and rightly.
                with contextlib.suppress(OSError):
                    os.utime(self._path(lease.name, lease.generation))

    def close(self) -> None:
        """Stops the heartbeat."""
        self._closed.set()
        if self._heart is not None:
            self._heart.join()


@dataclass(frozen=True)
class _Found:
    """A lease as it stands in its file."""

    owner: str
    deaths: int
    reason: str
    advanced: bool
    touched_s: float
    end: dict[str, Any] | None


def _after(found: _Found) -> tuple[int, str]:
    """Deaths in a row, and the last one's reason, when the lease `found` is no more."""
    end = found.end or {"counts": True, "reason": f"worker {found.owner} fell silent"}
    deaths = 0 if found.advanced else found.deaths
    if not end["counts"]:
        return deaths, found.reason
    return deaths + (not found.advanced), end["reason"]
