"""The engine: the budget changes the cost and never a bit of the result; what a plan means."""

import jax
import numpy as np
import pytest
from pool_invariants import UsesByExpert

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout, OnRouting
from hobbit_jax.cache.miss_modes import FETCH
from hobbit_jax.cache.pool_sizing import demands, least_bytes
from hobbit_jax.experts import low_precision
from hobbit_jax.experts.precision import SelectionPlan, StaticPlan, uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference import engine as engine_module
from hobbit_jax.inference import prefill
from hobbit_jax.inference.engine import Engine
from hobbit_jax.inference.sampling import Sampling, sample
from hobbit_jax.model_file.gguf_file import write_gguf
from hobbit_jax.models.loading import load_model

LOW = 1
# Few shapes, since a program is compiled for each: chunks of 4 tokens at batch 3, of 12 at 1.
CHUNK, CONTEXT, NEW_TOKENS = 12, 11, 4
PROMPTS = [[5, 200, 17, 17, 99], [3], [101, 42, 7, 250, 11, 64, 8]]


def router_weight_plan(threshold: float, low_share: float) -> SelectionPlan:
    shares = (1 - low_share, low_share)
    return SelectionPlan("router_weight", (-threshold,), (0, LOW), shares)


# On "ggml_f32" the same bits at every budget stand in test_overlap.py and test_host_modes.py.
@pytest.fixture(scope="module", params=["ggml", pytest.param("xla", marks=pytest.mark.slow)])
def model(two_banks_path, request):
    return load_model(two_banks_path, request.param)


@pytest.fixture(scope="module")
def low_file(model, tmp_path_factory):
    return low_precision.open_low_precision(
        model.file,
        model.config,
        low_precision.LowPrecisionSpec("Q2_K"),
        tmp_path_factory.mktemp("precisions"),
    )


@pytest.fixture(scope="module")
def store(model, low_file):
    return HostExperts(model.config, model.file, [low_file])


def mixed_plan(store):
    low_LE = np.random.default_rng(0).random((store.config.n_layers, store.config.n_experts)) < 0.5
    return StaticPlan(np.where(low_LE, LOW, 0))


PLANS = {
    "native": uniform_plan,
    "mixed": mixed_plan,
    "router weight": lambda store: router_weight_plan(0.4, 0.3),
}


def score_ids(model, batch: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, model.config.vocab_size, (3, 8))[:batch]


def run(engine: Engine) -> list[np.ndarray]:
    """Logits of score, prefill and decode, and tokens; the prompts of different lengths."""
    results = [engine.score(score_ids(engine.model, len(PROMPTS)))]
    engine.start(len(PROMPTS), CONTEXT)
    results.append(engine.prefill(PROMPTS))
    for step in range(NEW_TOKENS):
        active_B = np.asarray([True, step != 1, True])  # one sequence pauses
        results.append(np.asarray(engine.decode(np.asarray([9, 8, 7]) + step, active_B))[active_B])
    engine.counts.take()
    steps = list(engine.generate(PROMPTS, NEW_TOKENS))
    results.append(np.stack([ids_B for ids_B, _ in steps]))
    decoded = len(PROMPTS) * (NEW_TOKENS - 1)
    assert engine.counts.tokens == decoded
    assert sum(cost.tokens for _, cost in steps) == sum(map(len, PROMPTS)) + decoded
    uses = (sum(map(len, PROMPTS)) + decoded) * engine.config.n_layers
    assert engine.counts.selections == uses * engine.config.experts_per_token
    assert engine.counts.demoted == engine.counts.skipped == 0
    return [np.asarray(result) for result in results]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "router weight" else n for n in PLANS],
)
def test_the_budget_changes_no_bit(model, store, name):
    plan = PLANS[name](store)
    wanted = demands(plan.shares_pLE(store.shape_pLE), BankLayout.of_store(store))
    least = sum(d.expert_bytes * d.min_slots for d in wanted)
    everything = sum(d.expert_bytes * d.n_experts for d in wanted)
    with pytest.raises(ValueError, match=f"needs at least {least} bytes"):
        Engine(model, store, CacheConfig(least - 1, plan=plan))
    roomy = Engine(model, store, CacheConfig(plan=plan, chunk_tokens=CHUNK))
    results = run(roomy)
    assert all(np.isfinite(result).all() for result in results)
    assert roomy.counts.misses == 0 and roomy.pool.device_bytes == everything
    assert roomy.counts.host_round_trips == 0
    for budget in [least, (least + everything) // 2] if name == "native" else [least]:
        tight = Engine(model, store, CacheConfig(budget, plan=plan, chunk_tokens=CHUNK))
        for got, result in zip(run(tight), results, strict=True):
            np.testing.assert_array_equal(got, result, strict=True)
        assert tight.counts.misses > 0 and tight.pool.device_bytes <= budget
        assert tight.counts.host_round_trips > 0


def test_prefill_compiles_attention_once_for_all_plans_and_pools(model, store):
    """Its programs know neither: one for each kind of block, and one to guess at each kind."""
    attention, ahead = prefill._attend_and_route, prefill._route_ahead
    ids_BT, kinds = score_ids(model, 2), len(model.layers.kinds.graphs)
    before = attention._cache_size(), ahead._cache_size()
    Engine(model, store).score(ids_BT)
    assert attention._cache_size() == before[0] + kinds
    for make_plan in PLANS.values():
        plan = make_plan(store)
        shares_pLE, layout = plan.shares_pLE(store.shape_pLE), BankLayout.of_store(store)
        least = least_bytes(shares_pLE, FETCH, layout)
        Engine(model, store, CacheConfig(least, plan=plan)).score(ids_BT)
    assert attention._cache_size() == before[0] + kinds
    assert before[1] < ahead._cache_size() <= before[1] + kinds


@pytest.mark.parametrize("tokens_per_call", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_host_is_asked_once_a_call(model, store, transfers, tokens_per_call):
    """And once more for every exit; several tokens a call are the same tokens."""
    results, new_tokens = [], 1 + 2 * 4
    for budget in (None, store.precision_bytes(0) // 2):
        engine = Engine(model, store, CacheConfig(budget, chunk_tokens=CHUNK))
        list(engine.generate(PROMPTS, new_tokens, tokens_per_call=tokens_per_call))  # fills
        engine.counts.take()
        steps = engine.generate(PROMPTS, new_tokens, tokens_per_call=tokens_per_call)
        rows = [next(steps)[0]]  # the prefill, which does ask
        transfers[0] = 0
        rows += [ids_B for ids_B, _ in steps]
        calls = (new_tokens - 1) // tokens_per_call
        assert transfers[0] == calls + engine.counts.host_round_trips
        assert (engine.counts.host_round_trips > 0) == (budget is not None)
        results.append(np.stack(rows).tolist())
        if tokens_per_call > 1:
            one_by_one = engine.generate(PROMPTS, new_tokens)
            results.append([ids_B.tolist() for ids_B, _ in one_by_one])
    assert all(result == results[0] for result in results)


def score(model, store, plan=None, **options) -> np.ndarray:
    engine = Engine(model, store, CacheConfig(plan=plan, chunk_tokens=CHUNK, **options))
    return np.asarray(engine.score(score_ids(model, 3)))


@pytest.mark.parametrize("low_layers", [(0, 1, 2), (1,)])
def test_static_plan_is_the_file_that_holds_those_tensors(
    model, store, low_file, tmp_path, low_layers
):
    """All low is the precision file itself; one low layer is a file with that layer's experts."""
    plan = uniform_plan(store)
    plan.precision_LE[list(low_layers)] = LOW
    path = low_file.paths[0]
    if low_layers != (0, 1, 2):
        spliced = tuple(f"blk.{layer}." for layer in low_layers)
        tensors = [
            (low_file if name.startswith(spliced) else model.file).tensors[name]
            for name in model.file.tensors
        ]
        path = tmp_path / "spliced.gguf"
        entries = [(t.name, t.format, t.shape, t.raw) for t in tensors]
        write_gguf(path, model.file.metadata, entries, model.file.field_types)
    file_model = load_model(path, model.implementation)
    file_store = HostExperts(file_model.config, file_model.file)
    got = score(model, store, plan)
    np.testing.assert_array_equal(got, score(file_model, file_store))
    assert np.abs(got - score(model, store)).max() > 0.01  # the precision is not the native one


def test_router_weight_plan_at_its_ends(model, store):
    never, always = (router_weight_plan(t, s) for t, s in [(0.0, 0.0), (1.5, 1.0)])
    np.testing.assert_array_equal(score(model, store, never), score(model, store))
    np.testing.assert_array_equal(
        score(model, store, always), score(model, store, uniform_plan(store, LOW))
    )


def test_router_weight_plan_asks_for_the_tier_of_each_weight(model, store):
    """Counted from what the router said; padding asks for nothing."""
    seen = []
    plan = router_weight_plan(0.4, 0.3)
    cache, counted = CacheConfig(plan=plan, chunk_tokens=CHUNK), UsesByExpert(store.shape_pLE)
    engine = Engine(model, store, cache, observers=[OnRouting(seen.append), counted])
    engine.start(len(PROMPTS), CONTEXT)
    engine.prefill(PROMPTS)
    uses = np.zeros_like(counted.hits)
    for routed in seen:
        rows = zip(routed.ids_TK[routed.valid_T], routed.weights_TK[routed.valid_T], strict=True)
        choices = [choice for ids, weights in rows for choice in zip(ids, weights, strict=True)]
        for precision, expert in {(int(weight < 0.4), expert) for expert, weight in choices}:
            uses[precision, routed.layer, expert] += 1
    chunks = -(-max(map(len, PROMPTS)) // (CHUNK // len(PROMPTS)))
    assert len(seen) == chunks * model.config.n_layers
    assert sum(int(routed.valid_T.sum()) for routed in seen if routed.layer == 0) == sum(
        map(len, PROMPTS)
    )
    assert uses[0].any() and uses[LOW].any()
    np.testing.assert_array_equal(counted.hits + counted.misses, uses)
    assert engine.counts.uses == uses.sum()


def greedy(engine, prompts, stop_ids=(), **options) -> list[list[int]]:
    steps = engine.generate(prompts, NEW_TOKENS, stop_ids=stop_ids, **options)
    return [ids_B.tolist() for ids_B, _ in steps]


def test_sequences_do_not_meet_and_chunks_do_not_show(model, store):
    """A row of a batch is the sequence alone; a prompt in chunks is the prompt at once."""
    engine = Engine(model, store, CacheConfig(chunk_tokens=CHUNK))
    engine.start(3, CONTEXT)
    prefilled = np.asarray(engine.prefill(PROMPTS))  # two chunks of 4
    decoded = np.asarray(engine.decode(np.asarray([9, 8, 7])))
    for row, (prompt, following) in enumerate(zip(PROMPTS, [9, 8, 7], strict=True)):
        engine.start(1, CONTEXT)
        alone = np.asarray(engine.prefill([prompt]))[0]  # one chunk
        np.testing.assert_allclose(prefilled[row], alone, atol=2e-5)
        scored = np.asarray(engine.score(np.asarray([[*prompt, following]])))[0]
        np.testing.assert_allclose(prefilled[row], scored[-2], atol=2e-5)
        np.testing.assert_allclose(decoded[row], scored[-1], atol=2e-5)


def test_a_prefix_goes_on_as_whole_prompts_do(model, store):
    engine = Engine(model, store, CacheConfig(chunk_tokens=CHUNK))
    prompts = [[*PROMPTS[0], *prompt] for prompt in PROMPTS]
    whole = greedy(engine, prompts)
    prefix = engine.read_prefix(PROMPTS[0])
    for _ in range(2):  # it is not used up
        assert greedy(engine, prompts, prefix=prefix) == whole
    engine.start(2, CONTEXT, prefix)
    rest = np.asarray(engine.prefill([prompt[len(PROMPTS[0]) :] for prompt in prompts[:2]]))
    scored = [np.asarray(engine.score(np.asarray([prompt])))[0, -1] for prompt in prompts[:2]]
    np.testing.assert_allclose(rest, scored, atol=2e-5)
    for wrong in (prompts[0][: len(PROMPTS[0])], [1 + prompts[0][0], *prompts[0][1:]]):
        with pytest.raises(ValueError, match=f"begins with the prefix of {len(PROMPTS[0])} "):
            greedy(engine, [wrong], prefix=prefix)


def test_stop_tokens_end_their_own_sequence(model, store):
    engine = Engine(model, store, CacheConfig(chunk_tokens=CHUNK))
    free = np.asarray(greedy(engine, PROMPTS))  # [step, sequence]
    assert free.shape == (NEW_TOKENS, 3) and free.tolist() == greedy(engine, PROMPTS)
    stop = free[1, 0]
    ended = np.logical_or.accumulate(free == stop, axis=0)
    assert ended.any() and not ended.all()
    wanted = np.where(ended, -1, free)[~ended.all(axis=1)]
    assert greedy(engine, PROMPTS, [stop]) == wanted.tolist()
    assert greedy(engine, PROMPTS, [stop], tokens_per_call=4) == wanted.tolist()
    assert greedy(engine, PROMPTS[:1], [stop]) == free[:1, :1].tolist()  # ends when all have
    assert greedy(engine, PROMPTS, free[0].tolist()) == []


def test_a_batch_shrinks_as_its_sequences_end(model, store):
    """The last one goes on alone, with the tokens that it has beside the others."""
    engine = Engine(model, store, CacheConfig(chunk_tokens=CHUNK))
    free = np.asarray(greedy(engine, PROMPTS))
    room, last = engine.kv_cache_bytes, free[:, 2].tolist()
    stops = [token for token in free[1, :2].tolist() if token not in last]
    assert stops, "the last sequence has the tokens that should end the others"
    found = np.asarray(greedy(engine, PROMPTS, stops, least_batch=1))
    assert found[:, 2].tolist() == last and (found[-1, :2] == -1).all()
    assert engine.kv_cache_bytes == room // 3


def test_tokens_that_do_not_exist_are_refused(model, store):
    """Compiled programs wrap or clamp an index, so they would answer for another token."""
    engine = Engine(model, store, CacheConfig(chunk_tokens=CHUNK))
    last = model.config.vocab_size - 1
    for wrong in (-1, last + 1):
        with pytest.raises(ValueError, match=f"token id {wrong}; want 0 to {last}"):
            next(engine.generate([[1, wrong]], 4))
        engine.start(1, 8)
        engine.prefill([[1, last]])
        with pytest.raises(ValueError, match=f"token id {wrong}; want 0 to {last}"):
            engine.decode(np.asarray([wrong]))
    with pytest.raises(ValueError, match="max_new_tokens is 0; want at least 1"):
        next(engine.generate(PROMPTS, 0))


def test_the_caches_before_are_gone_when_new_ones_are_made(model, store, monkeypatch):
    engine = Engine(model, store, CacheConfig(chunk_tokens=CHUNK))
    engine.start(1, 8)
    make = engine_module.empty_carry

    def observed(*args):
        assert engine._carry is None
        return make(*args)

    monkeypatch.setattr(engine_module, "empty_carry", observed)
    engine.start(2, 8)
    assert engine.kv_cache_bytes


def test_too_long_is_refused(model, store):
    engine = Engine(model, store, CacheConfig(chunk_tokens=CHUNK))
    limit = model.config.context_length
    with pytest.raises(ValueError, match=f"{limit + 1} tokens exceed the model's context"):
        engine.start(1, limit + 1)
    with pytest.raises(ValueError, match="exceed the model's context"):
        next(engine.generate(PROMPTS, limit))
    engine.start(1, CONTEXT)
    for _ in range(CONTEXT):
        engine.decode(np.asarray([7]))
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens exceed the {CONTEXT} started with"):
        engine.decode(np.asarray([7]))
    with pytest.raises(ValueError, match=r"lengths \[0\]"):
        engine.prefill([[]])
    with pytest.raises(ValueError, match="want 1 prompts"):
        engine.prefill(PROMPTS)


def test_sampling_follows_the_distribution():
    logits_V = np.log(np.asarray([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
    draws = 20_000
    logits_BV = np.broadcast_to(logits_V, (draws, 5))

    def counts(sampling, seed=0):
        ids_B = np.asarray(sample(logits_BV, jax.random.key(seed), sampling))
        return np.bincount(ids_B, minlength=5)

    cold_V = np.asarray([0.05, 0.4, 0.1, 0.25, 0.2]) ** 2  # temperature 0.5
    for sampling, weights_V in [
        (Sampling(temperature=1.0), np.exp(logits_V)),
        (Sampling(temperature=0.5), cold_V),
        # The smallest set with 0.6 of the mass: 0.4 and 0.25.
        (Sampling(temperature=1.0, top_p=0.6), np.asarray([0, 0.4, 0, 0.25, 0])),
    ]:
        got_V, kept_V = counts(sampling), weights_V > 0
        wanted_V = draws * weights_V / weights_V.sum()
        assert not got_V[~kept_V].any()
        chi_square = np.sum((got_V - wanted_V)[kept_V] ** 2 / wanted_V[kept_V])
        assert chi_square < 18.5  # a thousandth of its distribution with 4 degrees of freedom
        assert np.array_equal(got_V, counts(sampling))
        assert not np.array_equal(got_V, counts(sampling, seed=1))
    for sampling in (Sampling(), Sampling(temperature=2.0, top_p=1e-6)):
        assert counts(sampling).tolist() == [0, draws, 0, 0, 0]


def test_sampling_is_a_function_of_its_seed(model, store):
    engine = Engine(model, store, CacheConfig(chunk_tokens=CHUNK))

    def tokens(**options):
        steps = engine.generate(PROMPTS, NEW_TOKENS, Sampling(**options))
        return [ids_B.tolist() for ids_B, _ in steps]

    hot = tokens(temperature=5.0, seed=1)
    assert hot == tokens(temperature=5.0, seed=1) != tokens(temperature=5.0, seed=2)
    assert tokens(temperature=5.0, top_p=1e-6) == greedy(engine, PROMPTS)
