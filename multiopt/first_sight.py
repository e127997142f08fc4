"""First sight: rows for names that a step sees for the first time, or whose parameters have moved.

When a name comes with its first gradient, it chooses its rule, clip and average, finds the group
for them, and takes over pending state if there is any. All new names of a group get their rows at
once, so a hundred thousand new names cost little more than their look-ups. The rows are registered
only when the step is committed; if it fails, they are freed and nothing has changed.

>>> import numpy as np
>>> import multiopt as mo
>>> opt = mo.Optimizer(lambda name: mo.Adam() if name == "w" else mo.SGD(), on_nonfinite="raise")
>>> params = {"w": np.zeros(2), "b": np.zeros(1)}
>>> try:
...     _ = opt.step(params, {"w": np.ones(2), "b": np.array([np.nan])})
... except ValueError:
...     opt.names
()
>>> _ = opt.step(params, {"w": np.ones(2), "b": np.ones(1)})
>>> [type(opt._registry.rule_of(name)).__name__ for name in opt.names]
['Adam', 'SGD']
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from multiopt.arrays import Array
from multiopt.backend import backend_for, backend_named, slot_of
from multiopt.engine import Group
from multiopt.entry import chosen_clip, slot_shapes
from multiopt.kinds import formulas
from multiopt.layout import Layout
from multiopt.rules import Rule
from multiopt.rules.average import Averaged
from multiopt.state.fit import check_average, check_fit
from multiopt.state.misnamed import by_ending, pairs, warn_of_other_names
from multiopt.state.plateaus import observe
from multiopt.state.record import Form, Saved, resumed, set_clocks
from multiopt.step.run import Rows
from multiopt.table import GROUP

if TYPE_CHECKING:
    from multiopt.registry import Registry
    from multiopt.step.clip import Clip

__all__ = ["Undo", "begin", "move"]

#: Functions that undo what a step has done before it failed.
Undo: TypeAlias = list[Callable[[], object]]


class _Kind(NamedTuple):
    """New names of one group and one rule, which get their rows together.

    Attributes:
        group: Their group.
        rule: Their rule, chained with their average if they have one.
        places: Their places in the list of names.
        saved: Their pending state; None for names without any.
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
    """Make rows for the new names that have a gradient, without registering them.

    Args:
        registry: The registry.
        rows: The names of the step, some of them without a row.
        params: The parameters.
        grads: Their gradients.
        fresh: Filled with the codes of the new rows, by place.
        undo: Filled with functions that undo whatever else is done.

    Returns:
        The names with their rows, the new ones included.

    Raises:
        TypeError: A parameter is not a usable array, or a callable returned something else.
        ValueError: A rule, or pending state, does not fit a parameter.
    """
    names, codes, pending = rows.names, rows.codes.copy(), registry.pending
    layouts: dict[Hashable, tuple[Layout, Layout]] = {}
    kinds: dict[Hashable, _Kind] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    clips: dict[int, Clip | None] = {}
    usual = registry.rule if isinstance(registry.rule, Rule) else None
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
        rule = registry.rule_for(name) if usual is None or name in registry.settings else usual
        average = None if registry.average is None else registry.average_of(name)
        saved = pending.get(name)
        key = id(rule), id(average), alike
        if key not in kinds:
            chain = rule if average is None else Averaged(rule, average)
            kinds[key] = _Kind(registry.group_for(chain, layout), chain, [], [])
        kinds[key].places.append(place)
        kinds[key].saved.append(saved)
        clips[place] = None if registry.clip is None else chosen_clip(registry.clip, name)
    for group, chain, places, states in kinds.values():
        of_group = [shapes[place] for place in places]
        _check_shapes(registry, group, chain, [names[place] for place in places], of_group, states)
        new_rows = resumed(group, states, of_group)
        fresh.update(zip(places, (new_rows + group.number * GROUP).tolist(), strict=True))
        group.set_rules(new_rows, chain)
        registry.give_clips(group, new_rows, [clips[place] for place in places])
        set_clocks(group, new_rows, states)
        for form in {id(state.form): state.form for state in states if state is not None}.values():
            undo += _observe(chain, form)
    for place, code in fresh.items():
        codes[place] = code
    if pending:
        _warn_of_other_names(registry, names, fresh)
    return registry.parted(names, codes, [place for place in rows.missing if place not in fresh])


def _warn_of_other_names(registry: "Registry", names: Sequence[str], fresh: Iterable[int]) -> None:
    """Warn, once per load, if names start fresh while similar names have pending state."""
    pending = registry.pending
    unmatched = [names[place] for place in fresh if names[place] not in pending]
    if not unmatched or registry.endings == {}:
        return
    if registry.endings is None:
        registry.endings = by_ending(pending)
    stepped = set(names)
    similar = pairs(
        unmatched, lambda name: name in pending and name not in stepped, registry.endings
    )
    if similar:
        registry.endings = {}
        warn_of_other_names(similar)


def _form(array: Array) -> Hashable | None:
    """A key that only arrays of the same layout share; it is cheaper to get than the layout.

    None if the array does not have what the key is made of. Whether it can be used at all is
    checked later.
    """
    try:
        form = type(array), array.shape, array.dtype, array.device
        hash(form)
    except Exception:  # of any kind: libraries have their own
        return None
    return form


def _observe(chain: Rule, form: Form) -> Undo:
    """Load what saved schedules had observed, if it is more; return functions that undo it."""
    # This must come before the first step calls the schedules.
    own, *averages = formulas(chain)
    changed = observe(own, form.rule.observed, ahead=True)
    if averages and form.average is not None:
        changed += observe(averages[0], form.average.observed, ahead=True)
    return [partial(plateau.load_state, before) for plateau, before in changed]


def _check_shapes(
    registry: "Registry",
    group: Group,
    rule: Rule,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    saved: Sequence[Saved | None],
) -> None:
    """Check that the rule supports the shapes of some parameters, and that pending state fits.

    Raises:
        ValueError: The rule does not support a shape, or pending state does not fit.
    """
    own = formulas(rule)[0]
    checked: set[Hashable] = set()
    for name, shape, state in zip(names, shapes, saved, strict=True):
        # State of step 0 need not have slots.
        kind = shape, None if state is None else (id(state.form), state.step == 0)
        if kind not in checked:
            checked.add(kind)
            layout = group.layout.with_shape(shape)
            if state is None:
                slot_shapes(name, own, layout)
            else:
                check_fit(name, state, own, layout, registry.masters)
                check_average(name, state, layout)


def move(
    registry: "Registry", rows: Rows, moved: Mapping[int, Layout], fresh: dict[int, int]
) -> Rows:
    """Make rows in other groups for parameters that have moved to another library or device.

    Args:
        registry: The registry.
        rows: The names of the step.
        moved: By place, the new layouts of the parameters that have moved.
        fresh: Filled with the codes of the new rows, by place.

    Returns:
        The names with their rows, the new ones included.
    """
    codes = rows.codes.copy()
    for place, layout in moved.items():
        name = rows.names[place]
        (group, row), old = registry.row_of(name), registry.entry(name)
        carried = partial(_carried, old=old.layout, new=layout)
        entry = old.with_converted(carried)._replace(layout=layout)
        fresh[place] = codes[place] = code = registry.placed({name: entry})[name]
        # The schedules have been called for this step already.
        new_group, new_row = registry.at(code)
        new_group.numbers[new_row] = group.numbers[row]
    return registry.parted(rows.names, codes, rows.missing)


def _carried(array: Array, old: Layout, new: Layout) -> Array:
    """Move a slot to another library or device."""
    return slot_of(backend_named(old.library).to_host(array), new)
