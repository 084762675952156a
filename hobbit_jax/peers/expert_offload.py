"""Experts streamed to the device by PyTorch: what the cache is measured against on a GPU.

Owns the copies from pinned host memory, and the layer that runs from the slots. The idea is that of
mixtral-offloading (Eliseev and Mazur, arXiv 2312.17238): every expert in page-locked memory, the
most recently used on the device, a miss copied while those at hand compute. Their guesses by the
next layer's router are left out: nothing is fetched ahead. One LRU serves all layers
(`lru_slots.py`), of as many slots as our pool; theirs had one per layer.

Runs on a CPU too, for tests: there a copy is a copy, and there are no streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from hobbit_jax.model_file.architecture import ModelConfig
from hobbit_jax.peers.hugging_face import (
    HuggingFaceModel,
    dense_weights,
    empty_model,
    expert_weights,
    fill,
    finish,
)
from hobbit_jax.peers.lru_slots import ExpertKey, LRUSlots


class ExpertSlots:
    """Device slots for the experts of all layers.

    Args:
        host: gate_up [E, 2F, D] and down [E, D, F] of each layer, in host memory.
        slots: experts on the device.
        device: "cuda" or "cpu".

    Raises:
        ValueError: no slot.
    """

    def __init__(self, host: list[tuple[torch.Tensor, torch.Tensor]], slots: int, device: str):
        self.order = LRUSlots(slots)
        self._host = host
        gate_up_EXD, down_EDF = host[0]
        self._gate_up_SXD = gate_up_EXD.new_empty((slots, *gate_up_EXD.shape[1:]), device=device)
        self._down_SDF = down_EDF.new_empty((slots, *down_EDF.shape[1:]), device=device)
        self._copies = torch.cuda.Stream() if device == "cuda" else None

    @property
    def slot_bytes(self) -> int:
        """Bytes of one expert."""
        return self._gate_up_SXD[0].nbytes + self._down_SDF[0].nbytes

    def use(self, keys: list[ExpertKey]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Each of one layer's experts by number, gate_up [2F, D] and down [D, F] on the device.

        Those at hand come first. Weights are valid until the next expert is asked for.
        """
        for slots, fetched in self.order.use(keys):
            if self._copies is not None and fetched:
                # What still reads a victim's slot was queued before this.
                self._copies.wait_stream(torch.cuda.current_stream())
            arrived = {key: self._copy(key, slots[key]) for key in fetched}
            for key, slot in slots.items():
                event = arrived.get(key)
                if event is not None:
                    torch.cuda.current_stream().wait_event(event)
                yield key[1], self._gate_up_SXD[slot], self._down_SDF[slot]

    def _copy(self, key: ExpertKey, slot: int) -> torch.cuda.Event | None:
        layer, expert = key
        gate_up_EXD, down_EDF = self._host[layer]
        with torch.cuda.stream(self._copies):  # does nothing for None
            self._gate_up_SXD[slot].copy_(gate_up_EXD[expert], non_blocking=True)
            self._down_SDF[slot].copy_(down_EDF[expert], non_blocking=True)
        if self._copies is None:
            return None
        arrived = torch.cuda.Event()
        arrived.record(self._copies)
        return arrived


class OffloadedExperts(torch.nn.Module):
    """Stands where a layer of transformers has its experts; the same sums in the same order."""

    def __init__(self, slots: ExpertSlots, layer: int, activation: Callable):
        super().__init__()
        self._slots, self._layer, self._activation = slots, layer, activation

    def forward(
        self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts, [T, D], in the dtype of `x_TD`."""
        chosen_TK = ids_TK.cpu()  # the host has to know, as in any offloading
        keys = [(self._layer, expert) for expert in dict.fromkeys(chosen_TK.flatten().tolist())]
        parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for expert, gate_up_XD, down_DF in self._slots.use(keys):
            token_A, place_A = (i.to(x_TD.device) for i in torch.where(chosen_TK == expert))
            gate_AF, up_AF = torch.nn.functional.linear(x_TD[token_A], gate_up_XD).chunk(2, -1)
            y_AD = torch.nn.functional.linear(self._activation(gate_AF) * up_AF, down_DF)
            parts[expert] = token_A, y_AD * weights_TK[token_A, place_A, None]
        y_TD = torch.zeros_like(x_TD)
        # By number, as transformers adds them: a sum in bfloat16 depends on its order.
        for expert in sorted(parts):
            token_A, y_AD = parts[expert]
            y_TD.index_add_(0, token_A, y_AD.to(y_TD.dtype))
        return y_TD


def load_offloaded(
    config: ModelConfig,
    tensor: Callable[[str], np.ndarray],
    slots: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[HuggingFaceModel, ExpertSlots]:
    """As `hugging_face.load`, with the experts in host memory and `slots` of them on `device`."""
    model = empty_model(config)
    host = []
    for layer in range(config.n_layers):
        arrays = expert_weights(config, tensor, layer).values()
        gate_up_EXD, down_EDF = (_host_tensor(array, dtype, device) for array in arrays)
        host.append((gate_up_EXD, down_EDF))
    shared = ExpertSlots(host, slots, device)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts = OffloadedExperts(shared, number, layer.mlp.experts.act_fn)
    fill(model, dense_weights(config, tensor), dtype, device)
    return finish(model, device), shared


def _host_tensor(array: np.ndarray, dtype: torch.dtype, device: str) -> torch.Tensor:
    """In page-locked memory where a GPU will read it."""
    weight = torch.empty(array.shape, dtype=dtype, pin_memory=device == "cuda")
    return weight.copy_(torch.from_numpy(np.array(array)))  # a copy: F32 is a view of the file
