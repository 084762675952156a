"""Experts streamed to the device by PyTorch: what the cache is measured against on a GPU.

Owns an LRU of device slots over experts in pinned host memory, and the layer that runs from it.
Called by `pytorch.py`. The idea is that of mixtral-offloading (Eliseev and Mazur, arXiv
2312.17238): every expert in page-locked memory, the most recently used on the device, a miss copied
while the experts at hand compute. Their guesses by the next layer's router are left out: nothing is
fetched ahead here either. One LRU serves all layers, of as many slots as our pool; the order is
`cache.policies.LRU`, the same class that our replays run.

Runs on a CPU too, for tests: there a copy is a copy, and there are no streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from hobbit_jax.architecture import ModelConfig
from hobbit_jax.cache.policies import LRU
from hobbit_jax.peers.hugging_face import (
    dense_weights,
    empty_model,
    expert_weights,
    fill,
    finish,
)

ExpertKey = tuple[int, int]  # layer, expert


class ExpertSlots:
    """Device slots for the experts of all layers, least recently used out first.

    Args:
        host: gate_up [E, 2F, D] and down [E, D, F] of each layer, in host memory.
        slots: experts on the device.
        device: "cuda" or "cpu".

    Raises:
        ValueError: no slot.
    """

    def __init__(self, host: list[tuple[torch.Tensor, torch.Tensor]], slots: int, device: str):
        self.host, self.lru, self.device = host, LRU[ExpertKey](slots), torch.device(device)
        gate_up_EXD, down_EDF = host[0]
        self._gate_up_SXD = gate_up_EXD.new_empty((slots, *gate_up_EXD.shape[1:]), device=device)
        self._down_SDF = down_EDF.new_empty((slots, *down_EDF.shape[1:]), device=device)
        self._slot_of: dict[ExpertKey, int] = {}
        self._copies = torch.cuda.Stream() if self.device.type == "cuda" else None
        self._arrived: dict[ExpertKey, torch.cuda.Event] = {}
        self.hits = self.misses = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one expert."""
        return self._gate_up_SXD[0].nbytes + self._down_SDF[0].nbytes

    def use(self, keys: list[ExpertKey]) -> Iterator[tuple[ExpertKey, torch.Tensor, torch.Tensor]]:
        """Each of one layer's experts with its weights on the device, those at hand first.

        A yielded expert's weights are valid until the next one is asked for. More experts than
        slots come in rounds.
        """
        present = {key: self.lru.access(key) for key in keys}
        self.hits += sum(present.values())
        self.misses += len(keys) - sum(present.values())
        ordered = sorted(keys, key=lambda key: not present[key])  # stable
        for start in range(0, len(ordered), self.lru.capacity):
            round_keys = ordered[start : start + self.lru.capacity]
            missing = [key for key in round_keys if key not in self.lru]
            if self._copies is not None and missing:
                # What a victim's slot is still read by was queued before this.
                self._copies.wait_stream(torch.cuda.current_stream())
            for key in missing:
                self._fetch(key, round_keys)
            for key in round_keys:
                arrived = self._arrived.pop(key, None)
                if arrived is not None:
                    torch.cuda.current_stream().wait_event(arrived)
                slot = self._slot_of[key]
                yield key, self._gate_up_SXD[slot], self._down_SDF[slot]

    def _fetch(self, key: ExpertKey, keep: list[ExpertKey]) -> None:
        victim = self.lru.admit(key, keep)
        slot = len(self._slot_of) if victim is None else self._slot_of.pop(victim)
        self._slot_of[key] = slot
        layer, expert = key
        gate_up_EXD, down_EDF = self.host[layer]
        if self._copies is None:
            self._gate_up_SXD[slot].copy_(gate_up_EXD[expert])
            self._down_SDF[slot].copy_(down_EDF[expert])
            return
        with torch.cuda.stream(self._copies):
            self._gate_up_SXD[slot].copy_(gate_up_EXD[expert], non_blocking=True)
            self._down_SDF[slot].copy_(down_EDF[expert], non_blocking=True)
            self._arrived[key] = self._copies.record_event()


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
        for (_, expert), gate_up_XD, down_DF in self._slots.use(keys):
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
) -> tuple[torch.nn.Module, ExpertSlots]:
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
    return weight.copy_(torch.from_numpy(array))
