"""What do two and three bits on top of Q4_K_M cost a model of real weights?

Question: a file that its publisher has quantised to Q4_K_M has its feed-forward matrices encoded
once more, to 2 and 3 bits. How far is it then from itself, on code, on prose and on problems; which
encoder keeps most at equal bytes, ggml's best types included; and which matrices mind least?

    python scripts/sweep.py --config configs/real_weights.py \\
        --config.model=qwen2.5-coder-1.5b-instruct-q4_k_m.gguf --workdir out/real_weights
    python scripts/report.py --workdir out/real_weights

A dense model is one whose only expert is always chosen. Texts "wikitext" and "gsm8k" are data sets
of README; encoders are calibrated on their training halves and on source code, as much of each, and
judged on the test halves; then every plan solves HumanEval. `configs/real_weights.py:full` adds
matrices by role, GPTQ at 3 bits, the other grids of ggml, and what ggml's Q2_K loses after another
format on the way.

Cost on 2 CPU cores, for 1.5 billion weights: 2 minutes for a plan on a text, half an hour for a
plan on HumanEval beside other work (32 to 50 minutes), and once for a plan to be encoded: GPTQ an
hour, ggml 5 to 10 minutes.
Expected: KL at plain Q3_K 0.075 and at plain Q2_K 0.35 on code and prose, as a first look with
llama.cpp found; calibration lowers Q2_K's by a third or more. Written before the first run of this
config: at 2 bits an encoder of ours is worth its calibration if its KL is at most 0.75 of that of
the best type of ggml of at most equal bytes, with the upper end of the paired interval below 1. The
rule stayed when GPTQ was changed twice after that run (docs/log/2026-11-30-gptq-in-order.md and
2026-11-30-gptq-at-native-outputs.md).
"""

from dataclasses import replace

from ml_collections import ConfigDict

from hobbit_jax.record import EvalSizes, Inputs, Native, QualityTrial, Uniform
from hobbit_jax.sweep.trial import Trial


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "full"):
        raise ValueError(f"configs/real_weights.py:{arg}: want nothing or :full")
    config = ConfigDict()
    config.title = "Real weights, on top of Q4_K_M"
    config.question = "What do 2 and 3 bits on top of Q4_K_M cost a model of real weights?"
    config.model = ""
    config.calibration_text = "code,wikitext,gsm8k"
    # The empty text is held-out source code.
    config.evaluation_texts = ("", "wikitext", "gsm8k")
    # ggml's products, as llama.cpp computes them: float32 takes several times as long.
    config.implementation = "ggml"
    config.uniform = (("Q2_K", "gptq"), ("Q2_K", "ggml"), ("IQ2_S", "ggml"), ("Q3_K", "ggml"))
    # Which matrices are Q2_K, the others staying native; what Q2_K passes through before.
    config.roles, config.through = (), ()
    # Problems of lm-eval's tasks, solved natively and by each plan of `uniform`; 0 asks all.
    config.benchmarks = ("humaneval",)
    config.benchmark_problems = 0
    config.seed = 0
    config.eval = {"windows": 48, "context": 128, "calibration_windows": 128}
    config.rule = {}
    if arg == "full":
        config.uniform += (
            ("Q3_K", "gptq"), ("IQ3_XXS", "ggml"), ("IQ3_S", "ggml"), ("IQ2_XS", "ggml"),
            ("IQ2_XXS", "ggml"),
        )  # fmt: skip
        config.roles, config.through = (("gate", "up"), ("down",)), ("Q8_0", "Q5_K")
    return config


def sweep(config: ConfigDict) -> list[Trial]:
    """Every plan on one text before the next text, and then on problems."""

    def trial(plan, text, sizes):
        inputs = Inputs(config.model, config.calibration_text, text, config.implementation)
        return Trial(QualityTrial(plan, inputs, sizes, config.seed), "real_weights")

    windows = EvalSizes(**config.eval)
    plans = [Native(), *(Uniform(name, method) for name, method in config.uniform)]
    parts = [Uniform("Q2_K", roles=tuple(roles)) for roles in config.roles]
    parts += [Uniform("Q2_K", through=(name,)) for name in config.through]
    found = [trial(p, text, windows) for text in config.evaluation_texts for p in plans + parts]
    if config.benchmarks:
        benchmarks, problems = tuple(config.benchmarks), config.benchmark_problems
        scored = replace(windows, windows=0, benchmarks=benchmarks, benchmark_problems=problems)
        found += [trial(plan, "", scored) for plan in plans]
    return found
