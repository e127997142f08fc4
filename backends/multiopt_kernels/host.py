"""Groups whose slots are in the host's memory: what compiled kernels and blocks have in common.

``HostGroup`` does two things for them. It keeps slots in chunks, so that the slots of small
parameters lie side by side. And it replaces an array that an engine cannot use as it is, such as
one with gaps or one of a library without addressable memory, by a copy for one step: a loan. So the
engines only see contiguous memory in the dtype that they expect. Each engine is a subclass that
finds arrays (``look``) and updates them (``_prepare``, ``_run``).

The slots of these two parameters lie in chunk 0, one after the other:

>>> from multiopt.backend import backend_named
>>> from multiopt.layout import Layout
>>> from multiopt.rules import SGD
>>> class Engine(HostGroup):
...     _prepare = _run = None  # this engine takes no steps
>>> layout = Layout("numpy", (), "float32", "cpu")
>>> group = Engine(backend_named("numpy"), layout, SGD(momentum=0.9))
>>> rows = group.add([(3,), (2, 2)])
>>> group.chunk[rows].tolist(), group.offset[rows].tolist()
([0, 0], [0, 3])
"""

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
from multiopt.rules.sums import Sum
from multiopt_kernels.chunks import LARGE, LARGEST, SMALLEST, Chunk, stretches

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["CHUNK", "HostGroup", "Loan"]

#: How many elements are measured or clipped at a time.
CHUNK = 2**15

#: What ``prepare`` returns when all parameters are updated in place.
NONE_REPLACED: dict[int, Array] = {}


@dataclass(slots=True)
class Loan:
    """What an engine works on for one parameter, in place of the user's arrays.

    Attributes:
        member: The parameter.
        param: The parameter's own memory, or a copy.
        grad: The gradient's own memory, or a copy.
        slots: Copies of the slots if the step may still fail after it has updated them, else None.
        in_place: Whether ``param`` is the parameter's own memory.
        grad_is_copy: Whether ``grad`` is a copy.
        ready: The array from which the result is written to the parameter. It shares memory with
            ``param``.
    """

    member: Member
    param: np.ndarray
    grad: np.ndarray
    slots: tuple[np.ndarray, ...] | None
    in_place: bool
    grad_is_copy: bool
    ready: Array = None


class HostGroup(Group):
    """A group whose slots are in the host's memory."""

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
        """Create a group without rows."""
        self.slot_count = len(rule.slots) + has_masters
        self._chunks: dict[int, Chunk] = {}
        # The chunk that has room for more small parameters. Below, how many elements it has, how
        # many of them are taken, and the number of the next chunk.
        self._open: Chunk | None = None
        self._length = self._taken = self._next = 0
        #: How many rows are large.
        self.large = 0
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
            # Given slots of this size are taken over, not copied into a chunk.
            size, given = int(sizes[k]), [None] * self.slot_count if slots is None else slots[k]
            self.chunk[rows[k]] = self._new_chunk([self._owned(x, size) for x in given], 1)
            self.large += 1
        small = np.flatnonzero(sizes < LARGE) if large.size else np.arange(len(rows))
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

    def _drop_slots(self, row: int) -> None:
        number = int(self.chunk[row])
        chunk = self._chunks[number]
        self.large -= int(self.size[row] >= LARGE)
        chunk.live -= 1
        if not chunk.live:
            del self._chunks[number]
            if chunk is self._open:
                self._open = None

    def chunk_arrays(self, number: int) -> Sequence[np.ndarray]:
        """The arrays of a chunk, one-dimensional and one for each slot."""
        return self._chunks[number].arrays

    def _views(self, row: int) -> tuple[np.ndarray, ...]:
        """The slots of a row, as views in its shape."""
        arrays, begin = self._chunks[int(self.chunk[row])].arrays, int(self.offset[row])
        end, shape = begin + int(self.size[row]), self.shapes[row]
        return tuple(slots[begin:end].reshape(shape) for slots in arrays)

    def slots_on_host(self, rows: np.ndarray, number: int) -> Iterator[np.ndarray]:
        """Yield one slot of some rows, as views of rows that lie side by side."""
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

    def _slots_in_use(self, row: int) -> tuple[np.ndarray, ...]:
        """The slots of the rule that a step updates: those of the row, or lent copies of them."""
        loan = self._loans.get(row)
        slots = self._views(row) if loan is None or loan.slots is None else loan.slots
        return slots[: len(self.rule.slots)]

    # A step

    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """Have Python examine all arrays."""
        part.params, part.grads = arrays.at(part.places)
        part.look_at_all(arrays)

    def lend(self, part: Part, position: int, member: Member, copy: bool, arrays: Arrays) -> None:
        """Use the memory of a parameter and its gradient, or copies of what cannot be used."""
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
        """The array's own memory if an engine can use it as it is, else None."""
        memory = member.backend.memory(array)
        if memory is None or memory.dtype != self.dtype:
            return None
        return memory if memory.flags.c_contiguous and memory.flags.aligned else None

    def _take(self, part: Part, position: int, loan: Loan) -> None:
        """Have the engine work on a loan."""
        part.params[position], part.grads[position] = loan.param, loan.grad

    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """Check each gradient, ``CHUNK`` elements at a time."""
        return np.array([all(np.isfinite(x).all() for x in _blocks(g)) for g in part.grads], bool)

    @np.errstate(all="ignore")
    def squares(self, part: Part, which: np.ndarray | slice, threads: int | None) -> Sum:
        """Sum the squares of small gradients together, of large ones ``CHUNK`` at a time."""
        total, rows = Sum(self.layout.compute_dtype), part.rows[which]
        grads = part.grads if isinstance(which, slice) else [part.grads[k] for k in which.tolist()]
        if grads and not self.large:
            flat = np.concatenate(grads, axis=None)
            if self.bounded:  # otherwise all factors are 1
                flat *= np.repeat(self.own[rows].astype(self.dtype), self.size[rows])
            total.add_values(np, flat)
            return total
        for grad, scale in zip(grads, self.own[rows].tolist(), strict=True):
            for x in _blocks(grad):
                total.add_values(np, x if scale == 1 else scale * x)
        return total

    @abstractmethod
    def _prepare(self, part: Part, leave_clipped: bool, threads: int | None) -> None:
        """Do everything that can fail, so that ``_run`` cannot."""

    @abstractmethod
    def _run(self, part: Part) -> None:
        """Clip and update, and count the step if parameters are updated in place. Cannot fail."""

    def prepare(
        self, part: Part, arrays: Arrays, leave_clipped: bool, threads: int | None
    ) -> dict[int, Array]:
        """Do everything that can fail.

        If the library cannot write to its arrays, the update itself is computed here, on copies.
        """
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
        """Set ``ready`` in the loans whose result is written back; return their places."""
        copied = [loan for loan in self._loans.values() if not loan.in_place]
        ready = self.backend.to_slots([loan.param for loan in copied], self.layout)
        for loan, array in zip(copied, ready, strict=True):
            loan.ready = array
        return [loan.member.place for loan in copied]

    @np.errstate(all="ignore")
    def _replaced(self, part: Part) -> dict[int, Array]:
        """Compute the new arrays of parameters that cannot be written, by place."""
        # This updates only copies, so the step may still fail when the new arrays are made.
        self._run(part)
        members = [loan.member for loan in self._loans.values()]
        new = self.backend.to_params(members, [loan.param for loan in self._loans.values()])
        whole = self.backend.as_complex if self.layout.is_complex else lambda array: array
        return {member.place: whole(array) for member, array in zip(members, new, strict=True)}

    def _touch(self, arrays: np.ndarray, places: np.ndarray, copied: Sequence[int]) -> None:
        """Tell the library that the arrays at some places are written, except at ``copied``."""
        if copied:
            # ``np.setdiff1d`` would take 40 us for ten places.
            left = set(copied)
            places = np.array([k for k in places.tolist() if k not in left], np.intp)
        self.backend.touch(arrays if len(places) == len(arrays) else arrays[places])

    def run(self, part: Part) -> None:
        """Run the engine, write the results of loans back, and count the step."""
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
        """Write the results that were computed in copies to the slots and parameters."""
        for loan in self._loans.values():
            if loan.slots is not None:
                for view, slot in zip(loan.member.slots, loan.slots, strict=True):
                    view[...] = slot
            if self.has_masters:
                self._views(loan.member.row)[-1][...] = loan.param
            if self.backend.in_place and not loan.in_place:
                self.backend.write(loan.member.param, loan.ready)

    def left_over(self, part: Part) -> Iterable[tuple[Member, Array]]:
        """Return the clipped gradients that are in lent copies."""
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
        """Have the engine work on the group's own memory again, not on loans."""


def _blocks(array: np.ndarray) -> Iterable[np.ndarray]:
    """An array of any shape, as one-dimensional pieces of ``CHUNK`` elements."""
    flat = array.reshape(-1)
    return (flat[low : low + CHUNK] for low in range(0, len(flat), CHUNK))


def _bounds(array: np.ndarray) -> tuple[int, int]:
    low, high = np.lib.array_utils.byte_bounds(array)
    return (low, high) if array.size else (0, 0)
