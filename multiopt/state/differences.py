"""Hyperparameters that differ between loaded state and the optimizer that loads it.

The optimizer keeps its own rules, so a run that is resumed with a new learning rate continues with
the new one. The report of the load shows the difference:

>>> import numpy as np, multiopt as mo
>>> opt = mo.Optimizer(mo.Adam(lr=0.01))
>>> _ = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
>>> mo.Optimizer(mo.Adam(lr=0.1)).load_state_dict(opt.state_dict()).differences
{'w': {'lr': Difference(saved=0.01, here=0.1)}}
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from multiopt.rules import Rule
from multiopt.rules.rule import is_schedule
from multiopt.schedules import Schedule
from multiopt.schedules.description import described, plain

__all__ = ["Difference", "differences"]


class Difference(NamedTuple):
    """A hyperparameter that differs.

    Attributes:
        saved: The value when the state was saved: a number, a list of numbers, or the description
            of a schedule.
        here: The value in this optimizer, which the next step uses.
    """

    saved: Any
    here: Any


def differences(settings: Mapping[str, Any], rule: Rule) -> dict[str, Difference]:
    """Compare the hyperparameters that a saved rule and the rule here have in common.

    A callable of the user's own is not compared: only the last number it gave was saved.

    Args:
        settings: The name and the hyperparameters of the saved rule.
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
