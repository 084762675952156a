"""What ships with a trained model: its held-out text, and the card that says how good it is.

Owns the figures of the model card: bits per byte against `xz -9` on the same files, both miniature
tasks, expert shares, the loss curve.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from hobbit_jax.evals import quality, tasks
from hobbit_jax.evals.logit_comparison import compare_in_float64
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.importance.calibration import count_routing
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import LoadedModel
from hobbit_jax.reference_model.corpus import SourceFile

CONTEXT = 512
ROWS_PER_BATCH = 4


def write_held_out(files: list[SourceFile], path: Path) -> None:
    """Held-out files as gzipped JSON lines, alternating between calibration and evaluation.

    Two evaluation files to one calibration file; the same files give the same bytes.
    """
    lines = io.StringIO()
    for index, file in enumerate(sorted((f for f in files if f.held_out), key=lambda f: f.name)):
        part = "calibration" if index % 3 == 2 else "evaluation"
        lines.write(json.dumps({"name": file.name, "part": part, "text": file.text}) + "\n")
    path.write_bytes(gzip.compress(lines.getvalue().encode(), 9, mtime=0))


def bits_per_byte(engine: Engine, model: LoadedModel, texts: list[str]) -> float:
    """Bits per UTF-8 byte of all of `texts`, every token predicted once.

    Each text stands alone after a BOS and is cut into windows of CONTEXT tokens,
    each predicted from what precedes it in the same window: a lower bound on what
    the model can do.
    """
    tokenizer, nats, total_bytes = model.tokenizer(), 0.0, 0
    rows = []
    for text in texts:
        ids = tokenizer.encode(text)
        total_bytes += len(text.encode())
        # Windows overlap by one token, so that each token but the BOS is a target once.
        for start in range(0, len(ids) - 1, CONTEXT):
            rows.append(ids[start : start + CONTEXT + 1])
    rows.sort(key=len)
    for start in range(0, len(rows), ROWS_PER_BATCH):
        batch = rows[start : start + ROWS_PER_BATCH]
        ids_BS = np.zeros((len(batch), CONTEXT + 1), np.int32)
        for row, ids in enumerate(batch):
            ids_BS[row, : len(ids)] = ids
        logits = np.asarray(engine.score(ids_BS[:, :-1]))
        nll_BT = compare_in_float64(logits, logits, ids_BS[:, 1:]).nll_BT
        for row, ids in enumerate(batch):
            nats += float(nll_BT[row, : len(ids) - 1].sum())
    return nats / np.log(2) / total_bytes


def xz_bits_per_byte(texts: list[str]) -> float:
    """Bits per byte of `xz -9`, file by file, as the command writes it."""
    encoded = [text.encode() for text in texts]
    return 8 * sum(len(lzma.compress(t, preset=9)) for t in encoded) / sum(map(len, encoded))


def measure(model: LoadedModel, texts: list[str], problems: int) -> dict[str, Any]:
    """The card's figures for one model file on held-out `texts` and tasks."""
    engine = Engine(model, HostExperts(model.config, model.file))
    windows = quality.cut_windows(model.tokenizer(), texts, 64, CONTEXT)
    selections_LE = count_routing(engine, windows).selections_LE
    shares_LE = selections_LE / selections_LE.sum(axis=1, keepdims=True)
    scores = {
        task: tasks.evaluate(engine, model.tokenizer(), task, problems)
        for task in ("arithmetic", "functions")
    }
    return {
        "file_bytes": model.file.file_bytes,
        "sha256": model.file.sha256(),
        "held_out_bytes": sum(len(text.encode()) for text in texts),
        "held_out_files": len(texts),
        "bits_per_byte": bits_per_byte(engine, model, texts),
        "xz_bits_per_byte": xz_bits_per_byte(texts),
        "arithmetic": vars(scores["arithmetic"]),
        "functions": vars(scores["functions"]),
        "expert_share_min": float(shares_LE.min()),
        "expert_share_max": float(shares_LE.max()),
    }


def draw_loss(losses: list[dict[str, Any]], path: Path) -> None:
    """Training loss and held-out loss against steps."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [row["step"] for row in losses]
    axes.plot(steps, [row["nats_per_token"] for row in losses], lw=0.6, label="training batch")
    held = [row for row in losses if "held_out_nats_per_token" in row]
    axes.plot(
        [row["step"] for row in held],
        [row["held_out_nats_per_token"] for row in held],
        "o-",
        label="held-out sources",
    )
    axes.set(xlabel="step", ylabel="nats per token", title="Reference model, training")
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def write_card(path: Path, train: dict[str, Any], figures: dict[str, dict[str, Any]]) -> None:
    """MODEL_CARD.md from the training's description and the figures of each exported file."""
    rows = []
    for name, f in figures.items():
        rows.append(
            f"| {name} | {f['file_bytes'] / 1e6:.1f} MB | {f['bits_per_byte']:.3f} "
            f"| {f['xz_bits_per_byte']:.3f} "
            + "".join(
                f"| {f[task]['value']:.1%} [{f[task]['low']:.1%}, {f[task]['high']:.1%}] "
                for task in ("arithmetic", "functions")
            )
            + f"| {f['expert_share_min']:.1%} to {f['expert_share_max']:.1%} |"
        )
    first = next(iter(figures.values()))
    hashes = "\n".join(f"- {name}: sha256 `{f['sha256']}`" for name, f in figures.items())
    path.write_text(
        f"""# Model card: the reference model

A small mixture-of-experts model of architecture `qwen3moe`, trained from scratch by
`scripts/reference_model/train_reference.py` so that quality can be measured where no model hub can
be reached. It stands in for a real model in method, not in ability.

- Shape: {train["shape"]}; {train["parameters"] / 1e6:.1f}M parameters.
- Training text: the sources of Python {train["python"]}'s standard library (tests left out; one
  file in twenty held out by a hash of its name), {train["source_tokens"] / 1e6:.2f}M tokens of it;
  and generated tasks (`hobbit_jax/synthetic_tasks`, training split): worked arithmetic, drills,
  small functions from docstrings.
- {train["steps"]} steps of {train["tokens_per_step"]} tokens
  ({train["steps"] * train["tokens_per_step"] / 1e6:.2f}M in all), Muon and Adam, float32,
  on {train["device"]}. {train["duration"]}
- Byte-level BPE of {train["vocab_size"]} tokens trained on the same text.

Measured on {first["held_out_files"]} held-out files ({first["held_out_bytes"] / 1e3:.0f} kB) in
windows of {CONTEXT} tokens, and on {first["arithmetic"]["problems"]} held-out problems of
each task, greedy (arithmetic: exact match; functions: pass@1; `xz -9` file by file):

| file | size | bits per byte | `xz -9` | arithmetic | functions | share of an expert in its layer |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

{hashes}

![Loss](loss.png)

The held-out files (`held_out.jsonl.gz`) are part of CPython, under the PSF licence
(PYTHON_LICENSE.txt). The Q4_K_M-style mix is llama.cpp's, the encoders are ours.
""",
        encoding="utf-8",
    )
