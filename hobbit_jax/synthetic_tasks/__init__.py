"""Two small task families with worked answers, for training and scoring the reference model.

`arithmetic` stands in for GSM8K and `functions` for HumanEval at a size that a model of 14M
parameters can learn; `execution` runs completions of the latter. The corpus builder trains on
`generate(..., "train")`, `hobbit_jax.evals` scores `generate(..., "heldout")`; `split` keeps the
two apart by construction. Standard library only.
"""

from hobbit_jax.synthetic_tasks import arithmetic, execution, functions

__all__ = ["arithmetic", "execution", "functions"]
