"""What does quantising an already quantised expert cost, against quantising the original?

Question: is the original to Q4_K to Q2_K worse than the original to Q2_K, and by how much? The same
for Q3_K, and from Q5_K and Q6_K. The original is the trained float32 model, which does not ship
(58 MB; `make reference` leaves it in its working directory), or a model of equal logits whose
weights lie on no grid, made in seconds:

    python scripts/reference_model/write_off_grid.py --out out/original.gguf
    python scripts/sweep.py --config configs/compounding.py --workdir out/compounding
    python scripts/report.py --workdir out/compounding

Cost on 2 CPU cores: about 10 minutes.
Expected: the errors of two roundings add up as if independent, so Q4_K on the way costs Q2_K about
4 % in weight error; in KL that may drown in the interval.
"""

from ml_collections import ConfigDict

from hobbit_jax.record import EvalSizes, Inputs, Native, QualityTrial, Uniform
from hobbit_jax.sweep.trial import Trial


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.title = "Reference model, compounding error"
    config.question = "What does quantising an already quantised expert cost?"
    config.model = "out/original.gguf"
    config.calibration_text = ""
    config.evaluation_text = ""
    config.implementation = ""
    config.methods = ("ggml", "gptq")
    config.through = ("Q4_K", "Q5_K", "Q6_K")
    config.formats = ("Q3_K", "Q2_K")
    config.seed = 0
    config.eval = {"windows": 200, "context": 512, "calibration_windows": 48, "task_problems": 96}
    config.rule = {}
    return config


def sweep(config: ConfigDict) -> list[Trial]:
    """Each format alone, then each low format straight and through each larger one."""
    inputs = Inputs(
        config.model, config.calibration_text, config.evaluation_text, config.implementation
    )
    sizes = EvalSizes(**config.eval)

    def cell(plan):
        return Trial(QualityTrial(plan, inputs, sizes, config.seed), "compounding")

    cells = [cell(Native())]
    cells += [cell(Uniform(name)) for name in config.through]
    cells += [
        cell(Uniform(low, method, through))
        for low in config.formats
        for method in config.methods
        # A calibrated encoder is dear: the lowest format by the usual way only.
        for through in ((), *((name,) for name in config.through))
        if method == "ggml" or (low == config.formats[-1] and through in ((), config.through[:1]))
    ]
    return cells
