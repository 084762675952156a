"""The engine: tokens in, logits or text out, with experts streamed through the slot pool.

Owns the sequences and decode: it enters the decode program (`decode_loop.py`), reads its one
report, tells the policies what was used, loads what is missing and enters again.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hobbit_jax.cache.adaptive_split import AdaptiveSplit, candidates
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout, Decision, Observer, uses_of
from hobbit_jax.cache.miss_modes import miss_mode
from hobbit_jax.cache.policies import Step
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.cache.pool_sizing import ADAPTIVE, pool_slots
from hobbit_jax.cache.prefetch import Prefetcher
from hobbit_jax.cache.selection import RouterOutput
from hobbit_jax.experts.precision import SKIPPED, uniform_plan
from hobbit_jax.experts.store import ExpertKey, HostExperts
from hobbit_jax.inference.compile_clock import compile_seconds
from hobbit_jax.inference.decode_loop import (
    Carry,
    Inputs,
    LayerGroups,
    LoopSpec,
    Program,
    Weights,
    decode_program,
    empty_carry,
    item_width,
    with_outputs,
)
from hobbit_jax.inference.decode_report import Report
from hobbit_jax.inference.host_compute import HostCompute, HostOutputs
from hobbit_jax.inference.moe import by_expert
from hobbit_jax.inference.prefill import Prefill, chunks, describe_non_finite, finite_BT, logits
from hobbit_jax.inference.sampling import Sampling, sample, seed_key
from hobbit_jax.models.caches import Caches, empty_caches
from hobbit_jax.models.loading import LoadedModel
from hobbit_jax.models.sharding import expert_mesh, replicated

GREEDY = Sampling()
DEFAULT_CACHE = CacheConfig()


@dataclass(frozen=True)
class StepStats:
    """Cost of one decode or prefill step.

    Where one call gave several tokens, the first carries the cost and the others zeros.
    """

    seconds: float = 0.0
    compile_seconds: float = 0.0  # of `seconds`
    tokens: int = 0  # that were fed


@dataclass(frozen=True)
class Prefix:
    """Tokens that sequences begin with, and what an engine keeps of them."""

    ids: Sequence[int]
    caches: Caches  # of one sequence, with room for these tokens

    def rest(self, prompt: Sequence[int]) -> Sequence[int]:
        """What a prompt has after it; ValueError if it does not begin so, or ends there."""
        known = len(self.ids)
        if list(prompt[:known]) != list(self.ids) or len(prompt) == known:
            raise ValueError(
                f"want a prompt that begins with the prefix of {known} tokens and goes on after it"
            )
        return prompt[known:]


class Engine:
    """A model, its experts and their cache, ready to run batches of sequences.

    Args:
        model: the loaded dense part and configuration.
        store: experts at every precision that the plan of `cache` uses.
        cache: what is kept on the device, and what happens to a selection that is not.
        executor: makes the pool; `partial(SlotPool, link=...)` emulates a link.
        observers: told of what routers choose and of every decision, after the cache's own.

    Raises:
        ValueError: the budget cannot hold one step's experts; says what it needs.
    """

    def __init__(
        self,
        model: LoadedModel,
        store: HostExperts,
        cache: CacheConfig = DEFAULT_CACHE,
        executor: Callable[..., SlotPool] = SlotPool,
        observers: Sequence[Observer] = (),
    ):
        self._mesh = mesh = expert_mesh(cache.devices)
        self.model, self.config, self.store = model.on(mesh), model.config, store
        self.plan = uniform_plan(store) if cache.plan is None else cache.plan
        self.cache, self.mode = cache, miss_mode(cache.mode)
        layout = BankLayout.of_store(store, cache.devices)
        shares_pLE = self.plan.shares_pLE(layout.shape_pLE)
        slots, total = pool_slots(
            shares_pLE, self.mode, layout, cache.budget_bytes, cache.low_share
        )
        staging_bytes = cache.staging_bytes
        if staging_bytes is None:
            staging_bytes = self.config.experts_per_token * store.largest_expert_bytes
        self.controller = cache.controller(layout, slots)
        self.counts = self.controller.counts
        self.pool = executor(
            store, self.controller, total if cache.budget_bytes is None else cache.budget_bytes,
            staging_bytes=staging_bytes, mesh=mesh, implementation=model.implementation,
        )  # fmt: skip
        cache.fill(self.pool, shares_pLE)
        self._look_ahead = cache.prefetch.layers_asked if cache.prefetch else 0
        self._prefetcher, self.split = None, None
        if cache.prefetch is not None:
            self._prefetcher = Prefetcher(cache.prefetch, layout.n_layers, layout.n_experts)
            self.controller.observers.append(self._prefetcher)
        if cache.low_share == ADAPTIVE and self.mode.low_banks == "cache":
            divisions = candidates(self.pool, cache, shares_pLE)
            self.split = AdaptiveSplit(self.pool, divisions, cache, shares_pLE)
            self.controller.observers.append(self.split)
        self.controller.observers += observers
        ends_graph, ends_state = nnx.split(self.model.ends)
        device_plan = replicated(jax.device_put(self.plan), mesh)
        epilogue = replicated(jax.device_put(store.epilogue), mesh)
        weights = Weights(self.model.layers.states, ends_state, device_plan, epilogue)
        self._arrays, self._structure = jax.tree.flatten(weights)
        self._ends, self._ends_graph = ends_state, ends_graph
        self._experts = LayerGroups.of(self.pool, model.implementation)
        self._host = HostCompute(store, model.implementation)
        self._prefill = Prefill(self.model, self.pool, self.plan, self._host, epilogue)
        self._programs: dict[tuple[float, float, int], Program] = {}
        self._carry: Carry | None = None
        self._key = np.asarray(jax.random.key_data(seed_key(0)))
        self._lengths_B = np.zeros(0, np.int32)
        self._ids: list[list[int]] = []  # of each sequence so far
        self._tokens = 0  # decoded tokens and prefill chunks so far, for the policies

    def start(self, batch: int, context: int, prefix: Prefix | None = None) -> None:
        """Forgets all sequences and makes room for `batch` new ones of up to `context` tokens.

        All begin with the tokens of `prefix`, if one is given.

        Raises:
            ValueError: `context` exceeds what the model was made for.
        """
        if context > self.config.context_length:
            raise ValueError(
                f"{context} tokens exceed the model's context of {self.config.context_length}"
            )
        self.pool.drop_prefetched()
        self.controller.begin_sequences()
        self._carry = None  # before the new caches are made: only one set may be on the device
        self._carry = empty_carry(self.config, batch, context, self._mesh, self.cache.kv_format)
        ids = [] if prefix is None else prefix.ids
        if prefix is not None:
            caches = self._carry.caches.begun_with(prefix.caches)
            self._carry = self._carry._replace(caches=caches)
        self._lengths_B = np.full(batch, len(ids), np.int32)
        self._ids = [list(ids) for _ in range(batch)]

    def _shrink(self, active_B: np.ndarray, least_batch: int) -> np.ndarray:
        """Forgets sequences that have ended, so that a step costs less; the rows that stay.

        They are a power of two, and `least_batch` at least, if there are so many.
        """
        size = max(1 << (int(active_B.sum()) - 1).bit_length(), least_batch)
        rows_R = np.sort(np.argsort(~active_B, kind="stable")[:size]).astype(np.int32)
        if len(rows_R) == len(active_B):
            return rows_R
        carry, self._carry = self._started(), None
        caches = carry.caches.of(rows_R)
        del carry  # its caches are larger than what follows
        new = empty_carry(self.config, len(rows_R), 0, self._mesh, self.cache.kv_format)
        self._carry = new._replace(caches=caches)
        self._lengths_B = self._lengths_B[rows_R]
        self._ids = [self._ids[row] for row in rows_R]
        return rows_R

    def read_prefix(self, ids: Sequence[int]) -> Prefix:
        """Runs tokens that many sequences begin with, so that `generate` need not run them again.

        Forgets all sequences.
        """
        self.start(1, len(ids))
        for part_BT, n_new_B, _ in chunks([ids], self.cache.chunk_tokens):
            self._append(part_BT, n_new_B)
        carry, self._carry = self._started(), None
        return Prefix(ids, carry.caches)

    def _started(self) -> Carry:
        if self._carry is None:
            raise RuntimeError(
                "no sequences, or a step of theirs failed half-way: call start first"
            )
        return self._carry

    @property
    def serves_by_residency(self) -> bool:
        """Whether results depend on what is resident, and so on what ran before."""
        return self.mode.low_banks != "none" or self.cache.resident_lift > 0

    @property
    def kv_cache_bytes(self) -> int:
        """Device bytes of the current sequences' keys and values."""
        return 0 if self._carry is None else self._carry.caches.nbytes

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Tells `observer` too of what happens inside the block."""
        self.controller.observers.append(observer)
        try:
            yield
        finally:
            self.controller.observers.remove(observer)

    def _check_step(self, n_new_B: np.ndarray, ids: np.ndarray) -> None:
        if self.model.mapped_bytes:
            # Past the end of a file that was cut short a program would end the process.
            for precision in range(len(self.store.precisions)):
                self.store.check_unchanged(precision)
        context = self._started().caches.context
        longest = int((self._lengths_B + n_new_B).max(initial=0))
        if longest > context:
            raise ValueError(f"{longest} tokens exceed the {context} started with")
        # Compiled programs would take another token in the place of one that does not exist.
        least, most = ids.min(initial=0), ids.max(initial=0)
        if least < 0 or most >= self.config.vocab_size:
            raise ValueError(
                f"token id {least if least < 0 else most}; want 0 to {self.config.vocab_size - 1}"
            )

    def _append(self, ids_BT: np.ndarray, n_new_B: np.ndarray) -> jax.Array:
        """Appends the first `n_new_B` tokens of each row; residual stream [B, T, D]."""
        self._check_step(n_new_B, ids_BT)
        # Until all layers are done there is no sequence to go on with.
        carry, self._carry = self._started(), None
        x_BTD, caches = self._prefill.append(
            carry.caches, ids_BT, self._lengths_B, n_new_B, self._tokens
        )
        self._carry = carry._replace(caches=caches)
        self._lengths_B = self._lengths_B + n_new_B.astype(np.int32)
        for sequence, row_T, n_new in zip(self._ids, ids_BT, n_new_B, strict=True):
            sequence += row_T[:n_new].tolist()
        self._tokens += 1
        return x_BTD

    def _logits(self, x_BTD: jax.Array, last_B: np.ndarray | None) -> jax.Array:
        return logits(self._ends_graph, self._ends, x_BTD, last_B)

    def _check_finite(self, finite: bool | np.bool_) -> None:
        """Ends a run whose logits are not finite by a ValueError that names where that began."""
        if finite:
            return
        self._carry, longest = None, max(map(len, self._ids))
        caches = empty_caches(self.config, len(self._ids), longest, self.cache.kv_format)
        caches = replicated(caches, self._mesh)
        chunk_tokens = self.cache.chunk_tokens
        raise ValueError(describe_non_finite(self._prefill, caches, self._ids, chunk_tokens))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> jax.Array:
        """Appends one prompt per sequence, in chunks; float32 logits [B, V] of each last token."""
        lengths_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
        if len(lengths_B) != len(self._lengths_B) or lengths_B.min(initial=1) < 1:
            raise ValueError(
                f"got prompts of lengths {lengths_B.tolist()}; want {len(self._lengths_B)} "
                "prompts of at least one token"
            )
        logits_BV: jax.Array | None = None
        for part_BT, n_new_B, _ in chunks(prompts, self.cache.chunk_tokens):
            x_BTD = self._append(part_BT, n_new_B)
            new_BV = self._logits(x_BTD, np.maximum(n_new_B - 1, 0))
            ended_B = (n_new_B > 0)[:, None]
            logits_BV = new_BV if logits_BV is None else jnp.where(ended_B, new_BV, logits_BV)
        assert logits_BV is not None
        self._check_finite(np.asarray(finite_BT(logits_BV)).all())
        return logits_BV

    def score(self, ids_BT: np.ndarray) -> jax.Array:
        """Teacher-forced float32 logits [B, T, V] of fresh sequences, all of length T."""
        parts = list(self.score_parts(ids_BT))
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def score_parts(self, ids_BT: np.ndarray) -> Iterator[jax.Array]:
        """`score` in parts of up to `chunk_tokens` along T, so that not all have to be held."""
        self.start(*ids_BT.shape)
        for part_BT, n_new_B, _ in chunks(ids_BT.tolist(), self.cache.chunk_tokens):
            x_BTD = self._append(part_BT, n_new_B)
            logits_BTV = self._logits(x_BTD, None)[:, : n_new_B[0]]
            self._check_finite(np.asarray(finite_BT(logits_BTV)).all())
            yield logits_BTV

    def decode(self, ids_B: np.ndarray, active_B: np.ndarray | None = None) -> jax.Array:
        """Appends one token to each active sequence; float32 logits [B, V]."""
        if active_B is None:
            active_B = np.ones(len(ids_B), bool)
        return self._decode(np.asarray(ids_B, np.int32), active_B, 1, 1)[1]

    def _decode(
        self,
        ids_B: np.ndarray,
        active_B: np.ndarray,
        count: int,
        most_tokens: int,
        sampling: Sampling = GREEDY,
        drawn: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> tuple[np.ndarray, jax.Array]:
        """Appends `ids_B` and then the tokens drawn, `count` in all or until no sequence is left.

        Returns the tokens drawn, [N, B], and the logits of the last one.

        The program is compiled for `most_tokens`, and the number of tokens `drawn` before seeds the
        draws.
        """
        self._check_step(active_B * count, ids_B[active_B])
        program, k = self._program(sampling, most_tokens), self.config.experts_per_token
        stops = np.asarray(stop_ids, np.int32)
        rows: list[np.ndarray] = []
        batches: list[list[ExpertKey]] = []
        logits_BV, active_B, fresh = None, active_B.copy(), True
        try:
            while True:
                inputs = Inputs(
                    np.bool_(fresh), ids_B, active_B, self._lengths_B,
                    np.int32(count - len(rows)), np.int32(drawn + len(rows)), self._key, stops,
                )  # fmt: skip
                self._carry, packed, logits_BV = program(
                    self._arrays, self.pool.banks, self.pool.table_UE, self._started(), inputs
                )
                for key in self.controller.take_wanted():
                    self.pool.reserve(key)
                if fresh and self._prefetcher is not None:
                    self.pool.prefetch(self._prefetcher.guess(-1, [], self.pool.__contains__))
                # The one transfer from the device in a call.
                report = Report.unpack(
                    np.asarray(packed), most_tokens, len(ids_B), k, self._look_ahead
                )
                decision = self._account(report)
                if decision is not None:
                    batches = list(decision.batches)
                for drawn_B in report.tokens_NB:
                    self._append_ids(ids_B, active_B)
                    ids_B, active_B = drawn_B, active_B & ~np.isin(drawn_B, stops)
                rows += list(report.tokens_NB)
                self._check_finite(report.finite)
                if not report.blocked:
                    break
                self._serve(report, decision, batches)
                fresh = False
        except BaseException:
            # The token is half done; what the pool holds is whole.
            self._carry = None
            raise
        self.controller.end_tokens(len(rows))
        self.pool.promote()
        return np.stack(rows), logits_BV

    def _append_ids(self, ids_B: np.ndarray, active_B: np.ndarray) -> None:
        for row in np.flatnonzero(active_B):
            self._ids[row].append(int(ids_B[row]))
        self._lengths_B = self._lengths_B + active_B
        self.counts.tokens += int(active_B.sum())

    def _program(self, sampling: Sampling, most_tokens: int) -> Program:
        """Of these, kept, since hashing a `LoopSpec` takes 40 microseconds for every token."""
        key = sampling.temperature, sampling.top_p, most_tokens
        if key not in self._programs:
            self._programs[key] = decode_program(self._loop_spec(sampling, most_tokens))
        return self._programs[key]

    def _loop_spec(self, sampling: Sampling, most_tokens: int) -> LoopSpec:
        unseeded = replace(sampling, seed=0)  # the seed is data: key
        return LoopSpec(
            self.config, self.model.layers.kinds, self._ends_graph, self._experts, self.mode,
            unseeded, most_tokens, self._structure, self._look_ahead, self._mesh,
            self.cache.resident_lift,
        )  # fmt: skip

    def _serve(
        self, report: Report, decision: Decision | None, batches: list[list[ExpertKey]]
    ) -> None:
        """Loads the next batch that a layer waits for, and computes what is left to the CPU."""
        self.counts.host_round_trips += 1
        outputs: HostOutputs | None = None
        if decision is not None and decision.computed:
            ids_TK, weights_TK, _, served_TK = (array[-1] for array in report.chosen)
            width = item_width(len(ids_TK), ids_TK.shape[1], self.config.n_experts)
            outputs = self._host.run(
                decision.computed, by_expert(decision.step.layer, ids_TK, served_TK),
                {self.store.signature(key): width for key in decision.computed},
                self._started().h_BD, weights_TK,
            )  # fmt: skip
        if batches:
            upcoming: list[ExpertKey] = []
            if self._prefetcher is not None:
                resident = self.pool.__contains__
                upcoming = self._prefetcher.guess(report.layer, report.ahead(), resident)
            self.pool.load(batches.pop(0), upcoming=upcoming)
        elif outputs is None:
            raise RuntimeError(f"layer {report.layer} waits for experts that are resident")
        if outputs is not None:
            where_H, y_HD = outputs()
            self._carry = with_outputs(self._started(), where_H, y_HD, self._mesh)

    def _account(self, report: Report) -> Decision | None:
        """Has the controller decide on what a call's layers used; the decision on the last one."""
        self.controller.count_selections(report.chosen.requested_TK, report.chosen.served_TK)
        longest = int(self._lengths_B.max())
        decision: Decision | None = None
        routing_observers = self.controller.routing_observers()
        for token, layer, chosen in report.logged(self.config.n_layers):
            for observer in routing_observers:
                valid_B = (chosen.requested_TK != SKIPPED).any(axis=1)
                routed = RouterOutput(layer, chosen.ids_TK, chosen.weights_TK, valid_B)
                observer.after_routing(routed)
            step = Step(self._tokens + token, layer, longest + token)
            decision = self.controller.decide(step, *uses_of(layer, chosen))
            self.pool.begin(decision)
        self._tokens += report.steps
        return decision

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_ids: Sequence[int] = (),
        tokens_per_call: int = 1,
        context: int | None = None,
        prefix: Prefix | None = None,
        least_batch: int | None = None,
    ) -> Iterator[tuple[np.ndarray, StepStats]]:
        """Yields int32 [B] per step, -1 for sequences that have ended, until all have.

        A stop token ends its sequence and is not yielded. The first step's cost is the prefill's.
        As sequences end, the others go on as a smaller batch, of a power of two and `least_batch`
        at least; a program is compiled for each size, and tokens drawn at random depend on the
        batch. None keeps the batch.
        With several `tokens_per_call`, the device decodes so many between two looks of the host;
        the tokens are the same, they arrive together, and the first carries the cost of all.
        `context` makes room for so many tokens, so that calls of all lengths share one program;
        None for what these prompts need. Of `prefix`, with which all prompts must begin, nothing is
        computed again. Results are those without it but for rounding, and for what serves a
        selection where that depends on what is resident.

        Raises:
            ValueError: a prompt that does not go on after `prefix`, or no token to generate.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; want at least 1")
        needed = max(map(len, prompts), default=0) + max_new_tokens
        rest = prompts if prefix is None else [prefix.rest(prompt) for prompt in prompts]
        self.start(len(prompts), needed if context is None else context, prefix)
        self._key = np.asarray(jax.random.key_data(key := seed_key(sampling.seed)))
        active_B, place_B = np.ones(len(prompts), bool), np.arange(len(prompts))
        began_s, compiled_s = time.perf_counter(), compile_seconds()
        logits_BV, fed = self.prefill(rest), sum(map(len, rest))
        ids_B = np.asarray(sample(logits_BV, jax.random.fold_in(key, 0), sampling))
        rows_NB, drawn = ids_B[None], 1
        while True:
            seconds, compile_s = time.perf_counter() - began_s, compile_seconds() - compiled_s
            cost = StepStats(seconds, compile_s, fed)
            for ids_B in rows_NB:
                active_B = active_B & ~np.isin(ids_B, list(stop_ids))
                if not active_B.any():
                    return
                tokens_B = np.full(len(prompts), -1, np.int32)
                tokens_B[place_B[active_B]] = ids_B[active_B]
                yield tokens_B, cost
                cost = StepStats()
            if drawn == max_new_tokens:
                return
            if least_batch is not None:
                rows_R = self._shrink(active_B, least_batch)
                ids_B, place_B, active_B = (a[rows_R] for a in (ids_B, place_B, active_B))
            began_s, compiled_s = time.perf_counter(), compile_seconds()
            count = min(tokens_per_call, max_new_tokens - drawn)
            before = self.counts.tokens
            rows_NB, _ = self._decode(
                ids_B, active_B, count, tokens_per_call, sampling, drawn, stop_ids
            )
            drawn, fed = drawn + len(rows_NB), self.counts.tokens - before
