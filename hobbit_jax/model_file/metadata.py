"""Checked reading of a file's metadata: every key is read as a kind of value with a range.

Owns what counts as text, as an integer, as a number, and the sentence that refuses anything else.
`GGUFFile.read` is the way in; `GGUFFile.metadata` itself is for copying only. A value that has
passed can be used without asking again: integers are ints and inside their range, numbers are
finite, lists hold one kind.

Source: llama.cpp, src/llama-model-loader.cpp (`get_key` refuses a value of another type) and
src/llama-impl.h; where llama.cpp takes one width of integers only, all widths are taken here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

INT32_MAX: Final = 2**31 - 1
FLOAT32_MAX: Final = 3.4028234663852886e38

T = TypeVar("T")
D = TypeVar("D")


class Wrong(Exception):  # noqa: N818 (never leaves this module)
    """Carries how a value that was refused is shown."""


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What a key's value has to be."""

    wanted: str  # completes "expected …"
    check: Callable[[Any], T]  # the value, or Wrong


class UnequalLayers(Exception):  # noqa: N818 (never leaves this module)
    """The layers of a model have different values."""


class Required:
    """Marks a key that has no default."""


REQUIRED: Final = Required()


def read(
    path: Path, metadata: Mapping[str, Any], key: str, kind: Kind[T], default: D | Required
) -> T | D:
    """The value of `key`, or `default` where the file has no such key. See `GGUFFile.read`."""
    if key not in metadata:
        if isinstance(default, Required):
            raise ValueError(
                f"{path}: metadata key {key} is missing, expected {kind.wanted}; convert the model "
                "again with a current llama.cpp"
            )
        return default
    try:
        return kind.check(metadata[key])
    except Wrong as wrong:
        raise ValueError(
            f"{path}: metadata key {key} is {wrong}, expected {kind.wanted}; convert the model "
            "again with a current llama.cpp"
        ) from None
    except UnequalLayers:
        raise NotImplementedError(
            f"{path}: metadata key {key} has one value per layer, and they differ; supported are "
            "models with equal layers"
        ) from None


def shown(value: Any) -> str:
    """A value in an error message: one short line, whatever the file holds."""
    if isinstance(value, list):
        return f"a list of {len(value)}" + (f" ({shown(value[0])}, …)" if value else "")
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}… ({len(text)} characters)"


def text() -> Kind[str]:
    """A string that is UTF-8 in the file; it may be empty."""
    return Kind("a string", _text)


def flag() -> Kind[bool]:
    """True or false."""

    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise Wrong(shown(value))
        return value

    return Kind("true or false", check)


def flags(count: int) -> Kind[list[bool]]:
    """A list of `count` values, true or false."""
    element = flag()

    def check(value: Any) -> list[bool]:
        if len(_list(value, count)) != count:
            raise Wrong(shown(value))
        return [_element(element.check, v, i) for i, v in enumerate(value)]

    return Kind(f"a list of {count} values, true or false", check)


def integer(low: int = 0, high: int = INT32_MAX, why: str = "") -> Kind[int]:
    """An integer from `low` to `high`, both included; a float is none. `why` explains `high`."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Wrong(shown(value))
        return value

    return Kind(f"an integer from {low} to {high}{why and f' ({why})'}", check)


def number(low: float = -FLOAT32_MAX, high: float = FLOAT32_MAX) -> Kind[float]:
    """A finite number from `low` to `high`, both included."""

    def check(value: Any) -> float:
        # NaN fails every comparison; the bounds are finite.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise Wrong(shown(value))
        return float(value)

    bounded = low > -FLOAT32_MAX or high < FLOAT32_MAX
    return Kind(f"a number from {low:g} to {high:g}" if bounded else "a finite number", check)


def texts(least: int = 0) -> Kind[list[str]]:
    """A list of at least `least` strings."""

    def check(value: Any) -> list[str]:
        for i, entry in enumerate(_list(value, least)):
            if not isinstance(entry, str):
                raise Wrong(shown(value))
            if not entry.isascii():
                _element(_text, entry, i)
        return value

    return Kind(_of("a list of", "strings", least), check)


def integers(low: int = 0, high: int = INT32_MAX) -> Kind[list[int]]:
    """A list of integers from `low` to `high`."""
    element = integer(low, high)
    return Kind(
        f"a list of integers from {low} to {high}",
        lambda value: [_element(element.check, v, i) for i, v in enumerate(_list(value))],
    )


def numbers() -> Kind[list[float]]:
    """A list of numbers, infinite ones included: only their order counts. No NaN."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise Wrong(shown(value))
        return float(value)

    return Kind(
        "a list of numbers",
        lambda value: [_element(check, v, i) for i, v in enumerate(_list(value))],
    )


def per_layer(kind: Kind[T], n_layers: int) -> Kind[list[T]]:
    """One value for the model, or one for each layer: a list with that of each.

    Source: llama.cpp, `get_key_or_arr`.
    """

    def check(value: Any) -> list[T]:
        if not isinstance(value, list):
            return [kind.check(value)] * n_layers
        if len(value) != n_layers:
            raise Wrong(shown(value))
        return [_element(kind.check, v, i) for i, v in enumerate(value)]

    return Kind(f"{kind.wanted}, or a list of {n_layers}, one for each layer", check)


def of_every_layer(kind: Kind[T], n_layers: int) -> Kind[T]:
    """`per_layer` where it is the same in all of them.

    Raises:
        NotImplementedError: when it is read and the layers differ.
    """

    of_each = per_layer(kind, n_layers)

    def check(value: Any) -> T:
        of_layers = of_each.check(value)
        if any(other != of_layers[0] for other in of_layers):
            raise UnequalLayers
        return of_layers[0]

    return Kind(of_each.wanted, check)


def _text(value: Any) -> str:
    # Bytes that are no UTF-8 are half surrogates here (`gguf_header`), which nothing can encode.
    if not isinstance(value, str):
        raise Wrong(shown(value))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Wrong(f"{shown(value)}, which is not UTF-8") from None
    return value


def _list(value: Any, least: int = 0) -> list:
    if not isinstance(value, list) or len(value) < least:
        raise Wrong(shown(value))
    return value


def _element(check: Callable[[Any], T], value: Any, index: int) -> T:
    try:
        return check(value)
    except Wrong as wrong:
        raise Wrong(f"a list whose entry {index} is {wrong}") from None


def _of(what: str, plural: str, least: int) -> str:
    return f"{what} {plural}" if not least else f"{what} at least {least} {plural}"
