"""Groups that need no compiler: large parameters are updated in blocks, small ones in packs.

A step is divided into runs of tapes: one run for each large parameter, in place, and one for all
small parameters whose switches are equal, in copies. ``_prepare`` allocates all memory and copies
the small parameters and gradients, so that ``_run`` cannot fail.

Of these three parameters, the small ones share a run:

>>> from unittest.mock import patch
>>> from multiopt import backend, layout, rules
>>> rule, doubles = rules.SGD(lr=0.5), layout.Layout("numpy", (), "float64", "cpu")
>>> with patch.dict("os.environ", MULTIOPT_ENGINE="blocks"):
...     group = backend.backend_named("numpy").group(rule, doubles)
>>> rows = group.add([(2,), (5000,), (3,)])
>>> group.set_rules(rows, rule)
>>> params = [np.zeros(2), np.zeros(5000), np.zeros(3)]
>>> part = Part(group, rows, rows, (0, 0), params=params, grads=[x + 1 for x in params])
>>> group._prepare(part, leave_clipped=False, threads=None)
>>> [run.param.size for run in group._runs]
[5, 5000]
"""

from collections.abc import Iterable
from itertools import repeat
from math import inf
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import numpy as np

from multiopt.arrays import Arrays, Part
from multiopt.kinds import other_fields
from multiopt.rules.arithmetic import rounded
from multiopt.rules.rule import named, namespace, rounded_numbers
from multiopt.rules.sums import few_norms
from multiopt_kernels.blocks.runs import ClippedRun, Places, Run, clip, joined
from multiopt_kernels.blocks.tape import Tape, Tapes
from multiopt_kernels.chunks import LARGE
from multiopt_kernels.host import CHUNK, HostGroup

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["BlockedGroup"]

NO_ROWS = np.empty(0, np.int64)

SHAPE, DTYPE, BASE = attrgetter("shape"), attrgetter("dtype"), attrgetter("base")
WRITEABLE, CONTIGUOUS = attrgetter("flags.carray"), attrgetter("flags.c_contiguous")


class BlockedGroup(HostGroup):
    """Parameters that are updated by the tapes of one kind of rule, on one thread.

    Args:
        backend: The backend of the parameters.
        layout: Their layout; its shape does not matter.
        rule: A rule of their kind.
        has_masters: Whether they have master copies.
        tapes: The tapes.
        vectorized: Whether ``Rule.scalars`` also takes arrays of numbers and steps.
        itself: Whether the parameters are NumPy arrays that can be used as they are.
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
        """Create a group without rows."""
        super().__init__(backend, layout, rule, has_masters)
        self._tapes, self._vectorized, self._itself = tapes, vectorized, itself
        # The scratch memory of the last run of small parameters, whose pages are mapped already.
        self._room: tuple[Tape | None, int, list[np.ndarray]] = (None, 0, [])
        self._runs: list[Run] = []
        # From the last step: its rows with their shapes, and the places of its small rows.
        self._known: tuple[np.ndarray, list[tuple[int, ...]]] = NO_ROWS, []
        self._places: Places | None = None
        # A rule with the numbers that all rows had in the last step, which are its key.
        self._now: tuple[bytes, Rule] = b"", rule

    def _drop_slots(self, row: int) -> None:
        # A row that is used again has another shape and another place.
        self._known = NO_ROWS, []
        self._places = None
        super()._drop_slots(row)

    # Looking

    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """Accept regular NumPy arrays, and have Python examine the others."""
        super().look(part, arrays, last)
        if not self._itself:
            return
        params, grads = part.params, part.grads
        known, shapes = self._known
        if known is not part.rows:
            shapes = [self.shapes[row] for row in part.rows.tolist()]
            self._known = part.rows, shapes
        if self._are_regular(params, grads, shapes):
            part.owned = all(map(is_, map(BASE, (*params, *grads)), repeat(None)))
            part.odd = ()
        else:
            part.odd = [
                k
                for k, (param, grad, shape) in enumerate(zip(params, grads, shapes, strict=True))
                if not self._are_regular([param], [grad], [shape])
            ]

    def _are_regular(
        self, params: list[Any], grads: list[Any], shapes: list[tuple[int, ...]]
    ) -> bool:
        """Whether all arrays can be used as they are, by type, shape, dtype and flags."""
        return (
            set(map(type, params)) | set(map(type, grads)) <= {np.ndarray}
            and list(map(SHAPE, params)) == shapes == list(map(SHAPE, grads))
            and {*map(id, map(DTYPE, params)), *map(id, map(DTYPE, grads))} <= {id(self.dtype)}
            and all(map(WRITEABLE, params))
            and all(map(CONTIGUOUS, grads))
        )

    def locate(self, part: Part, arrays: Arrays) -> None:
        """Fill the spans of the arrays that are used as they are."""
        starts, ends = arrays.spans
        odd, count = set(part.odd), len(arrays.params)
        for k, place in enumerate(part.places.tolist()):
            if k not in odd:
                size = int(self.size[part.rows[k]]) * self.dtype.itemsize
                for where, array in ((place, part.params[k]), (count + place, part.grads[k])):
                    starts[where] = low = array.ctypes.data
                    ends[where] = low + size

    # Measuring

    def norms(self, part: Part, which: np.ndarray, threads: int | None) -> list[float]:
        """The norms of small gradients, all at once if that is possible."""
        found = None
        if not self.large and len(which):
            grads = [part.grads[k] for k in which.tolist()]
            found = few_norms(grads, self.layout.compute_dtype)
        return super().norms(part, which, threads) if found is None else found

    # Updating

    @np.errstate(all="ignore")
    def _prepare(self, part: Part, leave_clipped: bool, threads: int | None) -> None:
        rows = part.rows
        if self.clipping:
            part.clipped = np.zeros(len(rows), bool)
        self._runs = []
        for which, tape, scalars in self._scalars_now(rows):
            if not self.large:
                self._runs.append(self._packed(part, which, tape, scalars, leave_clipped))
                continue
            sizes = self.size[rows[which]]
            small = sizes < LARGE
            if small.any():
                values = [x[small] if isinstance(x, np.ndarray) else x for x in scalars]
                self._runs.append(self._packed(part, which[small], tape, values, leave_clipped))
            room = tape.room(int(sizes.max()))
            for k in np.flatnonzero(~small).tolist():
                values = [float(x[k]) if isinstance(x, np.ndarray) else x for x in scalars]
                run = self._alone(part, int(which[k]), tape, values, room, leave_clipped)
                self._runs.append(run)

    def _scalars_now(self, rows: np.ndarray) -> list[tuple[np.ndarray, Tape, list[Any]]]:
        """Divide some rows by their tape.

        Returns:
            Triples of positions, their tape, and their coefficients at this step: each a number for
            all these rows, or an array.
        """
        if not rows.size:
            return []
        everything, mine = np.arange(len(rows)), self.all_or(rows)
        numbers, steps = self.numbers[mine], self.steps[mine]
        if self.are_equal(steps) and self.are_equal(numbers):
            key = numbers[:1].tobytes()
            if key != self._now[0]:
                self._now = key, self.rule_now(int(rows[0]))
            # ``Rule.coefficients`` would look for schedules, and give names to the numbers.
            found = named(self._now[1].scalars(self._now[1], steps.item(0) + 1))
            alike = rounded_numbers(found.values(), self.layout.compute_dtype)
            return [(everything, self._tape(alike), alike)]
        numbers, counts = self.numbers[rows], self.steps[rows] + 1
        # ``Rule.scalars`` is called once, on arrays with the numbers of all rows.
        scalars = self._scalars_of(rows, numbers, counts)
        columns = [np.asarray(x) for x in scalars]
        # Switches that differ by row. Each of their patterns has its own tape.
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
        """The coefficients of some rows at their steps, as arrays or numbers for all."""
        if self._vectorized:
            values = [c[0].item() if (c == c[0]).all() else c for c in numbers.T]
            h = namespace(self.columns, values, other_fields(self.rule))
            try:
                return list(named(self.rule.scalars(h, counts)).values())
            except (TypeError, ValueError):
                self._vectorized = False  # a user's ``scalars`` may not take arrays
        each = [
            list(self.rule_now(row).coefficients(count))
            for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
        ]
        return list(map(np.array, zip(*each, strict=True)))

    def _tape(self, scalars: Iterable[Any]) -> Tape:
        return self._tapes[tuple([x for x in scalars if type(x) is bool])]

    def _packed(
        self, part: Part, which: np.ndarray, tape: Tape, scalars: list[Any], leave_clipped: bool
    ) -> Run:
        """Prepare the run of small parameters, in copies side by side."""
        rows, params, grads = part.rows, part.params, part.grads
        if len(which) < len(rows):
            rows = rows[which]
            params, grads = ([x[k] for k in which.tolist()] for x in (params, grads))
        places = self._places
        if places is None or places.rows is not rows:
            places = self._places = Places(self, rows)
        params, grads = places.ordered(params), places.ordered(grads)
        grad = joined(grads, places.total, self.dtype)
        pack, parts = places.packed(params, self.dtype)
        pairs = [(parts, params)]
        if part.clipped is not None:
            columns = [x[rows] for x in (self.own, self.shared, self.bound)]
            numbers = [x.item(0) if self.are_equal(x) else x.astype(self.dtype) for x in columns]
            masks = np.empty((2, places.total), bool)
            is_bounded = clip(grad, places.spread(numbers), grad, masks)
            beyond = places.any(masks[0]) if is_bounded else False
            part.clipped[which] = (numbers[0] != 1) | (numbers[1] != 1) | beyond
            if leave_clipped:
                pairs.append((places.parts(grad), grads))
        segments, count = places.segments, len(self.rule.slots)
        if not self.backend.in_place:
            segments = places.lent(places.ordered(list(map(self._slots_in_use, rows.tolist()))))
        (arrays, where, _), *more = segments
        if more or not isinstance(where, slice):
            slots = [np.empty(places.total, self.dtype) for _ in range(count)]
        else:
            # Slots that lie side by side are updated in place.
            slots, segments = [array[where] for array in arrays[:count]], []
        if self._room[:2] != (tape, places.total):
            self._room = tape, places.total, tape.room(places.total)
        spread, room = places.spread(scalars), self._room[2]
        return Run(tape, pack, grad, slots, spread, room, segments, pairs)

    def _alone(
        self,
        part: Part,
        k: int,
        tape: Tape,
        scalars: list[Any],
        room: list[np.ndarray],
        leave_clipped: bool,
    ) -> Run:
        """Prepare the run of a large parameter, in place."""
        row = int(part.rows[k])
        arrays = part.params[k], part.grads[k], *self._slots_in_use(row)
        param, grad, *slots = (array.reshape(-1) for array in arrays)
        work = tape, param, grad, slots, scalars, room
        if part.clipped is None:
            return Run(*work)
        numbers = [self.dtype.type(x[row]) for x in (self.own, self.shared, self.bound)]
        part.clipped[k] = numbers[0] != 1 or numbers[1] != 1
        if not part.clipped[k] and numbers[2] == inf:
            return Run(*work)
        size, told = min(CHUNK, len(grad)), part.clipped[k : k + 1]
        block, masks = np.empty(size, self.dtype), np.empty((2, size), bool)
        return ClippedRun(
            *work, numbers=numbers, leave=leave_clipped, told=told, block=block, masks=masks
        )

    @np.errstate(all="ignore")
    def _run(self, part: Part) -> None:
        for run in self._runs:
            run.run()
        self.steps[part.rows] += self.backend.in_place

    def forget(self, part: Part) -> None:
        """Release the arrays, packs and loans of the step."""
        super().forget(part)
        self._runs = []


def _same(column: np.ndarray, dtype: np.dtype) -> Any:
    """Round a column to a dtype, to one number if all are equal; a switch becomes one bool."""
    if column.dtype == bool:
        return bool(column.flat[0])
    if not column.ndim:
        return rounded(column, dtype.name)
    numbers = column.astype(dtype)
    return float(numbers[0]) if (numbers == numbers[0]).all() else numbers
