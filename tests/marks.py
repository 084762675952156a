"""Marks of parametrised cases. Needs nothing but pytest, as on a machine that only runs kernels."""

import pytest


def slow_unless(quick: bool, *values):
    """A case of these values, which `make slow` runs unless it is quick."""
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)
