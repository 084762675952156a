"""What to run on a card: what fits, what to expect of each setting, and what to choose.

Owns the order of the questions and the record that answers them (JSON). `table.py` prints the
record, `records.py` hands it on to the document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hobbit_jax.cache.policies import DEFAULT_POLICY
from hobbit_jax.cache.pool_sizing import demands
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.planner import candidates
from hobbit_jax.planner.cost_model import Machine, Traffic, describe, token_time
from hobbit_jax.planner.hardware import GPU
from hobbit_jax.planner.routing import Routing
from hobbit_jax.planner.shapes import PlannedModel
from hobbit_jax.planner.traffic import (
    Outcome,
    all_on_cpu,
    hot_on_device,
    layers_that_fit,
    replay_setting,
)

# The summary of `scripts/dev/check_plan.py`, as it was last recorded.
CHECK = Path(__file__).with_name("check.json")
GIB = 2**30
CPU_MOE, N_CPU_MOE, HOT_ON_DEVICE = (
    "llama.cpp --cpu-moe",
    "llama.cpp --n-cpu-moe",
    "hot experts on the card, the others on the CPU",
)


@dataclass(frozen=True)
class Memory:
    """How the card's memory is divided, in bytes."""

    vram: int
    dense: int
    kv_cache: int
    scratch: int
    reserve: int

    @property
    def pool(self) -> int:
        """What is left for experts."""
        return self.vram - self.dense - self.kv_cache - self.scratch - self.reserve


def divide_memory(
    model: PlannedModel, vram_gib: float, context: int, chunk_tokens: int, reserve_gib: float
) -> Memory:
    """The card's memory for a model and a context.

    Raises:
        ValueError: too little for one step of native experts (says what is missing), or a context
            that the model was not made for.
    """
    if not 1 <= context <= model.config.context_length:
        raise ValueError(f"context is {context}; want 1 to {model.config.context_length}")
    memory = Memory(
        vram=int(vram_gib * GIB),
        dense=model.dense_bytes,
        kv_cache=model.kv_cache_bytes(context),
        scratch=model.scratch_bytes(context, chunk_tokens),
        reserve=int(reserve_gib * GIB),
    )
    store = model.store()
    least = sum(d.expert_bytes * d.min_slots for d in demands(uniform_plan(store), store))
    if memory.pool < least:
        raise ValueError(
            f"{vram_gib:g} GiB of VRAM are too small for {model.name} by "
            f"{(least - memory.pool) / GIB:.2f} GiB: dense weights {memory.dense / GIB:.2f}, KV "
            f"cache of {context} tokens {memory.kv_cache / GIB:.2f}, scratch "
            f"{memory.scratch / GIB:.2f}, reserve {memory.reserve / GIB:.2f}, one step of native "
            f"experts {least / GIB:.2f}"
        )
    return memory


def make_plan(
    model: PlannedModel,
    card: GPU,
    machine: Machine,
    memory: Memory,
    context: int,
    chunk_tokens: int,
    routing: Routing,
    given: dict[str, float],
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """The record of a plan, ready for JSON; speeds are predictions.

    Args:
        model: what shall run.
        card: where.
        machine: the constants of the cost model.
        memory: `divide_memory`'s.
        context: tokens of the KV cache.
        chunk_tokens: of a prefill step, as in `memory`.
        routing: what the replays run on.
        given: constants that the user set, already in `machine`.
        progress: called with the name of each setting before it is replayed.
    """
    config, pool = model.config, memory.pool
    native_fits = model.native_bytes <= pool
    listed = [candidates.NATIVE] if native_fits else candidates.settings()
    outcomes: list[Outcome] = []
    left_out: dict[str, str] = {}
    for setting in listed:
        progress(setting.name)
        try:
            outcomes.append(replay_setting(setting, model, routing.trace, pool, context))
        except (ValueError, NotImplementedError) as error:
            left_out[setting.name] = " ".join(str(error).split())
    speeds = [token_time(o.traffic, machine).tokens_per_second for o in outcomes]
    losses = [candidates.expected_loss(o.setting, o.low_uses, o.skipped) for o in outcomes]
    chosen = outcomes[candidates.choose(speeds, losses)].setting.name
    rivals = [] if native_fits else _rivals(model, routing, pool, context)
    constants = describe(machine, given)
    return {
        "kind": "plan",
        "model": {
            "name": model.name,
            "layers": config.n_layers,
            "experts": config.n_experts,
            "experts_per_token": config.experts_per_token,
            "native_bytes": model.native_bytes,
            "low_bytes": {f: size for f in candidates.LOW_FORMATS if (size := _low(model, f))},
        },
        "card": asdict(card),
        "context": context,
        "chunk_tokens": chunk_tokens,
        "memory": {**asdict(memory), "pool": pool},
        "routing": {"source": routing.source, "extrapolates": list(routing.extrapolates)},
        "policy": DEFAULT_POLICY,
        "constants": constants,
        "assumed": [c["name"] for c in constants if c["origin"] == "assumed"],
        "settings": [
            {
                **asdict(o.setting),
                "slots": o.slots,
                "residents": o.residents,
                "hit_rate": o.hit_rate,
                "low_uses": o.low_uses,
                "skipped": o.skipped,
                "expected_loss": loss,
                **_predicted(o.traffic, machine),
                "speedup": speed / speeds[0],
            }
            for o, speed, loss in zip(outcomes, speeds, losses, strict=True)
        ],
        "left_out": left_out,
        "rivals": [
            {"name": name, "on_card": share, **_predicted(traffic, machine)}
            for name, share, traffic in rivals
        ],
        "choice": chosen,
        "sensitivity": _sensitivity(outcomes, losses, machine, constants),
        "speedup_needed": candidates.SPEEDUP_NEEDED,
    }


def _low(model: PlannedModel, format: str) -> int | None:
    try:
        return model.store(format).precision_bytes(1)
    except NotImplementedError:
        return None


def _rivals(
    model: PlannedModel, routing: Routing, pool_bytes: int, context: int
) -> list[tuple[str, float, Traffic]]:
    """Name, share of selections on the card (0-1), traffic."""
    n_layers = model.config.n_layers
    fit = layers_that_fit(model, pool_bytes)
    hot, traffic = hot_on_device(model, routing.trace, pool_bytes, context)
    return [
        (CPU_MOE, 0.0, all_on_cpu(model, context)),
        (f"{N_CPU_MOE} {n_layers - fit}", fit / n_layers, all_on_cpu(model, context, fit)),
        (HOT_ON_DEVICE, hot, traffic),
    ]


def _sensitivity(
    outcomes: Sequence[Outcome],
    losses: Sequence[float],
    machine: Machine,
    constants: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """What the rule would choose with each assumed constant halved and doubled (a share: to 1)."""
    found = []
    for constant in constants:
        name, value = constant["name"], constant["value"]
        if constant["origin"] != "assumed" or not value:
            continue
        for factor in (0.5, 2.0):
            most = 1.0 if constant["unit"] == "share" else factor * value
            other = replace(machine, **{name: min(factor * value, most)})
            speeds = [token_time(o.traffic, other).tokens_per_second for o in outcomes]
            at = candidates.choose(speeds, losses)
            found.append(
                {
                    "name": name,
                    "value": min(factor * value, most),
                    "choice": outcomes[at].setting.name,
                    "tokens_per_second": speeds[at],
                    "speedup": speeds[at] / speeds[0],
                }
            )
    return found


def _predicted(traffic: Traffic, machine: Machine) -> dict[str, Any]:
    time = token_time(traffic, machine)
    return {
        "traffic": asdict(traffic),
        "token_ms": asdict(time),
        "tokens_per_second": time.tokens_per_second,
    }


def faster_rival(plan: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest rival of a record, which degrades nothing, where it beats the choice; or None."""
    chosen = next(s for s in plan["settings"] if s["name"] == plan["choice"])
    best = max(plan["rivals"], key=lambda rival: rival["tokens_per_second"], default=None)
    if best is None or best["tokens_per_second"] <= chosen["tokens_per_second"]:
        return None
    return best


def recorded_check() -> dict[str, Any]:
    """The model's error as last measured: where, on how many settings, and how large."""
    return json.loads(CHECK.read_text(encoding="utf-8"))
