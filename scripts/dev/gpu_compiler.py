"""XLA's CUDA compiler for GPUs that are not here.

Owns what the compiler must know of a GPU, and a compilation of a function of abstract arguments. It
needs neither driver nor device, but JAX's CUDA plugin of jaxlib's version, and `ptxas` and
`nvdisasm` on PATH; `make kernels` installs all three beside .venv.
"""

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
from jax import sharding
from jax.experimental import topologies


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
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=target.description()
    )


def compile_for(target: Target, function: Callable[..., Any], *args: Any) -> tuple[str, str]:
    """Compiles `function` of abstract arguments for a GPU that need not be there.

    Returns:
        The PTX of its kernels, and the program after XLA's optimisations, in its text form.

    Raises:
        Exception: from the compiler, which rejects what the GPU cannot run.
    """
    mesh = sharding.Mesh(np.array(_topology(target).devices).reshape(1), ("x",))
    whole = sharding.NamedSharding(mesh, sharding.PartitionSpec())
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    with tempfile.TemporaryDirectory() as folder:
        device = sharding.AbstractDevice(f"NVIDIA {target.name}", num_cores=None, platform="gpu")
        with sharding.use_abstract_mesh(sharding.AbstractMesh((), (), abstract_device=device)):
            lowered = jax.jit(function, in_shardings=whole).lower(*abstract)
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"})
        ptx = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))
    return ptx, compiled.as_text() or ""
