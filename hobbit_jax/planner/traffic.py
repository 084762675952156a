"""What each way of decoding would move, wait for and read, by replaying routing.

Who is resident is decided by the live classes (`cache/pool_sizing.py`, `cache/controller.py`),
warmed up from the trace's first tokens as a profile would (`cache/warm_start.py`), and counted on
later ones (`cache/counter.py`). A trace of another shape is replayed in its own: each bank gets the
same fraction of its experts, and the counts are scaled to the model's selections.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Literal

import numpy as np

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout
from hobbit_jax.cache.counter import Replay
from hobbit_jax.cache.miss_modes import LINK_TO_HOST, MISS_MODES, Host
from hobbit_jax.cache.pool_sizing import DEFAULT_LOW_SHARE, pool_slots
from hobbit_jax.cache.trace import Trace
from hobbit_jax.cache.warm_start import WarmStart
from hobbit_jax.experts.precision import StaticPlan, uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.planner.cost_model import Traffic
from hobbit_jax.planner.routing import PROFILE_TOKENS, TOKENS, WARM_TOKENS
from hobbit_jax.planner.shapes import PlannedModel
from pallas_kernels.reference import Signature


@dataclass(frozen=True)
class Setting:
    """One way of decoding."""

    name: str  # in tables
    mode: str = "fetch"  # by its name (`cache/miss_modes.py`)
    low_format: str | None = None  # of the low precision; None without one
    asked: Literal["native", "low"] = "native"  # of every expert
    low_share: float = DEFAULT_LOW_SHARE  # of the pool for low copies, where the mode keeps some
    link_to_host: float = LINK_TO_HOST  # the link's bandwidth over the CPU's, where that computes


@dataclass(frozen=True)
class Outcome:
    """What a setting came to on one pool."""

    setting: Setting
    slots: dict[str, int]  # per bank, by its formats
    residents: int  # distinct (layer, expert) pairs on the device
    hit_rate: float  # 0-1 over expert uses, at the copy that served
    low_uses: float  # 0-1 of selections that ran at the low precision
    skipped: float  # 0-1 of selections that nothing served
    traffic: Traffic  # of one token


@dataclass(frozen=True)
class _Warm:
    """A replay that was warmed up on a profile, and what is left of the trace."""

    replay: Replay  # whose residents are the most used of the profile
    slots: Mapping[Signature, int]  # of the model's banks; the replay's have the trace's shape
    layers: list[int]  # of the model, for which each layer of the trace stands
    start: int  # first token after the profile
    counted: int  # first token whose costs count


def _shrunk(
    slots: Mapping[Signature, int],
    store: HostExperts,
    bank_pL: list[list[Signature]],
    n_experts: int,
) -> dict[Signature, int]:
    """The slots of each bank for as large a fraction of the trace's experts."""
    ours = Counter(layer.signature for layer in chain(*store.precisions))
    theirs = Counter(chain(*bank_pL))
    shrunk: dict[Signature, int] = {}
    for signature, n_slots in slots.items():
        if theirs[signature]:
            pairs = theirs[signature] * n_experts
            part = n_slots * pairs / (ours[signature] * store.config.n_experts)
            shrunk[signature] = min(pairs, max(1, round(part)))
    return shrunk


def _warmed_up(setting: Setting, model: PlannedModel, trace: Trace, pool_bytes: int) -> _Warm:
    """Raises what `replay_setting` does."""
    config, mode = model.config, MISS_MODES[setting.mode]
    if isinstance(mode, Host):
        mode = replace(mode, link_to_host=setting.link_to_host)
    store, precision = model.store(setting.low_format), int(setting.asked == "low")
    shares_pLE = uniform_plan(store, precision).shares_pLE(store.shape_pLE)
    own = BankLayout.of_store(store)
    slots, _ = pool_slots(shares_pLE, mode, own, pool_bytes, setting.low_share)
    n_tokens, (n_layers, k) = min(len(trace.ids_TLK), TOKENS), trace.ids_TLK.shape[1:]
    layers = [layer * config.n_layers // n_layers for layer in range(n_layers)]
    bank_pL = [
        [store.layer(p, at).signature for at in layers] for p in range(len(store.precisions))
    ]
    layout = BankLayout(trace.n_experts, k, bank_pL, own.expert_bytes)
    shrunk = _shrunk(slots, store, bank_pL, trace.n_experts)
    start = n_tokens * PROFILE_TOKENS // TOKENS
    asked = StaticPlan(np.full(layout.shape_pLE[1:], precision, np.int8))
    warm = WarmStart(trace.part(0, start).uses_LE)
    replay = Replay(layout, shrunk, CacheConfig(plan=asked, mode=mode, warm=warm))
    return _Warm(replay, slots, layers, start, start + n_tokens * WARM_TOKENS // TOKENS)


def replay_setting(
    setting: Setting,
    model: PlannedModel,
    trace: Trace,
    pool_bytes: int,
    context: int,
    kv_format: str = "float32",
) -> Outcome:
    """Replays a setting in a pool of `pool_bytes`.

    Raises:
        ValueError: the pool cannot hold what one step needs.
        NotImplementedError: the low format does not fit the model's widths, or is native too.
    """
    config = model.config
    warm = _warmed_up(setting, model, trace, pool_bytes)
    replay, (n_layers, k) = warm.replay, trace.ids_TLK.shape[1:]
    replay.play(trace.part(warm.start, warm.counted))
    before = replace(replay.counts)
    replay.play(trace.part(warm.counted, TOKENS))
    tally = replay.counts - before

    selections = config.n_layers * config.experts_per_token
    scale = selections / (n_layers * k) / tally.tokens
    exits = _exits(tally.host_round_trips / (tally.tokens * n_layers), config.experts_per_token / k)
    pairs = config.n_layers * config.n_experts
    mode = MISS_MODES[setting.mode]
    cached = mode.low_banks in ("cache", "all")
    return Outcome(
        setting=setting,
        slots={"/".join(dict.fromkeys(signature)): n for signature, n in warm.slots.items()},
        # With low copies in a cache, both copies of an expert may be there.
        residents=round(pairs * replay.resident_share()) if cached else sum(warm.slots.values()),
        hit_rate=tally.hit_rate or 0.0,
        low_uses=tally.low / tally.selections,
        skipped=tally.skipped / tally.selections,
        traffic=replace(
            _dense(model, context, kv_format),
            expert_bytes=(tally.bytes_read - tally.bytes_computed) * scale,
            selections=selections,
            exits=exits * config.n_layers,
            moved_experts=(tally.misses - tally.computed + tally.promotions) * scale,
            moved_bytes=tally.bytes_moved * scale,
            host_bytes=tally.bytes_computed * scale,  # after an exit, which is the hand-over too
            at_once=mode.computes,
        ),
    )


def _exits(per_layer: float, selections_ratio: float) -> float:
    """Exits a layer where a token chooses `selections_ratio` times as many experts of it."""
    if per_layer >= 1:
        return per_layer
    return 1 - (1 - per_layer) ** selections_ratio


def _dense(model: PlannedModel, context: int, kv_format: str) -> Traffic:
    """A token's traffic without routed experts, with keys and values of a full context."""
    kv_bytes = model.kv_cache_bytes(context, kv_format, of_windows=True)
    return Traffic(model.config.n_blocks, model.dense_read_bytes, kv_bytes, expert_bytes=0.0)


# llama.cpp keeps keys and values in half precision unless it is told otherwise.
LLAMA_CPP_KV = "float16"


def all_on_cpu(model: PlannedModel, context: int, resident_layers: int = 0) -> Traffic:
    """llama.cpp's --cpu-moe, or --n-cpu-moe with some layers' experts on the device.

    The experts of the other layers are computed on the CPU, natively.
    """
    config, layers = model.config, model.store().precisions[NATIVE]
    sizes_L = [layer.expert_bytes * config.experts_per_token for layer in layers]
    on_host = config.n_layers - resident_layers
    return replace(
        _dense(model, context, LLAMA_CPP_KV),
        expert_bytes=sum(sizes_L[on_host:]),
        host_bytes=sum(sizes_L[:on_host]),
        host_layers=on_host,
    )


def layers_that_fit(model: PlannedModel, pool_bytes: int) -> int:
    """Layers, from the last, whose native experts fit together."""
    layers = reversed(model.store().precisions[NATIVE])
    totals = accumulate(layer.expert_bytes * model.config.n_experts for layer in layers)
    return sum(total <= pool_bytes for total in totals)


def hot_on_device(
    model: PlannedModel, trace: Trace, pool_bytes: int, context: int
) -> tuple[float, Traffic]:
    """The most used native experts of a profile on the device for good, the others on the CPU.

    Returns:
        (share of selections on the device 0-1, traffic of a token).
    """
    config, store = model.config, model.store()
    warm = _warmed_up(Setting("hot"), model, trace, pool_bytes)
    hot_LE = warm.replay.resident_pLE[NATIVE]
    ids_TLK = trace.ids_TLK[warm.counted : TOKENS]
    hot_TLK = hot_LE[np.arange(ids_TLK.shape[1])[:, None], ids_TLK]
    n_tokens, n_layers, k = ids_TLK.shape
    sizes_L = np.array([store.layer(NATIVE, at).expert_bytes for at in warm.layers], np.float64)
    scale = config.n_layers * config.experts_per_token / (n_layers * k) / n_tokens
    touched = float((~hot_TLK).any(axis=2).mean())
    return float(hot_TLK.mean()), replace(
        _dense(model, context, LLAMA_CPP_KV),
        expert_bytes=float((hot_TLK.sum(axis=(0, 2)) * sizes_L).sum()) * scale,
        host_bytes=float(((~hot_TLK).sum(axis=(0, 2)) * sizes_L).sum()) * scale,
        host_layers=_exits(touched, config.experts_per_token / k) * config.n_layers,
    )
