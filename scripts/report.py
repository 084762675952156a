"""Writes the decision document of a sweep, from its records.

    python scripts/report.py --workdir out/reference_sweep
    python scripts/report.py --workdir W --against W2     # two sweeps side by side
    python scripts/report.py --workdir W --export F.csv   # or F.parquet: all records as a table

The document is `decision.md` (two pages), `appendix.md` and `figures/` under the workdir. It can
run while the sweep does: what is absent is listed, and keeps the answer open.
"""

from pathlib import Path

from absl import flags

from hobbit_jax import cli
from hobbit_jax.atomic import replacing
from hobbit_jax.record import read_records
from hobbit_jax.report.against import render
from hobbit_jax.report.document import read_studies, write_report
from hobbit_jax.report.export import export
from hobbit_jax.report.sweep import Sweep

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a sweep.", required=True)
_AGAINST = flags.DEFINE_string(
    "against", None, "Folder of another sweep; writes against.md into --workdir, nothing else."
)
_EXPORT = flags.DEFINE_string(
    "export", None, "File, .csv or .parquet, for a table of all records; writes nothing else."
)


def _sweep(workdir: Path) -> Sweep:
    sweep = read_studies(workdir).sweep
    if sweep is None:
        raise ValueError(f"{workdir} has no sweep of the cache; --against compares two of those")
    return sweep


def main(_):
    workdir = cli.input_folder("workdir", str(_WORKDIR.value))
    if _EXPORT.value:
        path = cli.output_file("export", _EXPORT.value)
        print(f"{export(read_records(workdir), path)} records: {path}")
        return
    cli.output_folder("workdir", workdir)
    if _AGAINST.value:
        other = cli.input_folder("against", _AGAINST.value)
        text = render(_sweep(workdir), _sweep(other), (workdir.name, other.name))
        with replacing(workdir / "against.md") as partial:
            partial.write_text(text, encoding="utf-8")
        print(workdir / "against.md")
    else:
        print(write_report(workdir))


if __name__ == "__main__":
    cli.run(main)
