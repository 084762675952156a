"""Work in chunks on XLA's own threads.

Owns the division of a handler's work among threads. A job is a number of chunks in up to four
phases; each chunk is claimed by one atomic addition, and one of a later phase waits until all of
the earlier phases are done. The calling thread works too and never waits for a helper to begin, so
that a busy machine costs what it takes and no more; helpers run on the thread pool that XLA has
for its own loops (`XLA_FFI_ThreadPool_Schedule`), which sleeps when nothing is to be done. A helper
that comes late finds no chunk and reads nothing but the job's own words, which the last one frees.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pallas_kernels.ggml.machine import (
    ERROR_DESTROY,
    SCHEDULE,
    TASK,
    THREADS,
    U,
    add_i64,
    call_api,
    call_task,
    free,
    load_i64,
    load_u64,
    malloc,
    sched_yield,
    shared_i64,
    store_i64,
    store_u64,
    table,
    usleep,
)

# Words of a job. PHASE is the first chunk of each phase, and after them the number of all chunks.
REFERENCES, NEXT, DONE, KIND, PHASE, ERROR, ARGUMENTS = 0, 1, 2, 3, 4, 9, 10
JOB_BYTES = 8 * 64
# Multiplications that are worth waking a thread for, some 20 µs of one.
_HELPER_PRODUCTS = 500_000
_SPINS, _YIELDS, _SLEEP_US = 200, 50, 20


@njit
def get(job, word):
    """An integer of a job."""
    return load_i64(job + U(8 * word))


@njit
def put(job, word, value):
    """Sets an integer of a job."""
    store_i64(job + U(8 * word), np.int64(value))


@njit
def new_job(kind, chunks0, chunks1, chunks2, chunks3):
    """A job of so many chunks in each phase, or 0 without memory."""
    job = malloc(U(JOB_BYTES))
    if job == U(0):
        return job
    put(job, REFERENCES, 1)
    put(job, NEXT, 0)
    put(job, DONE, 0)
    put(job, KIND, kind)
    put(job, ERROR, 0)
    put(job, PHASE, 0)
    put(job, PHASE + 1, chunks0)
    put(job, PHASE + 2, chunks0 + chunks1)
    put(job, PHASE + 3, chunks0 + chunks1 + chunks2)
    put(job, PHASE + 4, chunks0 + chunks1 + chunks2 + chunks3)
    return job


@njit
def wait_until_done(job, count):
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
    wait_until_done(job, first)
    return phase, number - first


@njit
def finish_chunk(job, code):
    """Counts a chunk as done, and keeps the code of what it failed of, if it did."""
    if code:
        put(job, ERROR, code)
    add_i64(job + U(8 * DONE), np.int64(1))


@njit
def release(job):
    """Gives up a reference to a job."""
    if add_i64(job + U(8 * REFERENCES), np.int64(-1)) == 1:
        free(job)


@njit
def work_here(job):
    """Works at a job until no chunk is left.

    By the task's address, since linked into every handler it would be compiled as many times.
    """
    add_i64(job + U(8 * REFERENCES), np.int64(1))
    call_task(load_u64(table() + U(8 * TASK)), job)


@njit
def call_helpers(frame, job, products):
    """Has XLA's threads work at a job, as many as `--threads` allows and the work is worth."""
    helpers = min(load_i64(table() + U(8 * THREADS)) - 1, np.int64(products) // _HELPER_PRODUCTS)
    helpers = min(helpers, get(job, PHASE + 4) - 1)
    if helpers < 1:
        return
    api = load_u64(frame + U(16))
    schedule = load_u64(api + load_u64(table() + U(8 * SCHEDULE)))
    arguments = malloc(U(40))
    if arguments == U(0):
        return
    for _ in range(helpers):
        add_i64(job + U(8 * REFERENCES), np.int64(1))
        store_i64(arguments, np.int64(40))
        store_i64(arguments + U(8), np.int64(0))
        store_u64(arguments + U(16), load_u64(frame + U(24)))
        store_u64(arguments + U(24), load_u64(table() + U(8 * TASK)))
        store_u64(arguments + U(32), job)
        failure = call_api(schedule, arguments)
        if failure != U(0):  # no pool here: the caller does it all
            release(job)
            store_i64(arguments, np.int64(24))
            store_u64(arguments + U(16), failure)
            call_api(load_u64(api + load_u64(table() + U(8 * ERROR_DESTROY))), arguments)
            break
    free(arguments)
