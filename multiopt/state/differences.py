"""Hyperparameters that differ between loaded state and the optimizer that loads it.

The optimizer keeps its own rules, so a run that is resumed with a new learning rate continues with
the new one, except for what had been set while the run went on. The report of the load shows both:

>>> import numpy as np, multiopt as mo
>>> opt = mo.Optimizer(mo.Adam(lr=0.01))
>>> _ = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
>>> mo.Optimizer(mo.Adam(lr=0.1)).load_state_dict(opt.state_dict()).differences
{'w': {'lr': Difference(saved=0.01, here=0.1, restored=False)}}
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from multiopt.kinds import formulas
from multiopt.rules import Rule
from multiopt.rules.rule import is_schedule
from multiopt.schedules import Schedule
from multiopt.schedules.description import described, plain
from multiopt.state.record import Form, Saved
from multiopt.state.settings import Settings

if TYPE_CHECKING:
    from multiopt.registry import Registry

__all__ = ["Difference", "differences", "differing"]


class Difference(NamedTuple):
    """A hyperparameter that differs.

    Attributes:
        saved: The value when the state was saved: a number, a list of numbers, or the description
            of a schedule.
        here: The value in this optimizer before the load.
        restored: Whether the saved value was taken over, since it had been set while the run went
            on; otherwise the value here stays.
    """

    saved: Any
    here: Any
    restored: bool = False


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


def _all_differences(form: Form, rule: Any, average: Rule | None = None) -> dict[str, Difference]:
    """Compare a saved rule and its average with those here; a callable is not asked for a rule."""
    found: dict[str, Difference] = {}
    if isinstance(rule, Rule):
        saved, here = form.rule.settings.get("name"), type(rule).__name__
        if saved not in (None, here):
            found["rule"] = Difference(saved, here)
        found |= differences(form.rule.settings, rule)
    if form.average is not None and average is not None:
        of_average = differences(form.average.settings, average)
        found |= {f"average.{key}": difference for key, difference in of_average.items()}
    return found


def differing(
    registry: "Registry", accepted: Mapping[str, Saved], loaded: Settings
) -> dict[str, dict[str, Difference]]:
    """For each name, the hyperparameters in which the saved rule differs from the one here.

    The class of the rule is compared under ``"rule"``, and the numbers of its average under
    ``"average.decay"`` and ``"average.start"``.
    """
    found: dict[str, dict[str, Difference]] = {}
    seen = [name for name in accepted if name in registry]
    for names, chain in registry.names_by_rule(seen, lambda name: id(accepted[name].form)):
        rule, *average = formulas(chain)
        if differ := _all_differences(accepted[names[0]].form, rule, *average):
            found |= dict.fromkeys(names, differ)
    # There may be a million pending names, but they have few forms.
    pending: dict[tuple[int, int], dict[str, Difference]] = {}
    for name, saved in accepted.items():
        if name not in registry:
            key = id(saved.form), id(saved.keeps)
            if key not in pending:
                pending[key] = _all_differences(saved.form, registry.rule, saved.keeps)
            if differ := pending[key]:
                found[name] = differ
    if loaded.for_all or loaded.by_name:
        for name, differ in found.items():
            own = loaded.of_name(name)
            found[name] = {what: x._replace(restored=what in own) for what, x in differ.items()}
    return {name: found[name] for name in accepted if name in found}
