"""What an executor of a controller's decisions does, and what it loads before the first token."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hobbit_jax.cache.controller import Bank, Controller
from hobbit_jax.cache.miss_modes import LOW
from hobbit_jax.experts.store import NATIVE, ExpertKey
from pallas_kernels.reference import Signature


class Executor(ABC):
    """Does what a controller decides: a pool or a counter."""

    def __init__(self, controller: Controller):
        self.controller, self.counts = controller, controller.counts
        self.reserved: dict[ExpertKey, Any] = {}  # their uploads; `promote` gives them a slot

    @abstractmethod
    def load(self, keys: Sequence[ExpertKey]) -> None:
        """Makes all of `keys` resident; none of them is evicted for another."""

    @abstractmethod
    def resize(self, slots: Mapping[Signature, int]) -> None:
        """Divides the bytes of each device's banks anew, between the same banks."""

    @abstractmethod
    def _begin_upload(self, key: ExpertKey) -> Any:
        """Has the bytes of a copy sent to its device."""

    def reserve(self, key: ExpertKey) -> None:
        """Begins the upload of a copy that no token waits for; `promote` gives it a slot.

        Programs that run meanwhile do not see it. Nothing happens if it is resident or reserved, or
        has no bank.
        """
        controller = self.controller
        if key not in self.reserved and key not in controller and controller.find_bank(key):
            self.reserved[key] = self._begin_upload(key)

    def promote(self) -> None:
        """Gives every reserved copy a slot, between two steps, one device after another."""
        for key in sorted(self.reserved, key=lambda key: self.controller.bank(key).device):
            policy = self.controller.bank(key).policy
            if len(policy.pinned) < policy.capacity and key not in policy:
                self.load([key])
                self.counts.promotions += 1
        self.reserved.clear()

    def pin(self, keys: Sequence[ExpertKey]) -> None:
        """Loads `keys` and keeps them resident until they are unpinned; these are no accesses.

        Raises:
            ValueError: a bank would have too few slots to stream the rest through.
        """
        bank_of = self.controller.bank
        new = Counter(bank_of(key) for key in keys if key not in bank_of(key).policy.pinned)
        for bank, n_new in new.items():
            n_slots, total = bank.policy.capacity, len(bank.policy.pinned) + n_new
            least = min(n_slots, self.controller.layout.experts_per_token)
            if total > n_slots - least:
                raise ValueError(
                    f"pinning {total} experts leaves bank {bank.signature} fewer than {least} of "
                    f"its {n_slots} slots to stream through"
                )
        self.load(keys)
        for key in keys:
            bank_of(key).policy.pin(key)

    def unpin(self, keys: Iterable[ExpertKey]) -> None:
        """Lets pinned copies be evicted again."""
        for key in keys:
            self.controller.bank(key).policy.unpin(key)


@dataclass(frozen=True)
class WarmStart:
    """A profile, and what an engine makes of it."""

    uses_LE: np.ndarray  # how often each expert is chosen; only the order matters
    # Share (0 to below 1) of each bank's slots whose experts are never evicted: the most used.
    # Banks that hold all their experts need no pins.
    pin_share: float = 0.0

    def __post_init__(self):
        if not 0 <= self.pin_share < 1:
            raise ValueError(f"pin_share is {self.pin_share}; want 0 to below 1")

    def fill(self, executor: Executor, plan_shares_pLE: np.ndarray) -> None:
        """Loads as many of each bank's most used experts as fit, the most used last, and pins.

        Raises:
            ValueError: a profile of another shape, or pins that leave a bank too few slots.
        """
        controller = executor.controller
        for bank, keys in self._ranked(controller, plan_shares_pLE).items():
            absent = [key for key in keys if key not in controller]
            executor.load(absent[: bank.room][::-1])
        self.pin(executor, plan_shares_pLE)

    def pin(self, executor: Executor, plan_shares_pLE: np.ndarray) -> None:
        """Pins `pin_share` of each bank; loads what it pins. Raises what `fill` does."""
        for bank, keys in self._ranked(executor.controller, plan_shares_pLE).items():
            if bank.policy.capacity < len(keys):
                executor.pin(keys[: int(self.pin_share * bank.policy.capacity)])

    def _ranked(
        self, controller: Controller, plan_shares_pLE: np.ndarray
    ) -> dict[Bank, list[ExpertKey]]:
        """Which copies may ask for a slot of each bank, the most used first.

        Low copies that only serve misses are wanted of experts that are not among the most used of
        their native bank.
        """
        if self.uses_LE.shape != plan_shares_pLE.shape[1:]:
            raise ValueError(
                f"the profile has layers and experts {list(self.uses_LE.shape)}; the model has "
                f"{list(plan_shares_pLE.shape[1:])}"
            )

        def by_bank(heat_pLE: np.ndarray, wanted_pLE: np.ndarray) -> dict[Bank, list[ExpertKey]]:
            order = np.argsort(-heat_pLE[wanted_pLE], kind="stable")
            ranked: dict[Bank, list[ExpertKey]] = {}
            for index in np.argwhere(wanted_pLE)[order].tolist():
                key = ExpertKey(*index)
                if (bank := controller.find_bank(key)) is not None:
                    ranked.setdefault(bank, []).append(key)
            return ranked

        heat_pLE = self.uses_LE * plan_shares_pLE
        ranked = by_bank(heat_pLE, plan_shares_pLE > 0)
        if controller.mode.low_banks == "none":
            return ranked
        heat_pLE[LOW] += heat_pLE[NATIVE]
        for bank, keys in ranked.items():
            for key in keys[: bank.policy.capacity]:
                if key.precision == NATIVE:
                    heat_pLE[LOW, key.layer, key.expert] -= heat_pLE[key]
        low_pLE = np.zeros(heat_pLE.shape, bool)
        low_pLE[LOW] = True
        return {**ranked, **by_bank(heat_pLE, low_pLE)}


def load_all(executor: Executor, precision: int) -> None:
    """Makes every copy of a precision resident, where there is room for all of them."""
    _, n_layers, n_experts = executor.controller.layout.shape_pLE
    for layer in range(n_layers):
        executor.load([ExpertKey(precision, layer, expert) for expert in range(n_experts)])
