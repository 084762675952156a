"""The reference model's recipe, from nothing to files that can ship.

Owns the model's shape and the order of the work. Every stage is resumable: the training from its
checkpoints, the others by a re-run.
"""

import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path

import jax
from flax import nnx
from tokenizers import Tokenizer

from hobbit_jax import reference
from hobbit_jax.atomic import write_text
from hobbit_jax.models.attention import GroupedQuery, Rope
from hobbit_jax.models.config import BlockConfig, ModelConfig, RouterConfig
from hobbit_jax.models.loading import load_model
from hobbit_jax.record import machine
from hobbit_jax.reference_model import card, corpus, export
from hobbit_jax.reference_model.trainer import train
from hobbit_jax.synthetic_tasks.documents import EVEN_MIX, TaskMix
from pallas_kernels.backends import for_quality

MODEL = ModelConfig(
    arch="qwen3moe",
    d_model=256,
    vocab_size=4096,
    context_length=corpus.CONTEXT,
    rms_eps=1e-6,
    tied_head=True,
    blocks=(BlockConfig(GroupedQuery(4, 2, 64, Rope(10000.0, 64, "neox"), "head")),) * 4,
    router=RouterConfig("softmax", renormalise=True),
    n_experts=16,
    experts_per_token=2,
    d_expert=256,
)
# The first phase leaves sums and differences a third wrong; the second drills them.
PHASES = (
    corpus.Phase(steps=800, task_rows=6, mix=EVEN_MIX, learning_rate=1.0),
    corpus.Phase(
        steps=280,
        task_rows=12,
        mix=TaskMix(problems=0.3, drills=0.6, functions=0.1),
        learning_rate=0.5,
    ),
)
HELD_OUT_WINDOWS = 32  # watched during training
CARD_PROBLEMS = 200  # per task
SHIPPED = (
    reference.MODEL_NAME,
    reference.HELD_OUT_NAME,
    "MODEL_CARD.md",
    "card.json",
    "loss.png",
    "PYTHON_LICENSE.txt",
)


def run(workdir: Path) -> None:
    """Trains (or goes on training), exports, measures and writes the card into `workdir`."""
    workdir.mkdir(parents=True, exist_ok=True)
    files = corpus.standard_library()
    tokenizer_path = workdir / "tokenizer.json"
    if not tokenizer_path.exists():
        corpus.train_tokenizer(files, MODEL.vocab_size).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    batches = corpus.Batches(tokenizer, files, PHASES)
    watched = corpus.held_out_windows(tokenizer, files, HELD_OUT_WINDOWS)
    model = train(MODEL, batches, watched, workdir)

    float32_path, q4_path = workdir / "reference-f32.gguf", workdir / reference.MODEL_NAME
    export.export_float32(model, tokenizer, "hobbit_jax reference", float32_path)
    source = load_model(float32_path, "xla")
    export.export_q4_k_m(source.file, source.config, q4_path)

    held_out = workdir / reference.HELD_OUT_NAME
    card.write_held_out(files, held_out)
    losses = [json.loads(line) for line in (workdir / "loss.jsonl").read_text().splitlines()]
    card.draw_loss(losses, workdir / "loss.png")
    shutil.copy(_python_license(), workdir / "PYTHON_LICENSE.txt")
    texts = reference.read_held_out(held_out, "calibration")
    texts += reference.read_held_out(held_out, "evaluation")
    figures = {
        name: card.measure(load_model(path, for_quality(None)), texts, CARD_PROBLEMS)
        for name, path in (("float32", float32_path), ("Q4_K_M", q4_path))
    }
    elapsed_s: dict[int, float] = {}  # of each run, by the step that it began at
    for row in losses:
        began = row["step"] - row["steps_this_run"]
        elapsed_s[began] = max(row["elapsed_s"], elapsed_s.get(began, 0.0))
    description = {
        "shape": (
            f"{MODEL.n_layers} layers, {MODEL.d_model} wide, {MODEL.n_experts} experts of "
            f"{MODEL.d_expert} with {MODEL.experts_per_token} per token, context "
            f"{MODEL.context_length}, tied head"
        ),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))),
        "vocab_size": MODEL.vocab_size,
        "source_tokens": len(batches.source_stream),
        "steps": sum(phase.steps for phase in PHASES),
        "phases": [asdict(phase) for phase in PHASES],
        "tokens_per_step": corpus.BATCH * corpus.CONTEXT,
        "python": platform.python_version(),
        "device": machine()["device"],
        "duration": f"Wall time of the training steps: {sum(elapsed_s.values()) / 60:.0f} minutes.",
    }
    found = {"training": description, "figures": figures}
    write_text(workdir / "card.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    card.write_card(workdir / "MODEL_CARD.md", description, figures)


def install(workdir: Path) -> Path:
    """Copies what ships from `workdir` into the package; returns the package's folder."""
    target = Path(reference.__file__).parent
    for name in SHIPPED:
        shutil.copyfile(workdir / name, target / name)
    return target


def _python_license() -> Path:
    """The licence text of the running Python, which covers the held-out sources."""
    library = Path(json.__file__).parent.parent
    for path in (library / "LICENSE.txt", library.parent.parent / "LICENSE.txt"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no LICENSE.txt beside the Python library in {library}")
