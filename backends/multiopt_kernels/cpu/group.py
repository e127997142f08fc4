"""Groups that run in compiled kernels: one call updates all rows of a step, large and small.

Kernels work on a table with one row per parameter (``rows``): the addresses of its arrays, its size
and shape, and its hyperparameters. Another kernel reads those addresses from the array objects at
every step, so that in a regular step Python does nothing for a single parameter.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from multiopt.arrays import APART, UNKNOWN, Arrays, Part
from multiopt.engine import Slots
from multiopt.layout import Words, address
from multiopt.rules.sums import Sum
from multiopt_kernels.chunks import LARGE
from multiopt_kernels.cpu.boxes import AXES, GRAD_ALONG, IN_PLACE, PARAM_ALONG, boxes
from multiopt_kernels.cpu.kernels import look_kernel, norm_kernels, walk_kernel
from multiopt_kernels.cpu.look import ODD, OVERLAP, Look
from multiopt_kernels.cpu.narrow import NARROW
from multiopt_kernels.cpu.rows import (
    FIRST_SLOT,
    GRAD,
    NDIM,
    PARAM,
    SHAPE,
    SIZE,
    STRIDES,
    WALK,
    WIDE,
)
from multiopt_kernels.cpu.shares import SHARED, SHARES, borders, places_of_sums
from multiopt_kernels.cpu.sums import length
from multiopt_kernels.cpu.team import Kernel, Runnable, thread_count
from multiopt_kernels.cpu.walk import ARGUMENTS
from multiopt_kernels.forms import sample_scalars
from multiopt_kernels.host import HostGroup, Loan
from multiopt_kernels.orders import element_strides

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["CompiledGroup"]

#: The number of elements up to which threads cost more than they gain.
MANY = 2**18


class CompiledGroup(HostGroup):
    """Parameters that one compiled kernel updates.

    Args:
        backend: The backend of the parameters.
        layout: Their layout; its shape does not matter.
        rule: A rule of their kind.
        has_masters: Whether they have master copies.
        kernel: The kernel of the update.
        host_coefficients: Whether the host computes the coefficients; otherwise the kernel does.
        storage_dtype: The dtype of arrays that the kernel takes as they are. Other arrays are lent
            as copies in the compute dtype.
        look: How to look at the arrays; None if all are lent.
    """

    FRESH: ClassVar = {**HostGroup.FRESH, "clipped": (bool, 0), "bad": (np.uint8, 0)}

    fills_spans: ClassVar = True
    follows: bool = True

    clipped: np.ndarray
    bad: np.ndarray

    def __init__(
        self,
        backend: "Backend",
        layout: "Layout",
        rule: "Rule",
        has_masters: bool,
        kernel: Kernel,
        host_coefficients: bool,
        storage_dtype: str,
        look: Look | None,
    ) -> None:
        """Create a group without rows."""
        self._kernel, self._look = kernel, look
        self._host_coefficients, self._storage_dtype = host_coefficients, storage_dtype
        self.walks = storage_dtype == layout.storage_dtype
        # If copies are lent of all arrays, ``lend`` takes their values from the master copy.
        self._has_own_masters = has_masters and storage_dtype in NARROW
        self._first_number = FIRST_SLOT + len(rule.slots) + self._has_own_masters
        scalars = sample_scalars(rule, layout.compute_dtype) if host_coefficients else ()
        self._coefficients = len(scalars)
        self._table = np.zeros((0, 0), np.int64)
        #: For each shape an array of its dimensions, and how many rows have it.
        self._shapes: dict[tuple[int, ...], tuple[np.ndarray, list[int]]] = {}
        # The number of elements of all rows, and the number of rows without dimensions.
        self._elements = self._scalars = 0
        self._found = np.empty((3, 0), np.int64)
        self._answer = Words(1)
        self._update, self._measure, self._finite = Words(19), Words(9), Words(8)
        self._squares, self._limbs = Words(10), np.zeros(length(layout.compute_dtype), np.int64)
        self._shares: Runnable | None = None
        #: What was divided last: the addresses of the rows and places, with what they were divided
        #: for, and the shares.
        self._division: tuple[tuple[int, int] | None, Any, Runnable | None] = (None, None, None)
        self._seen: Words | None = None
        #: The addresses of the rows and places that ``_seen`` has now.
        self._at: tuple[int, int] | None = None
        #: For each row whose slots have been turned their strides, in elements.
        self._strides: dict[int, np.ndarray] = {}
        #: For each row that works on a loan, where its own slots are, and the strides of the loan.
        self._lent: dict[int, tuple[list[int], np.ndarray]] = {}
        #: For each row through which kernels walk in this step its plan.
        self._plans: dict[int, np.ndarray] = {}
        super().__init__(backend, layout, rule, has_masters)
        facts = None if look is None else look.facts(storage_dtype)
        if facts is not None:
            self._tensor = np.zeros(8, np.int64)
            self._seen = Words(13 + len(facts))
            itemsize = 2 if storage_dtype in NARROW else self.dtype.itemsize
            self._seen.array[9:] = [id(None), itemsize, 0, *facts, address(self._tensor)]
            self._seen.array[4:6] = self._place

    # Rows

    def _grow(self, capacity: int) -> None:
        super()._grow(capacity)
        columns = (self.steps, self.own, self.shared, self.bound, self.clipped)
        self._update.array[5:12] = [*self._place, *map(address, columns)]
        columns = (self.norm_bound, self.eps, self.norm, self.own, self._limbs)
        self._measure.array[2:] = [*self._place, *map(address, columns)]
        self._squares.array[5:] = [*self._place, address(self.own), 0, address(self._limbs)]
        self._finite.array[5:] = [*self._place, address(self.bad)]
        if self._seen is not None:
            self._seen.array[4:6] = self._place

    def _new_numbers(self, capacity: int) -> np.ndarray:
        width = self._first_number + (self._coefficients or len(self.columns))
        table = np.zeros((capacity, width), np.int64)
        used = self._table[: len(self.shapes)]
        table[: len(used), : used.shape[1]] = used
        self._table, self._place = table, (address(table), width)
        numbers: np.ndarray = table.view(np.float64)[:, self._first_number :]
        return super()._new_numbers(capacity) if self._host_coefficients else numbers

    def _make_slots(
        self, rows: np.ndarray, shapes: Sequence[tuple[int, ...]], slots: Slots | None
    ) -> None:
        super()._make_slots(rows, shapes, slots)
        table, place = self._table, {}
        for shape, count in Counter(shapes).items():
            array, (used,) = self._shapes.get(shape, (np.array(shape, np.int64), [0]))
            self._shapes[shape] = array, [used + count]
            place[shape] = address(array)
            self._scalars += 0 if shape else count
        table[rows, SIZE] = self.size[rows]
        table[rows, STRIDES] = table[rows, WIDE] = table[rows, WALK] = 0
        table[rows, NDIM] = [len(shape) for shape in shapes]
        table[rows, SHAPE] = [place[shape] for shape in shapes]
        self._elements += int(self.size[rows].sum())
        self._point(rows)

    def _point(self, rows: np.ndarray) -> None:
        """Fill in the addresses of slots in some rows of the table."""
        numbers = self.chunk[rows]
        for number in np.unique(numbers).tolist():
            mine = rows[numbers == number]
            begins = self.offset[mine] * self.dtype.itemsize
            arrays = self._chunks[number].arrays[: self._first_number - FIRST_SLOT]
            for j, array in enumerate(arrays):
                self._table[mine, FIRST_SLOT + j] = address(array) + begins

    def _turn(self, row: int, axes: tuple[int, ...], slots: Sequence[np.ndarray]) -> None:
        super()._turn(row, axes, slots)
        places, strides = self._lent[row]
        if self.size[row] >= LARGE:
            places[:] = map(address, slots[: len(places)])
        self._table[row, STRIDES] = address(strides) if row in self._axes else 0
        self._strides[row] = strides

    def _drop_slots(self, row: int) -> None:
        super()._drop_slots(row)
        self._strides.pop(row, None)
        self._lent.pop(row, None)
        self._elements -= int(self.size[row])
        shape = self.shapes[row]
        array, (used,) = self._shapes[shape]
        self._shapes[shape] = array, [used - 1]
        if used == 1:
            del self._shapes[shape]
        self._scalars -= not shape

    # Looking

    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """Find the memory of all arrays in one compiled call."""
        self._take_back()  # an interrupt may have come when the last step did this
        look, seen, count = self._look, self._seen, len(part.rows)
        if look is None or seen is None:
            part.look_at_all(arrays)
            return
        words = seen.values
        if part.at is not self._at or count > self._found.shape[1]:
            if count > self._found.shape[1]:
                found = self._found = np.empty((3, 2 * count), np.int64)
                seen.array[6:9] = address(found) + found.strides[0] * np.arange(3)
            # None in between: a signal handler may raise when only some words are written.
            self._at = None
            words[0], words[1], (words[2], words[3]) = arrays.words.address, count, part.at
            self._at = part.at
        words[11] = last
        try:
            look.kernel.alone(seen.address, self._answer.address)
        except Exception:
            # The library raised an error. Python examines each array, and its error names one.
            part.look_at_all(arrays)
            return
        answer = self._answer.values[0]
        if answer != count:
            code, answer = divmod(answer, OVERLAP)
            odds, active = divmod(answer, ODD)
            if active < count:
                # The next step overwrites these rows; the places are also read after the step.
                part.rows, part.places = self._found[0, :active], self._found[1, :active].copy()
                part.at = words[6], 0
            if odds:
                part.odd = self._found[2, :odds].tolist()
            arrays.overlap = code if last and arrays.order is not None else UNKNOWN
        elif last and arrays.order is not None:
            arrays.overlap = APART
        if look.holds is not None and not self._holds(part, arrays):
            part.odd = range(len(part.rows))

    def _holds(self, part: Part, arrays: Arrays) -> bool:
        """Whether arrays pass the checks of ``Look.holds``, where they must be made again."""
        holds, places = self._look.holds, part.places  # type: ignore[union-attr]
        assert holds is not None
        # A tensor with a gradient of its own was a leaf when its name was first seen. Asking all
        # of them again would take 60 ns per tensor and question, a quarter of a step.
        if not arrays.own or part.fresh is not None:
            mine = np.delete(places, part.odd) if part.odd else places
            if arrays.own and part.fresh is not None:
                mine = mine[np.isin(mine, part.fresh)]
            if mine.size and not holds(arrays.params[mine], arrays.grads[mine], False):
                return False
        if arrays.own and self._scalars:
            mine = np.flatnonzero(self._table[part.rows, NDIM] == 0)
            mine = places[np.setdiff1d(mine, part.odd) if part.odd else mine]
            return holds(arrays.params[mine], arrays.grads[mine], True)
        return True

    def overlap(self, arrays: Arrays) -> int:
        """Compare all spans in one compiled call."""
        kernel = look_kernel("overlap")
        if kernel is None:
            return super().overlap(arrays)
        # Some spans overlap, or they begin in another order than in the last step.
        arrays.set_order(np.argsort(arrays.spans[0]))
        kernel.alone(arrays.words.address, self._answer.address)
        found: int = self._answer.values[0]
        return found

    def _take(self, part: Part, position: int, loan: Loan) -> None:
        number = loan.member.row
        row = self._table[number]
        strides = np.array(element_strides(self.shapes[number], loan.axes), np.int64)
        if number in self._lent:  # the second loan of a step replaces the first
            row[FIRST_SLOT : self._first_number] = self._lent[number][0]
        self._lent[number] = row[FIRST_SLOT : self._first_number].tolist(), strides
        row[PARAM], row[GRAD] = address(loan.param), address(loan.grad)
        row[WIDE], row[WALK] = not loan.strided, 0
        self._plans.pop(number, None)
        if loan.slots is not None:
            row[FIRST_SLOT : FIRST_SLOT + len(loan.slots)] = list(map(address, loan.slots))
        if loan.strided and loan.param.size:
            plan = _plan(loan.param, loan.grad)
            if not plan[PARAM_ALONG] == plan[GRAD_ALONG] == IN_PLACE:
                self._plans[number], row[WALK] = plan, address(plan)

    def _take_back(self) -> None:
        for row, (places, _) in self._lent.items():
            self._table[row, WIDE] = self._table[row, WALK] = 0
            self._table[row, FIRST_SLOT : self._first_number] = places
        self._lent, self._plans = {}, {}

    # Measuring

    @cached_property
    def _norm_kernels(self) -> dict[str, Kernel]:
        return norm_kernels(self.layout.compute_dtype, self._storage_dtype)

    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """Check all gradients in one compiled call, large ones on several threads."""
        rows, kernel = part.rows, self._norm_kernels["finite"]
        self.bad[rows] = 0
        if self._plans or self._is_large(rows):
            used = self._threads(rows, threads)
            blocks = self._split(rows, used, [address(self.bad)], 0)
            self._shared(kernel, blocks, used).run()
        elif len(rows):
            words = self._finite.values
            words[0], words[3] = part.at[0], len(rows)
            kernel.alone(self._finite.address)
        finite: np.ndarray = self.bad[rows] == 0
        return finite

    def squares(self, part: Part, which: np.ndarray | slice, threads: int | None) -> Sum:
        """Sum the squares in one compiled call, large gradients on several threads."""
        rows, limbs = part.rows[which], self._limbs
        if self._plans or self._is_large(rows):
            sums, _ = self._sum(rows, threads, separate=False)
            return Sum.from_integers(sums.sum(axis=0), self.layout.compute_dtype)
        words = self._squares.values
        words[0], words[3] = part.at[0] if isinstance(which, slice) else address(rows), len(rows)
        limbs[:] = 0
        self._norm_kernels["squares"].alone(self._squares.address)
        return Sum.from_integers(limbs, self.layout.compute_dtype)

    def _sum(
        self, rows: np.ndarray, threads: int | None, separate: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sum squares on several threads, as integers.

        Args:
            rows: The rows.
            threads: The largest number of threads, or None.
            separate: Whether each row gets sums of its own; otherwise each share has one.

        Returns:
            The sums, and where those of each row begin and end.
        """
        used = self._threads(rows, threads)
        blocks = self._split(rows, used, [address(self.own), separate], 1)
        shares, count = len(blocks), len(self._limbs)
        sums = np.zeros((shares + len(rows) * separate, count), np.int64)
        blocks[:, -1] = address(sums) + sums.strides[0] * np.arange(shares)
        self._shared(self._norm_kernels["squares"], blocks, used).run()
        return sums, places_of_sums(blocks[:, 1:5], len(rows))

    def clip_by_norm(self, part: Part, threads: int | None) -> None:
        """Measure and clip by norm in one compiled call, large gradients on several threads."""
        rows = part.rows
        if self._plans or self._elements > MANY:
            rows = rows[~np.isnan(self.norm_bound[rows])]
        if self._plans or self._is_large(rows):
            # Rows that are walked through come in boxes, each a part of its row.
            is_shared = (self.size[rows] >= SHARED) | (self._table[rows, WALK] != 0)
            self._measure_in_parts(rows[is_shared], threads)
            self._measure_whole(rows[~is_shared], threads)
        else:
            words = self._measure.values
            words[0], words[1] = part.at[0], len(part.rows)
            self._norm_kernels["measure"].alone(self._measure.address)
        part.norms = self.norm[part.rows]

    def _measure_in_parts(self, rows: np.ndarray, threads: int | None) -> None:
        """Measure and clip rows that several threads share."""
        self.own[rows] = 1.0
        sums, first = self._sum(rows, threads, separate=True)
        columns = (self.norm_bound, self.eps, self.norm, self.own)
        arguments = np.array([address(rows), len(rows), *map(address, (first, sums, *columns))])
        self._norm_kernels["norms"].alone(address(arguments))

    def _measure_whole(self, rows: np.ndarray, threads: int | None) -> None:
        """Measure and clip rows that are divided among threads, but not themselves."""
        used = thread_count(threads)
        cuts = borders(self.size[rows], used * SHARES if used > 1 else 1, whole=True)
        limbs = np.zeros((len(cuts), len(self._limbs)), np.int64)
        blocks = np.tile(self._measure.array, (len(cuts), 1))
        blocks[:, 0] = address(rows) + rows.itemsize * cuts[:, 0]
        blocks[:, 1] = cuts[:, 2] - cuts[:, 0]
        blocks[:, -1] = address(limbs) + limbs.strides[0] * np.arange(len(cuts))
        self._norm_kernels["measure"].shares(blocks, used).run()

    # Updating

    def _is_large(self, rows: np.ndarray) -> bool:
        """Whether rows have so many elements together that threads are worth their cost."""
        return self._elements > MANY and bool(self.size[rows].sum() > MANY)

    def _threads(self, rows: np.ndarray, limit: int | None) -> int:
        """How many threads rows are worth."""
        return thread_count(limit) if self._is_large(rows) else 1

    def _prepare(self, part: Part, leave_clipped: bool, threads: int | None) -> None:
        rows, self._shares = part.rows, None
        if self._host_coefficients:
            self._give(rows)
        if self.clipping:
            self.clipped[rows] = 0
        words = self._update.values
        words[0], words[3] = part.at[0], len(rows)
        words[12], words[13] = leave_clipped, self.backend.in_place
        if self._plans or self._is_large(rows):
            used = self._threads(rows, threads)
            if self._plans or used > 1:
                # A share cannot know if it is the last one of its row, so the host counts steps.
                words[13] = 0
                self._shares = self._divided_once(part, used, leave_clipped)

    def _divided_once(self, part: Part, threads: int, leave_clipped: bool) -> Runnable:
        """The update of the rows of a part, divided among threads, as the last time if it may be.

        Dividing takes 30 us, a fifth of a step of a VAE.
        """
        key = threads, self._update.array[5:].tobytes()
        at, before, shares = self._division
        if self._plans or shares is None or part.at is not at or key != before:
            shares = self._divided(part.rows, threads, leave_clipped)
            self._division = part.at, None if self._plans else key, shares
        return shares

    def _divided(self, rows: np.ndarray, threads: int, leave_clipped: bool) -> Runnable:
        """The update of some rows, divided among threads; the caller keeps the rows."""
        blocks = self._split(rows, threads, self._update.array[7:], 0)
        return self._shared(self._kernel, blocks, threads, updates=True, writes_grads=leave_clipped)

    @np.errstate(all="ignore")
    def _give(self, rows: np.ndarray) -> None:
        """Compute the coefficients of some rows for this step, and write them into the table."""
        numbers, steps = self.numbers.take(rows, axis=0), self.steps[rows] + 1
        table = self._table.view(np.float64)[:, self._first_number :]
        if len(rows) and all(x.tobytes() == x[:1].tobytes() * len(rows) for x in (steps, numbers)):
            # Most steps; the way below takes 1 us a row.
            table[rows] = self._coefficients_at(int(rows[0]), int(steps[0]))
            return
        known: dict[bytes, list[float]] = {}
        for row, values, step in zip(rows.tolist(), numbers, steps.tolist(), strict=True):
            key = values.tobytes() + step.to_bytes(8, "little")
            if key not in known:
                known[key] = self._coefficients_at(row, step)
            table[row] = known[key]

    def _coefficients_at(self, row: int, step: int) -> list[float]:
        return list(self.rule_now(row).coefficients(step, self.layout.compute_dtype))

    def _run(self, part: Part) -> None:
        if self._shares is None:
            if len(part.rows):
                self._kernel.alone(self._update.address)
        else:
            self._shares.run()
            if self.backend.in_place:
                self.steps[part.rows] += 1
        if self.clipping:
            part.clipped = self.clipped[part.rows]

    # Running kernels

    def _shared(
        self,
        kernel: Kernel,
        blocks: np.ndarray,
        threads: int,
        updates: bool = False,
        writes_grads: bool = False,
    ) -> Runnable:
        """A kernel for some shares. If rows need it, it walks through their arrays.

        Args:
            kernel: The kernel.
            blocks: Its arguments, one line for each share.
            threads: The number of threads.
            updates: Whether it works on parameters and slots.
            writes_grads: Whether it overwrites gradients.
        """
        if not self._plans:
            return kernel.shares(blocks, threads)
        # Each share needs memory for a row, and for one word an axis.
        count, width = blocks.shape
        room = self._place[1] + max(int(plan[AXES]) for plan in self._plans.values())
        walks = np.zeros((count, ARGUMENTS + width + room), np.int64)
        slots = self._first_number - FIRST_SLOT
        walks[:, : ARGUMENTS - 1] = kernel.address, slots, updates, writes_grads
        rooms_at = address(walks) + 8 * (ARGUMENTS + width)
        walks[:, ARGUMENTS - 1] = rooms_at + walks.strides[0] * np.arange(count)
        walks[:, ARGUMENTS : ARGUMENTS + width] = blocks
        sizes = 2 if self._storage_dtype in NARROW else self.dtype.itemsize, self.dtype.itemsize
        return walk_kernel(*sizes).shares(walks, threads)

    def _split(
        self,
        rows: np.ndarray,
        threads: int,
        tail: "Sequence[int] | np.ndarray",
        more: int,
        whole: bool = False,
    ) -> np.ndarray:
        """The arguments of a kernel over some rows, with one line for each share of the work."""
        cuts = borders(self.size[rows], threads * SHARES if threads > 1 else 1, whole)
        blocks = np.empty((len(cuts), 7 + len(tail) + more), np.int64)
        blocks[:, 0] = address(rows)
        blocks[:, 1:5] = cuts
        blocks[:, 5:7] = self._place
        blocks[:, 7 : 7 + len(tail)] = tail
        return blocks


def _plan(param: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """How kernels walk through a parameter and a gradient, whose axes are in the order of slots."""
    strides = (tuple(stride // x.itemsize for stride in x.strides) for x in (param, grad))
    return boxes(param.shape, *strides, param.itemsize)
