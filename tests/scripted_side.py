"""A program for `test_baselines.py` that does as told: known logits, time, memory, failures.

Runs in the child processes of `hobbit_jax.baselines`, which find it by PYTHONPATH. No JAX.
"""

import mmap
import os
import signal
import time
from pathlib import Path

import numpy as np


class Scripted:
    """Logits [W, T, V] from a file; a sequence is the window that its first token names."""

    def __init__(
        self, threads, logits, hold_bytes=0, mapped=None, step_s=0.0, warm_up_s=0.0, fails=None
    ):
        if fails == "load":
            raise ValueError("no such model")
        print("a library that talks on stdout", flush=True)
        self.logits_WTV = np.load(logits)
        self.warm_up_s, self.step_s, self.fails = warm_up_s, step_s, fails
        self.held = np.ones(hold_bytes, np.uint8)
        self.file = None
        if mapped is not None:
            with Path(mapped).open("rb") as file:
                self.file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.touched = sum(self.file[i] for i in range(0, len(self.file), mmap.PAGESIZE))

    def score(self, ids_T):
        if self.fails == "score":
            self.logits_WTV = {}
            self.logits_WTV[3]
        return self.logits_WTV[ids_T[0], : len(ids_T)]

    def prefill(self, ids_T):
        time.sleep(2 * self.step_s + self.warm_up_s)
        token = int(ids_T[-1]) - (self.warm_up_s > 0)
        self.warm_up_s = 0.0
        return token

    def decode(self, token):
        if self.fails == "decode":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.step_s)
        return token

    def counts(self):
        return None

    def facts(self):
        return {
            "program": "scripted",
            "machine": {"device": "cpu: a scripted one"},
            "pid": os.getpid(),
            "threads": len(os.sched_getaffinity(0)),
            "policy": os.environ["OMP_WAIT_POLICY"],
        }


class Uniform:
    """What `compare_model` makes as PyTorch: every token of V = 258 as probable as every other."""

    def __init__(self, threads, model, context, mode):
        self.told = {"model": model, "context": context, "mode": mode}

    def score(self, ids_T):
        return np.zeros((len(ids_T), 258), np.float32)

    def prefill(self, ids_T):
        return 0

    def decode(self, token):
        return 0

    def counts(self):
        return None

    def facts(self):
        return {
            "program": "uniform",
            "versions": {},
            "precision": "none",
            "threads": 1,
            "device_peak_bytes": None,
            **self.told,
        }
