"""Recorded routing: which experts a model chose, token by token and layer by layer.

Owns recording and trace files. A file is an .npz of `expert_ids` [T, L, K] (integers), `weights`
[T, L, K] (router weights, in the order of the ids) and `seq_lens` [sequences] (tokens of each).
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from hobbit_jax.atomic import replacing
from hobbit_jax.cache.controller import Observer
from hobbit_jax.cache.selection import RouterOutput

_ARRAYS = ("expert_ids", "weights", "seq_lens")


@dataclass(frozen=True)
class Trace:
    """One recorded run."""

    name: str
    ids_TLK: np.ndarray  # int64
    weights_TLK: np.ndarray  # float32, each step's add up to 1
    position_T: np.ndarray  # int64; of a token in its sequence
    n_experts: int  # of a layer

    def part(self, start: int, stop: int) -> Self:
        """The tokens from `start` to before `stop`."""
        at = slice(start, stop)
        return replace(
            self,
            ids_TLK=self.ids_TLK[at],
            weights_TLK=self.weights_TLK[at],
            position_T=self.position_T[at],
        )

    def layers(self) -> list[RouterOutput]:
        """What each layer's router chose for all tokens."""
        valid_T = np.ones(len(self.ids_TLK), bool)
        return [
            RouterOutput(layer, self.ids_TLK[:, layer], self.weights_TLK[:, layer], valid_T)
            for layer in range(self.ids_TLK.shape[1])
        ]

    def routed(self) -> Iterator[list[RouterOutput]]:
        """Of each token, what each layer's router chose, as an engine's observers are told."""
        return (self.part(token, token + 1).layers() for token in range(len(self.ids_TLK)))

    @property
    def keys_TLK(self) -> np.ndarray:
        """One number per (layer, expert): layer * n_experts + expert."""
        return self.ids_TLK + self.n_experts * np.arange(self.ids_TLK.shape[1])[:, None]

    @property
    def uses_LE(self) -> np.ndarray:
        """Selections of every expert."""
        shape = (self.ids_TLK.shape[1], self.n_experts)
        return np.bincount(self.keys_TLK.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def read_trace(path: Path, n_experts: int | None = None) -> Trace:
    """Reads and checks a trace file.

    Args:
        path: the .npz file.
        n_experts: of a layer; the highest id says it if None.

    Raises:
        ValueError: not such a file; says which array is wrong, what it is and what is wanted.
    """
    ids_TLK, weights_TLK, lengths = _arrays(path)
    if ids_TLK.ndim != 3 or ids_TLK.size == 0 or ids_TLK.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: expert_ids is {ids_TLK.dtype} {list(ids_TLK.shape)}; want integers "
            "[tokens, layers, experts of a token], and no axis of length 0"
        )
    if weights_TLK.shape != ids_TLK.shape or weights_TLK.dtype.kind != "f":
        raise ValueError(
            f"{path}: weights is {weights_TLK.dtype} {list(weights_TLK.shape)}; want floats of "
            f"expert_ids' shape, {list(ids_TLK.shape)}"
        )
    if not (np.isfinite(weights_TLK).all() and (weights_TLK >= 0).all()):
        raise ValueError(f"{path}: weights holds negative, infinite or NaN numbers")
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or lengths.min(initial=1) < 1:
        raise ValueError(
            f"{path}: seq_lens is {lengths.dtype} {list(lengths.shape)}; want positive integers "
            "[sequences]"
        )
    if lengths.sum() != len(ids_TLK):
        raise ValueError(
            f"{path}: seq_lens adds up to {lengths.sum()} tokens; expert_ids has {len(ids_TLK)}"
        )
    ids_TLK = ids_TLK.astype(np.int64)
    most = int(ids_TLK.max()) + 1 if n_experts is None else n_experts
    if ids_TLK.min() < 0 or ids_TLK.max() >= most:
        raise ValueError(
            f"{path}: expert_ids go from {ids_TLK.min()} to {ids_TLK.max()}; want 0 to {most - 1}"
        )
    ordered_TLK = np.sort(ids_TLK, axis=-1)
    if (ordered_TLK[..., 1:] == ordered_TLK[..., :-1]).any():
        raise ValueError(f"{path}: expert_ids name an expert twice in one step")
    total_TL1 = np.maximum(weights_TLK.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    weights_TLK = (weights_TLK / total_TL1).astype(np.float32)
    position_T = np.concatenate([np.arange(length) for length in lengths])
    return Trace(path.name, ids_TLK, weights_TLK, position_T, most)


def _arrays(path: Path) -> list[np.ndarray]:
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it holds one array")
            return [file[name] for name in _ARRAYS]
    except KeyError:
        missing = ", ".join(name for name in _ARRAYS if name not in file)
        has = ", ".join(file) or "nothing"
        raise ValueError(f"{path} has no {missing}; it has {has}") from None
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is no .npz file of {', '.join(_ARRAYS)}: {error}") from error


class RoutingRecorder(Observer):
    """Records which experts one sequence chooses, prompt and generated text alike."""

    def __init__(self, n_layers: int):
        self._ids: list[list[np.ndarray]] = [[] for _ in range(n_layers)]
        self._weights: list[list[np.ndarray]] = [[] for _ in range(n_layers)]

    def after_routing(self, routed: RouterOutput) -> None:
        """Keeps one layer's choices for the tokens of one step."""
        self._ids[routed.layer].append(routed.ids_TK[routed.valid_T])
        self._weights[routed.layer].append(routed.weights_TK[routed.valid_T])

    def write(self, path: Path) -> int:
        """Writes the trace as an .npz file; returns how many tokens it has.

        ValueError if nothing was routed yet, or a layer is behind the others.
        """
        counts = {sum(map(len, steps)) for steps in self._ids}
        if counts == {0} or len(counts) != 1:
            raise ValueError(
                f"layers routed {sorted(counts)} tokens; want as many in each, above 0"
            )
        (n_tokens,) = counts
        ids_TLK = np.stack([np.concatenate(steps) for steps in self._ids], axis=1)
        weights_TLK = np.stack([np.concatenate(steps) for steps in self._weights], axis=1)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                expert_ids=ids_TLK.astype(np.int32),
                weights=weights_TLK.astype(np.float32),
                seq_lens=np.asarray([n_tokens]),
            )
        return n_tokens
