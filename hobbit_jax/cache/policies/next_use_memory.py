"""What `next_use.py` remembers and estimates, as arrays under compiled code.

Layers and experts are rows and columns here, in the order in which the policy first saw them.
Memory is bounded: about 60 bytes and one for each expert, for each of the last `MEMORY` tokens of a
layer.
"""

from math import exp, log
from typing import NamedTuple

import numpy as np
from numba import njit

MEMORY = 4096  # tokens
HORIZON = 16  # tokens after a remembered one within which uses are recorded; below 256
LIKENESSES = 8  # levels of likeness; 0 stands for no recollection
RECOLLECTIONS = 4  # two of this layer, one of each of the two layers that ran before it
_CHAIN = 16  # past tokens compared with the present one
# What a common expert adds to the likeness of two states: chosen now, by the token before, and by
# the one before that.
_LIKENESS_OF = (4, 2, 1)
_TOKEN, _SAME_PAIR, _SETS = 0, 1, 2  # places in a token's row
_PAIRS = 1 << 16  # of the two heaviest experts; beyond 256 experts some share a place
ABSENT = -(MEMORY + HORIZON)  # earlier than any token
CHANGED = -2

# How often an expert is used: a mix of three decayed frequencies, in units of 1 / _WHOLE.
_TIME_CONSTANTS, _MIX = (3.0, 30.0, 400.0), (0.25, 0.35, 0.40)  # tokens; weights
_WHOLE, _OLDEST = 4000, 2000  # the mix of one used at every token; ages above are taken as this
# By age, for they are read together.
_DECAY_af = np.exp(-np.arange(_OLDEST + 1)[:, None] / np.asarray(_TIME_CONSTANTS))
_GAIN_f = _WHOLE * np.asarray(_MIX) * (1 - _DECAY_af[1])
_RATES, _RATES_PER_E = 18, 3  # buckets of the mix, and how many to a factor of e
_MIX_m = np.maximum(np.arange(_WHOLE + 2), 0.5) / _WHOLE
_RATE_m = np.clip(-_RATES_PER_E * np.log(_MIX_m), 0, _RATES - 1).astype(np.int64)

_LONGEST = 200  # tokens; a next use farther away is learned as this
_PRIOR_COUNT, _MOST_COUNT = 8, 2000  # observations: what a first guess weighs, and the past at most
_CELLS = (HORIZON + 1) * _RATES  # of one level of likeness
_ALL_CELLS = LIKENESSES * _CELLS


class Memory(NamedTuple):
    """What was used and what came after it, who may be evicted, and when each is used again.

    In the fields marked "plus one" tokens are stored plus one, so that 0 is none.
    """

    estimate_LE: np.ndarray  # float64, the token of the next use
    evictable_LE: np.ndarray  # uint8: whether resident and not pinned
    last_use_LE: np.ndarray  # int64, a token; `ABSENT` before the first
    farthest_L: np.ndarray  # int64, of those evictable; -1 for none, `CHANGED` to be found
    present_2: np.ndarray  # int64, layer and token of the last step, whose experts are spared
    frequency_LEf: np.ndarray  # float64, by time constant
    watched_LE: np.ndarray  # int64, plus one: the token since which an expert is watched
    cell_LER: np.ndarray  # int64, where the outcome of watching it belongs
    present_L: np.ndarray  # int64, plus one: the last token taken in
    # int64, a token's row: the token and the last one with the same two heaviest experts, both
    # plus one, and bit sets: chosen now, by the token before, by the one before that.
    row_LMw: np.ndarray
    soon_LME: np.ndarray  # uint8, tokens until the next use; 0 for not within `HORIZON`
    latest_LP: np.ndarray  # int64, plus one: the last token of a pair
    before_2p: np.ndarray  # int64, (token plus one, likeness) of the two layers that ran before
    log_tokens_RC: np.ndarray  # float64, mean log of tokens until the next use
    count_RC: np.ndarray  # int64, observations behind it


_N_SETS, _N_CONSTANTS = len(_LIKENESS_OF), len(_TIME_CONSTANTS)


def empty(n_layers: int, n_experts: int) -> Memory:
    """Nothing has been used yet; `n_experts` is a multiple of 64."""
    pairs, width = (n_layers, n_experts), _SETS + _N_SETS * (n_experts // 64)
    # The first guess: what was recalled, as far as the likeness goes, or the usual time.
    trust = (np.arange(LIKENESSES) / LIKENESSES)[:, None, None]
    usual = (np.arange(_RATES) + 0.5) / _RATES_PER_E
    distance = np.arange(HORIZON + 1)[:, None]
    recalled = np.where(distance > 0, np.log(np.maximum(distance, 1)), usual)
    guess_C = (trust * recalled + (1 - trust) * usual).ravel()
    return Memory(
        estimate_LE=np.zeros(pairs),
        evictable_LE=np.zeros(pairs, np.uint8),
        last_use_LE=np.full(pairs, ABSENT),
        farthest_L=np.full(n_layers, CHANGED),
        present_2=np.zeros(2, np.int64),
        frequency_LEf=np.zeros((*pairs, _N_CONSTANTS)),
        watched_LE=np.zeros(pairs, np.int64),
        cell_LER=np.zeros((*pairs, RECOLLECTIONS), np.int64),
        present_L=np.zeros(n_layers, np.int64),
        row_LMw=np.zeros((n_layers, MEMORY, width), np.int64),
        soon_LME=np.zeros((n_layers, MEMORY, n_experts), np.uint8),
        latest_LP=np.zeros((n_layers, _PAIRS), np.int64),
        before_2p=np.zeros((2, 2), np.int64),
        log_tokens_RC=np.tile(guess_C, (RECOLLECTIONS, 1)),
        count_RC=np.full((RECOLLECTIONS, _ALL_CELLS), _PRIOR_COUNT),
    )


def grown(memory: Memory, n_layers: int, n_experts: int) -> Memory:
    """The same with room for more layers and experts."""
    larger = empty(n_layers, n_experts)
    for before, after in zip(memory, larger, strict=True):
        after[tuple(map(slice, before.shape))] = before
    return larger


@njit(cache=True)
def farthest(
    estimate_LE: np.ndarray,
    evictable_LE: np.ndarray,
    last_use_LE: np.ndarray,
    farthest_L: np.ndarray,
    present_2: np.ndarray,
) -> int:
    """The evictable expert whose next use is farthest, as layer * E + expert; -1 for nobody.

    Those that the last step chose are spared.
    """
    found, most = -1, -np.inf
    n_layers, n_experts = estimate_LE.shape
    for layer in range(n_layers):
        estimate_E, last = estimate_LE[layer], farthest_L[layer]
        if last == CHANGED:
            last, spared = -1, present_2[1] if present_2[0] == layer else ABSENT - 1
            for expert, evictable in enumerate(evictable_LE[layer]):
                if not evictable or last_use_LE[layer, expert] == spared:
                    continue
                if last < 0 or estimate_E[expert] > estimate_E[last]:
                    last = expert
            farthest_L[layer] = last
        if last >= 0 and estimate_E[last] > most:
            found, most = layer * n_experts + last, estimate_E[last]
    return found


@njit(cache=True)
def _bits(signed: int) -> int:
    """How many bits are set."""
    word = np.uint64(signed)
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + (
        (word >> np.uint64(2)) & np.uint64(0x3333333333333333)
    )
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(cache=True)
def _likeness(row_w: np.ndarray, other_w: np.ndarray) -> int:
    total = 0
    for w in range(_SETS, len(row_w), _N_SETS):
        for s in range(_N_SETS):
            total += _LIKENESS_OF[s] * _bits(row_w[w + s] & other_w[w + s])
    return total


@njit(cache=True)
def _record_uses(memory: Memory, layer: int, token: int, ranked_K: np.ndarray) -> None:
    """Notes at the tokens before how far away this use was, back to the last use."""
    for expert in ranked_K:
        since = min(HORIZON, token - memory.last_use_LE[layer, expert])
        for distance in range(1, since + 1):
            row = (token - distance) % MEMORY
            if memory.row_LMw[layer, row, _TOKEN] == token - distance + 1:
                memory.soon_LME[layer, row, expert] = distance


@njit(cache=True)
def _conclude(memory: Memory, layer: int, expert: int, token: int) -> None:
    """Averages an outcome into the cells from which it was to be told."""
    outcome = log(min(token + 1 - memory.watched_LE[layer, expert], _LONGEST))
    for r in range(RECOLLECTIONS):
        cell = memory.cell_LER[layer, expert, r]
        count = min(memory.count_RC[r, cell] + 1, _MOST_COUNT)
        memory.count_RC[r, cell] = count
        memory.log_tokens_RC[r, cell] += (outcome - memory.log_tokens_RC[r, cell]) / count
    memory.watched_LE[layer, expert] = 0


@njit(cache=True)
def _count_use(memory: Memory, layer: int, expert: int, token: int) -> None:
    """Frequencies of an expert used now, and the outcome if it was watched."""
    age = min(token - memory.last_use_LE[layer, expert], _OLDEST)
    for f in range(len(_GAIN_f)):
        decayed = memory.frequency_LEf[layer, expert, f] * _DECAY_af[age, f]
        memory.frequency_LEf[layer, expert, f] = decayed + _GAIN_f[f]
    memory.last_use_LE[layer, expert] = token
    if 0 < memory.watched_LE[layer, expert] <= token:
        _conclude(memory, layer, expert, token)


@njit(cache=True)
def remember(memory: Memory, layer: int, token: int, ranked_K: np.ndarray) -> np.ndarray:
    """Takes in a choice; finds the two past tokens of the same heaviest pair that are most like it.

    Of a repeated token the uses are noted, and nothing is recalled. `ranked_K` are int64, by
    descending router weight.

    Returns:
        int64 [2, 2], each a token plus one and a likeness from 1 to `LIKENESSES` - 1, the more
        alike first; zeros for none.
    """
    found_2p = np.zeros((2, 2), np.int64)
    _record_uses(memory, layer, token, ranked_K)
    before = memory.present_L[layer]
    if before == token + 1:
        return found_2p
    row_Mw = memory.row_LMw[layer]
    width = row_Mw.shape[1]
    row_w = np.zeros(width, np.int64)
    for expert in ranked_K:
        row_w[_SETS + expert // 64 * _N_SETS] |= np.int64(1) << (expert % 64)
    if before > 0:
        last_w = row_Mw[(before - 1) % MEMORY]
        for w in range(_SETS, width, _N_SETS):
            for s in range(1, _N_SETS):
                row_w[w + s] = last_w[w + s - 1]
    first, second = ranked_K[0], ranked_K[min(1, len(ranked_K) - 1)]
    pair = (min(first, second) * 256 + max(first, second)) % _PAIRS
    latest = place = memory.latest_LP[layer, pair]
    best_2 = np.full(2, -1)
    for _ in range(_CHAIN):
        other_w = row_Mw[(place - 1) % MEMORY]
        if place <= max(0, token + 1 - MEMORY) or other_w[_TOKEN] != place:
            break
        score = _likeness(other_w, row_w)
        if score > best_2[0]:
            best_2[1], found_2p[1, 0] = best_2[0], found_2p[0, 0]
            best_2[0], found_2p[0, 0] = score, place
        elif score > best_2[1]:
            best_2[1], found_2p[1, 0] = score, place
        place = other_w[_SAME_PAIR]
    most = _likeness(row_w, row_w) + 1
    for i in range(2):
        if found_2p[i, 0] > 0:
            found_2p[i, 1] = 1 + best_2[i] * (LIKENESSES - 1) // most
    row_w[_TOKEN], row_w[_SAME_PAIR] = token + 1, latest
    row_Mw[token % MEMORY] = row_w
    memory.soon_LME[layer, token % MEMORY] = 0
    memory.latest_LP[layer, pair] = memory.present_L[layer] = token + 1
    return found_2p


@njit(cache=True)
def _cells(
    memory: Memory,
    layer: int,
    expert: int,
    age: int,
    row_R: np.ndarray,
    likeness_R: np.ndarray,
    cell_R: np.ndarray,
) -> float:
    """Where the tables tell of an expert, into `cell_R`; the tokens to its next use by them."""
    mix = 0.0
    for f in range(len(_GAIN_f)):
        mix += memory.frequency_LEf[layer, expert, f] * _DECAY_af[age, f]
    rate, total = _RATE_m[int(mix)], 0.0
    for r in range(RECOLLECTIONS):
        cell = rate
        if row_R[r] >= 0:
            cell += likeness_R[r] * _CELLS + memory.soon_LME[layer, row_R[r], expert] * _RATES
        cell_R[r] = cell
        total += memory.log_tokens_RC[r, cell]
    return exp(total / RECOLLECTIONS)


@njit(cache=True)
def take_in(
    memory: Memory,
    layer: int,
    token: int,
    chosen_K: np.ndarray,
    weight_K: np.ndarray,
    n_seen: int,
    draw: float,
) -> None:
    """Learns from a step's choice, and estimates anew when the layer's experts are used next.

    Args:
        memory: changed in place.
        layer: its row.
        token: never decreases.
        chosen_K: int64; they get an estimate whether they are resident or not.
        weight_K: float64, the router's.
        n_seen: experts that the layer has seen.
        draw: 0 to 1, chooses the expert that is watched from now on.
    """
    ranked_K = chosen_K[np.argsort(-weight_K, kind="mergesort")]
    if token != memory.present_2[1]:
        memory.before_2p[:] = 0
    found_2p = remember(memory, layer, token, ranked_K)
    for expert in ranked_K:
        _count_use(memory, layer, expert, token)
    row_R, likeness_R = np.full(RECOLLECTIONS, -1), np.empty(RECOLLECTIONS, np.int64)
    for r in range(RECOLLECTIONS):
        place, likeness_R[r] = found_2p[r] if r < 2 else memory.before_2p[r - 2]
        if place > 0 and memory.row_LMw[layer, (place - 1) % MEMORY, _TOKEN] == place:
            row_R[r] = (place - 1) % MEMORY
    memory.before_2p[1], memory.before_2p[0] = memory.before_2p[0], found_2p[0]
    cell_R = np.empty(RECOLLECTIONS, np.int64)
    concerned_n, n_concerned = np.empty(n_seen, np.int64), 0
    for expert in range(n_seen):
        age = min(token - memory.last_use_LE[layer, expert], _OLDEST)
        # A chosen one that is missing is about to be admitted.
        if memory.evictable_LE[layer, expert] or age == 0:
            soon = _cells(memory, layer, expert, age, row_R, likeness_R, cell_R)
            memory.estimate_LE[layer, expert] = token + soon
            concerned_n[n_concerned] = expert
            n_concerned += 1
    memory.farthest_L[layer] = memory.farthest_L[memory.present_2[0]] = CHANGED
    memory.present_2[0], memory.present_2[1] = layer, token
    watched = concerned_n[int(draw * n_concerned)]
    since = memory.watched_LE[layer, watched]
    if since > 0 and token + 1 - since >= _LONGEST:
        _conclude(memory, layer, watched, token)
    if memory.watched_LE[layer, watched] == 0:
        age = min(token - memory.last_use_LE[layer, watched], _OLDEST)
        _cells(memory, layer, watched, age, row_R, likeness_R, cell_R)
        memory.cell_LER[layer, watched] = cell_R
        memory.watched_LE[layer, watched] = token + 1
