"""What happens to a selection whose copy is not resident: the miss modes, by name.

Owns both halves of that rule, `serve` for compiled programs and `act` for the controller, and what
each mode needs of the pool. Under every mode a resident copy of the precision that the plan asks
for serves the selection.

Sources: HOBBIT (arXiv 2411.01433, section 3.2) for thresholds on the weights of heavier choices;
llama.cpp's pull request 27861, FreeToken and KTransformers for misses computed on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from hobbit_jax.experts.precision import SKIPPED, Array, importance_score
from hobbit_jax.experts.store import NATIVE, ExpertKey

# The one low precision that misses may be served from.
LOW = 1
# No low copy serves misses; some low copies are resident; all are; none is, the CPU computes them.
LowBanks = Literal["none", "cache", "all", "host"]


class Action(Enum):
    """What happens to a copy that serves selections and is not resident."""

    FETCH = "fetch"  # it gets a slot, and somebody may lose one
    HOST = "host"  # the CPU computes it from the file's map; nobody loses a slot


class Use(NamedTuple):
    """One copy's use in one step of one layer."""

    key: ExpertKey
    weight: float = 1.0  # its largest router weight among the step's tokens
    native: bool = True  # whether native precision was requested
    rows: int = 1  # the step's selections that it serves


@dataclass(frozen=True)
class MissMode:
    """The base mode, `fetch`: a miss waits for the requested copy. Other modes override it."""

    low_banks: LowBanks = "none"
    # Whether a selection can wait for its native copy, so that native banks have room for a step.
    native_waits: bool = True
    promotes: bool = False  # whether native copies are loaded in the background for those used low
    leaves_low: bool = False  # whether low copies are, for experts waited for
    computes: bool = False  # whether the CPU may compute a missing copy: a bank may have no slot

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

    def act(self, missing: Sequence[Use]) -> list[Action]:
        """What happens to each of one layer's missing copies, all of about the same size."""
        return [Action.FETCH] * len(missing)


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


# Rows of a step that the CPU computes in the time of one: until then it waits for the weights. From
# there on the time grows with the rows. Reckoned from 62.5 GB/s and 0.5 TFLOP/s, not measured.
ROWS_AT_ONCE = 2
LINK_TO_HOST = 0.41  # 25.6 over 62.5 GB/s


@dataclass(frozen=True)
class Host(MissMode):
    """Missing experts are computed on the CPU, and loaded in the background if they prove hot.

    What many tokens of a step share is fetched, once that takes less time (in prefill).
    """

    native_waits: bool = False
    promotes: bool = True
    computes: bool = True
    # The link's bandwidth over the rate at which the CPU reads what it computes.
    link_to_host: float = LINK_TO_HOST

    def __post_init__(self):
        if not self.link_to_host > 0:
            raise ValueError(f"link_to_host is {self.link_to_host}; want more than 0")

    def _host_time(self, use: Use) -> float:
        """Of one copy, in the time of reading it once."""
        return max(1.0, use.rows / ROWS_AT_ONCE)

    def act(self, missing: Sequence[Use]) -> list[Action]:
        """See `MissMode.act`."""
        fetch_time = 1 / self.link_to_host
        return [Action.HOST if self._host_time(u) <= fetch_time else Action.FETCH for u in missing]


@dataclass(frozen=True)
class HostLow(Host):
    """Misses are computed on the CPU from the low copy; the device keeps native ones alone."""

    low_banks: LowBanks = "host"


@dataclass(frozen=True)
class HobbitHost(Host, Hobbit):
    """HOBBIT's precisions, computed on the CPU: the device's pool has native and low copies."""

    low_banks: LowBanks = "cache"


@dataclass(frozen=True)
class Hybrid(Host):
    """Each miss is fetched or computed on the CPU, so that both finish together.

    The most used are fetched first. Of many misses link_to_host / (1 + link_to_host) are fetched.
    What is computed may be promoted as under `Host`: where one token misses little, nothing else
    would bring hot experts in.
    """

    def act(self, missing: Sequence[Use]) -> list[Action]:
        """See `MissMode.act`."""
        actions, link_free, host_free = [Action.HOST] * len(missing), 0.0, 0.0
        order = sorted(range(len(missing)), key=lambda i: (-missing[i].rows, -missing[i].weight))
        for i in order:
            fetched = link_free + 1 / self.link_to_host
            computed = host_free + self._host_time(missing[i])
            if fetched < computed:
                actions[i], link_free = Action.FETCH, fetched
            else:
                host_free = computed
        return actions


FETCH = MissMode()

MISS_MODES: dict[str, MissMode] = {
    "fetch": FETCH,
    "use_low_if_resident": UseLowIfResident(),
    "fetch_low": FetchLow(),
    "hobbit": Hobbit(),
    "floor": Floor(),
    "host": Host(),
    "host_low": HostLow(),
    "hobbit_host": HobbitHost(),
    "hybrid": Hybrid(),
}


def miss_mode(mode: str | MissMode) -> MissMode:
    """A setting by its name, or a ValueError that lists the names; a setting stays as it is."""
    if not isinstance(mode, str):
        return mode
    if mode not in MISS_MODES:
        raise ValueError(f"miss mode is {mode!r}; want one of {', '.join(MISS_MODES)}")
    return MISS_MODES[mode]
