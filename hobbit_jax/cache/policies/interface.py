"""What every eviction policy is: the order in which resident experts give up their slots.

A policy is pure Python: no storage, no copies, no JAX. Callers walk a model like this, for every
token (or prefill chunk) and layer:

    policy.begin_step(Step(token, layer, position))
    missing = policy.access_all(keys, weights, native)
    for key in missing:
        victim = policy.admit(key, keep=keys)  # the slot is the victim's, or a free one if None

All of one step's keys are accessed before the first is admitted, and all are resident after it.
Bypassing does not exist: a policy with doubts about a newcomer makes it the next victim instead.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Step(NamedTuple):
    """Where in the model, and in the text, the next accesses take place."""

    token: int  # tokens (or prefill chunks) before this one, over all sequences; never decreases
    layer: int
    position: int  # of the token in its sequence; 0 begins a new one


class Policy(ABC, Generic[Key]):
    """Which keys are resident, and who goes next; `capacity` is in slots.

    Raises:
        ValueError: no slot, or another argument out of its range.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a policy needs at least one slot")
        self.capacity = capacity
        self._resident: dict[Key, Any] = {}  # what is kept of a key is the policy's own
        self._pinned: set[Key] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    def begin_step(self, step: Step) -> None:
        """Says where the accesses that follow take place; once per step, before them."""

    @abstractmethod
    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        """Records one use of `key`; True if it was resident.

        `weight` is its router weight in this selection, 0-1, and `native` says whether the
        selection asked for native precision.
        """

    def access_all(
        self, keys: Sequence[Key], weights: Sequence[float], native: bool = True
    ) -> list[Key]:
        """`access` of each of one step's keys; the missing ones, in order.

        A policy on which much time is spent may have it in one call instead of one a key.
        """
        uses = zip(keys, weights, strict=True)
        return [key for key, weight in uses if not self.access(key, weight, native)]

    def admit(self, key: Key, keep: Collection[Key] = ()) -> Key | None:
        """Makes a missing `key` resident; returns the key evicted for it, if any.

        Neither pinned keys nor those in `keep` (in use by the current step) are evicted. It is no
        use: a key loaded ahead of its use is admitted without an access.

        Raises:
            RuntimeError: `key` is resident already, or nothing may be evicted; the policy is as
                before.
        """
        if key in self._resident:
            raise self._resident_already(key)
        victim = None
        if len(self._resident) >= self.capacity:
            victim = self.victim(keep)
            self._delete(victim)
        self._insert(key)
        return victim

    @abstractmethod
    def victim(self, keep: Collection[Key] = ()) -> Key:
        """The resident that `admit` would evict if no slot were free; RuntimeError for nobody."""

    def _insert(self, key: Key) -> None:
        """Makes an absent key resident."""
        self._resident[key] = None

    def _delete(self, key: Key) -> None:
        """Makes a resident key absent."""
        del self._resident[key]

    def resize(self, capacity: int) -> list[Key]:
        """Changes the number of slots; returns whom it evicts, in the policy's own order.

        What the policy has learned stays. ValueError, and nothing changes, if there are fewer slots
        than one or than pinned keys.
        """
        least = max(1, len(self._pinned))
        if capacity < least:
            raise ValueError(f"capacity is {capacity}; want at least {least}")
        evicted = []
        while len(self) > capacity:
            evicted.append(self.victim())
            self._delete(evicted[-1])
        self.capacity = capacity
        return evicted

    def remove(self, key: Key) -> None:
        """Gives up a resident key outside the order: its upload failed, say.

        KeyError if it is not resident, RuntimeError if it is pinned.
        """
        if key not in self:
            raise KeyError(key)
        if key in self._pinned:
            raise RuntimeError(f"{key} is pinned")
        self._delete(key)

    def pin(self, key: Key) -> None:
        """Protects a resident key from eviction until `unpin`. KeyError if it is absent."""
        if key not in self:
            raise KeyError(key)
        self._pinned.add(key)

    def unpin(self, key: Key) -> None:
        """Undoes `pin`; a key that is not pinned stays as it is."""
        self._pinned.discard(key)

    @property
    def pinned(self) -> frozenset[Key]:
        """The keys that `pin` protects."""
        return frozenset(self._pinned)

    def _resident_already(self, key: Key) -> RuntimeError:
        return RuntimeError(f"{key} is resident already")

    def _all_in_use(self) -> RuntimeError:
        return RuntimeError(
            f"all {self.capacity} slots are pinned or in use ({len(self._pinned)} pinned)"
        )
