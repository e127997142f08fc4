"""Batches without Numba: large parameters in cache-sized blocks, small ones packed together."""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import repeat
from math import inf, nan, prod
from operator import attrgetter, is_
from types import SimpleNamespace
from typing import Any

import numpy as np

from multiopt.backend import Batch, Limits, Member, Now, Scaling, identities
from multiopt.interruption import fails_again, uninterrupted
from multiopt.rules import Rule
from multiopt.rules.arithmetic import BLOCK, block_sums, clamp, rounded, tree_sum
from multiopt.rules.rule import named
from multiopt_numpy.forms import distinct, other_fields, replaced
from multiopt_numpy.tape import Tape, Tapes

__all__ = ["BlockedBatch"]

#: Elements of a parameter from which on it runs by itself. Copying less into a pack costs less
#: than the calls that it spares.
LARGE = 4096

#: Elements in a block of a clipped gradient: whole blocks of the summation tree.
CHUNK = 8 * BLOCK

#: NumPy takes a third less for its own number than for Python's.
ONE = np.int64(1)

SHAPE, WRITEABLE, BASE = attrgetter("shape"), attrgetter("flags.writeable"), attrgetter("base")


class _Pack:
    """Parameters side by side: room for them and their gradients, and copies of their slots.

    Args:
        where: Their positions.
        shapes: By position.
        slots: By position.
        dtype: Of all.
    """

    def __init__(
        self,
        where: np.ndarray,
        shapes: Sequence[tuple[int, ...]],
        slots: Sequence[tuple[np.ndarray, ...]],
        dtype: np.dtype,
    ) -> None:
        """Copy the slots in."""
        mine = [slots[i] for i in where.tolist()]
        self._shapes = [shapes[i] for i in where.tolist()]
        self.sizes = np.array([prod(shape) for shape in self._shapes], np.int64)
        ends = np.cumsum(self.sizes)
        self._places = list(map(slice, (ends - self.sizes).tolist(), ends.tolist()))
        self.param, self.grad = (np.empty(self.sizes.sum(), dtype) for _ in range(2))
        self.kept = [np.concatenate(arrays, axis=None) for arrays in zip(*mine, strict=True)]
        self.params = self.parts(self.param)
        self._tape: Tape | None = None
        self._room: list[np.ndarray] = []
        #: By parameter, its slots as parts of the pack.
        self.slots = (
            list(zip(*map(self.parts, self.kept), strict=True)) if self.kept else [()] * len(mine)
        )

    def parts(self, pack: np.ndarray) -> list[np.ndarray]:
        """Of an array as long as the pack, the part of each parameter, in its shape."""
        pairs = zip(self._places, self._shapes, strict=True)
        return [pack[place].reshape(shape) for place, shape in pairs]

    def take(self, params: list[np.ndarray], grads: list[np.ndarray]) -> None:
        """Copy parameters and gradients in.

        Raises:
            TypeError: One is of another dtype.
        """
        if params:
            np.concatenate(params, axis=None, out=self.param, casting="no")
            np.concatenate(grads, axis=None, out=self.grad, casting="no")

    def __len__(self) -> int:
        """The number of elements."""
        return len(self.param)

    def room(self, tape: Tape) -> list[np.ndarray]:
        """The memory for a run of a tape, which stays: its pages are there already."""
        if tape is not self._tape:
            self._tape, self._room = tape, tape.room(len(self))
        return self._room

    def give(self, params: list[np.ndarray]) -> None:
        """Copy the parameters back."""
        _copy(self.params, params)

    def spread(self, scalars: Sequence[Any]) -> list[Any]:
        """Scalars with a number for each parameter as numbers for each element."""
        return [np.repeat(x, self.sizes) if np.ndim(x) else x for x in scalars]


class _Packed:
    """A run of a tape over a pack."""

    def __init__(
        self,
        tape: Tape,
        pack: _Pack,
        grad: np.ndarray,
        scalars: list[Any],
    ) -> None:
        """Nothing is computed yet."""
        self.pack = pack
        self._tape, self._grad, self._scalars, self._room = tape, grad, scalars, pack.room(tape)
        # Where the results go, beside the parameters.
        self._pairs: list[tuple[list[np.ndarray], list[np.ndarray]]] = []

    def compute(self) -> None:
        """Run the tape."""
        pack = self.pack
        self._tape.run(pack.param, self._grad, pack.kept, self._scalars, self._room)

    def goes(self, sources: list[np.ndarray], targets: list[np.ndarray]) -> None:
        """Let ``run`` copy some arrays."""
        self._pairs.append((sources, targets))

    def run(self) -> None:
        """Copy what was computed."""
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


class BlockedBatch(Batch):
    """Parameters that the tapes of one rule update, on one thread.

    Args:
        tapes: The tapes.
        vectorized: Whether coefficients can be computed for arrays of steps.
        members: The parameters, of one compute dtype.
        itself: Whether their arrays are NumPy's, and not to be lent.
    """

    def __init__(
        self, tapes: Tapes, vectorized: bool, members: Sequence[Member], itself: bool
    ) -> None:
        """Nothing is packed yet."""
        self._tapes, self._vectorized = tapes, vectorized
        self._members, self._itself = members, itself
        self._dtype = np.dtype(members[0].layout.compute_dtype)
        self._shapes = [member.layout.shape for member in members]
        self._sizes = np.array([prod(shape) for shape in self._shapes])
        self._everything = np.arange(len(members))
        self._small = np.flatnonzero(self._sizes < LARGE)
        self._params: list[Any] = []
        self._grads: list[Any] = []
        self._slots: list[Any] = [member.slots for member in members]
        self._pack = _Pack(self._small, self._shapes, self._slots, self._dtype) if itself else None
        if self._pack is not None:
            for i, slots in zip(self._small.tolist(), self._pack.slots, strict=True):
                self._slots[i] = slots
        self._homes = list(self._slots)
        self._owned = False
        # The identities of arrays that were each another.
        self._different = b""
        self._unclipped = np.zeros(len(members), bool)
        # What is to run, and whether it clipped.
        self._runs: list[Any] = []
        self._clipped = self._unclipped
        self._rules, self._which = distinct([member.rule for member in members])
        self._columns = _columns(self._rules)

    def homes(self) -> Sequence[tuple[np.ndarray, ...]]:
        """See ``Batch``: parts of the pack for small parameters."""
        return self._homes if self._itself else ()

    # Looking

    def look(self, params: np.ndarray, grads: np.ndarray, leaves: bool) -> np.ndarray:
        """See ``Batch``."""
        self._params, self._grads = params.tolist(), grads.tolist()
        self._slots = list(self._homes)
        self._owned = False
        if not self._itself:
            return self._everything
        if self._are_regular(self._params, "carray") and self._are_regular(
            self._grads, "c_contiguous"
        ):
            arrays = self._params + self._grads
            self._owned = len(set(map(id, arrays))) == len(arrays) and _own_their_memory(arrays)
            return self._everything[:0]
        pairs = zip(self._shapes, self._params, self._grads, strict=True)
        return np.flatnonzero(
            [
                not (_is_regular(p, "carray", *facts) and _is_regular(g, "c_contiguous", *facts))
                for shape, p, g in pairs
                for facts in [(shape, self._dtype)]
            ]
        )

    def _are_regular(self, arrays: list[Any], flag: str) -> bool:
        if set(map(type, arrays)) != {np.ndarray}:
            return False
        return (
            list(map(attrgetter("shape"), arrays)) == self._shapes
            and set(map(id, map(attrgetter("dtype"), arrays))) == {id(self._dtype)}
            and all(map(attrgetter(f"flags.{flag}"), arrays))
        )

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
        pack = self._pack
        if limits is not None or pack is None or len(self._small) < len(self._members):
            return False
        given, their_grads = params.tolist(), grads.tolist()
        # Gradients may be of any strides and may overlap with anything, for they are copied.
        if not (
            set(map(type, given)) == set(map(type, their_grads)) == {np.ndarray}
            and list(map(SHAPE, given)) == list(map(SHAPE, their_grads)) == self._shapes
            and all(map(WRITEABLE, given))
            and _own_their_memory(given)
            and self._are_different(params)
        ):
            return False
        try:
            pack.take(given, their_grads)
        except TypeError:
            return False  # another dtype
        with np.errstate(all="ignore"):
            (_, tape, scalars), *others = self._scalars_now(self._everything, steps, now)
        if others:
            return False
        self._runs = [_Packed(tape, pack, pack.grad, pack.spread(scalars))]
        self._params = given
        return True

    def advance(
        self,
        steps: np.ndarray,
        limits: Limits | None,
        leave_clipped: bool,
        threads: int | None,
    ) -> np.ndarray:
        """See ``Batch``."""
        (run,) = self._runs
        with uninterrupted():
            with np.errstate(all="ignore"):
                run.compute()
            run.pack.give(self._params)
            np.add(steps, ONE, out=steps)
        self._runs, self._params = [], []
        return self._unclipped

    def clipped(self) -> np.ndarray:
        """See ``Batch``."""
        return self._unclipped

    def _are_different(self, arrays: np.ndarray) -> bool:
        """Whether each is another array; asked again only about others than the last time."""
        ids = identities(arrays)
        if ids != self._different and len(set(map(id, arrays))) == len(arrays):
            self._different = ids
        return ids == self._different

    def lend(
        self, position: int, param: np.ndarray, grad: np.ndarray, slots: tuple[np.ndarray, ...]
    ) -> None:
        """See ``Batch``."""
        self._params[position], self._grads[position] = param, grad
        self._slots[position] = slots

    def slots_of(self, position: int) -> tuple[np.ndarray, ...] | None:
        """See ``Batch``."""
        slots: tuple[np.ndarray, ...] | None = self._homes[position]
        return slots

    def is_apart(self, writes_grads: bool) -> bool:
        """See ``Batch``."""
        return self._owned

    def spans(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Batch``."""
        sizes = self._sizes[index] * self._dtype.itemsize
        params, grads = (
            np.array([arrays[i].ctypes.data for i in index.tolist()], np.int64)
            for arrays in (self._params, self._grads)
        )
        return np.array([params, params + sizes]), np.array([grads, grads + sizes])

    # Computing

    def finite(self, index: np.ndarray, threads: int | None) -> np.ndarray:
        """See ``Batch``."""
        return np.array(
            [all(np.isfinite(x).all() for x in _chunks(self._grads[i])) for i in index.tolist()],
            bool,
        )

    def sums_of_squares(
        self, index: np.ndarray, own: np.ndarray, factor: float, threads: int | None
    ) -> np.ndarray:
        """See ``Batch``."""
        totals = []
        for i in index.tolist():
            scale = self._dtype.type(own[i])
            sums = [
                block_sums(np, factor * (scale * x).astype(np.float64))
                for x in _chunks(self._grads[i])
            ]
            totals.append(float(tree_sum(np, np.concatenate(sums))) if sums else 0.0)
        return np.array(totals)

    def prepare(
        self,
        index: np.ndarray,
        steps: np.ndarray,
        now: Sequence[Now],
        scaling: Scaling | None,
        leave_clipped: bool,
        threads: int | None,
    ) -> None:
        """See ``Batch``. What is small is computed here, in copies, and ``run`` moves it."""
        self._clipped = np.zeros(len(self._members), bool)
        self._runs = []
        for where, tape, scalars in self._scalars_now(index, steps, now):
            small = self._sizes[where] < LARGE
            if small.any():
                values = [_at(x, small) for x in scalars]
                self._runs.append(self._packed(where[small], tape, values, scaling, leave_clipped))
            room = tape.room(int(self._sizes[where].max()))
            for k in np.flatnonzero(~small).tolist():
                values = [x if np.ndim(x) == 0 else float(x[k]) for x in scalars]
                alone = self._alone(int(where[k]), tape, values, room, scaling, leave_clipped)
                self._runs.append(alone)

    def _scalars_now(
        self, index: np.ndarray, steps: np.ndarray, now: Sequence[Now]
    ) -> list[tuple[np.ndarray, Tape, list[Any]]]:
        """Positions with the tape and the coefficients that they have at this step."""
        if not index.size:
            return []
        rules, which = replaced(self._rules, self._which, now)
        if index is not self._everything:
            which, steps = which[index], steps[index]
        counts = steps + 1
        rule = rules[which[0]]
        if (which == which[0]).all() and (counts == counts[0]).all():
            scalars = rule.coefficients(int(counts[0]), self._dtype.name)
            return [(index, self._tape(scalars), list(scalars))]
        # The same functions on arrays: one call for all names.
        by_name = _columns(rules) if now else self._columns
        h = SimpleNamespace(
            **{name: _picked(column, which) for name, column in by_name.items()},
            **other_fields(rule),
        )
        scalars = self._scalars_of([rules[i] for i in which.tolist()], counts, h)
        columns = [np.asarray(x) for x in scalars]
        # Switches that differ by name: each of their patterns has a tape of its own.
        patterns = [column for column in columns if column.dtype == bool and column.ndim]
        kinds = np.zeros(len(index), np.intp)
        if patterns:
            kinds = np.unique(np.array(patterns), axis=1, return_inverse=True)[1].reshape(-1)
        jobs = []
        for pattern in range(kinds.max() + 1):
            mine = np.flatnonzero(kinds == pattern) if patterns else slice(None)
            values = [_same(x[mine] if x.ndim else x, self._dtype) for x in columns]
            jobs.append((index[mine], self._tape(values), values))
        return jobs

    def _scalars_of(self, rules: list[Rule], counts: np.ndarray, h: Any) -> list[Any]:
        """The coefficients of each of some rules at its step, as arrays."""
        if self._vectorized:
            try:
                return list(named(type(rules[0]).scalars(h, counts)).values())
            except (TypeError, ValueError):
                if not fails_again(type(rules[0]).scalars, h, counts):
                    raise
                self._vectorized = False  # somebody's scalars that take no arrays
        pairs = zip(rules, counts.tolist(), strict=True)
        each = [rule.coefficients(count) for rule, count in pairs]
        return list(map(np.array, zip(*each, strict=True)))

    def _tape(self, scalars: Iterable[Any]) -> Tape:
        return self._tapes[tuple(x for x in scalars if isinstance(x, bool))]

    def run(self) -> np.ndarray:
        """See ``Batch``."""
        for run in self._runs:
            run.run()
        # Nobody's arrays are held from one step to the next.
        self._params, self._grads, self._slots = [], [], list(self._homes)
        self._runs = []
        return self._clipped

    def _packed(
        self,
        where: np.ndarray,
        tape: Tape,
        scalars: list[Any],
        scaling: Scaling | None,
        leave_clipped: bool,
    ) -> _Packed:
        """Compute small parameters side by side, in copies."""
        positions = where.tolist()
        params, grads = ([arrays[i] for i in positions] for arrays in (self._params, self._grads))
        pack = _Pack(where, self._shapes, self._slots, self._dtype)
        pack.take(params, grads)
        grad = pack.grad
        if scaling is not None:
            mine = scaling.at(where)
            grad, beyond = _clipped(grad, *pack.spread([x.astype(self._dtype) for x in mine]))
            limited = [part.any() for part in pack.parts(beyond)]
            self._clipped[where] = mine.scales() | np.array(limited, bool)
        run = _Packed(tape, pack, grad, pack.spread(scalars))
        run.compute()
        run.goes(pack.params, params)
        for parts, i in zip(pack.slots, positions, strict=True):
            run.goes(list(parts), list(self._slots[i]))
        if scaling is not None and leave_clipped:
            run.goes(pack.parts(grad), grads)
        return run

    def _alone(
        self,
        position: int,
        tape: Tape,
        scalars: list[Any],
        room: list[np.ndarray],
        scaling: Scaling | None,
        leave_clipped: bool,
    ) -> _Alone:
        arrays = [
            x.reshape(-1)
            for x in (self._params[position], self._grads[position], *self._slots[position])
        ]
        numbers = None
        if scaling is not None:
            numbers = [self._dtype.type(x[position]) for x in scaling]
            self._clipped[position] = numbers[0] != 1 or numbers[1] != 1
            if not self._clipped[position] and numbers[2] == inf:
                numbers = None
        told = self._clipped[position : position + 1]
        return _Alone(tape, arrays, scalars, room, numbers, leave_clipped, told)


def _is_regular(array: Any, flag: str, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    if type(array) is not np.ndarray or array.dtype is not dtype:
        return False
    return bool(array.shape == shape and getattr(array.flags, flag))


def _chunks(array: np.ndarray) -> Iterable[np.ndarray]:
    flat = array.reshape(-1)
    return (flat[low : low + CHUNK] for low in range(0, len(flat), CHUNK))


def _clipped(grad: np.ndarray, own: Any, shared: Any, bound: Any) -> tuple[np.ndarray, np.ndarray]:
    """The gradient scaled and bounded, and which elements the bound changed."""
    grad = grad * own
    grad *= shared
    return clamp(np, grad, bound), np.abs(grad) > bound


def _copy(sources: Iterable[np.ndarray], targets: Iterable[np.ndarray]) -> None:
    """Copy arrays into others of their shapes."""
    deque(map(np.ndarray.__setitem__, targets, repeat(...), sources), 0)


def _columns(rules: Sequence[Rule]) -> dict[str, Any]:
    """The hyperparameters of rules by name; schedules have none yet."""
    return {name: _column([getattr(rule, name) for rule in rules]) for name in rules[0].ranges}


def _column(values: list[Any]) -> Any:
    """One number if all are the same, or else an array; a tuple of them where values are tuples."""
    if isinstance(values[0], tuple):
        return tuple(_column(list(place)) for place in zip(*values, strict=True))
    numbers = np.array([nan if callable(value) else value for value in values])
    return values[0] if (numbers == numbers[0]).all() else numbers


def _picked(column: Any, index: np.ndarray) -> Any:
    """A column at some positions."""
    if isinstance(column, tuple):
        return tuple(_picked(part, index) for part in column)
    return column[index] if isinstance(column, np.ndarray) else column


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


def _at(value: Any, which: np.ndarray) -> Any:
    return value[which] if np.ndim(value) else value
