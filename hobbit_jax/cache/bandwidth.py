"""What a machine's memory and its link to the device carry, as `scripts/bench_bandwidth.py` found.

Owns the file of measured bandwidths, which belong to one device and one CPU.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hobbit_jax.atomic import write_text
from hobbit_jax.record.typed_json import typed

Source = Literal["mapped", "pinned"]
_BOTH = {"host", "link"}


@dataclass(frozen=True)
class Bandwidths:
    """Rates in 1e9 bytes a second."""

    device: str  # as a record names it
    cpu: str  # its host's processor, and how many of them
    # Of expert products on the CPU that read a mapped bank, by format and threads.
    host_gb_s: Mapping[str, Mapping[str, float]]
    # Of copies to the device, by the memory that they start in and bytes of a piece.
    link_gb_s: Mapping[str, Mapping[str, float]]
    at_once: Mapping[str, float]  # what is left (0-1) of "host" and "link" while both work

    def host(self, format: str) -> float:
        """Of products in a format, with as many threads as are best; ValueError without any."""
        if format not in self.host_gb_s:
            raise ValueError(
                f"no bandwidth of {format} was measured; there are {', '.join(self.host_gb_s)} "
                "(bench_bandwidth.py --formats)"
            )
        return max(self.host_gb_s[format].values())

    def link(self, piece_bytes: float, source: Source = "mapped") -> float:
        """Of copies in pieces of about this size; the device may have no pinned memory."""
        rates = self.link_gb_s.get(source) or self.link_gb_s["mapped"]
        return rates[min(rates, key=lambda size: abs(math.log(float(size) / piece_bytes)))]

    def link_to_host(self, format: str, piece_bytes: float) -> float:
        """The link's rate over the host's while both work: bytes to fetch of missed ones, over
        those to compute, so that both end together."""
        link = self.link(piece_bytes) * self.at_once["link"]
        return link / (self.host(format) * self.at_once["host"])

    def check_here(self, device: str, cpu: str) -> None:
        """Refuses the rates of another machine by a ValueError."""
        if (device, cpu) != (self.device, self.cpu):
            raise ValueError(
                f"bandwidths of {self.device} with {self.cpu}, and this is {device} with {cpu}; "
                "measure here (bench_bandwidth.py)"
            )

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def read_bandwidths(path: Path) -> Bandwidths:
    """Reads what `Bandwidths.write` wrote.

    Raises:
        ValueError: it is no such file, or a rate is no positive number.
    """
    try:
        found: Bandwidths = typed(json.loads(path.read_text(encoding="utf-8")), Bandwidths, "it")
        tables = [*found.host_gb_s.values(), *found.link_gb_s.values(), found.at_once]
        rates = [rate for table in tables for rate in table.values()]
        whole = found.host_gb_s and found.link_gb_s.get("mapped") and {*found.at_once} == _BOTH
        if not whole or not all(0 < rate < math.inf for rate in rates):
            raise ValueError(f"rates are {rates}; want positive numbers of GB/s of host and link")
    except ValueError as error:
        raise ValueError(
            f"{path}: no file of bandwidths ({error}); make one with bench_bandwidth.py"
        ) from None
    return found
