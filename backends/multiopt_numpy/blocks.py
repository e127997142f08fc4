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
from multiopt.rules import Rule
from multiopt.rules.arithmetic import BLOCK, block_sums, clamp, rounded, tree_sum
from multiopt_numpy.forms import are_uniform, distinct, other_fields, replaced
from multiopt_numpy.tape import Tape

__all__ = ["BlockedBatch"]

#: Elements of a parameter from which on it runs by itself. Copying less into a pack costs less
#: than the calls that it spares.
LARGE = 4096

#: Elements in a block of a clipped gradient: whole blocks of the summation tree.
CHUNK = 8 * BLOCK

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
        self._params = self.parts(self.param)
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

    def give(self, params: list[np.ndarray]) -> None:
        """Copy the parameters back."""
        _copy(self._params, params)

    def spread(self, scalars: Sequence[Any]) -> list[Any]:
        """Scalars with a number for each parameter as numbers for each element."""
        return [np.repeat(x, self.sizes) if np.ndim(x) else x for x in scalars]


class BlockedBatch(Batch):
    """Parameters that the tape of one rule updates, on one thread.

    Args:
        members: The parameters, of one compute dtype.
        itself: Whether their arrays are NumPy's, and not to be lent.
    """

    def __init__(self, members: Sequence[Member], itself: bool) -> None:
        """Nothing is packed yet."""
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
        self._tapes: dict[tuple[bool, ...], Tape] = {}
        self._owned = False
        # The identities of arrays that were each another.
        self._different = b""
        self._jobs: list[tuple[np.ndarray, Tape, list[Any]]] = []
        self._vectorized = are_uniform(members[0].rule)
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

    def advance(
        self,
        params: np.ndarray,
        grads: np.ndarray,
        leaves: bool,
        steps: np.ndarray,
        now: Sequence[Now],
        limits: Limits | None,
        leave_clipped: bool,
        threads: int | None,
    ) -> np.ndarray | None:
        """See ``Batch``."""
        pack = self._pack
        if limits is not None or pack is None or len(self._small) < len(self._members):
            return None
        given, their_grads = params.tolist(), grads.tolist()
        # Gradients may be of any strides and may overlap with anything, for they are copied.
        if not (
            set(map(type, given)) == set(map(type, their_grads)) == {np.ndarray}
            and list(map(SHAPE, given)) == list(map(SHAPE, their_grads)) == self._shapes
            and all(map(WRITEABLE, given))
            and _own_their_memory(given)
            and self._are_different(params)
        ):
            return None
        try:
            pack.take(given, their_grads)
        except TypeError:
            return None  # another dtype
        with np.errstate(all="ignore"):
            self.prepare(self._everything, steps, now)
            if len(self._jobs) > 1:
                return None
            (_, tape, scalars), *_ = self._jobs
            tape.run(pack.param, pack.grad, pack.kept, pack.spread(scalars))
        pack.give(given)
        return np.zeros(len(given), bool)

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

    def is_apart(self) -> bool:
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

    def prepare(self, index: np.ndarray, steps: np.ndarray, now: Sequence[Now]) -> None:
        """See ``Batch``."""
        if not index.size:
            self._jobs = []
            return
        rules, which = replaced(self._rules, self._which, now)
        which, counts = which[index], steps[index] + 1
        rule = rules[which[0]]
        if (which == which[0]).all() and (counts == counts[0]).all():
            scalars = rule.coefficients(int(counts[0]), self._dtype.name)
            self._jobs = [(index, self._tape(rule, scalars), list(scalars))]
            return
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
        self._jobs = []
        for pattern in range(kinds.max() + 1):
            mine = np.flatnonzero(kinds == pattern) if patterns else slice(None)
            values = [_same(x[mine] if x.ndim else x, self._dtype) for x in columns]
            tape = self._tape(rule, scalars._make(values))
            self._jobs.append((index[mine], tape, values))

    def _scalars_of(self, rules: list[Rule], counts: np.ndarray, h: Any) -> Any:
        """The coefficients of each of some rules at its step, as a named tuple of arrays."""
        if self._vectorized:
            try:
                return type(rules[0]).scalars(h, counts)
            except (TypeError, ValueError):
                self._vectorized = False  # somebody's scalars that take no arrays
        pairs = zip(rules, counts.tolist(), strict=True)
        each = [rule.coefficients(count) for rule, count in pairs]
        return each[0]._make(map(np.array, zip(*each, strict=True)))

    def _tape(self, rule: Rule, scalars: Any) -> Tape:
        switches = tuple(x for x in scalars if isinstance(x, bool))
        if switches not in self._tapes:
            self._tapes[switches] = Tape(rule.update, scalars, len(rule.slots), self._dtype.name)
        return self._tapes[switches]

    def run(
        self,
        index: np.ndarray,
        steps: np.ndarray,
        scaling: Scaling | None,
        leave_clipped: bool,
        threads: int | None,
    ) -> np.ndarray:
        """See ``Batch``."""
        clipped = self._run(scaling, leave_clipped)
        # Nobody's arrays are held from one step to the next.
        self._params, self._grads, self._slots = [], [], list(self._homes)
        return clipped

    def _run(self, scaling: Scaling | None, leave_clipped: bool) -> np.ndarray:
        clipped = np.zeros(len(self._members), bool)
        for where, tape, scalars in self._jobs:
            small = self._sizes[where] < LARGE
            if small.any():
                values = [_at(x, small) for x in scalars]
                clipped[where[small]] = self._run_packed(
                    where[small], tape, values, scaling, leave_clipped
                )
            for k in np.flatnonzero(~small).tolist():
                values = [x if np.ndim(x) == 0 else float(x[k]) for x in scalars]
                clipped[where[k]] = self._run_alone(
                    int(where[k]), tape, values, scaling, leave_clipped
                )
        return clipped

    def _run_packed(
        self,
        where: np.ndarray,
        tape: Tape,
        scalars: list[Any],
        scaling: Scaling | None,
        leave_clipped: bool,
    ) -> np.ndarray:
        """Update small parameters side by side; say which gradients were clipped."""
        positions = where.tolist()
        params, grads = ([arrays[i] for i in positions] for arrays in (self._params, self._grads))
        pack = _Pack(where, self._shapes, self._slots, self._dtype)
        pack.take(params, grads)
        grad, clipped = pack.grad, np.zeros(len(where), bool)
        if scaling is not None:
            mine = scaling.at(where)
            grad, beyond = _clipped(grad, *pack.spread([x.astype(self._dtype) for x in mine]))
            limited = [part.any() for part in pack.parts(beyond)]
            clipped = mine.scales() | np.array(limited, bool)
            if leave_clipped:
                _copy(pack.parts(grad), grads)
        tape.run(pack.param, grad, pack.kept, pack.spread(scalars))
        pack.give(params)
        for parts, slots in zip(pack.slots, (self._slots[i] for i in positions), strict=True):
            _copy(parts, slots)
        return clipped

    def _run_alone(
        self,
        position: int,
        tape: Tape,
        scalars: list[Any],
        scaling: Scaling | None,
        leave_clipped: bool,
    ) -> bool:
        """Update one parameter; say whether its gradient was clipped."""
        param, grad, *slots = (
            x.reshape(-1)
            for x in (self._params[position], self._grads[position], *self._slots[position])
        )
        if scaling is None:
            tape.run(param, grad, slots, scalars)
            return False
        numbers = [self._dtype.type(x[position]) for x in scaling]
        is_clipped = bool(numbers[0] != 1 or numbers[1] != 1)
        if not is_clipped and numbers[2] == inf:
            tape.run(param, grad, slots, scalars)
            return False
        for low in range(0, len(param), CHUNK):
            block = slice(low, low + CHUNK)
            clipped, beyond = _clipped(grad[block], *numbers)
            is_clipped = is_clipped or bool(beyond.any())
            tape.run(param[block], clipped, [slot[block] for slot in slots], scalars)
            if leave_clipped:
                grad[block] = clipped
        return is_clipped


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
