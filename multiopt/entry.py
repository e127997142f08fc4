"""What the registry holds for one name, and its forms outside: plain data and loaded state."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any, NamedTuple, cast

import numpy as np

from multiopt.averaging import AVERAGE, Average, Averaged
from multiopt.backend import Array, backend_of, named, zeros
from multiopt.engine import MASTER
from multiopt.errors import brief
from multiopt.layout import Layout, parts_of
from multiopt.rules import Rule
from multiopt.rules.rule import plain_numbers, with_numbers
from multiopt.schedules import Plateau, Schedule
from multiopt.schedules.description import check_description, plain, plateaus
from multiopt.schedules.description import described as described_schedule
from multiopt.step.clip import Clip

__all__ = [
    "Changed",
    "Entry",
    "all_slots",
    "chained",
    "changed",
    "check_average",
    "check_clip",
    "check_rule",
    "check_slot_names",
    "chosen",
    "chosen_average",
    "chosen_clip",
    "described",
    "described_rule",
    "described_waiting",
    "in_parts",
    "on_host",
    "restored",
    "restored_average",
    "restored_plateaus",
    "slot_shapes",
    "unchained",
    "with_rule",
]


class Entry(NamedTuple):
    """What is held of one name, as a record.

    Attributes:
        rule: Its rule.
        clip: Its clip.
        step: Its clock.
        slots: Its slots by name, the master copy of a 16-bit parameter among them; empty for slots
            that are all zero.
        layout: The layout of its parameter.
        average: What is held of its average, if one is kept, as of a name of its own; of step 0
            before the first step that it has seen.
    """

    rule: Rule
    clip: Clip | None
    step: int
    slots: dict[str, Array]
    layout: Layout
    average: "Entry | None" = None

    def converted(self, convert: Callable[[Array], Array]) -> dict[str, Array]:
        """The slots, each converted."""
        return {name: convert(slot) for name, slot in self.slots.items()}

    def with_converted(self, convert: Callable[[Array], Array]) -> "Entry":
        """The same with slots converted, the average's too."""
        average = None if self.average is None else self.average.with_converted(convert)
        return self._replace(slots=self.converted(convert), average=average)


def chained(entry: Entry) -> Rule:
    """What an engine computes for an entry: its rule, with its average if it has one."""
    if entry.average is None:
        return entry.rule
    average = cast("Average", entry.average.rule)
    return Averaged(entry.rule, average, since=entry.step - entry.average.step)


def unchained(entry: Entry) -> Entry:
    """An entry of what an engine computes, with rule, slots and average apart."""
    chain = entry.rule
    if not isinstance(chain, Averaged):
        return entry
    slots, count = dict(entry.slots), entry.step - int(chain.since)
    mean = {"average": slots.pop(AVERAGE)}
    average = Entry(chain.average, None, count, mean if count else {}, entry.layout)
    return entry._replace(rule=chain.rule, slots=slots, average=average)


def all_slots(entry: Entry, names: Iterable[str]) -> list[Array]:
    """The slots of an entry as an engine has them: none if all are zero.

    Args:
        entry: The entry.
        names: Their names, in their order.
    """
    have = dict(entry.slots)
    if entry.average is not None and entry.average.slots:
        have[AVERAGE] = entry.average.slots["average"]
    if not have:
        return []
    shapes, layout = chained(entry).slot_shapes(entry.layout.shape), entry.layout
    return [
        have[name] if name in have else zeros(layout.with_shape(shapes.get(name, layout.shape)))
        for name in names
    ]


def check_rule(rule: Any) -> None:
    """Refuse what is neither a rule nor a callable.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(rule, type) or not (isinstance(rule, Rule) or callable(rule)):
        raise TypeError(f"rule must be a rule or a callable name -> rule; got {brief(rule)}")


def check_clip(clip: Any) -> None:
    """Refuse what is neither a clip, nor a callable, nor None.

    Raises:
        TypeError: It is none of them.
    """
    if isinstance(clip, type) or not (clip is None or isinstance(clip, Clip) or callable(clip)):
        raise TypeError(f"clip must be a Clip, a callable name -> Clip or None; got {brief(clip)}")


def check_average(average: Any) -> None:
    """Refuse what is neither an average, nor a callable, nor None.

    Raises:
        TypeError: It is none of them.
    """
    known = average is None or isinstance(average, Average) or callable(average)
    if isinstance(average, type) or not known:
        raise TypeError(
            f"average must be an Average, a callable name -> Average or None; got {brief(average)}"
        )


def chosen_clip(clip: Any, name: str) -> Clip | None:
    """The clip of a name, as ``chosen``."""
    return None if clip is None else chosen(clip, name, Clip, "clip")


def chosen_average(average: Any, name: str) -> Average | None:
    """The average of a name, as ``chosen``."""
    return None if average is None else chosen(average, name, Average, "average")


def chosen(given: Any, name: str, kind: type, what: str) -> Any:
    """The rule or the clip of a name: the one given for all, or what the callable says.

    Raises:
        TypeError: The callable gave something else.
    """
    if isinstance(given, kind):
        return given
    choice = given(name)
    if not isinstance(choice, kind) and not (kind is not Rule and choice is None):
        raise TypeError(
            f"the {what} callable gave {brief(choice)} for parameter {name!r}; expected a "
            f"{kind.__name__}"
        )
    return choice


def slot_shapes(name: str, rule: Rule, layout: Layout) -> dict[str, tuple[int, ...]]:
    """The slots of a parameter, with their shapes.

    Raises:
        ValueError: The rule is not for it.
    """
    if layout.is_complex and not rule.elementwise:
        raise ValueError(
            f"parameter {name!r} is complex; expected a real one, for {type(rule).__name__} treats "
            "it as a whole: give it another rule"
        )
    try:
        return rule.slot_shapes(layout.shape)
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from error


def with_rule(name: str, entry: Entry, rule: Rule) -> Entry:
    """An entry under another rule: slots that both have are kept, others start at zero.

    Where the new rule has slots and none is kept, the clock starts with them: Adam's corrections of
    a bias towards zero belong to the steps that its averages have seen.

    Raises:
        ValueError: The rule is not for parameters of this shape.
    """
    layout = entry.layout
    old = entry.rule.slot_shapes(layout.shape)
    new = slot_shapes(name, rule, layout)
    if list(new.items()) == list(old.items()):
        return entry._replace(rule=rule)
    kept = {slot: entry.slots[slot] for slot, shape in old.items() if new.get(slot) == shape}
    slots = {slot: zeros(layout.with_shape(shape)) for slot, shape in new.items()} | kept
    if MASTER in entry.slots:
        slots[MASTER] = entry.slots[MASTER]
    return entry._replace(rule=rule, slots=slots, step=0 if new and not kept else entry.step)


def changed(
    whose: Callable[[], Sequence[str]] | None, rule: Rule, values: Mapping[str, Any]
) -> Rule:
    """A rule with some hyperparameters changed.

    Args:
        whose: Gives the names whose it is, for messages; None if it is nobody's yet.
        rule: The rule.
        values: The hyperparameters.

    Raises:
        TypeError: The rule has no hyperparameter of that name.
        ValueError: A value is out of range.
    """
    numbers = plain_numbers(rule, values)
    if numbers is not None:
        # To make a rule takes ten times as long.
        return with_numbers(rule, [(name, None) for name in numbers], [*numbers.values()])
    known = [f.name for f in fields(rule)]
    unknown = ", ".join(key for key in values if key not in known)
    try:
        if unknown:
            raise TypeError(
                f"{type(rule).__name__} has no hyperparameter {unknown}; it has {', '.join(known)}"
            )
        return replace(rule, **values)
    except (TypeError, ValueError) as error:
        if whose is None:
            raise
        raise type(error)(f"parameter {whose()[0]!r}: {error}") from error


class Changed:
    """A callable ``name -> rule`` that changes hyperparameters of what another one gives.

    Args:
        given: The other.
        values: The hyperparameters.
    """

    def __init__(self, given: Callable[[str], Rule], values: dict[str, Any]) -> None:
        """Nothing is changed yet."""
        self.given, self.values = given, values
        # The last rules, so that names that share one go on sharing one.
        self._last: list[tuple[Rule, Rule]] = []

    def __call__(self, name: str) -> Rule:
        """The changed rule of a name."""
        rule = chosen(self.given, name, Rule, "rule")
        for old, new in self._last:
            if old is rule:
                return new
        self._last = [(rule, changed(lambda: [name], rule, self.values)), *self._last[:7]]
        return self._last[0][1]

    def __repr__(self) -> str:
        """The callable and the changes."""
        return f"{self.given!r} with {self.values!r}"


def on_host(name: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of a state dict with NumPy slots of its own, and the libraries they came from.

    Args:
        name: That of the parameter.
        stored: The entry.

    Raises:
        ValueError: A slot is no array that a rule could have, or the rule's description no plain
            data.
    """
    slots, libraries = {}, {}
    for slot, array in stored["slots"].items():
        try:
            backend = backend_of(array, f"slot {slot!r}")
            layout = backend.layout(array, f"slot {slot!r}")
            if layout.dtype != layout.compute_dtype:
                raise ValueError(
                    f"slot {slot!r} has dtype {layout.dtype}; expected float32 or float64"
                )
            host = backend.to_host(array)
            # Compiled code knows the byte order of the machine only.
            slots[slot] = host.astype(host.dtype.newbyteorder("="), copy=False)
            libraries[slot] = backend.library
        except (TypeError, ValueError) as error:
            raise ValueError(f"the state of {name!r} has a slot of no use: {error}") from error
    try:
        rule = json.loads(json.dumps(dict(stored["rule"]), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the rule in the state of {name!r} is no plain data: {error}") from error
    return {"rule": rule, "step": stored["step"], "slots": slots, "libraries": libraries}


def described_waiting(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Loaded state that waits, as plain data: copies, slots of the libraries that they came from.

    One that nothing has imported, in a process that has unpickled the state, is not imported for
    it: those are NumPy arrays, like all that came from a file.
    """
    libraries = stored.get("libraries", {})
    slots = {}
    for slot, array in stored["slots"].items():
        library = libraries.get(slot, "numpy")
        is_there = library.partition(".")[0] in sys.modules
        slots[slot] = named(library if is_there else "numpy").shown(array)
    return {"rule": deepcopy(stored["rule"]), "step": stored["step"], "slots": slots}


def in_parts(slots: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Slots, the real and imaginary parts of those that are complex along one more axis."""
    return {name: parts_of(x) if np.iscomplexobj(x) else x for name, x in slots.items()}


def restored(
    name: str,
    stored: Mapping[str, Any],
    rule: Rule,
    clip: Clip | None,
    layout: Layout,
    masters: bool = False,
) -> Entry:
    """An entry from loaded state, of whose slots, NumPy arrays, it takes possession.

    State without a master copy may begin to have one, and
    that of step 0 may have no slots.

    Args:
        name: The name.
        stored: The state.
        rule: Its rule.
        clip: Its clip.
        layout: The layout of its parameter.
        masters: Whether 16-bit parameters have master copies.

    Raises:
        ValueError: A slot does not fit the rule, the shape or the dtype.
    """
    shapes = slot_shapes(name, rule, layout)
    keeps_master = masters and layout.dtype != layout.compute_dtype
    if keeps_master and MASTER in stored["slots"]:
        shapes[MASTER] = layout.shape
    check_slot_names(name, stored, rule, shapes)
    if is_unstepped(stored):
        return Entry(rule, clip, 0, {}, layout)
    arrays = stored["slots"]
    if layout.is_complex:
        arrays = in_parts(arrays)
    if stored.get("cast"):
        # The dtype of a complex slot of a real parameter is an error below.
        dtype = layout.compute_dtype
        with np.errstate(over="ignore"):
            arrays = {
                k: x if np.iscomplexobj(x) else x.astype(dtype, copy=False)
                for k, x in arrays.items()
            }
    for slot, array in arrays.items():
        if array.shape != shapes[slot] or array.dtype != layout.compute_dtype:
            raise ValueError(
                f"the loaded slot {slot!r} of parameter {name!r} has "
                f"{_misfit(array, stored['slots'][slot], shapes[slot], layout)}"
            )
    closed = named(layout.library).closed([arrays[slot] for slot in shapes], layout)
    slots = dict(zip(shapes, closed, strict=True))
    if keeps_master and MASTER not in slots:
        slots[MASTER] = zeros(layout)
    return Entry(rule, clip, stored["step"], slots, layout)


def restored_average(
    name: str, stored: Mapping[str, Any] | None, average: Rule | None, layout: Layout
) -> Entry | None:
    """What is held of an average, if one is kept: loaded state, or no step where there is none.

    Raises:
        ValueError: The state does not fit.
    """
    if average is None:
        return None
    if stored is None:
        return Entry(average, None, 0, {}, layout)
    return restored(name, stored, average, None, layout)


def _misfit(array: np.ndarray, given: np.ndarray, shape: tuple[int, ...], layout: Layout) -> str:
    """What of a loaded slot does not fit, and the remedy.

    Args:
        array: The slot, in parts where the parameter is.
        given: The slot as it was loaded, of which the message speaks.
        shape: The shape it needs.
        layout: That of the parameter.
    """
    is_complex = np.iscomplexobj(given)
    if array.shape == shape and not np.iscomplexobj(array):
        return (
            f"dtype {given.dtype.name}; expected "
            f"{layout.own_dtype if is_complex else layout.compute_dtype}, for a parameter of dtype "
            f"{layout.own_dtype}: load it with cast=True, or forget the name to start anew"
        )
    if is_complex == layout.is_complex:
        return (
            f"shape {given.shape}; expected {layout.own_shape if is_complex else shape} for a "
            f"parameter of shape {layout.own_shape}: forget the name to start anew"
        )
    return (
        f"dtype {given.dtype.name} and shape {given.shape}; expected a "
        f"{'complex' if layout.is_complex else 'real'} one, for a parameter of dtype "
        f"{layout.own_dtype} and shape {layout.own_shape}: forget the name to start anew"
    )


def check_slot_names(
    name: str, stored: Mapping[str, Any], rule: Rule, names: Iterable[str] | None = None
) -> None:
    """Refuse loaded state whose slots are not those of a rule.

    Args:
        name: That of the parameter.
        stored: The state.
        rule: The rule.
        names: Those of its slots, if the shape of the parameter is known.

    Raises:
        ValueError: They are not.
    """
    have, want = sorted(stored["slots"]), sorted(rule.slots if names is None else names)
    if names is None and MASTER in have:
        # Whether its parameter has 16 bits is not known yet.
        want = sorted([*want, MASTER])
    elif MASTER in have and MASTER not in want:
        raise ValueError(
            f"the loaded state of parameter {name!r} has the slot {MASTER!r}; expected none, for "
            "a parameter of 32 or 64 bits or an optimizer without master_weights=True: for one of "
            "16 bits make the optimizer with master_weights=True, else forget the name to start "
            "anew"
        )
    # Which slots a rule that is not elementwise has, the shape may decide.
    known = names is not None or rule.elementwise
    if (have != want if known else not set(have) <= set(want)) and not is_unstepped(stored):
        raise ValueError(
            f"the loaded state of parameter {name!r} has the slots {have} (of "
            f"{stored['rule'].get('name', 'an unknown rule')}); expected {want}, those of its rule "
            f"{rule!r}: load with the rule that was saved, step, then assign opt.rule"
        )


def is_unstepped(stored: Mapping[str, Any]) -> bool:
    """Whether loaded state is that of a parameter before its first step, which needs no slots."""
    return stored["step"] == 0 and not stored["slots"]


def restored_plateaus(
    rule: Rule, stored: Mapping[str, Any], ahead: bool = False
) -> list[tuple[Plateau, dict[str, Any]]]:
    """Give each ``Plateau`` of a rule what a loaded description of a rule says it has seen.

    Args:
        rule: The rule.
        stored: The description.
        ahead: Whether only those that have seen less than that take it.

    Returns:
        Those that took it, with what they had seen before.
    """
    words = stored.get("schedules")
    before: list[tuple[Plateau, dict[str, Any]]] = []
    if not words:
        return before
    for name in rule.ranges:
        for plateau, state in plateaus(getattr(rule, name), words.get(name)):
            if not ahead or plateau.observed < state["observed"]:
                before.append((plateau, plateau.state()))
                plateau.load_state(state)
    return before


def described(
    entry: Entry, convert: Callable[[Array], Array], count: int | None = None
) -> dict[str, Any]:
    """An entry as plain data; ``count`` as for ``described_rule``."""
    return {
        "rule": described_rule(entry.rule, entry.step, count),
        "step": entry.step,
        "slots": entry.converted(convert),
    }


def described_rule(rule: Rule, step: int, count: int | None = None) -> dict[str, Any]:
    """A rule as plain data: its name, its hyperparameters at a step, and its schedules.

    Args:
        rule: The rule.
        step: How many steps its parameter has taken.
        count: How many steps the optimizer has taken; if left out, as many.
    """
    try:
        now = rule.at(max(step, 1), None if count is None else max(count, 1))
    except ValueError:
        # State must not be lost over a schedule that gives no number for this step.
        now = rule
    words = {
        "name": type(rule).__name__,
        **{f.name: plain(getattr(now, f.name)) for f in fields(now)},
    }
    given = {name: getattr(rule, name) for name in rule.ranges}
    schedules = {}
    for name, value in given.items():
        # A Plateau of somebody else has not the state that loading asks of ours.
        with suppress(ValueError):
            if _is_describable(value):
                description = described_schedule(value)
                check_description(description)
                schedules[name] = description
    return {**words, "schedules": schedules} if schedules else words


def _is_describable(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, Schedule) for part in parts)
