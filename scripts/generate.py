"""Continues a prompt, streaming the text, and reports what the expert pool did.

    python scripts/generate.py --model M.gguf --prompt "def fib(n):" --max_new_tokens 64 \\
        --budget_mib 4 [--miss_mode floor --low_format Q2_K] [--profile P] [--temperature 0.8] \\
        [--devices 2]
    python scripts/generate.py --model M.gguf --chat --prompt_file question.txt

--prompt_file - reads standard input; --chat wraps the prompt in the file's chat template. It ends
where the model does (--ignore_eos goes on). Text goes to stdout, the report to stderr; --json
prints both as one object on stdout. Without --budget_mib every expert is loaded before the first
token. Several --devices divide the experts; each has a pool of --budget_mib and all the rest of the
model. Low-precision experts are made once, in --cache_dir. A --profile is what
scripts/calibrate.py writes. Rates are those of a warm program: the time that went into
compiling stands on a line of its own.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from hobbit_jax import cli, prompt_flags
from hobbit_jax.engine_flags import engine_flags
from hobbit_jax.inference.engine import Engine, StepStats
from hobbit_jax.inference.sampling import MAX_SEED, MAX_TEMPERATURE, Sampling

ENGINE = engine_flags(
    "model", "implementation", "devices", "budget_mib", "policy", "miss_mode", "link_to_host",
    "resident_lift", "low_format", "low_share", "profile", "pin_share", "chunk_tokens", "context",
    "threads", "kv_format", "trace_out",
)  # fmt: skip
flags.adopt_module_key_flags(prompt_flags)
_IGNORE_EOS = flags.DEFINE_bool(
    "ignore_eos", False, "Whether to go on past the tokens that end a generation."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 64, "Number of tokens to generate at most.", 1, cli.MAX_COUNT
)
_TOKENS_PER_CALL = flags.DEFINE_integer(
    "tokens_per_call", 1, "Number of tokens to decode between two prints.", 1, 4096
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Temperature of sampling; 0 takes the most probable token.", 0.0,
    MAX_TEMPERATURE,
)  # fmt: skip
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Probability mass of the tokens to sample from, above 0.", 0.0, 1.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.", 0, MAX_SEED)
_JSON = flags.DEFINE_bool("json", False, "Whether to print one JSON object instead of the text.")


def rate(steps: list[StepStats]) -> float | None:
    """Tokens/s of some steps, the time of compiling left out; None where nothing was fed."""
    tokens = sum(step.tokens for step in steps)
    seconds = sum(step.seconds - step.compile_seconds for step in steps)
    return tokens / seconds if tokens else None


def report(engine: Engine, steps: list[StepStats]) -> dict[str, Any]:
    """What the pool and the program did. The first step is the prefill's; dense bytes are each
    device's."""
    pool, counts = engine.pool, engine.counts
    return {
        "hit rate": counts.hit_rate,
        "bytes moved": counts.bytes_moved,
        **({"bytes computed": counts.bytes_computed} if engine.mode.computes else {}),
        "host round trips per token": counts.host_round_trips / max(counts.tokens, 1),
        "demoted selections": counts.demoted / max(counts.selections, 1),
        "pool bytes": pool.device_bytes,
        "pool budget bytes": pool.budget_bytes,
        "dense bytes": engine.model.dense_device_bytes,
        "compilation seconds": sum(step.compile_seconds for step in steps),
        "prefill tokens/s": rate(steps[:1]),
        "decode tokens/s": rate(steps[1:]),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The report for people, a line per fact."""
    formats = {float: "{:.3f}", int: "{}", type(None): "none"}
    rates = {name: f"{value:.1f}" for name, value in facts.items() if name.endswith("/s") and value}
    return [f"{name}: {rates.get(name) or formats[type(v)].format(v)}" for name, v in facts.items()]


def new_ids(
    engine: Engine,
    prompt: list[int],
    context: int | None,
    sampling: Sampling,
    steps: list[StepStats],
) -> Iterator[int]:
    """Token ids as they are drawn; `steps` gets their costs."""
    stop_ids = () if _IGNORE_EOS.value else engine.model.tokenizer().eog_ids
    wanted = len(prompt) + _MAX_NEW_TOKENS.value
    room = engine.config.context_length if context is None else context
    if wanted > room:
        what = "the model's context" if context is None else "--context"
        raise ValueError(
            f"the prompt's {len(prompt)} tokens and --max_new_tokens={_MAX_NEW_TOKENS.value} want "
            f"{wanted}; {what} is {room}"
        )
    for ids_B, cost in engine.generate(
        [prompt], _MAX_NEW_TOKENS.value, sampling, stop_ids, _TOKENS_PER_CALL.value, context,
    ):  # fmt: skip
        steps.append(cost)
        yield int(ids_B[0])


def main(_):
    options, sampling = ENGINE(), Sampling(_TEMPERATURE.value, _TOP_P.value, _SEED.value)
    text = prompt_flags.prompt_text()
    model = options.load_model()
    tokenizer = model.tokenizer()
    prompt = prompt_flags.prompt_ids(text, model.file, tokenizer)
    engine = options.make_engine(model)
    options.load_all_that_fit(engine)
    steps: list[StepStats] = []
    pieces: list[str] = []
    with options.recorded_routing(engine):
        for piece in tokenizer.decode_stream(
            new_ids(engine, prompt, options.context, sampling, steps)
        ):
            pieces.append(piece)
            if not _JSON.value:
                print(piece, end="", flush=True)
    facts = report(engine, steps)
    if _JSON.value:
        print(json.dumps({"text": "".join(pieces), "prompt_tokens": len(prompt), **facts}))
    else:
        print(flush=True)
        print("\n".join(lines(facts)), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
