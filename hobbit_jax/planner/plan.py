"""What to run on a GPU: what fits, what to expect of each setting, and what to choose.

`report/planner_tables.py` shows its record. Every prediction is a list, one for each routing that
the plan was given: a user's own trace is one, made-up routing is two (`routing.py`).
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from tqdm import tqdm

from hobbit_jax.cache.controller import BankLayout
from hobbit_jax.cache.miss_modes import FETCH
from hobbit_jax.cache.policies import DEFAULT_POLICY
from hobbit_jax.cache.pool_sizing import least_bytes
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.planner import candidates, cost_model, traffic
from hobbit_jax.planner.cost_model import COMPILED, OURS, Machine, Traffic, token_time
from hobbit_jax.planner.hardware import GPU
from hobbit_jax.planner.routing import Routing
from hobbit_jax.planner.shapes import PlannedModel
from hobbit_jax.planner.traffic import LLAMA_CPP_KV, Outcome, Setting
from hobbit_jax.record import Benchmark, Record, machine, measured

STUDY = "planner"
GIB = 2**30
# Joint perturbations of all assumed constants, each between half and double.
DRAWS = 200


@dataclass(frozen=True)
class Request:
    """What the GPU's memory is for."""

    vram_gib: float  # of the GPU
    context: int = 4096  # tokens of the KV cache
    kv_format: str = "float32"  # of keys and values in our engine
    chunk_tokens: int = 256  # of one prefill step
    reserve_gib: float = 0.75  # for the driver and the display


@dataclass(frozen=True)
class Memory:
    """How the GPU's memory is divided, in bytes."""

    vram: int
    dense: int
    kv_cache: int
    scratch: int
    reserve: int
    pool: int  # what is left for experts


@dataclass(frozen=True)
class Option:
    """A way of decoding under one routing: a setting of ours, or what llama.cpp would do."""

    name: str
    loss: float  # expected, nats a token
    traffic: Traffic
    outcome: Outcome | None = None  # of a setting of ours
    on_gpu: float = 0.0  # share (0-1) of the selections that llama.cpp computes on the GPU
    flag: str = ""  # what it is told, where that depends on the memory


@dataclass(frozen=True)
class _World:
    """All options under one routing in one division of the memory."""

    options: list[Option]
    left_out: dict[str, str]  # settings that cannot run, and why

    def choices(self, machines: Mapping[str, Machine]) -> dict[str, str]:
        """What to run with native experts; in this engine; of all; and of all if this engine were
        compiled."""

        def taken(
            options: Sequence[Option], engine: str = OURS, most_loss: float = candidates.MOST_LOSS
        ) -> str:
            times = [
                token_time(o.traffic, machines[engine if o.outcome else COMPILED]) for o in options
            ]
            speeds, losses = [t.tokens_per_second for t in times], [o.loss for o in options]
            return options[candidates.choose(speeds, losses, most_loss)].name

        return {
            "native": taken(self.options, most_loss=0),
            "here": taken([option for option in self.options if option.outcome]),
            "overall": taken(self.options),
            "compiled": taken(self.options, COMPILED),
        }


def divide_memory(model: PlannedModel, request: Request) -> Memory:
    """The GPU's memory for a model and a context.

    Raises:
        ValueError: too little for one step of native experts (says what is missing), or a context
            that the model was not made for.
    """
    context = request.context
    if not 1 <= context <= model.config.context_length:
        raise ValueError(f"context is {context}; want 1 to {model.config.context_length}")
    vram, reserve = int(request.vram_gib * GIB), int(request.reserve_gib * GIB)
    kv_cache = model.kv_cache_bytes(context, request.kv_format)
    scratch = model.scratch_bytes(context, request.chunk_tokens)
    pool = vram - model.dense_bytes - kv_cache - scratch - reserve
    store = model.store()
    layout = BankLayout.of_store(store)
    least = least_bytes(uniform_plan(store).shares_pLE(layout.shape_pLE), FETCH, layout)
    if pool < least:
        raise ValueError(
            f"{request.vram_gib:g} GiB of VRAM are too small for {model.name} by "
            f"{(least - pool) / GIB:.2f} GiB: dense weights {model.dense_bytes / GIB:.2f}, KV "
            f"cache of {context} tokens {kv_cache / GIB:.2f}, scratch {scratch / GIB:.2f}, "
            f"reserve {reserve / GIB:.2f}, one step of native experts {least / GIB:.2f}"
        )
    return Memory(vram, model.dense_bytes, kv_cache, scratch, reserve, pool)


def make_plan(
    model: PlannedModel,
    gpu: GPU,
    machines: Mapping[str, Machine],
    request: Request,
    routings: Sequence[Routing],
    given: Mapping[str, str],
) -> dict[str, Any]:
    """A plan, ready for JSON; speeds are predictions.

    Args:
        machines: the constants of the cost model, by engine; `given` as in `describe`.
        routings: what the replays run on, the least local first.

    Raises:
        ValueError: see `divide_memory`.
    """
    config, memory = model.config, divide_memory(model, request)
    listed = candidates.settings(cost_model.link_to_host(machines[OURS]))

    def under(asked: Request) -> list[_World]:
        return [_world(model, listed, routing, asked) for routing in routings]

    base = under(request)
    constants = cost_model.describe(machines[OURS], given)
    varied = {label: under(asked) for label, asked in _other_requests(model, request).items()}
    assumed = [c["name"] for c in constants if c["origin"] == "assumed"]
    # One tuple an option: what it comes to under each routing. The first is native.
    options = list(zip(*(world.options for world in base), strict=True))
    return {
        "model": {
            "name": model.name,
            "layers": config.n_layers,
            "experts": config.n_experts,
            "experts_per_token": config.experts_per_token,
            "native_bytes": model.native_bytes,
            "low_bytes": {f: model.store(f).precision_bytes(1) for f in candidates.LOW_FORMATS},
        },
        "gpu": asdict(gpu),
        **asdict(request),
        "memory": asdict(memory),
        "routing": {
            "source": [routing.source for routing in routings],
            "extrapolates": sorted({r for routing in routings for r in routing.extrapolates}),
        },
        "policy": DEFAULT_POLICY,
        "constants": constants,
        "assumed": assumed,
        "settings": [_shown(o, options[0], machines) for o in options if o[0].outcome],
        "left_out": base[0].left_out,
        "baselines": [_shown(o, options[0], machines) for o in options if not o[0].outcome],
        "choices": _choices(base, machines),
        "sensitivity": _one_by_one(base, varied, machines, assumed),
        "joint": _joint([*base, *chain(*varied.values())], machines, assumed),
        "speedup_needed": candidates.SPEEDUP_NEEDED,
        "most_loss": candidates.MOST_LOSS,
    }


def plan_record(plan: Mapping[str, Any]) -> Record:
    """The record of what `make_plan` made."""
    of_plan = ("vram_gib", "reserve_gib", "context", "kv_format", "policy", "chunk_tokens")
    given = {c["name"]: c["value"] for c in plan["constants"] if c["origin"] == "given"}
    setting = {
        "model": plan["model"]["name"],
        "gpu": plan["gpu"]["name"],
        "routing": " to ".join(plan["routing"]["source"]),
        **{name: plan[name] for name in of_plan},
        **given,
    }
    found = measured({name: value for name, value in plan.items() if name not in of_plan})
    return Record(STUDY, Benchmark(STUDY, setting), **vars(found), **machine())


def _other_requests(model: PlannedModel, request: Request) -> dict[str, Request]:
    """The same with another KV format and with a longer context, where they fit the GPU."""
    other = "float16" if request.kv_format == "float32" else "float32"
    longer = min(4 * request.context, model.config.context_length)
    wanted = {
        f"kv_format {other}": replace(request, kv_format=other),
        f"context {longer}": replace(request, context=longer),
    }
    found = {}
    for label, asked in wanted.items():
        if asked != request:
            with contextlib.suppress(ValueError):
                divide_memory(model, asked)
                found[label] = asked
    return found


def _world(
    model: PlannedModel, listed: Sequence[Setting], routing: Routing, request: Request
) -> _World:
    options, left_out, pool = [], {}, divide_memory(model, request).pool
    native_fits = model.native_bytes <= pool
    compared = listed[:1] if native_fits else listed
    for setting in tqdm(compared, unit="setting", leave=False, disable=None):
        try:
            outcome = traffic.replay_setting(
                setting, model, routing.trace, pool, request.context, request.kv_format
            )
        except (ValueError, NotImplementedError) as error:
            left_out[setting.name] = " ".join(str(error).split())
            continue
        loss = candidates.expected_loss(setting, outcome.low_uses, outcome.skipped)
        options.append(Option(setting.name, loss, outcome.traffic, outcome))
    return _World(options + _baselines(model, routing, request, native_fits), left_out)


def _baselines(
    model: PlannedModel, routing: Routing, request: Request, native_fits: bool
) -> list[Option]:
    """llama.cpp on the same file and on smaller ones, and a fork of it with hot experts; where all
    native experts fit, llama.cpp with all of them on the GPU."""
    n_layers, context = model.config.n_layers, request.context
    # What llama.cpp has for experts: its keys and values are narrower than ours may be, and those
    # that a sliding window has passed are not kept.
    pool = divide_memory(model, replace(request, kv_format=LLAMA_CPP_KV)).pool
    kept, needed = (model.kv_cache_bytes(context, LLAMA_CPP_KV, w) for w in (False, True))
    pool += kept - needed
    baselines, files = [], {"": (model, 0.0)}
    if not native_fits:
        hot, of_hot = traffic.hot_on_device(model, routing.trace, pool, context)
        fork = "a fork of llama.cpp with the hot experts on the GPU"
        baselines = [
            Option("llama.cpp --cpu-moe", 0.0, traffic.all_on_cpu(model, context)),
            Option(fork, 0.0, of_hot, on_gpu=hot),
        ]
        for recipe, loss in candidates.SMALLER_FILES.items():
            if smaller := model.smaller_file(recipe):
                files[f", {recipe} file"] = (smaller, loss)
    for label, (file, loss) in files.items():
        fit = traffic.layers_that_fit(file, pool)
        baselines.append(
            Option(
                f"llama.cpp --n-cpu-moe{label}", loss, traffic.all_on_cpu(file, context, fit),
                on_gpu=fit / n_layers, flag=f"--n-cpu-moe {n_layers - fit}: ",
            )
        )  # fmt: skip
    return baselines


def _shown(
    found: Sequence[Option], native: Sequence[Option], machines: Mapping[str, Machine]
) -> dict[str, Any]:
    """An option's entry of the record, with a list of every prediction over the routings."""

    def times(options: Sequence[Option], engine: str) -> list[cost_model.TokenTime]:
        return [token_time(option.traffic, machines[engine]) for option in options]

    outcomes = [option.outcome for option in found if option.outcome]
    own = times(found, OURS if outcomes else COMPILED)
    shown: dict[str, Any] = {
        "name": found[0].name,
        "expected_loss": [option.loss for option in found],
        "traffic": [asdict(option.traffic) for option in found],
        "token_ms": [asdict(time) for time in own],
        "tokens_per_second": [time.tokens_per_second for time in own],
    }
    if not outcomes:
        return {**shown, "on_gpu": [o.on_gpu for o in found], "flag": found[0].flag}
    rivals = times(native, OURS)
    return {
        **shown,
        **asdict(outcomes[0].setting),
        "slots": outcomes[0].slots,
        "residents": outcomes[0].residents,
        **{key: [getattr(o, key) for o in outcomes] for key in ("hit_rate", "low_uses", "skipped")},
        "compiled_tokens_per_second": [t.tokens_per_second for t in times(found, COMPILED)],
        "speedup": [rival.total / t.total for rival, t in zip(rivals, own, strict=True)],
    }


def _choices(worlds: Sequence[_World], machines: Mapping[str, Machine]) -> dict[str, list[str]]:
    """Who chooses what, a list over the routings."""
    choices = [world.choices(machines) for world in worlds]
    return {who: [choice[who] for choice in choices] for who in choices[0]}


def _scaled(machines: Mapping[str, Machine], factors: Mapping[str, float]) -> dict[str, Machine]:
    """With constants multiplied; an efficiency stays at 1 or below."""
    found = {}
    for engine, constants in machines.items():
        values = {name: factor * getattr(constants, name) for name, factor in factors.items()}
        values |= {n: min(1.0, v) for n, v in values.items() if n.endswith("efficiency")}
        found[engine] = replace(constants, **values)
    return found


def _one_by_one(
    base: Sequence[_World],
    varied: Mapping[str, Sequence[_World]],
    machines: Mapping[str, Machine],
    assumed: Sequence[str],
) -> list[dict[str, Any]]:
    """What the rule chooses with each assumed constant halved and doubled (an efficiency: to 1),
    and with another KV format or context."""
    found = []
    for name in assumed:
        for factor in (0.5, 2.0):
            scaled = _scaled(machines, {name: factor})
            changed = f"{name} {getattr(scaled[OURS], name):g}"
            found.append({"changed": changed, **_choices(base, scaled)})
    return found + [{"changed": label, **_choices(w, machines)} for label, w in varied.items()]


def _joint(
    worlds: Sequence[_World], machines: Mapping[str, Machine], assumed: Sequence[str]
) -> dict[str, list[tuple[str, float]]]:
    """How often (0-1) each choice is made when all assumed constants, the routing, the KV format
    and the context vary together, most often first."""
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        factors = dict(zip(assumed, 2.0 ** rng.uniform(-1, 1, len(assumed)), strict=True))
        world = worlds[int(rng.integers(len(worlds)))]
        draws.append(world.choices(_scaled(machines, factors)))
    counts = {who: Counter(draw[who] for draw in draws).most_common() for who in draws[0]}
    return {who: [(name, n / DRAWS) for name, n in counted] for who, counted in counts.items()}
