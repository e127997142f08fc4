"""``param_groups``, and the rows that follow them.

What stands in a group counts, whoever wrote it: a scheduler, a checkpoint, the user. So each step
compares the settings of all groups with what they were, one hyperparameter after the other, and
writes what has changed into the columns of the registry, for all tensors at once.
"""

from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from math import inf
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from multiopt.adapters.torch.settings import number, plain_settings
from multiopt.distributed.boxes import counts_here, is_distributed, is_part
from multiopt.hyperparameters import change
from multiopt.kinds import kind_of
from multiopt.registry import Registry
from multiopt.rules import Rule
from multiopt.rules.rule import Range

__all__ = ["Followed"]

#: A parameter group of torch.
Group = Mapping[str, Any]

#: The types of numbers, and those of all settings that cannot change in place.
NUMBERS = {float, int}
AS_THEY_ARE = {*NUMBERS, bool, str, type(None)}

_PARAMS: Callable[[Group], list[torch.Tensor]] = itemgetter("params")


class Followed:
    """The tensors and the settings of parameter groups, as they were when last looked at.

    Args:
        rule: The rule that the groups have the hyperparameters of.
        settings: Those that they have; the others stay.

    Attributes:
        rule: The rule.
        params: The tensors of all groups, in order.
        keys: Their names in the registry.
        counts: Of those that are ``DTensor``s, by name, whether what lies here counts in sums over
            all ranks.
        parts: Those of which only a part lies here, by name.
    """

    def __init__(self, rule: Rule, settings: Container[str]) -> None:
        """Start without groups."""
        self.rule = rule
        self._fields = tuple(f.name for f in fields(rule) if f.name in settings)
        self.params, self.keys = np.empty(0, object), list[str]()
        self.counts: dict[str, bool] = {}
        self.parts: dict[str, torch.Tensor] = {}
        self._ids, self._sizes = b"", list[int]()
        self._key_of: dict[int, str] = {}
        self._group_of: dict[str, int] = {}
        #: By hyperparameter what each group had, and the rules that are made of it; then those
        #: that are numbers in all groups.
        self._values: dict[str, list[Any]] = {}
        self._rules: dict[Hashable, Rule] = {}
        self._numeric: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but identities: a copy has other tensors."""
        return {**vars(self), "_ids": b"", "_key_of": {}}

    # Tensors

    def look(self, groups: Sequence[Group]) -> None:
        """Look which tensors the groups have, and name new ones.

        Raises:
            ValueError: A tensor is there twice.
        """
        sizes = list(map(len, map(_PARAMS, groups)))
        params = np.fromiter(chain.from_iterable(map(_PARAMS, groups)), object, sum(sizes))
        # The memory of an array of objects holds their identities.
        ids = params.tobytes()
        if ids == self._ids and sizes == self._sizes:
            return
        listed = np.frombuffer(ids, np.uintp).tolist()
        if len(set(listed)) < len(listed):
            raise ValueError(
                "a tensor is in param_groups twice, so a step would update it twice; expected each "
                "tensor once"
            )
        known = dict(zip(map(id, self.params), self.keys, strict=True))
        names = chain.from_iterable(
            # There may be fewer, where tensors were added by hand.
            [*group.get("param_names", ()), *[None] * size][:size]
            for group, size in zip(groups, sizes, strict=True)
        )
        taken = {known[one] for one in listed if one in known}
        self._key_of = {}
        for place, (one, name) in enumerate(zip(listed, names, strict=True)):
            key = known.get(one)
            if key is None:
                # A tensor in the place of another, as FSDP puts there, has its name and state.
                key = _unused(name or str(place), taken)
                taken.add(key)
            self._key_of[one] = key
        self.params, self.keys = params, list(self._key_of.values())
        named = list(zip(self.keys, params.tolist(), strict=True))
        self.counts = {n: counts_here(x, f"parameter {n!r}") for n, x in named if is_distributed(x)}
        self.parts = {name: param for name, param in named if is_part(param)}
        owners = np.repeat(np.arange(len(sizes)), sizes).tolist()
        self._group_of = dict(zip(self.keys, owners, strict=True))
        self._ids, self._sizes = ids, sizes
        # A row may have the numbers of another group now.
        self.forget_settings()

    def known(self, param: object) -> str | None:
        """The name in the registry of a tensor that was in a group at the last look, or None."""
        return self._key_of.get(id(param))

    def key_of(self, param: torch.Tensor) -> str:
        """The name of a tensor in the registry.

        Raises:
            KeyError: It is in no group.
        """
        key = self.known(param)
        if key is None:
            raise KeyError(
                f"a tensor of shape {tuple(param.shape)} is in none of the param_groups; expected "
                "one that is: add_param_group"
            )
        return key

    # Settings

    def rule_for(self, key: str) -> Rule:
        """The rule of a tensor: that of its group.

        Raises:
            ValueError: A setting is out of range.
        """
        return self._rule_of(self._group_of[key])

    def rules_in(self, groups: Sequence[Group]) -> dict[str, Rule]:
        """The rules that tensors have if the groups are these, by name.

        Raises:
            ValueError: A setting is out of range.
        """
        values = {name: [number(group[name]) for group in groups] for name in self._fields}
        return {key: self._rule_of(place, values) for key, place in self._group_of.items()}

    def forget_settings(self) -> None:
        """Have the next step write the settings of all rows anew."""
        self._values, self._rules, self._numeric = {}, {}, set()

    def _rule_of(self, place: int, values: Mapping[str, list[Any]] | None = None) -> Rule:
        """The rule with the settings of a group; groups with equal settings have one rule."""
        values = self._values if values is None else values
        settings = {name: values[name][place] for name in self._fields}
        key = tuple(settings.values())
        if key not in self._rules:
            try:
                self._rules[key] = replace(self.rule, **plain_settings(settings))
            except ValueError as error:
                raise ValueError(f"param_groups[{place}]: {error}") from error
        return self._rules[key]

    def follow(self, groups: Sequence[Group], registry: Registry) -> None:
        """Bring the rows of the registry up to date.

        Args:
            groups: The parameter groups.
            registry: The registry. Names that it has not seen have their rules from ``rule_for``.

        Raises:
            ValueError: A setting is out of range. Nothing has changed.
        """
        self.look(groups)
        changed: dict[str, list[Any]] = {}
        for name in self._fields:
            values = [group[name] for group in groups]
            before = self._values.get(name)
            if values != before:
                # Tensors and arrays may change in place, so what is kept is numbers.
                if not set(map(type, values)) <= AS_THEY_ARE:
                    values = list(map(number, values))
                if values != before:
                    changed[name] = values
        if changed:
            self._change(changed, registry)

    def _change(self, changed: dict[str, list[Any]], registry: Registry) -> None:
        after = {**self._values, **changed}
        numbers = self._numbers(changed, after)
        if numbers is not None:
            self._write(numbers, registry)
        else:
            rules = {key: self._rule_of(place, after) for key, place in self._group_of.items()}
            change(registry, {key: rule for key, rule in rules.items() if key in registry}, {})
            ranges = self.rule.ranges.keys()
            self._numeric = {name for name in ranges & after.keys() if _are_numbers(after[name])}
        self._values, self._rules = after, {}

    def _numbers(
        self, changed: Mapping[str, list[Any]], after: Mapping[str, list[Any]]
    ) -> dict[str, Any] | None:
        """What is to be written, if numbers take the place of numbers and nothing else changes.

        Returns:
            By hyperparameter the number, or tuple of numbers, of the only group, or an array of
            those of all groups; None if rules change.

        Raises:
            ValueError: A setting is out of range.
        """
        if not (changed.keys() <= self._numeric and all(map(_are_numbers, changed.values()))):
            return None
        only = len(self._sizes) == 1
        numbers = {
            name: _as_rules_have_it(values[0] if only else np.array(values, np.float64))
            for name, values in changed.items()
        }
        kind = type(self.rule)
        # Then no rule need be made: each of a thousand groups may have its own learning rate.
        has_ranges_only = kind.__post_init__ is Rule.__post_init__ or changed.keys() <= {"lr"}
        ranges = self.rule.ranges
        if has_ranges_only and all(_are_within(ranges[name], x) for name, x in numbers.items()):
            return numbers
        alike: set[Hashable] = set()
        for place in range(len(self._sizes)):
            pair = tuple((self._values[name][place], after[name][place]) for name in self._fields)
            if pair not in alike:
                rules = self._rule_of(place), self._rule_of(place, after)
                if kind_of(rules[0]) != kind_of(rules[1]):
                    return None
                alike.add(pair)
        return numbers

    def _write(self, numbers: Mapping[str, Any], registry: Registry) -> None:
        """Write hyperparameters into the columns of the rows that there are."""
        last = registry.last
        parts = (last if last.names == self.keys else registry.find(self.keys)).parts
        sizes = self._sizes
        if len(sizes) == 1:
            with registry.guard:
                for group, rows, *_ in parts:
                    group.write_numbers(rows, numbers)
            return
        if set(sizes) != {1}:
            numbers = {name: np.repeat(values, sizes, axis=0) for name, values in numbers.items()}
        with registry.guard:
            for group, rows, places, _ in parts:
                for name, values in numbers.items():
                    for column, place in group.columns_of[name]:
                        found = values if place is None else values[:, place]
                        group.numbers[rows, column] = found[places]


def _unused(name: str, taken: Container[str]) -> str:
    """A name that no other tensor has."""
    key, count = name, 1
    while key in taken:
        count += 1
        key = f"{name} ({count})"
    return key


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether settings of several groups are numbers, or tuples of equally many numbers."""
    kinds = set(map(type, values))
    if kinds == {tuple}:
        kinds = {type(part) for value in values for part in value}
        return kinds <= NUMBERS and len(set(map(len, values))) == 1
    return kinds <= NUMBERS


def _as_rules_have_it(value: Any) -> Any:
    """A number, a tuple of numbers or an array of them, without negative zeros."""
    return tuple(part + 0.0 for part in value) if isinstance(value, tuple) else value + 0.0


def _are_within(allowed: Range, value: Any) -> bool:
    """Whether a number, those of a tuple, or those of an array are in a range."""
    if isinstance(value, np.ndarray):
        inside = (allowed.low <= value) & (value < allowed.below)
        return bool((inside | (allowed.infinite & (value == inf))).all())
    return all(map(allowed.holds, value)) if isinstance(value, tuple) else allowed.holds(value)
