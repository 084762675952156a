"""What ships with a trained model: its held-out text, and the card that says how good it is."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from hobbit_jax.cache.controller import OnRouting
from hobbit_jax.cache.selection import RouterOutput
from hobbit_jax.evals import quality, tasks
from hobbit_jax.evals.logit_comparison import compare_in_float64
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import LoadedModel
from hobbit_jax.reference_model.corpus import CONTEXT, SourceFile

_ROWS_PER_BATCH = 4


def write_held_out(files: list[SourceFile], path: Path) -> None:
    """Held-out files as gzipped JSON lines, two for evaluation and then one for calibration.

    The same files give the same bytes.
    """
    held_out = sorted((file for file in files if file.held_out), key=lambda file: file.name)
    parts = ("evaluation", "evaluation", "calibration")
    rows = (
        {"name": file.name, "part": parts[index % 3], "text": file.text}
        for index, file in enumerate(held_out)
    )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))


def bits_per_byte(engine: Engine, model: LoadedModel, texts: list[str]) -> float:
    """Bits per UTF-8 byte of all of `texts`, every token predicted once.

    Each text stands alone after a BOS and is cut into windows of CONTEXT tokens, each predicted
    from what precedes it in the same window: a lower bound on what the model can do.
    """
    encoded, nats = [model.tokenizer().encode(text) for text in texts], 0.0
    # Windows overlap by one token, so that each token but the BOS is a target once.
    starts = [(ids, start) for ids in encoded for start in range(0, len(ids) - 1, CONTEXT)]
    rows = sorted((ids[start : start + CONTEXT + 1] for ids, start in starts), key=len)
    for start in range(0, len(rows), _ROWS_PER_BATCH):
        batch = rows[start : start + _ROWS_PER_BATCH]
        ids_BS = np.zeros((len(batch), CONTEXT + 1), np.int32)
        for row, ids in enumerate(batch):
            ids_BS[row, : len(ids)] = ids
        logits = np.asarray(engine.score(ids_BS[:, :-1]))
        nll_BT = compare_in_float64(logits, logits, ids_BS[:, 1:]).nll_BT
        nats += sum(
            float(nll_T[: len(ids) - 1].sum()) for nll_T, ids in zip(nll_BT, batch, strict=True)
        )
    return nats / np.log(2) / sum(len(text.encode()) for text in texts)


def measure(model: LoadedModel, texts: list[str], problems: int) -> dict[str, Any]:
    """The card's figures for one model file on held-out `texts` and tasks."""
    engine = Engine(model, HostExperts(model.config, model.file))
    windows = quality.cut_windows(model.tokenizer(), texts, 64, CONTEXT)
    selections_LE = np.zeros((model.config.n_layers, model.config.n_experts))

    def count(routed: RouterOutput) -> None:
        np.add.at(selections_LE[routed.layer], routed.ids_TK[routed.valid_T], 1)

    quality.watch_windows(engine, windows, OnRouting(count), "counting uses")
    shares_LE = selections_LE / selections_LE.sum(axis=1, keepdims=True)
    encoded = [text.encode() for text in texts]
    xz_bytes = sum(len(lzma.compress(text, preset=9)) for text in encoded)
    return {
        "file_bytes": model.file.file_bytes,
        "sha256": model.file.sha256(),
        "held_out_bytes": sum(map(len, encoded)),
        "held_out_files": len(texts),
        "bits_per_byte": bits_per_byte(engine, model, texts),
        "xz_bits_per_byte": 8 * xz_bytes / sum(map(len, encoded)),
        **tasks.evaluate(engine, model.tokenizer(), problems),
        "expert_share_min": float(shares_LE.min()),
        "expert_share_max": float(shares_LE.max()),
    }


def draw_loss(losses: list[dict[str, Any]], path: Path) -> None:
    """Training loss and held-out loss against steps."""
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    series = {"training batch": "nats_per_token", "held-out sources": "held_out_nats_per_token"}
    for (label, name), style in zip(series.items(), ("-", "o-"), strict=True):
        rows = [row for row in losses if name in row]
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], style, label=label)
    axes.set(xlabel="step", ylabel="nats per token", title="Reference model, training")
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def write_card(path: Path, train: dict[str, Any], figures: dict[str, dict[str, Any]]) -> None:
    """MODEL_CARD.md from the training's description and the figures of each exported file."""
    template = jinja2.Template(
        Path(__file__).with_name("MODEL_CARD.md.j2").read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    text = template.render(train=train, figures=figures, context=CONTEXT)
    path.write_text(text, encoding="utf-8")
