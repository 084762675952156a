"""The engine: tokens in, logits or text out, with experts streamed through the slot pool.

Owns the walk over layers, the KV cache, chunked prefill, decode, and the one
place inside a token where host and device meet: after each layer's router the
expert ids come to the host, which loads what is missing. Called by `evals/`,
`sweep.py` and `scripts/`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hobbit_jax.cache.policies import DEFAULT_POLICY, PolicyFactory, Step, policy_factory
from hobbit_jax.cache.pool import PoolStats, SlotPool
from hobbit_jax.loading import LoadedModel
from hobbit_jax.model import KVCache, Routing
from hobbit_jax.moe import add_experts, apply_experts
from hobbit_jax.precision import SKIPPED, PrecisionPlan, demands, uniform_plan
from hobbit_jax.sampling import Sampling, sample
from hobbit_jax.store import HostExperts


@dataclass(frozen=True)
class RoutedLayer:
    """What one layer's router chose in one step, for those who watch (importance, traces)."""

    layer: int
    ids_TK: np.ndarray  # int32
    weights_TK: np.ndarray  # float32
    valid_T: np.ndarray  # bool; False is padding
    h_TD: jax.Array | None = None  # the experts' input, float32; in prefill and scoring only

    def by_expert(self) -> Iterator[tuple[int, jax.Array, jax.Array]]:
        """Each chosen expert with the tokens that chose it, int32 [R], and its weights, [R].

        Padded to a power of two with weights of 0, so that few programs are compiled.
        """
        valid_TK = np.broadcast_to(self.valid_T[:, None], self.ids_TK.shape)
        for expert in np.unique(self.ids_TK[valid_TK]).tolist():
            token_R, choice_R = np.nonzero((self.ids_TK == expert) & valid_TK)
            weight_R = self.weights_TK[token_R, choice_R]
            padding = (0, (1 << (len(token_R) - 1).bit_length()) - len(token_R))
            yield (
                expert,
                jnp.asarray(np.pad(token_R, padding), jnp.int32),
                jnp.asarray(np.pad(weight_R, padding)),
            )


@dataclass(frozen=True)
class StepStats:
    """Cost of one decode or prefill step."""

    seconds: float
    tokens: int
    hits: int
    misses: int
    bytes_moved: int


@partial(jax.jit, static_argnames="graph")
def _embed(graph, state, ids_BT: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).embed(ids_BT)


@partial(jax.jit, static_argnames="graph", donate_argnames=("x_BTD", "cache"))
def _attend_and_route(
    graph, state, x_BTD: jax.Array, positions_BT: jax.Array, cache: KVCache
) -> tuple[jax.Array, jax.Array, KVCache, Routing]:
    block = nnx.merge(graph, state)
    x_BTD, h_BTD, cache = block.attend(x_BTD, positions_BT, cache)
    h_TD = h_BTD.reshape(-1, h_BTD.shape[-1])
    return x_BTD, h_TD, cache, block.route(h_TD)


@partial(jax.jit, static_argnames="graph")
def _logits(graph, state, x_BTD: jax.Array, last_B: jax.Array | None) -> jax.Array:
    if last_B is not None:
        x_BTD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
    return nnx.merge(graph, state).logits(x_BTD)


class Engine:
    """A model, its experts, a precision plan and a pool, ready to run batches of sequences.

    Args:
        model: the loaded dense part and configuration.
        store: experts at every tier that `plan` uses.
        budget_bytes: bytes of the expert pool alone; None holds every expert of the plan.
        plan: who gets which tier; None is native throughout.
        policy: who is evicted, by name (`cache/policies`) or as a factory; one per bank.
        chunk_tokens: tokens of one prefill step, over all sequences.
        watch: called with every layer's routing, on the host.

    Raises:
        ValueError: the budget cannot hold one step's experts; says what it needs.
    """

    def __init__(
        self,
        model: LoadedModel,
        store: HostExperts,
        budget_bytes: int | None = None,
        plan: PrecisionPlan | None = None,
        policy: str | PolicyFactory = DEFAULT_POLICY,
        chunk_tokens: int = 2048,
        watch: Callable[[RoutedLayer], None] | None = None,
    ):
        self.model, self.config, self.store = model, model.config, store
        self.plan = uniform_plan(store) if plan is None else plan
        self.chunk_tokens, self.watch = chunk_tokens, watch
        wanted = demands(self.plan, store)
        if budget_bytes is None:
            budget_bytes = sum(d.expert_bytes * d.n_experts for d in wanted)
        self.pool = SlotPool(store, wanted, budget_bytes, policy_factory(policy))
        self._blocks = [nnx.split(block) for block in model.blocks]
        self._ends = nnx.split(model.ends)
        self._caches: list[KVCache] = []
        self._lengths_B = np.zeros(0, np.int32)
        self._steps = 0

    def start(self, batch: int, context: int) -> None:
        """Forgets all sequences and makes room for `batch` new ones of up to `context` tokens.

        Raises:
            ValueError: `context` exceeds what the model was made for.
        """
        if context > self.config.context_length:
            raise ValueError(
                f"{context} tokens exceed the model's context of {self.config.context_length}"
            )
        shape = (batch, context, self.config.n_kv_heads, self.config.head_dim)
        self._caches = [
            KVCache(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(self.config.n_layers)
        ]
        self._lengths_B = np.zeros(batch, np.int32)

    @property
    def kv_cache_bytes(self) -> int:
        """Device bytes of the current sequences' keys and values."""
        return sum(array.nbytes for array in jax.tree.leaves(self._caches))

    def _step(self, ids_BT: np.ndarray, n_new_B: np.ndarray) -> jax.Array:
        """Appends the first `n_new_B` tokens of each row; residual stream [B, T, D]."""
        batch, tokens = ids_BT.shape
        context = self._caches[0].k_BCGd.shape[1]
        if (self._lengths_B + n_new_B).max(initial=0) > context:
            raise ValueError(
                f"{int((self._lengths_B + n_new_B).max())} tokens exceed the {context} started with"
            )
        offsets_BT = np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, tokens))
        valid_BT = offsets_BT < n_new_B[:, None]
        # Padding stands at position C, which the KV cache drops.
        positions_BT = np.where(valid_BT, self._lengths_B[:, None] + offsets_BT, context)
        valid_T = valid_BT.reshape(-1)

        x_BTD = _embed(*self._ends, np.asarray(ids_BT, np.int32))
        for layer, (graph, state) in enumerate(self._blocks):
            x_BTD, h_TD, self._caches[layer], routing = _attend_and_route(
                graph, state, x_BTD, positions_BT.astype(np.int32), self._caches[layer]
            )
            ids_TK, weights_TK = jax.device_get((routing.ids, routing.weights))
            if self.watch is not None:
                self.watch(RoutedLayer(layer, ids_TK, weights_TK, valid_T, h_TD))
            self.pool.begin_step(Step(self._steps, layer, int(self._lengths_B.max())))
            tier_TK = self.plan.assign(layer, ids_TK, weights_TK)
            tier_TK = np.where(valid_T[:, None], tier_TK, np.int8(SKIPPED))
            y_AD = apply_experts(
                self.pool, layer, h_TD, routing.weights, ids_TK, tier_TK, self.model.implementation
            )
            x_BTD = add_experts(x_BTD, y_AD)
        self._lengths_B = self._lengths_B + n_new_B.astype(np.int32)
        self._steps += 1
        return x_BTD

    def prefill(self, prompts: Sequence[Sequence[int]]) -> jax.Array:
        """Appends one prompt per sequence, in chunks; float32 logits [B, V] of each last token."""
        lengths_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
        if len(lengths_B) != len(self._lengths_B) or lengths_B.min(initial=1) < 1:
            raise ValueError(
                f"got prompts of lengths {lengths_B.tolist()}; want {len(self._lengths_B)} "
                "prompts of at least one token"
            )
        longest = int(lengths_B.max())
        ids_BT = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)] = prompt
        chunk = max(1, self.chunk_tokens // len(prompts))
        logits_BV: jax.Array | None = None
        for start in range(0, longest, chunk):
            part_BT = _pad_tokens(ids_BT[:, start : start + chunk], chunk)
            n_new_B = np.clip(lengths_B - start, 0, chunk).astype(np.int32)
            x_BTD = self._step(part_BT, n_new_B)
            new_BV = _logits(*self._ends, x_BTD, np.maximum(n_new_B - 1, 0))
            ended_B = (n_new_B > 0)[:, None]
            logits_BV = new_BV if logits_BV is None else jnp.where(ended_B, new_BV, logits_BV)
        assert logits_BV is not None
        return logits_BV

    def decode(self, ids_B: np.ndarray, active_B: np.ndarray | None = None) -> jax.Array:
        """Appends one token to each active sequence; float32 logits [B, V]."""
        n_new_B = np.ones(len(ids_B), np.int32) if active_B is None else active_B.astype(np.int32)
        x_BTD = self._step(np.asarray(ids_B, np.int32)[:, None], n_new_B)
        return _logits(*self._ends, x_BTD, np.zeros(len(ids_B), np.int32))

    def score(self, ids_BT: np.ndarray) -> jax.Array:
        """Teacher-forced float32 logits [B, T, V] of fresh sequences, all of length T."""
        batch, tokens = ids_BT.shape
        self.start(batch, tokens)
        chunk = max(1, self.chunk_tokens // batch)
        parts = []
        for start in range(0, tokens, chunk):
            part_BT = ids_BT[:, start : start + chunk]
            n_new_B = np.full(batch, part_BT.shape[1], np.int32)
            x_BTD = self._step(_pad_tokens(part_BT, chunk), n_new_B)
            parts.append(_logits(*self._ends, x_BTD, None)[:, : part_BT.shape[1]])
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop_ids: Sequence[int] = (),
    ) -> Iterator[tuple[np.ndarray, StepStats]]:
        """Yields int32 [B] per step, -1 for sequences that have ended, until all have.

        A stop token ends its sequence and is not yielded. The first step's cost
        is the prefill's.
        """
        self.start(len(prompts), max(map(len, prompts), default=0) + max_new_tokens)
        key = jax.random.key(sampling.seed)
        active_B = np.ones(len(prompts), bool)
        before, began = _counts(self.pool.stats), time.perf_counter()
        logits_BV, tokens = self.prefill(prompts), sum(map(len, prompts))
        for step in range(max_new_tokens):
            ids_B = np.asarray(sample(logits_BV, jax.random.fold_in(key, step), sampling))
            active_B &= ~np.isin(ids_B, list(stop_ids))
            after, now = _counts(self.pool.stats), time.perf_counter()
            hits, misses, moved = (b - a for a, b in zip(before, after, strict=True))
            if not active_B.any():
                return
            yield np.where(active_B, ids_B, -1), StepStats(now - began, tokens, hits, misses, moved)
            if step + 1 < max_new_tokens:
                before, began, tokens = _counts(self.pool.stats), time.perf_counter(), 0
                tokens = int(active_B.sum())
                logits_BV = self.decode(ids_B, active_B)


def _counts(stats: PoolStats) -> tuple[int, int, int]:
    return int(stats.hits.sum()), int(stats.misses.sum()), stats.bytes_moved


def _pad_tokens(ids_BT: np.ndarray, chunk: int) -> np.ndarray:
    """Pads the token axis to a power of two up to `chunk`, so that few shapes are compiled."""
    tokens = ids_BT.shape[1]
    width = min(chunk, 1 << (tokens - 1).bit_length())
    return np.pad(ids_BT, ((0, 0), (0, width - tokens)))
