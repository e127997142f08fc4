"""What computes: a group is all parameters that one engine updates, a table with a row for each.

A group lives as long as its parameters do. Its columns are the one home of what is known of them:
clocks, the numbers of the rule, bounds of clips, slots. A step names some rows, in any order, and
makes five calls, whatever the rows are:

    look      where their arrays are now, and which are not what the engine takes as they are
    lend      for each of those: what it is to take instead
    measure   whether gradients are finite, and their sums of squares (``finite``, ``squares``)
    prepare   everything that may fail
    run       clip and update; nothing fails any more

>>> import numpy as np
>>> from multiopt.backend import named
>>> from multiopt.layout import Layout
>>> from multiopt.rules import SGD
>>> group = named("numpy").group(SGD(lr=0.5, momentum=0.9), Layout("numpy", (), "float32", "cpu"))
>>> rows = group.add([(3,), (2, 2)])
>>> group.set_rules(rows, SGD(lr=0.5, momentum=0.9))
>>> [group.rule_at(row).lr for row in rows]
[0.5, 0.5]
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf, nan
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from multiopt.arrays import Array, Arrays, Member, Part
from multiopt.averaging import Averaged
from multiopt.kinds import Numbered, Schedules, kind_of, number_fields, numbers_of, schedules_of
from multiopt.layout import Layout
from multiopt.rules.arithmetic import clip_coefficient, norms
from multiopt.rules.rule import Rule, with_numbers

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.step.clip import Clip

__all__ = ["MASTER", "Group", "Slots"]

#: The name of the slot that is no rule's: what a 16-bit parameter is rounded from, in float32.
MASTER = "master_param"

#: For each of several parameters its slots, in their order; None for one of zeros.
Slots: TypeAlias = Sequence[Sequence[Array | None]]


class Group(ABC):
    """Parameters that one engine updates, with the columns that all engines have.

    Args:
        backend: That of their library.
        layout: What their layouts have in common; the shape counts for nothing.
        rule: A rule of their kind: the numbers among the hyperparameters count for nothing.
        has_masters: Whether each has a master copy.

    Attributes:
        columns: The hyperparameters that are numbers, with the place in those that are tuples.
        kind: What rules have in common that may share it.
        steps: By row, how many steps were taken: the clock.
        numbers: By row, the hyperparameters that are numbers, in the order of ``columns``; for a
            schedule what it gave last.
        shapes: By row, the shape, parts of complex ones included.
    """

    #: Whether ``look`` itself fills the spans of all arrays that it takes as they are.
    fills_spans: ClassVar = False

    #: What a new row has in each column.
    FRESH: ClassVar = {
        "steps": (np.int64, 0),
        "schedule": (np.int32, 0),
        "clip": (np.int32, 0),
        "norm_bound": (np.float64, nan),
        "eps": (np.float64, 0.0),
        "own": (np.float64, 1.0),
        "shared": (np.float64, 1.0),
        "bound": (np.float64, inf),
        "norm": (np.float64, -1.0),
    }

    steps: np.ndarray
    schedule: np.ndarray
    clip: np.ndarray
    norm_bound: np.ndarray
    eps: np.ndarray
    own: np.ndarray
    shared: np.ndarray
    bound: np.ndarray
    norm: np.ndarray
    numbers: np.ndarray

    def __init__(
        self, backend: "Backend", layout: Layout, rule: Rule, has_masters: bool = False
    ) -> None:
        """Have no row yet."""
        self.backend, self.layout, self.rule = backend, layout.with_shape(()), rule
        self.has_masters = has_masters
        self.dtype = np.dtype(layout.compute_dtype)
        self.columns, self.kind = number_fields(rule), kind_of(rule)
        #: The columns of hyperparameters that are one number.
        self.column_of = {
            name.removeprefix("rule."): column
            for column, (name, place) in enumerate(self.columns)
            if place is None
        }
        #: Whether there are averages; then the last column says since when.
        self.has_averages = isinstance(rule, Averaged)
        self.shapes: list[tuple[int, ...]] = []
        #: Different sets of schedules, by the number that rows have for them; 0 for none.
        self.schedules = Numbered(((),), Schedules((), (), ()))
        #: What the owner of the group knows it by.
        self.number = 0
        #: How many rows have schedules; how many have clips; how many a bound of their own norm.
        self.scheduled = self.clipping = self.bounded = 0
        #: How many rows have no elements.
        self.empty = 0
        self._free: list[int] = []
        self._grow(16)

    # Rows

    def _grow(self, capacity: int) -> None:
        """Move the columns to longer ones. Nobody may hold their addresses from step to step."""
        for name, (dtype, value) in self.FRESH.items():
            column = np.full(capacity, value, dtype)
            if self.shapes:
                column[: len(self.shapes)] = getattr(self, name)[: len(self.shapes)]
            setattr(self, name, column)
        numbers = self._new_numbers(capacity)
        if self.shapes:
            numbers[: len(self.shapes)] = self.numbers[: len(self.shapes)]
        self.numbers = numbers

    def _new_numbers(self, capacity: int) -> np.ndarray:
        """A column of numbers."""
        return np.zeros((capacity, len(self.columns)))

    def rows(self) -> np.ndarray:
        """The rows that are taken."""
        rows = np.arange(len(self.shapes))
        return np.setdiff1d(rows, self._free) if self._free else rows

    def all_or(self, rows: np.ndarray) -> np.ndarray | slice:
        """Different rows as an index of columns: a slice, which takes half the time, for all."""
        return slice(len(rows)) if len(rows) == len(self.shapes) else rows

    def add(self, shapes: Sequence[tuple[int, ...]], slots: Slots | None = None) -> np.ndarray:
        """Rows for new parameters, with a clock of zero.

        Args:
            shapes: Their shapes, parts of complex ones included.
            slots: What to begin with, to take possession of: arrays of the library; or of NumPy,
                whose shape and dtype are changed. None for zeros.

        Raises:
            ValueError: The rule is not for parameters of a shape.
            MemoryError: There is no room.
        """
        count = len(shapes)
        taken = self._free[len(self._free) - min(count, len(self._free)) :]
        first, end = len(self.shapes), len(self.shapes) + count - len(taken)
        if end > len(self.steps):
            self._grow(max(end, 2 * len(self.steps)))
        rows = np.array([*taken, *range(first, end)], np.int64)
        for name, (_, value) in self.FRESH.items():
            getattr(self, name)[rows] = value
        self._make_slots(rows, shapes, slots)
        # From here on nothing fails.
        del self._free[len(self._free) - len(taken) :]
        self.empty += sum(0 in shape for shape in shapes)
        for row, shape in zip(taken, shapes, strict=False):
            self.shapes[row] = shape
        self.shapes.extend(shapes[len(taken) :])
        return rows

    def remove(self, row: int) -> None:
        """Let go of a row. Others may take its place."""
        self.scheduled -= self.schedule[row] != 0
        self.clipping -= self.clip[row] != 0
        self.bounded -= self.norm_bound[row] == self.norm_bound[row]
        self.empty -= 0 in self.shapes[row]
        self.schedule[row], self.clip[row], self.norm_bound[row] = 0, 0, nan
        self._drop_slots(row)
        self._free.append(row)

    def __len__(self) -> int:
        """The number of rows in use."""
        return len(self.shapes) - len(self._free)

    def layout_at(self, row: int) -> Layout:
        """The layout of a parameter."""
        return self.layout.with_shape(self.shapes[row])

    # Slots

    @abstractmethod
    def _make_slots(
        self,
        rows: np.ndarray,
        shapes: Sequence[tuple[int, ...]],
        slots: Slots | None,
    ) -> None:
        """Give new rows slots; see ``add``."""

    @abstractmethod
    def _drop_slots(self, row: int) -> None:
        """Let go of the slots of a row; nothing of it fails."""

    @abstractmethod
    def slots_at(self, row: int) -> dict[str, Array]:
        """The slots of a row by name, master copy included, as the engine has them."""

    @abstractmethod
    def slots_on_host(self, rows: np.ndarray, number: int) -> Iterator[np.ndarray]:
        """A slot of some rows of one size, by its number, over their memory where that is possible.

        Yields:
            Arrays of two axes, with the slots of one or more rows, in their order.
        """

    def slot_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The names of the slots of a parameter of this shape, in their order."""
        own = tuple(self.rule.slot_shapes(shape))
        return (*own, MASTER) if self.has_masters else own

    # Numbers

    def set_rules(self, rows: np.ndarray, rule: Rule) -> None:
        """Give rows the numbers and the schedules of a rule of the kind of this group."""
        values, schedules = numbers_of(rule, self.columns), schedules_of(rule, self.columns)
        self.numbers[rows] = values
        self.set_schedules(rows, schedules)

    def takes(self, rule: Rule) -> bool:
        """Whether a rule is of the kind of this group."""
        kind = kind_of(rule)
        return kind is not None and kind == self.kind

    def change_numbers(self, rows: np.ndarray, rule: Rule, names: Iterable[str]) -> None:
        """Give rows, which are alike, some hyperparameters of a rule of the kind of this group.

        Args:
            rows: The rows.
            rule: The rule.
            names: The hyperparameters, those of a chained rule as they are called there.
        """
        values, names = numbers_of(rule, self.columns), set(names)
        for column, (name, _) in enumerate(self.columns):
            if name.removeprefix("rule.") in names:
                self.numbers[rows, column] = values[column]
        schedules = schedules_of(rule, self.columns)
        if schedules.columns or self.scheduled:
            self.set_schedules(rows, schedules)

    def write_numbers(self, rows: np.ndarray, values: Mapping[str, float]) -> None:
        """Give rows without schedules some numbers, by the names that ``plain_numbers`` has."""
        for name, value in values.items():
            self.numbers[self.all_or(rows), self.column_of[name]] = value

    def set_schedules(self, rows: np.ndarray, schedules: Schedules) -> None:
        """Give rows some schedules in the place of those that they have."""
        key = schedules.columns, *map(id, schedules.schedules)
        number = self.schedules.number(key, schedules, lambda: self.schedule)
        self.scheduled += (len(rows) if number else 0) - int(np.count_nonzero(self.schedule[rows]))
        self.schedule[rows] = number

    def rule_now(self, row: int) -> Rule:
        """The rule of a row with the numbers of this step in the places of schedules."""
        return with_numbers(self.rule, self.columns, self.numbers[row].tolist())

    def rule_at(self, row: int) -> Rule:
        """The rule of a row, its schedules in their places."""
        values: list[Any] = self.numbers[row].tolist()
        schedules = self.schedules[self.schedule[row]]
        for column, schedule in zip(schedules.columns, schedules.schedules, strict=True):
            values[column] = schedule
        return with_numbers(self.rule, self.columns, values)

    def counts(self, rows: np.ndarray | slice) -> np.ndarray:
        """How many steps the averages of rows have seen; their clocks where there are none."""
        steps: np.ndarray = self.steps[rows]
        return steps - self.numbers[rows, -1].astype(np.int64) if self.has_averages else steps

    def set_clocks(
        self, rows: np.ndarray, steps: Sequence[int], counts: Sequence[int] | None = None
    ) -> None:
        """Say how many steps new rows have taken, and how many of them their averages have seen."""
        self.steps[rows] = steps
        if self.has_averages:
            seen = np.zeros(len(rows)) if counts is None else np.array(counts)
            self.numbers[rows, -1] = self.steps[rows] - seen

    def set_clock(self, row: int, step: int) -> None:
        """Say how many steps a row has taken. Its average has seen as many as before."""
        if self.has_averages:
            self.numbers[row, -1] += step - self.steps[row]
        self.steps[row] = step

    def copy_columns(self, rows: np.ndarray, others: np.ndarray) -> None:
        """Give new rows what is set for other rows: numbers, schedules, clips."""
        for column in (
            self.schedule,
            self.clip,
            self.norm_bound,
            self.eps,
            self.bound,
            self.numbers,
        ):
            column[rows] = column[others]
        self.scheduled += int(np.count_nonzero(self.schedule[rows]))
        self.clipping += int(np.count_nonzero(self.clip[rows]))
        self.bounded += int(np.count_nonzero(~np.isnan(self.norm_bound[rows])))

    def set_clips(self, rows: np.ndarray, clip: "Clip | None", number: int) -> None:
        """Bound the gradients of rows.

        Args:
            rows: The rows.
            clip: The clip; None for none.
            number: What the owner of the group knows it by, 0 for none.
        """
        self.clipping += (len(rows) if number else 0) - int(np.count_nonzero(self.clip[rows]))
        self.bounded -= len(rows) - int(np.count_nonzero(np.isnan(self.norm_bound[rows])))
        self.bounded += len(rows) if clip is not None and clip.norm is not None else 0
        self.clip[rows] = number
        self.own[rows] = self.shared[rows] = 1.0
        norm, value, eps = (None, None, 0.0) if clip is None else (clip.norm, clip.value, clip.eps)
        self.norm_bound[rows], self.norm[rows] = nan if norm is None else norm, -1.0
        self.eps[rows] = eps
        self.bound[rows] = self.dtype.type(inf if value is None else value)

    # A step

    @abstractmethod
    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """Find the arrays of a part as they are now; nothing is changed yet.

        It leaves those without a gradient out of the part, and says in ``part.odd`` which are not
        what the engine takes as they are. For the others it fills ``arrays.spans``.

        Args:
            part: The part.
            arrays: The arrays of the step.
            last: Whether all other spans are filled, so that ``arrays.overlap`` may be told.
        """

    def locate(self, part: Part, arrays: Arrays) -> None:  # noqa: B027 -- most have nothing to do
        """Fill the spans of what was not lent, where ``look`` has not; for ``part.owned``."""

    def overlap(self, arrays: Arrays) -> int:
        """Whether memory that a step writes overlaps with any other.

        Args:
            arrays: Those of the step, their spans filled by the groups of all its parts.
        """
        return arrays.find_overlap()

    @abstractmethod
    def lend(self, part: Part, position: int, member: Member, copy: bool, arrays: Arrays) -> None:
        """Take a parameter that Python has looked at, this step only.

        Args:
            part: The part.
            position: Its position in ``part.rows``.
            member: The parameter.
            copy: Whether the gradient's own memory may not be read, since something writes there.
            arrays: The arrays of the step, to fill in the spans of what is used as it is.
        """

    @abstractmethod
    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """For each row of a part whether its gradient has no infinity and no NaN."""

    @abstractmethod
    def squares(
        self, part: Part, which: np.ndarray | slice, factor: float, threads: int | None
    ) -> np.ndarray:
        """Sums of squares of gradients, in memory that the next call may write.

        Args:
            part: The part.
            which: Positions in ``part.rows``; a slice for all.
            factor: What gradients are multiplied by, in float64; first they are by ``own``, in the
                compute dtype.
            threads: The largest number of threads, or None.
        """

    @np.errstate(all="ignore")
    def clip_by_norm(self, part: Part, threads: int | None) -> None:
        """Measure the gradients that have a bound of their norm: fill ``norm`` and ``own``."""
        which = np.flatnonzero(~np.isnan(self.norm_bound[part.rows]))
        rows = part.rows[which]
        self.own[rows] = 1.0

        def squares(some: np.ndarray, factor: float) -> np.ndarray:
            return self.squares(part, which[some], factor, threads)

        self.norm[rows] = norms(len(rows), squares)
        found = clip_coefficient(np, self.norm_bound[rows], self.norm[rows], self.eps[rows])
        self.own[rows] = found.astype(self.dtype)
        part.norms = self.norm[part.rows]

    @abstractmethod
    def prepare(
        self, part: Part, arrays: Arrays, leave_clipped: bool, threads: int | None
    ) -> dict[int, Array]:
        """Make all that may fail of a step, the memory that it needs included.

        Args:
            part: The part.
            arrays: The arrays of the step.
            leave_clipped: Whether to write clipped gradients over the gradients.
            threads: The largest number of threads, or None.

        Returns:
            By place, the arrays that take the place of parameters that cannot be written.
        """

    @abstractmethod
    def run(self, part: Part) -> None:
        """Clip and update what was prepared, and count the step. Nothing fails any more."""

    def left_over(self, part: Part) -> Iterable[tuple[Member, Array]]:
        """The clipped gradients of a step that could not be left in their own place."""
        return ()

    @abstractmethod
    def forget(self, part: Part) -> None:
        """Hold nothing of a step any more, whether it ended or not."""
