"""What do the ways to serve a miss cost, and what do they lose, on the reference model?

Question: at equal bytes of expert cache, is it better to fetch a missing expert, to compute it on
the CPU, to serve it in a lower precision, or to route around it; and does a mix of precisions add
anything to uniformly smaller experts whose misses are computed?

    python scripts/sweep.py --config configs/misses.py --workdir out/misses
    python scripts/report.py --workdir out/misses

Every way runs under every pool, on the same prompts and windows: native and uniform experts whose
misses are fetched, computed or divided, HOBBIT with low banks of several sizes, low copies fetched
or computed instead of native ones, and routing toward what is resident. Since 2026-12-01 products
are in float32, as in the other sweeps. Before, they were ggml's, whose rounding on this model has a
KL of 0.0008 to float32, as much as some of these ways lose.

Cost on 2 CPU cores: about a quarter of an hour.
Expected: where the link is slower than the CPU's memory, computing native misses beats fetching
anything that loses as little, and uniform Q3_K experts with computed misses beat every mix. Written
on 2026-11-30, before the first run: a mix adds something at a pool and a link if its KL is below
the straight line through native and the uniform quants, each served in its cheapest way, at the
mix's own cost, with the paired interval below 0 after Bonferroni's correction for the mixes.
"""

from ml_collections import ConfigDict

from hobbit_jax.record import CacheTrial, EvalSizes, Inputs, MissModeTrial, Native, Uniform
from hobbit_jax.sweep.texts import MIXED_TEXT
from hobbit_jax.sweep.trial import Trial


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.title = "Reference model, ways to serve a miss"
    config.question = (
        "What does each way to serve a miss cost and lose, at equal bytes of expert cache?"
    )
    config.model = ""
    config.calibration_text = MIXED_TEXT
    config.evaluation_text = ""
    config.implementation = ""
    config.budget_mib = (2.0, 5.0)
    config.uniform = ("Q3_K", "Q2_K")
    config.method = "gptq"
    # Miss modes of native and uniform experts, with the link's bandwidth over the rate at which the
    # CPU reads experts.
    config.misses = (
        ("fetch", 0.41), ("host", 0.25), ("hybrid", 1.0), ("hybrid", 0.25), ("hybrid", 0.0625),
    )  # fmt: skip
    # Miss modes that serve low copies, with their share of the pool, or "adaptive".
    config.low_on_a_miss = (
        ("hobbit", 0.05), ("hobbit", 0.1), ("hobbit", 0.2), ("hobbit", "adaptive"),
        ("hobbit_host", 0.1), ("host_low", 0.0), ("fetch_low", 0.2), ("use_low_if_resident", 0.2),
    )  # fmt: skip
    # By how much the logarithms of resident experts' scores are raised.
    config.resident_lift = (0.25, 0.5)
    config.seed = 0
    config.eval = {
        "windows": 48,
        "context": 128,
        "calibration_windows": 48,
        "decode_prompt_tokens": 16,
        "decode_tokens": 64,
        "decode_repeats": 24,
        "decoded_windows": 48,
    }
    config.rule = {}
    return config


def sweep(config: ConfigDict) -> list[Trial]:
    """Every way under every pool."""
    inputs = Inputs(
        config.model, config.calibration_text, config.evaluation_text, config.implementation
    )
    sizes = EvalSizes(**config.eval)

    plans = [Native(), *(Uniform(name, config.method) for name in config.uniform)]
    ways = [
        (plan, {"misses": mode, "link_to_host": float(link)})
        for plan in plans
        for mode, link in config.misses
    ]
    ways += [
        (MissModeTrial(mode, share, name, config.method), {})
        for name in config.uniform
        for mode, share in config.low_on_a_miss
    ]
    ways += [
        (Native(), {"misses": mode, "resident_lift": float(lift)})
        for lift in config.resident_lift
        for mode in ("fetch", "host")
    ]
    return [
        Trial(CacheTrial(plan, float(budget_mib), inputs, sizes, **changes), "misses")
        for plan, changes in ways
        for budget_mib in config.budget_mib
    ]
