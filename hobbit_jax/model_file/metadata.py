"""The kinds of a file's metadata: every key is read as a kind of value with a range.

Owns what counts as text, as an integer, as a number. `GGUFFile.read` is the way in;
`GGUFFile.metadata` itself is for copying only. A value that has passed can be used without asking
again: integers are ints and inside their range, numbers are finite, lists hold one kind.

Source: llama.cpp, src/llama-model-loader.cpp (`get_key` refuses a value of another type) and
src/llama-impl.h; where llama.cpp takes one width of integers only, all widths are taken here.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

INT32_MAX = 2**31 - 1

T = TypeVar("T")
KindOf = TypeVar("KindOf", covariant=True)


@dataclass(frozen=True)
class Kind(Generic[KindOf]):
    """What a key's value has to be."""

    wanted: str  # completes "expected …"
    check: Callable[[Any], KindOf]  # the value, or a ValueError with how it is shown


class Required:
    """Marks a key that has no default."""


REQUIRED = Required()


def shown(value: Any) -> str:
    """A value in an error message: one short line, whatever the file holds."""
    if isinstance(value, list):
        return f"a list of {len(value)}" + (f" ({shown(value[0])}, …)" if value else "")
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}… ({len(text)} characters)"


def _where(
    wanted: str, accepts: Callable[[Any], bool], convert: Callable[[Any], T] = lambda value: value
) -> Kind[T]:
    """Values that a predicate accepts, converted."""

    def check(value: Any) -> T:
        if not accepts(value):
            raise ValueError(shown(value))
        return convert(value)

    return Kind(wanted, check)


def text() -> Kind[str]:
    """A string that is UTF-8 in the file; it may be empty."""
    return Kind("a string", _text)


def _text(value: Any) -> str:
    # Bytes that are no UTF-8 are half surrogates here (`gguf_header`), which nothing can encode.
    if not isinstance(value, str):
        raise ValueError(shown(value))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{shown(value)}, which is not UTF-8") from None
    return value


def flag() -> Kind[bool]:
    """True or false."""
    return _where("true or false", lambda value: isinstance(value, bool))


def integer(low: int = 0, high: int = INT32_MAX, why: str = "") -> Kind[int]:
    """An integer from `low` to `high`, both included; a float is none. `why` explains `high`."""
    wanted = f"an integer from {low} to {high}{why and f' ({why})'}"
    return _where(wanted, lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind[float]:
    """A number from `low` to `high`, both included and finite."""
    wanted = f"a number from {low:g} to {high:g}"
    # NaN fails every comparison; the bounds are finite.
    return _where(wanted, lambda v: type(v) in (int, float) and low <= v <= high, float)


def _list(wanted: str, element: Kind[T], fits: Callable[[int], bool]) -> Kind[list[T]]:
    """Lists of a length that `fits`, of one kind of elements."""

    def check(value: Any) -> list[T]:
        if not isinstance(value, list) or not fits(len(value)):
            raise ValueError(shown(value))
        checked: list[T] = []
        try:
            for entry in value:
                checked.append(element.check(entry))
        except ValueError as error:
            raise ValueError(f"a list whose entry {len(checked)} is {error}") from None
        return checked

    return Kind(wanted, check)


def flags(count: int) -> Kind[list[bool]]:
    """A list of `count` values, true or false."""
    return _list(f"a list of {count} values, true or false", flag(), lambda n: n == count)


def texts(least: int = 0) -> Kind[list[str]]:
    """A list of at least `least` strings."""
    wanted = f"a list of at least {least} strings" if least else "a list of strings"
    each = _list(wanted, text(), lambda n: n >= least)

    def check(value: Any) -> list[str]:
        if isinstance(value, list) and len(value) >= least:
            with suppress(TypeError, UnicodeEncodeError):
                "".join(value).encode()  # the vocabularies of most files, in one go
                return value
        return each.check(value)

    return Kind(wanted, check)


def integers(low: int = 0, high: int = INT32_MAX) -> Kind[list[int]]:
    """A list of integers from `low` to `high`."""
    wanted = f"a list of integers from {low} to {high}"
    return _list(wanted, integer(low, high), lambda n: True)


def numbers() -> Kind[list[float]]:
    """A list of numbers, infinite ones included: only their order counts. No NaN."""
    wanted = "a list of numbers"
    element = _where(wanted, lambda v: type(v) in (int, float) and not math.isnan(v), float)
    return _list(wanted, element, lambda n: True)


def per_layer(kind: Kind[T], n_layers: int) -> Kind[list[T]]:
    """One value for the model, or one for each layer: a list with that of each.

    Source: llama.cpp, `get_key_or_arr`.
    """
    wanted = f"{kind.wanted}, or a list of {n_layers}, one for each layer"
    of_each = _list(wanted, kind, lambda n: n == n_layers)

    def check(value: Any) -> list[T]:
        return of_each.check(value) if isinstance(value, list) else [kind.check(value)] * n_layers

    return Kind(wanted, check)
