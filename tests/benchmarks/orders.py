"""Our side, on arrays that lie in memory in other ways than row after row."""

from collections.abc import Callable

import numpy as np

import multiopt as mo
from multiopt.bench.paired import Run, Side
from multiopt.bench.sides import ADAM
from multiopt.bench.work import Work

__all__ = ["every_second", "fortran", "last_channels", "lying", "reverse", "rows"]

#: From an array to the same numbers, in memory of their own.
Way = Callable[[np.ndarray], np.ndarray]


def rows(x: np.ndarray) -> np.ndarray:
    """In C order."""
    return np.array(x, order="C")


def fortran(x: np.ndarray) -> np.ndarray:
    """In Fortran order."""
    return np.array(x, order="F")


def last_channels(x: np.ndarray) -> np.ndarray:
    """In the order of torch's ``channels_last``: the second axis is the fastest.

    >>> last_channels(np.zeros((2, 3, 4, 5))).strides
    (480, 8, 120, 24)
    """
    return np.moveaxis(np.array(np.moveaxis(x, 1, -1), order="C"), -1, 1)


def every_second(x: np.ndarray) -> np.ndarray:
    """Every second element, along each axis, of more memory.

    >>> every_second(np.ones((3, 2))).strides
    (64, 16)
    """
    memory = np.zeros([2 * n for n in x.shape], x.dtype)
    view = memory[tuple(slice(None, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def reverse(x: np.ndarray) -> np.ndarray:
    """Backwards along each axis."""
    return np.flip(np.array(np.flip(x), order="C"))


def lying(name: str, param: Way, grad: Way) -> Side:
    """``Optimizer.step`` on NumPy arrays.

    Args:
        name: How they lie, for the table.
        param: How parameters lie.
        grad: How gradients lie.
    """

    def begin(work: Work, threads: int) -> Run:
        params, grads = (
            {key: way(x) for key, x in arrays.items()}
            for way, arrays in zip((param, grad), work.arrays(), strict=True)
        )
        opt = mo.Optimizer(ADAM, threads=threads)
        return Run(lambda: opt.step(params, grads), lambda: params)

    return Side(f"NumPy, {name}", begin)
