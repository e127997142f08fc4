"""The saved state of a name: one record, wherever it comes from and wherever it goes.

>>> import numpy as np
>>> from multiopt.state.record import plain, saved_of
>>> entry = {"rule": {"name": "SGD"}, "step": 3, "slots": {"momentum_buffer": np.ones((2, 1))}}
>>> saved = saved_of("w", entry)
>>> saved.step, saved.form.slots[0].shape, saved.arrays[0].tolist()
(3, (2, 1), [1.0, 1.0])
>>> plain(saved)[0]["slots"]["momentum_buffer"].shape
(2, 1)
"""

import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from multiopt.backend import Array, backend_for, backend_named
from multiopt.engine import Group
from multiopt.entry import Entry
from multiopt.layout import Layout, as_real
from multiopt.rules import Rule
from multiopt.rules.average import AVERAGE, Average
from multiopt.schedules import Plateau, Schedule
from multiopt.schedules.description import described, observers
from multiopt.schedules.description import plain as plain_value
from multiopt.schedules.plateau import is_observed
from multiopt.state.fit import SHOWN_AVERAGE, check_average, check_fit, check_slot_names
from multiopt.step.clip import Clip

__all__ = [
    "Description",
    "Form",
    "Record",
    "Saved",
    "Slot",
    "described_rule",
    "description",
    "entry_of",
    "entry_on_host",
    "observe",
    "plain",
    "plain_entry",
    "resumed",
    "saved_of",
    "set_clocks",
    "slots_on_host",
    "without_average",
]


class Slot(NamedTuple):
    """The form of a saved slot.

    Attributes:
        name: Its name; that of a chained rule for the slot of an average.
        shape: Its shape, parts of complex ones included.
        dtype: ``"float32"`` or ``"float64"``.
        library: The library in which it came.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    library: str = "numpy"


class Description(NamedTuple):
    """A rule, or an average, as plain data.

    Attributes:
        settings: Its name, its hyperparameters at a step, and its schedules.
        observed: By its place in the schedules, what each ``Plateau`` has seen.
    """

    settings: Mapping[str, Any]
    observed: Mapping[str, Mapping[str, Any]]


class Form(NamedTuple):
    """What is the same for many names: those of a table in a file share one.

    Attributes:
        rule: The rule that was saved, which is only looked at.
        slots: The slots, in the order of ``Saved.arrays``.
        is_complex: Whether they are the parts of complex ones, along their last axis.
        average: The average that was saved, whose slot is among them.
        cast: Whether they are converted to the dtype that their parameter needs.
    """

    rule: Description
    slots: tuple[Slot, ...]
    is_complex: bool = False
    average: Description | None = None
    cast: bool = False

    @property
    def own(self) -> list[str]:
        """The names of the slots, but for that of the average."""
        return [slot.name for slot in self.slots if slot.name != AVERAGE]


class Saved(NamedTuple):
    """The saved state of a name.

    Attributes:
        form: What it has in common with others.
        step: Its clock.
        arrays: Its slots on the host, each with one axis, in possession.
        seen: How many steps its average has seen.
        keeps: What average the optimizer that has loaded it keeps of the name.
    """

    form: Form
    step: int
    arrays: tuple[np.ndarray, ...]
    seen: int = 0
    keeps: Average | None = None

    @property
    def is_unstepped(self) -> bool:
        """Whether it is of a parameter before its first step, which needs no slots."""
        return self.step == 0 and not self.form.own


#: The part of a file or a state dict, the name, the record, and by slot what is damaged.
Record: TypeAlias = tuple[str, str, Saved, dict[str, str]]


# Descriptions


def description(rule: Rule, step: int, count: int | None = None) -> Description:
    """A rule as plain data.

    Args:
        rule: The rule.
        step: How many steps its parameter has taken.
        count: How many steps the optimizer has taken; if left out, as many.
    """
    places = [observer for name in rule.ranges for observer in observers(getattr(rule, name), name)]
    states = {place: plateau.state() for place, plateau in places}
    observed = {place: state for place, state in states.items() if is_observed(state)}
    return Description(described_rule(rule, step, count), observed)


def described_rule(rule: Rule, step: int, count: int | None = None) -> dict[str, Any]:
    """The words of ``description``."""
    try:
        current = rule.at(max(step, 1), None if count is None else max(count, 1))
    except ValueError:
        # State must not be lost over a schedule that gives no number for this step.
        current = rule
    hyperparameters = {f.name: plain_value(getattr(current, f.name)) for f in fields(current)}
    schedules = {}
    for name in rule.ranges:
        value = getattr(rule, name)
        parts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, Schedule) for part in parts):
            schedules[name] = described(value)
    return {
        "name": type(rule).__name__,
        **hyperparameters,
        **({"schedules": schedules} if schedules else {}),
    }


def observe(
    rule: Rule, observed: Mapping[str, Mapping[str, Any]], ahead: bool = False
) -> list[tuple[Plateau, dict[str, Any]]]:
    """Give each ``Plateau`` of a rule what the one that was saved in its place has seen.

    Args:
        rule: The rule.
        observed: By place, what those have seen.
        ahead: Whether only those that have seen less than that take it.

    Returns:
        Those that took it, with what they had seen before.
    """
    before: list[tuple[Plateau, dict[str, Any]]] = []
    for name in rule.ranges if observed else ():
        for place, plateau in observers(getattr(rule, name), name):
            state = observed.get(place)
            if state is not None and not (ahead and plateau.observed >= state["observed"]):
                before.append((plateau, plateau.state()))
                plateau.load_state(state)
    return before


# Plain data


def saved_of(
    name: str, entry: Mapping[str, Any], average: Mapping[str, Any] | None = None
) -> Saved:
    """The record of an entry of a state dict, with slots of its own.

    Args:
        name: That of the parameter.
        entry: The entry, which has the form of one. Where it has a true ``"complex"``, its slots
            are the parts of complex ones.
        average: That of its average.

    Raises:
        ValueError: A slot is no array that a rule could have, or the rule's description no plain
            data.
    """
    slots_found = [_on_host(name, slot, array) for slot, array in entry["slots"].items()]
    kinds = {layout.is_complex for _, layout, _ in slots_found}
    if len(kinds) > 1:
        raise ValueError(
            f"the state of {name!r} has slots of no use: some are complex, and others are not"
        )
    rule, mean, count = _described(name, entry), None, 0
    if average is not None:
        check_slot_names(name, average["slots"], average["step"], average["rule"], Average())
        count = average["step"]
        for array in average["slots"].values():
            slots_found.append(_on_host(name, AVERAGE, array))
            mean = _described(name, average)
    slots = tuple(
        Slot(slot, x.storage_shape, x.storage_dtype, x.library) for slot, x, _ in slots_found
    )
    is_complex = bool(entry.get("complex")) or any(
        layout.is_complex for _, layout, _ in slots_found
    )
    arrays = tuple(array for _, _, array in slots_found)
    return Saved(Form(rule, slots, is_complex, mean), entry["step"], arrays, count)


def _on_host(name: str, slot: str, array: Any) -> tuple[str, Layout, np.ndarray]:
    try:
        backend = backend_for(array, f"slot {slot!r}")
        layout = backend.layout(array, f"slot {slot!r}")
        if layout.storage_dtype != layout.compute_dtype:
            raise ValueError(
                f"slot {slot!r} has dtype {layout.storage_dtype}; expected float32 or float64"
            )
        host = backend.to_host(array)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state of {name!r} has a slot of no use: {error}") from error
    if layout.is_complex:
        host = as_real(host)
    # Compiled code knows the byte order of the machine only.
    return slot, layout, np.ascontiguousarray(host, layout.storage_dtype).reshape(-1)


def _described(name: str, entry: Mapping[str, Any]) -> Description:
    parts = [dict(entry["rule"]), dict(entry.get("plateaus", {}))]
    try:
        return Description(*json.loads(json.dumps(parts, allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the rule in the state of {name!r} is no plain data: {error}") from error


def plain(saved: Saved) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The entries that a state dict has for a record and for its average, with copies.

    Slots are arrays of the libraries in which they came. One that nothing has imported, in a
    process that has unpickled the state, is not imported for it: those are NumPy arrays, like all
    that came from a file.
    """
    form, slots = saved.form, {}
    for slot, array in zip(form.slots, saved.arrays, strict=True):
        host = array.reshape(slot.shape)
        is_imported = slot.library.partition(".")[0] in sys.modules
        library = backend_named(slot.library if is_imported else "numpy")
        slots[slot.name] = library.export(
            backend_named("numpy").as_complex(host) if form.is_complex else host
        )
    return _entries(saved, slots)


def entry_on_host(saved: Saved) -> dict[str, Any]:
    """The entry of a record with its own arrays, those of complex slots in parts.

    That says ``"complex"``, and has the entry of the average, if there is one, under ``"average"``.
    """
    entry, average = _entries(saved, slots_on_host(saved))
    entry["complex"] = saved.form.is_complex
    return entry if average is None else {**entry, "average": average}


def _entries(saved: Saved, slots: dict[str, Array]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The entries of a record and of its average; the slots hold that of the average as well."""
    form, mean, average = saved.form, slots.pop(AVERAGE, None), None
    if form.average is not None:
        average = plain_entry(form.average, saved.seen, {SHOWN_AVERAGE: mean})
    return plain_entry(form.rule, saved.step, slots), average


def slots_on_host(saved: Saved) -> dict[str, np.ndarray]:
    """The slots of a record by name, in the parts of complex ones."""
    pairs = zip(saved.form.slots, saved.arrays, strict=True)
    return {slot.name: array.reshape(slot.shape) for slot, array in pairs}


def plain_entry(description: Description, step: int, slots: Mapping[str, Array]) -> dict[str, Any]:
    """An entry of a state dict; its description is a copy."""
    entry = {"rule": deepcopy(description.settings), "step": step, "slots": slots}
    return {**entry, "plateaus": deepcopy(description.observed)} if description.observed else entry


def without_average(saved: Saved) -> Saved:
    """A record without the average in it."""
    others = [k for k, slot in enumerate(saved.form.slots) if slot.name != AVERAGE]
    slots = tuple(saved.form.slots[k] for k in others)
    form = saved.form._replace(slots=slots, average=None)
    return Saved(form, saved.step, tuple(saved.arrays[k] for k in others))


# Rows


def resumed(
    group: Group, saved: Sequence[Saved | None], shapes: Sequence[tuple[int, ...]]
) -> np.ndarray:
    """New rows of a group with the slots of saved state that fits; their clocks are zero.

    Args:
        group: The group.
        saved: The state, of whose arrays the group takes possession; None for what starts anew.
        shapes: The shapes of the parameters.
    """
    if not any(saved):
        return group.add(shapes)
    # By form, where the slots of the group are.
    places: dict[Hashable, list[int | None]] = {}
    slots = []
    for record, shape in zip(saved, shapes, strict=True):
        form, arrays = (None, ()) if record is None else (record.form, record.arrays)
        # Which slots a rule that is not elementwise has, the shape may decide.
        key = id(form), None if group.rule.elementwise else shape
        if key not in places:
            have = [] if form is None else [slot.name for slot in form.slots]
            names = group.slot_names(shape)
            places[key] = [have.index(name) if name in have else None for name in names]
        slots.append([None if k is None else arrays[k] for k in places[key]])
    return group.add(shapes, slots)


def set_clocks(group: Group, rows: np.ndarray, saved: Sequence[Saved | None]) -> None:
    """Give new rows, which have their numbers, the clocks of saved state."""
    if any(saved):
        steps = [0 if record is None else record.step for record in saved]
        group.set_clocks(rows, steps, [0 if record is None else record.seen for record in saved])


def entry_of(
    name: str,
    saved: Saved,
    rule: Rule,
    clip: Clip | None,
    layout: Layout,
    masters: bool,
    average: Average | None,
) -> Entry:
    """An entry with saved state, of whose arrays it takes possession.

    Args:
        name: The name.
        saved: The state.
        rule: Its rule.
        clip: Its clip.
        layout: The layout of its parameter.
        masters: Whether 16-bit parameters have master copies.
        average: The average that is kept of it.

    Raises:
        ValueError: The state does not fit.
    """
    check_fit(name, saved, rule, layout, masters)
    slots = slots_on_host(saved)
    mean, average_entry = slots.pop(AVERAGE, None), None
    if average is not None:
        average_entry = Entry(average, None, 0, {}, layout)
        if mean is not None:
            check_average(name, saved, layout)
            average_entry = average_entry._replace(step=saved.seen, slots={SHOWN_AVERAGE: mean})
    return Entry(rule, clip, saved.step, slots, layout, average_entry)
