"""Groups in the memory of the host: their slots side by side, and copies where arrays are odd."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from multiopt.arrays import Array, Arrays, Member, Part
from multiopt.engine import Group, Slots
from multiopt.reference import resumed
from multiopt.rules.arithmetic import BLOCK, block_sums, tree_sum
from multiopt_kernels.chunks import LARGE, LARGEST, SMALLEST, Chunk, stretches

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["CHUNK", "HostGroup", "Loan"]

#: Elements that are measured or clipped at a time: whole blocks of the summation tree.
CHUNK = 8 * BLOCK

#: What a step returns that writes its arrays.
NONE_REPLACED: dict[int, Array] = {}


@dataclass(slots=True)
class Loan:
    """What an engine works on in the place of a parameter's own arrays.

    Attributes:
        member: The parameter.
        param: The parameter's own memory, or a copy.
        grad: The gradient's own memory, or a copy.
        slots: Copies of the slots, where the step may still fail when they have been updated.
        in_place: Whether ``param`` is the parameter's own memory.
        grad_is_copy: Whether ``grad`` is a copy.
        ready: The result as it is written to the parameter, over the memory of ``param``.
    """

    member: Member
    param: np.ndarray
    grad: np.ndarray
    slots: tuple[np.ndarray, ...] | None
    in_place: bool
    grad_is_copy: bool
    ready: Array = None


class HostGroup(Group):
    """A group whose slots are in the memory of the host."""

    FRESH: ClassVar = {
        **Group.FRESH,
        "size": (np.int64, 0),
        "chunk": (np.int32, -1),
        "offset": (np.int64, 0),
    }

    size: np.ndarray
    chunk: np.ndarray
    offset: np.ndarray

    def __init__(
        self, backend: "Backend", layout: "Layout", rule: "Rule", has_masters: bool = False
    ) -> None:
        """Have no row yet."""
        self.slot_count = len(rule.slots) + has_masters
        self._chunks: dict[int, Chunk] = {}
        # The chunk that has room for more, and how much of it is taken.
        self._open: Chunk | None = None
        self._length = self._taken = self._next = 0
        self._loans: dict[int, Loan] = {}
        self._clipped_grads: np.ndarray | None = None
        super().__init__(backend, layout, rule, has_masters)

    # Slots

    def _make_slots(
        self, rows: np.ndarray, shapes: Sequence[tuple[int, ...]], slots: Slots | None
    ) -> None:
        sizes = np.fromiter(map(prod, shapes), np.int64, len(shapes))
        self.size[rows] = sizes
        large = np.flatnonzero(sizes >= LARGE)
        for k in large.tolist():
            # So many elements are not to be copied.
            size, given = int(sizes[k]), [None] * self.slot_count if slots is None else slots[k]
            self.chunk[rows[k]] = self._new_chunk([self._owned(x, size) for x in given], 1)
        small = np.flatnonzero(sizes < LARGE) if large.size else np.arange(len(rows))
        self._make_small(rows[small], sizes[small])
        if slots is not None and small.size:
            self._fill(rows, small, slots)

    @np.errstate(all="ignore")
    def _fill(self, rows: np.ndarray, which: np.ndarray, slots: Slots) -> None:
        """Write what is given for small new rows into their slots.

        Args:
            rows: The rows.
            which: The positions of those that are small: they have their slots in their order.
            slots: The slots of all of them.
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
        """Give small new rows slots of zero, side by side."""
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

    def _zeros(self, length: int) -> list[np.ndarray]:
        """Memory for all slots of some elements, in one allocation."""
        return list(np.zeros((self.slot_count, length), self.dtype))

    @np.errstate(all="ignore")
    def _owned(self, slot: Array | None, size: int) -> np.ndarray:
        """A slot as an array of one axis that can be written: it, or a copy; zeros for None."""
        if slot is None:
            return np.zeros(size, self.dtype)
        flat = np.asarray(slot).reshape(-1)
        return flat if flat.flags.carray and flat.dtype == self.dtype else flat.astype(self.dtype)

    def _new_chunk(self, arrays: Sequence[np.ndarray], live: int = 0) -> int:
        number, self._next = self._next, self._next + 1
        self._chunks[number] = Chunk(arrays, live)
        return number

    def _drop_slots(self, row: int) -> None:
        number = int(self.chunk[row])
        chunk = self._chunks[number]
        chunk.live -= 1
        if not chunk.live:
            del self._chunks[number]
            if chunk is self._open:
                self._open = None

    def chunk_arrays(self, number: int) -> Sequence[np.ndarray]:
        """The slots in a chunk, one after the other, of one axis."""
        return self._chunks[number].arrays

    def _views(self, row: int) -> tuple[np.ndarray, ...]:
        """The slots of a row, as they are in memory."""
        arrays, begin = self._chunks[int(self.chunk[row])].arrays, int(self.offset[row])
        end, shape = begin + int(self.size[row]), self.shapes[row]
        return tuple(slots[begin:end].reshape(shape) for slots in arrays)

    def slots_on_host(self, rows: np.ndarray, number: int) -> Iterator[np.ndarray]:
        """Yield one slot of some rows, over its memory where the rows lie side by side."""
        chunk, offset, size = self.chunk[rows], self.offset[rows], int(self.size[rows[0]])
        for first, end in stretches(chunk):
            array, begins = self._chunks[int(chunk[first])].arrays[number], offset[first:end]
            if (np.diff(begins) == size).all():
                begin = int(begins[0])
                yield array[begin : begin + (end - first) * size].reshape(end - first, size)
            else:
                # No more than a chunk is copied.
                yield array[begins[:, np.newaxis] + np.arange(size)]

    def slots_at(self, row: int) -> dict[str, Array]:
        """Return the slots of a row by name, as arrays of the library over their memory."""
        slots = self.backend.to_slots(self._views(row), self.layout)
        return dict(zip(self.slot_names(self.shapes[row]), slots, strict=True))

    def _slots_in_use(self, row: int) -> tuple[np.ndarray, ...]:
        """The slots of the rule that a step updates: those of a row, or what is lent of them."""
        loan = self._loans.get(row)
        slots = self._views(row) if loan is None or loan.slots is None else loan.slots
        return slots[: len(self.rule.slots)]

    # A step

    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """Declare all arrays odd, so that Python looks at each."""
        part.look_at_all(arrays)
        part.params = arrays.params[part.places].tolist()
        part.grads = arrays.grads[part.places].tolist()

    def lend(self, part: Part, position: int, member: Member, copy: bool, arrays: Arrays) -> None:
        """Use the memory of a parameter, or make copies in its place."""
        row = int(part.rows[position])
        views = self._views(row)
        member.slots = views[:-1] if self.has_masters else views
        param = None if self.has_masters else self._own(member, member.param)
        in_place = self.backend.in_place and param is not None and param.flags.writeable
        if param is None or not in_place:
            param = member.backend.to_compute(member.param, member.layout)
            if self.has_masters:
                param = resumed(member, param, views[-1])
            param = np.array(param, order="C")
        grad = None if copy else self._own(member, member.grad)
        grad_is_copy = grad is None
        if grad is None:
            grad = np.array(member.backend.to_compute(member.grad, member.layout), order="C")
        copies = None
        if not self.backend.in_place:
            copies = tuple(slot.copy() for slot in member.slots)
        loan = Loan(member, param, grad, copies, in_place, grad_is_copy)
        self._loans[row] = loan
        bounds = (0, 0) if grad_is_copy else _bounds(grad)
        arrays.spans[:, len(arrays.params) + member.place] = bounds
        self._take(part, position, loan)

    def _own(self, member: Member, array: Array) -> np.ndarray | None:
        """The array's own memory, if an engine takes it as it is."""
        memory = member.backend.memory(array)
        if memory is None or memory.dtype != self.dtype:
            return None
        return memory if memory.flags.c_contiguous and memory.flags.aligned else None

    def _take(self, part: Part, position: int, loan: Loan) -> None:
        """Let the engine work on what is lent."""
        part.params[position], part.grads[position] = loan.param, loan.grad

    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """Check each gradient in blocks."""
        return np.array([all(np.isfinite(x).all() for x in _blocks(g)) for g in part.grads], bool)

    @np.errstate(all="ignore")
    def squares(
        self, part: Part, which: np.ndarray | slice, factor: float, threads: int | None
    ) -> np.ndarray:
        """Sum the squares of each gradient over the summation tree, in blocks."""
        totals = []
        for k in np.arange(len(part.rows))[which].tolist():
            scale = self.dtype.type(self.own[part.rows[k]])
            sums = [
                block_sums(np, factor * (scale * x).astype(np.float64))
                for x in _blocks(part.grads[k])
            ]
            totals.append(float(tree_sum(np, np.concatenate(sums))) if sums else 0.0)
        return np.array(totals)

    @abstractmethod
    def _prepare(self, part: Part, leave_clipped: bool, threads: int | None) -> None:
        """Make all that running takes."""

    @abstractmethod
    def _run(self, part: Part) -> None:
        """Clip and update, and count the step where arrays are written; nothing fails."""

    def prepare(
        self, part: Part, arrays: Arrays, leave_clipped: bool, threads: int | None
    ) -> dict[int, Array]:
        """Make whatever may fail, and the new arrays of libraries that cannot write."""
        if self._loans:
            kept = set(part.rows.tolist())
            self._loans = {row: loan for row, loan in self._loans.items() if row in kept}
        self._prepare(part, leave_clipped, threads)
        if leave_clipped and self.clipping:
            self._clipped_grads = arrays.grads
        if not self.backend.in_place:
            return self._replaced(part)
        copied = self._made_ready() if self._loans else ()
        self._touch(arrays.params, part.places, copied)
        return NONE_REPLACED

    def _made_ready(self) -> list[int]:
        """Let loans say what is to be written to parameters; return the places of those."""
        copied = [loan for loan in self._loans.values() if not loan.in_place]
        ready = self.backend.to_slots([loan.param for loan in copied], self.layout)
        for loan, array in zip(copied, ready, strict=True):
            loan.ready = array
        return [loan.member.place for loan in copied]

    @np.errstate(all="ignore")
    def _replaced(self, part: Part) -> dict[int, Array]:
        """By place, what takes the places of parameters that cannot be written."""
        # It works on copies alone. New arrays of what comes out of them may fail to be made.
        self._run(part)
        members = [loan.member for loan in self._loans.values()]
        new = self.backend.to_params(members, [loan.param for loan in self._loans.values()])
        whole = self.backend.as_complex if self.layout.is_complex else lambda array: array
        return {member.place: whole(array) for member, array in zip(members, new, strict=True)}

    def _touch(self, arrays: np.ndarray, places: np.ndarray, copied: Sequence[int]) -> None:
        """Let the library know which of its arrays are written: those at places but a few."""
        if copied:
            # ``np.setdiff1d`` takes 40 us for ten.
            left = set(copied)
            places = np.array([k for k in places.tolist() if k not in left], np.intp)
        self.backend.touch(arrays if len(places) == len(arrays) else arrays[places])

    def run(self, part: Part) -> None:
        """Run the engine, write loans back, and count the step."""
        if self.backend.in_place:
            self._run(part)
            if self._clipped_grads is not None and part.clipped is not None and part.clipped.any():
                copied = [one.member.place for one in self._loans.values() if one.grad_is_copy]
                self._touch(self._clipped_grads, part.places[part.clipped], copied)
        else:
            self.steps[part.rows] += 1
        if self._loans:
            self._return_loans()

    @np.errstate(all="ignore")
    def _return_loans(self) -> None:
        """Write what was computed in copies."""
        for loan in self._loans.values():
            if loan.slots is not None:
                for view, slot in zip(loan.member.slots, loan.slots, strict=True):
                    view[...] = slot
            if self.has_masters:
                self._views(loan.member.row)[-1][...] = loan.param
            if self.backend.in_place and not loan.in_place:
                self.backend.write(loan.member.param, loan.ready)

    def left_over(self, part: Part) -> Iterable[tuple[Member, Array]]:
        """Return the clipped gradients of loans."""
        if part.clipped is None or not self._loans:
            return []
        clipped = set(part.rows[part.clipped].tolist())
        return [
            (loan.member, loan.grad)
            for row, loan in self._loans.items()
            if loan.grad_is_copy and row in clipped
        ]

    def forget(self, part: Part) -> None:
        """Release the loans of the step."""
        self._clipped_grads, part.params, part.grads = None, (), ()
        if self._loans:
            self._take_back()
            self._loans = {}

    def _take_back(self) -> None:
        """Let the engine work on nothing any more that is lent."""


def _blocks(array: np.ndarray) -> Iterable[np.ndarray]:
    """An array of any shape in pieces of one axis."""
    flat = array.reshape(-1)
    return (flat[low : low + CHUNK] for low in range(0, len(flat), CHUNK))


def _bounds(array: np.ndarray) -> tuple[int, int]:
    low, high = np.lib.array_utils.byte_bounds(array)
    return (low, high) if array.size else (0, 0)
