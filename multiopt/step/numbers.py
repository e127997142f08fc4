"""Schedules: before a step they are called, and their numbers are written into columns.

Engines read only the columns and know nothing of schedules. Each schedule is called once for each
distinct number of a step, however many parameters use it:

>>> import numpy as np
>>> import multiopt as mo
>>> calls = []
>>> opt = mo.Optimizer(mo.SGD(lr=lambda step: calls.append(step) or 1 / step))
>>> params = {name: np.ones(2) for name in "abc"}
>>> for _ in range(2):
...     params = opt.step(params, {name: np.ones(2) for name in "abc"})
>>> calls
[1, 2]
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from multiopt.engine import Group
from multiopt.rules import Rule
from multiopt.rules.rule import is_shared

__all__ = ["ask_schedules"]


@np.errstate(all="ignore")
def ask_schedules(
    names: Sequence[str],
    parts: Iterable[tuple[Group, np.ndarray, np.ndarray]],
    grads: np.ndarray,
    count: int,
) -> None:
    """Call the schedules of some rows, and write their numbers into the column ``numbers``.

    Args:
        names: The names of the step.
        parts: The groups, each with its rows and their places.
        grads: The gradients by place. Schedules are not called for names without one.
        count: The number of the optimizer's step, for shared schedules.

    Raises:
        ValueError: A schedule returned something that is not a number, or a number out of range.
    """
    known: dict[tuple[int, int], float] = {}

    def give(group: Group, name: str, number: int, clocks: tuple[int, int], rows: Any) -> None:
        """Call the schedules of rows that have the same schedules and clocks."""
        try:
            for column, label, schedule in zip(*group.schedules[number], strict=True):
                rule, field, step = _asker(group.rule, label, clocks)
                if is_shared(schedule):
                    step = count
                key = id(schedule), step
                if key not in known:
                    known[key] = rule.asked(field, schedule, step)
                group.numbers[rows, column] = rule.in_range(field, known[key], step)
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from error

    for group, rows, places in parts:
        if not (group.scheduled and len(rows)):
            continue
        mine = group.all_or(rows)
        columns = group.schedule[mine], group.steps[mine], group.counts(mine)
        # The usual case: all rows have the same schedules and clocks, so all get the same numbers.
        if grads[places[0]] is not None and all(map(group.are_equal, columns)):
            number, step, seen = (column.item(0) for column in columns)
            give(group, names[places[0]], number, (step + 1, seen + 1), mine)
            continue
        columns = group.schedule[rows], group.steps[rows], group.counts(rows)
        alike: dict[tuple[int, int, int], list[int]] = {}
        for k, key in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            if key[0] and grads[places[k]] is not None:
                alike.setdefault(key, []).append(k)
        for (number, step, seen), which in alike.items():
            name = names[places[which[0]]]
            give(group, name, number, (step + 1, seen + 1), rows[which])


def _asker(rule: Rule, label: str, clocks: tuple[int, int]) -> tuple[Rule, str, int]:
    """The rule that has a hyperparameter, its name there, and the number of the step it is at."""
    inner, _, name = label.rpartition(".")
    step, count = clocks
    if not inner:
        return rule, name, step
    return getattr(rule, inner), name, count if inner == "average" else step
