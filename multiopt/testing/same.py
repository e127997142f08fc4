"""Equality as multiopt promises it."""

import numpy as np

__all__ = ["same"]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal to the last bit, NaN to NaN, and zeros of either sign.

    >>> same(np.asarray([0.0, np.nan]), np.asarray([-0.0, np.nan])), same(np.zeros(2), np.zeros(3))
    (True, False)
    """
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
