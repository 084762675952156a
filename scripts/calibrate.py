"""Runs a text through a model and keeps what quantisation, allocation and caching want to know.

    python scripts/calibrate.py --model M.gguf --out C [--text T.txt --windows 48 --context 512]
    python scripts/calibrate.py --model M.gguf --out P --statistics=routing --budget_mib 4
    python scripts/generate.py --model M.gguf --profile P --budget_mib 4 --prompt "def fib(n):"

C is a folder: the text's tokens, how often each expert was chosen and with which router weight, and
the second moments of its inputs, which method ggml weighs errors by. With
`--statistics=routing` there are no moments; that suffices for method gptq, which runs the text
itself, and for --profile. The layers that an interrupted run had finished are not computed again.

The table says what caching can hope for: the entropy of each layer's choice, the share of its most
used quarter, and the hit rate on this text of the best experts that --budget_mib holds, of which
none is ever evicted.
"""

from collections.abc import Mapping

import numpy as np
from absl import flags
from scipy import stats

from hobbit_jax import cli
from hobbit_jax.cache.controller import BankLayout
from hobbit_jax.cache.miss_modes import FETCH
from hobbit_jax.cache.pool_sizing import pool_slots
from hobbit_jax.engine_flags import engine_flags
from hobbit_jax.evals.quality import cut_windows
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.importance.calibration import STATISTICS, calibrate
from hobbit_jax.models.loading import load_model
from hobbit_jax.sweep.texts import MIXED_TEXT, NAMED_TEXTS, calibration_documents
from pallas_kernels.backends import for_quality
from pallas_kernels.reference import Signature

ENGINE = engine_flags("model")
_TEXT = flags.DEFINE_string(
    "text",
    MIXED_TEXT,
    f"UTF-8 text or .jsonl file, or one of {', '.join(NAMED_TEXTS)}, which ship with the package: "
    "source code, generated problems, and as much of either. Several with commas between give as "
    "many characters of each.",
)
_OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
_STATISTICS = flags.DEFINE_enum("statistics", "second_moment", STATISTICS, "Statistics to record.")
_BUDGET_MIB = flags.DEFINE_float(
    "budget_mib", None,
    "Size in MiB of the static cache whose hit rate the table shows; by default a quarter of all "
    "experts.", 0.0, cli.MAX_MIB,
)  # fmt: skip
_WINDOWS = flags.DEFINE_integer(
    "windows", None, "Windows to draw from the text; by default 48, or as many as it has.", 1
)
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Tokens of a window; by default 512, or the model's context if shorter.", 1
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draw.", 0)
_DEFAULT_WINDOWS, _DEFAULT_CONTEXT = 48, 512


def static_hits_L(
    uses_LE: np.ndarray, store: HostExperts, slots: Mapping[Signature, int]
) -> np.ndarray:
    """Share (0-1) of each layer's uses that the most used native experts serve, [L].

    They are chosen once, on the same text: what no static cache of these slots can better.
    """
    hits_L = np.zeros(len(uses_LE))
    bank_L = [store.layer(NATIVE, layer).signature for layer in range(len(uses_LE))]
    for signature, n_slots in slots.items():
        layers = np.array([layer for layer, bank in enumerate(bank_L) if bank == signature], int)
        hottest = np.argsort(-uses_LE[layers].ravel(), kind="stable")[:n_slots]
        rows, experts = np.unravel_index(hottest, uses_LE[layers].shape)
        np.add.at(hits_L, layers[rows], uses_LE[layers[rows], experts])
    return hits_L / np.maximum(uses_LE.sum(axis=1), 1)


def table(uses_LE: np.ndarray, store: HostExperts, slots: Mapping[Signature, int]) -> str:
    """One line a layer, and their mean: bits, share of the most used quarter, `static_hits_L`."""
    ordered_LE = np.sort(uses_LE, axis=1)[:, ::-1]
    quarter = round(0.25 * uses_LE.shape[1])
    columns = [
        stats.entropy(np.maximum(uses_LE, 1e-12), base=2, axis=1),
        ordered_LE[:, :quarter].sum(axis=1) / np.maximum(uses_LE.sum(axis=1), 1),
        static_hits_L(uses_LE, store, slots),
    ]
    names = [*map(str, range(len(uses_LE))), "mean"]
    figures = [*zip(*columns, strict=True), [column.mean() for column in columns]]
    lines = ["layer  entropy (bits)  top quarter  static hit rate"]
    for name, (entropy, share, hits) in zip(names, figures, strict=True):
        lines.append(f"{name:>5}  {entropy:14.2f}  {share:11.3f}  {hits:15.3f}")
    return "\n".join(lines)


def main(_):
    out = cli.output_folder("out", str(_OUT.value))
    try:
        documents = calibration_documents(str(_TEXT.value))
    except ValueError as error:
        raise ValueError(f"--text: {error}") from error
    model = load_model(ENGINE().path, for_quality(None))
    store = HostExperts(model.config, model.file)
    native_bytes = store.precision_bytes(NATIVE)
    budget_bytes = native_bytes // 4
    if _BUDGET_MIB.value is not None:
        budget_bytes = int(_BUDGET_MIB.value * 2**20)
    shares_pLE = uniform_plan(store).shares_pLE(store.shape_pLE)
    slots, _ = pool_slots(shares_pLE, FETCH, BankLayout.of_store(store), budget_bytes, 0.0)
    wanted = _WINDOWS.value or _DEFAULT_WINDOWS
    context = _CONTEXT.value or min(_DEFAULT_CONTEXT, model.config.context_length)
    windows = cut_windows(
        model.tokenizer(), documents, wanted, context, _SEED.value, fewer=_WINDOWS.value is None
    )
    if (count := len(windows.ids_WS)) < wanted:
        print(f"the text has {count} windows of {context} + 1 tokens; all of them are used")
    found = calibrate(model, windows, _STATISTICS.value, out)
    rarest, most = found.selections_LE.min(), found.selections_LE.max()
    print(f"{windows.targets} tokens; an expert saw {rarest} to {most} of them")
    print(f"{sum(slots.values())} experts in {budget_bytes / 2**20:g} MiB")
    print(table(found.selections_LE, store, slots))
    print(f"next: python scripts/quantize.py --calibration {out} --method gptq …")


if __name__ == "__main__":
    cli.run(main)
