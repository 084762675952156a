"""The one folder for what is made once and used by every script: low-precision copies of models.

Owns where it is: `--cache_dir`, or else `$HOBBIT_CACHE_DIR`, or else `~/.cache/hobbit_jax`. Files
in it are named by content and recipe (`experts/low_precision.py`), so any may be deleted at any
time.
"""

from __future__ import annotations

import os
from pathlib import Path

from absl import flags

VARIABLE = "HOBBIT_CACHE_DIR"

_CACHE_DIR = flags.DEFINE_string(
    "cache_dir",
    None,
    f"Folder for low-precision copies of models, which are made once; by default ${VARIABLE}, or "
    "~/.cache/hobbit_jax.",
)


def low_precision_folder() -> Path:
    """Where low-precision copies are kept; it need not exist yet."""
    given = _CACHE_DIR.value if flags.FLAGS.is_parsed() else None
    given = given or os.environ.get(VARIABLE)
    root = Path(given) if given else Path.home() / ".cache" / "hobbit_jax"
    return root.absolute() / "low_precision"


def export() -> None:
    """Makes the processes that this one starts use the same folder."""
    os.environ[VARIABLE] = str(low_precision_folder().parent)
