"""Writes a model with all its experts at a lower precision; llama.cpp opens --out too.

    python scripts/quantize.py --model M.gguf --format Q2_K
    python scripts/quantize.py --model M.gguf --format Q2_K --method gptq --calibration C \\
        --out low.gguf

Method ggml is llama.cpp's encoder and writes every type that ggml has; a calibration, which
`scripts/calibrate.py` makes, improves it as an importance matrix does, and some types demand one.
Method gptq writes K-quants. It needs a calibration and runs its text once more, layer by layer, by
the weights that it has encoded so far and natively beside. Without --out the file is kept in
--cache_dir, where sweeps and `--low_format` look for it too; rows that are no whole number of
blocks are then filled up, where --out has another type for them, as llama.cpp does. An interrupted
run goes on where it was.
"""

import sys

from absl import flags

from hobbit_jax import cli
from hobbit_jax.atomic import exclusive
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.engine_flags import engine_flags
from hobbit_jax.experts.low_precision import (
    MATRICES,
    LowPrecisionSpec,
    open_low_precision,
    write_low_precision,
)
from hobbit_jax.importance.calibration import Calibration, CalibrationText
from hobbit_jax.importance.layer_inputs import run_by
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.loading import load_model
from hobbit_jax.models.registry import read_config
from hobbit_jax.quantize.methods import METHODS, rarely_seen
from pallas_kernels.backends import for_quality
from pallas_kernels.formats import FORMATS

ENGINE = engine_flags("model")
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Format of the experts.", required=True)
_METHOD = flags.DEFINE_enum("method", METHODS[0], METHODS, "How experts are encoded.")
_ROLES = flags.DEFINE_multi_enum(
    "roles", [], list(MATRICES), "Matrix of an expert to encode; the others stay as they are. May "
    "be given several times; by default all are encoded.",
)  # fmt: skip
_CALIBRATION = flags.DEFINE_string("calibration", None, "Folder that scripts/calibrate.py wrote.")
_OUT = flags.DEFINE_string("out", None, "GGUF file to write; by default one in --cache_dir.")


def main(_):
    path = cli.output_file("out", _OUT.value) if _OUT.value else None
    if path is not None and path.exists():
        raise ValueError(f"{path} exists; remove it or give another --out")
    model_path = ENGINE().path
    source = open_gguf(model_path)
    config = read_config(source)
    calibration, run_text = None, None
    if _CALIBRATION.value:
        folder = cli.input_folder("calibration", _CALIBRATION.value)
        calibration = found = Calibration.load(folder, source)
        for line in rarely_seen(found.selections_LE):
            print(f"warning: {line}", file=sys.stderr)
        if _METHOD.value == "gptq":
            calibration = CalibrationText(found.model_sha256, found.windows)
            run_text = run_by(load_model(model_path, for_quality(None)), found.windows)
    spec = LowPrecisionSpec(
        _FORMAT.value, _METHOD.value, calibration, roles=tuple(sorted(set(_ROLES.value)))
    )
    if path is None:
        path = open_low_precision(source, config, spec, low_precision_folder(), run_text).paths[0]
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path):  # a second process would write into the first one's unfinished parts
            write_low_precision(source, config, spec, path, run_text)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run(main)
