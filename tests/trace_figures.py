"""How far recorded routing is from even: what made-up routing is compared with."""

import numpy as np


def share_of_hot_experts(trace, fraction: float) -> float:
    """Share of selections that the most used `fraction` of a layer's experts have, mean."""
    ordered_LE = np.sort(trace.uses_LE, axis=1)[:, ::-1]
    count = round(fraction * trace.n_experts)
    return float((ordered_LE[:, :count].sum(axis=1) / ordered_LE.sum(axis=1)).mean())


def overlap(trace, lag: int) -> float:
    """Share of a token's experts that the token `lag` before it, in its sequence, chose too."""
    now, before = trace.ids_TLK[lag:], trace.ids_TLK[:-lag]
    same_T = (now[..., :, None] == before[..., None, :]).any(axis=-1).mean(axis=(1, 2))
    return float(same_T[trace.position_T[lag:] >= lag].mean())
