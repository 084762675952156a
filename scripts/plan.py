"""What to run on a card: residents, hit rate and tokens/s to expect of each setting.

    python scripts/plan.py --model M.gguf --gpu "RTX 4070" [--context 4096] [--trace T.npz]
    python scripts/plan.py --preset qwen3-30b-a3b --gpu 504,31.5 --vram_gib 12 --out plan.json

--gpu is a card's name or its bandwidths in GB/s, device memory and PCIe. Nothing is run: a small
cost model (hobbit_jax/planner/cost_model.py) over replayed routing predicts, and says what it
assumes. Routing is the model's own trace (replay.py) or profile (profile.py) where one is given;
otherwise the plan says that it extrapolates. --out writes all of it as JSON.
"""

from pathlib import Path

from absl import flags
from tqdm import tqdm

from hobbit_jax import cli
from hobbit_jax.atomic import write_json
from hobbit_jax.cache.trace import read_trace
from hobbit_jax.planner import routing, table
from hobbit_jax.planner.cost_model import Machine
from hobbit_jax.planner.hardware import find_card
from hobbit_jax.planner.plan import divide_memory, make_plan, recorded_check
from hobbit_jax.planner.shapes import open_model, preset_model
from hobbit_jax.signals.calibration import Calibration

_MODEL = flags.DEFINE_string("model", None, "GGUF file")
_PRESET = flags.DEFINE_string("preset", None, "shapes of a known model instead (presets.py)")
_GPU = flags.DEFINE_string("gpu", None, "a card's name, or device GB/s,PCIe GB/s", required=True)
_VRAM_GIB = flags.DEFINE_float("vram_gib", None, "of the card; its own by default", 0.0)
_CONTEXT = flags.DEFINE_integer("context", 4096, "tokens of the KV cache", 1)
_CHUNK = flags.DEFINE_integer("chunk_tokens", 256, "of a prefill step; its scratch is theirs", 1)
_RESERVE = flags.DEFINE_float("reserve_gib", 0.75, "for the driver and the display", 0.0)
_HOST_GB_S = flags.DEFINE_float("host_gb_s", None, "of the host's memory, nominal")
_OVERLAP = flags.DEFINE_float("overlap_share", None, "of uploads, where measured (0-1)")
_TRACE = flags.DEFINE_string("trace", None, "recorded routing, .npz")
_PROFILE = flags.DEFINE_string("profile", None, "a calibration's folder (profile.py), of --model")
_OUT = flags.DEFINE_string("out", None, "JSON file")


def _routing(model):
    if _TRACE.value:
        return routing.recorded(read_trace(Path(_TRACE.value)), model.config)
    if _PROFILE.value:
        if not _MODEL.value:
            raise ValueError("--profile is of one file's model; give that file as --model")
        found = Calibration.load(Path(_PROFILE.value), model.native)
        return routing.profiled(found.selections_LE, model.config)
    return routing.made_up(model.config)


def main(_):
    if (_MODEL.value is None) == (_PRESET.value is None):
        raise ValueError("want one of --model and --preset")
    card = find_card(str(_GPU.value))
    vram_gib = card.vram_gib if _VRAM_GIB.value is None else _VRAM_GIB.value
    if vram_gib is None:
        raise ValueError("a gpu given in figures needs --vram_gib")
    model = open_model(Path(_MODEL.value)) if _MODEL.value else preset_model(str(_PRESET.value))
    given = {"host_gb_s": _HOST_GB_S.value, "overlap_share": _OVERLAP.value}
    given = {name: value for name, value in given.items() if value is not None}
    machine = Machine(card.device_gb_s, card.pcie_gb_s, **given)
    memory = divide_memory(model, vram_gib, _CONTEXT.value, _CHUNK.value, _RESERVE.value)
    with tqdm(unit="setting", disable=None, leave=False) as bar:

        def progress(name: str) -> None:
            bar.set_description(name)
            bar.update()

        plan = make_plan(
            model, card, machine, memory, _CONTEXT.value, _CHUNK.value, _routing(model), given,
            progress,
        )  # fmt: skip
    print(table.render(plan, recorded_check()))
    if _OUT.value:
        write_json(Path(_OUT.value), plan)


if __name__ == "__main__":
    cli.run(main)
