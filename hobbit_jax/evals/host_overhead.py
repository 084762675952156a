"""What a decoded token costs besides arithmetic, layer by layer, now and in another revision.

Owns the hollow model, whose layers compute next to nothing, and the timing of two checkouts of this
repository in turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hobbit_jax.model_file.gguf_file import write_gguf
from hobbit_jax.statistics import spread

HOLLOW_LAYERS = 24
WIDTH = 32  # of everything: a layer is a few thousand multiplications
VOCAB = 64


def write_hollow_model(path: Path, n_layers: int, n_experts: int = 8, k: int = 2) -> None:
    """A `qwen3moe` file in F32 with random weights and as little arithmetic as there can be."""
    rng = np.random.default_rng(0)
    tensors = []

    def add(name: str, *shape: int, ones: bool = False) -> None:
        values = np.ones(shape, np.float32) if ones else rng.normal(0, 0.2, shape)
        raw = np.ascontiguousarray(values, np.float32).view(np.uint8)
        tensors.append((f"{name}.weight", "F32", shape, raw))

    add("token_embd", VOCAB, WIDTH)
    add("output_norm", WIDTH, ones=True)
    for layer in range(n_layers):
        block = f"blk.{layer}"
        for name in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"):
            add(f"{block}.{name}", WIDTH, ones=True)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}.{name}", WIDTH, WIDTH)
        add(f"{block}.ffn_gate_inp", n_experts, WIDTH)
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            add(f"{block}.{name}", n_experts, WIDTH, WIDTH)
    keys = {
        "block_count": n_layers,
        "context_length": 256,
        "embedding_length": WIDTH,
        "expert_feed_forward_length": WIDTH,
        "attention.head_count": 1,
        "attention.head_count_kv": 1,
        "attention.key_length": WIDTH,
        "attention.value_length": WIDTH,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e4,
        "expert_count": n_experts,
        "expert_used_count": k,
    }
    metadata = {f"qwen3moe.{key}": value for key, value in keys.items()}
    metadata["tokenizer.ggml.tokens"] = [str(token) for token in range(VOCAB)]
    write_gguf(path, {"general.architecture": "qwen3moe", **metadata}, tensors)


class _Worker:
    """`scripts/time_decode.py` in a process of its own, with the packages of one checkout."""

    def __init__(self, tree: Path, flags: Sequence[str]):
        script = Path(__file__).parents[2] / "scripts" / "time_decode.py"
        self._process = subprocess.Popen(
            [sys.executable, str(script), *flags],
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self) -> float:
        """Seconds per token of one window."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print("go", file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the timed process ended with status {self._process.wait()}")
        return float(line)

    def close(self) -> None:
        """Ends the process."""
        with self._process:
            self._process.kill()


def time_in_turns(trees: Sequence[Path], flags: Sequence[str], turns: int) -> list[list[float]]:
    """Seconds per token of each checkout, in `turns` turns after one that warms up."""
    workers: list[_Worker] = []
    seconds: list[list[float]] = [[] for _ in trees]
    try:
        workers += [_Worker(tree, flags) for tree in trees]
        for turn in range(turns + 1):
            for of_tree, worker in zip(seconds, workers, strict=True):
                measured = worker.turn()
                if turn:
                    of_tree.append(measured)
    finally:
        for worker in workers:
            worker.close()
    return seconds


def compare_trees(
    before: Path, model: Path, n_layers: int, turns: int, budget_mib: float | None
) -> dict[str, Any]:
    """Microseconds per token and layer of `before` and of this checkout, and their ratio."""
    flags = [f"--model={model}"] + ([] if budget_mib is None else [f"--budget_mib={budget_mib}"])
    here = Path(__file__).parents[2]
    old_s, new_s = (np.asarray(s) for s in time_in_turns([before, here], flags, turns))

    return {
        "budget_mib": budget_mib,
        "turns": turns,
        "before_us_per_layer": spread(old_s * 1e6 / n_layers),
        "after_us_per_layer": spread(new_s * 1e6 / n_layers),
        "ratio": float(np.median(old_s / new_s)),
    }


def compare_revisions(before: Path, turns: int) -> Iterator[dict[str, Any]]:
    """`compare_trees` on a hollow model, all resident and with a pool that misses."""
    with tempfile.TemporaryDirectory() as directory:
        hollow = Path(directory) / "hollow.gguf"
        write_hollow_model(hollow, HOLLOW_LAYERS)
        for pool_mib in (None, 0.75):
            yield compare_trees(before, hollow, HOLLOW_LAYERS, turns, pool_mib)
