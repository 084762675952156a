"""The slot pool: a fixed number of bytes on the device that holds the hot experts.

Owns every host-to-device copy of an expert, one contiguous copy per matrix (`link.py`). On each
device there is one bank per expert signature, sized exactly (`device_banks.py`).

Prefetched uploads (of later batches, of guesses) lie beside the banks in at most `staging_bytes`,
besides the one expert that is waited for, and get a slot when they are needed and not before. So
what is resident, and every result, is the same with them and without.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hobbit_jax.cache.controller import Bank as Slots
from hobbit_jax.cache.controller import Controller, Decision
from hobbit_jax.cache.device_banks import DeviceBanks, Layout
from hobbit_jax.cache.link import HostLink, Link, Upload, failing, in_place
from hobbit_jax.cache.warm_start import Executor
from hobbit_jax.experts.store import ExpertKey, HostExperts
from hobbit_jax.models.sharding import assembled, owner
from pallas_kernels.backends import Implementation
from pallas_kernels.ggml.ops import ON_BLOCKS
from pallas_kernels.reference import Bank, Signature


def _uploading(key: ExpertKey, device: Any) -> AbstractContextManager[None]:
    where = f"expert {key.expert} of layer {key.layer}, precision {key.precision}"
    return failing(f"the upload of {where}, to {device or 'the device'}")


class SlotPool(Executor):
    """Banks and slot tables of the devices that divide the experts, each under a byte budget.

    Of several devices, arrays have the parts of each one after another along their leading axis:
    `banks` all slots, `table_UE` every device's table, whose slots count from its own first.

    Args:
        store: whose experts it holds.
        controller: decides who is loaded and evicted.
        budget_bytes: of each device's banks (`pool_sizing.py` divides it).
        link: the way to the devices; None is JAX's own copy, or the map where they are the host.
        staging_bytes: of each device, beside the banks, for prefetched uploads.
        mesh: the devices; None is the process's first.
        implementation: of products. Where ggml computes, all experts have slots and no link is
            emulated, the banks are the file's map.
    """

    def __init__(
        self,
        store: HostExperts,
        controller: Controller,
        budget_bytes: int,
        link: Link | None = None,
        staging_bytes: int = 0,
        mesh: Mesh | None = None,
        implementation: Implementation = "xla",
    ):
        super().__init__(controller)
        self.store, self.mesh = store, mesh
        layouts: dict[Signature, Layout] = {
            s: "mapped" if link is None and self.holds_all else "blocks"
            for s in self.slots
            if store.backend(s, implementation) in ON_BLOCKS
        }
        devices: list[Any] = [None] if mesh is None else list(mesh.devices.flat)
        is_host = (devices[0] or jax.devices()[0]).platform == "cpu"
        self.link = link or (HostLink() if is_host else Link())
        self.parts = [
            DeviceBanks(store, [b for b in controller.banks if b.device == index], device, layouts)
            for index, device in enumerate(devices)
        ]
        self._budget_bytes, self._staging_bytes = budget_bytes, staging_bytes
        # Begun ahead of use; their bytes fit `staging_bytes`, and `load` gives each a slot.
        self.prefetched: dict[ExpertKey, Upload] = {}
        self._assembled: dict[Any, tuple[list[Any], Any]] = {}
        for part in self.parts:
            if part.nbytes > budget_bytes:
                raise RuntimeError(f"banks take {part.nbytes} of {budget_bytes} bytes")

    @property
    def slots(self) -> dict[Signature, int]:
        """Of each signature, of all devices together."""
        slots = Counter[Signature]()
        for bank in self.controller.banks:
            slots[bank.signature] += bank.policy.capacity
        return dict(slots)

    @property
    def budget_bytes(self) -> int:
        """Of all devices together."""
        return self._budget_bytes * len(self.parts)

    @property
    def staging_bytes(self) -> int:
        """Of all devices together."""
        return self._staging_bytes * len(self.parts)

    def _whole(self, name: Any, arrays: list[Any]) -> Any:
        """One tree of all devices' arrays, kept until one of them is another."""
        if self.mesh is None:
            return arrays[0]
        known = self._assembled.get(name)
        if known is None or any(a is not b for a, b in zip(known[0], arrays, strict=True)):
            # The old one's arrays may be donated, and a program that read them would crash.
            self._assembled[name] = known = (arrays, assembled(arrays, self.mesh))
        return known[1]

    @property
    def banks(self) -> dict[Signature, Bank]:
        """For compiled programs to read, [devices * S, ...]."""
        return {s: self._whole(s, [part.banks[s] for part in self.parts]) for s in self.slots}

    @property
    def table_UE(self) -> jax.Array:
        """The slot of each expert by each device's row `precision * L + layer`, for programs."""
        return self._whole("table", [part.table_UE for part in self.parts])

    def resident_pE(self, layer: int) -> np.ndarray:
        """Whether each copy of one layer's experts is resident on its device, bool [p, E]."""
        n_precisions, _, n_experts = self.store.shape_pLE
        resident_pE = np.zeros((n_precisions, n_experts), bool)
        for part in self.parts:
            # An `ExpertKey` is a tuple, and prefill asks for each layer of each chunk.
            resident_pE |= [
                [(precision, layer, expert) in part.slot_of for expert in range(n_experts)]
                for precision in range(n_precisions)
            ]
        return resident_pE

    @property
    def device_bytes(self) -> int:
        """Bytes of all banks, as the devices count them."""
        return sum(part.nbytes for part in self.parts)

    @property
    def holds_all(self) -> bool:
        """Whether every expert of every bank can be resident at once."""
        layers = [layer.signature for layers in self.store.precisions for layer in layers]
        demanded, slots = Counter(layers), self.slots
        n_experts = self.store.config.n_experts
        return bool(slots) and all(n >= demanded[s] * n_experts for s, n in slots.items())

    def _device(self, key: ExpertKey) -> int:
        return owner(key.layer, key.expert, len(self.parts))

    def _part(self, key: ExpertKey) -> DeviceBanks:
        return self.parts[self._device(key)]

    def by_device(self, keys: Iterable[ExpertKey]) -> list[list[ExpertKey]]:
        """`keys` by the device that owns them."""
        shares: list[list[ExpertKey]] = [[] for _ in self.parts]
        for key in keys:
            shares[self._device(key)].append(key)
        return shares

    def resident(self) -> frozenset[ExpertKey]:
        """Every expert that holds a slot."""
        return frozenset().union(*(part.slot_of for part in self.parts))

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._part(key).slot_of

    def slot(self, key: ExpertKey) -> int:
        """The slot of a resident expert in its device's bank. KeyError if absent."""
        return self._part(key).slot_of[key]

    def begin(self, decision: Decision) -> None:
        """Gives up the prefetches of a step's layer that it does not load."""
        if self.prefetched:
            used = {use.key for use in decision.uses}.difference(decision.computed)
            self.drop_prefetched(
                [k for k in self.prefetched if k.layer == decision.step.layer and k not in used]
            )

    def load(
        self,
        keys: Sequence[ExpertKey],
        keep: Iterable[ExpertKey] | None = None,
        upcoming: Iterable[ExpertKey] = (),
    ) -> None:
        """Makes all of `keys` (one batch, or a part of it) resident, one device after another.

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
        for own, later in zip(self.by_device(keys), self.by_device(upcoming), strict=True):
            missing = [key for key in own if key not in self]
            later = [key for key in later if key not in missing]
            for index, key in enumerate(missing):
                # Those that are waited for stand before those that are not.
                upload = self._begin_upload(key)
                if self._begin_uploads(missing[index + 1 :]):
                    self.prefetch(later)
                self._fetch(key, held, upload)
            self.prefetch(later)

    def prefetch(self, keys: Iterable[ExpertKey]) -> None:
        """Starts uploads ahead of use, in turn, until a device's `staging_bytes` are taken.

        Their slots come with `load`; a step of their layer gives up those that it does not use.
        """
        before = self.counts.bytes_moved
        for own in self.by_device(keys):
            self._begin_uploads(own)
        self.counts.bytes_ahead += self.counts.bytes_moved - before

    def _begin_uploads(self, keys: Sequence[ExpertKey]) -> bool:
        """Starts uploads to one device as `prefetch` does; whether there was room for all."""
        for key in keys:
            begun = key in self or key in self.reserved or key in self.prefetched
            if begun or self.controller.find_bank(key) is None:
                continue
            staged = (k for k in self.prefetched if self._device(k) == self._device(key))
            if sum(map(self.store.expert_bytes, (*staged, key))) > self._staging_bytes:
                return False
            self.prefetched[key] = self._send(key)
        return True

    def drop_prefetched(self, keys: Iterable[ExpertKey] | None = None) -> None:
        """Gives up prefetched uploads; all of them for None."""
        for key in list(self.prefetched if keys is None else keys):
            del self.prefetched[key]
            self.counts.bytes_dropped += self.store.expert_bytes(key)

    def _begin_upload(self, key: ExpertKey) -> Upload:
        """See `Executor._begin_upload`: now, if it was not begun before."""
        begun = self.reserved.pop(key, None) or self.prefetched.pop(key, None)
        return begun or self._send(key)

    def _send(self, key: ExpertKey) -> Upload:
        raw, part = self.store.raw(key), self._part(key)
        if part.is_mapped(self.store.signature(key)):
            return in_place(raw)
        with _uploading(key, part.device):
            upload = self.link.send(raw, part.device)
        self.counts.bytes_moved += self.store.expert_bytes(key)
        return upload

    def _arrived(self, key: ExpertKey, upload: Upload) -> tuple[jax.Array, ...]:
        with _uploading(key, self._part(key).device):
            return upload()

    def _fetch(self, key: ExpertKey, keep: frozenset[ExpertKey], upload: Upload) -> None:
        began_s = self.link.clock()
        raw = self._arrived(key, upload)
        self.counts.link_wait_s += self.link.clock() - began_s
        # On a CPU an upload is the map itself, read only when the slot is written.
        self.store.check_unchanged(key.precision)
        victim = self.controller.bank(key).policy.admit(key, keep)
        try:
            self._part(key).put(key, raw, victim)
        except BaseException:
            # Failed or interrupted half-way: which of banks, table and policy changed is unknown.
            self._empty(self.controller.bank(key))
            raise

    def _empty(self, bank: Slots) -> None:
        """Makes a bank's experts absent, so that banks, table and policy agree for certain."""
        for key in list(self.controller.resident()):
            if self.controller.bank(key) is bank:
                bank.policy.unpin(key)
                bank.policy.remove(key)
        part = self.parts[bank.device]
        part.give_back(bank.signature)
        part.renew(bank)
        part.write_table()

    def resize(self, slots: Mapping[Signature, int]) -> None:
        """Divides each device's budget anew between the same banks; a policy says whom one loses.

        Only between two steps. The old arrays are given up before the new ones are made, so that
        the budget is kept at every moment; the residents of a bank that changes are uploaded again,
        which `bytes_moved` counts. Reserved uploads are forgotten.

        Raises:
            ValueError: other banks, more bytes than the budget, or fewer slots than are pinned;
                the pool is as before.
        """
        self._check_division(slots)
        banks = self.controller.banks
        changed = [bank for bank in banks if slots[bank.signature] != bank.policy.capacity]
        self.reserved.clear()
        self.drop_prefetched()
        try:
            for bank in changed:
                bank.policy.resize(slots[bank.signature])
                self.parts[bank.device].give_back(bank.signature)
            for bank in changed:
                part = self.parts[bank.device]
                for key in part.renew(bank):
                    if key in bank.policy:
                        part.put(key, self._arrived(key, self._send(key)), None)
        except BaseException:
            # Banks, table and policies that do not fit together hold nothing.
            for bank in changed:
                bank.policy.resize(slots[bank.signature])
                self._empty(bank)
            raise
        for part in self.parts:
            part.write_table()

    def _check_division(self, slots: Mapping[Signature, int]) -> None:
        if slots.keys() != self.slots.keys():
            raise ValueError(f"got slots for banks {list(slots)}; want {list(self.slots)}")
        expert_bytes = self.controller.layout.expert_bytes
        needed = sum(expert_bytes[signature] * n for signature, n in slots.items())
        if needed > self._budget_bytes:
            raise ValueError(f"slots take {needed} bytes; the budget is {self._budget_bytes}")
        for bank in self.controller.banks:
            n_slots, n_pinned = slots[bank.signature], len(bank.policy.pinned)
            if n_slots < max(1, n_pinned):
                raise ValueError(
                    f"{n_slots} slots for bank {bank.signature}; want at least {max(1, n_pinned)} "
                    f"({n_pinned} experts are pinned)"
                )
