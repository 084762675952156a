"""The time of one decoded token, from what it reads, moves and waits for; every constant's origin.

One sequence, one token at a time, nothing overlapped unless the traffic says so:

    token = device + launches + host + exits + link + cpu
    device   = (dense + KV cache + expert bytes read) / (device_gb_s · device_efficiency)
    launches = layers · (launches_per_layer · launch_us + waits_per_layer · wait_us)
    host     = token_us + selections · selection_us
    exits    = exits · exit_us
    link     = moved bytes / (pcie_gb_s · pcie_efficiency)
               + moved experts · copies_per_expert · copy_latency_us
    cpu      = host bytes / (host_gb_s · host_efficiency) + layers on the CPU · handover_us

An exit is a token that leaves the decode program in a layer whose experts are not all resident
(`inference/decode_loop.py`). Moved bytes are those waited for and those of promotions. The last
line is for experts that are computed where they lie, on the host; where that goes on beside the
uploads (a hybrid), only the longer of link and cpu counts. Arithmetic is taken to be free: every
product of a single token is bound by memory (docs/kernels.md counts the instructions).

A wait is a choice within the program, of a branch or of another round of a loop, that the host
makes when the device has told it the value. Constants depend on the engine: ours is driven from
Python, compiled by XLA and copies from a memory map, a compiled engine does none of it (`ENGINES`).
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal

from hobbit_jax.cache.bandwidth import Bandwidths, Source
from hobbit_jax.planner.hardware import GPU

Origin = Literal["vendor", "specification", "counted", "assumed", "given"]


def _constant(unit: str, source: str, default: Any = MISSING, origin: Origin = "assumed") -> Any:
    """A field of `Machine` with its unit, and where its default comes from."""
    return field(default=default, metadata={"unit": unit, "origin": origin, "source": source})


@dataclass(frozen=True)
class Machine:
    """The constants of the model, each with its origin."""

    device_gb_s: float = _constant("GB/s", "hardware.py", origin="vendor")
    pcie_gb_s: float = _constant("GB/s", "hardware.py", origin="vendor")
    host_gb_s: float = _constant("GB/s", "two channels of DDR5-5600: 2 · 8 bytes · 5.6e9/s", 89.6)
    device_efficiency: float = _constant(
        "share", "the target of the decode kernels (docs/kernels.md)", 0.75
    )
    pcie_efficiency: float = _constant(
        "share",
        "about half of what pinned copies reach: ours start in a memory map, which is not pinned",
        0.4,
    )
    host_efficiency: float = _constant("share", "of the DIMMs' figure, for streaming reads", 0.7)
    launches_per_layer: float = _constant(
        "kernels", "in the compiled program (scripts/dev/count_launches.py)", 60.0, "counted"
    )
    launch_us: float = _constant("us", "of one small kernel within a program", 3.0)
    waits_per_layer: float = _constant(
        "waits", "in the compiled program: three conditionals and the loop's end", 4.0, "counted"
    )
    wait_us: float = _constant("us", "a number to the host, and the next kernel's launch", 8.0)
    token_us: float = _constant("us", "entering the program and reading its report", 150.0)
    selection_us: float = _constant(
        "us",
        "telling a policy of one use, in Python: the 35 us that a layer of the null-compute "
        "model took in all (WORKSPACE.md), shared by 8",
        4.0,
    )
    exit_us: float = _constant(
        "us",
        "a third of what two loaded cores took on a null-compute model: 1,183 us a layer with "
        "misses against 35 without (WORKSPACE.md); a desktop's core is faster",
        400.0,
    )
    copies_per_expert: float = _constant(
        "copies", "gate, up and down (cache/pool.py)", 3.0, "specification"
    )
    copy_latency_us: float = _constant("us", "of one copy, beside its bytes", 10.0)
    handover_us: float = _constant(
        "us", "activations to the CPU, its threads' start, and the result back, a layer", 100.0
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            if name.endswith(("gb_s", "efficiency")) and not value > 0:
                raise ValueError(f"{name} is {value}; want more than 0")
            if value < 0 or (name.endswith("efficiency") and value > 1):
                raise ValueError(f"{name} is {value}; out of its range")


OURS, COMPILED = "hobbit_jax", "compiled"
# What differs in an engine of compiled code: copies from pinned memory, exits that are waits for an
# event on a stream, policies that are no Python, kernels written for the model. Assumed, after a
# referee of this model and before it was held against any report; nothing was changed since.
ENGINES: dict[str, dict[str, float]] = {
    OURS: {},
    COMPILED: {
        "pcie_efficiency": 0.8,
        "exit_us": 100.0,
        "selection_us": 0.5,
        "launches_per_layer": 30.0,
        "waits_per_layer": 0.0,
    },
}


def by_engine(machine: Machine) -> dict[str, Machine]:
    """The machine with the constants of each engine."""
    return {engine: replace(machine, **constants) for engine, constants in ENGINES.items()}


def measured(
    machines: Mapping[str, Machine], found: Bandwidths, gpu: GPU, format: str, piece_bytes: float
) -> dict[str, Machine]:
    """The machines, by engine, with bandwidths as `scripts/bench_bandwidth.py` found them.

    Ours copies pieces of `piece_bytes` from mapped memory, a compiled engine from pinned memory.
    `format` is that of most expert bytes.

    Raises:
        ValueError: the bandwidths are of another device, or not of this format.
    """
    # By figures only, a GPU has no name that could be compared.
    if gpu.vram_gib is not None and not re.search(
        rf"\b{re.escape(gpu.name)}(?!\w| Ti| SUPER| Laptop| D\b)", found.device
    ):
        raise ValueError(
            f"bandwidths of {found.device}, and the plan is for {gpu.name}; measure there "
            "(bench_bandwidth.py)"
        )
    sources: dict[str, Source] = {OURS: "mapped", COMPILED: "pinned"}
    return {
        engine: replace(
            machine, host_gb_s=found.host(format), host_efficiency=1.0,
            pcie_gb_s=found.link(piece_bytes, sources[engine]), pcie_efficiency=1.0,
            copy_latency_us=0.0,
        )
        for engine, machine in machines.items()
    }  # fmt: skip


def link_to_host(machine: Machine) -> float:
    """The link's bandwidth over the rate at which the CPU reads what it computes."""
    link = machine.pcie_gb_s * machine.pcie_efficiency
    return link / (machine.host_gb_s * machine.host_efficiency)


MEASURED = ("host_gb_s", "host_efficiency", "pcie_gb_s", "pcie_efficiency", "copy_latency_us")


@dataclass(frozen=True)
class Traffic:
    """What one token of one sequence costs in bytes and events; all but layers are means."""

    layers: int
    dense_bytes: float
    kv_bytes: float
    expert_bytes: float  # read from the device
    selections: float = 0.0  # of which the host hears
    exits: float = 0.0
    moved_experts: float = 0.0
    moved_bytes: float = 0.0
    host_bytes: float = 0.0  # of experts that the CPU computes
    host_layers: float = 0.0  # in which it does
    at_once: bool = False  # whether it does so while experts are uploaded


@dataclass(frozen=True)
class TokenTime:
    """Milliseconds of one token, part by part."""

    device: float
    launches: float
    host: float
    exits: float
    link: float
    cpu: float

    @property
    def total(self) -> float:
        """Of all parts, none beside another."""
        return sum(vars(self).values())

    @property
    def tokens_per_second(self) -> float:
        """Of one sequence."""
        return 1e3 / self.total


def token_time(traffic: Traffic, machine: Machine) -> TokenTime:
    """Milliseconds of a token, as the module says; of what goes on at once, the excess is shown."""
    read = traffic.dense_bytes + traffic.kv_bytes + traffic.expert_bytes
    bytes_ms = traffic.moved_bytes / (machine.pcie_gb_s * machine.pcie_efficiency * 1e6)
    copies = traffic.moved_experts * machine.copies_per_expert
    link = bytes_ms + copies * machine.copy_latency_us * 1e-3
    cpu = traffic.host_bytes / (machine.host_gb_s * machine.host_efficiency * 1e6)
    launches_us = machine.launches_per_layer * machine.launch_us
    of_layer_us = launches_us + machine.waits_per_layer * machine.wait_us
    return TokenTime(
        device=read / (machine.device_gb_s * machine.device_efficiency * 1e6),
        launches=traffic.layers * of_layer_us * 1e-3,
        host=(machine.token_us + traffic.selections * machine.selection_us) * 1e-3,
        exits=traffic.exits * machine.exit_us * 1e-3,
        link=max(0.0, link - cpu) if traffic.at_once else link,
        cpu=cpu + traffic.host_layers * machine.handover_us * 1e-3,
    )


def describe(machine: Machine, given: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every constant with its value, unit, origin and source; `given` has the sources of those
    that the user gave or measured.
    """
    return [
        {"name": f.name, "value": getattr(machine, f.name), **f.metadata}
        | ({"origin": "given", "source": given[f.name]} if f.name in given else {})
        for f in fields(machine)
    ]
