"""What does down-quantising cold experts cost and buy, on the reference model?

Question: at equal bytes of expert cache, does a mix of native (Q4_K_M) and 2- or 3-bit experts beat
the native SLRU cache, and does it beat a uniformly smaller quant? Which importance score should
choose who is demoted: one measured beforehand, the router's weight at the moment, or residency,
that is, who happens not to be in the cache when wanted?

    python scripts/sweep.py --config configs/reference.py --workdir out/reference_sweep
    python scripts/report.py --workdir out/reference_sweep

`configs/reference.py:demo` is the same question in 14 small trials; `:qwen3.6-35b-a3b`,
`:qwen3-30b-a3b`, `:gpt-oss-20b` and `:mixtral-8x7b` ask it of models of full size, at the budgets
of cards from 8 to 24 GB:

    python scripts/sweep.py --config configs/reference.py:qwen3-30b-a3b \\
        --config.model=Qwen3-30B-A3B-Q4_K_M.gguf --workdir out/qwen3

Any field can be pinned, and an axis becomes that one value: `--config.cache.budget_mib=2`,
`--config.precision.scores=frequency`, `--config.model=M.gguf`.

Low precisions are encoded against the second moments of a text of which half is source code and
half generated problems: docs/appendix.md, "What to calibrate on", says why.

Cost on 2 CPU cores: about a minute (demo), about an hour (full). A model of full size
wants a GPU, on which it has not run: its 100 trials decode up to 3 million tokens for the tasks of
46 plans. `--dry_run` measures on your model how long its precisions take to encode.
Expected: KL to native grows with the share of low experts and is far larger at 2 bit than at 3 bit;
bytes moved per token fall with the experts' size. Open: whether any importance score beats the
random control.
"""

from ml_collections import ConfigDict

from hobbit_jax.record import CacheTrial, EvalSizes, Inputs, MissModeTrial, Mixed, Native, Uniform
from hobbit_jax.sweep.preflight import all_low_mib
from hobbit_jax.sweep.texts import MIXED_TEXT
from hobbit_jax.sweep.trial import Trial

# Budgets of cards from 8 to 24 GB.
FULL_SIZE = {
    "qwen3.6-35b-a3b": (4096.0, 8192.0, 11264.0, 20480.0),
    "qwen3-30b-a3b": (4096.0, 8192.0, 11264.0),
    "gpt-oss-20b": (4096.0, 6144.0, 8192.0),
    "mixtral-8x7b": (8192.0, 11264.0, 20480.0),
}


def get_config(arg: str = "full") -> ConfigDict:
    if arg not in ("full", "demo", *FULL_SIZE):
        raise ValueError(
            f"configs/reference.py:{arg}: want :full (the default), :demo, :{', :'.join(FULL_SIZE)}"
        )
    config = ConfigDict()
    config.title = f"Reference model, {arg} sweep"
    config.question = (
        "Is it worth storing unimportant experts below their native precision, so that more of "
        "them fit the cache and a miss moves fewer bytes?"
    )
    # Empty: the model and the held-out text that ship with the package.
    config.model = ""
    config.calibration_text = MIXED_TEXT
    config.evaluation_text = ""
    # Of the matrix products; empty takes float32 on a CPU and the fastest elsewhere.
    config.implementation = ""

    # The reference model's experts take 7.27 MiB natively, 3.94 at Q2_K.
    # Every plan runs under every policy of `hobbit_jax/cache/policies/` that is named here. What
    # else than fetching may serve a miss is asked by configs/misses.py.
    config.cache = {"budget_mib": (1.0, 2.0, 5.0), "policies": ("slru",), "protected_fraction": 0.1}
    config.precision = {
        "scores": ("router_weight", "frequency", "accumulated_weight", "sensitivity", "random"),
        # 0 is the native rival and 1 the uniform one; both always run.
        "low_fraction": (0.5, 0.75, 0.9),
        "low_format": ("Q2_K", "Q3_K"),
        "method": "gptq",
        # Of the random control. Those below 3 run at every budget, to see what they move; the
        # others at the largest, since what a plan loses does not depend on it.
        "random_seeds": tuple(range(20)),
    }
    # Miss modes with the share of the pool for low copies, and formats of mode floor, which runs
    # at the budgets that hold all experts in that format.
    config.residency = {
        "modes": (("use_low_if_resident", 0.8), ("fetch_low", 0.8), ("hobbit", 0.5)),
        "floor": ("Q2_K",),
    }
    config.seed = 0
    # Since 2026-12-01, decided before the sweep that it changed: 768 problems of each task in the
    # place of 96, since a loss of 0.05 was within the paired interval of most plans, and 48 decoded
    # windows of the miss modes in the place of 4, as many as all other plans have.
    config.eval = {
        "windows": 48,
        "context": 512,
        "calibration_windows": 48,
        "task_problems": 768,
        "decode_prompt_tokens": 32,
        "decode_tokens": 96,
        "decode_repeats": 3,
        "decoded_windows": 48,
        # lm-eval's tasks, such as ("gsm8k", "humaneval"), and problems of each; 0 for all.
        "benchmarks": (),
        "benchmark_problems": 0,
    }
    # Limits stated before any result: a mix is worth it if all of this holds at equal pool bytes.
    config.rule = {
        "kl_limit": 0.05,  # nats per token, upper end of the interval
        "task_loss_limit": 0.05,  # share of problems lost against native
        "bytes_moved_ratio_needed": 0.7,  # of native SLRU's at the same budget
        "speedup_needed": 1.2,  # of decode, where measured on a GPU
    }
    if arg == "demo":
        _shrink(config)
    elif arg in FULL_SIZE:
        _enlarge(config, arg)
    return config


def _shrink(config: ConfigDict) -> None:
    """To what `make demo` runs."""
    config.calibration_text = ""
    config.cache.update(budget_mib=(1.5, 3.0))
    config.precision.scores = ("router_weight", "frequency", "accumulated_weight", "random")
    config.precision.update(low_fraction=(0.5,), low_format=("Q2_K",), method="ggml")
    config.precision.random_seeds = (0,)
    config.residency.update(modes=(), floor=())
    config.eval.update(windows=16, calibration_windows=16, task_problems=32)
    config.eval.update(decode_tokens=48, decode_repeats=2)


def _enlarge(config: ConfigDict, model: str) -> None:
    """To a model of `FULL_SIZE`."""
    config.title = f"{model}: the cache sweep"
    config.cache.update(budget_mib=FULL_SIZE[model])
    # GPTQ would encode the 18,432 matrices of Qwen3-30B-A3B for a day of 2 cores.
    config.precision.update(method="ggml", low_fraction=(0.5, 0.9), random_seeds=(0, 1))
    # Native logits of 8 windows take 2.5 GB.
    config.eval.update(windows=8, decoded_windows=2, task_problems=0)
    config.eval.update(benchmarks=("gsm8k", "humaneval"), benchmark_problems=100)


def sweep(config: ConfigDict) -> list[Trial]:
    """Native and uniform rivals at every budget, then every importance score, share and format."""
    inputs = Inputs(
        config.model, config.calibration_text, config.evaluation_text, config.implementation
    )
    sizes = EvalSizes(**{**config.eval, "benchmarks": tuple(config.eval.benchmarks)})
    cache, precision = config.cache, config.precision
    pools = [(float(budget), policy) for policy in cache.policies for budget in cache.budget_mib]

    def cell(plan, pool, seed=config.seed):
        budget_mib, policy = pool
        protected = cache.protected_fraction
        return Trial(CacheTrial(plan, budget_mib, inputs, sizes, protected, seed, policy))

    cells = [cell(Native(), pool) for pool in pools]
    # Both uniform models are rivals, also when only one format is mixed in.
    rivals = sorted({"Q2_K", "Q3_K", *precision.low_format})
    method = precision.method
    cells += [cell(Uniform(low, method), pool) for low in rivals for pool in pools]
    cells += [
        cell(Mixed(score, float(fraction), low, method), pool, seed)
        for low in precision.low_format
        for fraction in precision.low_fraction
        for score in precision.scores
        for seed in (precision.random_seeds if score == "random" else (config.seed,))
        for pool in pools
        if score != "random" or seed < 3 or pool[0] == max(cache.budget_mib)
    ]
    cells += [
        cell(MissModeTrial(mode, float(share), low, method), pool)
        for low in precision.low_format
        for mode, share in config.residency.modes
        for pool in pools
    ]
    return cells + [
        cell(MissModeTrial("floor", 0.0, low, method), pool)
        for low in config.residency.floor
        if low in precision.low_format
        for pool in pools
        if pool[0] >= all_low_mib(config.model, low)
    ]
