"""What a rule consists of: numbers, which are columns of a group, and choices, which make its kind.

>>> from multiopt.kinds import kind_of, number_fields, numbers_of
>>> from multiopt.rules import SGD
>>> rule = SGD(lr=0.5, momentum=0.9)
>>> columns = number_fields(rule)
>>> [name for name, _ in columns], numbers_of(rule, columns)
(['lr', 'momentum', 'dampening', 'weight_decay'], [0.5, 0.9, 0.0, 0.0])
>>> [kind_of(rule) == kind_of(other) for other in (SGD(momentum=0.5), SGD(maximize=True))]
[True, False]
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from math import nan
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from multiopt.rules.rule import Rule

__all__ = [
    "Numbered",
    "Schedules",
    "formulas",
    "kind_of",
    "number_fields",
    "numbers_of",
    "other_fields",
    "schedules_of",
]

#: A thing that has a number.
Item = TypeVar("Item")


class Schedules(NamedTuple):
    """The hyperparameters of a row that are schedules.

    Attributes:
        columns: Of each, its column of numbers.
        names: The hyperparameter.
        schedules: The callable.
    """

    columns: tuple[int, ...]
    names: tuple[str, ...]
    schedules: tuple[Callable[[int], float], ...]


class Numbered(Generic[Item]):
    """Things by small numbers, which columns hold; what no column holds any more is let go.

    Args:
        key: What tells the thing apart that has the number 0.
        item: That thing.
    """

    def __init__(self, key: Hashable, item: Item) -> None:
        """Have one thing."""
        self._items: dict[int, Item] = {0: item}
        self._keys: dict[int, Hashable] = {0: key}
        self._numbers: dict[Hashable, int] = {key: 0}
        self._next, self._most = 1, 16

    def number(self, key: Hashable, item: Item, column: Callable[[], np.ndarray]) -> int:
        """The number of a thing.

        Args:
            key: What tells it apart.
            item: The thing, which is held, so that an ``id`` in its key stays its own.
            column: The numbers that are in use.
        """
        if key not in self._numbers:
            if len(self._items) > self._most:
                used = {0, *np.unique(column()).tolist()}
                for number in self._items.keys() - used:
                    del self._items[number], self._numbers[self._keys.pop(number)]
                self._most = 16 + 2 * len(used)
            self._items[self._next], self._keys[self._next] = item, key
            self._numbers[key] = self._next
            self._next += 1
        return self._numbers[key]

    def having(self, test: Callable[[Item], bool]) -> list[tuple[int, Item]]:
        """The things that pass a test, with their numbers."""
        return [(number, item) for number, item in self._items.items() if test(item)]

    def __getitem__(self, number: int) -> Item:
        """The thing that has a number."""
        return self._items[number]


def number_fields(rule: Rule) -> list[tuple[str, int | None]]:
    """The numbers among the hyperparameters: field, and place in it where the field is a tuple.

    None in the place of a number is a choice.
    """
    found: list[tuple[str, int | None]] = [
        (f"{inner}.{name}", place)
        for inner in rule.nested
        for name, place in number_fields(getattr(rule, inner))
    ]
    for name in rule.ranges:
        value = getattr(rule, name)
        if isinstance(value, tuple):
            found += [(name, place) for place, part in enumerate(value) if part is not None]
        elif value is not None:
            found.append((name, None))
    return found


def other_fields(rule: Rule) -> dict[str, Any]:
    """Return the hyperparameters that are not numbers: switches and choices."""
    declared = {*rule.ranges, *rule.nested}
    found = {f.name: getattr(rule, f.name) for f in fields(rule) if f.name not in declared}
    for inner in rule.nested:
        found |= {f"{inner}.{name}": x for name, x in other_fields(getattr(rule, inner)).items()}
    return found


def formulas(rule: Rule) -> list[Rule]:
    """The rules whose formulas a rule computes: those in it, or itself."""
    return [getattr(rule, inner) for inner in rule.nested] or [rule]


def kind_of(rule: Rule) -> Hashable | None:
    """What rules have in common that may share a group: all but the values of their numbers.

    None if that cannot be looked up, for a choice is a list, say.
    """
    choices = tuple(other_fields(rule).items())
    computed = tuple((type(part), part.update, part.slots) for part in formulas(rule))
    kind = computed, tuple(number_fields(rule)), choices
    try:
        hash(kind)
    except TypeError:
        return None
    return kind


def numbers_of(rule: Rule, columns: Sequence[tuple[str, int | None]]) -> list[float]:
    """The numbers of a rule; NaN in the place of a schedule."""
    return [nan if callable(value) else value for value in _values_of(rule, columns)]


def schedules_of(rule: Rule, columns: Sequence[tuple[str, int | None]]) -> Schedules:
    """The schedules of a rule."""
    found = [
        (number, columns[number][0], value)
        for number, value in enumerate(_values_of(rule, columns))
        if callable(value)
    ]
    return Schedules(*zip(*found, strict=True)) if found else Schedules((), (), ())


def _values_of(rule: Rule, columns: Sequence[tuple[str, int | None]]) -> list[Any]:
    values = [(attrgetter(name)(rule), place) for name, place in columns]
    return [value if place is None else value[place] for value, place in values]
