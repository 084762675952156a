"""What serves a selection whose copy is not resident: the miss modes, by name.

Owns the rule per selection, as array code that sees which precisions of an expert are resident, and
what each mode needs of the pool. `serve` runs inside compiled programs (`inference/selection.py`);
loading is the engine's, promotion `promotion.py`'s. Under every mode a resident copy of the
precision that the plan asks for serves the selection.

Sources: HOBBIT (arXiv 2411.01433, section 3.2) for thresholds on the weights of heavier choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hobbit_jax.experts.precision import SKIPPED, Array, importance_score
from hobbit_jax.experts.store import NATIVE

# The one low precision that misses may be served from.
LOW = 1

LowBanks = Literal["none", "cache", "all"]


@dataclass(frozen=True)
class MissMode:
    """Waits for the precision that was asked for. The other modes override what differs.

    Attributes:
        low_banks: whether low copies serve misses, and then whether all of them are resident.
        native_waits: whether a selection can wait for its native copy, so that native banks need
            slots for a whole step.
        promotes: whether native copies are loaded in the background for experts served low.
        leaves_low: whether low copies are loaded in the background for experts waited for.
    """

    low_banks: LowBanks = "none"
    native_waits: bool = True
    promotes: bool = False
    leaves_low: bool = False

    def serve(self, requested_TK: Array, weights_TK: Array, resident_pTK: Array) -> Array:
        """The precision that serves each selection, int32 [T, K]; `SKIPPED` for none.

        Runs on JAX arrays in compiled programs, and on NumPy's where routing is replayed.

        Args:
            requested_TK: int32, the plan's precisions.
            weights_TK: float32, the router's weights, heaviest first.
            resident_pTK: bool, whether each precision's copy of the chosen expert is resident.
        """
        if self.low_banks == "none":
            return requested_TK
        missed_TK = (requested_TK == NATIVE) & ~resident_pTK[NATIVE]
        xp = requested_TK.__array_namespace__()
        return xp.where(missed_TK, self._instead(weights_TK, resident_pTK), requested_TK)

    def _instead(self, weights_TK: Array, resident_pTK: Array) -> Array:
        """The precision that serves a selection whose native copy is missing."""
        xp = weights_TK.__array_namespace__()
        return xp.full(weights_TK.shape, LOW, dtype=xp.int32)


@dataclass(frozen=True)
class UseLowIfResident(MissMode):
    """A resident low copy spares the wait; otherwise native is fetched, and low follows it."""

    low_banks: LowBanks = "cache"
    promotes: bool = True
    leaves_low: bool = True

    def _instead(self, weights_TK: Array, resident_pTK: Array) -> Array:
        xp = weights_TK.__array_namespace__()
        return xp.where(resident_pTK[LOW], xp.int32(LOW), xp.int32(NATIVE))


@dataclass(frozen=True)
class FetchLow(MissMode):
    """A miss uses or fetches the low copy; native follows when the expert proves hot."""

    low_banks: LowBanks = "cache"
    native_waits: bool = False
    promotes: bool = True


@dataclass(frozen=True)
class Floor(MissMode):
    """Every expert is resident at the low precision, so no token ever waits; hot ones become
    native.
    """

    low_banks: LowBanks = "all"
    native_waits: bool = False
    promotes: bool = True


@dataclass(frozen=True)
class Hobbit(MissMode):
    """A miss is fetched natively, fetched low, or skipped, by the weights of heavier selections.

    With s the share of the token's heavier selections in its total weight: native up to `high`,
    low up to `skip`, nothing above. The defaults are the paper's for Mixtral.
    """

    low_banks: LowBanks = "cache"
    high: float = 0.6
    skip: float = 0.9

    def _instead(self, weights_TK: Array, resident_pTK: Array) -> Array:
        score_TK = importance_score("cumulative_weight", weights_TK)
        xp = weights_TK.__array_namespace__()
        low_TK = xp.where(score_TK > self.skip, xp.int32(SKIPPED), xp.int32(LOW))
        return xp.where(score_TK > self.high, low_TK, xp.int32(NATIVE))


FETCH = MissMode()

MISS_MODES: dict[str, MissMode] = {
    "fetch": FETCH,
    "use_low_if_resident": UseLowIfResident(),
    "fetch_low": FetchLow(),
    "hobbit": Hobbit(),
    "floor": Floor(),
}


def miss_mode(mode: str | MissMode) -> MissMode:
    """A setting by its name; a setting stays as it is.

    Raises:
        ValueError: no mode of that name; lists those there are.
    """
    if not isinstance(mode, str):
        return mode
    if mode not in MISS_MODES:
        raise ValueError(f"miss mode is {mode!r}; want one of {', '.join(MISS_MODES)}")
    return MISS_MODES[mode]
