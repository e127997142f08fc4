"""The boxes in which kernels walk through arrays that do not lie in memory as their slots do.

Slots are dense. If a parameter or a gradient has gaps, runs backwards or lies in another order, its
elements are not where those of the slots are. Kernels then take one box of elements after the
other, small enough for a cache, and put its elements side by side first (``walk``). A box is a
number of elements along each axis. Its elements lie side by side in the slots, unless the gradient
lies across: then the box has whole lines of the cache of the gradient.

The left half of a matrix, whose gradient has no gaps, is taken in boxes of 8 of its 40 rows:

>>> plan = boxes((40, 500), param=(1000, 1), grad=(500, 1), itemsize=4)
>>> plan[[AXES, BOXES]].tolist(), plan[FIRST_AXIS:].reshape(-1, AXIS_WORDS).tolist()
([2, 5], [[40, 8, 5, 1000, 500, 500], [500, 500, 1, 1, 1, 1]])

If a gradient is in Fortran order, a box has 16 rows, whose numbers fill a line of the cache:

>>> plan = boxes((1024, 1024), param=(1024, 1), grad=(1, 1024), itemsize=4)
>>> plan[FIRST_AXIS:].reshape(-1, AXIS_WORDS)[:, EXTENT].tolist()
[16, 512]
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import numpy as np

__all__ = [
    "AXES",
    "AXIS_WORDS",
    "BOXES",
    "COUNT",
    "EXTENT",
    "FIRST_AXIS",
    "GRAD_ALONG",
    "GRAD_STEP",
    "IN_PLACE",
    "LENGTH",
    "LINE",
    "PARAM_ALONG",
    "PARAM_STEP",
    "ROOM",
    "SLOT_STEP",
    "boxes",
]

#: The words of a plan: the number of axes, the number of boxes, and the axes along which the
#: elements of a box are read, of the parameter and of the gradient. The words of each axis follow,
#: the slowest axis of the slots first.
AXES, BOXES, PARAM_ALONG, GRAD_ALONG, FIRST_AXIS = range(5)

#: The words of an axis: its length, how much of it a box has, the number of boxes along it, and the
#: strides of the parameter, of the gradient and of the slots, in elements.
LENGTH, EXTENT, COUNT, PARAM_STEP, GRAD_STEP, SLOT_STEP, AXIS_WORDS = range(7)

#: Stands for the axis along which an array is read, if it lies as the slots do.
IN_PLACE = -1

#: The bytes of a box whose elements lie side by side in the slots. With half of them, every second
#: element took 1.15 times as long.
SMALL = 2**14

#: The bytes of a line of the cache, and the number of such lines in a box of a gradient that lies
#: across. With half of them, a matrix of 3000 rows took 1.15 times as long.
LINE, LINES = 64, 512

#: The bytes of the largest box.
ROOM = LINE * LINES

#: How many elements of the smallest size the loop of an update may take at once. The rest of a box
#: is taken one by one, which takes 5 ns an element.
AT_ONCE = 64


@lru_cache(maxsize=1024)
def boxes(
    sizes: tuple[int, ...], param: tuple[int, ...], grad: tuple[int, ...], itemsize: int
) -> np.ndarray:
    """Divide a parameter and its gradient into boxes.

    Strides are mostly those of the step before, so plans are kept: to make one takes 20 us.

    Args:
        sizes: The shape, with its axes in the memory order of the slots.
        param: The strides of the parameter, in elements and in that order.
        grad: The strides of the gradient.
        itemsize: The size of an element of either.

    Returns:
        The words of a plan.
    """
    axes = _merged(sizes, param, grad)
    lengths, params, grads = zip(*axes, strict=True)
    slots = [prod(lengths[k + 1 :]) for k in range(len(axes))]
    extents = _extents(lengths, grads, itemsize)
    counts = [-(-n // extent) for n, extent in zip(lengths, extents, strict=True)]
    longest = max(range(len(axes)), key=lambda k: (extents[k], k))
    fast = _fast(grads)
    # Eight lines are turned at once.
    across = fast if fast != len(axes) - 1 and extents[fast] >= 8 else longest
    along = (
        IN_PLACE if params == tuple(slots) else longest,
        IN_PLACE if grads == tuple(slots) else across,
    )
    columns = lengths, extents, counts, params, grads, slots
    words = [
        len(axes),
        prod(counts),
        *along,
        *(x for axis in zip(*columns, strict=True) for x in axis),
    ]
    plan = np.array(words, np.int64)
    plan.flags.writeable = False
    return plan


def _merged(
    sizes: Sequence[int], param: Sequence[int], grad: Sequence[int]
) -> list[tuple[int, int, int]]:
    """The axes with their strides, without those of length 1; axes that are one in both are one."""
    axes: list[tuple[int, int, int]] = []
    for n, a, b in zip(sizes, param, grad, strict=True):
        if axes and axes[-1][1:] == (n * a, n * b):
            axes[-1] = axes[-1][0] * n, a, b
        elif n != 1:
            axes.append((n, a, b))
    return axes or [(1, 1, 1)]


def _fast(grads: Sequence[int]) -> int:
    """The axis along which neighbours in the gradient are nearest, but not in the same place."""
    return min(range(len(grads)), key=lambda k: (grads[k] == 0, abs(grads[k]), -k))


def _extents(lengths: Sequence[int], grads: Sequence[int], itemsize: int) -> list[int]:
    """How many elements a box has along each axis."""
    fast, line = _fast(grads), LINE // itemsize
    extents = [1] * len(lengths)
    first = 0 if fast == len(lengths) - 1 else fast + 1
    room = LINES if first else SMALL // itemsize
    for k in range(len(lengths) - 1, first - 1, -1):
        extents[k] = _part(lengths[k], room)
        room //= extents[k]
    if first:
        # The axes behind it are side by side in the slots; this one is so in the gradient.
        room = ROOM // itemsize // prod(extents)
        extents[fast] = max(min(room - room % line, lengths[fast]), 1)
    return extents


def _part(length: int, most: int) -> int:
    """The length of equal parts, a multiple of what the loops of an update take at once."""
    if length <= most:
        return max(length, 1)
    parts = -(-length // most)
    return min(-(-length // (AT_ONCE * parts)) * AT_ONCE, most)
