"""Our engine and one peer on the same tokens, in one run, in turns.

Owns the order of things and the row that comes of it. Both programs are loaded at once, each in its
own process and bound to the same cores, and never work at the same time. Windows are scored by one
and then the other; decode rows are timed in turns, the first to go changing from row to row, so
that a busy machine slows both alike and a ratio is taken within a turn. The first row warms up and
is not counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hobbit_jax import reference
from hobbit_jax.evals.quality import cut_windows
from hobbit_jax.model_file.architecture import read_config
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.peers.agreement import AgreementMeter
from hobbit_jax.peers.child import Child, environment
from hobbit_jax.peers.memory import ResidentBytes
from hobbit_jax.peers.side import SideSpec

OURS = "hobbit_jax.peers.ours:Ours"
# Peer → its side, the packages it imports, and the extra that installs them.
PEERS = {
    "torch": ("hobbit_jax.peers.pytorch:PyTorch", ("torch", "transformers")),
    "llama_cpp": ("hobbit_jax.peers.llama:LlamaCpp", ("llama_cpp",)),
}


def peer_factory(peer: str) -> str:
    """The side of a peer whose library is installed.

    Raises:
        NotImplementedError: it is not; says how to install it.
    """
    factory, packages = PEERS[peer]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise NotImplementedError(
                f"--peer {peer} needs the package {package}, which is not installed: "
                f"pip install -c constraints.txt -e '.[{peer}]'"
            )
    return factory


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        model: GGUF file.
        peer: of `PEERS`.
        text: held-out text; None is the shipped one.
        budget_bytes: of our expert pool, and of llama.cpp's experts on a GPU; None is all of them.
        implementation: of our matrix products; None is the device's fastest.
        torch_mode: of `pytorch.MODES`; None is its default for the device.
        windows, context: scored for agreement.
        turns, prompt_tokens, decode_tokens: timed; one more row warms up.
        threads: processor cores of each program.
    """

    model: Path
    peer: str
    text: Path | None
    budget_bytes: int | None
    implementation: str | None
    torch_mode: str | None
    windows: int
    context: int
    turns: int
    prompt_tokens: int
    decode_tokens: int
    threads: int


def compare_model(request: Request) -> dict[str, Any]:
    """The row of a comparison.

    Raises:
        NotImplementedError: the peer's library is not installed, or what it cannot do.
        ValueError: sizes that the model or the text do not allow, or another bad input.
        OSError: a file, or a program that failed; says how.
    """
    factory = peer_factory(request.peer)
    file = open_gguf(request.model)
    config = read_config(file)
    row_tokens = request.prompt_tokens + request.decode_tokens
    longest = max(request.context, row_tokens)
    if longest > config.context_length:
        raise ValueError(
            f"windows of {request.context} and rows of {row_tokens} tokens; want at most the "
            f"model's context of {config.context_length}"
        )
    if request.text is None:
        texts = reference.held_out_texts("evaluation")
    else:
        texts = [request.text.read_text(encoding="utf-8")]
    tokenizer = Tokenizer.from_gguf(file)
    windows = cut_windows(tokenizer, texts, request.windows, request.context)
    rows = cut_windows(tokenizer, texts, request.turns + 1, row_tokens - 1, seed=1)
    shared = {"model": str(request.model), "context": longest}
    budget = {"budget_bytes": request.budget_bytes}
    ours = SideSpec(
        OURS, {**shared, **budget, "implementation": request.implementation}, request.threads
    )
    options = {"mode": request.torch_mode} if request.peer == "torch" else budget
    peer = SideSpec(factory, {**shared, **options}, request.threads)
    measured = compare(ours, peer, windows.ids_WS, rows.ids_WS, request.prompt_tokens)
    return {
        "model": {
            "name": request.model.name,
            "sha256": file.sha256(),
            "architecture": config.arch,
            "bytes": file.file_bytes,
        },
        "text": {
            "name": "shipped held-out text" if request.text is None else request.text.name,
            "sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
            "context": request.context,
        },
        "threads": request.threads,
        "omp_wait_policy": environment()["OMP_WAIT_POLICY"],
        "budget_bytes": request.budget_bytes,
        **measured,
    }


def compare(
    ours: SideSpec,
    peer: SideSpec,
    windows_WS: np.ndarray,
    rows_RS: np.ndarray,
    prompt_tokens: int,
) -> dict[str, Any]:
    """Runs both and returns the measured part of a row.

    Args:
        ours: our side.
        peer: the other one.
        windows_WS: int32 [windows, context + 1], scored for agreement.
        rows_RS: int32 [turns + 1, prompt and decoded tokens].
        prompt_tokens: of a row, prefilled.

    Raises:
        ValueError, NotImplementedError, OSError: what either program raised, after its name;
            both have ended then.
    """
    load_before = os.getloadavg()[0]
    with Child(ours, "ours") as own:
        loaded_own = own.loaded()
        with Child(peer, "peer") as other:
            loaded = loaded_own, other.loaded()
            agreement = _agreement(own, other, windows_WS)
            speed = _speed(own, other, rows_RS, prompt_tokens)
            facts = own.facts(), other.facts()
            peaks = own.finish(), other.finish()
    sides = {}
    for name, start, fact, peak in zip(("ours", "peer"), loaded, facts, peaks, strict=True):
        memory = {"before_model": start["before_model"], "peak": _as_dict(peak)}
        sides[name] = {**fact, "load_s": start["load_s"], "memory": memory}
    # Of the machine, over a minute: 1 is what a comparison makes itself on one core.
    load = {"before": load_before, "after": os.getloadavg()[0]}
    return {**sides, "agreement": agreement, "speed": speed, "load_average": load}


def _as_dict(resident: ResidentBytes | None) -> dict[str, int] | None:
    return None if resident is None else dataclasses.asdict(resident)


def _agreement(own: Child, other: Child, windows_WS: np.ndarray) -> dict[str, Any]:
    meter = AgreementMeter()
    with tempfile.TemporaryDirectory() as directory:
        passing = Path(directory) / "logits"
        for ids_S in tqdm(windows_WS, desc="logits", unit="window", leave=False):
            ours_TV = own.score(ids_S[:-1], passing)
            peer_TV = other.score(ids_S[:-1], passing)
            meter.add(ours_TV, peer_TV, ids_S[1:])
    return dataclasses.asdict(meter.result())


def _speed(own: Child, other: Child, rows_RS: np.ndarray, prompt_tokens: int) -> dict[str, Any]:
    turns: dict[Child, list[dict[str, Any]]] = {own: [], other: []}
    for number, ids_S in enumerate(tqdm(rows_RS, desc="turns", unit="row", leave=False)):
        for side in (own, other) if number % 2 else (other, own):
            turns[side].append(side.turn(ids_S, prompt_tokens))
    decoded = rows_RS.shape[1] - prompt_tokens
    first_token_s, decode_s = (
        [np.array([turn[key] for turn in turns[side][1:]]) for side in (own, other)]
        for key in ("first_token_s", "decode_s")
    )
    chosen = [np.array([turn["chosen"] for turn in turns[side][1:]]) for side in (own, other)]

    def both(values: list[np.ndarray]) -> dict[str, Any]:
        ours, peer = values
        return {"ours": spread(ours), "peer": spread(peer), "ratio": spread(ours / peer)}

    return {
        "turns": len(rows_RS) - 1,
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decoded,
        "decode_tokens_per_second": both([decoded / seconds for seconds in decode_s]),
        "prefill_tokens_per_second": both([prompt_tokens / s for s in first_token_s]),
        "first_token_s": both(first_token_s),
        "same_greedy_token": float((chosen[0] == chosen[1]).mean()),
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, and range."""
    return {
        "median": float(np.median(values)),
        "low": float(values.min()),
        "high": float(values.max()),
    }
