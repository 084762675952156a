"""The one folder for what is made once and used by every script.

Owns where it is (`--cache_dir`, or else `$HOBBIT_CACHE_DIR`, or else `~/.cache/hobbit_jax`) and its
two parts: low-precision copies of models, whose files are named by content and recipe
(`experts/low_precision.py`), and compiled programs, which are JAX's. Any file may be deleted at any
time.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax
from absl import flags

from pallas_kernels.ggml.library import processor_flags

VARIABLE = "HOBBIT_CACHE_DIR"
_COMPILED_BYTES = 2**30  # JAX then deletes what was not used for longest
_LEAST_COMPILE_S = 0.2

_CACHE_DIR = flags.DEFINE_string(
    "cache_dir",
    None,
    "Folder for low-precision copies of models and for compiled programs, which are made once; by "
    f"default ${VARIABLE}, or ~/.cache/hobbit_jax.",
)


def folder() -> Path:
    """The folder; it need not exist yet."""
    given = _CACHE_DIR.value if flags.FLAGS.is_parsed() else None
    given = given or os.environ.get(VARIABLE)
    return (Path(given) if given else Path.home() / ".cache" / "hobbit_jax").absolute()


def low_precision_folder() -> Path:
    """Where low-precision copies are kept; it need not exist yet."""
    return folder() / "low_precision"


def keep_compiled_programs() -> None:
    """Has JAX look for compiled programs here, and keep those that it compiles.

    A user's own folder ($JAX_COMPILATION_CACHE_DIR) stays. Each kind of processor has a folder of
    its own, since machine code of another may end the process.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore
        return
    kind = " ".join([platform.machine(), platform.processor(), *sorted(processor_flags())])
    digest = hashlib.sha256(kind.encode()).hexdigest()[:8]
    jax.config.update("jax_compilation_cache_dir", str(folder() / "compiled" / digest))
    jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_COMPILE_S)


def export() -> None:
    """Makes the processes that this one starts use the same folder."""
    os.environ[VARIABLE] = str(folder())
