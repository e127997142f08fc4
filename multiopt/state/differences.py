"""The numbers in which the rules of loaded state and of the optimizer differ.

The rules of the optimizer stay, so a run that is resumed with another learning rate goes on with
that one. The report of the load says so:

>>> import numpy as np, multiopt as mo
>>> opt = mo.Optimizer(mo.Adam(lr=0.01))
>>> _ = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
>>> mo.Optimizer(mo.Adam(lr=0.1)).load_state_dict(opt.state_dict()).differences
{'w': {'lr': Difference(saved=0.01, here=0.1)}}
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from multiopt.engine import Group
from multiopt.kinds import formulas
from multiopt.rules import Rule
from multiopt.rules.rule import is_schedule
from multiopt.schedules import Schedule
from multiopt.schedules.description import described, plain

__all__ = ["Difference", "differences", "distinct_rules"]


class Difference(NamedTuple):
    """A hyperparameter that differs.

    Attributes:
        saved: What the state was saved with: a number or a list of numbers, or the description of
            a schedule.
        here: What this optimizer has, which is what the next step uses.
    """

    saved: Any
    here: Any


def differences(settings: Mapping[str, Any], rule: Rule) -> dict[str, Difference]:
    """The hyperparameters that a saved rule and another one have both, and that differ.

    A callable of the caller's, of which nothing is saved but the number that it gave, is not
    compared.

    Args:
        settings: The description of the rule that was saved.
        rule: The rule of this optimizer.
    """
    differing = {}
    schedules = settings.get("schedules", {})
    for f in fields(rule):
        if f.name not in settings:
            continue
        value = getattr(rule, f.name)
        values = value if isinstance(value, tuple) else (value,)
        saved, here = schedules.get(f.name), None
        if any(isinstance(part, Schedule) for part in values):
            here = described(value)
        elif is_schedule(value):
            continue
        if saved is None and here is None:
            saved, here = settings[f.name], plain(value)
        if saved != here:
            saved = settings[f.name] if saved is None else saved
            differing[f.name] = Difference(saved, plain(value) if here is None else here)
    return differing


def distinct_rules(group: Group, rows: Sequence[int]) -> list[tuple[Rule, np.ndarray]]:
    """The rules of some rows, and the positions of those that each is of."""
    chosen = np.array(rows)
    numbers, schedule = group.numbers[chosen], group.schedule[chosen]
    if group.scheduled:
        # The columns hold what a schedule gave last, which tells no rules apart.
        for number in np.unique(schedule).tolist():
            columns = list(group.schedules[number].columns)
            numbers[np.ix_(schedule == number, columns)] = 0.0
    table = np.column_stack([numbers, schedule])
    if (table == table[0]).all():
        positions = [np.arange(len(rows))]
    else:
        which = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
        positions = [np.flatnonzero(which == number) for number in range(which.max() + 1)]
    return [(formulas(group.rule_at(rows[int(alike[0])]))[0], alike) for alike in positions]
