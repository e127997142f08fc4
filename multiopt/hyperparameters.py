"""Hyperparameters of names that are changed between two steps: writes into columns, if possible.

A number that takes the place of a number is written into the column of its group, for all rows at
once, and no rule is made. Whatever changes the formula, or adds a schedule, moves names to other
rows. Everything is worked out first, and returned as functions that write and as new rows, so that
a change happens whole or not at all.

>>> import numpy as np
>>> import multiopt as mo
>>> from multiopt.hyperparameters import changed_numbers
>>> opt = mo.Optimizer(mo.SGD(lr=0.5))
>>> _ = opt.step({"w": np.ones(2), "b": np.ones(1)}, {"w": np.ones(2), "b": np.ones(1)})
>>> writes, placed = changed_numbers(opt._registry, None, {"lr": 0.25}, None)
>>> len(writes), placed                    # one column of one group, and no new rows
(1, {})
>>> [write() for write in writes]
[None]
>>> opt.hyperparameters("b")["lr"]
0.25
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from multiopt.entry import Entry, changed, changed_for_all, chosen, chosen_clip, with_rule
from multiopt.kinds import formulas
from multiopt.rules import Rule
from multiopt.rules.average import Averaged
from multiopt.rules.rule import plain_numbers
from multiopt.state.fit import check_slot_names
from multiopt.state.record import Form, Saved
from multiopt.state.settings import record
from multiopt.step.clip import Clip
from multiopt.table import NOTHING, Table

if TYPE_CHECKING:
    from multiopt.engine import Group
    from multiopt.registry import Registry

__all__ = [
    "change",
    "changed_numbers",
    "changed_pending",
    "set_clips",
    "set_numbers",
    "set_rules",
]


def changed_numbers(
    table: Table,
    names: Iterable[str] | None,
    values: Mapping[str, Any],
    usual: tuple[Any, Rule] | None,
) -> tuple[list[Callable[[], None]], dict[str, int]]:
    """Work out a change of some hyperparameters; nothing is changed yet.

    Args:
        table: The names with their rows.
        names: The names; None for all.
        values: The new values by hyperparameter.
        usual: A rule that most names may have, and the same rule with the new values.

    Returns:
        Functions that write columns, and the codes of new rows by name.

    Raises:
        TypeError: The rule of a name does not have such a hyperparameter.
        ValueError: A value is out of range.
    """
    writes: list[Callable[[], None]] = []
    others: dict[str, Entry] = {}
    for group, rows in table.rows_of(names):
        # Numbers take the place of numbers: no rule is made, and all rows are written at once.
        scheduled = group.scheduled and group.schedule[rows].any()
        numbers = None if scheduled else plain_numbers(formulas(group.rule)[0], values)
        if numbers is not None:
            writes.append(partial(group.write_numbers, rows, numbers))
            continue
        for mine in (rows[positions] for positions in group.by_rule(rows)):
            old = group.rule_at(int(mine[0]))
            labels, own = partial(table.names_at, group, mine), formulas(old)[0]
            is_usual = usual is not None and own == usual[0]
            new = usual[1] if usual is not None and is_usual else changed(labels, own, values)
            chain = replace(old, rule=new) if isinstance(old, Averaged) else new
            if group.takes(chain):
                writes.append(partial(group.change_numbers, mine, chain, values))
            else:
                others |= {name: with_rule(name, table.entry(name), new) for name in labels()}
    return writes, table.placed(others)


def changed_pending(
    registry: "Registry", names: Iterable[str] | None, values: Mapping[str, Any]
) -> dict[str, Saved]:
    """Work out what setting some hyperparameters does to pending state; nothing is changed yet.

    The state is kept, except for what a ``Plateau`` of these hyperparameters had seen, which a new
    schedule does not take over.

    Args:
        registry: The registry.
        names: The names, of which some may be pending; None for all.
        values: The new values by hyperparameter.

    Returns:
        The pending state of the names for which it changes.

    Raises:
        TypeError: The rule of a name does not have such a hyperparameter.
        ValueError: A value is out of range, or the pending state does not fit a rule with it.
    """
    new: dict[str, Saved] = {}
    forms: dict[int, Form] = {}
    for name in registry.pending if names is None else names:
        saved = registry.pending.get(name)
        if saved is None:
            continue
        form, seen = saved.form, saved.form.rule
        if names is not None:
            rule = changed(partial(list, [name]), registry.rule_for(name), values)
            check_slot_names(name, form.own, saved.step, seen.settings, rule)
        if seen.observed:
            if id(form) not in forms:
                # A place begins with the hyperparameter: ``lr=Plateau``, ``betas[0]=Plateau``.
                kept = {
                    k: x for k, x in seen.observed.items() if re.split(r"[=\[]", k)[0] not in values
                }
                forms[id(form)] = form._replace(rule=seen._replace(observed=kept))
            new[name] = saved._replace(form=forms[id(form)])
    return new


def change(table: Table, rules: Mapping[str, Rule], clips: Mapping[str, Clip | None]) -> None:
    """Change the rules of some names, and the clips of some of those; their state is kept.

    Raises:
        ValueError: A rule does not support the shape of a parameter; nothing has changed.
    """
    writes: dict[tuple[int, int, int], tuple[Group, Rule | None, list[int]]] = {}
    others: dict[str, Entry] = {}
    for name, rule in rules.items():
        group, row = table.row_of(name)
        key = group.number, id(rule), int(group.schedule[row])
        if key not in writes:
            old = group.rule_at(row)
            chain = replace(old, rule=rule) if isinstance(old, Averaged) else rule
            writes[key] = group, chain if group.takes(chain) else None, []
        _, fits, rows = writes[key]
        if fits is not None:
            rows.append(row)
        else:
            others[name] = with_rule(name, table.entry(name), rule)
    for name in others.keys() & clips.keys():
        others[name] = others[name]._replace(clip=clips[name])
    placed = table.placed(others)
    with table.guard:
        for group, fits, rows in writes.values():
            if fits is not None:
                group.change_numbers(np.array(rows), fits, formulas(fits)[0].ranges)
        for name in clips.keys() - others.keys():
            group, row = table.row_of(name)
            table.give_clips(group, np.array([row]), [clips[name]])
        table.replace_rows(placed)
        if clips:
            # ``last`` holds the clips that measure several gradients together.
            table.last = NOTHING
    table.sweep()


def set_rules(registry: "Registry", rule: Rule | Callable[[str], Rule]) -> None:
    """Set the rule of all names, new ones included.

    Raises:
        TypeError: The callable returned something that is not a rule; nothing has changed.
        ValueError: A rule does not support the shape of a parameter; nothing has changed.
    """
    entries = {}
    for name in registry.names:
        entries[name] = with_rule(name, registry.entry(name), chosen(rule, name, Rule, "rule"))
    placed = registry.placed(entries)
    with registry.guard:
        registry.replace_rows(placed)
        registry.rule, registry.settings = rule, {}
    registry.sweep()


def set_clips(registry: "Registry", clip: Clip | Callable[[str], Clip | None] | None) -> None:
    """Set the clip of all names, new ones included.

    Raises:
        TypeError: The callable returned something that is not a clip; nothing has changed.
    """
    clips = {name: chosen_clip(clip, name) for name in registry.names}
    with registry.guard:
        for name, chosen_for_name in clips.items():
            group, row = registry.row_of(name)
            registry.give_clips(group, np.array([row]), [chosen_for_name])
        registry.last, registry.clip = NOTHING, clip


def set_numbers(
    registry: "Registry", names: Iterable[str] | None, values: Mapping[str, Any]
) -> None:
    """Set some hyperparameters of some names.

    Args:
        registry: The registry.
        names: The names, seen or pending; None for all, new ones included.
        values: The hyperparameters.

    Raises:
        TypeError: The rule of a name has no such hyperparameter; nothing has changed.
        ValueError: A value is out of range, or pending state does not fit; nothing has changed.
    """
    rule = None if names is not None else changed_for_all(registry.rule, values)
    usual = (registry.rule, rule) if isinstance(rule, Rule) else None
    names = None if names is None else list(names)
    waiting = changed_pending(registry, names, values)
    seen = None if names is None else [name for name in names if name not in registry.pending]
    writes, placed = changed_numbers(registry, seen, values, usual)
    with registry.guard:
        for write in writes:
            write()
        registry.replace_rows(placed)
        if rule is not None:
            registry.rule = rule
        if values:
            record(registry.settings, names, values)
            registry.pending.update(waiting)
    if placed:
        registry.sweep()
