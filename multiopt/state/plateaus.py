"""What each ``Plateau`` has seen, in saved state, and warnings where it cannot be saved.

A ``Plateau`` inside a callable of the user's own is out of reach; ``docs/schedules.md`` says under
"Saving" what to do about it.
"""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from multiopt.errors import caller_level
from multiopt.kinds import formulas
from multiopt.rules import Rule
from multiopt.rules.rule import is_schedule
from multiopt.schedules import Plateau
from multiopt.schedules.description import left_behind, observers
from multiopt.schedules.plateau import is_observed
from multiopt.state.record import Form, Saved
from multiopt.step.report import abridged

if TYPE_CHECKING:
    from multiopt.registry import Registry

__all__ = ["observe", "pending_now", "warn_of_left_behind", "warn_of_plateaus"]


def observe(
    rule: Rule | Mapping[str, Any],
    observed: Mapping[str, Mapping[str, Any]],
    ahead: bool = False,
) -> list[tuple[Plateau, dict[str, Any]]]:
    """Load the saved state of each ``Plateau`` into the one at the same place in a rule.

    Args:
        rule: The rule, or some of its hyperparameters by name.
        observed: The saved states, by place.
        ahead: Whether to skip a ``Plateau`` that has observed at least as much as its saved state.

    Returns:
        Each ``Plateau`` that was changed, with its state before.
    """
    before: list[tuple[Plateau, dict[str, Any]]] = []
    values = rule if isinstance(rule, Mapping) else _values(rule)
    for name, value in values.items() if observed else ():
        for place, plateau in observers(value, name):
            state = observed.get(place)
            if state is not None and not (ahead and plateau.observed >= state["observed"]):
                before.append((plateau, plateau.state()))
                plateau.load_state(state)
    return before


def _values(rule: Rule) -> dict[str, Any]:
    """The hyperparameters of a rule that may have schedules."""
    return {name: getattr(rule, name) for name in rule.ranges}


def pending_now(registry: "Registry") -> dict[str, Saved]:
    """The pending state of a registry, with what each ``Plateau`` has seen since it was loaded."""
    forms: dict[tuple[int, int], Form] = {}
    current: dict[str, Saved] = {}
    for name, saved in registry.pending.items():
        own = registry.settings.get(name, {})
        key = id(saved.form), id(own) if own else 0
        if key not in forms:
            usual = registry.rule
            values = _values(usual) if isinstance(usual, Rule) else registry.settings.get(None, {})
            observed = dict(saved.form.rule.observed)
            for what, value in {**values, **own}.items():
                for place, plateau in observers(value, what):
                    state, before = plateau.state(), observed.get(place)
                    if is_observed(state) and (
                        before is None or plateau.observed >= before["observed"]
                    ):
                        observed[place] = state
            rule = saved.form.rule._replace(observed=observed)
            forms[key] = saved.form._replace(rule=rule)
        current[name] = saved._replace(form=forms[key])
    return current


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
