"""Frozen dataclasses as JSON and back: defaults left out, members of a sum type named.

Owns how a value is checked against its annotated type, with errors that say where, what and what
was wanted. A member of a sum type has its name in JSON, which never changes, as `json_kind`. The
standard library suffices: machines that only run kernels have nothing else.
"""

import contextlib
import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

_hints_of = functools.cache(typing.get_type_hints)


def plain(value: Any) -> Any:
    """JSON of a value: fields at their default are left out, members of the sum type are named."""
    if dataclasses.is_dataclass(value):
        found = {
            f.name: plain(inner)
            for f in dataclasses.fields(value)
            if (inner := getattr(value, f.name)) != _default(f)
        }
        kind = getattr(value, "json_kind", None)
        return found if kind is None else {"kind": kind, **found}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def typed(value: Any, wanted: Any, where: str) -> Any:
    """`value`, read from JSON, as the type `wanted`."""
    origin = typing.get_origin(wanted)
    if wanted is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _member(value, typing.get_args(wanted), where)
    if dataclasses.is_dataclass(wanted):
        return _instance(value, wanted, where)
    if origin is Literal:
        if value in typing.get_args(wanted):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            inner = typing.get_args(wanted)[0]
            return tuple(typed(v, inner, f"{where}[{i}]") for i, v in enumerate(value))
    elif origin is not None and issubclass(origin, Mapping):
        if isinstance(value, dict):
            inner = typing.get_args(wanted)[1]
            return {key: typed(v, inner, f"{where}.{key}") for key, v in value.items()}
    elif wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, wanted) and not (isinstance(value, bool) and wanted is not bool):
        return value
    raise ValueError(f"{where} is {value!r:.80}; want {getattr(wanted, '__name__', wanted)}")


def _member(value: Any, members: tuple[Any, ...], where: str) -> Any:
    classes = {m.json_kind: m for m in members if hasattr(m, "json_kind")}
    if classes:
        kind = value.get("kind") if isinstance(value, dict) else value
        if kind not in classes:
            raise ValueError(f"{where} is of kind {kind!r:.80}; want one of {', '.join(classes)}")
        rest = {key: inner for key, inner in value.items() if key != "kind"}
        return typed(rest, classes[kind], where)
    for wanted in members:  # int before float, so that a whole number stays one
        with contextlib.suppress(ValueError):
            if not (wanted is float and isinstance(value, int) and int in members):
                return typed(value, wanted, where)
    names = ", ".join(getattr(wanted, "__name__", str(wanted)) for wanted in members)
    raise ValueError(f"{where} is {value!r:.80}; want one of {names}")


def _instance(value: Any, wanted: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r:.80}; want a JSON object")
    hints = _hints_of(wanted)
    unknown = sorted(value.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{where} has {', '.join(unknown)}; want only {', '.join(hints)}")
    found = {name: typed(inner, hints[name], f"{where}.{name}") for name, inner in value.items()}
    needed = [f.name for f in dataclasses.fields(wanted) if _default(f) is dataclasses.MISSING]
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return wanted(**found)
