"""Who is evicted: one file per idea, all behind `interface.Policy`.

Owns the names by which scripts and configs ask for a policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hobbit_jax.cache.policies.interface import Policy, Step
from hobbit_jax.cache.policies.lru import LRU
from hobbit_jax.cache.policies.recall import Recall
from hobbit_jax.cache.policies.slru import SLRU

__all__ = ["LRU", "POLICIES", "SLRU", "Policy", "PolicyFactory", "Step", "policy_factory"]

PolicyFactory = Callable[[int], Policy[Any]]  # capacity in slots → a policy

POLICIES: dict[str, PolicyFactory] = {"lru": LRU, "slru": SLRU, "recall": Recall}
DEFAULT_POLICY = "slru"


def policy_factory(policy: str | PolicyFactory) -> PolicyFactory:
    """A factory by its name; a factory stays as it is.

    Raises:
        ValueError: no policy of that name; lists those there are.
    """
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; want one of {', '.join(POLICIES)}")
    return POLICIES[policy]
