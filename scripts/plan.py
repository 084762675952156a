"""What to run on a GPU: residents, hit rate and tokens/s to expect of each setting.

    python scripts/plan.py --preset qwen3.6-35b-a3b --gpu "RTX 4070" [--context 4096]
    python scripts/plan.py --model https://…/M.gguf --gpu "RTX 4070"
    python scripts/plan.py --model M.gguf --gpu 504,31.5 --vram_gib 12 --trace T.npz --out out/mine

--gpu is a GPU's name or its bandwidths in GB/s, device memory and PCIe. Nothing is run: a small
cost model (hobbit_jax/planner/cost_model.py) over replayed routing predicts, and says what it
assumes. Routing is the model's own trace (--trace_out of generate.py) where one is given; otherwise
the plan gives a range and says that it extrapolates. --out is a folder, which gets all of it as a
record for report.py.
"""

import sys

from absl import flags

from hobbit_jax import cli
from hobbit_jax.cache.bandwidth import read_bandwidths
from hobbit_jax.cache.trace import read_trace
from hobbit_jax.experts.store import NATIVE
from hobbit_jax.model_file.remote import is_url
from hobbit_jax.models.caches import KV_FORMATS
from hobbit_jax.planner import routing
from hobbit_jax.planner.cost_model import MEASURED, Machine, by_engine, measured
from hobbit_jax.planner.hardware import find_gpu
from hobbit_jax.planner.plan import Request, make_plan, plan_record
from hobbit_jax.planner.published_benchmarks import recorded_check
from hobbit_jax.planner.shapes import PRESET_NAMES, open_model, preset_model
from hobbit_jax.record import write_record
from hobbit_jax.report.document import render_plan

DEFAULT_CONTEXT = 4096

_MODEL = flags.DEFINE_string(
    "model", None, "GGUF file of the model, or a URL of one, of which only the header is read."
)
_PRESET = flags.DEFINE_enum(
    "preset", None, PRESET_NAMES, "Known model whose shapes are taken instead of a file's."
)
_GPU = flags.DEFINE_string(
    "gpu",
    None,
    "Name of the GPU, or its memory and PCIe bandwidths in GB/s, as 504,31.5 (with --vram_gib).",
    required=True,
)
_VRAM_GIB = flags.DEFINE_float(
    "vram_gib", None, "Memory of the GPU in GiB; its own by default.", 0.0, 4096.0
)
_CONTEXT = flags.DEFINE_integer(
    "context", None,
    f"Number of tokens that the KV cache has room for; by default {DEFAULT_CONTEXT}, or the "
    "model's context if that is less.", 1, cli.MAX_COUNT,
)  # fmt: skip
_KV_FORMAT = flags.DEFINE_enum(
    "kv_format", "float32", list(KV_FORMATS), "Format of keys and values."
)
_CHUNK = flags.DEFINE_integer(
    "chunk_tokens", 256, "Number of tokens of a prefill step, which need scratch.", 1, cli.MAX_COUNT
)
_RESERVE = flags.DEFINE_float(
    "reserve_gib", 0.75, "Memory in GiB for the driver and the display.", 0.0, 4096.0
)
_HOST_GB_S = flags.DEFINE_float(
    "host_gb_s",
    None,
    "Nominal bandwidth of the host's memory in GB/s; by default 89.6, two channels of DDR5-5600.",
    0.001,
    1e6,
)
_BANDWIDTHS = flags.DEFINE_string(
    "bandwidths", None, "File of bench_bandwidth.py, made on the machine that the plan is for."
)
_TRACE = flags.DEFINE_string("trace", None, "Recorded routing, an .npz file.")
_OUT = flags.DEFINE_string("out", None, "Folder to keep the record in.")


def main(_):
    folder = cli.output_folder("out", _OUT.value) if _OUT.value else None
    if (_MODEL.value is None) == (_PRESET.value is None):
        raise ValueError("want one of --model and --preset")
    gpu = find_gpu(str(_GPU.value))
    vram_gib = gpu.vram_gib if _VRAM_GIB.value is None else _VRAM_GIB.value
    if vram_gib is None:
        raise ValueError("a --gpu given in figures needs --vram_gib")
    if _MODEL.value is None:
        model = preset_model(str(_PRESET.value))
    elif is_url(_MODEL.value):
        model = open_model(_MODEL.value)
    else:
        model = open_model(cli.input_file("model", _MODEL.value))
    given = {} if _HOST_GB_S.value is None else {"host_gb_s": _HOST_GB_S.value}
    sources = dict.fromkeys(given, "the command line")
    machines = by_engine(Machine(gpu.device_gb_s, gpu.pcie_gb_s, **given))
    if _BANDWIDTHS.value:
        path = cli.input_file("bandwidths", _BANDWIDTHS.value)
        native = model.store().layer(NATIVE, 0)
        of_native = native.signature.gate, native.expert_bytes / 3
        machines = measured(machines, read_bandwidths(path), gpu, *of_native)
        sources |= dict.fromkeys(MEASURED, path.name)
    request = Request(
        vram_gib, _CONTEXT.value or min(DEFAULT_CONTEXT, model.config.context_length),
        _KV_FORMAT.value, _CHUNK.value, _RESERVE.value,
    )  # fmt: skip
    routings = routing.synthetic_routing(model.config)
    if _TRACE.value:
        trace = read_trace(cli.input_file("trace", _TRACE.value))
        routings = [routing.recorded(trace, model.config)]
    record = plan_record(make_plan(model, gpu, machines, request, routings, sources))
    print(render_plan(record, recorded_check()))
    if folder is not None:
        print(f"the record: {write_record(folder, record)}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
