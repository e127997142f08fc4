"""Warnings about each ``Plateau`` whose state cannot be saved.

A ``Plateau`` inside a callable of the user's own is out of reach; ``docs/schedules.md`` says under
"Saving" what to do about it.
"""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from multiopt.errors import caller_level
from multiopt.kinds import formulas
from multiopt.rules import Rule
from multiopt.rules.rule import is_schedule
from multiopt.schedules.description import left_behind
from multiopt.step.report import abridged

if TYPE_CHECKING:
    from multiopt.registry import Registry

__all__ = ["warn_of_left_behind", "warn_of_plateaus"]


def warn_of_left_behind(registry: "Registry") -> None:
    """Warn about the schedules of a registry whose state will not be saved."""
    chains = {name: formulas(rule) for name, rule in registry.scheduled_rules().items()}
    warn_of_plateaus({name: parts[0] for name, parts in chains.items()})
    warn_of_plateaus({name: parts[1] for name, parts in chains.items() if len(parts) > 1})


def warn_of_plateaus(rules: Mapping[str, Rule]) -> None:
    """Warn about each ``Plateau`` inside a callable of the user's own.

    Args:
        rules: The rules whose state is being saved or loaded, by name.
    """
    affected: dict[str, list[str]] = {}
    # Many names share a rule, and many rules share a schedule.
    has_plateau: dict[int, bool] = {}
    hyperparameters: dict[int, list[str]] = {}
    for name, rule in rules.items():
        if id(rule) not in hyperparameters:
            hyperparameters[id(rule)] = []
            for hyperparameter in rule.ranges:
                value = getattr(rule, hyperparameter)
                if is_schedule(value):
                    if id(value) not in has_plateau:
                        has_plateau[id(value)] = bool(left_behind(value))
                    if has_plateau[id(value)]:
                        hyperparameters[id(rule)].append(hyperparameter)
        for hyperparameter in hyperparameters[id(rule)]:
            affected.setdefault(hyperparameter, []).append(name)
    if affected:
        which = "; ".join(
            f"{what} of parameter{'s'[: len(names) > 1]} {abridged(names)}"
            for what, names in affected.items()
        )
        warnings.warn(
            f"a callable of yours has a Plateau inside, in the schedule of {which}. What that has "
            "seen is not in saved state, and does not come back with it. Make the callable a "
            "dataclass derived from multiopt.schedules.Schedule, with the Plateau in a field, or "
            "keep the state() of the Plateau yourself",
            stacklevel=caller_level(),
        )
