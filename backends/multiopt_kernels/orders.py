"""Memory orders: in which order the elements of a dense array lie in memory.

An array is dense if its elements lie side by side, without gaps and in any order of its axes: in C
order, in Fortran order, or permuted, as torch's ``channels_last``. An elementwise update may take
the elements of a parameter, its gradient and its slots in memory order if that is the same for all
of them. An order is written down as the axes, the slowest one first:

>>> memory_order(np.zeros((2, 3, 4))), memory_order(np.zeros((2, 3, 4), order="F"))
((0, 1, 2), (2, 1, 0))

Arrays in that order are handed on with their axes in it, and are then contiguous:

>>> x = np.arange(6).reshape(2, 3)
>>> turned(x, (1, 0)).flags.c_contiguous, turned(x, (1, 0)).ravel().tolist()
(True, [0, 3, 1, 4, 2, 5])
>>> turned_back(turned(x, (1, 0)), (1, 0)).tolist() == x.tolist()
True
>>> element_strides((2, 3, 4), (2, 1, 0))
[1, 2, 6]
"""

from collections.abc import Sequence
from math import prod

import numpy as np

__all__ = [
    "c_order",
    "element_strides",
    "is_apart",
    "memory_order",
    "order_of_strides",
    "turned",
    "turned_back",
]


def c_order(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes of an array in C order."""
    return tuple(range(len(shape)))


def memory_order(array: np.ndarray) -> tuple[int, ...] | None:
    """The axes in the order of memory; None if the array is not dense."""
    axes = order_of_strides(array)
    return axes if array.transpose(axes).flags.c_contiguous else None


def order_of_strides(array: np.ndarray) -> tuple[int, ...]:
    """The axes in the order of memory, of an array that may have gaps or run backwards.

    It is the same for all arrays of a shape in the same order: axes of length 1, whose strides do
    not matter, come first, and an array that is in C order too counts as such.

    >>> order_of_strides(np.zeros((4, 4))[::2, ::-1]), order_of_strides(np.zeros((4, 4)).T[::2])
    ((0, 1), (1, 0))
    """
    sizes, strides = array.shape, array.strides
    axes = sorted(c_order(sizes), key=lambda k: (sizes[k] > 1, -abs(strides[k])))
    long = [k for k in axes if sizes[k] > 1]
    return c_order(sizes) if not array.size or long == sorted(long) else tuple(axes)


def is_apart(array: np.ndarray) -> bool:
    """Whether strides show that every element has a place of its own.

    >>> is_apart(np.zeros((4, 6))[::2, ::-1]), is_apart(np.broadcast_to(0.0, 3))
    (True, False)
    """
    reach = 0
    for stride, n in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True)):
        if n > 1:
            if stride < reach + array.itemsize:
                return False
            reach += stride * (n - 1)
    return True


def element_strides(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    """The strides of a dense array, in elements."""
    sizes = [shape[k] for k in axes]
    by_axis = {k: prod(sizes[place + 1 :]) for place, k in enumerate(axes)}
    return [by_axis[k] for k in range(len(axes))]


def turned(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """A contiguous copy with the axes in this order."""
    return np.array(np.transpose(array, axes), order="C")


def turned_back(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """A view with the axes in their own order again."""
    return np.transpose(array, np.argsort(axes))
