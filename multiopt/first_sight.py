"""Rows for names that a step sees for the first time, or whose parameters have moved."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from multiopt.arrays import Array
from multiopt.backend import backend_for, backend_named, slot_of
from multiopt.engine import Group
from multiopt.entry import chosen, chosen_clip, slot_shapes
from multiopt.kinds import formulas
from multiopt.layout import Layout
from multiopt.rules import Rule
from multiopt.rules.average import Averaged
from multiopt.state.fit import check_average, check_fit
from multiopt.state.misnamed import by_ending, pairs, warn_of_other_names
from multiopt.state.record import Form, Saved, observe, resumed, set_clocks
from multiopt.step.run import Rows
from multiopt.table import GROUP

if TYPE_CHECKING:
    from multiopt.registry import Registry
    from multiopt.step.clip import Clip

__all__ = ["Undo", "begin", "move"]

#: What takes back what a step has done before it failed.
Undo: TypeAlias = list[Callable[[], object]]


class _Kind(NamedTuple):
    """New names that get their rows at once.

    Attributes:
        group: Their group.
        rule: What the group computes for them.
        places: Their places in the list of names.
        saved: Their saved state; None for names that start without state.
    """

    group: Group
    rule: Rule
    places: list[int]
    saved: list[Saved | None]


def begin(
    registry: "Registry",
    rows: Rows,
    params: np.ndarray,
    grads: np.ndarray,
    fresh: dict[int, int],
    undo: Undo,
) -> Rows:
    """Rows for names that are seen for the first time, with a gradient; nothing is registered.

    Args:
        registry: Who knows names.
        rows: The names, some of them without a row.
        params: The parameters.
        grads: Their gradients.
        fresh: By place, the new codes; filled as they are made.
        undo: Takes what takes back what else has been done.
    """
    names, codes, pending = rows.names, rows.codes.copy(), registry.pending
    layouts: dict[Hashable, tuple[Layout, Layout]] = {}
    kinds: dict[Hashable, _Kind] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    clips: dict[int, Clip | None] = {}
    rule, shared = registry.rule, isinstance(registry.rule, Rule)
    for place in rows.missing:
        if grads[place] is None:
            continue
        name, param = names[place], params[place]
        form = _form(param)
        if form is None or form not in layouts:
            label = f"parameter {name!r}"
            layout = backend_for(param, label).layout(param, label)
            layouts[form] = layout, layout.with_shape(())
        layout, alike = layouts[form]
        shapes[place] = layout.storage_shape
        if not shared:
            rule = chosen(registry.rule, name, Rule, "rule")
        average = None if registry.average is None else registry.average_of(name)
        saved = pending.get(name)
        key = id(rule), id(average), alike
        if key not in kinds:
            assert isinstance(rule, Rule)
            chain = rule if average is None else Averaged(rule, average)
            kinds[key] = _Kind(registry.group_for(chain, layout), chain, [], [])
        kinds[key].places.append(place)
        kinds[key].saved.append(saved)
        clips[place] = None if registry.clip is None else chosen_clip(registry.clip, name)
    for group, chain, places, waited in kinds.values():
        forms = [shapes[place] for place in places]
        _check_shapes(registry, group, chain, [names[place] for place in places], forms, waited)
        made = resumed(group, waited, forms)
        fresh.update(zip(places, (made + group.number * GROUP).tolist(), strict=True))
        group.set_rules(made, chain)
        registry.give_clips(group, made, [clips[place] for place in places])
        set_clocks(group, made, waited)
        for form in {id(one.form): one.form for one in waited if one is not None}.values():
            undo += _observe(chain, form)
    for place, code in fresh.items():
        codes[place] = code
    if pending:
        _warn_of_other_names(registry, names, fresh)
    return registry.parted(names, codes, [place for place in rows.missing if place not in fresh])


def _warn_of_other_names(registry: "Registry", names: Sequence[str], fresh: Iterable[int]) -> None:
    """Warn, once after each load, if state that waits seems to be that of names begun without."""
    pending = registry.pending
    without = [names[place] for place in fresh if names[place] not in pending]
    if not without or registry.endings == {}:
        return
    if registry.endings is None:
        registry.endings = by_ending(pending)
    stepped = set(names)
    found = pairs(without, lambda name: name in pending and name not in stepped, registry.endings)
    if found:
        registry.endings = {}
        warn_of_other_names(found)


def _form(array: Array) -> Hashable | None:
    """What arrays have in common that have one layout: to find that takes longer.

    None if an array does not say. That it can be stepped is found out when it is looked at.
    """
    try:
        form = type(array), array.shape, array.dtype, array.device
        hash(form)
    except Exception:  # of any kind: libraries have their own
        return None
    return form


def _observe(chain: Rule, form: Form) -> Undo:
    """Give schedules what others have seen, if that is more; return what takes it back."""
    # The first step asks the schedules.
    own, *means = formulas(chain)
    seen = observe(own, form.rule.observed, ahead=True)
    if means and form.average is not None:
        seen += observe(means[0], form.average.observed, ahead=True)
    return [partial(plateau.load_state, before) for plateau, before in seen]


def _check_shapes(
    registry: "Registry",
    group: Group,
    rule: Rule,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    saved: Sequence[Saved | None],
) -> None:
    """Refuse shapes that a rule, or saved state, is not for.

    Raises:
        ValueError: There is one.
    """
    own = formulas(rule)[0]
    known: set[Hashable] = set()
    for name, shape, one in zip(names, shapes, saved, strict=True):
        # State of step 0 need not have slots.
        kind = shape, None if one is None else (id(one.form), one.step == 0)
        if kind not in known:
            known.add(kind)
            layout = group.layout.with_shape(shape)
            if one is None:
                slot_shapes(name, own, layout)
            else:
                check_fit(name, one, own, layout, registry.masters)
                check_average(name, one, layout)


def move(
    registry: "Registry", rows: Rows, moved: Mapping[int, Layout], fresh: dict[int, int]
) -> Rows:
    """Rows in other groups for parameters whose library or device is another one now.

    Args:
        registry: Who knows names.
        rows: The names.
        moved: By place, the layouts of those that have moved.
        fresh: By place, the new codes; filled as they are made.
    """
    codes = rows.codes.copy()
    for place, layout in moved.items():
        name = rows.names[place]
        (group, row), old = registry.row_of(name), registry.entry(name)
        carried = partial(_carried, old=old.layout, new=layout)
        entry = old.with_converted(carried)._replace(layout=layout)
        fresh[place] = codes[place] = code = registry.placed({name: entry})[name]
        # Schedules have been asked for this step.
        new_group, new_row = registry.at(code)
        new_group.numbers[new_row] = group.numbers[row]
    return registry.parted(rows.names, codes, rows.missing)


def _carried(array: Array, old: Layout, new: Layout) -> Array:
    """A slot taken to another library or device."""
    return slot_of(backend_named(old.library).to_host(array), new)
