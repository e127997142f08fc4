"""Batches that run in compiled kernels: one call for all parameters, large and small."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import inf, nan, prod
from typing import Any, NamedTuple

import numpy as np

from multiopt.backend import Batch, Limits, Member, Now, Scaling
from multiopt.interruption import fails_again, uninterrupted
from multiopt.rules import Rule
from multiopt.rules.arithmetic import BLOCK
from multiopt_numpy.compiled.kernels import norm_kernels
from multiopt_numpy.compiled.rows import FIRST_SLOT, GRAD, PARAM, SIZE
from multiopt_numpy.compiled.team import Kernel, Shares, thread_count
from multiopt_numpy.forms import distinct, number_fields, replaced, sample_scalars

__all__ = ["CompiledBatch", "Look"]

#: Elements below which threads cost more than they bring.
LARGE = 2**18

#: Shares of large work for each thread: one that is held up then holds nobody up for long.
SHARES = 16

#: What a parameter costs beside its elements, in elements.
OVERHEAD = 64

#: NumPy takes a third less for its own number than for Python's.
ONE = np.int64(1)


class Look(NamedTuple):
    """How a batch looks at the arrays of a library.

    Attributes:
        kernel: The compiled function.
        facts: By dtype, the arguments by which it knows the arrays that it takes.
        holds: Whether parameters and gradients that the function takes are also what only Python
            can know. It gets the parameters, the gradients, whether ``Backend.gradients`` gave
            them, and the positions of what has no dimensions, and so no strides.
        touch: ``Backend.touch``, if it does anything.
    """

    kernel: Kernel
    facts: Mapping[str, Sequence[int]]
    holds: Callable[[np.ndarray, np.ndarray, bool, np.ndarray], bool] | None = None
    touch: Callable[[np.ndarray], None] | None = None


class CompiledBatch(Batch):
    """Parameters that one compiled kernel updates.

    Args:
        update: The kernel.
        given: Whether it gets coefficients and computes none.
        look: How to look at the arrays; None if all are lent.
        members: The parameters, of one compute dtype.
    """

    def __init__(
        self, update: Kernel, given: bool, look: Look | None, members: Sequence[Member]
    ) -> None:
        """Fill a row for each parameter, but for what changes from step to step."""
        rule, layout, _ = members[0]
        count = len(members)
        self._update, self._look, self._dtype = update, look, layout.compute_dtype
        self._slots = [member.slots for member in members]
        self._given = given
        self._rules, self._which = distinct([member.rule for member in members])
        self._fields = number_fields(rule)
        numbers = len(sample_scalars(rule, self._dtype) if given else self._fields)
        self._first_number = FIRST_SLOT + len(rule.slots)
        self._table = np.zeros((count, self._first_number + numbers), np.int64)
        self._numbers = self._table.view(np.float64)[:, self._first_number :]
        self._shapes = np.array([n for member in members for n in member.layout.shape], np.int64)
        self._fill(members)
        self._place = _address(self._table), self._table.shape[1]
        self._everything = np.arange(count)
        self._nothing = np.arange(0)
        self._order = np.arange(2 * count)
        self._irregular = np.zeros(count, np.uint8)
        self._clipped = np.zeros(count, bool)
        self._disjoint = self._grads_disjoint = False
        self._lent: list[tuple[np.ndarray, ...]] = []
        ones = np.ones(count)
        self._unclipped = Scaling(ones, ones, np.full(count, inf))
        self._scalars = np.flatnonzero([not member.layout.shape for member in members])
        self._is_large = bool(self._table[:, SIZE].sum() > LARGE)
        # The arguments of the last update of everything: what they refer to, kept alive here, the
        # identities of it, and their address. Likewise for the measuring of norms.
        self._usual: tuple[Any, ...] = ()
        self._usual_for: tuple[int, int, bool] = (0, 0, False)
        self._usual_at = 0
        # What is to run: a kernel with its arguments, and what they refer to.
        self._work: _Work | None = None
        self._limits: Limits | None = None
        self._measuring, self._measuring_at = self._nothing, 0
        if look is not None:
            self._tensor = np.zeros(8, np.int64)
            self._odd = np.zeros(1, np.int64)
            self._odd_at = _address(self._odd)
            itemsize = np.dtype(self._dtype).itemsize
            room = [_address(a) for a in (self._irregular, self._order)]
            facts = look.facts[self._dtype]
            head = [0, 0, count, *self._place, *room, itemsize, _address(self._tensor)]
            self._look_arguments = np.array([*head, *facts], np.int64)
            self._look_at = _address(self._look_arguments)

    def _fill(self, members: Sequence[Member]) -> None:
        shape_at = _address(self._shapes)
        numbers: dict[int, list[float]] = {}
        rows, values = [], []
        for rule, layout, slots in members:
            ndim = len(layout.shape)
            slots_at = [0] * len(rule.slots) if slots is None else map(_address, slots)
            rows.append([0, 0, prod(layout.shape), ndim, shape_at, *slots_at])
            shape_at += 8 * ndim
            if id(rule) not in numbers:
                numbers[id(rule)] = self._numbers_of(rule)
            values.append(numbers[id(rule)])
        self._table[:, : self._first_number] = rows
        if not self._given:
            self._numbers[...] = values

    def _numbers_of(self, rule: Rule) -> list[float]:
        """The hyperparameters, NaN in the place of a schedule."""
        values = [getattr(rule, name) for name, _ in self._fields]
        values = [
            value if place is None else value[place]
            for value, (_, place) in zip(values, self._fields, strict=True)
        ]
        return [nan if callable(value) else value for value in values]

    # Looking

    def look(self, params: np.ndarray, grads: np.ndarray, leaves: bool) -> np.ndarray:
        """See ``Batch``."""
        self._lent.clear()
        self._disjoint = self._grads_disjoint = False
        look = self._look
        if look is None:
            return self._everything
        self._look_arguments[0], self._look_arguments[1] = id(params), id(grads)
        try:
            look.kernel.alone(self._look_at, self._odd_at)
            if self._odd[0] == -1:
                # They overlap, or stand in another order than the last time.
                places = self._table[:, [PARAM, GRAD]].T.ravel()
                self._order[:] = np.argsort(places, kind="stable")
                look.kernel.alone(self._look_at, self._odd_at)
        except Exception:
            if not fails_again(look.kernel.alone, self._look_at, self._odd_at):
                raise
            # The library would not say what an array is. Python looks at each, and says which.
            return self._everything
        odd = self._odd[0]
        if odd > 0:
            return np.flatnonzero(self._irregular)
        if look.holds is not None and not look.holds(params, grads, leaves, self._scalars):
            return self._everything
        self._disjoint = bool(odd != -1)
        self._grads_disjoint = bool(odd == 0)
        return self._nothing

    def ready(
        self,
        params: np.ndarray,
        grads: np.ndarray,
        leaves: bool,
        steps: np.ndarray,
        now: Sequence[Now],
        limits: Limits | None,
        writes_grads: bool,
    ) -> bool:
        """See ``Batch``."""
        if limits is not None and self._is_large:
            return False
        if self.look(params, grads, leaves).size or not self.is_apart(writes_grads):
            return False
        if self._given or now:
            with np.errstate(all="ignore"):
                self._take_numbers(self._everything, steps, now)
        if limits is not None:
            if limits is not self._limits:
                self._limits = None
                self._measuring = self._measuring_for(limits)
                self._measuring_at = _address(self._measuring)
                self._limits = limits
            norm_kernels(self._dtype)["measure"].alone(self._measuring_at)
        if self._look is not None and self._look.touch is not None:
            self._look.touch(params)
        return True

    def advance(
        self,
        steps: np.ndarray,
        limits: Limits | None,
        leave_clipped: bool,
        threads: int | None,
    ) -> np.ndarray:
        """See ``Batch``."""
        scaling = self._unclipped if limits is None else limits.scaling
        self._clipped.fill(False)
        if self._usual_for == (id(steps), id(scaling), leave_clipped):
            self._update.alone(self._usual_at)
            return self._clipped
        # The kernel itself counts the step, and no signal comes between what one call does.
        work = self._update_work(self._everything, steps, scaling, leave_clipped, threads, True)
        if work is None:
            return self._clipped
        if work.shares is not None:
            with uninterrupted():
                work.shares.run()
                np.add(steps, ONE, out=steps)
            return self._clipped
        # For the next step: all that changes for it is in the table. What it is for comes last.
        self._usual_for = 0, 0, False
        self._usual = work.blocks, steps, scaling
        self._usual_at = _address(work.blocks)
        self._usual_for = id(steps), id(scaling), leave_clipped
        self._update.alone(self._usual_at)
        return self._clipped

    def clipped(self) -> np.ndarray:
        """See ``Batch``."""
        return self._clipped

    def _measuring_for(self, limits: Limits) -> np.ndarray:
        """The arguments with which norms are measured, kept for the next step."""
        self._room = np.empty(BLOCK + LARGE // BLOCK + 1)
        places = (limits.norm_bounds, limits.eps, limits.norms, limits.scaling.own, self._room)
        return np.array([len(self._table), *self._place, *map(_address, places)])

    def lend(
        self, position: int, param: np.ndarray, grad: np.ndarray, slots: tuple[np.ndarray, ...]
    ) -> None:
        """See ``Batch``."""
        self._lent.append((param, grad, *slots))
        row = self._table[position]
        row[PARAM], row[GRAD] = _address(param), _address(grad)
        row[FIRST_SLOT : self._first_number] = [_address(slot) for slot in slots]

    def slots_of(self, position: int) -> tuple[np.ndarray, ...] | None:
        """See ``Batch``."""
        return self._slots[position]

    def is_apart(self, writes_grads: bool) -> bool:
        """See ``Batch``."""
        return self._grads_disjoint if writes_grads else self._disjoint

    def spans(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Batch``."""
        rows = self._table[index]
        sizes = rows[:, SIZE] * np.dtype(self._dtype).itemsize
        params, grads = (np.array([low, low + sizes]) for low in (rows[:, PARAM], rows[:, GRAD]))
        return params, grads

    # Computing

    def finite(self, index: np.ndarray, threads: int | None) -> np.ndarray:
        """See ``Batch``."""
        bad = np.zeros(len(self._table), np.uint8)
        _run(self._work_of(norm_kernels(self._dtype)["finite"], index, threads, [_address(bad)]))
        finite: np.ndarray = bad[index] == 0
        return finite

    def sums_of_squares(
        self, index: np.ndarray, own: np.ndarray, factor: float, threads: int | None
    ) -> np.ndarray:
        """See ``Batch``."""
        kernels = norm_kernels(self._dtype)
        blocks = -(-self._table[index, SIZE] // BLOCK)
        first = np.concatenate([[0], np.cumsum(blocks)])
        sums, factors = np.empty(first[-1]), np.array([factor])
        tail = [_address(a) for a in (own, factors, first, sums)]
        _run(self._work_of(kernels["squares"], index, threads, tail, scratch=True))
        totals = np.empty(len(index))
        arguments = np.array([len(index), *(_address(a) for a in (first, sums, totals))])
        kernels["totals"].alone(_address(arguments))
        return totals

    def prepare(
        self,
        index: np.ndarray,
        steps: np.ndarray,
        now: Sequence[Now],
        scaling: Scaling | None,
        leave_clipped: bool,
        threads: int | None,
    ) -> None:
        """See ``Batch``."""
        self._take_numbers(index, steps, now)
        self._clipped.fill(False)
        if scaling is None:
            scaling = self._unclipped
        self._work = self._update_work(index, steps, scaling, leave_clipped, threads, False)

    def _take_numbers(self, index: np.ndarray, steps: np.ndarray, now: Sequence[Now]) -> None:
        """Put what the rules have for this step into the table."""
        if not self._given:
            for rule, where in now:
                # Writing them all takes a tenth of the time of writing many.
                rows = where if len(where) < len(self._table) else slice(None)
                self._numbers[rows] = self._numbers_of(rule)
            return
        if not index.size:
            return
        rules, which = replaced(self._rules, self._which, now)
        which, counts = which[index], steps[index] + 1
        if (which == which[0]).all() and (counts == counts[0]).all():
            alike = rules[which[0]].coefficients(int(counts[0]), self._dtype)
            self._numbers[index] = list(alike)
            return
        known: dict[tuple[int, int], Any] = {}
        pairs = zip(which.tolist(), counts.tolist(), strict=True)
        for i, pair in zip(index.tolist(), pairs, strict=True):
            if pair not in known:
                known[pair] = list(rules[pair[0]].coefficients(pair[1], self._dtype))
            self._numbers[i] = known[pair]

    def run(self) -> np.ndarray:
        """See ``Batch``."""
        _run(self._work)
        # Nobody's arrays are held from one step to the next.
        self._lent.clear()
        self._work = None
        return self._clipped

    def _update_work(
        self,
        index: np.ndarray,
        steps: np.ndarray,
        scaling: Scaling,
        leave_clipped: bool,
        threads: int | None,
        counts: bool,
    ) -> "_Work | None":
        """What is to run for an update; with ``counts`` it counts the step, but not in shares."""
        own, shared, bound = scaling
        tail = [_address(a) for a in (steps, own, shared, bound, self._clipped)]
        tail += [int(leave_clipped), 0]
        work = self._work_of(self._update, index, threads, tail, steps, scaling)
        if counts and work is not None and work.shares is None:
            work.blocks[:, -1] = 1
        return work

    def _work_of(
        self,
        kernel: Kernel,
        index: np.ndarray,
        threads: int | None,
        tail: Sequence[int],
        *kept: Any,
        scratch: bool = False,
    ) -> "_Work | None":
        """A run of a kernel over some rows, on several threads if that is worth it.

        Args:
            kernel: The kernel.
            index: The rows.
            threads: The largest number of threads, or None.
            tail: Its arguments after the first.
            kept: What the arguments refer to, if nobody else keeps it until they run.
            scratch: Whether the last argument is room for a block.
        """
        if not index.size:
            return None
        sizes = self._table[index, SIZE]
        large = sizes.sum() > LARGE
        used = thread_count(threads) if large else 1
        borders = _borders(sizes, used * SHARES if used > 1 else 1)
        blocks = np.empty((len(borders), 7 + len(tail) + scratch), np.int64)
        blocks[:, 0] = _address(index)
        blocks[:, 1:5] = borders
        blocks[:, 5:7] = self._place
        blocks[:, 7 : 7 + len(tail)] = tail
        room = np.empty((len(borders), BLOCK)) if scratch else None
        if room is not None:
            blocks[:, -1] = _address(room) + room.strides[0] * np.arange(len(borders))
        shares = kernel.shares(blocks, used) if large else None
        return _Work(kernel, blocks, shares, (index, room, *kept))


class _Work(NamedTuple):
    """A run of a kernel for which all memory is there.

    Attributes:
        kernel: The kernel.
        blocks: Its arguments.
        shares: The same for several threads; None if it is to run here and at once.
        kept: What the arguments refer to.
    """

    kernel: Kernel
    blocks: np.ndarray
    shares: Shares | None
    kept: tuple[Any, ...]


def _run(work: _Work | None) -> None:
    if work is None:
        return
    if work.shares is None:
        work.kernel.alone(_address(work.blocks))
    else:
        work.shares.run()


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


def _address(array: np.ndarray) -> int:
    return array.ctypes.data
