"""Which implementation runs here: the rule that every op of this room follows.

An implementation asked for by name runs or says why it cannot; only None chooses.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

IMPLEMENTATIONS = ("xla", "triton", "interpret")
Implementation = str | None


def choose(implementation: Implementation, check_supported: Callable[[], None]) -> str:
    """The implementation to run.

    Args:
        implementation: one of `IMPLEMENTATIONS`, or None for the fastest that covers the case.
        check_supported: raises NotImplementedError where the Triton kernels do not.

    Raises:
        ValueError: no such implementation, or none for this process's device.
        NotImplementedError: from `check_supported`.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation is {implementation!r}; want one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "xla":
        return "xla"
    device = jax.devices()[0]
    on_nvidia = device.platform == "gpu" and "nvidia" in device.device_kind.lower()
    if implementation == "triton" and not on_nvidia:
        raise ValueError(
            f"implementation 'triton' needs an NVIDIA GPU, and this process has "
            f"{device.device_kind}; take 'xla', or 'interpret' to test the kernels"
        )
    if implementation is None:
        if not on_nvidia:
            return "xla"
        try:
            check_supported()
        except NotImplementedError:
            return "xla"
        return "triton"
    check_supported()
    return implementation
