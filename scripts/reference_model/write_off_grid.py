"""Writes a model of equal logits whose float32 weights lie on no quantisation grid.

    python scripts/reference_model/write_off_grid.py --model M.gguf --out original.gguf

For `configs/compounding.py`, where the weights that M was quantised from are not at hand.
"""

from absl import flags

from hobbit_jax import cli, reference
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.registry import read_config
from hobbit_jax.reference_model.reparametrise import write_off_grid

_MODEL = flags.DEFINE_string(
    "model", None, "GGUF file of the model; the shipped reference model by default."
)
_OUT = flags.DEFINE_string("out", None, "GGUF file to write.", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the rewriting.", 0, cli.MAX_COUNT)


def main(_):
    out = cli.output_file("out", str(_OUT.value))
    source = open_gguf(_MODEL.value or reference.model_path())
    write_off_grid(source, read_config(source), out, _SEED.value)


if __name__ == "__main__":
    cli.run(main)
