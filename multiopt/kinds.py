"""How a rule is taken apart: numbers become columns of a group, everything else makes its kind.

Two parameters can share a group, and so one compiled kernel, if their rules differ only in numbers.
A different learning rate is another value in a column; a different switch is another kind.

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

#: The type of what is numbered.
Item = TypeVar("Item")


class Schedules(NamedTuple):
    """The hyperparameters of a row that are schedules, as three parallel tuples.

    Attributes:
        columns: Their columns in ``numbers``.
        names: Their names.
        schedules: The schedules.
    """

    columns: tuple[int, ...]
    names: tuple[str, ...]
    schedules: tuple[Callable[[int], float], ...]


class Numbered(Generic[Item]):
    """Gives items small numbers, so that a column can refer to them; unused items are dropped.

    Args:
        key: Identifies the item with the number 0.
        item: That item, which is never dropped.
    """

    def __init__(self, key: Hashable, item: Item) -> None:
        """Number the first item."""
        self._items: dict[int, Item] = {0: item}
        self._keys: dict[int, Hashable] = {0: key}
        self._numbers: dict[Hashable, int] = {key: 0}
        self._next, self._most = 1, 16

    def number(self, key: Hashable, item: Item, column: Callable[[], np.ndarray]) -> int:
        """The number of an item; a new one gets the next number.

        Args:
            key: Identifies the item.
            item: The item. It is kept alive, so that an ``id`` in its key stays unique.
            column: Returns the numbers in use.
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
        """The items that pass a test, with their numbers."""
        return [(number, item) for number, item in self._items.items() if test(item)]

    def __getitem__(self, number: int) -> Item:
        """The item with a number."""
        return self._items[number]


def number_fields(rule: Rule) -> list[tuple[str, int | None]]:
    """The numeric hyperparameters: their names, with the index for each element of a tuple.

    None in place of a number counts as a choice and is left out.
    """
    numbers: list[tuple[str, int | None]] = [
        (f"{inner}.{name}", place)
        for inner in rule.nested
        for name, place in number_fields(getattr(rule, inner))
    ]
    for name in rule.ranges:
        value = getattr(rule, name)
        if isinstance(value, tuple):
            numbers += [(name, place) for place, part in enumerate(value) if part is not None]
        elif value is not None:
            numbers.append((name, None))
    return numbers


def other_fields(rule: Rule) -> dict[str, Any]:
    """The hyperparameters that are not numbers: switches and choices."""
    declared = {*rule.ranges, *rule.nested}
    choices = {f.name: getattr(rule, f.name) for f in fields(rule) if f.name not in declared}
    for inner in rule.nested:
        choices |= {f"{inner}.{name}": x for name, x in other_fields(getattr(rule, inner)).items()}
    return choices


def formulas(rule: Rule) -> list[Rule]:
    """The rules that a chained rule consists of; for any other rule, the rule itself."""
    return [getattr(rule, inner) for inner in rule.nested] or [rule]


def kind_of(rule: Rule) -> Hashable | None:
    """A key for everything about a rule except the values of its numbers.

    Rules with equal keys can share a group. None if the key is not hashable, for example because a
    choice is a list.
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
    """The numbers of a rule; NaN for a schedule."""
    return [nan if callable(value) else value for value in _values_of(rule, columns)]


def schedules_of(rule: Rule, columns: Sequence[tuple[str, int | None]]) -> Schedules:
    """The schedules of a rule."""
    schedules = [
        (column, columns[column][0], value)
        for column, value in enumerate(_values_of(rule, columns))
        if callable(value)
    ]
    return Schedules(*zip(*schedules, strict=True)) if schedules else Schedules((), (), ())


def _values_of(rule: Rule, columns: Sequence[tuple[str, int | None]]) -> list[Any]:
    values = [(attrgetter(name)(rule), place) for name, place in columns]
    return [value if place is None else value[place] for value, place in values]
