"""Writes the decision document of a sweep, from its rows.

    python scripts/report.py --workdir out/reference_sweep

Reads `sweep.json` and `rows/*.json` under the workdir, writes `decision.md` and `figures/`
there. It can run while the sweep does: cells without a row are listed as missing.
"""

from absl import flags

from hobbit_jax import cli
from hobbit_jax.report import write_report

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a sweep", required=True)


def main(_):
    folder = cli.input_folder("workdir", str(_WORKDIR.value))
    print(write_report(cli.output_folder("workdir", folder)))


if __name__ == "__main__":
    cli.run(main)
