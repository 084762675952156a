"""Writes the decision document of a sweep, from its records.

    python scripts/report.py --workdir out/reference_sweep

The document is `decision.md` (two pages), `appendix.md` and `figures/` under the workdir. It can
run while the sweep does: what is absent is listed, and keeps the answer open. The records are JSON,
one in each file under `records/`; `pandas.json_normalize` makes one table of them.
"""

from absl import flags

from hobbit_jax import cli
from hobbit_jax.report.document import write_report

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a sweep.", required=True)


def main(_):
    workdir = cli.input_folder("workdir", str(_WORKDIR.value))
    print(write_report(cli.output_folder("workdir", workdir)))


if __name__ == "__main__":
    cli.run(main)
