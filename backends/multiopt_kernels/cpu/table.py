"""The table that kernels work on, and how the arrays of a step get into it.

The table has one row per parameter (``rows``): the addresses of its arrays, its size and shape, and
its hyperparameters. A kernel reads those addresses from the array objects at every step, so that in
a regular step Python does nothing for a single parameter. Odd arrays are lent (``host``), as copies
or as they lie, with a plan of how to walk through them.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from multiopt.arrays import APART, UNKNOWN, Arrays, Part
from multiopt.engine import Slots
from multiopt.layout import Words, address
from multiopt_kernels.chunks import LARGE
from multiopt_kernels.cpu.boxes import GRAD_ALONG, IN_PLACE, PARAM_ALONG, boxes
from multiopt_kernels.cpu.kernels import look_kernel
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
from multiopt_kernels.forms import sample_scalars
from multiopt_kernels.host import HostGroup, Loan
from multiopt_kernels.orders import element_strides

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["TableGroup"]


class TableGroup(HostGroup):
    """Parameters that have rows in a table.

    Args:
        backend: The backend of the parameters.
        layout: Their layout; its shape does not matter.
        rule: A rule of their kind.
        has_masters: Whether they have master copies.
        host_coefficients: Whether the host computes the coefficients; otherwise the kernel does.
        storage_dtype: The dtype of arrays that the kernel takes as they are. Other arrays are lent
            as copies in the compute dtype.
        look: How to look at the arrays; None if all are lent.
    """

    fills_spans: ClassVar = True
    follows: bool = True

    def __init__(
        self,
        backend: "Backend",
        layout: "Layout",
        rule: "Rule",
        has_masters: bool,
        host_coefficients: bool,
        storage_dtype: str,
        look: Look | None,
    ) -> None:
        """Create a group without rows."""
        self._look = look
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
        arrays.sort()
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


def _plan(param: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """How kernels walk through a parameter and a gradient, whose axes are in the order of slots."""
    strides = (tuple(stride // x.itemsize for stride in x.strides) for x in (param, grad))
    return boxes(param.shape, *strides, param.itemsize)
