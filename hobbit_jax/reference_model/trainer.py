"""The training loop of the reference model: a dense-weight twin of the served model.

Owns the differentiable expert dispatch, the optimiser and resumable progress. Blocks and ends are
those of `hobbit_jax/models/` with F32 planes; only the experts differ, because training needs
gradients through all of them at once.
"""

import json
import math
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon
from tqdm import tqdm

from hobbit_jax.models.caches import empty_caches
from hobbit_jax.models.config import ModelConfig, block_shapes
from hobbit_jax.models.layer import Block, OneBlock, attend_and_route
from hobbit_jax.models.modules import EmbeddingAndHead, Linear, RMSNorm
from hobbit_jax.reference_model.corpus import SEED, Batches, Phase

_MUON_LEARNING_RATE, _ADAM_LEARNING_RATE = 0.02, 3e-3
_WARMUP_STEPS = 40  # of each phase
_BALANCE_WEIGHT = 0.01  # of the router's balance in the loss
_CAPACITY_FACTOR = 1.5  # room of an expert, over its mean load
_CHECKPOINT_EVERY, _EVALUATE_EVERY = 50, 100  # steps


@jax.custom_vjp
def _take_rows(x_RD: jax.Array, take_S: jax.Array, back_RN: jax.Array) -> jax.Array:
    """x[take], with index R reading zeros; `back` lists, per row of x, where it went.

    Its gradient is a gather as well, for XLA's scatter-add on a CPU costs more than the experts.
    """
    del back_RN
    return jnp.take(x_RD, take_S, axis=0, mode="fill", fill_value=0)


def _take_rows_forward(x_RD, take_S, back_RN):
    return _take_rows(x_RD, take_S, back_RN), back_RN


def _take_rows_backward(back_RN, grad_SD):
    gathered = jnp.take(grad_SD, back_RN, axis=0, mode="fill", fill_value=0)
    return jnp.sum(gathered, axis=1), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


class DenseExperts(nnx.Module):
    """All experts of a layer in float32, dispatched by sorting tokens into fixed capacities."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        n, d, f = config.n_experts, config.d_model, config.d_expert
        self.gate_EFD = nnx.Param(jax.random.normal(rngs.params(), (n, f, d)) * d**-0.5)
        self.up_EFD = nnx.Param(jax.random.normal(rngs.params(), (n, f, d)) * d**-0.5)
        self.down_EDF = nnx.Param(jnp.zeros((n, d, f)))

    def __call__(
        self, h_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, capacity: int
    ) -> jax.Array:
        """Weighted sum of each token's experts; assignments beyond an expert's capacity drop."""
        tokens, k = ids_TK.shape
        n_experts = self.gate_EFD.shape[0]
        flat_A = ids_TK.reshape(-1)
        order_A = jnp.argsort(flat_A, stable=True)
        rank_A = jnp.argsort(order_A, stable=True)
        count_E = jnp.sum(flat_A[:, None] == jnp.arange(n_experts)[None, :], axis=0)
        start_E = jnp.cumsum(count_E) - count_E
        place_A = rank_A - start_E[flat_A]
        n_slots = n_experts * capacity
        slot_A = jnp.where(place_A < capacity, flat_A * capacity + place_A, n_slots)
        place_EC = jnp.arange(capacity)[None, :]
        sorted_EC = jnp.minimum(start_E[:, None] + place_EC, tokens * k - 1)
        used_EC = place_EC < count_E[:, None]
        assignment_S = jnp.where(used_EC, order_A[sorted_EC], tokens * k).reshape(-1)
        token_S = jnp.where(used_EC, order_A[sorted_EC] // k, tokens).reshape(-1)

        x_ECD = _take_rows(h_TD, token_S, slot_A.reshape(tokens, k))
        x_ECD = x_ECD.reshape(n_experts, capacity, -1)
        gate = jnp.einsum("ecd,efd->ecf", x_ECD, self.gate_EFD[...])
        up = jnp.einsum("ecd,efd->ecf", x_ECD, self.up_EFD[...])
        y_ECD = jnp.einsum("ecf,edf->ecd", jax.nn.silu(gate) * up, self.down_EDF[...])
        y_AD = _take_rows(y_ECD.reshape(n_slots, -1), slot_A, assignment_S[:, None])
        return jnp.einsum("tkd,tk->td", y_AD.reshape(tokens, k, -1), weights_TK)


class _FreshWeights:
    """A block's parts before training; see `modules.BlockWeights`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self._shapes, self._rms_eps, self._rngs = block_shapes(config, 0), config.rms_eps, rngs

    def linear(self, role: str) -> Linear:
        n_out, n_in = self._shapes[role]
        # A block adds nothing at first.
        return _linear(self._rngs, n_out, n_in, 0.0 if role == "attn_output" else n_in**-0.5)

    def router(self) -> Linear:
        n_experts, d_model = self._shapes["router"]
        return _linear(self._rngs, n_experts, d_model, 0.02)

    def of_heads(self, role: str) -> Linear:
        raise NotImplementedError(f"{role}: supported is training of grouped-query attention")

    def norm(self, role: str) -> RMSNorm:
        return RMSNorm(self.array(role), self._rms_eps)

    def array(self, role: str) -> jax.Array:
        return jnp.ones(self._shapes[role])


def _linear(rngs: nnx.Rngs, n_out: int, n_in: int, std: float) -> Linear:
    return Linear("F32", {"weights": jax.random.normal(rngs.params(), (n_out, n_in)) * std})


class TrainableModel(nnx.Module):
    """The served model's modules with F32 planes, plus dense experts."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, d = config, config.d_model
        weights, n_blocks = _FreshWeights(config, rngs), config.n_blocks
        self.blocks = nnx.List([Block(config, number, weights) for number in range(n_blocks)])
        self.experts = nnx.List([DenseExperts(config, rngs) for _ in range(n_blocks)])
        embedding = _linear(rngs, config.vocab_size, d, 0.02)
        norm = RMSNorm(jnp.ones(d), config.rms_eps)
        self.ends = EmbeddingAndHead(config, embedding, norm, head=None)

    def __call__(self, ids_BT: jax.Array):
        """Returns float32 logits [B, T, V], the balance loss, and expert shares [L, E]."""
        config = self.config
        batch, tokens = ids_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(tokens)[None, :], (batch, tokens))
        mean_load = batch * tokens * config.experts_per_token / config.n_experts
        capacity = math.ceil(mean_load * _CAPACITY_FACTOR / 8) * 8
        x_BTD, balance, shares = self.ends.embed(ids_BT), 0.0, []
        caches = empty_caches(config, batch, tokens)
        for number, (block, experts) in enumerate(zip(self.blocks, self.experts, strict=True)):
            at = OneBlock(block, config.state_places[number])
            (x_BTD, h_TD, routing), caches = attend_and_route(at, caches, x_BTD, positions_BT)
            chosen_E = jnp.sum(jax.nn.one_hot(routing.ids, config.n_experts), axis=(0, 1))
            share_E = chosen_E / jnp.sum(chosen_E)
            mean_E = jnp.mean(block.expert_router.scores(h_TD), axis=0)
            balance += config.n_experts * jnp.sum(jax.lax.stop_gradient(share_E) * mean_E)
            shares.append(share_E)
            y_TD = experts(h_TD, routing.ids, routing.weights, capacity)
            x_BTD = x_BTD + y_TD.reshape(x_BTD.shape)
        return self.ends.logits(x_BTD), balance / config.n_layers, jnp.stack(shares)


def _optimizer(phases: tuple[Phase, ...]) -> optax.GradientTransformation:
    """Muon for hidden matrices, Adam for the rest; each phase warms up and decays to zero."""

    def schedule(peak: float):
        pieces, boundaries, end = [], [], 0
        for phase in phases:
            top, warmup = peak * phase.learning_rate, min(_WARMUP_STEPS, phase.steps // 2)
            pieces += [
                optax.schedules.linear_schedule(0.0, top, warmup),
                optax.schedules.linear_schedule(top, 0.0, phase.steps - warmup),
            ]
            boundaries += [end + warmup, end + phase.steps]
            end += phase.steps
        return optax.schedules.join_schedules(pieces, boundaries[:-1])

    def dimension_numbers(params):
        def of(path, leaf):
            name = jax.tree_util.keystr(path)
            if leaf.ndim < 2 or "router" in name or "embedding" in name:
                return None
            return MuonDimensionNumbers(reduction_axis=leaf.ndim - 1, output_axis=leaf.ndim - 2)

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(_MUON_LEARNING_RATE),
            adam_learning_rate=schedule(_ADAM_LEARNING_RATE),
            adam_b2=0.98,
            # Preconditioning buys back one of the five Newton-Schulz steps (arXiv 2512.04632).
            ns_steps=4,
            preconditioning="aol",
            muon_weight_dimension_numbers=dimension_numbers,
        ),
    )


def train(
    config: ModelConfig, batches: Batches, held_out_ids: np.ndarray, workdir: Path
) -> TrainableModel:
    """Runs all phases of `batches`, from the newest checkpoint in `workdir` if there is one.

    The loss on `held_out_ids`, int32 [windows, CONTEXT + 1], is watched. Loss rows go to
    `workdir`/loss.jsonl, one JSON object a line.
    """
    optimizer = _optimizer(batches.phases)
    graph, params = nnx.split(TrainableModel(config, nnx.Rngs(params=SEED)))
    state = {"params": params, "opt_state": optimizer.init(params)}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    manager = ocp.CheckpointManager(workdir.resolve() / "checkpoints", options=options)
    first = manager.latest_step() or 0
    if first:
        state = manager.restore(first, args=ocp.args.StandardRestore(state))

    def loss(params, ids_BS):
        logits, balance, shares = nnx.merge(graph, params)(ids_BS[:, :-1])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, ids_BS[:, 1:]).mean()
        return nll + _BALANCE_WEIGHT * balance, (nll, shares)

    @partial(jax.jit, donate_argnums=0)
    def update(state, ids_BS):
        (_, (nll, _)), grads = jax.value_and_grad(loss, has_aux=True)(state["params"], ids_BS)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, nll

    evaluate = jax.jit(lambda params, ids_BS: loss(params, ids_BS)[1])
    began, last = time.monotonic(), sum(phase.steps for phase in batches.phases)
    steps = tqdm(
        range(first + 1, last + 1), initial=first, total=last, desc="training", disable=None
    )
    with (workdir / "loss.jsonl").open("a") as log:
        for step in steps:
            state, nll = update(state, batches(step - 1))
            row = {"step": step, "nats_per_token": round(float(nll), 4)}
            row["elapsed_s"] = round(time.monotonic() - began, 1)
            row["steps_this_run"] = step - first
            if step % _EVALUATE_EVERY == 0 or step == last:
                parts = np.split(held_out_ids, len(held_out_ids) // 8)
                found = [evaluate(state["params"], batch) for batch in parts]
                row["held_out_nats_per_token"] = round(float(np.mean([f[0] for f in found])), 4)
                share_LE = np.mean([f[1] for f in found], axis=0)
                ends = (share_LE.min(), share_LE.max())
                row["expert_share_min_max"] = [round(float(end), 4) for end in ends]
            print(json.dumps(row), file=log, flush=True)
            if step % _CHECKPOINT_EVERY == 0 or step == last:
                manager.save(step, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    return nnx.merge(graph, state["params"])
