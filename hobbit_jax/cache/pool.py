"""The slot pool: a fixed number of bytes on the device that holds the hot experts.

Owns who is in which slot, and every host-to-device copy of an expert. One bank per expert
signature, sized exactly, so that a low-bit expert takes only its own bytes; each bank has its own
policy. The arrays are `device_banks.py`'s; raw GGUF blocks go up in one contiguous copy per matrix
(`link.py`).

Uploads ahead of their use (of later rounds, of guesses) lie beside the banks in at most
`staging_bytes`, besides the one expert that is waited for, and get a slot when they are needed and
not before. So what is resident, and every result, is the same with them and without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import numpy as np

from hobbit_jax.cache.device_banks import DeviceBanks, Layout
from hobbit_jax.cache.link import DirectLink, InPlace, Link, Upload
from hobbit_jax.cache.policies import Policy, PolicyFactory, Step
from hobbit_jax.experts.store import ExpertKey, HostExperts
from pallas_kernels.reference import Bank, Signature


@dataclass
class PoolStats:
    """Counts since the last `reset`; arrays are [tiers, L, E]."""

    hits: np.ndarray
    misses: np.ndarray
    bytes_moved: int = 0  # sent to the device, also in vain
    ahead_bytes: int = 0  # of them, sent beside what was waited for: guesses, later rounds
    dropped_bytes: int = 0  # of those, given up since the layer did not choose them
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
            f"the upload of expert {key.expert} of layer {key.layer}, tier {key.tier}, "
            f"to {device or 'the device'} failed: {error}"
        ) from error


def holds_all(store: HostExperts, slots: Mapping[Signature, int]) -> bool:
    """Whether every expert of every bank has a slot of its own."""
    demanded = Counter(layer.signature for layers in store.tiers for layer in layers)
    return all(n >= demanded[s] * store.config.n_experts for s, n in slots.items())


def interleaved(rounds: Iterable[list[list[ExpertKey]]]) -> list[list[ExpertKey]]:
    """Rounds of several banks or devices, the first of each together, then the second of each."""
    return [[key for part in parts for key in part or ()] for parts in zip_longest(*rounds)]


class Use(NamedTuple):
    """One expert's use in one step of one layer, for the policies."""

    key: ExpertKey
    weight: float = 1.0  # its largest router weight among the step's tokens
    native: bool = True  # whether native precision was asked for


class SlotPool:
    """Banks, slot table and policies under one byte budget (`cache/budget.py` divides it).

    All of it is on `device`, or on the process's first; several devices have a `ShardedPool` of
    such pools.
    """

    mesh = None

    def __init__(
        self,
        store: HostExperts,
        slots: Mapping[Signature, int],
        budget_bytes: int,
        policy: PolicyFactory,
        link: Link | None = None,
        staging_bytes: int = 0,
        device: Any = None,  # a jax.Device
        layouts: Mapping[Signature, Layout] | None = None,
    ):
        self.store, self.device = store, device
        self.budget_bytes, self.staging_bytes = budget_bytes, staging_bytes
        self.link = DirectLink() if link is None else link
        self.slots = dict(slots)
        self._on_device = DeviceBanks(store, slots, device, layouts)
        self.policies: dict[Signature, Policy[ExpertKey]] = {s: policy(n) for s, n in slots.items()}
        self._free = {signature: list(range(n))[::-1] for signature, n in slots.items()}
        self._slot_of: dict[ExpertKey, int] = {}
        self._staged: dict[ExpertKey, Upload] = {}  # get a slot at `commit`
        self._expected: dict[ExpertKey, Upload] = {}  # get one when they are needed
        self._hear: Callable[[Iterable[ExpertKey]], object] = lambda keys: None
        self.stats = self._zero_stats()
        if self.device_bytes > budget_bytes:
            raise RuntimeError(f"banks take {self.device_bytes} of {budget_bytes} bytes")

    def _zero_stats(self) -> PoolStats:
        shape = (len(self.store.tiers), self.store.config.n_layers, self.store.config.n_experts)
        return PoolStats(np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    @property
    def banks(self) -> dict[Signature, Bank]:
        """For compiled programs to read."""
        return self._on_device.banks

    @property
    def table_UE(self) -> jax.Array:
        """The slot of each expert, by row `tier * L + layer`, for compiled programs to read."""
        return self._on_device.table_UE

    @property
    def device_bytes(self) -> int:
        """Bytes of all banks, as the device counts them."""
        return self._on_device.nbytes

    def expected(self) -> frozenset[ExpertKey]:
        """Every expert whose upload was begun ahead of its use."""
        return frozenset(self._expected)

    @property
    def expected_bytes(self) -> int:
        """Bytes of the uploads ahead of their use, `staging_bytes` at most."""
        return sum(map(self.store.expert_bytes, self._expected))

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

    def access(self, step: Step, uses: Sequence[Use], wished: Sequence[Use] = ()) -> None:
        """Records one use of each expert in a step of a layer, before anything is loaded for it.

        `wished` copies were asked for and another tier served: the policies hear of them, the
        counts do not. Uploads that were expected of this layer and are not used are given up.
        """
        if self._expected:
            used = {key for key, _, _ in uses}
            self.drop_expected(
                [key for key in self._expected if key.layer == step.layer and key not in used]
            )
        for policy in self.policies.values():
            policy.begin_step(step)
        for key, weight, native in uses:
            hit = self.policies[self.store.signature(key)].access(key, weight, native)
            (self.stats.hits if hit else self.stats.misses)[key] += 1
        self._hear(use.key for use in uses)
        for key, weight, native in wished:
            if (policy := self.policies.get(self.store.signature(key))) is not None:
                policy.access(key, weight, native)

    def hear_uses(self, hear: Callable[[Iterable[ExpertKey]], object]) -> None:
        """Has `hear` told of each step's uses."""
        self._hear = hear

    def rounds(self, keys: Iterable[ExpertKey]) -> list[list[ExpertKey]]:
        """Splits one step's experts of one bank into rounds that fit its slots together.

        Resident experts come first, so that a round that must evict does not
        evict what the step still needs.
        """
        ordered = sorted(keys, key=lambda key: (key not in self._slot_of, key))
        if not ordered:
            return []
        signature = self.store.signature(ordered[0])
        # Pinned experts of this step are all in the first round; in later ones they only take room.
        pinned = self.policies[signature].pinned
        first = self.slots[signature] - len(pinned - set(ordered))
        size = self.slots[signature] - len(pinned)
        if len(ordered) > first and size < 1:
            raise RuntimeError(f"every slot of bank {signature} is pinned")
        starts = range(first, len(ordered), max(size, 1))
        return [ordered[:first], *(ordered[i : i + size] for i in starts)]

    def entries(self, keys: Iterable[ExpertKey]) -> list[list[ExpertKey]]:
        """Rounds of one step's experts of all banks: each bank's next round at a time."""
        by_bank: dict[Signature, list[ExpertKey]] = {}
        for key in keys:
            by_bank.setdefault(self.store.signature(key), []).append(key)
        return interleaved(self.rounds(of_bank) for of_bank in by_bank.values())

    def load(
        self,
        keys: Sequence[ExpertKey],
        keep: Iterable[ExpertKey] | None = None,
        upcoming: Iterable[ExpertKey] = (),
    ) -> None:
        """Makes all of `keys` (one round, or a piece of it) resident.

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
            upload = self._claim(key)
            if self._begin(missing[index + 1 :]):
                self.expect(upcoming)
            self._fetch(key, held, upload)
        self.expect(upcoming)

    def expect(self, keys: Iterable[ExpertKey]) -> None:
        """Starts uploads ahead of use, in turn, until `staging_bytes` are taken.

        Their slots come with `load`; `access` to their layer gives up those that it does not use.
        """
        before = self.stats.bytes_moved
        self._begin(keys)
        self.stats.ahead_bytes += self.stats.bytes_moved - before

    def _begin(self, keys: Iterable[ExpertKey]) -> bool:
        """Starts uploads as `expect` does; whether there was room for all of them."""
        for key in keys:
            known = key in self._slot_of or key in self._staged or key in self._expected
            if known or self.store.signature(key) not in self.banks:
                continue
            if self.expected_bytes + self.store.expert_bytes(key) > self.staging_bytes:
                return False
            self._expected[key] = self._send(key)
        return True

    def drop_expected(self, keys: Iterable[ExpertKey] | None = None) -> None:
        """Gives up uploads that were expected to be used; all of them for None."""
        for key in list(self._expected if keys is None else keys):
            del self._expected[key]
            self.stats.dropped_bytes += self.store.expert_bytes(key)

    def load_all(self, tier: int) -> None:
        """Makes every expert of a tier resident, in a pool that has room for all of them."""
        config = self.store.config
        for layer in range(config.n_layers):
            self.load([ExpertKey(tier, layer, expert) for expert in range(config.n_experts)])

    def stage(self, key: ExpertKey) -> None:
        """Starts the upload of an expert that nobody waits for; `commit` gives it a slot.

        Programs that run meanwhile do not see it. Nothing happens if it is resident or staged, or
        has no bank.
        """
        known = key in self._slot_of or key in self._staged
        if not known and self.store.signature(key) in self.banks:
            self._staged[key] = self._claim(key)

    def commit(self) -> None:
        """Gives every staged expert a slot, between two entries of a program."""
        for key in list(self._staged):
            policy = self.policies[self.store.signature(key)]
            if len(policy.pinned) < policy.capacity and key not in self._slot_of:
                self._fetch(key, frozenset(), self._claim(key))
            self._staged.pop(key, None)

    def _claim(self, key: ExpertKey) -> Upload:
        """The upload of an expert that is to have a slot, if it was not begun before."""
        return self._staged.pop(key, None) or self._expected.pop(key, None) or self._send(key)

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
        self.store.check_unchanged(key.tier)
        policy, free = self.policies[signature], self._free[signature]
        victim = policy.admit(key, keep)
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
        policy, n_slots = self.policies[signature], self.slots[signature]
        for layer, tier in np.ndindex(self.store.config.n_layers, len(self.store.tiers)):
            for expert in range(self.store.config.n_experts):
                key = ExpertKey(tier, layer, expert)
                if self.store.signature(key) == signature:
                    self._slot_of.pop(key, None)
                    if key in policy:
                        policy.unpin(key)
                        policy.remove(key)
        self._free[signature] = list(range(n_slots))[::-1]
        if self._on_device.is_lost(signature):
            self._on_device.renew(signature, n_slots)
        self._on_device.write_table(self._slot_of)

    def pin(self, keys: Iterable[ExpertKey]) -> None:
        """Loads `keys` and keeps them resident until `unpin`; not counted as accesses.

        Raises:
            ValueError: a bank would keep no slot to stream the rest through.
        """
        wanted = list(keys)
        for signature, policy in self.policies.items():
            of_bank = {key for key in wanted if self.store.signature(key) == signature}
            total = len(policy.pinned | of_bank)
            least = min(self.slots[signature], self.store.config.experts_per_token)
            if of_bank and total > self.slots[signature] - least:
                raise ValueError(
                    f"pinning {total} experts leaves bank {signature} fewer than {least} of its "
                    f"{self.slots[signature]} slots to stream through"
                )
        for key in wanted:
            if key not in self._slot_of:
                self._fetch(key, frozenset(wanted), self._claim(key))
            self.policies[self.store.signature(key)].pin(key)

    def unpin(self, keys: Iterable[ExpertKey]) -> None:
        """Gives pinned experts back to the policy."""
        for key in keys:
            self.policies[self.store.signature(key)].unpin(key)

    def evicted_for(self, key: ExpertKey) -> ExpertKey | None:
        """Whom the arrival of `key` would evict; None if a slot is free or it has no bank."""
        signature = self.store.signature(key)
        if signature not in self.banks or self._free[signature]:
            return None
        return self.policies[signature].victim()

    def resize(self, slots: Mapping[Signature, int]) -> None:
        """Divides the budget anew between the same banks; residents stay where there is room.

        Only between two steps. Whom a bank loses is its policy's choice. The old arrays are given
        up before the new ones are made, so that the budget is kept at every moment; the residents
        of a bank that changes are uploaded again, which `bytes_moved` counts. Uploads that are
        staged are forgotten.

        Raises:
            ValueError: other banks, more bytes than the budget, or fewer slots than are pinned;
                the pool is as before.
        """
        self._check_division(slots)
        changed = [s for s in self.slots if slots[s] != self.slots[s]]
        self._staged.clear()
        self.drop_expected()
        try:
            for signature in changed:
                for victim in self.policies[signature].resize(slots[signature]):
                    del self._slot_of[victim]
                self._on_device.give_back(signature)
            for signature in changed:
                self._refill(signature, slots[signature])
        except BaseException:
            # Banks, table and policies that do not fit together hold nothing.
            for signature in changed:
                self._on_device.give_back(signature)
                self.slots[signature] = slots[signature]
                self._empty(signature)
                self.policies[signature].resize(slots[signature])
            raise
        self._on_device.write_table(self._slot_of)

    def _check_division(self, slots: Mapping[Signature, int]) -> None:
        if slots.keys() != self.slots.keys():
            raise ValueError(f"got slots for banks {list(slots)}; want {list(self.slots)}")
        expert_bytes = {e.signature: e.expert_bytes for tier in self.store.tiers for e in tier}
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
        self.slots[signature] = n_slots
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
