"""Array names end in their shape letters, and calls of a test run are held to that.

Owns an import hook: each parameter of our functions whose name ends in letters gets an array of so
many axes, axes of one letter have one size in a call, and a digit is the size itself. Left alone
are what has no `shape` (lists, None), a function's later calls, and functions that JAX or numba
compiled when their module was imported: their callers' names are checked.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import re
import sys
from types import ModuleType

PACKAGES = ("hobbit_jax", "pallas_kernels")
# Blocks are unpacked with any axes in front: those of a bank, of several matrices.
_ANY_LEADING_AXES = "pallas_kernels.formats"
_CALLS_CHECKED = 200  # of each function in a process, so that a test run takes no longer
_LETTERS = re.compile(r"_([1-9]*[A-Z][A-Za-z1-9]*|[1-9a-z]+[A-Z][A-Za-z1-9]*)$")


def letters_of(name: str) -> str | None:
    """The shape letters that a name ends in; None where it has none."""
    found = _LETTERS.search(name)
    return found.group(1) if found else None


def checked(function):
    """`function`, its arrays held to their names; itself where no parameter's name has letters."""
    calls_left, has_leading_axes = (
        [_CALLS_CHECKED],
        function.__module__.startswith(_ANY_LEADING_AXES),
    )
    names = list(inspect.signature(function).parameters)
    wanted = [(at, n, letters) for at, n in enumerate(names) if (letters := letters_of(n))]
    if not wanted:
        return function

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not calls_left[0]:
            return function(*args, **kwargs)
        calls_left[0] -= 1
        # First, since a function may itself refuse what has a wrong shape.
        returned = function(*args, **kwargs)
        sizes: dict[str, tuple[int, str]] = {}
        for at, name, letters in wanted:
            shape = getattr(args[at] if at < len(args) else kwargs.get(name), "shape", None)
            if not isinstance(shape, tuple):
                continue
            where = f"{function.__module__}.{function.__qualname__}"
            shape = shape[-len(letters) :] if has_leading_axes else shape
            assert len(shape) == len(letters), f"{where}: {name} has shape {shape}"
            for letter, size in zip(letters, shape, strict=True):
                first = (int(letter), "a digit") if letter.isdigit() else (size, name)
                known, whose = sizes.setdefault(letter, first)
                assert size == known, f"{where}: {letter} is {size} in {name}, {known} in {whose}"
        return returned

    return call


def hold_to_names(module: ModuleType) -> None:
    """Checks the functions and methods that a module defines."""

    def hold(owner) -> None:
        for name, value in list(vars(owner).items()):
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value):
                setattr(owner, name, checked(value))
            elif inspect.isclass(value) and owner is module:
                hold(value)

    hold(module)


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        hold_to_names(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Before the first import of our packages."""
    early = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    assert not early, f"imported before: {early}"
    sys.meta_path.insert(0, _Finder())
