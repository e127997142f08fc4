"""Batches without Numba: large parameters in cache-sized blocks, small ones packed together."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from math import inf, prod
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import numpy as np

from multiopt.backend import Batch, Member, Scaling
from multiopt.rules import Rule
from multiopt.rules.arithmetic import BLOCK, block_sums, clamp, tree_sum
from multiopt_numpy.tape import Tape

__all__ = ["BlockedBatch"]

#: Elements of a parameter from which on it runs by itself. Copying less into a pack costs less
#: than the calls that it spares.
LARGE = 4096

#: Elements in a block of a clipped gradient: whole blocks of the summation tree.
CHUNK = 8 * BLOCK

put = np.ndarray.__setitem__


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
        self._params: list[Any] = []
        self._grads: list[Any] = []
        self._slots: list[Any] = []
        self._tapes: dict[tuple[bool, ...], Tape] = {}
        self._owned = False
        self._jobs: list[tuple[np.ndarray, Tape, list[Any]]] = []

    # Looking

    def look(self, params: np.ndarray, grads: np.ndarray, leaves: bool) -> np.ndarray:
        """See ``Batch``."""
        self._params, self._grads = params.tolist(), grads.tolist()
        self._slots = [member.slots for member in self._members]
        self._owned = False
        if not self._itself:
            return self._everything
        if self._are_regular(self._params, "carray") and self._are_regular(
            self._grads, "c_contiguous"
        ):
            arrays = self._params + self._grads
            # An array without a base has memory of its own.
            owners = set(map(type, map(attrgetter("base"), arrays))) == {type(None)}
            self._owned = owners and len(set(map(id, arrays))) == len(arrays)
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

    def lend(
        self, position: int, param: np.ndarray, grad: np.ndarray, slots: tuple[np.ndarray, ...]
    ) -> None:
        """See ``Batch``."""
        self._params[position], self._grads[position] = param, grad
        self._slots[position] = slots

    def slots_of(self, position: int) -> tuple[np.ndarray, ...] | None:
        """See ``Batch``."""
        return self._members[position].slots

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

    def prepare(self, index: np.ndarray, steps: np.ndarray, now: Mapping[int, Rule]) -> None:
        """See ``Batch``."""
        if not index.size:
            self._jobs = []
            return
        rules = [now.get(i, self._members[i].rule) for i in index.tolist()]
        counts = steps[index] + 1
        if len(set(map(id, rules))) == 1 and (counts == counts[0]).all():
            scalars = rules[0].coefficients(int(counts[0]), self._dtype.name)
            self._jobs = [(index, self._tape(rules[0], scalars), list(scalars))]
            return
        # The same functions on arrays: one call for all names.
        h = SimpleNamespace(
            **{name: _column([getattr(rule, name) for rule in rules]) for name in rules[0].ranges},
            **{name: getattr(rules[0], name) for name in rules[0].switches},
        )
        scalars = type(rules[0]).scalars(h, counts)
        columns = [np.broadcast_to(np.asarray(x), counts.shape) for x in scalars]
        switches = [k for k, column in enumerate(columns) if column.dtype == bool]
        kinds, which = np.unique(
            np.array([columns[k] for k in switches]).reshape(len(switches), -1),
            axis=1,
            return_inverse=True,
        )
        self._jobs = []
        for kind in range(kinds.shape[1]):
            mine = np.flatnonzero(which.reshape(-1) == kind)
            values = [
                bool(column[mine[0]]) if column.dtype == bool else _same(column[mine], self._dtype)
                for column in columns
            ]
            tape = self._tape(rules[0], scalars._make(values))
            self._jobs.append((index[mine], tape, values))

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
        limited = np.zeros(len(self._members), bool)
        for where, tape, scalars in self._jobs:
            small = self._sizes[where] < LARGE
            if small.any():
                values = [_at(x, small) for x in scalars]
                limited[where[small]] = self._run_packed(
                    where[small], tape, values, scaling, leave_clipped
                )
            for k in np.flatnonzero(~small).tolist():
                values = [x if np.ndim(x) == 0 else float(x[k]) for x in scalars]
                limited[where[k]] = self._run_alone(
                    int(where[k]), tape, values, scaling, leave_clipped
                )
        return limited

    def _run_packed(
        self,
        where: np.ndarray,
        tape: Tape,
        scalars: list[Any],
        scaling: Scaling | None,
        leave_clipped: bool,
    ) -> np.ndarray | bool:
        """Update small parameters side by side; say which gradients the bound changed."""
        positions = where.tolist()
        sizes = self._sizes[where]
        slots = [
            [self._slots[i][j] for i in positions] for j in range(len(self._slots[positions[0]]))
        ]
        params, grads = [self._params[i] for i in positions], [self._grads[i] for i in positions]
        packs = [np.concatenate(arrays, axis=None) for arrays in (params, grads, *slots)]
        param, grad, *kept = packs
        ends = np.cumsum(sizes)
        places = list(map(slice, (ends - sizes).tolist(), ends.tolist()))
        limited: np.ndarray | bool = False
        if scaling is not None:
            own, shared, bound = (np.repeat(x[where].astype(self._dtype), sizes) for x in scaling)
            grad, beyond = _clipped(grad, own, shared, bound)
            found = np.concatenate([[0], np.cumsum(beyond)])
            limited = found[ends] > found[ends - sizes]
            if leave_clipped:
                _spread(grad, places, grads)
        spread = [np.repeat(x, sizes) if np.ndim(x) else x for x in scalars]
        tape.run(param, grad, kept, spread)
        _spread(param, places, params)
        for pack, arrays in zip(kept, slots, strict=True):
            _spread(pack, places, arrays)
        return limited

    def _run_alone(
        self,
        position: int,
        tape: Tape,
        scalars: list[Any],
        scaling: Scaling | None,
        leave_clipped: bool,
    ) -> bool:
        """Update one parameter; say whether the bound changed its gradient."""
        param, grad, *slots = (
            x.reshape(-1)
            for x in (self._params[position], self._grads[position], *self._slots[position])
        )
        if scaling is None:
            tape.run(param, grad, slots, scalars)
            return False
        numbers = [self._dtype.type(x[position]) for x in scaling]
        if numbers[0] == 1 and numbers[1] == 1 and numbers[2] == inf:
            tape.run(param, grad, slots, scalars)
            return False
        limited = False
        for low in range(0, len(param), CHUNK):
            block = slice(low, low + CHUNK)
            clipped, beyond = _clipped(grad[block], *numbers)
            limited = limited or bool(beyond.any())
            tape.run(param[block], clipped, [slot[block] for slot in slots], scalars)
            if leave_clipped:
                grad[block] = clipped
        return limited


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


def _spread(pack: np.ndarray, places: list[slice], arrays: list[np.ndarray]) -> None:
    """Copy the parts of a pack into arrays."""
    parts = [pack[place].reshape(array.shape) for place, array in zip(places, arrays, strict=True)]
    deque(map(put, arrays, repeat(...), parts), 0)


def _column(values: list[Any]) -> Any:
    """The values of a hyperparameter as an array, or as a tuple of arrays if it is a tuple."""
    if isinstance(values[0], tuple):
        return tuple(_column(list(place)) for place in zip(*values, strict=True))
    return np.array(values)


def _same(column: np.ndarray, dtype: np.dtype) -> Any:
    """A column rounded to a dtype; one float if all of it is the same."""
    rounded = column.astype(dtype)
    return float(rounded[0]) if (rounded == rounded[0]).all() else rounded


def _at(value: Any, which: np.ndarray) -> Any:
    return value[which] if np.ndim(value) else value
