"""What the registry holds for one name, and its forms outside: plain data and loaded state."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any

import numpy as np

from multiopt.backend import Array, Layout, backend_of, named
from multiopt.clipping import Clip
from multiopt.rules import Rule

__all__ = [
    "Entry",
    "check_clip",
    "check_rule",
    "check_slot_names",
    "chosen",
    "chosen_clip",
    "described",
    "described_rule",
    "new_entry",
    "on_host",
    "restored",
    "with_rule",
]


@dataclass(slots=True)
class Entry:
    """One parameter of the registry. A step changes its clock and its slots, and nothing else."""

    rule: Rule
    clip: Clip | None
    step: int
    slots: tuple[Array, ...]
    layout: Layout

    def named_slots(self, convert: Callable[[Array], Array]) -> dict[str, Array]:
        """The slots by name, each converted."""
        names = self.rule.slot_shapes(self.layout.shape)
        return dict(zip(names, map(convert, self.slots), strict=True))


def check_rule(rule: Any) -> None:
    """Refuse what is neither a rule nor a callable.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(rule, type) or not (isinstance(rule, Rule) or callable(rule)):
        raise TypeError(f"rule must be a rule or a callable name -> rule; got {rule!r}")


def check_clip(clip: Any) -> None:
    """Refuse what is neither a clip, nor a callable, nor None.

    Raises:
        TypeError: It is none of them.
    """
    if isinstance(clip, type) or not (clip is None or isinstance(clip, Clip) or callable(clip)):
        raise TypeError(f"clip must be a Clip, a callable name -> Clip or None; got {clip!r}")


def chosen_clip(clip: Any, name: str) -> Clip | None:
    """The clip of a name, as ``chosen``."""
    return None if clip is None else chosen(clip, name, Clip, "clip")


def chosen(given: Any, name: str, kind: type, what: str) -> Any:
    """The rule or the clip of a name: the one given for all, or what the callable says.

    Raises:
        TypeError: The callable gave something else.
    """
    if isinstance(given, kind):
        return given
    choice = given(name)
    if not isinstance(choice, kind) and not (kind is Clip and choice is None):
        raise TypeError(
            f"the {what} callable gave {choice!r} for parameter {name!r}; expected a "
            f"{kind.__name__}"
        )
    return choice


def new_entry(name: str, rule: Rule, clip: Clip | None, layout: Layout) -> Entry:
    """An entry before its first step, every slot zero.

    Raises:
        ValueError: The rule is not for parameters of this shape.
    """
    zeros = named(layout.library).zeros
    try:
        shapes = rule.slot_shapes(layout.shape)
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from error
    slots = tuple(zeros(layout._replace(shape=shape)) for shape in shapes.values())
    return Entry(rule, clip, 0, slots, layout)


def with_rule(name: str, entry: Entry, rule: Rule) -> Entry:
    """An entry under another rule: slots that both have are kept, others start at zero.

    Where the new rule has slots and none is kept, the clock starts with them: Adam's corrections of
    a bias towards zero belong to the steps that its averages have seen.

    Raises:
        ValueError: The rule is not for parameters of this shape.
    """
    old = entry.rule.slot_shapes(entry.layout.shape)
    if type(rule) is type(entry.rule) and rule.slot_shapes(entry.layout.shape) == old:
        return replace(entry, rule=rule)
    fresh = new_entry(name, rule, entry.clip, entry.layout)
    new = rule.slot_shapes(entry.layout.shape)
    kept = {
        name: slot
        for (name, shape), slot in zip(old.items(), entry.slots, strict=True)
        if new.get(name) == shape
    }
    slots = tuple(kept.get(name, zero) for name, zero in zip(new, fresh.slots, strict=True))
    return replace(entry, rule=rule, slots=slots, step=0 if new and not kept else entry.step)


def on_host(name: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of a state dict with NumPy slots of its own.

    Raises:
        ValueError: A slot is no array that a rule could have.
    """
    slots = {}
    for slot, array in stored["slots"].items():
        try:
            backend = backend_of(array, f"slot {slot!r}")
            backend.layout(array, f"slot {slot!r}")
            slots[slot] = backend.to_host(array)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the state of {name!r} has a slot of no use: {error}") from error
    return {"rule": deepcopy(dict(stored["rule"])), "step": stored["step"], "slots": slots}


def restored(
    name: str, stored: Mapping[str, Any], rule: Rule, clip: Clip | None, layout: Layout
) -> Entry:
    """An entry from loaded state, its slots NumPy arrays; of step 0 it may have none.

    Raises:
        ValueError: A slot does not fit the rule, the shape or the dtype.
    """
    fresh = new_entry(name, rule, clip, layout)
    shapes = rule.slot_shapes(layout.shape)
    check_slot_names(name, stored, rule, shapes)
    if is_unstepped(stored):
        return fresh
    for slot, array in stored["slots"].items():
        if array.shape != shapes[slot]:
            raise ValueError(
                f"the loaded slot {slot!r} of parameter {name!r} has shape {array.shape}; expected "
                f"{shapes[slot]} for a parameter of shape {layout.shape}: forget the name to start "
                "anew"
            )
        if array.dtype.name != layout.compute_dtype:
            raise ValueError(
                f"the loaded slot {slot!r} of parameter {name!r} has dtype {array.dtype.name}; "
                f"expected {layout.compute_dtype}, for a parameter of dtype {layout.dtype}: "
                "convert it, or forget the name to start anew"
            )
    from_host = named(layout.library).from_host
    slots = tuple(from_host(stored["slots"][slot], layout) for slot in shapes)
    return Entry(rule, clip, stored["step"], slots, layout)


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


def described(entry: Entry, convert: Callable[[Array], Array]) -> dict[str, Any]:
    """An entry as plain data."""
    return {
        "rule": described_rule(entry.rule, entry.step),
        "step": entry.step,
        "slots": entry.named_slots(convert),
    }


def described_rule(rule: Rule, step: int) -> dict[str, Any]:
    """A rule as plain data: its name, and its hyperparameters at a step."""
    try:
        now = rule.at(max(step, 1))
    except ValueError:
        # State must not be lost over a schedule that gives no number for this step.
        now = rule
    return {
        "name": type(rule).__name__,
        **{f.name: _plain(getattr(now, f.name)) for f in fields(now)},
    }


def _plain(value: Any) -> Any:
    """A hyperparameter as JSON has it, which knows no tuple, no infinity and no callable."""
    if callable(value):
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return repr(value) if isinstance(value, float) and not isfinite(value) else value
