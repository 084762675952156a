"""Replays low-precision plans at equal bytes on two traces, and writes the rows and the tables.

    python scripts/dev/trace_tables.py --traces A.npz,B.npz --out docs/traces.md

Each trace is replayed with its own counts and with the other's. Rows go to OUT without its suffix,
NAME.jsonl for a trace; those that are there are not replayed again, so it can be interrupted. Some
minutes of CPU time for traces of 8,000 tokens.
"""

import equal_bytes
from absl import flags

from hobbit_jax import cli
from hobbit_jax.atomic import replacing
from hobbit_jax.cache.policies import POLICIES
from hobbit_jax.cache.trace import read_trace

# An expert of DeepSeek-V2-Lite, three matrices of 2048 x 1408, at 4.5 and 2.625 bits.
_WEIGHTS = 3 * 2048 * 1408

_TRACES = flags.DEFINE_list("traces", None, "Two .npz files of one model.", required=True)
_OUT = flags.DEFINE_string("out", None, "Markdown file to write.", required=True)
_CAPACITIES = flags.DEFINE_list(
    "capacities", ["208", "416", "832"], "Sizes of the cache in native experts."
)
_POLICY = flags.DEFINE_enum(
    "policy", "slru", POLICIES, "Cache policy that chooses the expert to evict."
)
_EXPERT_BYTES = flags.DEFINE_integer(
    "expert_bytes", _WEIGHTS * 9 // 16, "Bytes of a native expert.", 1, 2**40
)
_LOW_BYTES = flags.DEFINE_integer(
    "low_bytes", _WEIGHTS * 21 // 64, "Bytes of a low expert.", 1, 2**40
)

_INTRODUCTION = """\
# Residents, hits and bytes moved at equal bytes, on recorded routing

Replays of DeepSeek-V2-Lite's routing on two texts, cold start, demand misses, {policy}. Every row
of a capacity has the bytes of that many native slots; a native expert has {native} bytes, a low one
{low}. *Residents* are the (layer, expert) pairs on the device at the end, *hit rate* is of all
selections at the precision that the plan asked for, *waits* are the selections a token would have
waited for, *degraded* those that ran low. Under *floor* all pairs are low and the rest of the bytes
holds hot ones natively; – where the bytes cannot hold it. The random control is the median of three
draws, with their range. "Other text" counts uses on the other trace, "own text" on the replayed
one, which nobody has beforehand.

    {command}

"""


def main(_):
    out = cli.output_file("out", str(_OUT.value))
    paths = [cli.input_file("traces", path) for path in _TRACES.value]
    if len(paths) != 2:
        raise ValueError(f"--traces names {len(paths)} files; want 2")
    traces = [read_trace(path) for path in paths]
    if traces[0].uses_LE.shape != traces[1].uses_LE.shape:
        raise ValueError(
            f"{paths[0].name} has layers and experts {list(traces[0].uses_LE.shape)}; "
            f"{paths[1].name} has {list(traces[1].uses_LE.shape)}"
        )
    cells = equal_bytes.cells(cli.numbers(_CAPACITIES, int, 1, cli.MAX_COUNT))
    sizes = _EXPERT_BYTES.value, _LOW_BYTES.value
    rows_path = {path: out.with_suffix("") / f"{path.stem}.jsonl" for path in paths}
    command = f"python scripts/dev/trace_tables.py --traces {','.join(map(str, paths))} --out {out}"
    text = _INTRODUCTION.format(
        policy=_POLICY.value, native=sizes[0], low=sizes[1], command=command
    )
    out.with_suffix("").mkdir(parents=True, exist_ok=True)
    for path, trace, other in zip(paths, traces, traces[::-1], strict=True):
        rows = equal_bytes.rows(rows_path[path], cells, trace, other, _POLICY.value, *sizes)
        text += "\n".join([f"## {path.stem}", "", *equal_bytes.table(rows), "", ""])
    with replacing(out) as partial:
        partial.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    print(f"the tables: {out}")


if __name__ == "__main__":
    cli.run(main)
