"""The state of a registry as plain data, and loaded state on its way in."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from multiopt.backend import Array, named
from multiopt.entry import (
    Entry,
    check_slot_names,
    chosen,
    described,
    described_rule,
    described_waiting,
    on_host,
    restored,
    restored_plateaus,
)
from multiopt.layout import Layout
from multiopt.loading import Options
from multiopt.registry import Registry
from multiopt.rules import Rule

__all__ = ["Loaded", "entries", "loaded_state", "shown", "stored_state", "take_over"]


class Loaded(NamedTuple):
    """Loaded state that fits.

    Attributes:
        entries: What is to be held of names that were seen.
        pending: The state of others, which is to wait.
        reached: Rules with the descriptions of the rules that were saved in their place.
        refused: Names whose state does not fit, and why not.
    """

    entries: dict[str, Entry]
    pending: dict[str, Mapping[str, Any]]
    reached: list[tuple[Rule, Mapping[str, Any]]]
    refused: dict[str, str]


def shown(layout: Layout) -> Callable[[Array], Array]:
    """How a slot of a parameter is shown: a copy in the parameter's library."""
    backend = named(layout.library)
    copy = partial(backend.shown, layout=layout)
    if layout.is_complex:
        return lambda slot: backend.whole(copy(slot))
    return copy


def entries(registry: Registry) -> Iterator[tuple[str, Entry]]:
    """What is held of each name."""
    return ((name, registry.entry(name)) for name in registry.names)


def stored_state(registry: Registry, copied: bool) -> dict[str, Any]:
    """The state by name: to be shown, with copies, or to be written, with the slots themselves."""
    steps = registry.steps
    if copied:
        return {
            "entries": {n: described(e, shown(e.layout), steps) for n, e in entries(registry)},
            "pending": {n: described_waiting(stored) for n, stored in registry.pending.items()},
        }
    # By what tells them apart: the fields of a rule need not be hashable.
    rules: dict[Hashable, dict[str, Any]] = {}
    found = {}
    names = registry.names
    for name, key in zip(names, registry.alike(names), strict=True):
        group, row = registry.row_of(name)
        step = int(group.steps[row])
        if key not in rules:
            rules[key] = described_rule(group.rule_at(row), step, steps)
        found[name] = {
            "rule": rules[key],
            "step": step,
            "slots": group.slots_at(row),
            "complex": group.layout.is_complex,
        }
    return {"entries": found, "pending": registry.pending}


def loaded_state(
    registry: Registry,
    states: Mapping[str, Mapping[str, Any]],
    options: Options,
    known: Mapping[str, Layout] = MappingProxyType({}),
) -> Loaded:
    """What to take over of loaded state, if it fits.

    Args:
        registry: Who takes it over.
        states: The state by name.
        options: How it is taken over.
        known: The layouts of parameters that another registry knows.

    Raises:
        ValueError: State does not fit, and ``strict`` is on.
    """
    found = Loaded({}, {}, [], {})
    for name, stored in states.items():
        try:
            host = stored if options.own else on_host(name, stored)
            stored = {**host, "cast": True} if options.cast else host
            _admit(registry, name, stored, found, known.get(name))
        except ValueError as error:
            if options.strict:
                raise
            found.refused[name] = str(error)
    return found


def _admit(
    registry: Registry,
    name: str,
    stored: Mapping[str, Any],
    found: Loaded,
    layout: Layout | None,
) -> None:
    """Add the state of a name to what is taken over.

    Raises:
        ValueError: It does not fit.
    """
    if name in registry:
        entry = registry.entry(name)
        rule, clip, layout = entry.rule, entry.clip, entry.layout
    elif layout is not None:
        rule, clip = chosen(registry.rule, name, Rule, "rule"), None
    else:
        if isinstance(registry.rule, Rule):
            check_slot_names(name, stored, registry.rule)
            found.reached.append((registry.rule, stored["rule"]))
        found.pending[name] = stored
        return
    found.entries[name] = restored(name, stored, rule, clip, layout, registry.masters)
    found.reached.append((rule, stored["rule"]))


def take_over(registry: Registry, loaded: Loaded, steps: int | None, ahead: bool) -> None:
    """Take over loaded state.

    Args:
        registry: Who takes it over.
        loaded: The state.
        steps: How many steps were taken; if unknown, the largest clock.
        ahead: Whether a ``Plateau`` only takes over what is more than it has seen.
    """
    registry.put(loaded.entries)
    registry.pending = {
        name: stored
        for name, stored in {**registry.pending, **loaded.pending}.items()
        if name not in loaded.entries
    }
    for rule, words in loaded.reached:
        restored_plateaus(rule, words, ahead)
    if steps is None:
        clocks = [registry.clock(name) for name in registry.names]
        clocks += [stored["step"] for stored in registry.pending.values()]
        steps = max(clocks, default=0)
    registry.steps = steps
