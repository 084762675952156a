"""Continues a prompt, streaming the text, and reports what the expert pool did.

    python scripts/generate.py --model M.gguf --prompt "def fib(n):" --max_new_tokens 64 \\
        --budget_mib 4 [--miss_mode floor --low_format Q2_K] [--profile P] [--temperature 0.8] \\
        [--devices 2]
    python scripts/generate.py --model M.gguf --chat --prompt_file question.txt

--prompt_file - reads standard input; --chat wraps the prompt in the file's chat template. It ends
where the model does (--ignore_eos goes on). Text goes to stdout, the report to stderr.
Without --budget_mib every expert is resident. Several
--devices divide the experts; each has a pool of --budget_mib and all the rest of the model. A
--miss_mode that uses low copies makes them first, once, in --cache_dir. A --profile is what
scripts/routing_stats.py writes: its most used experts are loaded before the first token.
"""

import sys
from pathlib import Path

from absl import flags

from hobbit_jax import cli, reference
from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.cache.pool_sizing import DEFAULT_LOW_SHARE, low_share
from hobbit_jax.cache.warm_start import WarmStart
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.experts.tiers import TierSpec, open_tier
from hobbit_jax.inference.engine import Engine
from hobbit_jax.inference.sampling import Sampling
from hobbit_jax.inference.step_stats import StepStats
from hobbit_jax.model.loading import load_model
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.prompt_flags import PromptFlags
from hobbit_jax.signals.calibration import Calibration
from pallas_kernels.backends import IMPLEMENTATIONS

_MODEL = flags.DEFINE_string("model", None, "GGUF file; the shipped reference model by default")
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", None, IMPLEMENTATIONS, "matrix products; the device's fastest by default"
)
_PROMPT = PromptFlags()
_IGNORE_EOS = flags.DEFINE_bool(
    "ignore_eos", False, "Whether to go on past the tokens that end a generation."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "most tokens to generate", 1)
_BUDGET_MIB = flags.DEFINE_float(
    "budget_mib", None, "expert pool of a device; all resident by default", 0.0
)
_DEVICES = flags.DEFINE_integer("devices", 1, "that divide the experts among them", 1)
_MISS_MODE = flags.DEFINE_enum(
    "miss_mode", "wait", MISS_MODES, "what serves an expert that is not resident (miss_modes.py)"
)
_LOW_FORMAT = flags.DEFINE_string("low_format", "Q2_K", "of the low copies, where a mode has some")
_LOW_SHARE = flags.DEFINE_string(
    "low_share", str(DEFAULT_LOW_SHARE), "of the pool for low copies, 0 to 1, or adaptive"
)
_PROFILE = flags.DEFINE_string("profile", None, "of this model, for a warm start")
_PIN_SHARE = flags.DEFINE_float("pin_share", 0.0, "of each bank, by --profile, never evicted", 0.0)
_CHUNK_TOKENS = flags.DEFINE_integer(
    "chunk_tokens",
    2048,
    "of a prompt at a time; fewer take less device memory beside the pool",
    1,
)
_TOKENS_PER_CALL = flags.DEFINE_integer("tokens_per_call", 1, "decoded between two prints", 1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most probable token")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "probability mass to sample from")
_SEED = flags.DEFINE_integer("seed", 0, "of the sampling")


def report(engine: Engine, steps: list[StepStats]) -> str:
    """One line per fact. The prefill and the first decode step compile; the rate of the rest
    is the decode rate. Dense bytes are each device's."""
    rates = {"prefill (compiling)": steps[:1], "decode": steps[2:]}
    lines = []
    hit_rate, pool = engine.pool.stats.hit_rate, engine.pool
    lines.append(f"hit rate: {hit_rate:.3f}" if hit_rate is not None else "hit rate: none")
    lines.append(f"bytes moved: {pool.stats.bytes_moved}")
    tokens, selections = max(engine.stats.decoded_tokens, 1), max(engine.stats.selections, 1)
    lines.append(f"exits per token: {engine.stats.exits / tokens:.3f}")
    lines.append(f"degraded selections: {engine.stats.degraded / selections:.3f}")
    for name, part in rates.items():
        seconds, tokens = sum(s.seconds for s in part), sum(s.tokens for s in part)
        rate = f"{tokens / seconds:.1f}" if seconds else "too few tokens"
        lines.append(f"{name} tokens/s: {rate}")
    lines.append(f"pool bytes: {pool.device_bytes} of {pool.budget_bytes}")
    lines.append(f"dense bytes: {engine.model.dense_device_bytes}")
    return "\n".join(lines)


def warm_start(file: GGUFFile) -> WarmStart | None:
    """What --profile asks for."""
    if _PROFILE.value is None:
        if _PIN_SHARE.value:
            raise ValueError("--pin_share needs a --profile, which says whom to pin")
        return None
    profile = Calibration.load(Path(_PROFILE.value), file)
    return WarmStart(profile.selections_LE, _PIN_SHARE.value)


def main(_):
    sampling = Sampling(_TEMPERATURE.value, _TOP_P.value, _SEED.value)
    text = _PROMPT.text()
    model = load_model(_MODEL.value or reference.model_path(), _IMPLEMENTATION.value)
    tokenizer = model.tokenizer()
    prompt = _PROMPT.encode(text, model.file, tokenizer)
    budget_bytes = None if _BUDGET_MIB.value is None else int(_BUDGET_MIB.value * 2**20)
    low = []
    if MISS_MODES[_MISS_MODE.value].low_banks != "none":
        low.append(
            open_tier(model.file, model.config, TierSpec(_LOW_FORMAT.value), low_precision_folder())
        )
    store = HostExperts(model.config, model.file, low)
    engine = Engine(
        model, store, budget_bytes, mode=_MISS_MODE.value,
        low_share=low_share(_LOW_SHARE.value), warm=warm_start(model.file),
        chunk_tokens=_CHUNK_TOKENS.value, devices=_DEVICES.value,
    )  # fmt: skip
    stop_ids = () if _IGNORE_EOS.value else tokenizer.eog_ids
    steps: list[StepStats] = []

    def new_ids():
        steps_of = engine.generate(
            [prompt], _MAX_NEW_TOKENS.value, sampling, stop_ids, _TOKENS_PER_CALL.value
        )
        for ids_B, stats in steps_of:
            steps.append(stats)
            yield int(ids_B[0])

    for text in tokenizer.decode_stream(new_ids()):
        print(text, end="", flush=True)
    print(flush=True)
    print(report(engine, steps), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
