"""Writes a model with all its experts at a lower precision; llama.cpp opens the result too.

    python scripts/quantize.py --model M.gguf --format Q2_K --out low.gguf
    python scripts/quantize.py --model M.gguf --format Q2_K --method gptq --calibration C \\
        --out low.gguf

Method rtn needs no calibration, importance one with second moments, gptq one with Hessians
(`scripts/calibrate.py`). An interrupted run goes on where it was when started again.
"""

from pathlib import Path

from absl import flags

from hobbit_jax import cli, reference
from hobbit_jax.experts.tiers import TierSpec, write_tier
from hobbit_jax.model_file.architecture import read_config
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.quantize import FORMATS
from hobbit_jax.quantize.methods import METHODS
from hobbit_jax.signals.calibration import Calibration

_MODEL = flags.DEFINE_string("model", None, "GGUF file; the shipped reference model by default")
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "of the experts", required=True)
_METHOD = flags.DEFINE_enum("method", "rtn", METHODS, "how they are encoded")
_CALIBRATION = flags.DEFINE_string("calibration", None, "folder of scripts/calibrate.py")
_OUT = flags.DEFINE_string("out", None, "GGUF file to write", required=True)


def main(_):
    source = open_gguf(_MODEL.value or reference.model_path())
    config = read_config(source)
    calibration = (
        Calibration.load(Path(_CALIBRATION.value), source.sha256()) if _CALIBRATION.value else None
    )
    path = Path(_OUT.value)
    if path.exists():
        raise ValueError(f"{path} exists; remove it or give another --out")
    write_tier(source, config, TierSpec(_FORMAT.value, _METHOD.value, calibration), path)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run(main)
