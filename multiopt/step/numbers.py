"""The numbers that schedules give at a step, written into the columns of groups."""

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
    """Write the numbers of this step into the columns of schedules.

    Each schedule is asked once for each number of a step.

    Args:
        names: The names of the step.
        parts: By group, its rows, and the places of their names.
        grads: The gradients, by place; a name without one is not asked for.
        count: The number of the step of the optimizer, for schedules that are shared.

    Raises:
        ValueError: A schedule gave no number, or one out of range.
    """
    known: dict[tuple[int, int], float] = {}

    def give(group: Group, name: str, number: int, clocks: tuple[int, int], rows: Any) -> None:
        """Ask for rows that have the same schedules and clocks."""
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
        # One that has a gradient may be asked for. The others will get the same for their next.
        if grads[places[0]] is not None and all(map(_is_one, columns)):
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


def _is_one(column: np.ndarray) -> bool:
    """Whether all numbers are the same: to say so takes a tenth of a comparison."""
    return column.tobytes() == column[:1].tobytes() * len(column)


def _asker(rule: Rule, label: str, clocks: tuple[int, int]) -> tuple[Rule, str, int]:
    """Whose hyperparameter it is, its name there, and the number of the step that counts for it."""
    inner, _, name = label.rpartition(".")
    step, count = clocks
    if not inner:
        return rule, name, step
    return getattr(rule, inner), name, count if inner == "average" else step
