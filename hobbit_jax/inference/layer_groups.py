"""Layers grouped by where the pool keeps their experts.

Owns the grouping, which decides how many branches a compiled loop over layers has for its experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from hobbit_jax.cache.pool import SlotPool
from pallas_kernels.backends import Implementation
from pallas_kernels.reference import Signature


@dataclass(frozen=True)
class LayerGroups:
    """Which bank each precision of each layer's experts lives in; None where a precision has no
    bank.
    """

    signatures: tuple[tuple[Signature | None, ...], ...]  # by kind and precision
    kind_L: tuple[int, ...]
    implementations: tuple[tuple[Signature, str], ...]  # how each bank's experts are computed

    @classmethod
    def of(cls, pool: SlotPool, implementation: Implementation) -> LayerGroups:
        """Of the banks that `pool` has, up to the highest precision that has one."""
        store, config = pool.store, pool.store.config
        used = [
            precision
            for precision, layers in enumerate(store.precisions)
            if any(experts.signature in pool.banks for experts in layers)
        ]
        by_layer = []
        for layer in range(config.n_layers):
            signatures = (
                store.layer(precision, layer).signature
                for precision in range(max(used, default=0) + 1)
            )
            by_layer.append(tuple(s if s in pool.banks else None for s in signatures))
        kinds = tuple(dict.fromkeys(by_layer))
        implementations = tuple((s, store.backend(s, implementation)) for s in pool.banks)
        return cls(kinds, tuple(kinds.index(kind) for kind in by_layer), implementations)
