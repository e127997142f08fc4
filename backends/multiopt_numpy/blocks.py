"""Groups without Numba: large parameters in cache-sized blocks, small ones packed together."""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise, repeat
from math import inf
from operator import attrgetter, is_
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np

from multiopt.arrays import Arrays, Part
from multiopt.kinds import other_fields
from multiopt.rules.arithmetic import BLOCK, block_sums, clamp, rounded, tree_sum
from multiopt.rules.rule import named, namespace
from multiopt_numpy.host import LARGE, HostGroup, Loan
from multiopt_numpy.tape import Tape, Tapes

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["BlockedGroup"]

#: Elements in a block of a clipped gradient: whole blocks of the summation tree.
CHUNK = 8 * BLOCK

NO_ROWS = np.empty(0, np.int64)

SHAPE, DTYPE, BASE = attrgetter("shape"), attrgetter("dtype"), attrgetter("base")
WRITEABLE, CONTIGUOUS = attrgetter("flags.carray"), attrgetter("flags.c_contiguous")


class _Places:
    """Where the slots of some small rows are, in the order in which they are packed.

    Args:
        group: Their group.
        rows: The rows.
    """

    def __init__(self, group: "BlockedGroup", rows: np.ndarray) -> None:
        """Order the rows by their places."""
        self.rows = rows
        self._pack: tuple[np.ndarray, list[np.ndarray]] | None = None
        chunk, offset = group.chunk[rows], group.offset[rows]
        order = np.lexsort((offset, chunk))
        #: The order, None if it is that of the rows.
        self.order = None if (order[1:] > order[:-1]).all() else order.tolist()
        chunk, offset, self.sizes = chunk[order], offset[order], group.size[rows][order]
        ends = np.cumsum(self.sizes)
        self.total = int(ends[-1]) if len(ends) else 0
        shapes = [group.shapes[row] for row in rows[order].tolist()]
        self._shapes = list(zip((ends - self.sizes).tolist(), ends.tolist(), shapes, strict=True))
        #: The chunks, each with the elements in it and those in the pack.
        self.segments: list[tuple[Sequence[np.ndarray], slice | np.ndarray, slice]] = []
        borders = [0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(chunk)]
        for begin, end in pairwise(borders):
            arrays = group.chunk_arrays(int(chunk[begin])) if end > begin else []
            starts, sizes = offset[begin:end], self.sizes[begin:end]
            packed = np.cumsum(sizes) - sizes
            where: slice | np.ndarray
            if (starts - starts[:1] == packed).all():
                first = int(starts[0]) if len(starts) else 0
                where = slice(first, first + int(sizes.sum()))
            else:
                where = np.repeat(starts - packed, sizes) + np.arange(int(sizes.sum()))
            low = int(ends[begin - 1]) if begin else 0
            self.segments.append((arrays, where, slice(low, low + int(sizes.sum()))))

    def packed(
        self, params: list[np.ndarray], dtype: np.dtype
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """A copy of the parameters, one after the other, and its parts, as ``parts``.

        They are the memory of the step before: to cut it into 1000 parts takes 0.5 ms.
        """
        if self._pack is None:
            pack = np.empty(self.total, dtype)
            self._pack = pack, self.parts(pack)
        if params:
            np.concatenate(params, axis=None, out=self._pack[0], casting="no")
        return self._pack

    def parts(self, pack: np.ndarray) -> list[np.ndarray]:
        """Of an array as long as the pack, the part of each row, in its shape."""
        return [pack[low:high].reshape(shape) for low, high, shape in self._shapes]

    def ordered(self, things: list[Any]) -> list[Any]:
        """Things in the order of the pack."""
        return things if self.order is None else [things[i] for i in self.order]

    def spread(self, scalars: Sequence[Any]) -> list[Any]:
        """Scalars with a number for each row as numbers for each element."""
        values = (x[self.order] if np.ndim(x) and self.order is not None else x for x in scalars)
        return [np.repeat(x, self.sizes) if np.ndim(x) else x for x in values]


class _Packed:
    """A run of a tape over small parameters side by side.

    Args:
        places: Where their slots are.
        tape: The tape.
        params: The parameters, in the order of the pack, as the following.
        grad: Their gradients in one.
        scalars: The coefficients, for all elements or for each.
        slots: By parameter, copies of its slots that are to be used; None for the slots themselves.
        slot_count: How many slots the rule has.
        room: What the tape made for so many elements.
    """

    def __init__(
        self,
        places: _Places,
        tape: Tape,
        params: list[np.ndarray],
        grad: np.ndarray,
        scalars: list[Any],
        slots: list[tuple[np.ndarray, ...]] | None,
        slot_count: int,
        room: list[np.ndarray],
    ) -> None:
        """Copy the parameters; nothing is computed yet."""
        self._places, self._tape, self._slot_count = places, tape, slot_count
        self._grad, self._scalars, self._room = grad, scalars, room
        self._param, parts = places.packed(params, grad.dtype)
        self._pairs = [(parts, params)]
        self._kept: list[np.ndarray] = []
        self._segments = places.segments
        if slots is not None:
            self._segments = []
            for copies in zip(*slots, strict=True):
                self._kept.append(_joined(list(copies), places.total, grad.dtype))
                self._pairs.append((places.parts(self._kept[-1]), list(copies)))
        elif len(places.segments) != 1 or not isinstance(places.segments[0][1], slice):
            # Slots that stand side by side are updated where they are, others in a copy.
            self._kept = [np.empty(places.total, grad.dtype) for _ in range(slot_count)]

    def goes(self, sources: list[np.ndarray], targets: list[np.ndarray]) -> None:
        """Let ``run`` copy some arrays too."""
        self._pairs.append((sources, targets))

    def run(self) -> None:
        """Compute, and copy what was computed."""
        slots = self._kept
        if slots:
            for arrays, where, packed in self._segments:
                for array, slot in zip(arrays, slots, strict=False):
                    slot[packed] = array[where]
        elif self._slot_count:
            ((arrays, where, _),) = self._segments
            slots = [array[where] for array in arrays[: self._slot_count]]
        self._tape.run(self._param, self._grad, slots, self._scalars, self._room)
        if self._kept:
            for arrays, where, packed in self._segments:
                for array, slot in zip(arrays, self._kept, strict=False):
                    array[where] = slot[packed]
        for sources, targets in self._pairs:
            _copy(sources, targets)


class _Alone:
    """A run of a tape over one large parameter, in place, clipping its gradient on the way.

    Args:
        tape: The tape.
        arrays: The parameter, its gradient and its slots, of one axis.
        scalars: The coefficients.
        room: What the tape made for the largest block.
        numbers: The coefficients and the bound of the clip; None for no clipping.
        leave: Whether to write the clipped gradient over the gradient.
        told: One element, that says whether the gradient was clipped.
    """

    def __init__(
        self,
        tape: Tape,
        arrays: list[np.ndarray],
        scalars: list[Any],
        room: list[np.ndarray],
        numbers: list[Any] | None,
        leave: bool,
        told: np.ndarray,
    ) -> None:
        """Make room for a block of the gradient."""
        self._tape, self._scalars, self._room, self._leave = tape, scalars, room, leave
        self._param, self._grad, *self._slots = arrays
        self._numbers, self._told = numbers, told
        if numbers is not None:
            size = min(CHUNK, len(self._param))
            self._block = np.empty(size, self._grad.dtype)
            self._above, self._below = np.empty(size, bool), np.empty(size, bool)

    def run(self) -> None:
        """Update."""
        if self._numbers is None:
            self._tape.run(self._param, self._grad, self._slots, self._scalars, self._room)
            return
        own, shared, bound = self._numbers
        for low in range(0, len(self._param), CHUNK):
            block = slice(low, low + CHUNK)
            grad = self._grad[block]
            clipped, above, below = (
                x[: len(grad)] for x in (self._block, self._above, self._below)
            )
            # ``_clipped`` in memory that is there already.
            np.multiply(grad, own, out=clipped)
            np.multiply(clipped, shared, out=clipped)
            np.greater(clipped, bound, out=above)
            np.less(clipped, -bound, out=below)
            np.copyto(clipped, bound, where=above)
            np.copyto(clipped, -bound, where=below)
            if above.any() or below.any():
                self._told[0] = True
            slots = [slot[block] for slot in self._slots]
            self._tape.run(self._param[block], clipped, slots, self._scalars, self._room)
            if self._leave:
                grad[...] = clipped


class BlockedGroup(HostGroup):
    """Parameters that the tapes of one rule update, on one thread.

    Args:
        backend: As for ``Group``.
        layout: Likewise.
        rule: Likewise.
        has_masters: Likewise.
        tapes: The tapes.
        vectorized: Whether coefficients can be computed for arrays of steps.
        itself: Whether their arrays are NumPy's, and not to be lent.
    """

    def __init__(
        self,
        backend: "Backend",
        layout: "Layout",
        rule: "Rule",
        has_masters: bool,
        tapes: Tapes,
        vectorized: bool,
        itself: bool,
    ) -> None:
        """Have no row yet."""
        super().__init__(backend, layout, rule, has_masters)
        self._tapes, self._vectorized, self._itself = tapes, vectorized, itself
        # The memory that the last run of small parameters took: its pages are there already.
        self._room: tuple[Tape | None, int, list[np.ndarray]] = (None, 0, [])
        self._runs: list[Any] = []
        # Of the last step: its rows, their shapes, and where its small rows are.
        self._known: tuple[np.ndarray, list[tuple[int, ...]]] = NO_ROWS, []
        self._places: _Places | None = None

    def chunk_arrays(self, number: int) -> Sequence[np.ndarray]:
        """The slots in a chunk."""
        return self._chunks[number].arrays

    def _drop_slots(self, row: int) -> None:
        # Rows that are taken again have other shapes and places.
        self._known = NO_ROWS, []
        self._places = None
        super()._drop_slots(row)

    # Looking

    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """See ``Group``."""
        grads = arrays.grads[part.places].tolist()
        if NoneType in set(map(type, grads)):
            part.keep(np.array([grad is not None for grad in grads], bool))
            grads = arrays.grads[part.places].tolist()
        part.params, part.grads = arrays.params[part.places].tolist(), grads
        if not self._itself:
            part.odd = range(len(grads))
            return
        known, shapes = self._known
        if known is not part.rows:
            shapes = [self.shapes[row] for row in part.rows.tolist()]
            self._known = part.rows, shapes
        if self._are_regular(part.params, shapes, WRITEABLE) and self._are_regular(
            grads, shapes, CONTIGUOUS
        ):
            part.owned = _own_their_memory(part.params) and _own_their_memory(grads)
            return
        part.odd = [
            k
            for k, (shape, param, grad) in enumerate(zip(shapes, part.params, grads, strict=True))
            if not (
                self._are_regular([param], [shape], WRITEABLE)
                and self._are_regular([grad], [shape], CONTIGUOUS)
            )
        ]

    def _are_regular(self, arrays: list[Any], shapes: list[tuple[int, ...]], flag: Any) -> bool:
        return (
            set(map(type, arrays)) <= {np.ndarray}
            and list(map(SHAPE, arrays)) == shapes
            and set(map(id, map(DTYPE, arrays))) <= {id(self.dtype)}
            and all(map(flag, arrays))
        )

    def locate(self, part: Part, arrays: Arrays) -> None:
        """See ``Group``."""
        starts, ends = arrays.spans
        odd, count = set(part.odd), len(arrays.params)
        for k, place in enumerate(part.places.tolist()):
            if k not in odd:
                size = int(self.size[part.rows[k]]) * self.dtype.itemsize
                for where, array in ((place, part.params[k]), (count + place, part.grads[k])):
                    starts[where] = low = array.ctypes.data
                    ends[where] = low + size

    def _take(self, part: Part, position: int, loan: Loan) -> None:
        part.params[position], part.grads[position] = loan.param, loan.grad

    # Measuring

    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """See ``Group``."""
        return np.array(
            [all(np.isfinite(x).all() for x in _blocks(grad)) for grad in part.grads], bool
        )

    @np.errstate(all="ignore")
    def squares(
        self, part: Part, which: np.ndarray | slice, factor: float, threads: int | None
    ) -> np.ndarray:
        """See ``Group``."""
        totals = []
        for k in np.arange(len(part.rows))[which].tolist():
            scale = self.dtype.type(self.own[part.rows[k]])
            sums = [
                block_sums(np, factor * (scale * x).astype(np.float64))
                for x in _blocks(part.grads[k])
            ]
            totals.append(float(tree_sum(np, np.concatenate(sums))) if sums else 0.0)
        return np.array(totals)

    # Updating

    @np.errstate(all="ignore")
    def _prepare(self, part: Part, leave_clipped: bool, threads: int | None, counts: bool) -> None:
        rows = part.rows
        self._counts = counts
        if self.clipping:
            part.clipped = np.zeros(len(rows), bool)
        self._runs = []
        for which, tape, scalars in self._scalars_now(rows):
            small = self.size[rows[which]] < LARGE
            if small.any():
                values = [x[small] if np.ndim(x) else x for x in scalars]
                self._runs.append(self._packed(part, which[small], tape, values, leave_clipped))
            room = tape.room(int(self.size[rows[which]].max())) if len(which) else []
            for k in np.flatnonzero(~small).tolist():
                values = [x if np.ndim(x) == 0 else float(x[k]) for x in scalars]
                run = self._alone(part, int(which[k]), tape, values, room, leave_clipped)
                self._runs.append(run)

    def _scalars_now(self, rows: np.ndarray) -> list[tuple[np.ndarray, Tape, list[Any]]]:
        """Positions with the tape and the coefficients that they have at this step."""
        if not rows.size:
            return []
        numbers, counts, everything = self.numbers[rows], self.steps[rows] + 1, np.arange(len(rows))
        if (counts == counts[0]).all() and (numbers == numbers[0]).all():
            rule = self.rule_now(int(rows[0]))
            alike = list(rule.coefficients(int(counts[0]), self.dtype.name))
            return [(everything, self._tape(alike), alike)]
        # The same functions on arrays: one call for all names.
        scalars = self._scalars_of(rows, numbers, counts)
        columns = [np.asarray(x) for x in scalars]
        # Switches that differ by name: each of their patterns has a tape of its own.
        patterns = [column for column in columns if column.dtype == bool and column.ndim]
        kinds = np.zeros(len(rows), np.intp)
        if patterns:
            kinds = np.unique(np.array(patterns), axis=1, return_inverse=True)[1].reshape(-1)
        jobs = []
        for pattern in range(kinds.max() + 1):
            mine = np.flatnonzero(kinds == pattern) if patterns else slice(None)
            values = [_same(x[mine] if x.ndim else x, self.dtype) for x in columns]
            jobs.append((everything[mine], self._tape(values), values))
        return jobs

    def _scalars_of(self, rows: np.ndarray, numbers: np.ndarray, counts: np.ndarray) -> list[Any]:
        """The coefficients of each of some rows at its step, as arrays."""
        if self._vectorized:
            values = [c[0].item() if (c == c[0]).all() else c for c in numbers.T]
            h = namespace(self.columns, values, other_fields(self.rule))
            try:
                return list(named(self.rule.scalars(h, counts)).values())
            except (TypeError, ValueError):
                self._vectorized = False  # somebody's scalars that take no arrays
        each = [
            list(self.rule_now(row).coefficients(count))
            for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
        ]
        return list(map(np.array, zip(*each, strict=True)))

    def _tape(self, scalars: Iterable[Any]) -> Tape:
        return self._tapes[tuple(x for x in scalars if isinstance(x, bool))]

    def _packed(
        self, part: Part, which: np.ndarray, tape: Tape, scalars: list[Any], leave_clipped: bool
    ) -> _Packed:
        """Small parameters side by side, in copies."""
        rows = part.rows if len(which) == len(part.rows) else part.rows[which]
        is_all = len(which) == len(part.rows)
        places, positions = self._places, which.tolist()
        if places is None or places.rows is not rows:
            places = self._places = _Places(self, rows)
        params = places.ordered(part.params if is_all else [part.params[k] for k in positions])
        grads = places.ordered(part.grads if is_all else [part.grads[k] for k in positions])
        grad = _joined(grads, places.total, self.dtype)
        if part.clipped is not None:
            columns = [self.own[rows], self.shared[rows], self.bound[rows]]
            grad, beyond = _clipped(grad, *places.spread([x.astype(self.dtype) for x in columns]))
            limited = np.empty(len(rows), bool)
            found = [piece.any() for piece in places.parts(beyond)]
            limited[slice(None) if places.order is None else places.order] = found
            part.clipped[which] = (columns[0] != 1) | (columns[1] != 1) | limited
        slots = None
        if not self.backend.in_place:
            lent = [self._loans[row].slots or () for row in rows.tolist()]
            slots = places.ordered(lent)
        if self._room[:2] != (tape, places.total):
            self._room = tape, places.total, tape.room(places.total)
        spread, slot_count = places.spread(scalars), len(self.rule.slots)
        run = _Packed(places, tape, params, grad, spread, slots, slot_count, self._room[2])
        if part.clipped is not None and leave_clipped:
            run.goes(places.parts(grad), grads)
        return run

    def _alone(
        self,
        part: Part,
        position: int,
        tape: Tape,
        scalars: list[Any],
        room: list[np.ndarray],
        leave_clipped: bool,
    ) -> _Alone:
        row = int(part.rows[position])
        slots = self._views(row)
        if row in self._loans and (lent := self._loans[row].slots) is not None:
            slots = lent
        slots = slots[: len(self.rule.slots)]
        arrays = [x.reshape(-1) for x in (part.params[position], part.grads[position], *slots)]
        told, numbers = np.zeros(1, bool), None
        if part.clipped is not None:
            columns = (self.own[row], self.shared[row], self.bound[row])
            numbers = [self.dtype.type(x) for x in columns]
            part.clipped[position] = numbers[0] != 1 or numbers[1] != 1
            if not part.clipped[position] and numbers[2] == inf:
                numbers = None
            told = part.clipped[position : position + 1]
        return _Alone(tape, arrays, scalars, room, numbers, leave_clipped, told)

    @np.errstate(all="ignore")
    def _run(self, part: Part) -> None:
        for run in self._runs:
            run.run()
        if self._counts:
            self.steps[part.rows] += 1

    def forget(self, part: Part) -> None:
        """See ``Group``."""
        super().forget(part)
        part.params = part.grads = ()
        self._runs = []


def _blocks(array: np.ndarray) -> Iterable[np.ndarray]:
    flat = array.reshape(-1)
    return (flat[low : low + CHUNK] for low in range(0, len(flat), CHUNK))


def _clipped(grad: np.ndarray, own: Any, shared: Any, bound: Any) -> tuple[np.ndarray, np.ndarray]:
    """The gradient scaled and bounded, and which elements the bound changed."""
    grad = grad * own
    grad *= shared
    return clamp(np, grad, bound), np.abs(grad) > bound


def _joined(arrays: list[np.ndarray], total: int, dtype: np.dtype) -> np.ndarray:
    """A copy of arrays of one dtype, one after the other."""
    pack = np.empty(total, dtype)
    if arrays:
        np.concatenate(arrays, axis=None, out=pack, casting="no")
    return pack


def _copy(sources: Iterable[np.ndarray], targets: Iterable[np.ndarray]) -> None:
    """Copy arrays into others of their shapes."""
    deque(map(np.ndarray.__setitem__, targets, repeat(...), sources), 0)


def _same(column: np.ndarray, dtype: np.dtype) -> Any:
    """A column rounded to a dtype, or a bool for switches; one number if all of it is the same."""
    if column.dtype == bool:
        return bool(column.flat[0])
    if not column.ndim:
        return rounded(column, dtype.name)
    numbers = column.astype(dtype)
    return float(numbers[0]) if (numbers == numbers[0]).all() else numbers


def _own_their_memory(arrays: list[np.ndarray]) -> bool:
    """Whether no array is a view; then no two of them overlap, if they are two."""
    return all(map(is_, map(BASE, arrays), repeat(None)))
