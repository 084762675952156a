"""The cache controller: what happens to every selection that a router makes.

Owns the decisions and has no arrays: which copies run, are fetched or computed on the CPU, which
expert gives up its slot, and in which batches a layer runs where a bank has too few slots. An
executor does what it decides: the slot pool (`pool.py`) with copies, the counter (`counter.py`)
with sums, so that recorded routing played to a controller with a counter is the run itself without
the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple, Self

import numpy as np

from hobbit_jax.cache.counts import Counts
from hobbit_jax.cache.miss_modes import FETCH, Action, MissMode, Use
from hobbit_jax.cache.policies import Policy, PolicyFactory, Step
from hobbit_jax.cache.selection import RouterOutput, Selections
from hobbit_jax.experts.precision import SKIPPED
from hobbit_jax.experts.store import NATIVE, ExpertKey, HostExperts
from hobbit_jax.models.sharding import owner
from pallas_kernels.reference import Signature


class Decision(NamedTuple):
    """What one step of one layer comes to."""

    step: Step
    uses: Sequence[Use]  # the copies that serve, whether resident or not
    unmet: Sequence[Use]  # copies that were requested and that another precision stands in for
    fetched: list[ExpertKey]  # in the order of `uses`
    computed: list[ExpertKey]  # by the CPU, in the order of `uses`
    # What runs together, all of `uses` that the CPU does not compute; none if nothing is fetched.
    batches: list[list[ExpertKey]]
    prefill: bool = False  # whether the step is a chunk of a prompt

    @property
    def round_trips(self) -> int:
        """How often decode leaves the device for it."""
        return max(len(self.batches), int(bool(self.computed)))


class Observer:
    """Is told what a controller decides; every method does nothing until it is overridden."""

    def begin_sequences(self) -> None:
        """Between two steps, where the sequences so far are forgotten."""

    def after_routing(self, routed: RouterOutput) -> None:
        """After each layer's router, before the decision."""

    def after_step(self, decision: Decision) -> None:
        """After each layer's decision, before anything is loaded for it."""

    def after_tokens(self, count: int) -> Iterable[ExpertKey]:
        """After `count` decoded tokens; the copies to load in the background."""
        return ()


class OnRouting(Observer):
    """Calls a function with what every layer's router chose."""

    def __init__(self, function: Callable[[RouterOutput], object]):
        self._function = function

    def after_routing(self, routed: RouterOutput) -> None:
        """See `Observer.after_routing`."""
        self._function(routed)


@dataclass(frozen=True)
class BankLayout:
    """Which bank holds which copies, and what one of them weighs."""

    n_experts: int  # of a layer
    experts_per_token: int  # of a layer; a bank keeps so many slots to stream through
    signature_pL: Sequence[Sequence[Signature]]  # of the copies of each precision and layer
    expert_bytes: Mapping[Signature, int]  # of one copy
    n_devices: int = 1  # that divide the experts

    @classmethod
    def of_store(cls, store: HostExperts, n_devices: int = 1) -> Self:
        """The layout of a model's experts."""
        return cls(
            store.config.n_experts,
            store.config.experts_per_token,
            [[experts.signature for experts in layers] for layers in store.precisions],
            {e.signature: e.expert_bytes for layers in store.precisions for e in layers},
            n_devices,
        )

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(self.signature_pL[NATIVE])

    @property
    def shape_pLE(self) -> tuple[int, int, int]:
        """Precisions, layers and experts of a layer."""
        return len(self.signature_pL), self.n_layers, self.n_experts

    def copy_bytes(self, key: ExpertKey) -> int:
        """Bytes of one copy."""
        return self.expert_bytes[self.signature_pL[key.precision][key.layer]]


@dataclass(eq=False)
class Bank:
    """Slots of one device for the copies of one signature, and the policy that gives them out."""

    device: int
    signature: Signature
    expert_bytes: int
    policy: Policy[ExpertKey] = field(repr=False)

    @property
    def room(self) -> int:
        """Slots that nobody holds."""
        return self.policy.capacity - len(self.policy)


class Controller:
    """Decides what happens to every selection, and counts it; see the module.

    Each device has a bank for each signature of `slots`. The `observers` are told of every
    decision, in their order.
    """

    def __init__(
        self,
        layout: BankLayout,
        slots: Mapping[Signature, int],
        policy: PolicyFactory,
        mode: MissMode = FETCH,
    ):
        self.layout, self.mode = layout, mode
        self.observers: list[Observer] = []
        self.counts = Counts()
        self.banks = [
            Bank(device, signature, layout.expert_bytes[signature], policy(n_slots))
            for device in range(layout.n_devices)
            for signature, n_slots in slots.items()
        ]
        bank_of = {(bank.device, bank.signature): bank for bank in self.banks}
        # A table, since every use asks it and a signature is slow to hash.
        self._bank_dpL = [
            [[bank_of.get((device, s)) for s in layers] for layers in layout.signature_pL]
            for device in range(layout.n_devices)
        ]
        self._wanted: list[ExpertKey] = []

    def routing_observers(self) -> list[Observer]:
        """The observers that heed `after_routing`, for which a run copies routing to the host."""
        return [o for o in self.observers if type(o).after_routing is not Observer.after_routing]

    def find_bank(self, key: ExpertKey) -> Bank | None:
        """The bank that may hold `key`; None where its signature has no slots."""
        n_devices = self.layout.n_devices
        device = 0 if n_devices == 1 else owner(key.layer, key.expert, n_devices)
        return self._bank_dpL[device][key.precision][key.layer]

    def bank(self, key: ExpertKey) -> Bank:
        """The bank that may hold `key`. KeyError if its signature has no slots."""
        bank = self.find_bank(key)
        if bank is None:
            raise KeyError(key)
        return bank

    def __contains__(self, key: ExpertKey) -> bool:
        bank = self.find_bank(key)
        return bank is not None and key in bank.policy

    def resident(self) -> Iterator[ExpertKey]:
        """Every copy that holds a slot."""
        keys = (ExpertKey(*index) for index in np.ndindex(self.layout.shape_pLE))
        return (key for key in keys if key in self)

    def decide(
        self, step: Step, uses: Sequence[Use], unmet: Sequence[Use] = (), prefill: bool = False
    ) -> Decision:
        """Records one step's uses and decides what is to be loaded for them.

        The policies hear of unmet requests too, except in prefill: a chunk of a prompt requests
        most experts once, which says little about the next token.
        """
        for bank in self.banks:
            bank.policy.begin_step(step)
        missing = [use for use in uses if not self._access(use)]
        for use in () if prefill else unmet:
            self._access(use)
        fetched, computed, batches = [], [], []
        for use, action in zip(missing, self.mode.act(missing), strict=True):
            stays = self.mode.computes and self.find_bank(use.key) is None
            (computed if stays or action is Action.HOST else fetched).append(use.key)
        if fetched:
            stay = set(computed)
            batches = self.batches(use.key for use in uses if use.key not in stay)
        counts, sizes = self.counts, self.layout.copy_bytes
        counts.hits += len(uses) - len(missing)
        counts.misses += len(missing)
        counts.native_uses += sum(use.key.precision == NATIVE for use in uses)
        counts.bytes_read += sum(sizes(use.key) for use in uses)
        counts.computed += len(computed)
        counts.bytes_computed += sum(map(sizes, computed))
        decision = Decision(step, uses, unmet, fetched, computed, batches, prefill)
        for observer in self.observers:
            observer.after_step(decision)
        return decision

    def count_selections(self, requested: np.ndarray, served: np.ndarray) -> None:
        """Counts selections by the precisions that were requested and that serve them, [..., K]."""
        counts, asked = self.counts, requested != SKIPPED
        counts.selections += int(np.count_nonzero(asked))
        counts.demoted += int(np.count_nonzero(asked & (served > requested)))
        counts.low += int(np.count_nonzero(served > NATIVE))
        counts.skipped += int(np.count_nonzero(asked & (served == SKIPPED)))

    def _access(self, use: Use) -> bool:
        """Tells a copy's policy of its use; whether it is resident."""
        bank = self.find_bank(use.key)
        return bank is not None and bank.policy.access(use.key, use.weight, use.native)

    def batches(self, keys: Iterable[ExpertKey]) -> list[list[ExpertKey]]:
        """Splits one step's copies into batches that fit the slots of every bank together.

        Residents come first, so that a batch that must evict does not evict what the step still
        needs; otherwise the order of `keys` stays, which is that of the loads. The first batch of
        every bank of every device runs together, then the second.

        Raises:
            RuntimeError: a bank whose slots are all pinned has something to load.
        """
        by_bank: dict[Bank, list[ExpertKey]] = {}
        for key in keys:
            by_bank.setdefault(self.bank(key), []).append(key)
        ordered = sorted(by_bank, key=lambda bank: bank.device)
        parts = [_batches_of(bank, by_bank[bank]) for bank in ordered]
        return [[key for part in row for key in part or ()] for row in zip_longest(*parts)]

    def evicted_for(self, key: ExpertKey) -> ExpertKey | None:
        """The copy that `key` would evict; None if a slot is free or `key` has no bank."""
        bank = self.find_bank(key)
        return None if bank is None or bank.room > 0 else bank.policy.victim()

    def begin_sequences(self) -> None:
        """Tells the observers that new sequences begin."""
        for observer in self.observers:
            observer.begin_sequences()

    def end_tokens(self, count: int) -> None:
        """Ends `count` decoded tokens: observers may want copies loaded in the background."""
        for observer in self.observers:
            self._wanted += observer.after_tokens(count)

    def take_wanted(self) -> list[ExpertKey]:
        """The copies to load in the background while the next token runs."""
        wanted, self._wanted = self._wanted, []
        return wanted


def _batches_of(bank: Bank, keys: Sequence[ExpertKey]) -> list[list[ExpertKey]]:
    policy = bank.policy
    ordered = sorted(keys, key=lambda key: key not in policy)
    # Pinned copies of this step are all in the first batch; in later ones they only take room.
    first = policy.capacity - len(policy.pinned - set(ordered))
    size = policy.capacity - len(policy.pinned)
    if len(ordered) > first and size < 1:
        raise RuntimeError(f"every slot of bank {bank.signature} is pinned")
    starts = range(first, len(ordered), max(size, 1))
    return [ordered[:first], *(ordered[i : i + size] for i in starts)]


def uses_of(layer: int, selections: Selections) -> tuple[list[Use], list[Use]]:
    """The copies that serve a layer's selections, and those that were requested in vain.

    Returns:
        Uses and unmet requests, each copy once, in the order of its first selection.
    """
    uses: dict[ExpertKey, Use] = {}
    unmet: dict[ExpertKey, Use] = {}
    listed = (array.ravel().tolist() for array in selections)
    for expert, weight, requested, served in zip(*listed, strict=True):
        if served == SKIPPED:
            continue
        key = ExpertKey(served, layer, expert)
        use = Use(key, weight, requested == NATIVE)
        if (before := uses.get(key)) is not None:
            native = use.native or before.native
            use = Use(key, max(weight, before.weight), native, before.rows + 1)
        uses[key] = use
        if served > requested:
            unmet_key = key._replace(precision=requested)
            unmet[unmet_key] = Use(unmet_key, use.weight)
    return list(uses.values()), list(unmet.values())
