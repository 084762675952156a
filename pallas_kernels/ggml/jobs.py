"""Work in chunks on XLA's own threads.

Owns the division of a handler's work among threads. A job is a number of chunks in up to four
phases; each chunk is claimed by one atomic addition, and one of a later phase waits until all of
the earlier phases are done. The calling thread works too and never waits for a helper to begin, so
that a busy machine costs what it takes and no more; helpers run on the thread pool that XLA has
for its own loops (`XLA_FFI_ThreadPool_Schedule`), which sleeps when nothing is to be done. A helper
that comes late finds no chunk and reads nothing but the job's own words, which the last one frees.
"""

import numpy as np

from pallas_kernels.ggml.machine import (
    ERROR_DESTROY,
    NO_MEMORY,
    SCHEDULE,
    TASK,
    THREADS,
    U,
    add_i64,
    call,
    call_xla,
    entry,
    free,
    load_i64,
    load_u64,
    malloc,
    njit,
    sched_yield,
    shared_i64,
    store_i64,
    usleep,
)

# Words of a job. PHASE is the first chunk of each phase, and after them the number of all chunks.
REFERENCES, NEXT, DONE, ERROR, KIND, FRAME, SCRATCH, PHASE = range(8)
_WORDS = PHASE + 5
# Multiplications that are worth waking a thread for, some 20 µs of one.
_HELPER_PRODUCTS = 500_000
_SPINS, _YIELDS, _SLEEP_US = 200, 50, 20


@njit
def get(job, word):
    """An integer of a job."""
    return load_i64(job + U(8 * word))


@njit
def run(kind, frame, scratch, chunks, products):
    """Does a job that costs so many multiplications; returns an error's code.

    `chunks` is their number in each of the four phases.
    """
    job = malloc(U(8 * _WORDS))
    if job == U(0):
        return NO_MEMORY
    for word in range(_WORDS):
        store_i64(job + U(8 * word), np.int64(0))
    store_i64(job + U(8 * KIND), np.int64(kind))
    store_i64(job + U(8 * FRAME), np.int64(frame))
    store_i64(job + U(8 * SCRATCH), np.int64(scratch))
    n_chunks = np.int64(0)
    for phase in range(4):
        n_chunks += chunks[phase]
        store_i64(job + U(8 * (PHASE + 1 + phase)), n_chunks)
    # References of the caller and of the task below.
    store_i64(job + U(8 * REFERENCES), np.int64(2))
    helpers = min(np.int64(entry(THREADS)) - 1, np.int64(products) // _HELPER_PRODUCTS)
    _call_helpers(frame, job, min(helpers, n_chunks - 1))
    # By the task's address, since linked into every handler it would be compiled as many times.
    call(entry(TASK), (job,))
    _wait_until_done(job, n_chunks)
    code = get(job, ERROR)
    release(job)
    return code


@njit
def _call_helpers(frame, job, helpers):
    """Has so many of XLA's threads work at a job."""
    for _ in range(helpers):
        add_i64(job + U(8 * REFERENCES), np.int64(1))
        failure = call_xla(frame, SCHEDULE, (load_u64(frame + U(24)), entry(TASK), job))
        if failure != U(0):  # no pool here: the caller does it all
            release(job)
            call_xla(frame, ERROR_DESTROY, (failure,))
            return


@njit
def _wait_until_done(job, count):
    """Waits for `count` chunks. Whoever holds one is at work: first spins, then gives way."""
    tries = 0
    while shared_i64(job + U(8 * DONE)) < count:
        tries += 1
        if tries > _SPINS + _YIELDS:
            usleep(np.uint32(_SLEEP_US))
        elif tries > _SPINS:
            sched_yield()


@njit
def claim(job):
    """(phase, chunk of the phase) that is now the caller's; phase -1 when none is left."""
    number = add_i64(job + U(8 * NEXT), np.int64(1))
    if number >= get(job, PHASE + 4):
        return -1, 0
    phase = 0
    while number >= get(job, PHASE + phase + 1):
        phase += 1
    first = get(job, PHASE + phase)
    _wait_until_done(job, first)
    return phase, number - first


@njit
def finish_chunk(job, code):
    """Counts a chunk as done, and keeps the code of what it failed of, if it did."""
    if code:
        store_i64(job + U(8 * ERROR), np.int64(code))
    add_i64(job + U(8 * DONE), np.int64(1))


@njit
def release(job):
    """Gives up a reference to a job."""
    if add_i64(job + U(8 * REFERENCES), np.int64(-1)) == 1:
        free(job)
