"""What both task families are drawn by: their tables, and the train / held-out split.

The split is by construction: an item belongs to the held-out part iff a stable hash of its content
(what it asks, without names or wording) falls into one bucket of ten, so no list of held-out items
has to be stored or shipped with a model.
"""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

Split = Literal["train", "heldout"]
ItemT = TypeVar("ItemT", bound=Any)

_BUCKETS = 10
_FRUITLESS_DRAWS = 20_000


def paragraphs(file_name: str) -> list[list[str]]:
    """The lines of each paragraph of a text file of this folder; empty lines stand between."""
    text = Path(__file__).with_name(file_name).read_text(encoding="utf-8")
    return [paragraph.splitlines() for paragraph in text.split("\n\n")]


def draw(
    make: Callable[[random.Random], ItemT | None], seed: int, count: int, split: Split
) -> list[ItemT]:
    """`count` items of one split, drawn by calling `make(rng)`, where None means "try again".

    An item has a `prompt`, which the model completes, and a `content`. No two held-out items share
    their content, so each one is a task of its own. Training items only differ in their prompt:
    another wording of the same task is worth reading.

    Raises:
      ValueError: unknown split, or the grammar has fewer than `count` items for it.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    rng = random.Random(seed)
    items: dict[str, ItemT] = {}
    fruitless = 0
    while len(items) < count:
        fruitless += 1
        item = make(rng)
        if item is not None and _is_held_out(item.content) == (split == "heldout"):
            identity = item.content if split == "heldout" else item.prompt
            if identity not in items:
                items[identity] = item
                fruitless = 0
        if fruitless == _FRUITLESS_DRAWS:
            raise ValueError(f"wanted {count} {split} items, the grammar gave only {len(items)}")
    return list(items.values())


def _is_held_out(content: str) -> bool:
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _BUCKETS == 0
