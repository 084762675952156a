"""Compares our encoders with ggml's in one run: error and speed per type and kind of weights.

    python scripts/dev/bench_encoders.py --out out/encoders.json

Needs ggml (libggml-python). Both use all cores, in turn, call by call; speeds
are medians of --repeats calls and their ratio is the median of the ratios pair by pair. Writes the
figures as JSON and, beside it, as a table in Markdown.
"""

import os
import time

import numpy as np
from absl import flags
from tqdm import tqdm

from hobbit_jax import cli, markdown, reference
from hobbit_jax.atomic import replacing, write_json
from hobbit_jax.experts.low_precision import decode
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.registry import read_config
from hobbit_jax.quantize import encode, ggml
from hobbit_jax.record import machine
from hobbit_jax.reference_model.reparametrise import off_grid_weights

FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q4_0", "Q8_0")
N, K = 4096, 2048

_OUT = flags.DEFINE_string(
    "out", None, "JSON file to write; a .md file goes beside it.", required=True
)
_REPEATS = flags.DEFINE_integer("repeats", 9, "Number of timed pairs of calls.", 3, 10_000)


def data() -> dict[str, np.ndarray]:
    """float32 [N, K]: Gaussian, heavy-tailed, and real ones, experts of the reference model.

    The latter off the grid that they ship on, where encoding again would be all but free.
    """
    rng = np.random.default_rng(0)
    source = open_gguf(reference.model_path())
    weights = dict(off_grid_weights(source, read_config(source)))
    real = np.concatenate([weights[n]().reshape(-1) for n in sorted(weights) if "_exps" in n])
    return {
        "normal": rng.standard_normal((N, K), np.float32),
        "Student-t(3)": rng.standard_t(3, (N, K)).astype(np.float32),
        "reference experts": real[: N * K].reshape(-1, 256),
    }


def weighted_rmse(weights_NK, blocks, format, importance_K) -> float:
    miss_K = ((weights_NK - decode(blocks, format)).astype(np.float64) ** 2).mean(axis=0)
    return float(np.sqrt(np.average(miss_K, weights=importance_K)))


def time_once(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(weights_NK: np.ndarray, format: str, importance_K: np.ndarray | None) -> dict:
    """Errors of both, MB of float32 per second of both, and the ratios ours / ggml's."""
    threads = os.cpu_count() or 1

    def ours():
        return encode(weights_NK, format, importance_K)

    def theirs():
        return ggml.encode(weights_NK, format, importance_K, threads)

    errors = [weighted_rmse(weights_NK, call(), format, importance_K) for call in (ours, theirs)]
    seconds = np.array([(time_once(ours), time_once(theirs)) for _ in range(_REPEATS.value)])
    speeds = weights_NK.nbytes / 1e6 / seconds
    ratios = speeds[:, 0] / speeds[:, 1]
    return {
        "error": errors[0],
        "ggml_error": errors[1],
        "error_ratio": errors[0] / errors[1],
        "mb_s": float(np.median(speeds[:, 0])),
        "ggml_mb_s": float(np.median(speeds[:, 1])),
        "speed_ratio": float(np.median(ratios)),
        "speed_ratio_range": [float(ratios.min()), float(ratios.max())],
    }


def table(rows: list[dict]) -> str:
    head = (
        "type", "weights", "importance", "error", "ggml's", "ratio", "MB/s", "ggml's", "ratio",
    )  # fmt: skip
    lines = markdown.table(
        head,
        [
            (
                r["format"], r["data"], "yes" if r["weighted"] else "no", f"{r['error']:.5f}",
                f"{r['ggml_error']:.5f}", f"{r['error_ratio']:.3f}", f"{r['mb_s']:.0f}",
                f"{r['ggml_mb_s']:.0f}",
                "{:.2f} ({:.2f} to {:.2f})".format(r["speed_ratio"], *r["speed_ratio_range"]),
            )
            for r in rows
        ],
    )  # fmt: skip
    return "\n".join(
        [
            "# Encoders beside ggml's",
            "",
            "Root-mean-square error, weighted where there is an importance, and MB of float32 per "
            f"second with {os.cpu_count()} threads on {machine()['device']}, in turn in "
            "one run (`scripts/dev/bench_encoders.py`). Ratios are ours over ggml's: an error "
            "below 1 and a speed above 1 are better. The range is that of the pairs.",
            "",
            *lines,
            "",
        ]
    )


def main(_):
    out = cli.output_file("out", str(_OUT.value))
    ggml.library()
    rows = []
    importances = (None, np.random.default_rng(1).lognormal(0.0, 1.5, K).astype(np.float32))
    cases = [(f, d, i) for f in FORMATS for d in data().items() for i in importances]
    for format, (name, weights_NK), importance_K in tqdm(cases, disable=None):
        weighted = None if importance_K is None else importance_K[: weights_NK.shape[1]]
        found = measure(weights_NK, format, weighted)
        rows.append({"format": format, "data": name, "weighted": weighted is not None, **found})
    write_json(out, {"machine": machine(), "repeats": _REPEATS.value, "rows": rows})
    with replacing(out.with_suffix(".md")) as partial:
        partial.write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    cli.run(main)
