"""Which settings a plan compares, and the rule by which it names one of them.

The rule: begin with the fastest setting that keeps every expert native, go through the others by
expected loss, and take the next one where it is at least `SPEEDUP_NEEDED` times as fast as what is
held. A setting that loses more has to earn it, and none may lose more than is allowed. The loss is
a stand-in, since no plan has the model's weights: the share of selections that run low, times what
the whole low precision cost the reference model, which is far less than it cost the real weights of
a dense model (docs/decision.md). So a plan names the fastest native setting beside the other.
Demoting the lightest selections (hobbit) costs less than their share says.
"""

from collections.abc import Sequence
from functools import partial

from hobbit_jax.planner.traffic import Setting

LOW_FORMATS = ("Q3_K", "Q2_K")
# KL to native, nats a token, of all experts in the format on the reference model: by GPTQ with
# refinement, which the engine's low precisions have, and by llama.cpp's encoder with an importance
# matrix, which its files have (docs/frontier, uniform). Of another model only the order can be
# expected.
REFERENCE_KL = {"Q3_K": 0.0088, "Q2_K": 0.0308}
SMALLER_FILES = {"Q3_K_M": 0.0162, "Q2_K": 0.0570}
# By the rule of the decision document: KL of 0.05 nats a token.
SPEEDUP_NEEDED, MOST_LOSS = 1.2, 0.05

NATIVE = Setting("native SLRU", "fetch")


def settings(link_to_host: float) -> list[Setting]:
    """Native first, then what computes misses on the CPU, the uniform quants, the floors, and what
    keeps copies of both kinds; `link_to_host` as in `Setting`.
    """
    lowest = LOW_FORMATS[-1]
    computed = partial(Setting, link_to_host=link_to_host)
    in_a_cache = (
        ("fetch_low", 0.5), ("fetch_low", 0.8), ("use_low_if_resident", 0.8), ("hobbit", 0.2)
    )  # fmt: skip
    return [
        NATIVE,
        computed("misses on the CPU (host)", "host"),
        computed("misses on both (hybrid)", "hybrid"),
        computed(f"misses on the CPU in {lowest} (host_low)", "host_low", lowest),
        *(Setting(f"uniform {f}", "fetch", f, asked="low") for f in LOW_FORMATS),
        *(Setting(f"floor {f}", "floor", f) for f in LOW_FORMATS),
        *(
            Setting(f"{mode} {lowest}, split {share:g}", mode, lowest, low_share=share)
            for mode, share in in_a_cache
        ),
    ]


def expected_loss(setting: Setting, low_uses: float, skipped: float) -> float:
    """The stand-in for the loss, nats a token; a skipped selection counts as one in the lowest."""
    if setting.low_format is None:
        return 0.0
    return low_uses * REFERENCE_KL[setting.low_format] + skipped * REFERENCE_KL[LOW_FORMATS[-1]]


def choose(speeds: Sequence[float], losses: Sequence[float], most_loss: float = MOST_LOSS) -> int:
    """The index of the setting that the rule takes; one of them loses nothing."""
    allowed = [i for i in range(len(speeds)) if losses[i] <= most_loss]
    held, *others = sorted(allowed, key=lambda i: (losses[i], -speeds[i]))
    for at in others:
        if speeds[at] >= SPEEDUP_NEEDED * speeds[held]:
            held = at
    return held
