"""What a routing profile says of caching, in a few figures per layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats

from hobbit_jax.experts.store import NATIVE, HostExperts
from pallas_kernels.reference import Signature


def static_hits_L(
    uses_LE: np.ndarray, store: HostExperts, slots: Mapping[Signature, int]
) -> np.ndarray:
    """Share (0-1) of each layer's uses that the most used native experts serve, [L].

    They are chosen once, on the same text: what no static cache of these slots can better.
    """
    hits_L = np.zeros(len(uses_LE))
    bank_L = [store.layer(NATIVE, layer).signature for layer in range(len(uses_LE))]
    for signature, n_slots in slots.items():
        layers = np.array([layer for layer, bank in enumerate(bank_L) if bank == signature], int)
        hottest = np.argsort(-uses_LE[layers].ravel(), kind="stable")[:n_slots]
        rows, experts = np.unravel_index(hottest, uses_LE[layers].shape)
        np.add.at(hits_L, layers[rows], uses_LE[layers[rows], experts])
    return hits_L / np.maximum(uses_LE.sum(axis=1), 1)


def table(uses_LE: np.ndarray, store: HostExperts, slots: Mapping[Signature, int]) -> str:
    """One line a layer, and their mean: bits, share of the most used quarter, `static_hits_L`."""
    ordered_LE = np.sort(uses_LE, axis=1)[:, ::-1]
    quarter = round(0.25 * uses_LE.shape[1])
    columns = [
        stats.entropy(np.maximum(uses_LE, 1e-12), base=2, axis=1),
        ordered_LE[:, :quarter].sum(axis=1) / np.maximum(uses_LE.sum(axis=1), 1),
        static_hits_L(uses_LE, store, slots),
    ]
    names = [*map(str, range(len(uses_LE))), "mean"]
    figures = [*zip(*columns, strict=True), [column.mean() for column in columns]]
    lines = ["layer  entropy (bits)  top quarter  static hit rate"]
    for name, (entropy, share, hits) in zip(names, figures, strict=True):
        lines.append(f"{name:>5}  {entropy:14.2f}  {share:11.3f}  {hits:15.3f}")
    return "\n".join(lines)
