"""Machine code for GPUs that are not there: XLA's CUDA compiler without a driver or a device.

Owns the descriptions of the GPUs that kernels are compiled for, and the reading of what ptxas says
about them. Needs JAX's CUDA plugin of the same version as jaxlib, and `ptxas` and `nvdisasm` on
PATH; `make kernels` installs them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)


@dataclass(frozen=True)
class Target:
    """What the compiler must know of a GPU; sizes from NVIDIA's CUDA programming guide."""

    name: str
    major: int
    minor: int
    cores: int
    shared_bytes: int  # per block, with the opt-in
    core_shared_bytes: int
    core_threads: int
    l2_bytes: int
    memory_gb_s: int
    memory_gib: int

    @property
    def architecture(self) -> str:
        """As ptxas calls it; Hopper's and Blackwell's own instructions need the suffix."""
        return f"sm_{self.major}{self.minor}" + ("a" if self.major >= 9 else "")

    def description(self) -> str:
        """XLA's GpuTargetConfig, as text."""
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared_bytes}
  shared_memory_per_core: {self.core_shared_bytes} threads_per_core_limit: {self.core_threads}
  core_count: {self.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_gb_s}000000000 l2_cache_size: {self.l2_bytes} clock_rate_ghz: 1.7
  device_memory_size: {self.memory_gib << 30}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {self.major} minor: {self.minor} }}
}}
platform_name: "CUDA"
"""


_KIB = 1024
TARGETS = {
    target.architecture.rstrip("a"): target
    for target in (
        Target("A100", 8, 0, 108, 163 * _KIB, 164 * _KIB, 2048, 40 << 20, 1555, 40),
        Target("RTX 3060", 8, 6, 28, 99 * _KIB, 100 * _KIB, 1536, 3 << 20, 360, 12),
        Target("RTX 4070", 8, 9, 46, 99 * _KIB, 100 * _KIB, 1536, 36 << 20, 504, 12),
        Target("H200", 9, 0, 132, 227 * _KIB, 228 * _KIB, 2048, 50 << 20, 4800, 141),
        Target("B200", 10, 0, 148, 227 * _KIB, 228 * _KIB, 2048, 126 << 20, 8000, 180),
        Target("RTX 5070", 12, 0, 48, 99 * _KIB, 100 * _KIB, 1536, 48 << 20, 672, 12),
    )
}


@dataclass(frozen=True)
class KernelResources:
    """What ptxas says of one kernel."""

    name: str
    registers: int
    spill_bytes: int
    static_shared_bytes: int
    loop_instructions: int | None  # of a thread in the main loop; None where there is no loop left


def check_toolchain() -> str:
    """The version of ptxas.

    Raises:
        RuntimeError: ptxas or the plugin is missing; says what to run.
    """
    advice = "run `make kernels`, which installs what it needs"
    for tool in ("ptxas", "nvdisasm"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"no {tool} on PATH; {advice}")
    try:
        _topology(TARGETS["sm_80"])
    except Exception as error:
        raise RuntimeError(f"JAX's CUDA compiler does not start ({error}); {advice}") from error
    version = subprocess.run(["ptxas", "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"V[\d.]+", version.stdout)
    return match.group() if match else version.stdout.strip()


def _topology(target: Target):
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="1x1x1",
        topology="1x1x1",
        target_config=target.description(),
    )


def compile_for(target: Target, function: Callable[..., Any], *args: Any) -> str:
    """Compiles `function` of abstract arguments for a GPU that need not be there.

    Returns:
        The PTX of its kernels.

    Raises:
        Exception: from the compiler, which rejects what the GPU cannot run.
    """
    mesh = Mesh(np.array(_topology(target).devices).reshape(1), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    with tempfile.TemporaryDirectory() as folder:
        device = AbstractDevice(f"NVIDIA {target.name}", num_cores=None, platform="gpu")
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            lowered = jax.jit(function, in_shardings=sharding).lower(*abstract)
        lowered.compile({"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"})
        return "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))


def _loop_instructions(assembly: str) -> dict[str, int | None]:
    """Instructions of each kernel's longest loop: from a backward branch to its target."""
    counts: dict[str, int | None] = {}
    for function in re.split(r"\n\s*\.section\s+\.text\.", assembly)[1:]:
        name = function.split(",", 1)[0].strip()
        waiting: list[str] = []
        position: dict[str, int] = {}
        number, longest = 0, None
        for line in function.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                waiting.append(label.group(1))
            if re.search(r"/\*[0-9a-f]{4,5}\*/", line):
                position |= dict.fromkeys(waiting, number)
                waiting.clear()
                branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
                if branch and branch.group(1) in position:
                    length = number - position[branch.group(1)] + 1
                    # A kernel ends in a branch to itself.
                    longest = max(longest or 0, length) if length > 1 else longest
                number += 1
        counts[name] = longest
    return counts


def resources(target: Target, ptx: str) -> list[KernelResources]:
    """Registers, spills, shared memory and loop length of the kernels `matmul_*` in `ptx`.

    Raises:
        RuntimeError: ptxas rejects the code; with what it said.
    """
    kernels: dict[str, KernelResources] = {}
    # Each module of a dump starts with its version; ptxas takes one at a time.
    for module in re.split(r"(?=^\.version)", ptx, flags=re.MULTILINE):
        if not re.search(r"\.entry matmul_", module):
            continue
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            source.write_text(module)
            command = ["ptxas", "-v", f"-arch={target.architecture}", source, "-o", binary]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"ptxas for {target.architecture}: {result.stderr[:400]}")
            listing = subprocess.run(
                ["nvdisasm", "-c", binary], capture_output=True, text=True, check=True
            )
        loops = _loop_instructions(listing.stdout)
        for name, text in re.findall(
            r"entry function '(matmul_\w+)'(.*?Used .*?)\n", result.stderr, re.DOTALL
        ):
            spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
            shared = re.search(r"(\d+) bytes smem", text)
            registers = re.search(r"Used (\d+) registers", text)
            assert registers is not None
            kernels[name] = KernelResources(
                name,
                int(registers.group(1)),
                sum(map(int, spills)),
                int(shared.group(1)) if shared else 0,
                loops.get(name),
            )
    return list(kernels.values())
