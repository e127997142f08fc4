"""Groups that keep slots in chunks: memory in which those of small parameters lie side by side.

A chunk has one array for each slot. Parameters that are added together get adjacent
parts of these arrays, so the slots of many parameters can be updated or read as one array. A chunk
is freed when its last parameter is removed. The memory of a removed parameter is never given to
another one, so a view of a slot always shows that slot.

Slots lie in C order, or in the memory order of their parameter (``orders``). Slots of other shapes
than their parameter lie in C order, and each parameter has a chunk of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from multiopt.arrays import Array
from multiopt.engine import Group, Slots
from multiopt_kernels.orders import c_order, turned_back

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["LARGE", "ChunkedGroup", "stretches"]

#: A parameter with at least this many elements gets a chunk of its own.
LARGE = 4096

#: The smallest and the largest number of elements per slot in a chunk of small parameters. Each new
#: chunk is twice as long as the one before. A parameter that outlives the others of its chunk keeps
#: no more than this chunk in memory.
SMALLEST, LARGEST = 2**10, 2**14


@dataclass(slots=True, eq=False)
class Chunk:
    """The slots of some parameters, side by side.

    Attributes:
        arrays: For each slot a one-dimensional array.
        live: The number of parameters whose slots are here.
    """

    arrays: Sequence[np.ndarray]
    live: int = 0


def stretches(column: np.ndarray) -> Iterator[tuple[int, int]]:
    """Return where each stretch of equal numbers begins and ends. The column must not be empty.

    >>> list(stretches(np.array([3, 3, 7, 3])))
    [(0, 2), (2, 3), (3, 4)]
    """
    return pairwise((0, *(np.flatnonzero(np.diff(column)) + 1).tolist(), len(column)))


class ChunkedGroup(Group):
    """A group whose slots are in the host's memory."""

    FRESH: ClassVar = {
        **Group.FRESH,
        "size": (np.int64, 0),
        "chunk": (np.int32, -1),
        "offset": (np.int64, 0),
    }

    #: Whether all slots have the shape of their parameter, and those of small ones share chunks.
    side_by_side: bool = True

    size: np.ndarray
    chunk: np.ndarray
    offset: np.ndarray

    def __init__(
        self, backend: "Backend", layout: "Layout", rule: "Rule", has_masters: bool = False
    ) -> None:
        """Create a group without rows."""
        self.slot_count = len(rule.slots) + has_masters
        self._chunks: dict[int, Chunk] = {}
        #: The memory order of slots, by row; a row that is missing has slots in C order.
        self._axes: dict[int, tuple[int, ...]] = {}
        # The chunk that has room for more small parameters. Below, how many elements it has, how
        # many of them are taken, and the number of the next chunk.
        self._open: Chunk | None = None
        self._length = self._taken = self._next = 0
        #: How many rows are large.
        self.large = 0
        super().__init__(backend, layout, rule, has_masters)

    def _make_slots(
        self, rows: np.ndarray, shapes: Sequence[tuple[int, ...]], slots: Slots | None
    ) -> None:
        sizes = np.fromiter(map(prod, shapes), np.int64, len(shapes))
        self.size[rows] = sizes
        is_alone = (sizes >= LARGE) | (not self.side_by_side)
        alone = np.flatnonzero(is_alone)
        for k in alone.tolist():
            # Given slots of this size are taken over, not copied into a chunk.
            forms = self._slot_shapes(shapes[k])
            given = [None] * len(forms) if slots is None else slots[k]
            own = [self._owned(x, prod(form)) for x, form in zip(given, forms, strict=True)]
            self.chunk[rows[k]] = self._new_chunk(own, 1)
            self.large += int(sizes[k] >= LARGE)
        small = np.flatnonzero(~is_alone) if alone.size else np.arange(len(rows))
        self._make_small(rows[small], sizes[small])
        if slots is not None and small.size:
            self._fill(rows, small, slots)

    @np.errstate(all="ignore")
    def _fill(self, rows: np.ndarray, which: np.ndarray, slots: Slots) -> None:
        """Copy given values into the slots of small new rows.

        Args:
            rows: All new rows.
            which: The positions of the small ones, whose slots lie in chunks in this order.
            slots: The given slots of all new rows.
        """
        chunk = self.chunk[rows[which]]
        for first, end in stretches(chunk):
            mine = which[first:end].tolist()
            begin, last = int(self.offset[rows[mine[0]]]), rows[mine[-1]]
            part = slice(begin, int(self.offset[last] + self.size[last]))
            into = self._chunks[int(chunk[first])].arrays
            for j, array in enumerate(into):
                parts = [
                    np.zeros(int(self.size[rows[k]])) if slots[k][j] is None else slots[k][j]
                    for k in mine
                ]
                array[part] = np.concatenate(parts, axis=None)

    def _make_small(self, rows: np.ndarray, sizes: np.ndarray) -> None:
        """Give small new rows slots of zeros, side by side."""
        if not rows.size:
            return
        ends = np.cumsum(sizes)
        begins = ends - sizes
        cuts = np.flatnonzero(np.diff(begins // LARGEST, prepend=-1))
        for first, end in pairwise((*cuts, len(rows))):
            mine, base = rows[first:end], int(begins[first])
            need = int(ends[end - 1]) - base
            if self._open is None or self._taken + need > self._length:
                length = 0 if self._open is None else self._length
                self._length = max(need, min(max(2 * length, SMALLEST), LARGEST))
                self._open_number, self._taken = self._new_chunk(self._zeros(self._length)), 0
                self._open = self._chunks[self._open_number]
            self.chunk[mine] = self._open_number
            self.offset[mine] = begins[first:end] + (self._taken - base)
            self._open.live += len(mine)
            self._taken += need

    def _slot_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes of all slots of a parameter of this shape, master copy included."""
        if self.side_by_side:
            return [shape] * self.slot_count
        return [*self.rule.slot_shapes(shape).values(), *([shape] * self.has_masters)]

    def _zeros(self, length: int) -> list[np.ndarray]:
        """Allocate all slots for a number of elements at once."""
        return list(np.zeros((self.slot_count, length), self.dtype))

    @np.errstate(all="ignore")
    def _owned(self, slot: Array | None, size: int) -> np.ndarray:
        """Return a slot as a writable one-dimensional array, without a copy if that is possible.

        None stands for a slot of zeros.
        """
        if slot is None:
            return np.zeros(size, self.dtype)
        flat = np.asarray(slot).reshape(-1)
        return flat if flat.flags.carray and flat.dtype == self.dtype else flat.astype(self.dtype)

    def _new_chunk(self, arrays: Sequence[np.ndarray], live: int = 0) -> int:
        number, self._next = self._next, self._next + 1
        self._chunks[number] = Chunk(arrays, live)
        return number

    def _turn(self, row: int, axes: tuple[int, ...], slots: Sequence[np.ndarray]) -> None:
        """Replace the slots of a row by others, which lie in another order. This cannot fail."""
        self._axes.pop(row, None)
        if axes != c_order(axes):
            self._axes[row] = axes
        if self.size[row] >= LARGE:
            self._chunks[int(self.chunk[row])].arrays = [slot.reshape(-1) for slot in slots]
            return
        for own, new in zip(self._memory(row), slots, strict=True):
            own[...] = new

    def _drop_slots(self, row: int) -> None:
        number = int(self.chunk[row])
        chunk = self._chunks[number]
        self.large -= int(self.size[row] >= LARGE)
        chunk.live -= 1
        if not chunk.live:
            del self._chunks[number]
            if chunk is self._open:
                self._open = None
        self._axes.pop(row, None)

    def chunk_arrays(self, number: int) -> Sequence[np.ndarray]:
        """The arrays of a chunk, one-dimensional and one for each slot."""
        return self._chunks[number].arrays

    def axes_at(self, row: int) -> tuple[int, ...]:
        """The memory order of the slots of a row."""
        return self._axes.get(row) or c_order(self.shapes[row])

    def _memory(self, row: int) -> tuple[np.ndarray, ...]:
        """The slots of a row, as contiguous views with their axes in the order of memory."""
        arrays, begin = self._chunks[int(self.chunk[row])].arrays, int(self.offset[row])
        if not self.side_by_side:
            shapes = self._slot_shapes(self.shapes[row])
            return tuple(map(np.reshape, arrays, shapes))
        end, shape = begin + int(self.size[row]), [self.shapes[row][k] for k in self.axes_at(row)]
        return tuple(slots[begin:end].reshape(shape) for slots in arrays)

    def _views(self, row: int) -> tuple[np.ndarray, ...]:
        """The slots of a row, as views in its shape."""
        if row not in self._axes:
            return self._memory(row)
        return tuple(turned_back(slot, self._axes[row]) for slot in self._memory(row))

    def slots_on_host(self, rows: np.ndarray, number: int) -> Iterator[np.ndarray]:
        """Yield one slot of some rows, as views of rows that lie side by side in C order."""
        if not self.side_by_side or not self._axes.keys().isdisjoint(rows.tolist()):
            for row in rows.tolist():
                yield self._views(row)[number].reshape(1, -1)
            return
        chunk, offset, size = self.chunk[rows], self.offset[rows], int(self.size[rows[0]])
        for first, end in stretches(chunk):
            array, begins = self._chunks[int(chunk[first])].arrays[number], offset[first:end]
            if (np.diff(begins) == size).all():
                begin = int(begins[0])
                yield array[begin : begin + (end - first) * size].reshape(end - first, size)
            else:
                # This copies at most one chunk at a time.
                yield array[begins[:, np.newaxis] + np.arange(size)]

    def slots_at(self, row: int) -> dict[str, Array]:
        """Return the slots of a row by name, as arrays of the library that share their memory."""
        slots = self.backend.to_slots(self._views(row), self.layout)
        return dict(zip(self.slot_names(self.shapes[row]), slots, strict=True))
