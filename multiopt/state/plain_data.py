"""State dicts: the saved state as plain data, in dicts by name.

``state_dict`` makes one of a registry; ``contents_of`` reads the same records from one that a file
would give:

>>> import multiopt as mo
>>> import numpy as np
>>> from multiopt.state.plain_data import contents_of
>>> opt = mo.Optimizer(mo.SGD(momentum=0.5))
>>> _ = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
>>> contents_of(opt.state_dict()).saved["w"].step
1
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from multiopt.backend import Array, backend_named
from multiopt.errors import CheckpointError
from multiopt.layout import Layout
from multiopt.rules.average import AVERAGE
from multiopt.schedules.description import separated
from multiopt.state.contents import Contents
from multiopt.state.document import (
    TABLES,
    VERSION,
    check_clock,
    check_observed,
    check_skips,
    check_steps,
    check_version,
)
from multiopt.state.fit import SHOWN_AVERAGE
from multiopt.state.metadata import check_nesting
from multiopt.state.plateaus import pending_now
from multiopt.state.record import Form, Saved, plain, plain_entry, saved_of
from multiopt.state.settings import described_settings, settings_in
from multiopt.state.tables import held

if TYPE_CHECKING:
    from multiopt.registry import Registry

__all__ = [
    "SECTIONS",
    "check_sections",
    "check_state_dict",
    "contents_of",
    "saved_in",
    "shown",
    "state_dict",
]

#: The sections of a state dict that hold entries by name, and whether each is required.
SECTIONS = {"entries": True, "pending": True, "averages": False, "pending_averages": False}


def shown(layout: Layout) -> Callable[[Array], Array]:
    """Return a function that copies a slot of a parameter for the user, in the same library."""
    backend = backend_named(layout.library)
    copy = partial(backend.export, layout=layout)
    if layout.is_complex:
        return lambda slot: backend.as_complex(copy(slot))
    return copy


def state_dict(registry: "Registry") -> dict[str, Any]:
    """The state dict of a registry; its arrays are copies."""
    entries: dict[str, Any] = dict.fromkeys(registry.names)
    parts: dict[str, dict[str, Any]] = {"entries": entries, "pending": {}}
    averages: dict[str, dict[str, Any]] = {"averages": {}, "pending_averages": {}}
    for table in held(registry):
        form = table.form
        counts = table.counts or [0] * len(table.names)
        for name, step, count in zip(table.names, table.steps, counts, strict=True):
            group, row = registry.row_of(name)
            show, slots = shown(group.layout_at(row)), group.slots_at(row)
            own_slots = {slot: show(slots[slot]) for slot in form.own}
            entries[name] = plain_entry(form.rule, step, own_slots)
            if form.average is not None:
                mean = {SHOWN_AVERAGE: show(slots[AVERAGE])}
                averages["averages"][name] = plain_entry(form.average, count, mean)
    means = averages["averages"]
    averages["averages"] = {name: means[name] for name in entries if name in means}
    for name, saved in pending_now(registry).items():
        parts["pending"][name], average = plain(saved)
        if average is not None:
            averages["pending_averages"][name] = average
    skips = {name: list(counts) for name, counts in registry.skips.items()}
    settings = described_settings(registry.settings)
    return {
        "version": VERSION,
        "steps": registry.steps,
        **parts,
        **(averages if registry.average is not None else {}),
        **({"skips": skips} if skips else {}),
        **({"settings": settings} if settings else {}),
    }


def contents_of(
    state_dict: Mapping[str, Any], wanted: Collection[str] | None = None, strict: bool = True
) -> Contents:
    """Read the records in a state dict.

    Args:
        state_dict: A state dict that has passed ``check_state_dict``.
        wanted: The names whose state to read; by default all.
        strict: Whether unusable state is an error; otherwise it is listed as unfit.

    Raises:
        ValueError: State is unusable, and ``strict`` is true.
    """
    saved, unfit = dict[str, dict[str, Saved]](pending={}, entries={}), {}
    forms: dict[Hashable, Form] = {}
    for part, name, entry, average in saved_in(state_dict):
        if wanted is None or name in wanted:
            try:
                saved[part][name] = saved_of(name, entry, average, forms)
            except ValueError as error:
                if strict:
                    raise
                unfit[name] = str(error)
    skips = check_skips(state_dict.get("skips", {}))
    names = [name for part in (*SECTIONS, "skips") for name in state_dict.get(part, ())]
    merged = saved["pending"] | saved["entries"]
    steps = state_dict.get("steps")
    settings = settings_in(state_dict.get("settings"))
    return Contents(list(dict.fromkeys(names)), merged, steps, skips, {}, unfit, settings)


def saved_in(
    state_dict: Mapping[str, Any],
) -> Iterator[tuple[str, str, Mapping[str, Any], Mapping[str, Any] | None]]:
    """For each name in a state dict: its part, name, entry, and the entry of its average."""
    averages = {**state_dict.get("pending_averages", {}), **state_dict.get("averages", {})}
    current = state_dict["version"] >= TABLES
    for part in ("entries", "pending"):
        for name, entry in state_dict[part].items():
            average = averages.get(name)
            if not current:
                entry = _renewed(name, entry)
                average = None if average is None else _renewed(name, average)
            yield part, name, entry, average


def _renewed(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an entry of an earlier version: its schedules still hold the Plateau states."""
    rule, observed = dict(entry["rule"]), dict[str, Any]()
    try:
        check_nesting(rule)
        schedules = rule.get("schedules", {})
        for key, schedule in schedules.items():
            description, seen = separated(schedule, key)
            rule["schedules"] = {**rule["schedules"], key: description}
            observed |= seen
    except ValueError as error:
        raise CheckpointError(f"the state of {name!r}: {error}") from error
    return {**entry, "rule": rule, "plateaus": observed}


def check_state_dict(state_dict: Any) -> None:
    """Raise an error unless a value has the form of a state dict.

    Raises:
        CheckpointError: It is malformed.
    """
    if not isinstance(state_dict, Mapping) or "version" not in state_dict:
        raise CheckpointError("expected a state dict with 'version', 'entries' and 'pending'")
    check_version(state_dict)
    check_steps(state_dict)
    check_sections(state_dict)
    check_skips(state_dict.get("skips", {}))


def check_sections(state_dict: Mapping[str, Any]) -> None:
    """Raise an error unless the sections of a state dict have the right form.

    Raises:
        CheckpointError: A section is malformed.
    """
    for part, required in SECTIONS.items():
        entries = state_dict.get(part, None if required else {})
        if not isinstance(entries, Mapping):
            raise CheckpointError(
                f"expected a mapping under {part!r}; got {type(entries).__name__}"
            )
        for name, entry in entries.items():
            _check_entry(part, name, entry)
    parameters = state_dict["entries"].keys() | state_dict["pending"].keys()
    for part in SECTIONS:
        if SECTIONS[part] is False and (odd := state_dict.get(part, {}).keys() - parameters):
            raise CheckpointError(
                f"there are averages of {sorted(odd)}; expected them of names that have an entry"
            )


def _check_entry(part: str, name: Any, entry: Any) -> None:
    if not isinstance(name, str):
        raise CheckpointError(f"expected names under {part!r} to be strings; got {name!r}")
    step = entry.get("step") if isinstance(entry, Mapping) else None
    check_clock(name, step)
    slots, rule = entry.get("slots"), entry.get("rule")
    if not isinstance(slots, Mapping) or not isinstance(rule, Mapping):
        raise CheckpointError(f"the state of {name!r} needs mappings under 'slots' and 'rule'")
    if not all(isinstance(key, str) for key in (*slots, *rule)):
        raise CheckpointError(f"the state of {name!r} has a slot or setting without a name")
    if not isinstance(rule.get("schedules", {}), Mapping):
        raise CheckpointError(f"the state of {name!r} needs a mapping under 'schedules'")
    check_observed(name, entry.get("plateaus", {}))
