"""Trains the reference model, exports it to GGUF, measures it and writes its card.

python scripts/reference_model/train_reference.py --workdir out/reference

About an hour on 2 cores. Interrupt it at will: run again, it goes on from the newest checkpoint.
`--install` then copies the results into the package (hobbit_jax/reference).
"""

from absl import flags

from hobbit_jax import cli
from hobbit_jax.reference_model import recipe

_WORKDIR = flags.DEFINE_string(
    "workdir", "out/reference", "Folder of checkpoints, losses and exports."
)
_INSTALL = flags.DEFINE_boolean("install", False, "Whether to copy the results into the package.")


def main(_) -> None:
    workdir = cli.output_folder("workdir", _WORKDIR.value)
    recipe.run(workdir)
    print((workdir / "MODEL_CARD.md").read_text(encoding="utf-8"))
    if _INSTALL.value:
        print(f"installed into {recipe.install(workdir)}")


if __name__ == "__main__":
    cli.run(main)
