"""Rows for names that a step sees for the first time, or whose parameters have moved."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from multiopt.arrays import Array
from multiopt.averaging import Averaged
from multiopt.backend import backend_of, named, slot_of
from multiopt.engine import Group
from multiopt.entry import (
    Entry,
    chosen,
    chosen_clip,
    restored,
    restored_average,
    restored_plateaus,
    slot_shapes,
)
from multiopt.layout import Layout
from multiopt.rules import Rule
from multiopt.step.run import Rows
from multiopt.table import GROUP

if TYPE_CHECKING:
    from multiopt.registry import Registry
    from multiopt.step.clip import Clip

__all__ = ["Undo", "begin", "move"]

#: What takes back what a step has done before it failed.
Undo: TypeAlias = list[Callable[[], object]]


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
    names, codes = rows.names, rows.codes.copy()
    layouts: dict[Hashable, tuple[Layout, Layout]] = {}
    kinds: dict[Hashable, tuple[Group, Rule, list[int]]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    clips: dict[int, Clip | None] = {}
    resumed: dict[int, Entry] = {}
    for place in rows.missing:
        if grads[place] is None:
            continue
        name, param = names[place], params[place]
        form = _form(param)
        if form is None or form not in layouts:
            label = f"parameter {name!r}"
            layout = backend_of(param, label).layout(param, label)
            layouts[form] = layout, layout.with_shape(())
        layout, alike = layouts[form]
        shapes[place] = layout.shape
        rule = registry.rule
        if not isinstance(rule, Rule):
            rule = chosen(rule, name, Rule, "rule")
        average = None if registry.average is None else registry.average_of(name)
        key = id(rule), id(average), alike
        if key not in kinds:
            chain = rule if average is None else Averaged(rule, average)
            kinds[key] = registry.group_for(chain, layout), chain, []
        clip = chosen_clip(registry.clip, name)
        if name not in registry.pending:
            clips[place] = clip
            kinds[key][2].append(place)
            continue
        stored = registry.pending[name]
        mean = stored.get("average")
        entry = restored(name, stored, rule, clip, layout, registry.masters)
        resumed[place] = entry._replace(average=restored_average(name, mean, average, layout))
        # The first step asks the schedules.
        seen = restored_plateaus(rule, stored["rule"], ahead=True)
        if average is not None and mean is not None:
            seen += restored_plateaus(average, mean["rule"], ahead=True)
        undo += [partial(plateau.load_state, before) for plateau, before in seen]
    placed = registry.placed({names[place]: entry for place, entry in resumed.items()})
    fresh.update({place: placed[names[place]] for place in resumed})
    for group, rule, places in kinds.values():
        if not places:
            continue
        _check_shapes(group, rule, [(names[k], shapes[k]) for k in places])
        made = group.add([shapes[k] for k in places])
        fresh.update(zip(places, (made + group.number * GROUP).tolist(), strict=True))
        group.set_rules(made, rule)
        registry.give_clips(group, made, [clips[k] for k in places])
    for place, code in fresh.items():
        codes[place] = code
    return registry.parted(names, codes, [place for place in rows.missing if place not in fresh])


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


def _check_shapes(group: Group, rule: Rule, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Refuse shapes that a rule is not for.

    Raises:
        ValueError: There is one.
    """
    known: set[tuple[int, ...]] = set()
    for name, shape in shapes:
        if shape not in known:
            own = rule.rule if isinstance(rule, Averaged) else rule
            slot_shapes(name, own, group.layout.with_shape(shape))
            known.add(shape)


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
    return slot_of(named(old.library).to_host(array), new)
