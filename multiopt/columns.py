"""Columns: the clocks, hyperparameters, schedules and clips of the parameters of a group.

Each fact is an array with one entry per row, and it is stored nowhere else. So setting a learning
rate, or moving every clock forward, is one NumPy operation on a column, whichever rows it is for,
and nothing has to be rebuilt. A row that is freed is used again.

>>> import numpy as np
>>> from multiopt.columns import Columns
>>> from multiopt.rules import SGD
>>> columns = Columns(SGD(), np.dtype("float32"))
>>> rows = columns._begin(2)
>>> columns._keep(rows, [(3,), (2, 2)])
>>> columns.set_rules(rows, SGD(lr=0.5))
>>> columns.write_numbers(rows[:1], {"lr": 0.25})
>>> [columns.rule_at(row).lr for row in rows], columns.steps[rows].tolist()
([0.25, 0.5], [0, 0])
"""

from collections.abc import Iterable, Mapping, Sequence
from math import inf, nan
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from multiopt.kinds import Numbered, Schedules, kind_of, number_fields, numbers_of, schedules_of
from multiopt.rules.average import Averaged
from multiopt.rules.rule import Rule, with_numbers

if TYPE_CHECKING:
    from multiopt.step.clip import Clip

__all__ = ["Columns"]


class Columns:
    """A table of parameters whose rules are of one kind, with one row per parameter.

    Args:
        rule: A rule of that kind; the values of its numbers do not matter.
        dtype: The compute dtype.

    Attributes:
        columns: The numeric hyperparameters: for each column of ``numbers`` the name, and the index
            in it if the hyperparameter is a tuple.
        kind: What all rules in the table have in common (``kinds.kind_of``).
        steps: The clocks.
        numbers: The numeric hyperparameters, of shape (rows, columns); for a schedule, the number
            it gave last.
        shapes: The storage shapes.
    """

    #: The dtype of each column, and its value in a new row.
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

    def __init__(self, rule: Rule, dtype: np.dtype) -> None:
        """Create a table without rows."""
        self.rule, self.dtype = rule, dtype
        self.columns, self.kind = number_fields(rule), kind_of(rule)
        self._first = numbers_of(rule, self.columns)
        #: By hyperparameter its columns, and the index in it of each if it is a tuple.
        self.columns_of: dict[str, list[tuple[int, int | None]]] = {}
        for column, (name, place) in enumerate(self.columns):
            self.columns_of.setdefault(name.removeprefix("rule."), []).append((column, place))
        #: Whether averages are kept. The last column is then the clock before their first step.
        self.has_averages = isinstance(rule, Averaged)
        self.shapes: list[tuple[int, ...]] = []
        #: The sets of schedules, by their numbers in the column ``schedule``; 0 is for none.
        self.schedules = Numbered(((),), Schedules((), (), ()))
        #: How many rows have schedules, how many have clips, and how many bound their own norm.
        self.scheduled = self.clipping = self.bounded = 0
        #: How many parameters have no elements.
        self.empty = 0
        self._free: list[int] = []
        self._grow(16)

    # Rows

    def _grow(self, capacity: int) -> None:
        """Move the columns into longer arrays; addresses of the old ones become invalid."""
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
        """An array for ``numbers``; an engine may want it in memory of its own."""
        return np.zeros((capacity, len(self.columns)))

    def rows(self) -> np.ndarray:
        """The rows in use."""
        used = np.ones(len(self.shapes), bool)
        # A twentieth of the time of ``np.setdiff1d``, which sorts.
        used[self._free] = False
        return np.flatnonzero(used)

    def all_or(self, rows: np.ndarray) -> np.ndarray | slice:
        """Distinct rows as an index into columns; all rows become a slice, which is twice as fast.

        The result may be in another order than ``rows``.
        """
        return slice(len(rows)) if len(rows) == len(self.shapes) else rows

    @staticmethod
    def are_equal(column: np.ndarray) -> bool:
        """Whether all numbers have the same bits, in a tenth of the time of comparing elements."""
        return column.tobytes() == column[:1].tobytes() * len(column)

    def _begin(self, count: int) -> np.ndarray:
        """Reset ``count`` free rows for new parameters, without taking them yet."""
        taken = self._free[len(self._free) - min(count, len(self._free)) :]
        first, end = len(self.shapes), len(self.shapes) + count - len(taken)
        if end > len(self.steps):
            self._grow(max(end, 2 * len(self.steps)))
        rows = np.array([*taken, *range(first, end)], np.int64)
        for name, (_, value) in self.FRESH.items():
            getattr(self, name)[rows] = value
        return rows

    def _keep(self, rows: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> None:
        """Take the rows that ``_begin`` returned, for parameters of these shapes. Cannot fail."""
        taken = min(len(rows), len(self._free))
        del self._free[len(self._free) - taken :]
        self.empty += sum(0 in shape for shape in shapes)
        for row, shape in zip(rows[:taken].tolist(), shapes, strict=False):
            self.shapes[row] = shape
        self.shapes.extend(shapes[taken:])

    def _let_go(self, row: int) -> None:
        """Make a row free for others."""
        self.scheduled -= self.schedule[row] != 0
        self.clipping -= self.clip[row] != 0
        self.bounded -= self.norm_bound[row] == self.norm_bound[row]
        self.empty -= 0 in self.shapes[row]
        self.schedule[row], self.clip[row], self.norm_bound[row] = 0, 0, nan
        self._free.append(row)

    def __len__(self) -> int:
        """The number of rows in use."""
        return len(self.shapes) - len(self._free)

    # Numbers

    def set_rules(self, rows: np.ndarray, rule: Rule) -> None:
        """Set the numbers and schedules of rows to those of a rule of this kind."""
        values, schedules = numbers_of(rule, self.columns), schedules_of(rule, self.columns)
        self.numbers[rows] = values
        self.set_schedules(rows, schedules)

    def takes(self, rule: Rule) -> bool:
        """Whether a rule is of this kind."""
        kind = kind_of(rule)
        return kind is not None and kind == self.kind

    def change_numbers(self, rows: np.ndarray, rule: Rule, names: Iterable[str]) -> None:
        """Set some hyperparameters of rows whose rules are equal.

        Args:
            rows: The rows.
            rule: A rule of this kind that has the new values, and otherwise the old ones.
            names: The names of the hyperparameters; those of a chained rule without its prefix.
        """
        values = numbers_of(rule, self.columns)
        for name in self.columns_of.keys() & set(names):
            for column, _ in self.columns_of[name]:
                self.numbers[rows, column] = values[column]
        schedules = schedules_of(rule, self.columns)
        if schedules.columns or self.scheduled:
            self.set_schedules(rows, schedules)

    def write_numbers(
        self, rows: np.ndarray, values: Mapping[str, float | tuple[float, ...]]
    ) -> None:
        """Set hyperparameters of rows without schedules, by name."""
        index = self.all_or(rows)
        for name, value in values.items():
            for column, place in self.columns_of[name]:
                number = value if place is None else value[place]  # type: ignore[index]
                self.numbers[index, column] = number

    def set_schedules(self, rows: np.ndarray, schedules: Schedules) -> None:
        """Replace the schedules of rows."""
        key = schedules.columns, *map(id, schedules.schedules)
        number = self.schedules.number(key, schedules, lambda: self.schedule)
        self.scheduled += (len(rows) if number else 0) - int(np.count_nonzero(self.schedule[rows]))
        self.schedule[rows] = number

    def rule_now(self, row: int) -> Rule:
        """The rule of a row, with the numbers of this step in place of schedules."""
        values = self.numbers[row].tolist()
        # Usually few differ from those of the rule that the table began with.
        changed = [k for k, (a, b) in enumerate(zip(self._first, values, strict=True)) if a != b]
        fields = [self.columns[k] for k in changed]
        return with_numbers(self.rule, fields, [values[k] for k in changed])

    def rule_at(self, row: int) -> Rule:
        """The rule of a row, schedules included."""
        values: list[Any] = self.numbers[row].tolist()
        schedules = self.schedules[self.schedule[row]]
        for column, schedule in zip(schedules.columns, schedules.schedules, strict=True):
            values[column] = schedule
        return with_numbers(self.rule, self.columns, values)

    def settings(self, rows: np.ndarray) -> np.ndarray:
        """A copy of the numbers of rows, with zeros in place of what schedules gave last."""
        numbers: np.ndarray = self.numbers[rows]
        schedule = self.schedule[rows]
        for number in np.unique(schedule).tolist() if self.scheduled else ():
            numbers[np.ix_(schedule == number, list(self.schedules[number].columns))] = 0.0
        return numbers

    def by_rule(self, rows: np.ndarray) -> list[np.ndarray]:
        """The positions of rows, those with the same rule together, schedules included."""
        if not rows.size:
            return []
        table = np.column_stack([self.settings(rows), self.schedule[rows]])
        if (table == table[0]).all():
            return [np.arange(len(rows))]
        which = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
        return [np.flatnonzero(which == number) for number in range(which.max() + 1)]

    def counts(self, rows: np.ndarray | slice) -> np.ndarray:
        """How many steps the averages of rows have seen; the clocks if no averages are kept."""
        steps: np.ndarray = self.steps[rows]
        return steps - self.numbers[rows, -1].astype(np.int64) if self.has_averages else steps

    def set_clocks(
        self, rows: np.ndarray, steps: Sequence[int], counts: Sequence[int] | None = None
    ) -> None:
        """Set the clocks of new rows, and how many steps their averages have seen (default 0)."""
        self.steps[rows] = steps
        if self.has_averages:
            seen = np.zeros(len(rows)) if counts is None else np.array(counts)
            self.numbers[rows, -1] = self.steps[rows] - seen

    def set_clock(self, row: int, step: int) -> None:
        """Set the clock of a row. How many steps its average has seen does not change."""
        if self.has_averages:
            self.numbers[row, -1] += step - self.steps[row]
        self.steps[row] = step

    def copy_columns(self, rows: np.ndarray, others: np.ndarray) -> None:
        """Copy numbers, schedules and clips from other rows into new ones."""
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
        """Set the clip of rows.

        Args:
            rows: The rows.
            clip: The clip, or None.
            number: The number of the clip in its ``Table``; 0 for none.
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
