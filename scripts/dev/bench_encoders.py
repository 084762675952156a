"""Compares our encoders with ggml's in one run: error and speed per type and kind of weights.

    python scripts/dev/bench_encoders.py --workdir out/encoders

Both use all cores, in turn, call by call; speeds are medians of --repeats calls, and their ratio is
the median of the ratios pair by pair. Writes a record a case and prints the table of
docs/encoders.md.
"""

import time

import numpy as np
from absl import flags
from tqdm import tqdm

from hobbit_jax import cli, reference
from hobbit_jax.experts.low_precision import decode
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.registry import read_config
from hobbit_jax.quantize import encode, ggml
from hobbit_jax.record import Benchmark, Record, machine, measured, write_record
from hobbit_jax.reference_model.reparametrise import off_grid_weights
from hobbit_jax.report.table import Column, table
from hobbit_jax.statistics import spread

FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q4_0", "Q8_0")
STUDY, N, K = "encoders", 4096, 2048
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the records.", required=True)
_REPEATS = flags.DEFINE_integer("repeats", 9, "Number of timed pairs of calls.", 3, 10_000)
_COLUMNS = (
    Column("type", lambda r: r.asked.setting["format"]),
    Column("weights", lambda r: r.asked.setting["data"]),
    Column("importance", lambda r: "yes" if r.asked.setting["weighted"] else "no"),
    Column("error", "error", ".5f"),
    Column("ggml's", "ggml_error", ".5f"),
    Column("ratio", "error_ratio", ".3f"),
    Column("MB/s", "mb_s", ".0f"),
    Column("ggml's", "ggml_mb_s", ".0f"),
    Column("ratio", "speed_ratio", ".2f", interval=True),
)


def data() -> dict[str, np.ndarray]:
    """float32 [N, K]: Gaussian, heavy-tailed, and real ones, experts of the reference model.

    The latter off the grid that they ship on, where encoding again would be all but free.
    """
    rng = np.random.default_rng(0)
    source = open_gguf(reference.model_path())
    weights = off_grid_weights(source, read_config(source))
    real = np.concatenate([weights[n]().reshape(-1) for n in sorted(weights) if "_exps" in n])
    return {
        "normal": rng.standard_normal((N, K), np.float32),
        "Student-t(3)": rng.standard_t(3, (N, K)).astype(np.float32),
        "reference experts": real[: N * K].reshape(-1, 256),
    }


def weighted_rmse(weights_NK, blocks, format, importance_K) -> float:
    miss_K = ((weights_NK - decode(blocks, format)).astype(np.float64) ** 2).mean(axis=0)
    return float(np.sqrt(np.average(miss_K, weights=importance_K)))


def measure(weights_NK: np.ndarray, format: str, importance_K: np.ndarray | None) -> dict:
    """Errors of both, MB of float32 per second of both, and the ratios ours / ggml's."""
    calls = (
        lambda: encode(weights_NK, format, importance_K),
        lambda: ggml.encode(weights_NK, format, importance_K),
    )
    errors = [weighted_rmse(weights_NK, call(), format, importance_K) for call in calls]
    speeds = np.zeros((_REPEATS.value, 2))
    for repeat, call in np.ndindex(speeds.shape):
        began = time.perf_counter()
        calls[call]()
        speeds[repeat, call] = weights_NK.nbytes / 1e6 / (time.perf_counter() - began)
    return {
        "error": errors[0],
        "ggml_error": errors[1],
        "error_ratio": errors[0] / errors[1],
        "mb_s": float(np.median(speeds[:, 0])),
        "ggml_mb_s": float(np.median(speeds[:, 1])),
        "speed_ratio": spread(speeds[:, 0] / speeds[:, 1]),
    }


def main(_):
    workdir = cli.output_folder("workdir", str(_WORKDIR.value))
    importances = (None, np.random.default_rng(1).lognormal(0.0, 1.5, K).astype(np.float32))
    cases = [(f, d, i) for f in FORMATS for d in data().items() for i in importances]
    records = []
    for format, (name, weights_NK), importance_K in tqdm(cases, disable=None):
        weighted = None if importance_K is None else importance_K[: weights_NK.shape[1]]
        setting = {"format": format, "data": name, "weighted": weighted is not None}
        found = measured(measure(weights_NK, format, weighted))
        asked = Benchmark(STUDY, {**setting, "repeats": _REPEATS.value})
        records.append(Record(STUDY, asked, **vars(found), **machine()))
        write_record(workdir, records[-1])
    print(table(_COLUMNS, records))


if __name__ == "__main__":
    cli.run(main)
