"""Which importance score should choose who is demoted, and does a mix beat a uniformly smaller
quant?

Question: at equal bytes of all experts, what do plans lose whose experts are encoded at 2 and 3
bits with calibration, by which importance score, and how much of that is the importance score and
how much the mere mixing, which a random choice has too?

    python scripts/sweep.py --config configs/frontier.py --workdir out/frontier
    python scripts/report.py --workdir out/frontier

Trials of the first calibration seed come first, so the document can be read before all have run.
The rival encoder is llama.cpp's own, under its importance matrix.
`--config.prose_text=F.txt` adds prose to the transfer check.

Cost on 2 CPU cores: about half an hour.
Expected: calibrated 2-bit experts lose half of what plain ones lose, so that a mix has less left
to win; measured sensitivity chooses best; frequency comes close. Open: whether any importance score
beats the random control by more than its interval where most experts are low.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from hobbit_jax.record import (
    EvalSizes,
    Inputs,
    MixedInBytes,
    Native,
    PerSelection,
    QualityTrial,
    Uniform,
)
from hobbit_jax.sweep.texts import MIXED_TEXT, TASKS_TEXT
from hobbit_jax.sweep.trial import Trial


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"configs/frontier.py:{arg}: want nothing or :smoke")
    config = ConfigDict()
    config.title = "Reference model, quality frontier"
    config.question = (
        "At equal bytes, which importance score should decide who is stored below native "
        "precision, and does such a mix beat a uniformly smaller quant?"
    )
    config.model = ""
    config.calibration_text = ""
    config.evaluation_text = ""
    config.implementation = ""
    config.methods = ("ggml", "gptq")
    config.formats = ("Q3_K", "Q2_K")
    config.scores = ("sensitivity", "frequency", "accumulated_weight", "hybrid", "random")
    # Of native's bytes. Uniform Q2_K has 0.54 of them and Q3_K 0.71.
    config.bytes_fractions = (0.6, 0.7, 0.85)
    # HOBBIT's own mix, the third entry of which is skipped, and one with more low selections.
    config.shares = ((0.67, 0.30, 0.03), (0.4, 0.6))
    config.seeds = (0, 1, 2)
    config.prose_text = ""
    # 768 problems of each task since 2026-12-01, and 96 before.
    config.eval = {"windows": 200, "context": 512, "calibration_windows": 48, "task_problems": 768}
    config.rule = {}
    if arg == "smoke":
        config.scores, config.bytes_fractions = ("sensitivity", "random"), (0.6, 0.7)
        config.seeds, config.shares = (0,), ((0.67, 0.30, 0.03),)
        config.eval.update(windows=4, calibration_windows=4, task_problems=0)
    return config


def sweep(config: ConfigDict) -> list[Trial]:
    """Rivals and mixes by every importance score, seed by seed; then the transfer check."""
    inputs = Inputs(
        config.model, config.calibration_text, config.evaluation_text, config.implementation
    )

    formats, lowest = tuple(config.formats), tuple(config.formats[-1:])

    def cell(plan, seed, problems=0, text=None):
        sizes = {**config.eval, "task_problems": config.eval.task_problems if problems else 0}
        on = inputs if text is None else replace(inputs, calibration_text=text)
        return Trial(QualityTrial(plan, on, EvalSizes(**sizes), seed), "frontier")

    def first_seed_only(seed):
        # By ggml's encoder, and without the middle precision: what each of them is worth.
        cells = [
            cell(MixedInBytes(score, fraction, used, method), seed)
            for fraction in config.bytes_fractions
            for used, method in ((formats, "ggml"), (lowest, "gptq"))
            for score in ("sensitivity", "random")
        ]
        cells += [
            cell(PerSelection(score, tuple(shares), lowest, "gptq"), seed)
            for shares in config.shares
            for score in ("router_weight", "cumulative_weight")
        ]
        # Encoders and scores that have seen the tasks as well as the text.
        cells += [cell(Uniform(low, "gptq"), seed, 1, MIXED_TEXT) for low in formats]
        return cells + [
            cell(MixedInBytes(score, fraction, formats, "gptq"), seed, 1, MIXED_TEXT)
            for score in ("sensitivity", "frequency", "random")
            for fraction in config.bytes_fractions[:2]
        ]

    cells = [cell(Native(), 0, problems=1)]
    for seed in config.seeds:
        first = seed == config.seeds[0]
        for method in config.methods:
            cells += [cell(Uniform(low, method), seed, first) for low in formats]
        # The larger limits, where plans hardly differ, for the first draw of calibration alone.
        for fraction in config.bytes_fractions[: None if first else 2]:
            cells += [
                cell(MixedInBytes(score, fraction, formats, "gptq"), seed, first)
                for score in config.scores
            ]
        if first:
            cells += first_seed_only(seed)
    # Last, since one text may not be at hand.
    return cells + [
        cell(MixedInBytes(score, fraction, formats, "gptq", text), seed)
        for seed in config.seeds[:1]
        for text in (TASKS_TEXT, config.prose_text)
        for fraction in config.bytes_fractions[1:2]
        for score in ("sensitivity", "frequency")
        if text
    ]
