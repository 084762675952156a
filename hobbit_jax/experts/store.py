"""The host expert store: every expert's bytes, by precision, layer and expert number.

Owns the view from (precision, layer, expert) to raw GGUF blocks. An expert is three read-only views
into the memory-mapped file, from which the slot pool (`cache/pool.py`) reads. Precision 0 is
native; further precisions are low-precision files made by `low_precision.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hobbit_jax.model_file.gguf_file import GGUFFile, TensorInfo, check_finite_scales
from hobbit_jax.models.config import ModelConfig, layer_tensors
from pallas_kernels.backends import Implementation
from pallas_kernels.expert_ffn import implementation_for
from pallas_kernels.reference import Epilogue, Signature

NATIVE = 0
ROLES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
STACKS = (*ROLES, "ffn_gate_up_exps")  # tensors that hold experts' matrices


class ExpertKey(NamedTuple):
    """One expert at one precision; `precision` 0 is native."""

    precision: int
    layer: int
    expert: int


def stacked(tensor: TensorInfo) -> TensorInfo:
    """An expert tensor with its axis of experts, which a dense FFN's has not in the file."""
    if len(tensor.shape) == 3:
        return tensor
    return replace(tensor, shape=(1, *tensor.shape), raw=tensor.raw[None])


class LayerExperts(NamedTuple):
    """One layer's experts at one precision: three stacked tensors [E, rows, columns]."""

    gate: TensorInfo
    up: TensorInfo
    down: TensorInfo

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo]) -> "LayerExperts":
        """Of a layer's tensors by role; of a fused one, gate and up are the halves of its rows."""
        fused = tensors.get("ffn_gate_up_exps")
        if fused is None:
            return cls(*(stacked(tensors[role]) for role in ROLES))
        n_experts, rows, columns = fused.shape
        gate, up = (
            replace(fused, shape=(n_experts, rows // 2, columns), raw=half)
            for half in np.split(fused.raw, 2, axis=1)
        )
        return cls(gate, up, tensors["ffn_down_exps"])

    @property
    def signature(self) -> Signature:
        """The formats of gate, up and down."""
        return Signature(*(tensor.format for tensor in self))

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert: the same on the host, over PCIe and in a slot."""
        return sum(tensor.nbytes for tensor in self) // self.gate.shape[0]


def _epilogue(config: ModelConfig, file: GGUFFile) -> Epilogue | None:
    """Scales and biases of all experts; None where they change nothing."""
    layers = [layer_tensors(config, layer) for layer in range(config.n_layers)]

    def floats(name: str) -> np.ndarray:
        tensor = file.tensors[name]
        check_finite_scales(tensor)
        if tensor.format != "F32":
            raise NotImplementedError(
                f"{file.paths[0]}: tensor {name!r} is {tensor.format}; supported are scales and "
                "biases of experts in F32"
            )
        return tensor.raw.view("<f4").reshape(tensor.shape)

    scale_LE3 = np.ones((config.n_layers, config.n_experts, 3), np.float32)
    for layer, matrix in np.ndindex(config.n_layers, 3):
        # What Gemma 4 has by this name is its router's.
        if (name := layers[layer].get(f"{ROLES[matrix]}.scale")) in config.scales:
            scale_LE3[layer, :, matrix] = floats(name)
    if config.expert_biases:
        biases = [np.concatenate([floats(n[f"{role}.bias"]) for n in layers]) for role in ROLES]
        return Epilogue(scale_LE3.reshape(-1, 3), *biases)
    return None if (scale_LE3 == 1).all() else Epilogue(scale_LE3.reshape(-1, 3))


class HostExperts:
    """All experts of a model at every precision, immutable.

    `epilogue` is that of all of them, the same at every precision; None where there is none.

    Raises:
        ValueError: a scale or bias of experts is NaN or infinite.
        NotImplementedError: it is of another type than float32.
    """

    def __init__(self, config: ModelConfig, native: GGUFFile, low: Sequence[GGUFFile] = ()):
        self.config = config
        self._stamps = [file.stamps for file in (native, *low)]
        names_L = [layer_tensors(config, layer).items() for layer in range(config.n_layers)]
        self.precisions = [
            [
                LayerExperts.of({role: file.tensors[n] for role, n in names if role in STACKS})
                for names in names_L
            ]
            for file in (native, *low)
        ]
        self.epilogue = _epilogue(config, native)
        self._checked: set[ExpertKey] = set()

    @property
    def shape_pLE(self) -> tuple[int, int, int]:
        """Precisions, layers and experts of a layer."""
        return len(self.precisions), self.config.n_layers, self.config.n_experts

    def layer(self, precision: int, layer: int) -> LayerExperts:
        """The experts of `layer` at `precision`."""
        return self.precisions[precision][layer]

    def epilogue_of(self, layer: int, expert: int) -> Epilogue | None:
        """That of one expert."""
        return self.epilogue and self.epilogue.of_row(layer * self.config.n_experts + expert)

    def signature(self, key: ExpertKey) -> Signature:
        """Formats of one expert."""
        return self.layer(key.precision, key.layer).signature

    def expert_bytes(self, key: ExpertKey) -> int:
        """Bytes of one expert."""
        return self.layer(key.precision, key.layer).expert_bytes

    def backend(
        self, signature: Signature, implementation: Implementation, platform: str | None = None
    ) -> str:
        """How experts of a signature are computed; see `implementation_for`."""
        config, has_epilogue = self.config, self.epilogue is not None
        how = implementation, platform, config.expert_function, has_epilogue
        return implementation_for(signature, config.d_model, config.d_expert, *how)

    def raw(self, key: ExpertKey) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Raw blocks of gate, up and down: uint8 [rows, row_bytes] views into the file.

        Raises:
            ValueError: a scale is NaN or infinite; checked when an expert is first asked
                for, so that opening a file of many gigabytes does not read it.
            OSError: the file is gone, or another than the one that was opened.
        """
        self.check_unchanged(key.precision)
        experts, at = self.layer(key.precision, key.layer), key.expert
        if key not in self._checked:
            for tensor in experts:
                name, shape = f"{tensor.name}[{at}]", tensor.shape[1:]
                check_finite_scales(replace(tensor, name=name, shape=shape, raw=tensor.raw[at]))
            self._checked.add(key)
        return experts.gate.raw[at], experts.up.raw[at], experts.down.raw[at]

    def check_unchanged(self, precision: int) -> None:
        """Refuses a precision whose file is gone or changed; see `FileStamp.check`."""
        for stamp in self._stamps[precision]:
            stamp.check()

    @property
    def largest_expert_bytes(self) -> int:
        """Bytes of the largest expert of any precision."""
        return max(layer.expert_bytes for layers in self.precisions for layer in layers)

    def precision_bytes(self, precision: int) -> int:
        """Bytes of all experts at one precision."""
        of_layers = (layer.expert_bytes for layer in self.precisions[precision])
        return sum(of_layers) * self.config.n_experts
