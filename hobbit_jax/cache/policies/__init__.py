"""Who is evicted: one file per idea, behind `interface.Policy`, and the names to ask for them."""

from collections.abc import Callable
from typing import Any

from hobbit_jax.cache.policies.belady import Belady
from hobbit_jax.cache.policies.decayed_lfu import DecayedLFU
from hobbit_jax.cache.policies.hobbit import Hobbit
from hobbit_jax.cache.policies.interface import Policy, Step
from hobbit_jax.cache.policies.layered_lru import LayeredLRU
from hobbit_jax.cache.policies.lfru import LFRU
from hobbit_jax.cache.policies.next_use import NextUse
from hobbit_jax.cache.policies.pinned_static import PinnedStatic
from hobbit_jax.cache.policies.random_choice import RandomChoice
from hobbit_jax.cache.policies.slru import LRU, SLRU

PolicyFactory = Callable[[int], Policy[Any]]  # capacity in slots → a policy

# Those that need nothing but a capacity. `PinnedStatic` wants a profile, `Belady` the future.
POLICIES: dict[str, PolicyFactory] = {
    "lru": LRU,
    "slru": SLRU,
    "decayed_lfu": DecayedLFU,
    "lfru": LFRU,
    "layered_lru": LayeredLRU,
    "hobbit": Hobbit,
    "random": RandomChoice,
    "next_use": NextUse,
}
DEFAULT_POLICY = "slru"


def policy_factory(policy: str | PolicyFactory) -> PolicyFactory:
    """A factory by its name, or a ValueError that lists the names; a factory stays as it is."""
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; want one of {', '.join(POLICIES)}")
    return POLICIES[policy]
