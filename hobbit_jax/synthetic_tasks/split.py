"""Owns the train / held-out split of the mini tasks and the drawing loop that respects it.

The split is by construction: an item belongs to the held-out part iff a stable hash of its content
(what it asks, without names or wording) falls into one bucket of ten, so no list of held-out items
has to be stored or shipped with a model.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Any, Literal, TypeVar

Split = Literal["train", "heldout"]
ItemT = TypeVar("ItemT", bound=Any)

_BUCKETS = 10
_FRUITLESS_DRAWS = 20_000


def split_of(content: str) -> Split:
    """The part that an item with this content belongs to; the same on every platform."""
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % _BUCKETS == 0 else "train"


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
        item = make(rng)
        if item is not None and split_of(item.content) == split:
            identity = item.content if split == "heldout" else item.prompt
            if identity not in items:
                items[identity] = item
                fruitless = 0
                continue
        fruitless += 1
        if fruitless == _FRUITLESS_DRAWS:
            raise ValueError(f"wanted {count} {split} items, the grammar gave only {len(items)}")
    return list(items.values())
