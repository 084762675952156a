"""Graphics cards by name, and bandwidths as a user states them.

Owns the vendor's figures. Bandwidths are nominal; what of them decode reaches is `cost_model.py`'s.

Source: NVIDIA's specification pages and data sheets of these GPUs (memory size and bandwidth,
PCIe generation and lanes), from memory and not looked up again. A lane of PCIe 3.0, 4.0, 5.0
carries .985, 1.969, 3.938 GB/s a direction after 128b/130b encoding (PCI-SIG).
"""

from dataclasses import dataclass

_LANE_GB_S = {3: 0.985, 4: 1.969, 5: 3.938}


@dataclass(frozen=True)
class GPU:
    """A GPU by its name, or a machine given in figures."""

    name: str  # as its vendor writes it
    vram_gib: float | None  # of device memory; None where figures were given
    device_gb_s: float  # device memory, 1e9 bytes a second
    pcie_gb_s: float  # host to device, 1e9 bytes a second
    origin: str  # where the figures come from


GPUS = {
    name: GPU(
        name, vram_gib, device_gb_s, round(lanes * _LANE_GB_S[generation], 2),
        f"NVIDIA's specification; PCIe {generation}.0 x{lanes} (PCI-SIG)",
    )
    for name, vram_gib, device_gb_s, generation, lanes in (
        ("RTX 2080", 8, 448, 3, 16),
        ("RTX 3060", 12, 360, 4, 16),
        ("RTX 3070", 8, 448, 4, 16),
        ("RTX 3090", 24, 936, 4, 16),
        ("RTX 4060", 8, 272, 4, 8),
        ("RTX 4060 Ti", 16, 288, 4, 8),
        ("RTX 4070", 12, 504, 4, 16),
        ("RTX 4080", 16, 717, 4, 16),
        ("RTX 4090", 24, 1008, 4, 16),
        ("RTX 5060 Ti", 16, 448, 5, 8),
        ("RTX 5070", 12, 672, 5, 16),
        ("RTX 5080", 16, 960, 5, 16),
        ("RTX 5090", 32, 1792, 5, 16),
        ("A100", 40, 1555, 4, 16),
        ("H200", 131, 4800, 5, 16),
    )
}  # fmt: skip


def find_gpu(text: str) -> GPU:
    """A GPU by its name (case and blanks do not matter), or "device GB/s,PCIe GB/s" as one.

    Raises:
        ValueError: neither; lists the GPUs that are known.
    """

    def plain(name: str) -> str:
        return "".join(name.lower().split()).removeprefix("nvidia").removeprefix("geforce")

    for gpu in GPUS.values():
        if plain(gpu.name) == plain(text):
            return gpu
    try:
        device_gb_s, pcie_gb_s = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"gpu is {text!r}; want figures 'device GB/s,PCIe GB/s' such as 504,31.5, or one of "
            f"{', '.join(GPUS)}"
        ) from None
    if not (device_gb_s > 0 and pcie_gb_s > 0):
        raise ValueError(f"gpu is {text!r}; want two positive bandwidths in GB/s")
    name = f"{device_gb_s:g} GB/s, PCIe {pcie_gb_s:g} GB/s"
    return GPU(name, None, device_gb_s, pcie_gb_s, "given on the command line")
