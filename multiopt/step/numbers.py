"""The numbers that schedules give at a step, written into the columns of groups."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from multiopt.arrays import Part
from multiopt.backend import identities
from multiopt.engine import Group
from multiopt.rules import Rule
from multiopt.rules.rule import is_shared

__all__ = ["ask_schedules"]


@np.errstate(all="ignore")
def ask_schedules(
    names: Sequence[str], parts: Sequence[Part], grads: np.ndarray, count: int
) -> None:
    """Write the numbers of this step into the columns of schedules.

    Each schedule is asked once for each number of a step.

    Args:
        names: The names of the step.
        parts: Its parts.
        grads: The gradients, by place; a name without one is not asked for.
        count: The number of the step of the optimizer, for schedules that are shared.

    Raises:
        ValueError: A schedule gave no number, or one out of range.
    """
    has = np.frombuffer(identities(grads), np.uintp) != id(None)
    all_have, asked = bool(has.all()), _Asked(count)
    for part in parts:
        group, places, rows = part.group, part.places, part.rows
        if not group.scheduled:
            continue
        numbers = group.schedule[rows]
        if not (all_have and numbers.all()):
            which = has[places] & (numbers != 0)
            rows, places, numbers = rows[which], places[which], numbers[which]
        steps, counts = group.steps[rows], group.counts(rows)
        while rows.size:
            # The usual case is one number for all: to say so takes a fifth of a comparison.
            left, mine = rows[:0], rows
            if not all(map(_is_one, (numbers, steps, counts))):
                alike = (numbers == numbers[0]) & (steps == steps[0]) & (counts == counts[0])
                left, mine = rows[~alike], rows[alike]
            name, number = names[places[0]], int(numbers[0])
            clocks = int(steps[0]) + 1, int(counts[0]) + 1
            for column, value in asked.numbers(group, name, number, clocks):
                group.numbers[mine, column] = value
            if left.size:
                places, numbers, steps, counts = (
                    x[~alike] for x in (places, numbers, steps, counts)
                )
            rows = left


def _is_one(column: np.ndarray) -> bool:
    """Whether all numbers are the same."""
    return column.tobytes() == column[:1].tobytes() * len(column)


class _Asked:
    """What schedules have given at a step."""

    def __init__(self, count: int) -> None:
        """Nothing is asked yet."""
        self._count = count
        self._known: dict[tuple[int, int], float] = {}

    def numbers(
        self,
        group: Group,
        name: str,
        number: int,
        clocks: tuple[int, int],
    ) -> list[tuple[int, float]]:
        """What schedules give at a step, with the columns that are theirs.

        Args:
            group: Whose.
            name: A name that has them.
            number: That of the schedules.
            clocks: The number of the step of the name, and of its average.

        Raises:
            ValueError: A schedule gave no number, or one out of range.
        """
        try:
            return [
                (column, self._asked(group.rule, hyperparameter, schedule, clocks))
                for column, hyperparameter, schedule in zip(*group.schedules[number], strict=True)
            ]
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from error

    def _asked(
        self,
        rule: Rule,
        name: str,
        schedule: Any,
        clocks: tuple[int, int],
    ) -> float:
        """The number of a schedule at a step of a name; ``clocks`` has that of its average too."""
        step, count = clocks
        inner, _, name = name.rpartition(".")
        if inner:
            rule = getattr(rule, inner)
            step = count if inner == "average" else step
        if is_shared(schedule):
            step = self._count
        key = id(schedule), step
        if key not in self._known:
            self._known[key] = rule.asked(name, schedule, step)
        return rule.in_range(name, self._known[key], step)
