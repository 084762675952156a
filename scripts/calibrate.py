"""Runs a text through a model and keeps what quantisation and allocation want to know of it.

    python scripts/calibrate.py --model M.gguf --text T.txt --out C [--windows 48 --context 512]

C is a folder (Orbax): how often each expert was chosen and with which router weight, and the
second moments of its inputs. `--statistics=second_moment` keeps their diagonals only (method
importance), `--statistics=routing` nothing but the counts. Without --model and --text the
reference model and its calibration text are used.
"""

from pathlib import Path

from absl import flags

from hobbit_jax import cli, reference
from hobbit_jax.evals.quality import cut_windows
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import load_model
from hobbit_jax.signals.calibration import DEFAULT_LIMIT_BYTES, STATISTICS, calibrate

_MODEL = flags.DEFINE_string("model", None, "GGUF file; the shipped reference model by default")
_TEXT = flags.DEFINE_string("text", None, "UTF-8 text; the reference's calibration text by default")
_OUT = flags.DEFINE_string("out", None, "folder to write", required=True)
_STATISTICS = flags.DEFINE_enum("statistics", "hessian", STATISTICS, "what to keep")
_WINDOWS = flags.DEFINE_integer("windows", 48, "windows to draw from the text", 1)
_CONTEXT = flags.DEFINE_integer("context", 512, "tokens of a window", 1)
_SEED = flags.DEFINE_integer("seed", 0, "of the draw")
_LIMIT_GIB = flags.DEFINE_float("limit_gib", DEFAULT_LIMIT_BYTES / 2**30, "most for moments", 0.0)


def main(_):
    model = load_model(_MODEL.value or reference.model_path())
    texts = (
        [Path(_TEXT.value).read_text(encoding="utf-8")]
        if _TEXT.value
        else reference.held_out_texts("calibration")
    )
    windows = cut_windows(model.tokenizer(), texts, _WINDOWS.value, _CONTEXT.value, _SEED.value)
    engine = Engine(model, HostExperts(model.config, model.file))
    limit_bytes = int(_LIMIT_GIB.value * 2**30)
    found = calibrate(engine, windows, _STATISTICS.value, limit_bytes)
    found.save(Path(_OUT.value))
    rarest = int(found.selections_LE.min())
    print(f"{found.tokens} tokens; an expert saw {rarest} to {found.selections_LE.max()} of them")
    print(f"next: python scripts/quantize.py --calibration {_OUT.value} --method gptq …")


if __name__ == "__main__":
    cli.run(main)
