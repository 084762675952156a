"""How wrong the cost model and the replays are, on the machine at hand.

Owns the measurement and its record. In every turn all settings decode the same tokens
(`evals/decode_bench.py`). The machine's constants are fitted to some of them, turn by turn, so that
a load that comes and goes is in the constants and not in the error; the other settings are
predicted with those constants, and never looked at while fitting. Two errors:

- of the cost model alone: from the counts (exits, bytes) that the engine itself reports;
- of the whole planner: from the counts that a replay of the recorded routing predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import OnRouting
from hobbit_jax.cache.router_output import RouterOutput
from hobbit_jax.cache.trace import Trace
from hobbit_jax.evals.decode_bench import Decoded, compare
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import LoadedModel
from hobbit_jax.planner.cost_model import Machine, Traffic, token_time
from hobbit_jax.planner.shapes import PlannedModel
from hobbit_jax.planner.traffic import Setting, replay_setting
from hobbit_jax.statistics import spread

MIB = 2**20
# The wall's seconds, and those of all processors of the process.
CLOCKS = {"seconds": "decode_s", "cpu_seconds": "decode_cpu_s"}
# So fast that it takes no time: a fitted cost of 0 has no bandwidth.
_FREE_GB_S = 1e9


@dataclass(frozen=True)
class Case:
    """A setting in a pool; `calibrates` says whether constants are fitted to it."""

    setting: Setting
    budget_mib: float | None  # None holds everything
    calibrates: bool

    @property
    def name(self) -> str:
        """Of its row."""
        where = "all resident" if self.budget_mib is None else f"{self.budget_mib:g} MiB"
        return f"{self.setting.name}, {where}"


def cases(low_format: str) -> list[Case]:
    """What is measured on the reference model: 7.3 MiB of experts natively, 3.9 in Q2_K."""
    native = Setting("native", "fetch")
    uniform = Setting(f"uniform {low_format}", "fetch", low_format, "low")
    fitted = [(native, None), (uniform, None), (native, 2), (native, 4), (uniform, 1)]
    others = [(native, 1), (native, 3), (native, 5), (uniform, 2), (uniform, 3)]
    for mode, share, budgets in (
        ("floor", 0.5, (4, 5)),
        ("fetch_low", 0.8, (1, 2, 4)),
        ("use_low_if_resident", 0.8, (2,)),
        ("hobbit", 0.5, (2,)),
    ):
        setting = Setting(f"{mode} {low_format}", mode, low_format, low_share=share)
        others += [(setting, budget) for budget in budgets]
    return [Case(s, b, True) for s, b in fitted] + [Case(s, b, False) for s, b in others]


def record_routing(
    model: LoadedModel, store: HostExperts, ids_RS: np.ndarray, prompt_tokens: int
) -> Trace:
    """The native routing of every token decoded after its prompt, row after row."""
    seen: list[RouterOutput] = []
    engine = Engine(model, store, observers=[OnRouting(seen.append)])
    ids, weights, positions = [], [], []
    for ids_S in ids_RS:
        engine.start(1, len(ids_S))
        engine.prefill([ids_S[:prompt_tokens].tolist()])
        for position in range(prompt_tokens, len(ids_S)):
            seen.clear()
            engine.decode(ids_S[[position]])
            ids.append([routed.ids_TK[0] for routed in seen])
            weights.append([routed.weights_TK[0] for routed in seen])
            positions.append(position - prompt_tokens)
    ids_TLK = np.asarray(ids, np.int64)
    weights_TLK = np.asarray(weights, np.float32)
    weights_TLK = weights_TLK / weights_TLK.sum(axis=-1, keepdims=True)
    return Trace("recorded", ids_TLK, weights_TLK, np.asarray(positions), model.config.n_experts)


def counted_traffic(case: Case, decoded: Decoded, model: PlannedModel, context: int) -> Traffic:
    """What the engine counted, for the cost model; an expert's bytes are its precision's mean."""
    config, store = model.config, model.store(case.setting.low_format)
    found, tokens = decoded.measurement.counts, decoded.measurement.tokens
    assert found is not None  # every case is an engine
    sizes = [
        store.precision_bytes(t) / config.n_layers / config.n_experts
        for t in range(len(store.precisions))
    ]
    low = 1.0 if case.setting.asked == "low" else found.demoted / found.selections
    served = found.selections / tokens * (1 - found.skipped / found.selections)
    return Traffic(
        layers=config.n_layers,
        dense_bytes=model.dense_read_bytes,
        kv_bytes=model.kv_cache_bytes(context),
        expert_bytes=served * ((1 - low) * sizes[0] + low * sizes[-1]),
        exits=found.host_round_trips / tokens,
        moved_bytes=found.bytes_moved / tokens,
    )


def fit(traffics: Sequence[Traffic], seconds: Sequence[float]) -> Machine:
    """The constants, none below 0, that explain `seconds` a token with least relative error.

    Fitted are a token's fixed time, seconds a byte read, an exit, and seconds a byte moved.
    """
    layers = traffics[0].layers
    rows = [
        [1.0, t.dense_bytes + t.kv_bytes + t.expert_bytes, t.exits, t.moved_bytes] for t in traffics
    ]
    unit = np.array([1e-3, 1e-9, 1e-3, 1e-9])  # so that the solver sees numbers of one size
    relative = np.asarray(rows) * unit / np.asarray(seconds)[:, None]
    fixed, per_read, per_exit, per_moved = nnls(relative, np.ones(len(rows)))[0]
    return Machine(
        device_gb_s=1 / max(per_read, 1 / _FREE_GB_S),
        pcie_gb_s=1 / max(per_moved, 1 / _FREE_GB_S),
        device_efficiency=1.0,
        pcie_efficiency=1.0,
        launches_per_layer=1.0,
        launch_us=fixed * 1e3 / layers,
        token_us=0.0,
        selection_us=0.0,
        exit_us=per_exit * 1e3,
        copies_per_expert=0.0,
    )


def check(
    model: LoadedModel,
    planned: PlannedModel,
    low_store: HostExperts,
    low_format: str,
    ids_RS: np.ndarray,
    prompt_tokens: int,
    link_gb_s: float | None = None,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measures every case in turns, fits, predicts; the record without the machine.

    Args:
        model: the loaded model.
        planned: the same as the planner sees it.
        low_store: its experts natively and at `low_format`.
        low_format: of the low precision.
        ids_RS: rows of tokens; the first warms up.
        prompt_tokens: of each row.
        link_gb_s: of an emulated link, with `seconds` by processor time and waits; None copies as
            fast as can be.
        progress: called after every setting of every turn.
    """
    listed, context = cases(low_format), ids_RS.shape[1]
    settings = [_bench_setting(case, low_store) for case in listed]
    _, *measured = compare(model, low_store, settings, ids_RS, prompt_tokens, link_gb_s, progress)
    trace = record_routing(model, low_store, ids_RS, prompt_tokens)
    counted = [
        counted_traffic(case, found, planned, context)
        for case, found in zip(listed, measured, strict=True)
    ]
    replayed = [
        replay_setting(case.setting, planned, trace, _pool_bytes(case, planned), context)
        for case in listed
    ]
    return {
        "rows": [
            {
                "setting": case.name,
                "calibrates": case.calibrates,
                "hit_rate": found.measurement.counted_figures()["hit_rate"],
                "hit_rate_replayed": outcome.hit_rate,
                "exits": traffic.exits,
                "exits_replayed": outcome.traffic.exits,
                "moved_bytes": traffic.moved_bytes,
                "moved_bytes_replayed": outcome.traffic.moved_bytes,
            }
            for case, found, traffic, outcome in zip(
                listed, measured, counted, replayed, strict=True
            )
        ],
        "link_gb_s": link_gb_s,
        "turns": len(measured[0].measurement.turns),
        "tokens_of_a_turn": _tokens_of_a_turn(measured[0]),
        "times": {
            clock: _compare_times(listed, measured, name, counted, [o.traffic for o in replayed])
            for clock, name in CLOCKS.items()
        },
    }


def _tokens_of_a_turn(decoded: Decoded) -> float:
    return decoded.measurement.tokens / len(decoded.measurement.turns)


def _pool_bytes(case: Case, planned: PlannedModel) -> int:
    return planned.native_bytes if case.budget_mib is None else int(case.budget_mib * MIB)


def _compare_times(
    listed: Sequence[Case],
    measured: Sequence[Decoded],
    name: str,
    counted: Sequence[Traffic],
    replayed: Sequence[Traffic],
) -> dict[str, Any]:
    """Constants fitted in each turn, and each case's predictions over its times, in that order."""
    seconds_CR = np.array([getattr(found.measurement, name) for found in measured])
    seconds_CR = seconds_CR / _tokens_of_a_turn(measured[0])
    fitted = [i for i, case in enumerate(listed) if case.calibrates]
    machines = [
        fit([counted[i] for i in fitted], seconds_CR[fitted, turn].tolist())
        for turn in range(seconds_CR.shape[1])
    ]
    return {
        "measured_ms": [spread(seconds_R * 1e3) for seconds_R in seconds_CR],
        "ratio_counted": [
            spread(_ratios(traffic, machines, seconds_R))
            for traffic, seconds_R in zip(counted, seconds_CR, strict=True)
        ],
        "ratio_replayed": [
            spread(_ratios(traffic, machines, seconds_R))
            for traffic, seconds_R in zip(replayed, seconds_CR, strict=True)
        ],
        "constants": {
            name: spread([asdict(machine)[name] for machine in machines])
            for name in ("launch_us", "device_gb_s", "exit_us", "pcie_gb_s")
        },
    }


def _bench_setting(case: Case, store: HostExperts) -> CacheConfig:
    budget = None if case.budget_mib is None else int(case.budget_mib * MIB)
    plan = uniform_plan(store, 1) if case.setting.asked == "low" else None
    return CacheConfig(budget, plan, mode=case.setting.mode, low_share=case.setting.low_share)


def _ratios(traffic: Traffic, machines: Sequence[Machine], seconds_R: np.ndarray) -> np.ndarray:
    predicted_R = np.array([token_time(traffic, machine).total for machine in machines])
    return predicted_R * 1e-3 / seconds_R


def summarise(record: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """What a plan prints of a record: where it was measured, and the errors of predictions.

    On a CPU by processor time, which a load by others changes less (with the waits for an emulated
    link where there was one); on a GPU by the wall's.
    """
    on_gpu = not machine["device"].startswith("cpu")
    predicted = [i for i, row in enumerate(record["rows"]) if not row["calibrates"]]

    def over_settings(clock: str, name: str) -> dict[str, float]:
        medians = np.array([record["times"][clock][name][i]["median"] for i in predicted])
        return {
            "median": float(np.median(medians)),
            "low": float(medians.min()),
            "high": float(medians.max()),
            "median_error": float(np.median(np.abs(medians - 1))),
        }

    clock = "seconds" if on_gpu or record["link_gb_s"] else "cpu_seconds"
    return {
        "device": machine["device"],
        "cpu_count": machine["cpu_count"],
        "on_gpu": on_gpu,
        "settings": len(predicted),
        "clock": clock,
        "time_ratio": over_settings(clock, "ratio_replayed"),
        "time_ratio_counted": over_settings(clock, "ratio_counted"),
    }
