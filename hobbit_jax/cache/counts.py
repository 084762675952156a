"""What a cache and its engine did, counted in one way: live, replayed and measured. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass
class Counts:
    """Sums. A use is a hit or a miss of an expert's copy in one step of a layer.

    Attributes:
        tokens: decoded, of all sequences.
        selections: of experts by the router, for real tokens.
        demoted: selections served below the precision that the plan asked for.
        low: selections served below native.
        skipped: selections asked for and not served.
        hits, misses: uses whose copy was resident, and others.
        native_uses: of both, those of native copies.
        bytes_read: of the copies used.
        computed, bytes_computed: of the misses, those that the CPU computed.
        promotions: copies loaded in the background.
        bytes_moved: sent to the device, also in vain.
        bytes_ahead: of them, sent beside what was waited for (guesses, later batches).
        bytes_dropped: of those, given up unused.
        link_wait_s: seconds that the host waited for uploads, by the link's clock.
        host_round_trips: times that decode left the device for a missing expert.
    """

    tokens: int = 0
    selections: int = 0
    demoted: int = 0
    low: int = 0
    skipped: int = 0
    hits: int = 0
    misses: int = 0
    native_uses: int = 0
    bytes_read: int = 0
    computed: int = 0
    bytes_computed: int = 0
    promotions: int = 0
    bytes_moved: int = 0
    bytes_ahead: int = 0
    bytes_dropped: int = 0
    link_wait_s: float = field(default=0.0, compare=False)
    host_round_trips: int = 0

    @property
    def uses(self) -> int:
        """Hits and misses."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float | None:
        """Hits over uses (0-1); None before the first."""
        return self.hits / self.uses if self.uses else None

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: n + vars(other)[name] for name, n in vars(self).items()})

    def __sub__(self, other: Counts) -> Counts:
        return Counts(**{name: n - vars(other)[name] for name, n in vars(self).items()})

    def take(self) -> Counts:
        """Returns the counts so far and starts again from zero."""
        before = replace(self)
        vars(self).update(vars(Counts()))
        return before
