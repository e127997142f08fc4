"""What the engines must know of a rule: its numbers, its choices, and whether it can be theirs."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from multiopt.backend import Now
from multiopt.rules import Rule
from multiopt_numpy.trace import Kind, NotTraceable, Trace, attempt, trace_scalars

__all__ = [
    "are_uniform",
    "coefficient_kinds",
    "distinct",
    "number_fields",
    "other_fields",
    "replaced",
    "sample_scalars",
    "traced_scalars",
]


def number_fields(rule: Rule) -> list[tuple[str, int | None]]:
    """The numbers among the hyperparameters: field, and place in it where the field is a tuple."""
    fields: list[tuple[str, int | None]] = []
    for name in rule.ranges:
        value = getattr(rule, name)
        if isinstance(value, tuple):
            fields += [(name, place) for place in range(len(value))]
        else:
            fields.append((name, None))
    return fields


def sample_scalars(rule: Rule, dtype: str) -> Any:
    """Coefficients of a rule, for what they are and not for their values. Asks no schedule."""
    sample = copy.copy(rule)
    for name in rule.ranges:
        value = getattr(rule, name)
        if isinstance(value, tuple):
            numbers: Any = tuple(0.5 if callable(part) else part for part in value)
        else:
            numbers = 0.5 if callable(value) else value
        object.__setattr__(sample, name, numbers)
    return sample.coefficients(1, dtype)


def distinct(rules: Sequence[Rule]) -> tuple[list[Rule], np.ndarray]:
    """The rules of a batch, each object once, and for each position which one it has."""
    places: dict[int, int] = {}
    which = np.array([places.setdefault(id(rule), len(places)) for rule in rules], np.intp)
    return list({id(rule): rule for rule in rules}.values()), which


def replaced(
    rules: list[Rule], which: np.ndarray, now: Sequence[Now]
) -> tuple[list[Rule], np.ndarray]:
    """What ``distinct`` gave, with the rules of this step in their places."""
    if not now:
        return rules, which
    which = which.copy()
    for place, (_, where) in enumerate(now, len(rules)):
        which[where] = place
    return [*rules, *(rule for rule, _ in now)], which


def other_fields(rule: Rule) -> dict[str, Any]:
    """The hyperparameters that are no numbers: switches, and choices of other kinds."""
    return {f.name: getattr(rule, f.name) for f in fields(rule) if f.name not in rule.ranges}


def traced_scalars(rule: Rule) -> Trace | None:
    """How the coefficients of a rule are computed; None if only the host can."""
    try:
        return trace_scalars(type(rule).scalars, number_fields(rule), other_fields(rule))
    except NotTraceable:
        return None


def are_uniform(rule: Rule) -> bool:
    """Whether the coefficients are the same numbers in compiled code, and for arrays of steps."""
    return traced_scalars(rule) is not None


def coefficient_kinds(rule: Rule, scalars: Trace | None) -> Mapping[str, bool | Kind]:
    """What each coefficient of a rule is, for ``trace_update``.

    Args:
        rule: The rule.
        scalars: The trace of the coefficients. Without one every switch may change.

    Raises:
        NotTraceable: It fails for numbers of a sample.
    """
    if scalars is None:
        sample = attempt("the function scalars", lambda: sample_scalars(rule, "float64"))
        return {
            name: Kind.BOOL if isinstance(x, bool) else Kind.NUMBER
            for name, x in vars(sample).items()
        }
    literals = dict(scalars.literals)
    results = zip(scalars.outputs, scalars.results, scalars.kinds, strict=True)
    switches = {
        name: bool(literals[value]) if value in literals else Kind.BOOL
        for name, value, kind in results
        if kind is Kind.BOOL
    }
    return dict.fromkeys(scalars.outputs, Kind.NUMBER) | switches
