"""The state of a registry as plain data, and loaded state on its way in."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from multiopt.averaging import Average
from multiopt.backend import Array, named
from multiopt.entry import (
    Entry,
    check_slot_names,
    described,
    described_rule,
    described_waiting,
    on_host,
    restored,
    restored_average,
    restored_plateaus,
)
from multiopt.kinds import formulas
from multiopt.layout import Layout
from multiopt.registry import Registry
from multiopt.rules import Rule
from multiopt.skipping import Skips
from multiopt.state.file import VERSION, Contents
from multiopt.state.loading import LoadReport, Options, names_of
from multiopt.state.plateaus import warn_of_plateaus

__all__ = ["entries", "shown", "stored_state", "taken_over"]


class Loaded(NamedTuple):
    """Loaded state that fits.

    Attributes:
        entries: What is to be held of names that were seen.
        pending: The state of others, which is to wait.
        reached: Rules with the descriptions of the rules that were saved in their place.
        refused: Names whose state does not fit, and why not.
        without: Names whose state fits, but for its average, and why that does not.
    """

    entries: dict[str, Entry]
    pending: dict[str, Mapping[str, Any]]
    reached: list[tuple[Rule, Mapping[str, Any]]]
    refused: dict[str, str]
    without: dict[str, str]


def shown(layout: Layout) -> Callable[[Array], Array]:
    """How a slot of a parameter is shown: a copy in the parameter's library."""
    backend = named(layout.library)
    copy = partial(backend.shown, layout=layout)
    if layout.is_complex:
        return lambda slot: backend.whole(copy(slot))
    return copy


def entries(registry: Registry) -> Iterator[tuple[str, Entry]]:
    """What is held of each name."""
    chains: dict[Hashable, Rule] = {}
    names = registry.names
    for name, key in zip(names, registry.alike(names), strict=True):
        if key not in chains:
            group, row = registry.row_of(name)
            chains[key] = group.rule_at(row)
        yield name, registry.entry(name, chains[key])


def stored_state(registry: Registry, copied: bool) -> dict[str, Any]:
    """The state: to be shown, with copies, or to be written, with the slots themselves.

    It warns of what there is no place for.
    """
    chains = {name: formulas(rule) for name, rule in registry.scheduled_rules().items()}
    warn_of_plateaus({name: parts[0] for name, parts in chains.items()})
    warn_of_plateaus({name: parts[1] for name, parts in chains.items() if len(parts) > 1})
    steps, pending = registry.steps, registry.pending
    rules: dict[Hashable, dict[str, Any]] = {}

    def stored(entry: Entry, key: Hashable) -> dict[str, Any]:
        if copied:
            return described(entry, shown(entry.layout), steps)
        if key not in rules:
            rules[key] = described_rule(entry.rule, entry.step, steps)
        is_complex, slots = entry.layout.is_complex, entry.slots
        return {"rule": rules[key], "step": entry.step, "slots": slots, "complex": is_complex}

    def waiting(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {n: described_waiting(one) if copied else one for n, one in states.items()}

    found, averages = {}, {}
    keys = registry.alike(registry.names)
    for (name, entry), alike in zip(entries(registry), keys, strict=True):
        found[name] = stored(entry, ("rule", alike))
        if (average := entry.average) is not None and average.step:
            averages[name] = stored(average, ("average", alike))
    document: dict[str, Any] = {"version": VERSION, "steps": steps}
    document |= {"entries": found, "pending": waiting(pending)}
    if registry.average is not None:
        means = {name: one["average"] for name, one in pending.items() if "average" in one}
        document |= {"averages": averages, "pending_averages": waiting(means)}
    if registry.skips:
        document["skips"] = {name: list(counts) for name, counts in registry.skips.items()}
    return document


def taken_over(
    registry: Registry, contents: Contents, new: Mapping[str, str], options: Options
) -> LoadReport:
    """Take over loaded state, whole or not at all.

    Args:
        registry: Who takes it over.
        contents: The state.
        new: The names that are wanted, with what they are to be called.
        options: How it is taken over.

    Raises:
        ValueError: State does not fit, and ``strict`` is on.
        RuntimeError: Names that are left alone are torn.
    """
    state_dict, guard = contents.state_dict, registry.guard

    def wanted(*parts: str) -> dict[str, Mapping[str, Any]]:
        states = [state for part in parts for state in state_dict.get(part, {}).items()]
        return {new[name]: stored for name, stored in states if name in new}

    averages = wanted("averages", "pending_averages")
    loaded = _loaded_state(registry, wanted("pending", "entries"), averages, options)
    why = {name: f"its average: {reason}" for name, reason in loaded.without.items()}
    why |= loaded.refused
    have = [*names_of(state_dict), *contents.damaged]
    lost = {new[name] for name in contents.damaged} | loaded.refused.keys()
    taken = set(new.values()) - lost
    skips = {name: count for name, count in registry.skips.items() if name not in taken}
    for name, counts in state_dict.get("skips", {}).items():
        if new.get(name) in taken:
            skips[new[name]] = Skips(*counts)
    is_part = len(new) < len(have)
    steps = state_dict.get("steps")
    if (is_part and registry.steps > 0) or (have and not taken):
        steps = registry.steps
    rules = {name: entry.rule for name, entry in loaded.entries.items()}
    if isinstance(registry.rule, Rule):
        rules |= dict.fromkeys(loaded.pending, registry.rule)
    warn_of_plateaus(rules)
    gone: set[str] = set()
    if guard.torn is not None:
        # Names that are left alone would stay torn. Those that came later are unheard of.
        gone = registry.known().keys() - loaded.entries.keys() - loaded.pending.keys()
        if gone and (is_part or len(taken) < len(have)):
            guard.check_whole("load of some names")
    means = {n: e.average.rule for n, e in loaded.entries.items() if e.average is not None}
    means |= {n: one["keeps"] for n, one in loaded.pending.items() if "keeps" in one}
    fit = averages.keys() - loaded.without.keys()
    warn_of_plateaus({name: rule for name, rule in means.items() if name in fit})
    with guard:
        if gone:
            registry.forget(gone)
        _take_over(registry, loaded, steps, ahead=is_part)
        registry.skips = skips
        guard.torn = None
    found = {new.get(name, name) for name in have}
    return LoadReport(
        restored=tuple(loaded.entries),
        pending=tuple(loaded.pending),
        unused={**contents.damaged}
        | {name: "it was not asked for" for name in have if name not in new}
        | {old: why[name] for old, name in new.items() if name in why},
        missing=tuple(name for name in registry.names if name not in found),
        metadata=dict(contents.metadata),
    )


def _loaded_state(
    registry: Registry,
    states: Mapping[str, Mapping[str, Any]],
    averages: Mapping[str, Mapping[str, Any]],
    options: Options,
) -> Loaded:
    """What to take over of loaded state, if it fits.

    Args:
        registry: Who takes it over.
        states: The state by name.
        averages: That of averages, of some of the names.
        options: How it is taken over.

    Raises:
        ValueError: State does not fit, and ``strict`` is on.
    """
    found = Loaded({}, {}, [], {}, {})

    def admit(name: str, stored: Mapping[str, Any], average: Average | None) -> None:
        host = stored if options.own else on_host(name, stored)
        host = {**host, "cast": True} if options.cast else host
        if average is None:
            _admit(registry, name, host, found)
        else:
            _admit_average(name, host, average, found)

    for name, stored in states.items():
        try:
            admit(name, stored, None)
        except ValueError as error:
            if options.strict:
                raise
            found.refused[name] = str(error)
    kept = {name: registry.average_of(name) for name in averages if name not in found.refused}
    odd = [name for name, average in kept.items() if average is None]
    if odd and options.strict:
        raise ValueError(
            f"the loaded state has averages of {', '.join(map(repr, odd))}; expected none, for "
            "names of which this optimizer keeps none: give it an average"
        )
    for name, average in kept.items():
        try:
            if average is None:
                raise ValueError("this optimizer keeps none of it")
            admit(name, averages[name], average)
        except ValueError as error:
            if options.strict:
                raise
            found.without[name] = str(error)
    return found


def _admit(registry: Registry, name: str, stored: Mapping[str, Any], found: Loaded) -> None:
    """Add the state of a name to what is taken over.

    Raises:
        ValueError: It does not fit.
    """
    if name not in registry:
        if isinstance(registry.rule, Rule):
            check_slot_names(name, stored, registry.rule)
            found.reached.append((registry.rule, stored["rule"]))
        found.pending[name] = stored
        return
    rule, clip, _, _, layout, average = registry.entry(name)
    entry = restored(name, stored, rule, clip, layout, registry.masters)
    # An average belongs to the state that it was saved with.
    kept = None if average is None else average.rule
    found.entries[name] = entry._replace(average=restored_average(name, None, kept, layout))
    found.reached.append((rule, stored["rule"]))


def _admit_average(name: str, stored: Mapping[str, Any], average: Average, found: Loaded) -> None:
    """Likewise the average of a name, of whose state it is known that it is taken over."""
    if name in found.entries:
        entry = found.entries[name]
        mean = restored(name, stored, average, None, entry.layout)
        found.entries[name] = entry._replace(average=mean)
        found.reached.append((average, stored["rule"]))
    else:
        check_slot_names(name, stored, average)
        found.pending[name] = {**found.pending[name], "average": stored, "keeps": average}


def _take_over(registry: Registry, loaded: Loaded, steps: int | None, ahead: bool) -> None:
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
