"""Equality as multiopt promises it: to the last bit, NaN to NaN, and zeros of either sign."""

import numpy as np

__all__ = ["same", "unequal"]


def unequal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two arrays of one shape are different."""
    return np.asarray(~((a == b) | ((a != a) & (b != b))))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have one shape and are equal.

    >>> same(np.asarray([0.0, np.nan]), np.asarray([-0.0, np.nan])), same(np.zeros(2), np.zeros(3))
    (True, False)
    """
    return a.shape == b.shape and not unequal(a, b).any()
