"""The slot pool: a fixed number of bytes on the device that holds the hot experts.

This module owns which slot a copy lies in and every host-to-device copy of an expert; which copies
are loaded and evicted is decided by `controller.py`. There is one bank per expert signature, sized
exactly, so that a low-bit expert takes only its own bytes. The arrays are `device_banks.py`'s; raw
GGUF blocks go up in one contiguous copy per matrix (`link.py`).

Prefetched uploads (of later batches, of guesses) lie beside the banks in at most `staging_bytes`,
besides the one expert that is waited for, and get a slot when they are needed and not before. So
what is resident, and every result, is the same with them and without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hobbit_jax.cache.controller import Controller, Decision
from hobbit_jax.cache.device_banks import DeviceBanks, Layout
from hobbit_jax.cache.link import DirectLink, InPlace, Link, Upload
from hobbit_jax.cache.policies import Policy
from hobbit_jax.experts.store import ExpertKey, HostExperts
from pallas_kernels.reference import Bank as DeviceBank
from pallas_kernels.reference import Signature


@dataclass
class PoolStats:
    """Counts since the last `reset`; arrays are [precisions, L, E]."""

    hits: np.ndarray
    misses: np.ndarray
    bytes_moved: int = 0  # sent to the device, also in vain
    ahead_bytes: int = 0  # of them, sent beside what was waited for: guesses, later batches
    dropped_bytes: int = 0  # of those, given up since the layer did not choose them
    computed: int = 0  # misses that the CPU computed
    host_bytes: int = 0  # read by the CPU for them
    wait_s: float = 0.0  # the host waited for uploads, by the link's clock

    @property
    def hit_rate(self) -> float | None:
        """Hits over accesses (0-1); None before the first access."""
        total = int(self.hits.sum() + self.misses.sum())
        return int(self.hits.sum()) / total if total else None


@contextmanager
def _named(key: ExpertKey, device: Any) -> Iterator[None]:
    """Says whose upload failed."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"the upload of expert {key.expert} of layer {key.layer}, precision {key.precision}, "
            f"to {device or 'the device'} failed: {error}"
        ) from error


def holds_all(store: HostExperts, slots: Mapping[Signature, int]) -> bool:
    """Whether every expert of every bank has a slot of its own."""
    demanded = Counter(layer.signature for layers in store.precisions for layer in layers)
    full = (n >= demanded[s] * store.config.n_experts for s, n in slots.items())
    return bool(slots) and all(full)


class SlotPool:
    """Banks and slot table of one device under a byte budget (`cache/budget.py` divides it).

    Args:
        store: whose experts it holds.
        controller: decides who is loaded and evicted; its banks of `index` are this pool's.
        budget_bytes: of all banks.
        link: the way to the device; None is JAX's own copy.
        staging_bytes: device bytes beside the banks for prefetched uploads.
        index: the number of the device among those that divide the experts.
        device: a jax.Device; None is the process's first.
    """

    mesh = None

    def __init__(
        self,
        store: HostExperts,
        controller: Controller,
        budget_bytes: int,
        link: Link | None = None,
        staging_bytes: int = 0,
        index: int = 0,
        device: Any = None,  # a jax.Device
        layouts: Mapping[Signature, Layout] | None = None,
    ):
        self.store, self.device, self.controller = store, device, controller
        self.budget_bytes, self.staging_bytes = budget_bytes, staging_bytes
        self.link = DirectLink() if link is None else link
        self._own = {bank.signature: bank for bank in controller.banks if bank.device == index}
        self._on_device = DeviceBanks(store, self.slots, device, layouts)
        self._free = {signature: list(range(n))[::-1] for signature, n in self.slots.items()}
        self._slot_of: dict[ExpertKey, int] = {}
        self._reserved: dict[ExpertKey, Upload] = {}  # get a slot at `promote`
        self._prefetched: dict[ExpertKey, Upload] = {}  # get one when they are needed
        self.stats = self._zero_stats()
        if self.device_bytes > budget_bytes:
            raise RuntimeError(f"banks take {self.device_bytes} of {budget_bytes} bytes")

    def _zero_stats(self) -> PoolStats:
        shape = (
            len(self.store.precisions),
            self.store.config.n_layers,
            self.store.config.n_experts,
        )
        return PoolStats(np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    @property
    def slots(self) -> dict[Signature, int]:
        """Of each bank."""
        return {signature: bank.policy.capacity for signature, bank in self._own.items()}

    @property
    def policies(self) -> dict[Signature, Policy[ExpertKey]]:
        """Of each bank."""
        return {signature: bank.policy for signature, bank in self._own.items()}

    @property
    def banks(self) -> dict[Signature, DeviceBank]:
        """For compiled programs to read."""
        return self._on_device.banks

    @property
    def table_UE(self) -> jax.Array:
        """The slot of each expert, by row `precision * L + layer`, for compiled programs to
        read.
        """
        return self._on_device.table_UE

    @property
    def device_bytes(self) -> int:
        """Bytes of all banks, as the device counts them."""
        return self._on_device.nbytes

    def prefetched(self) -> frozenset[ExpertKey]:
        """Every expert whose upload was begun ahead of its use."""
        return frozenset(self._prefetched)

    @property
    def prefetched_bytes(self) -> int:
        """Bytes of the prefetched uploads, `staging_bytes` at most."""
        return sum(map(self.store.expert_bytes, self._prefetched))

    @property
    def holds_all(self) -> bool:
        """Whether every expert of every bank can be resident at once."""
        return holds_all(self.store, self.slots)

    @property
    def held_UE(self) -> jax.Array:
        """A table whose signs say who is resident, for programs that do not read the banks."""
        return self.table_UE

    def by_device(self, keys: Sequence[ExpertKey]) -> list[Sequence[ExpertKey]]:
        """`keys` by the device that holds them."""
        return [keys]

    def resident(self) -> frozenset[ExpertKey]:
        """Every expert that holds a slot."""
        return frozenset(self._slot_of)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._slot_of

    def slot(self, key: ExpertKey) -> int:
        """The slot of a resident expert, in the bank of its signature. KeyError if absent."""
        return self._slot_of[key]

    def begin(self, decision: Decision) -> None:
        """Counts a step's uses; prefetches of its layer that it does not load are given up."""
        if self._prefetched:
            used = {use.key for use in decision.uses}.difference(decision.computed)
            self.drop_prefetched(
                [k for k in self._prefetched if k.layer == decision.step.layer and k not in used]
            )
        missing = set(decision.misses)
        for use in decision.uses:
            (self.stats.misses if use.key in missing else self.stats.hits)[use.key] += 1
        self.stats.computed += len(decision.computed)
        self.stats.host_bytes += sum(map(self.store.expert_bytes, decision.computed))

    def load(
        self,
        keys: Sequence[ExpertKey],
        keep: Iterable[ExpertKey] | None = None,
        upcoming: Iterable[ExpertKey] = (),
    ) -> None:
        """Makes all of `keys` (one batch, or a part of it) resident.

        Args:
            keys: what is needed now.
            keep: not evicted for one another, `keys` among them; None is `keys`.
            upcoming: what is needed next, or may be; its upload goes on beside what runs then.

        Raises:
            ValueError: an expert's scales are damaged.
            OSError: its file is gone or changed.
            RuntimeError: more experts than slots that are not pinned, or an upload failed. The
                pool is whole after each of these, though an expert or a bank's may be missing.
        """
        held = frozenset(keys if keep is None else keep)
        missing = [key for key in keys if key not in self._slot_of]
        upcoming = [key for key in upcoming if key not in missing]
        for index, key in enumerate(missing):
            # Those that are waited for stand before those that are not.
            upload = self._take_upload(key)
            if self._begin_uploads(missing[index + 1 :]):
                self.prefetch(upcoming)
            self._fetch(key, held, upload)
        self.prefetch(upcoming)

    def prefetch(self, keys: Iterable[ExpertKey]) -> None:
        """Starts uploads ahead of use, in turn, until `staging_bytes` are taken.

        Their slots come with `load`; a step of their layer gives up those that it does not use.
        """
        before = self.stats.bytes_moved
        self._begin_uploads(keys)
        self.stats.ahead_bytes += self.stats.bytes_moved - before

    def _begin_uploads(self, keys: Iterable[ExpertKey]) -> bool:
        """Starts uploads as `prefetch` does; whether there was room for all of them."""
        for key in keys:
            known = key in self._slot_of or key in self._reserved or key in self._prefetched
            if known or self.store.signature(key) not in self.banks:
                continue
            if self.prefetched_bytes + self.store.expert_bytes(key) > self.staging_bytes:
                return False
            self._prefetched[key] = self._send(key)
        return True

    def drop_prefetched(self, keys: Iterable[ExpertKey] | None = None) -> None:
        """Gives up prefetched uploads; all of them for None."""
        for key in list(self._prefetched if keys is None else keys):
            del self._prefetched[key]
            self.stats.dropped_bytes += self.store.expert_bytes(key)

    def load_all(self, precision: int) -> None:
        """Makes every expert of a precision resident, in a pool that has room for all of them."""
        config = self.store.config
        for layer in range(config.n_layers):
            self.load([ExpertKey(precision, layer, expert) for expert in range(config.n_experts)])

    def reserve(self, key: ExpertKey) -> None:
        """Starts the upload of an expert that no token waits for; `promote` gives it a slot.

        Programs that run meanwhile do not see it. Nothing happens if it is resident or reserved, or
        has no bank.
        """
        known = key in self._slot_of or key in self._reserved
        if not known and self.store.signature(key) in self.banks:
            self._reserved[key] = self._take_upload(key)

    def promote(self) -> None:
        """Gives every reserved expert a slot, between two calls of a program."""
        for key in list(self._reserved):
            if self.controller.has_unpinned_slot(key) and key not in self._slot_of:
                self._fetch(key, frozenset(), self._take_upload(key))
            self._reserved.pop(key, None)

    def _take_upload(self, key: ExpertKey) -> Upload:
        """The upload of an expert that is to have a slot; begun now, if it was not before."""
        begun = self._reserved.pop(key, None) or self._prefetched.pop(key, None)
        return begun or self._send(key)

    def _send(self, key: ExpertKey) -> Upload:
        raw = self.store.raw(key)
        if self._on_device.is_mapped(self.store.signature(key)):
            return InPlace(raw)
        with _named(key, self.device):
            upload = self.link.send(raw, self.device)
        self.stats.bytes_moved += self.store.expert_bytes(key)
        return upload

    def _fetch(self, key: ExpertKey, keep: frozenset[ExpertKey], upload: Upload) -> None:
        signature = self.store.signature(key)
        began_s = self.link.clock()
        with _named(key, self.device):
            raw = upload.wait()
        self.stats.wait_s += self.link.clock() - began_s
        # On a CPU an upload is the map itself, read only when the slot is written.
        self.store.check_unchanged(key.precision)
        free, victim = self._free[signature], self.controller.admit(key, keep)
        try:
            slot = free[-1] if victim is None else self._slot_of[victim]
            self._on_device.write(key, raw, slot, victim)
            if victim is None:
                free.pop()
            else:
                del self._slot_of[victim]
            self._slot_of[key] = slot
        except BaseException:
            # Failed or interrupted half-way: which of banks, table and policy changed is unknown.
            self._empty(signature)
            raise

    def _empty(self, signature: Signature) -> None:
        """Makes a bank's experts absent, so that banks, table and policy agree for certain."""
        bank = self._own[signature]
        self.controller.forget(bank)
        for key in [key for key in self._slot_of if self.store.signature(key) == signature]:
            del self._slot_of[key]
        self._free[signature] = list(range(bank.policy.capacity))[::-1]
        if self._on_device.is_lost(signature):
            self._on_device.renew(signature, bank.policy.capacity)
        self._on_device.write_table(self._slot_of)

    def pin(self, keys: Iterable[ExpertKey]) -> None:
        """Loads `keys` and keeps them resident until `unpin`; not counted as accesses.

        Raises:
            ValueError: a bank would keep no slot to stream the rest through.
        """
        wanted = list(keys)
        self.controller.check_pins(wanted)
        for key in wanted:
            if key not in self._slot_of:
                self._fetch(key, frozenset(wanted), self._take_upload(key))
            self.controller.pin(key)

    def resize(self, slots: Mapping[Signature, int]) -> None:
        """Divides the budget anew between the same banks; residents stay where there is room.

        Only between two steps. Which experts a bank loses is its policy's choice. The old arrays
        are given up before the new ones are made, so that the budget is kept at every moment; the
        residents of a bank that changes are uploaded again, which `bytes_moved` counts. Reserved
        uploads are forgotten.

        Raises:
            ValueError: other banks, more bytes than the budget, or fewer slots than are pinned;
                the pool is as before.
        """
        self._check_division(slots)
        changed = [s for s, n_slots in self.slots.items() if slots[s] != n_slots]
        self._reserved.clear()
        self.drop_prefetched()
        try:
            for signature in changed:
                for victim in self._own[signature].policy.resize(slots[signature]):
                    del self._slot_of[victim]
                self._on_device.give_back(signature)
            for signature in changed:
                self._refill(signature, slots[signature])
        except BaseException:
            # Banks, table and policies that do not fit together hold nothing.
            for signature in changed:
                self._on_device.give_back(signature)
                self._own[signature].policy.resize(slots[signature])
                self._empty(signature)
            raise
        self._on_device.write_table(self._slot_of)

    def _check_division(self, slots: Mapping[Signature, int]) -> None:
        if slots.keys() != self.slots.keys():
            raise ValueError(f"got slots for banks {list(slots)}; want {list(self.slots)}")
        expert_bytes = {
            e.signature: e.expert_bytes for precision in self.store.precisions for e in precision
        }
        needed = sum(expert_bytes[signature] * n for signature, n in slots.items())
        if needed > self.budget_bytes:
            raise ValueError(f"slots take {needed} bytes; the budget is {self.budget_bytes}")
        for signature, policy in self.policies.items():
            least = max(1, len(policy.pinned))
            if slots[signature] < least:
                raise ValueError(
                    f"{slots[signature]} slots for bank {signature}; want at least {least} "
                    f"({len(policy.pinned)} experts are pinned)"
                )

    def _refill(self, signature: Signature, n_slots: int) -> None:
        """Makes a bank of `n_slots` with the residents that its policy kept."""
        residents = [key for key in self._slot_of if self.store.signature(key) == signature]
        self._on_device.renew(signature, n_slots)
        for slot, key in enumerate(residents):
            with _named(key, self.device):
                raw = self._send(key).wait()
            self._on_device.write(key, raw, slot, None)
            self._slot_of[key] = slot
        self._free[signature] = list(range(len(residents), n_slots))[::-1]

    def reset_stats(self) -> PoolStats:
        """Returns the counts so far and starts again from zero."""
        stats, self.stats = self.stats, self._zero_stats()
        return stats
