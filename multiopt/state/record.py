"""The saved state of one name as a record, wherever it comes from and wherever it goes.

A ``Saved`` holds what differs between names: the clock and the arrays. Everything that many names
share (the rule, the slots' names, shapes and dtypes) is its ``Form``. Arrays are NumPy arrays of
one axis; complex ones are stored as their real and imaginary parts along a last axis of two.

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
from multiopt.schedules import Schedule
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
    "plain",
    "plain_entry",
    "resumed",
    "saved_of",
    "set_clocks",
    "slots_on_host",
    "without_average",
]


class Slot(NamedTuple):
    """The name, the shape and the dtype of a saved slot.

    Attributes:
        name: The name of the slot; for an average, the name it has in the chained rule.
        shape: The shape of the stored array, with the axis of parts if it is complex.
        dtype: ``"float32"`` or ``"float64"``.
        library: The array library that it came from.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    library: str = "numpy"


class Description(NamedTuple):
    """A rule, or an average, as plain data.

    Attributes:
        settings: Its name, its hyperparameters at some step, and its schedules.
        observed: The state of each ``Plateau``, by its place in the schedules.
    """

    settings: Mapping[str, Any]
    observed: Mapping[str, Mapping[str, Any]]


class Form(NamedTuple):
    """What many names have in common; all names of a table in a file share one form.

    Attributes:
        rule: The saved rule; it is compared and reported, never used.
        slots: The slots, in the order of ``Saved.arrays``.
        is_complex: Whether the arrays are the parts of complex slots, along their last axis.
        average: The saved average, if there is one; its slot is among the slots.
        cast: Whether the slots are to be converted to the dtype that their parameter needs.
    """

    rule: Description
    slots: tuple[Slot, ...]
    is_complex: bool = False
    average: Description | None = None
    cast: bool = False

    @property
    def own(self) -> list[str]:
        """The names of the slots, except for the average's."""
        return [slot.name for slot in self.slots if slot.name != AVERAGE]


class Saved(NamedTuple):
    """The saved state of a name.

    Attributes:
        form: What it has in common with other names.
        step: The clock.
        arrays: The slots on the host, each with one axis; whoever takes the record owns them.
        seen: How many steps the average has seen.
        keeps: The average that the optimizer which loaded it keeps for this name.
    """

    form: Form
    step: int
    arrays: tuple[np.ndarray, ...]
    seen: int = 0
    keeps: Average | None = None

    @property
    def is_unstepped(self) -> bool:
        """Whether its parameter has taken no step yet, so that it needs no slots."""
        return self.step == 0 and not self.form.own


#: The part of the file or state dict, the name, the record, and the reasons by damaged slot.
Record: TypeAlias = tuple[str, str, Saved, dict[str, str]]


# Descriptions


def description(rule: Rule, step: int, count: int | None = None) -> Description:
    """Describe a rule as plain data, with the state of its ``Plateau`` schedules.

    Args:
        rule: The rule.
        step: How many steps its parameter has taken.
        count: How many steps the optimizer has taken; by default as many.
    """
    places = [observer for name in rule.ranges for observer in observers(getattr(rule, name), name)]
    states = {place: plateau.state() for place, plateau in places}
    observed = {place: state for place, state in states.items() if is_observed(state)}
    return Description(described_rule(rule, step, count), observed)


def described_rule(rule: Rule, step: int, count: int | None = None) -> dict[str, Any]:
    """The name, the hyperparameters and the schedules of a rule, as ``description`` has them."""
    try:
        current = rule.at(max(step, 1), None if count is None else max(count, 1))
    except ValueError:
        # Do not lose state because a schedule has no value at this step.
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


# Plain data


def saved_of(
    name: str,
    entry: Mapping[str, Any],
    average: Mapping[str, Any] | None = None,
    forms: dict[Hashable, Form] | None = None,
) -> Saved:
    """Make a record from an entry of a state dict, with copies of its slots.

    Args:
        name: The name of the parameter.
        entry: A well-formed entry. If its ``"complex"`` is true, its slots are the real and
            imaginary parts of complex ones.
        average: The entry of its average.
        forms: The forms of other records, by what is the same for them. Whoever makes many passes
            one dict, so that names that are alike share a form, as those of a file do.

    Raises:
        ValueError: A slot is not an array that a rule can have, or the description of the rule is
            not plain data.
    """
    slots_found = [_on_host(name, slot, array) for slot, array in entry["slots"].items()]
    kinds = {layout.is_complex for _, layout, _ in slots_found}
    if len(kinds) > 1:
        raise ValueError(
            f"the state of {name!r} mixes complex and real slots; expected all of one kind"
        )
    texts, count = [_text(name, entry)], 0
    if average is not None:
        check_slot_names(name, average["slots"], average["step"], average["rule"], Average())
        count = average["step"]
        for array in average["slots"].values():
            slots_found.append(_on_host(name, AVERAGE, array))
            texts.append(_text(name, average))
    slots = tuple(
        Slot(slot, x.storage_shape, x.storage_dtype, x.library) for slot, x, _ in slots_found
    )
    is_complex = bool(entry.get("complex")) or any(
        layout.is_complex for _, layout, _ in slots_found
    )
    arrays = tuple(array for _, _, array in slots_found)
    forms, key = {} if forms is None else forms, (*texts, slots, is_complex)
    if key not in forms:
        rule, *mean = (Description(*json.loads(text)) for text in texts)
        forms[key] = Form(rule, slots, is_complex, mean[0] if mean else None)
    return Saved(forms[key], entry["step"], arrays, count)


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
        raise ValueError(f"the state of {name!r} has an unusable slot: {error}") from error
    if layout.is_complex:
        host = as_real(host)
    # Compiled code needs the machine's own byte order.
    return slot, layout, np.ascontiguousarray(host, layout.storage_dtype).reshape(-1)


def _text(name: str, entry: Mapping[str, Any]) -> str:
    """The description of the rule of an entry, as JSON."""
    parts = [dict(entry["rule"]), dict(entry.get("plateaus", {}))]
    try:
        return json.dumps(parts, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the rule in the state of {name!r} is not plain data: {error}") from error


def plain(saved: Saved) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Make the entries of a state dict for a record and for its average, with copies.

    Slots are arrays of the library that they came from. A library that this process has not
    imported (it may have unpickled the state) is not imported now: its slots become NumPy arrays,
    like all slots that came from a file.
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
    """Make an entry that shares the arrays of a record; complex slots stay in their two parts.

    Its ``"complex"`` says whether they are. The average, if there is one, is under ``"average"``.
    """
    entry, average = _entries(saved, slots_on_host(saved))
    entry["complex"] = saved.form.is_complex
    return entry if average is None else {**entry, "average": average}


def _entries(saved: Saved, slots: dict[str, Array]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Make the entries of a record and of its average, whose slot is one of the given slots."""
    form, mean, average = saved.form, slots.pop(AVERAGE, None), None
    if form.average is not None:
        average = plain_entry(form.average, saved.seen, {SHOWN_AVERAGE: mean})
    return plain_entry(form.rule, saved.step, slots), average


def slots_on_host(saved: Saved) -> dict[str, np.ndarray]:
    """The slots of a record by name; complex ones as real arrays of their two parts."""
    pairs = zip(saved.form.slots, saved.arrays, strict=True)
    return {slot.name: array.reshape(slot.shape) for slot, array in pairs}


def plain_entry(description: Description, step: int, slots: Mapping[str, Array]) -> dict[str, Any]:
    """Make an entry of a state dict, with a copy of the rule's description."""
    entry = {"rule": deepcopy(description.settings), "step": step, "slots": slots}
    return {**entry, "plateaus": deepcopy(description.observed)} if description.observed else entry


def without_average(saved: Saved) -> Saved:
    """Return a record without its average."""
    others = [k for k, slot in enumerate(saved.form.slots) if slot.name != AVERAGE]
    slots = tuple(saved.form.slots[k] for k in others)
    form = saved.form._replace(slots=slots, average=None)
    return Saved(form, saved.step, tuple(saved.arrays[k] for k in others))


# Rows


def resumed(
    group: Group, saved: Sequence[Saved | None], shapes: Sequence[tuple[int, ...]]
) -> np.ndarray:
    """Add rows with saved slots to a group; their clocks are still zero.

    Args:
        group: The group.
        saved: Saved state that fits, whose arrays the group takes over; None for a row that
            starts from scratch.
        shapes: The shapes of the parameters.
    """
    if not any(saved):
        return group.add(shapes)
    # For each form, the positions in it of the group's slots.
    places: dict[Hashable, list[int | None]] = {}
    slots = []
    for record, shape in zip(saved, shapes, strict=True):
        form, arrays = (None, ()) if record is None else (record.form, record.arrays)
        # The slots of a rule that is not elementwise may depend on the shape.
        key = id(form), None if group.rule.elementwise else shape
        if key not in places:
            have = [] if form is None else [slot.name for slot in form.slots]
            names = group.slot_names(shape)
            places[key] = [have.index(name) if name in have else None for name in names]
        slots.append([None if k is None else arrays[k] for k in places[key]])
    return group.add(shapes, slots)


def set_clocks(group: Group, rows: np.ndarray, saved: Sequence[Saved | None]) -> None:
    """Set the clocks of new rows, whose other columns are filled, to those of saved state."""
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
    """Build an entry from saved state; it takes ownership of the arrays.

    Args:
        name: The name of the parameter.
        saved: The saved state.
        rule: The rule of the parameter.
        clip: The clip of the parameter.
        layout: The layout of the parameter.
        masters: Whether 16-bit parameters have master copies.
        average: The average that is kept for the parameter.

    Raises:
        ValueError: The saved state does not fit the parameter.
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
