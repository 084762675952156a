"""Counts what a decoded token launches on a GPU, in the program that is compiled for one.

    make kernels                                            # installs the compiler, runs this too
    python scripts/dev/count_launches.py --targets sm_89    # with the compiler on the path

Compiles the decode loop of a model, by default the shipped one, as `compile_kernels.py` compiles
the kernels: without a GPU. A layer's launches are those of the loop over layers, each conditional
with its longer branch. Fails if a layer writes as much as one of its attention matrices elsewhere
than into the caches: then the operand of a product is copied for every token.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from absl import flags
from gpu_compiler import TARGETS, Target, compile_for

from hobbit_jax import cli, reference
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.inference.decode_loop import Inputs, decode_program
from hobbit_jax.inference.engine import GREEDY, Engine
from hobbit_jax.models.loading import load_model
from hobbit_jax.record import Benchmark, Record, machine, measured, write_record
from pallas_kernels import backends

_TARGETS = cli.define_list(
    "targets", flags.EnumParser(list(TARGETS)).parse, "sm_89",
    f"GPUs to compile for, of {', '.join(TARGETS)}.",
)  # fmt: skip
_MODEL = flags.DEFINE_string("model", None, "Model file; the shipped one by default.")
_WORKDIR = flags.DEFINE_string("workdir", "out/kernels", "Folder of the records.")

STUDY, CONTEXT = "kernels", 512
_OPERATION = re.compile(r"^ +(?:ROOT )?%?[\w.\-]+ = (\([^()]*\)|\S+) ([a-z][\w\-]*)\(")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")
_NUMBER_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}


class Program:
    """A compiled program's text, by computation."""

    def __init__(self, text: str):
        # Of each computation: what an operation makes, its name, and its whole line.
        self.operations: dict[str, list[tuple[str, str, str]]] = {}
        for line in text.splitlines():
            if begins := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
                found = self.operations.setdefault("ENTRY" if begins[1] else begins[2], [])
            elif operation := _OPERATION.match(line):
                found.append((operation[1], operation[2], line))

    def called(self, computation: str, how: str) -> list[list[str]]:
        """Names that each operation of a computation calls as `how`."""
        pattern = re.compile(how + r"=(\{[^}]*\}|%?[\w.\-]+)")
        found = (pattern.search(line) for _, _, line in self.operations[computation])
        return [re.findall(r"[\w.\-]+", match[1]) for match in found if match]

    def launches(self, computation: str) -> int:
        """Of its own and its conditionals, but not of its loops."""
        own = sum(name not in _FREE for _, name, _ in self.operations[computation])
        branches = self.called(computation, "branch_computations")
        return own + sum(max(map(self.launches, names)) for names in branches)

    def largest_write_bytes(self, computation: str) -> int:
        """The most that one operation writes, in-place updates of larger arrays left out."""
        sizes = [0]
        for result, name, line in self.operations[computation]:
            if name in _FREE or re.search(r'op_name="[^"]*(scatter|dynamic_update_slice)', line):
                continue
            for number, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
                lengths = map(int, filter(None, shape.split(",")))
                sizes.append(_NUMBER_BYTES.get(number, 8) * math.prod(lengths))
        branches = self.called(computation, "branch_computations")
        return max([*sizes, *(self.largest_write_bytes(n) for names in branches for n in names)])


def compiled_decode(target: Target) -> tuple[Program, int]:
    """The decode program for a GPU, and the bytes of the largest matrix of attention."""
    nvidia = SimpleNamespace(platform="gpu", device_kind="NVIDIA")
    backends.jax = SimpleNamespace(devices=lambda platform=None: [nvidia])  # pyright: ignore
    path = reference.model_path()
    if _MODEL.value is not None:
        path = cli.input_file("model", _MODEL.value)
    model = load_model(path, "triton")
    store = HostExperts(model.config, model.file)
    engine = Engine(model, store, CacheConfig(store.precision_bytes(NATIVE) // 2))
    engine.start(1, CONTEXT)
    one = np.ones(1, np.int32)
    inputs = Inputs(
        np.bool_(True), one, one > 0, one, np.int32(1), np.int32(0), engine._key, one[:0]
    )
    program = decode_program(engine._loop_spec(GREEDY, 1))
    arguments = (engine._arrays, engine.pool.banks, engine.pool.table_UE, engine._started())
    _, text = compile_for(target, lambda *given: program(*given), *arguments, inputs)
    matrices = [t.nbytes for name, t in model.file.tensors.items() if ".attn_" in name]
    return Program(text), max(matrices)


def main(_) -> int:
    workdir, failed = cli.output_folder("workdir", _WORKDIR.value), False
    for name in _TARGETS.value:
        program, matrix_bytes = compiled_decode(TARGETS[name])
        (outer,) = (body for (body,) in program.called("ENTRY", "body"))
        (layer,) = (body for (body,) in program.called(outer, "body"))
        figures = {
            "launches_per_layer": program.launches(layer),
            "launches_per_token": program.launches("ENTRY") + program.launches(outer),
            "conditionals_per_layer": len(program.called(layer, "branch_computations")),
            "largest_write_per_layer_bytes": program.largest_write_bytes(layer),
        }
        setting = {"target": name, "name": "decode loop"}
        if _MODEL.value is not None:
            setting["model"] = Path(_MODEL.value).name
        asked = Benchmark(STUDY, setting)
        write_record(workdir, Record(STUDY, asked, **vars(measured(figures)), **machine()))
        print(f"{TARGETS[name].name}: {', '.join(f'{n} {v}' for n, v in figures.items())}")
        if figures["largest_write_per_layer_bytes"] >= matrix_bytes:
            print(f"FAILED: a layer writes as much as a matrix of attention, {matrix_bytes} bytes")
            failed = True
    return int(failed)


if __name__ == "__main__":
    cli.run(main)
