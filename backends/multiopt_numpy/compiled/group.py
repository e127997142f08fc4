"""Groups that run in compiled kernels: one call for all rows of a step, large and small."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from multiopt.engine import Array, Arrays, Part
from multiopt.rules.arithmetic import BLOCK
from multiopt_numpy.compiled.kernels import look_kernel, norm_kernels
from multiopt_numpy.compiled.rows import FIRST_SLOT, GRAD, NDIM, PARAM, SHAPE, SIZE
from multiopt_numpy.compiled.team import Kernel, Shares, thread_count
from multiopt_numpy.forms import sample_scalars
from multiopt_numpy.host import HostGroup, Loan

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["CompiledGroup", "Look"]

#: Elements below which threads cost more than they bring.
MANY = 2**18

#: Shares of large work for each thread: one that is held up then holds nobody up for long.
SHARES = 16

#: What a parameter costs beside its elements, in elements.
OVERHEAD = 64


class Look(NamedTuple):
    """How a group looks at the arrays of a library.

    Attributes:
        kernel: The compiled function.
        facts: By dtype, the arguments by which it knows the arrays that it takes.
        holds: Whether parameters and gradients that the function takes are also what only Python
            can know. It gets the parameters, the gradients, and whether it is known that they are
            leaves with gradients of their own; those that have dimensions, and so strides, are
            then not asked about.
    """

    kernel: Kernel
    facts: Mapping[str, Sequence[int]]
    holds: Callable[[np.ndarray, np.ndarray, bool], bool] | None = None


class CompiledGroup(HostGroup):
    """Parameters that one compiled kernel updates.

    Args:
        backend: As for ``Group``.
        layout: Likewise.
        rule: Likewise.
        has_masters: Likewise.
        kernel: The update.
        given: Whether it gets coefficients and computes none.
        look: How to look at the arrays; None if all are lent.
    """

    FRESH: ClassVar = {**HostGroup.FRESH, "clipped": (np.uint8, 0)}

    clipped: np.ndarray

    def __init__(
        self,
        backend: "Backend",
        layout: "Layout",
        rule: "Rule",
        has_masters: bool,
        kernel: Kernel,
        given: bool,
        look: Look | None,
    ) -> None:
        """Have no row yet."""
        self._kernel, self._given, self._look = kernel, given, look
        self.quiet = not given
        self._first_number = FIRST_SLOT + len(rule.slots)
        self._coefficients = len(sample_scalars(rule, layout.compute_dtype)) if given else 0
        self._table = np.zeros((0, 0), np.int64)
        #: By shape, its numbers in memory and how many rows have it.
        self._shapes: dict[tuple[int, ...], tuple[np.ndarray, list[int]]] = {}
        #: How many elements all rows have, and how many rows have no dimensions.
        self._elements = self._scalars = 0
        self._found = np.empty((3, 0), np.int64)
        self._answer = np.zeros(1, np.int64)
        self._answer_at = address(self._answer)
        self._block = np.zeros(14, np.int64)
        self._measuring = np.zeros(9, np.int64)
        self._spans_block = np.zeros(4, np.int64)
        self._spans_at = address(self._spans_block)
        self._room = np.empty(BLOCK + MANY // BLOCK + 1)
        self._shares: Shares | None = None
        #: By row, where its slots are while copies of them are lent.
        self._moved: dict[int, list[int]] = {}
        super().__init__(backend, layout, rule, has_masters)
        if look is not None:
            self._tensor = np.zeros(8, np.int64)
            facts = [*look.facts[layout.compute_dtype], address(self._tensor)]
            head = [*[0] * 13, id(None), self.dtype.itemsize]
            self._look_block = np.array([*head, *facts], np.int64)
            self._look_at = address(self._look_block)
        self._block_at, self._measuring_at = address(self._block), address(self._measuring)

    # Rows

    def _grow(self, capacity: int) -> None:
        super()._grow(capacity)
        columns = (self.steps, self.own, self.shared, self.bound, self.clipped)
        self._block[5:] = [*self._place, *map(address, columns), 0, 0]
        columns = (self.norm_bound, self.eps, self.norm, self.own, self._room)
        self._measuring[2:] = [*self._place, *map(address, columns)]

    def _new_numbers(self, capacity: int) -> np.ndarray:
        width = self._first_number + (self._coefficients or len(self.columns))
        table = np.zeros((capacity, width), np.int64)
        used = self._table[: len(self.shapes)]
        table[: len(used), : used.shape[1]] = used
        self._table, self._place = table, (address(table), width)
        numbers: np.ndarray = table.view(np.float64)[:, self._first_number :]
        return super()._new_numbers(capacity) if self._given else numbers

    def _make_slots(
        self,
        rows: np.ndarray,
        shapes: Sequence[tuple[int, ...]],
        slots: Sequence[Sequence[Array]] | None,
    ) -> None:
        super()._make_slots(rows, shapes, slots)
        table, place = self._table, {}
        for shape, count in Counter(shapes).items():
            array, (used,) = self._shapes.get(shape, (np.array(shape, np.int64), [0]))
            self._shapes[shape] = array, [used + count]
            place[shape] = address(array)
            self._scalars += 0 if shape else count
        table[rows, SIZE] = self.size[rows]
        table[rows, NDIM] = [len(shape) for shape in shapes]
        table[rows, SHAPE] = [place[shape] for shape in shapes]
        self._elements += int(self.size[rows].sum())
        self._point(rows)

    def _point(self, rows: np.ndarray) -> None:
        """Let rows of the table say where their slots are."""
        numbers = self.chunk[rows]
        for number in np.unique(numbers).tolist():
            mine = rows[numbers == number]
            begins = self.offset[mine] * self.dtype.itemsize
            arrays = self._chunks[number].arrays[: self._first_number - FIRST_SLOT]
            for j, array in enumerate(arrays):
                self._table[mine, FIRST_SLOT + j] = address(array) + begins

    def _drop_slots(self, row: int) -> None:
        super()._drop_slots(row)
        self._elements -= int(self.size[row])
        shape = self.shapes[row]
        array, (used,) = self._shapes[shape]
        self._shapes[shape] = array, [used - 1]
        if used == 1:
            del self._shapes[shape]
        self._scalars -= not shape

    # Looking

    def look(self, part: Part, arrays: Arrays) -> None:
        """See ``Group``."""
        rows, places, look = part.rows, part.places, self._look
        count = len(rows)
        if look is None:
            has = np.array([grad is not None for grad in arrays.grads[places]], bool)
            if not has.all():
                part.keep(has)
            part.odd = range(len(part.rows))
            return
        if count > self._found.shape[1]:
            self._found = np.empty((3, 2 * count), np.int64)
        found = self._found
        starts, ends = address(arrays.spans), 8 * arrays.spans.shape[1]
        self._look_block[:13] = [
            *(id(arrays.params), id(arrays.grads), count, address(rows), address(places)),
            *self._place,
            *(address(found) + k * found.strides[0] for k in range(3)),
            *(starts, starts + ends, len(arrays.params)),
        ]
        try:
            look.kernel.alone(self._look_at, self._answer_at)
        except Exception:
            # The library would not say what an array is. Python looks at each, and says which.
            has = np.array([grad is not None for grad in arrays.grads[places]], bool)
            part.keep(has)
            part.odd = range(len(part.rows))
            return
        odds, active = divmod(int(self._answer[0]), 1 << 32)
        if active < count:
            part.rows, part.places = found[0, :active].copy(), found[1, :active].copy()
        part.odd = found[2, :odds].tolist() if odds else ()
        if look.holds is not None and not self._holds(part, arrays):
            part.odd = range(active)

    def _holds(self, part: Part, arrays: Arrays) -> bool:
        """Whether arrays are what only Python can know, as far as that must be asked again."""
        holds, places = self._look.holds, part.places  # type: ignore[union-attr]
        assert holds is not None
        # A tensor with a gradient of its own was a leaf when its name was first seen. To ask all
        # of them again takes 60 ns a tensor and a question, a quarter of a step.
        count = len(places)
        asked = np.arange(count) if not arrays.own else part.fresh
        if asked is not None and part.odd:
            asked = np.setdiff1d(asked, part.odd)
        if asked is not None and asked.size:
            mine = places[asked[asked < count]]
            if not holds(arrays.params[mine], arrays.grads[mine], False):
                return False
        if arrays.own and self._scalars:
            mine = np.flatnonzero(self._table[part.rows, NDIM] == 0)
            mine = places[np.setdiff1d(mine, part.odd) if part.odd else mine]
            return holds(arrays.params[mine], arrays.grads[mine], True)
        return True

    def overlap(self, spans: np.ndarray, order: np.ndarray | None) -> tuple[int, np.ndarray]:
        """See ``Group``."""
        kernel = look_kernel("overlap")
        if kernel is None:
            return super().overlap(spans, order)
        if order is not None and len(order) == spans.shape[1]:
            found = self._overlap(kernel, spans, order)
            if found != -1:
                return found, order
        # They overlap, or stand in another order than the last time.
        order = np.argsort(spans[0], kind="stable")
        return self._overlap(kernel, spans, order), order

    def _overlap(self, kernel: Kernel, spans: np.ndarray, order: np.ndarray) -> int:
        starts = address(spans)
        self._spans_block[:] = (
            *(address(order), len(order) // 2, starts, starts + 8 * spans.shape[1]),
        )
        kernel.alone(self._spans_at, self._answer_at)
        return int(self._answer[0])

    def _take(self, part: Part, position: int, loan: Loan) -> None:
        row = self._table[loan.row]
        row[PARAM], row[GRAD] = address(loan.param), address(loan.grad)
        if loan.slots is not None:
            self._moved[loan.row] = row[FIRST_SLOT : self._first_number].tolist()
            row[FIRST_SLOT : self._first_number] = [address(slot) for slot in loan.slots]

    def forget(self, part: Part) -> None:
        """See ``Group``."""
        if self._loans:
            for row, places in self._moved.items():
                self._table[row, FIRST_SLOT : self._first_number] = places
            self._moved = {}
            super().forget(part)
        self._shares = None

    # Measuring

    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """See ``Group``."""
        bad = np.zeros(len(self.steps), np.uint8)
        self._alone(norm_kernels(self.dtype.name)["finite"], part.rows, threads, [address(bad)])
        finite: np.ndarray = bad[part.rows] == 0
        return finite

    def squares(
        self, part: Part, which: np.ndarray, factor: float, threads: int | None
    ) -> np.ndarray:
        """See ``Group``."""
        kernels, rows = norm_kernels(self.dtype.name), part.rows[which]
        blocks = -(-self.size[rows] // BLOCK)
        first = np.concatenate([[0], np.cumsum(blocks)])
        sums, factors = np.empty(first[-1]), np.array([factor])
        tail = [address(a) for a in (self.own, factors, first, sums)]
        self._alone(kernels["squares"], rows, threads, tail, scratch=True)
        totals = np.empty(len(rows))
        arguments = np.array([len(rows), *(address(a) for a in (first, sums, totals))])
        kernels["totals"].alone(address(arguments))
        return totals

    def clip_by_norm(self, part: Part, threads: int | None) -> None:
        """See ``Group``."""
        if self._is_large(part.rows):
            super().clip_by_norm(part, threads)
            return
        self._measuring[:2] = address(part.rows), len(part.rows)
        norm_kernels(self.dtype.name)["measure"].alone(self._measuring_at)
        self._tell_norms(part)

    # Updating

    def _is_large(self, rows: np.ndarray) -> bool:
        """Whether threads are worth it."""
        return self._elements > MANY and bool(self.size[rows].sum() > MANY)

    def _prepare(self, part: Part, leave_clipped: bool, threads: int | None, counts: bool) -> None:
        rows = part.rows
        if self._given:
            self._give(rows)
        if self.clipping:
            self.clipped[rows] = 0
        self._block[0], self._block[3] = address(rows), len(rows)
        self._block[12], self._block[13] = leave_clipped, counts
        if self._is_large(rows) and (used := thread_count(threads)) > 1:
            blocks = self._split(rows, used, self._block[7:], 0)
            # Shares of one row do not know which of them is the last.
            blocks[:, -1] = 0
            self._shares = self._kernel.shares(blocks, used)
            self._kept = rows, blocks

    def _give(self, rows: np.ndarray) -> None:
        """Put the coefficients of a step into the table."""
        numbers, steps = self.numbers[rows], self.steps[rows] + 1
        coefficients = self._table.view(np.float64)[:, self._first_number :]
        known: dict[bytes, Any] = {}
        for row, values, step in zip(rows.tolist(), numbers, steps.tolist(), strict=True):
            key = values.tobytes() + step.to_bytes(8, "little")
            if key not in known:
                known[key] = list(self.rule_now(row).coefficients(step, self.dtype.name))
            coefficients[row] = known[key]

    def _run(self, part: Part) -> None:
        if self._shares is None:
            if len(part.rows):
                self._kernel.alone(self._block_at)
        else:
            self._shares.run()
            if self.backend.in_place:
                self.steps[part.rows] += 1
        if self.clipping:
            part.clipped = self.clipped[part.rows] != 0

    # Running kernels

    def _alone(
        self,
        kernel: Kernel,
        rows: np.ndarray,
        threads: int | None,
        tail: Sequence[int],
        scratch: bool = False,
    ) -> None:
        """Run a kernel over some rows, on several threads if that is worth it.

        Args:
            kernel: The kernel.
            rows: The rows.
            threads: The largest number of threads, or None.
            tail: Its arguments after the table.
            scratch: Whether the last argument is room for a block.
        """
        if not rows.size:
            return
        large = self._is_large(rows)
        used = thread_count(threads) if large else 1
        blocks = self._split(rows, used, tail, int(scratch))
        if scratch:
            room = np.empty((len(blocks), BLOCK))
            blocks[:, -1] = address(room) + room.strides[0] * np.arange(len(blocks))
        if large:
            kernel.shares(blocks, used).run()
        else:
            kernel.alone(address(blocks))

    def _split(
        self, rows: np.ndarray, threads: int, tail: "Sequence[int] | np.ndarray", more: int
    ) -> np.ndarray:
        """The arguments of a kernel over some rows, a line for each share of the work."""
        borders = _borders(self.size[rows], threads * SHARES if threads > 1 else 1)
        blocks = np.empty((len(borders), 7 + len(tail) + more), np.int64)
        blocks[:, 0] = address(rows)
        blocks[:, 1:5] = borders
        blocks[:, 5:7] = self._place
        blocks[:, 7 : 7 + len(tail)] = tail
        return blocks


def _borders(sizes: np.ndarray, shares: int) -> np.ndarray:
    """Cut rows into shares of about the same work.

    Args:
        sizes: The elements of each row.
        shares: How many shares.

    Returns:
        For each share the row and the block in it where it begins, and those where it ends.
    """
    if shares == 1:
        return np.array([[0, 0, len(sizes), 0]])
    ends = np.cumsum(sizes + OVERHEAD)
    cuts = np.arange(1, shares) * int(ends[-1]) // shares
    rows = np.searchsorted(ends, cuts, "right")
    blocks = np.minimum((cuts - (ends - sizes - OVERHEAD)[rows]) // BLOCK, -(-sizes[rows] // BLOCK))
    stops = [(0, 0), *zip(rows.tolist(), blocks.tolist(), strict=True), (len(sizes), 0)]
    return np.array([(*a, *b) for a, b in pairwise(stops)])


def address(array: np.ndarray) -> int:
    """Where the elements of an array are."""
    return array.ctypes.data
