"""Runs of a tape: over one large parameter in place, or over copies of many small ones in a row.

Each NumPy call has a fixed cost, so small parameters are not updated one by one. Their values are
copied one after the other into one array, a pack, and the tape runs over the pack. Slots need no
copy if those of all packed parameters lie side by side in one chunk.

Two parameters with learning rates of their own take a step in one run:

>>> from multiopt_kernels.blocks.tape import tapes
>>> from multiopt_kernels.operations import Kind
>>> def descend(xp, param, grad, slots, c):
...     return param - c.lr * grad, slots
>>> tape = tapes(descend, 0, {"lr": Kind.NUMBER}, "float64")[()]
>>> a, b = np.zeros(2), np.zeros(3)
>>> pack, grad, lr = joined([a, b], 5, a.dtype), np.ones(5), np.repeat([0.5, 2.0], [2, 3])
>>> back = [pack[:2], pack[2:]], [a, b]
>>> Run(tape, pack, grad, [], [lr], tape.room(5), pairs=[back]).run()
>>> a.tolist(), b.tolist()
([-0.5, -0.5], [-2.0, -2.0, -2.0])
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import inf
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from multiopt_kernels.blocks.tape import Tape
from multiopt_kernels.chunks import stretches

if TYPE_CHECKING:
    from multiopt_kernels.host import HostGroup

__all__ = ["ClippedRun", "Places", "Run", "clip", "joined"]

#: A part of a pack whose slots are in one chunk: the arrays of the chunk, one for each slot; the
#: elements in them; and the same elements in the pack.
Segment: TypeAlias = tuple[Sequence[np.ndarray], slice | np.ndarray, slice]


class Places:
    """Where the values of some small rows are in chunks and in a pack, in the order of the chunks.

    Args:
        group: Their group.
        rows: The rows, at least one.
    """

    def __init__(self, group: "HostGroup", rows: np.ndarray) -> None:
        """Find the order of the pack: by chunk, then by offset."""
        self.rows = rows
        self._pack: tuple[np.ndarray, list[np.ndarray]] | None = None
        chunk, offset = group.chunk[rows], group.offset[rows]
        order = np.lexsort((offset, chunk))
        #: The positions of the rows in the order of the pack; None if that is their own order.
        self.order = None if (order[1:] > order[:-1]).all() else order
        chunk, offset, self.sizes = chunk[order], offset[order], group.size[rows][order]
        ends = np.cumsum(self.sizes)
        begins = ends - self.sizes
        self.total = int(ends[-1])
        shapes = [group.shapes[row] for row in rows[order].tolist()]
        self._shapes = list(zip(begins.tolist(), ends.tolist(), shapes, strict=True))
        #: The parts of the pack, one for each chunk.
        self.segments: list[Segment] = []
        for first, last in stretches(chunk):
            low, high = int(begins[first]), int(ends[last - 1])
            # How far ahead each row is in the chunk, compared with this part of the pack.
            ahead = offset[first:last] - (begins[first:last] - low)
            where: slice | np.ndarray = slice(int(ahead[0]), int(ahead[0]) + high - low)
            if (ahead != ahead[0]).any():
                where = np.repeat(ahead, self.sizes[first:last]) + np.arange(high - low)
            arrays = group.chunk_arrays(int(chunk[first]))
            self.segments.append((arrays, where, slice(low, high)))

    def lent(self, slots: Iterable[Sequence[np.ndarray]]) -> list[Segment]:
        """Segments for lent copies of slots, given in the order of the pack."""
        return [
            ([x.reshape(-1) for x in copies], slice(None), slice(low, high))
            for copies, (low, high, _) in zip(slots, self._shapes, strict=True)
        ]

    def packed(
        self, params: list[np.ndarray], dtype: np.dtype
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Copy the parameters into a pack, and return it with its parts.

        The memory of the step before is used again, because making 1000 parts takes 0.5 ms.
        """
        if self._pack is None:
            pack = np.empty(self.total, dtype)
            self._pack = pack, self.parts(pack)
        np.concatenate(params, axis=None, out=self._pack[0], casting="no")
        return self._pack

    def parts(self, pack: np.ndarray) -> list[np.ndarray]:
        """The part of each row, in its shape, of an array as long as the pack."""
        return [pack[low:high].reshape(shape) for low, high, shape in self._shapes]

    def ordered(self, things: list[Any]) -> list[Any]:
        """Bring a list with a thing for each row into the order of the pack."""
        return things if self.order is None else [things[i] for i in self.order.tolist()]

    def spread(self, scalars: Sequence[Any]) -> list[Any]:
        """Repeat scalars that differ by row for each element of the row."""
        if np.ndarray not in set(map(type, scalars)):
            return list(scalars)
        order = slice(None) if self.order is None else self.order
        return [
            np.repeat(x[order], self.sizes) if isinstance(x, np.ndarray) else x for x in scalars
        ]

    def any(self, mask: np.ndarray) -> np.ndarray:
        """Whether any element of each row is marked in a mask as long as the pack."""
        found = np.array([part.any() for part in self.parts(mask)], bool)
        if self.order is not None:
            found[self.order] = found.copy()
        return found


@dataclass
class Run:
    """A run of a tape over one-dimensional arrays.

    Attributes:
        tape: The tape.
        param: A parameter, or a pack of several.
        grad: The gradient. It is clipped already, except in a ``ClippedRun``.
        slots: The slots, or a pack for each slot.
        scalars: The coefficients: each a number for all elements, or an array.
        room: Scratch memory of the tape for at least as many elements.
        segments: Where slots are copied from before the run, and back to after it.
        pairs: Sources and targets of other copies that are made after the run.
    """

    tape: Tape
    param: np.ndarray
    grad: np.ndarray
    slots: list[np.ndarray]
    scalars: list[Any]
    room: list[np.ndarray]
    segments: Sequence[Segment] = ()
    pairs: Sequence[tuple[list[np.ndarray], list[np.ndarray]]] = ()

    def run(self) -> None:
        """Run the tape, and copy the results to where they belong."""
        for arrays, where, packed in self.segments:
            for array, slot in zip(arrays, self.slots, strict=False):
                slot[packed] = array[where]
        self.tape.run(self.param, self.grad, self.slots, self.scalars, self.room)
        for arrays, where, packed in self.segments:
            for array, slot in zip(arrays, self.slots, strict=False):
                array[where] = slot[packed]
        for sources, targets in self.pairs:
            deque(map(np.ndarray.__setitem__, targets, repeat(...), sources), 0)


@dataclass(kw_only=True)
class ClippedRun(Run):
    """A run over one large parameter that also clips the gradient, one block at a time.

    Attributes:
        numbers: The factors and the bound, as ``clip`` takes them.
        leave: Whether to overwrite the gradient with the clipped one.
        told: An array of one element, which receives whether the gradient was clipped.
        block: Memory for a block of the clipped gradient.
        masks: Memory for its masks.
    """

    numbers: Sequence[Any]
    leave: bool
    told: np.ndarray
    block: np.ndarray
    masks: np.ndarray

    def run(self) -> None:
        """Clip and update block by block."""
        for low in range(0, len(self.param), len(self.block)):
            part = slice(low, low + len(self.block))
            grad = self.grad[part]
            clipped, masks = self.block[: len(grad)], self.masks[:, : len(grad)]
            if clip(grad, self.numbers, clipped, masks):
                self.told[0] |= masks[0].any()
            slots = [slot[part] for slot in self.slots]
            self.tape.run(self.param[part], clipped, slots, self.scalars, self.room)
            if self.leave:
                grad[...] = clipped


def clip(grad: np.ndarray, numbers: Sequence[Any], out: np.ndarray, masks: np.ndarray) -> bool:
    """Scale a gradient and bound its elements. If the numbers are scalars, no array is allocated.

    A factor of 1 and an infinite bound change nothing, so they are not applied.

    Args:
        grad: The gradient.
        numbers: Two factors and the bound: each a number for all elements, or an array.
        out: Receives the result; may be the gradient itself.
        masks: Receives which elements the bound changed, and which of them are below its negative.

    Returns:
        Whether there is a bound; otherwise nothing is written into the masks.
    """
    *factors, bound = numbers
    for factor in factors:
        if isinstance(factor, np.ndarray) or factor != 1:
            grad = np.multiply(grad, factor, out=out)
    if grad is not out:
        np.copyto(out, grad)
    if not isinstance(bound, np.ndarray) and bound == inf:
        return False
    beyond, below = masks
    np.greater(out, bound, out=beyond)
    np.less(out, -bound, out=below)
    np.copyto(out, bound, where=beyond)
    np.copyto(out, -bound, where=below)
    np.logical_or(beyond, below, out=beyond)
    return True


def joined(arrays: list[np.ndarray], total: int, dtype: np.dtype) -> np.ndarray:
    """Copy arrays of one dtype into one array, one after the other."""
    pack = np.empty(total, dtype)
    np.concatenate(arrays, axis=None, out=pack, casting="no")
    return pack
