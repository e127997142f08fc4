"""Runs of a tape: over a large parameter where it is, over small ones copied side by side."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from multiopt_kernels.blocks.tape import Tape
from multiopt_kernels.chunks import stretches

if TYPE_CHECKING:
    from multiopt_kernels.host import HostGroup

__all__ = ["ClippedRun", "Places", "Run", "clip", "joined"]

#: Arrays, one for each slot, the elements in them that are meant, and their places in a pack.
Segment: TypeAlias = tuple[Sequence[np.ndarray], slice | np.ndarray, slice]


class Places:
    """Where the slots of some small rows are, in the order in which they are packed.

    Args:
        group: Their group.
        rows: The rows, at least one.
    """

    def __init__(self, group: "HostGroup", rows: np.ndarray) -> None:
        """Order the rows by their places."""
        self.rows = rows
        self._pack: tuple[np.ndarray, list[np.ndarray]] | None = None
        chunk, offset = group.chunk[rows], group.offset[rows]
        order = np.lexsort((offset, chunk))
        #: The order, None if it is that of the rows.
        self.order = None if (order[1:] > order[:-1]).all() else order
        chunk, offset, self.sizes = chunk[order], offset[order], group.size[rows][order]
        ends = np.cumsum(self.sizes)
        begins = ends - self.sizes
        self.total = int(ends[-1])
        shapes = [group.shapes[row] for row in rows[order].tolist()]
        self._shapes = list(zip(begins.tolist(), ends.tolist(), shapes, strict=True))
        #: The chunks, each with the elements in it and those in the pack.
        self.segments: list[Segment] = []
        for first, last in stretches(chunk):
            low, high = int(begins[first]), int(ends[last - 1])
            # How much further on each row is in the chunk than in this part of the pack.
            ahead = offset[first:last] - (begins[first:last] - low)
            where: slice | np.ndarray = slice(int(ahead[0]), int(ahead[0]) + high - low)
            if (ahead != ahead[0]).any():
                where = np.repeat(ahead, self.sizes[first:last]) + np.arange(high - low)
            arrays = group.chunk_arrays(int(chunk[first]))
            self.segments.append((arrays, where, slice(low, high)))

    def lent(self, slots: Iterable[Sequence[np.ndarray]]) -> list[Segment]:
        """Segments of copies of slots, of each row in the order of the pack."""
        return [
            ([x.reshape(-1) for x in copies], slice(None), slice(low, high))
            for copies, (low, high, _) in zip(slots, self._shapes, strict=True)
        ]

    def packed(
        self, params: list[np.ndarray], dtype: np.dtype
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """A copy of the parameters, one after the other, and its parts, as ``parts``.

        They are the memory of the step before: to cut it into 1000 parts takes 0.5 ms.
        """
        if self._pack is None:
            pack = np.empty(self.total, dtype)
            self._pack = pack, self.parts(pack)
        np.concatenate(params, axis=None, out=self._pack[0], casting="no")
        return self._pack

    def parts(self, pack: np.ndarray) -> list[np.ndarray]:
        """Of an array as long as the pack, the part of each row, in its shape."""
        return [pack[low:high].reshape(shape) for low, high, shape in self._shapes]

    def ordered(self, things: list[Any]) -> list[Any]:
        """Things in the order of the pack."""
        return things if self.order is None else [things[i] for i in self.order.tolist()]

    def spread(self, scalars: Sequence[Any]) -> list[Any]:
        """Scalars with a number for each row as numbers for each element."""
        values = (x[self.order] if np.ndim(x) and self.order is not None else x for x in scalars)
        return [np.repeat(x, self.sizes) if np.ndim(x) else x for x in values]

    def any(self, mask: np.ndarray) -> np.ndarray:
        """For each row whether one of its elements is marked in a mask as long as the pack."""
        found = np.array([part.any() for part in self.parts(mask)], bool)
        if self.order is not None:
            found[self.order] = found.copy()
        return found


@dataclass
class Run:
    """A run of a tape over arrays of one axis.

    Attributes:
        tape: The tape.
        param: The parameter, or a copy of several.
        grad: The gradient, clipped.
        slots: The slots, or copies.
        scalars: The coefficients, for all elements or for each.
        room: What the tape made for so many elements, or more.
        segments: What slots are copied from first, and to in the end.
        pairs: Sources and targets of what is copied in the end.
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
        """Compute, and copy what was computed."""
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
    """A run over one large parameter, which clips the gradient on the way, a block at a time.

    Attributes:
        numbers: The clip coefficients and bounds, as ``clip`` takes them.
        leave: Whether to write the clipped gradient over the gradient.
        told: One element, that says whether the gradient was clipped.
        block: Room for a block.
        masks: Room for its masks.
    """

    numbers: Sequence[Any]
    leave: bool
    told: np.ndarray
    block: np.ndarray
    masks: np.ndarray

    def run(self) -> None:
        """Clip the gradients of the run, then update."""
        for low in range(0, len(self.param), len(self.block)):
            part = slice(low, low + len(self.block))
            grad = self.grad[part]
            clipped, (beyond, below) = self.block[: len(grad)], self.masks[:, : len(grad)]
            clip(grad, self.numbers, clipped, beyond, below)
            self.told[0] |= beyond.any()
            slots = [slot[part] for slot in self.slots]
            self.tape.run(self.param[part], clipped, slots, self.scalars, self.room)
            if self.leave:
                grad[...] = clipped


def clip(
    grad: np.ndarray, numbers: Sequence[Any], out: np.ndarray, beyond: np.ndarray, below: np.ndarray
) -> None:
    """Scale and bound a gradient; makes no array where the numbers are for all elements.

    Args:
        grad: The gradient.
        numbers: Two factors and the bound, for all elements or for each.
        out: Takes the result; may be the gradient itself.
        beyond: Takes which elements the bound changed.
        below: Takes which of them are below it.
    """
    own, shared, bound = numbers
    np.multiply(grad, own, out=out)
    np.multiply(out, shared, out=out)
    np.greater(out, bound, out=beyond)
    np.less(out, -bound, out=below)
    np.copyto(out, bound, where=beyond)
    np.copyto(out, -bound, where=below)
    np.logical_or(beyond, below, out=beyond)


def joined(arrays: list[np.ndarray], total: int, dtype: np.dtype) -> np.ndarray:
    """A copy of arrays of one dtype, one after the other."""
    pack = np.empty(total, dtype)
    np.concatenate(arrays, axis=None, out=pack, casting="no")
    return pack
