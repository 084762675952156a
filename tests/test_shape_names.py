"""The check of array names finds what it is for."""

import numpy as np
import pytest
from shape_names import checked, letters_of

from hobbit_jax.evals import logit_comparison


@pytest.mark.parametrize(
    ("name", "letters"),
    [("x_TD", "TD"), ("q_BTHd", "BTHd"), ("d_11G", "11G"), ("shares_pLE", "pLE"), ("x_B", "B"),
     ("x", None), ("max_tokens", None), ("TD", None), ("low_share", None)],
)  # fmt: skip
def test_letters(name, letters):
    assert letters_of(name) == letters


def test_a_wrong_shape_is_found():
    def both(x_TD, weight_T, scale_1D=None):
        if len(x_TD) == 0:
            raise ValueError("no tokens")
        return len(weight_T)

    held, x_TD = checked(both), np.zeros((2, 3))
    assert held(x_TD, np.zeros(2)) == held(x_TD, [1, 2], scale_1D=np.zeros((1, 3))) == 2
    for wrong in ((x_TD, np.zeros(3)), (x_TD, np.zeros((2, 1))), (x_TD, [0], np.zeros((2, 3)))):
        with pytest.raises(AssertionError, match=r"both: (T is|weight_T has|1 is)"):
            held(*wrong)
    with pytest.raises(ValueError, match="no tokens"):  # what a function refuses itself
        held(np.zeros((0, 3)), np.zeros(2))


def test_our_functions_are_held():
    assert hasattr(logit_comparison.compare_in_float64, "__wrapped__")
