"""Links for tests: time that only they move, and a record of what crossed."""

from __future__ import annotations

from dataclasses import dataclass, field

from hobbit_jax.cache.link import Link, ThrottledLink, Upload
from hobbit_jax.experts.store import HostExperts


@dataclass
class Clock:
    """Seconds that pass when somebody sleeps, or when a test says so."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += max(seconds, 1e-9)  # floating point: never stand still


def expert_of(store):
    """Which expert a link is carrying, by where its first matrix lies in the file."""
    where = {}
    for precision, layers in enumerate(store.precisions):
        for layer, experts in enumerate(layers):
            for expert in range(store.config.n_experts):
                where[experts.gate.raw[expert].ctypes.data] = (precision, layer, expert)
    return lambda raw: where[raw[0].ctypes.data]


@dataclass
class Recorded:
    """Another link, and what it was asked for in turn; an upload may be made to fail."""

    store: HostExperts
    link: Link = field(default_factory=Link)
    events: list = field(default_factory=list)  # ("send" or "fetch", (precision, layer, expert))
    sent_bytes: int = 0
    fails: tuple[str, int] | None = None  # "wait" or "send", and after how many of them

    def __post_init__(self):
        self._expert_of = expert_of(self.store)

    def _note(self, what: str, expert) -> None:
        self.events.append((what, expert))
        if self.fails is not None and self.fails[0] == what:
            self.fails = (what, self.fails[1] - 1)
            if self.fails[1] < 0:
                self.fails = None
                raise RuntimeError("the bus is down")

    @property
    def clock(self):
        return self.link.clock

    def send(self, raw, device) -> Upload:
        expert = self._expert_of(raw)
        self._note("send", expert)
        self.sent_bytes += sum(part.nbytes for part in raw)
        upload = self.link.send(raw, device)

        def wait():
            self._note("fetch", expert)
            return upload()

        return wait


def throttled(store, gb_s: float) -> tuple[Recorded, Clock]:
    """A recorded link of so many GB/s in virtual time."""
    clock = Clock()
    return Recorded(store, ThrottledLink(gb_s, 10.0, clock)), clock
