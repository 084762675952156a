"""How far the planner's forecasts are from decode speeds that others report.

    python scripts/dev/check_plan.py --out out/mine

plan.py prints the summary of the last comparison, which is hobbit_jax/planner/check.json. It takes
half a minute.
"""

from absl import flags

from hobbit_jax import cli
from hobbit_jax.planner.published_benchmarks import compare_reports, reports_record
from hobbit_jax.record import write_record

_OUT = flags.DEFINE_string("out", None, "Folder to keep the record in.", required=True)


def main(_):
    folder, compared = cli.output_folder("out", _OUT.value), compare_reports()
    path = write_record(folder, reports_record(compared))
    for row in compared["rows"]:
        print(
            f"{row['what']}: {row['predicted']:.1f} tokens/s predicted, {row['reported']:.1f} "
            f"reported ({row['ratio']:.2f}x)"
        )
    print(f"{compared['summary']}\nthe record: {path}")


if __name__ == "__main__":
    cli.run(main)
