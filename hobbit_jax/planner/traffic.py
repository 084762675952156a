"""What each way of decoding would move, wait for and read, by replaying routing.

Owns the step from a setting, a pool and a trace to a `Traffic`.
Who is resident is decided by the live classes (`cache/pool_sizing.py`,
`cache/controller.py`), warmed up from the trace's first tokens as a profile would
(`cache/warm_start.py`), and counted on later ones. A trace of another shape is replayed in its own:
each bank gets the same fraction of its experts, and the counts are scaled to the model's
selections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hobbit_jax.cache.controller import BankLayout, Controller
from hobbit_jax.cache.counter import Replay, RoutedStep
from hobbit_jax.cache.miss_modes import LOW, MISS_MODES
from hobbit_jax.cache.policies import DEFAULT_POLICY, policy_factory
from hobbit_jax.cache.pool_sizing import DEFAULT_LOW_SHARE, pool_slots
from hobbit_jax.cache.promotion import DEFAULT_PROMOTION
from hobbit_jax.cache.trace import Trace
from hobbit_jax.cache.warm_start import WarmStart, rank
from hobbit_jax.experts.precision import StaticPlan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.planner.cost_model import Traffic
from hobbit_jax.planner.routing import PROFILE_TOKENS, TOKENS, WARM_TOKENS
from hobbit_jax.planner.shapes import PlannedModel
from pallas_kernels.reference import Signature


@dataclass(frozen=True)
class Setting:
    """One way of decoding.

    Attributes:
        name: in tables.
        mode: by its name (`cache/miss_modes.py`).
        low_format: of the low precision; None without one.
        asked: which precision the plan asks for: native throughout, low throughout, or low for the
            `low_pairs` (0-1) of the pairs that a profile finds least used.
        low_share: of the pool's bytes for low copies, where the mode keeps some.
    """

    name: str
    mode: str = "fetch"
    low_format: str | None = None
    asked: Literal["native", "low", "frequency"] = "native"
    low_pairs: float = 0.0
    low_share: float = DEFAULT_LOW_SHARE


@dataclass(frozen=True)
class Outcome:
    """What a setting came to on one pool.

    Attributes:
        slots: per bank, by its formats.
        residents: distinct (layer, expert) pairs on the device.
        hit_rate: 0-1 over expert uses, at the copy that served.
        low_uses: 0-1 of selections that ran at the low precision.
        skipped: 0-1 of selections that nothing served.
        traffic: of one token.
    """

    setting: Setting
    slots: dict[str, int]
    residents: int
    hit_rate: float
    low_uses: float
    skipped: float
    traffic: Traffic


@dataclass(frozen=True)
class _Parts:
    """A trace cut in three: to learn from, to fill the cache, to count on."""

    uses_LE: np.ndarray
    warm_end: int
    start: int


def _cut(trace: Trace) -> _Parts:
    n_tokens = min(len(trace.ids_TLK), TOKENS)
    learned = n_tokens * PROFILE_TOKENS // TOKENS
    warm = learned + n_tokens * WARM_TOKENS // TOKENS
    first = replace(
        trace,
        ids_TLK=trace.ids_TLK[:learned],
        weights_TLK=trace.weights_TLK[:learned],
        position_T=trace.position_T[:learned],
    )
    return _Parts(first.uses_LE, warm, learned)


def _model_layers(trace: Trace, model: PlannedModel) -> list[int]:
    """The layer of the model that each layer of the trace stands for."""
    n_layers = trace.ids_TLK.shape[1]
    return [layer * model.config.n_layers // n_layers for layer in range(n_layers)]


def _precisions_LE(setting: Setting, uses_LE: np.ndarray) -> np.ndarray:
    """The precision that each pair of the trace is asked for at."""
    precision_LE = np.full(uses_LE.shape, LOW if setting.asked == "low" else NATIVE, np.int8)
    if setting.asked == "frequency":
        least = np.argsort(uses_LE, axis=None, kind="stable")
        precision_LE.ravel()[least[: round(setting.low_pairs * uses_LE.size)]] = LOW
    return precision_LE


def _plan(model: PlannedModel, precision_lE: np.ndarray) -> StaticPlan:
    """The same for the model: its own pairs, or as many of each layer as the trace's layer has."""
    config = model.config
    if precision_lE.shape == (config.n_layers, config.n_experts):
        return StaticPlan(precision_lE)
    n_layers = len(precision_lE)
    precision_LE = np.zeros((config.n_layers, config.n_experts), np.int8)
    for layer in range(config.n_layers):
        share = float((precision_lE[layer * n_layers // config.n_layers] == LOW).mean())
        precision_LE[layer, : round(share * config.n_experts)] = LOW
    return StaticPlan(precision_LE)


def _shrunk(
    slots: Mapping[Signature, int],
    store: HostExperts,
    bank_pL: list[list[Signature]],
    n_experts: int,
) -> dict[Signature, int]:
    """The slots of each bank for as large a fraction of the trace's experts."""
    ours = Counter(layer.signature for precision in store.precisions for layer in precision)
    theirs = Counter(signature for precision in bank_pL for signature in precision)
    shrunk: dict[Signature, int] = {}
    for signature, n_slots in slots.items():
        if theirs[signature]:
            pairs = theirs[signature] * n_experts
            part = n_slots * pairs / (ours[signature] * store.config.n_experts)
            shrunk[signature] = min(pairs, max(1, round(part)))
    return shrunk


def _layout(store: HostExperts, bank_pL: list[list[Signature]], trace: Trace) -> BankLayout:
    """Banks of the trace's shape with the model's formats."""
    expert_bytes = {
        layer.signature: layer.expert_bytes for precision in store.precisions for layer in precision
    }
    return BankLayout(trace.n_experts, trace.ids_TLK.shape[2], bank_pL, expert_bytes)


def replay_setting(
    setting: Setting, model: PlannedModel, trace: Trace, pool_bytes: int, context: int
) -> Outcome:
    """Replays a setting in a pool of `pool_bytes`.

    Raises:
        ValueError: the pool cannot hold what one step needs.
        NotImplementedError: the low format does not fit the model's widths, or is native too.
    """
    config, mode = model.config, MISS_MODES[setting.mode]
    store, parts = model.store(setting.low_format), _cut(trace)
    precision_lE = _precisions_LE(setting, parts.uses_LE)
    slots, _ = pool_slots(_plan(model, precision_lE), mode, store, pool_bytes, setting.low_share)
    layers = _model_layers(trace, model)
    bank_pL = [
        [store.layer(t, at).signature for at in layers] for t in range(len(store.precisions))
    ]
    layout = _layout(store, bank_pL, trace)
    shrunk = _shrunk(slots, store, bank_pL, trace.n_experts)
    policy = policy_factory(DEFAULT_POLICY)
    replay = Replay(layout, shrunk, mode, policy, DEFAULT_PROMOTION)
    shares_pLE = np.stack(
        [precision_lE == precision for precision in range(len(store.precisions))]
    ).astype(np.float64)
    WarmStart(parts.uses_LE).fill(replay.counter, shares_pLE, mode)

    order_TLK = np.argsort(-trace.weights_TLK, axis=-1, kind="stable")
    ids_TLK = np.take_along_axis(trace.ids_TLK, order_TLK, -1)
    weights_TLK = np.take_along_axis(trace.weights_TLK, order_TLK, -1)
    requested_TLK = precision_lE[np.arange(ids_TLK.shape[1])[:, None], ids_TLK].astype(np.int32)
    end = min(len(ids_TLK), TOKENS)
    before = replace(replay.tally)
    for token in range(parts.start, end):
        if token == parts.warm_end:
            before = replace(replay.tally)
        steps = [
            RoutedStep(
                int(trace.position_T[token]), layer, ids_TLK[token, [layer]],
                weights_TLK[token, [layer]], requested_TLK[token, [layer]],
            )
            for layer in range(ids_TLK.shape[1])
        ]  # fmt: skip
        replay.token(token, steps)
    tally = replay.tally.since(before)

    n_layers, k = ids_TLK.shape[1:]
    selections = config.n_layers * config.experts_per_token
    scale = selections / (n_layers * k) / tally.tokens
    moved_experts = tally.misses + tally.promotions
    traffic = Traffic(
        layers=config.n_layers,
        dense_bytes=model.dense_read_bytes,
        kv_bytes=model.kv_cache_bytes(context),
        expert_bytes=tally.bytes_used * scale,
        selections=selections,
        exits=_exits(tally.round_trips / (tally.tokens * n_layers), config.experts_per_token / k)
        * config.n_layers,
        moved_experts=moved_experts * scale,
        moved_bytes=tally.bytes_moved * scale,
    )
    asked_low = float((requested_TLK[parts.warm_end : end] == LOW).mean())
    return Outcome(
        setting=setting,
        slots={"/".join(dict.fromkeys(signature)): n for signature, n in slots.items()},
        residents=_residents(setting, slots, config.n_layers * config.n_experts, replay),
        hit_rate=tally.hits / max(1, tally.hits + tally.misses),
        low_uses=asked_low + tally.degraded / tally.selections,
        skipped=tally.skipped / tally.selections,
        traffic=traffic,
    )


def _residents(setting: Setting, slots: Mapping[Signature, int], pairs: int, replay: Replay) -> int:
    mode = MISS_MODES[setting.mode]
    if mode.low_banks == "none":
        return sum(slots.values())
    # Both copies of an expert may be there.
    return round(pairs * replay.resident_share())


def _exits(per_layer: float, selections_ratio: float) -> float:
    """Exits a layer where a token chooses `selections_ratio` times as many experts of it."""
    if per_layer >= 1:
        return per_layer
    return 1 - (1 - per_layer) ** selections_ratio


def all_on_cpu(model: PlannedModel, context: int, resident_layers: int = 0) -> Traffic:
    """llama.cpp's --cpu-moe, or --n-cpu-moe with some layers' experts on the device.

    The experts of the other layers are computed on the CPU, natively.
    """
    config, store = model.config, model.store()
    sizes_L = [layer.expert_bytes * config.experts_per_token for layer in store.precisions[NATIVE]]
    return Traffic(
        layers=config.n_layers,
        dense_bytes=model.dense_read_bytes,
        kv_bytes=model.kv_cache_bytes(context),
        expert_bytes=sum(sizes_L[config.n_layers - resident_layers :]),
        host_bytes=sum(sizes_L[: config.n_layers - resident_layers]),
        host_layers=config.n_layers - resident_layers,
    )


def layers_that_fit(model: PlannedModel, pool_bytes: int) -> int:
    """Layers, from the last, whose native experts fit together."""
    fit, left = 0, pool_bytes
    for layer in reversed(model.store().precisions[NATIVE]):
        left -= layer.expert_bytes * model.config.n_experts
        if left < 0:
            break
        fit += 1
    return fit


def hot_on_device(
    model: PlannedModel, trace: Trace, pool_bytes: int, context: int
) -> tuple[float, Traffic]:
    """The most used native experts of a profile on the device for good, the others on the CPU.

    Returns:
        (share of selections on the device 0-1, traffic of a token).
    """
    config, store, parts = model.config, model.store(), _cut(trace)
    setting = Setting("hot")
    slots, _ = pool_slots(
        _plan(model, _precisions_LE(setting, parts.uses_LE)),
        MISS_MODES["fetch"],
        store,
        pool_bytes,
        0.0,
    )
    layers = _model_layers(trace, model)
    bank_L = [store.layer(NATIVE, at).signature for at in layers]
    hot_LE = np.zeros(parts.uses_LE.shape, bool)
    shrunk = _shrunk(slots, store, [bank_L], trace.n_experts)
    native = np.ones((1, *parts.uses_LE.shape))
    controller = Controller(_layout(store, [bank_L], trace), shrunk, policy_factory(DEFAULT_POLICY))
    for bank, keys in rank(parts.uses_LE, native, controller, MISS_MODES["fetch"]).items():
        for key in keys[: bank.policy.capacity]:
            hot_LE[key.layer, key.expert] = True
    end = min(len(trace.ids_TLK), TOKENS)
    ids_TLK = trace.ids_TLK[parts.warm_end : end]
    hot_TLK = hot_LE[np.arange(ids_TLK.shape[1])[:, None], ids_TLK]
    k, n_layers = ids_TLK.shape[2], ids_TLK.shape[1]
    sizes_L = np.array([store.layer(NATIVE, at).expert_bytes for at in layers], np.float64)
    scale = config.n_layers * config.experts_per_token / (n_layers * k) / len(ids_TLK)
    used = hot_TLK.sum(axis=(0, 2))
    missed = (~hot_TLK).sum(axis=(0, 2))
    touched = float((~hot_TLK).any(axis=2).mean())
    return float(hot_TLK.mean()), Traffic(
        layers=config.n_layers,
        dense_bytes=model.dense_read_bytes,
        kv_bytes=model.kv_cache_bytes(context),
        expert_bytes=float((used * sizes_L).sum()) * scale,
        host_bytes=float((missed * sizes_L).sum()) * scale,
        host_layers=_exits(touched, config.experts_per_token / k) * config.n_layers,
    )
