"""What a cache and its engine did, counted in one way: live, replayed and measured. No JAX here."""

from dataclasses import dataclass, field, replace
from typing import Self


@dataclass
class Counts:
    """Sums. A use is a hit or a miss of an expert's copy in one step of a layer."""

    tokens: int = 0  # decoded, of all sequences
    selections: int = 0  # of experts by the router, for real tokens
    demoted: int = 0  # selections served below the precision that the plan asked for
    low: int = 0  # selections served below native
    skipped: int = 0  # selections asked for and not served
    hits: int = 0  # uses whose copy was resident
    misses: int = 0  # other uses
    native_uses: int = 0  # of hits and misses, those of native copies
    bytes_read: int = 0  # of the copies used
    computed: int = 0  # misses that the CPU computed
    bytes_computed: int = 0  # of their copies
    promotions: int = 0  # copies loaded in the background
    bytes_moved: int = 0  # sent to the device, also in vain
    bytes_ahead: int = 0  # of them, sent beside what was waited for (guesses, later batches)
    bytes_dropped: int = 0  # of those, given up unused
    link_wait_s: float = field(default=0.0, compare=False)  # for uploads, by the link's clock
    host_round_trips: int = 0  # times that decode left the device for a missing expert

    @property
    def uses(self) -> int:
        """Hits and misses."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float | None:
        """Hits over uses (0-1); None before the first."""
        return self.hits / self.uses if self.uses else None

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: n + vars(other)[name] for name, n in vars(self).items()})

    def __sub__(self, other: Self) -> Self:
        return type(self)(**{name: n - vars(other)[name] for name, n in vars(self).items()})

    def take(self) -> Self:
        """Returns the counts so far and starts again from zero."""
        before = replace(self)
        vars(self).update(vars(Counts()))
        return before
