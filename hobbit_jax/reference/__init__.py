"""The reference model that ships with the package, and the text it never saw.

`held_out.jsonl.gz` holds the standard-library files kept from training, each marked for calibration
or for evaluation, so that every machine measures on the same text. MODEL_CARD.md tells the rest.
"""

import gzip
import json
from importlib import resources
from pathlib import Path
from typing import Literal

Part = Literal["calibration", "evaluation"]
MODEL_NAME = "reference-q4_k_m.gguf"
HELD_OUT_NAME = "held_out.jsonl.gz"


def _package_file(name: str) -> Path:
    path = Path(str(resources.files(__name__))) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} is not in the package; train it with "
            "scripts/reference_model/train_reference.py or give --model M.gguf"
        )
    return path


def model_path() -> Path:
    """The shipped model file."""
    return _package_file(MODEL_NAME)


def read_held_out(path: Path, part: Part) -> list[str]:
    """Held-out files of one part from a file as `reference_model.card.write_held_out` makes it."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        files = [json.loads(line) for line in lines]
    return [file["text"] for file in files if file["part"] == part]


def held_out_texts(part: Part) -> list[str]:
    """The shipped held-out files of one part, in a fixed order."""
    return read_held_out(_package_file(HELD_OUT_NAME), part)
