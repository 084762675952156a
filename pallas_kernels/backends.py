"""Which implementation runs here: the rule that every op of this room follows.

An implementation asked for by name runs or says why it cannot; only None chooses.
"""

import functools
import logging
from collections.abc import Callable, Mapping

import jax

from pallas_kernels.ggml.ops import check_available

IMPLEMENTATIONS = ("xla", "ggml", "ggml_f32", "triton", "interpret")
KERNELS = ("triton", "interpret")  # compiled for a GPU, or run by Pallas's interpreter
Implementation = str | None


def choose(
    implementation: Implementation,
    checks: Mapping[str, Callable[[], None]],
    platform: str | None = None,
) -> str:
    """The implementation to run.

    Args:
        implementation: one of `IMPLEMENTATIONS`, or None for the fastest that covers the case:
            "triton" on an NVIDIA GPU, "ggml" on a CPU, "xla" elsewhere. Where these two do not
            cover it, "xla" is taken and that is logged.
        checks: of all but "xla" and "interpret": each raises NotImplementedError where it does not
            cover the case.
        platform: where it runs; None is this process's device.

    Raises:
        ValueError: no such implementation, or none for this process's device.
        NotImplementedError: from the check of the one asked for.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation is {implementation!r}; want one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "xla":
        return "xla"
    device = jax.devices(platform)[0]
    on_nvidia = device.platform == "gpu" and "nvidia" in device.device_kind.lower()
    if implementation == "triton" and not on_nvidia:
        raise ValueError(
            f"implementation 'triton' needs an NVIDIA GPU, and this process has "
            f"{device.device_kind}; take 'xla', or 'interpret' to test the kernels"
        )
    if implementation is not None:
        checks["triton" if implementation == "interpret" else implementation]()
        return implementation
    fastest = "triton" if on_nvidia else "ggml" if device.platform == "cpu" else "xla"
    try:
        checks.get(fastest, lambda: None)()
    except NotImplementedError as error:
        _say_once(f"slower matrix products of 'xla' are used: {error}")
        return "xla"
    return fastest


def for_quality(implementation: Implementation) -> Implementation:
    """What quality, routing and calibration are measured with where none is named.

    On a CPU that is "ggml_f32", or "xla" where ggml cannot run: they compute in float32, as Hugging
    Face does. "ggml" rounds activations to 8 bits, whose KL on a small model is as large as that of
    some precision plans (docs/log/2026-11-29-cpu-backend.md).
    """
    if implementation is not None or jax.devices()[0].platform != "cpu":
        return implementation
    try:
        check_available()
    except NotImplementedError as error:
        _say_once(f"slower matrix products of 'xla' are used: {error}")
        return "xla"
    return "ggml_f32"


@functools.cache
def _say_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)
