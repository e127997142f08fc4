"""Groups that run in compiled kernels: one call updates all rows of a step, large and small.

What kernels work on is in the table of the group (``table``). Here they are called: in this thread,
or in shares on several threads, and where arrays must be walked through, through ``walk``.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from multiopt.arrays import Part
from multiopt.layout import Words, address
from multiopt.rules.sums import Sum, length
from multiopt_kernels.cpu.boxes import AXES
from multiopt_kernels.cpu.kernels import norm_kernels, walk_kernel
from multiopt_kernels.cpu.look import Look
from multiopt_kernels.cpu.narrow import NARROW
from multiopt_kernels.cpu.rows import FIRST_SLOT, WALK
from multiopt_kernels.cpu.shares import SHARED, SHARES, borders, places_of_sums
from multiopt_kernels.cpu.table import TableGroup
from multiopt_kernels.cpu.team import Kernel, Runnable, thread_count
from multiopt_kernels.cpu.walk import ARGUMENTS
from multiopt_kernels.host import HostGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["CompiledGroup"]

#: The number of elements up to which threads cost more than they gain.
MANY = 2**18


class CompiledGroup(TableGroup):
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
        self._kernel = kernel
        self._update, self._measure, self._finite = Words(19), Words(9), Words(8)
        self._squares, self._limbs = Words(10), np.zeros(length(layout.compute_dtype), np.int64)
        self._shares: Runnable | None = None
        #: What was divided last: the addresses of the rows and places, with what they were divided
        #: for, and the shares.
        self._division: tuple[tuple[int, int] | None, Any, Runnable | None] = (None, None, None)
        super().__init__(backend, layout, rule, has_masters, host_coefficients, storage_dtype, look)

    def _grow(self, capacity: int) -> None:
        super()._grow(capacity)
        columns = (self.steps, self.own, self.shared, self.bound, self.clipped)
        self._update.array[5:12] = [*self._place, *map(address, columns)]
        columns = (self.norm_bound, self.eps, self.norm, self.own, self._limbs)
        self._measure.array[2:] = [*self._place, *map(address, columns)]
        self._squares.array[5:] = [*self._place, address(self.own), 0, address(self._limbs)]
        self._finite.array[5:] = [*self._place, address(self.bad)]

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
        used = self._threads(rows, threads)
        if self._plans or used > 1:
            # A share cannot know if it is the last one of its row, so the host counts steps.
            words[13] = 0
            self._shares = self._divided_once(part, used, leave_clipped)

    def _divided_once(self, part: Part, threads: int, leave_clipped: bool) -> Runnable:
        """The update of the rows of a part, divided among threads, as the last time if it may be.

        Dividing takes 30 us, a fifth of a step of a VAE.
        """
        if self._plans:  # of this step's arrays
            return self._divided(part.rows, threads, leave_clipped)
        key = threads, self._update.array[5:].tobytes()
        at, before, shares = self._division
        if shares is None or part.at is not at or key != before:
            shares = self._divided(part.rows, threads, leave_clipped)
            self._division = part.at, key, shares
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
