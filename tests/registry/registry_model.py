"""What an optimizer should do, in plain Python and NumPy: ``spec/registry.md`` once more."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

import multiopt as mo

MASTER = "master_param"

Rules = mo.Rule | Callable[[str], mo.Rule]


class Misfit(Exception):  # noqa: N818 - it is what is expected
    """The optimizer has to refuse this, with a ValueError, and to stay as it is."""


@dataclass
class Stored:
    """What a file has of a name, and a pending one too."""

    words: dict[str, Any]
    step: int
    slots: dict[str, np.ndarray]
    cast: bool = False


@dataclass
class Known:
    """A name that was seen."""

    rule: Any
    step: int
    slots: dict[str, np.ndarray]
    shape: tuple[int, ...]
    dtype: str
    library: str

    def stored(self) -> Stored:
        return Stored(described(self.rule), self.step, self.slots)


@dataclass
class Saved:
    """A file."""

    steps: int
    entries: dict[str, Stored]
    averages: dict[str, Stored]


def described(rule: Any) -> dict[str, Any]:
    values = {f.name: getattr(rule, f.name) for f in fields(rule)}
    return {
        "name": type(rule).__name__,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
    }


def computed(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def is_unstepped(stored: Stored) -> bool:
    return stored.step == 0 and not stored.slots


@dataclass
class Registry:
    """Names, seen or pending, and how they step; the averages are a second one.

    ``rules`` is a rule for all names, or a callable.
    """

    rules: Any
    masters: bool = False
    steps: int = 0
    seen: dict[str, Known] = field(default_factory=dict)
    pending: dict[str, Stored] = field(default_factory=dict)

    def rule_of(self, name: str) -> Any:
        return self.rules if isinstance(self.rules, mo.Rule) else self.rules(name)

    @property
    def names(self) -> list[str]:
        return [*self.seen, *self.pending]

    def settled(self, name: str, value: np.ndarray, library: str) -> Known:
        """The entry that a step begins with."""
        if name in self.seen:
            known = deepcopy(self.seen[name])
            known.library = library
            return known
        rule, dtype = self.rule_of(name), value.dtype.name
        if name in self.pending:
            return self.restored(name, self.pending[name], rule, value.shape, dtype, library)
        return Known(
            rule, 0, self.zeros(rule, value.shape, dtype), value.shape, value.dtype.name, library
        )

    def zeros(self, rule: Any, shape: tuple[int, ...], dtype: str) -> dict[str, np.ndarray]:
        names = [*rule.slots, *([MASTER] if self.masters and dtype == "float16" else [])]
        return {name: np.zeros(shape, computed(dtype)) for name in names}

    def restored(
        self,
        name: str,
        stored: Stored,
        rule: Any,
        shape: tuple[int, ...],
        dtype: str,
        library: str,
    ) -> Known:
        slots = self.zeros(rule, shape, dtype)
        if not is_unstepped(stored):
            if stored.slots.keys() | {MASTER} & slots.keys() != slots.keys():
                raise Misfit(f"slots of {name}")
            for slot, array in stored.slots.items():
                if array.shape != shape or not (stored.cast or array.dtype == computed(dtype)):
                    raise Misfit(f"{slot} of {name}")
                with np.errstate(over="ignore"):
                    slots[slot] = array.astype(computed(dtype))
        return Known(rule, stored.step, slots, shape, dtype, library)

    def take(
        self,
        begun: dict[str, Known],
        params: dict[str, np.ndarray],
        grads: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Step from these entries; replaces the parameters that have a gradient.

        What was computed comes back, by name, before it is rounded to 16 bits.
        """
        computed_params = {}
        for name, known in begun.items():
            dtype = computed(known.dtype)
            old = params[name].astype(dtype)
            if MASTER in known.slots:
                master = known.slots[MASTER]
                kept = master.astype(known.dtype) == params[name]
                old = np.where(kept, master, old)
            known.step += 1
            slots = tuple(known.slots[slot] for slot in known.rule.slots)
            numbers = known.rule.coefficients(known.step, dtype)
            with np.errstate(all="ignore"):
                new, slots = known.rule.update(
                    np, np.asarray(old), grads[name].astype(dtype), slots, numbers
                )
                known.slots |= dict(zip(known.rule.slots, map(np.asarray, slots), strict=True))
                if MASTER in known.slots:
                    known.slots[MASTER] = np.asarray(new)
                params[name] = np.asarray(new, known.dtype)
            computed_params[name] = np.asarray(new)
            self.pending.pop(name, None)
            self.seen[name] = known
        self.steps += bool(grads)
        return computed_params

    def stored(self) -> dict[str, Stored]:
        return {**self.pending, **{name: known.stored() for name, known in self.seen.items()}}

    def load(
        self, states: Mapping[str, Stored], strict: bool, others: Mapping[str, Known]
    ) -> "Loaded":
        """What to take over; others know parameters that this one may not have seen."""
        loaded = Loaded({}, {}, set())
        for name, stored in states.items():
            try:
                if name in self.seen or name in others:
                    known = self.seen.get(name) or others[name]
                    rule = known.rule if name in self.seen else self.rule_of(name)
                    loaded.seen[name] = self.restored(
                        name, stored, rule, known.shape, known.dtype, known.library
                    )
                    continue
                if (
                    isinstance(self.rules, mo.Rule)
                    and not is_unstepped(stored)
                    and set(stored.slots) - {MASTER} != set(self.rules.slots)
                ):
                    raise Misfit(f"slots of {name}")
                loaded.pending[name] = deepcopy(stored)
            except Misfit:
                if strict:
                    raise
                loaded.refused.add(name)
        return loaded

    def take_over(self, loaded: "Loaded") -> None:
        self.seen |= loaded.seen
        self.pending |= loaded.pending
        for name in loaded.seen:
            self.pending.pop(name, None)

    def forget(self, name: str) -> None:
        self.seen.pop(name, None)
        self.pending.pop(name, None)

    def rename(self, names: Mapping[str, str]) -> None:
        self.seen = {names.get(name, name): one for name, one in self.seen.items()}
        self.pending = {names.get(name, name): one for name, one in self.pending.items()}

    def change_rules(self, rules: Any) -> None:
        self.rules = rules
        for name, known in self.seen.items():
            rule = self.rule_of(name)
            if rule.slots != known.rule.slots:
                kept = set(rule.slots) & set(known.rule.slots)
                fresh = self.zeros(rule, known.shape, known.dtype)
                known.slots = fresh | {
                    slot: array
                    for slot, array in known.slots.items()
                    if slot in kept or slot == MASTER
                }
                if rule.slots and not kept:
                    known.step = 0
            known.rule = rule


@dataclass
class Loaded:
    """Loaded state, and the names whose state does not fit."""

    seen: dict[str, Known]
    pending: dict[str, Stored]
    refused: set[str]


class Model:
    """An optimizer and the parameters that it steps.

    Args:
        rules: A rule, or a callable ``name -> rule``.
        average: What average it keeps of all parameters, or None.
        masters: Whether it keeps master copies.
    """

    def __init__(self, rules: Rules, average: mo.Average | None, masters: bool) -> None:
        self.main = Registry(rules, masters)
        self.keeps = average is not None
        self.means = Registry(lambda name: average)

    @property
    def names(self) -> list[str]:
        return self.main.names

    def step(
        self,
        params: dict[str, np.ndarray],
        grads: Mapping[str, np.ndarray],
        libraries: Mapping[str, str],
    ) -> None:
        begun = {n: self.main.settled(n, params[n], libraries[n]) for n in grads}
        means = {n: self.means.settled(n, params[n], libraries[n]) for n in grads if self.keeps}
        computed_params = self.main.take(begun, params, grads)
        self.means.take(means, computed_params, grads)

    def saved(self) -> Saved:
        return deepcopy(Saved(self.main.steps, self.main.stored(), self.means.stored()))

    def load(
        self, saved: Saved, new: Mapping[str, str], strict: bool, cast: bool
    ) -> dict[str, set[str]]:
        """Take over what is wanted under its new names by the old ones; what becomes of it."""
        before = set(self.main.seen)
        parts = (
            {new[n]: replace(one, cast=cast) for n, one in part.items() if n in new}
            for part in (saved.entries, saved.averages)
        )
        entries, averages = parts
        main = self.main.load(entries, strict, {})
        averages = {n: one for n, one in averages.items() if n not in main.refused}
        if self.keeps:
            means = self.means.load(averages, strict, self.main.seen)
        elif averages and strict:
            raise Misfit("averages")
        else:
            means = Loaded({}, {}, set(averages))
        self.main.take_over(main)
        self.means.take_over(means)
        # An average belongs to the state it was saved with.
        for name in main.seen.keys() | main.pending.keys():
            if name not in means.seen.keys() | means.pending.keys():
                self.means.forget(name)
        is_part = len(new) < len(saved.entries)
        is_nothing = bool(saved.entries) and not (main.seen or main.pending)
        if not is_nothing and not (is_part and self.main.steps > 0):
            self.main.steps = saved.steps
        refused = main.refused | means.refused
        return {
            "restored": set(main.seen),
            "pending": set(main.pending),
            "unused": {n for n in saved.entries if new.get(n) in {None, *refused}},
            "missing": before - {new.get(n, n) for n in saved.entries},
        }

    def forget(self, name: str) -> None:
        self.main.forget(name)
        self.means.forget(name)

    def rename(self, names: Mapping[str, str]) -> None:
        self.main.rename(names)
        self.means.rename(names)
