"""What the engines need to know about the coefficients of a rule.

An engine depends on whether the coefficients have a trace, so that a kernel can compute them, and
on which of them are switches. A switch that has the same value at every step is resolved when the
update is traced; one that may change becomes a choice in the trace.

Nesterov's look-ahead is on at every step or at none. Whether there is a penalty depends on
``weight_decay``, a number that may change from step to step:

>>> from multiopt.rules import SGD
>>> rule = SGD(lr=0.5, momentum=0.9, nesterov=True)
>>> kinds = coefficient_kinds(rule, traced_scalars(rule))
>>> kinds["lr"].value, kinds["nesterov"], kinds["penalizes"].value
('number', True, 'bool')
"""

from collections.abc import Mapping
from math import isnan
from typing import Any

from multiopt.kinds import number_fields, numbers_of, other_fields
from multiopt.rules import Rule
from multiopt.rules.rule import with_numbers
from multiopt_kernels.operations import Kind, NotTraceable, Trace
from multiopt_kernels.trace import attempt, trace_scalars

__all__ = ["coefficient_kinds", "sample_scalars", "traced_scalars"]


def sample_scalars(rule: Rule, dtype: str) -> Any:
    """Compute coefficients of a rule whose names and types matter, not their values.

    Schedules are not called; 0.5 takes their place.
    """
    columns = number_fields(rule)
    numbers = [0.5 if isnan(number) else number for number in numbers_of(rule, columns)]
    return with_numbers(rule, columns, numbers).coefficients(1, dtype)


def traced_scalars(rule: Rule) -> Trace | None:
    """Trace how the coefficients of a rule are computed; None if only the host can compute them."""
    try:
        return trace_scalars(rule.scalars, number_fields(rule), other_fields(rule))
    except NotTraceable:
        return None


def coefficient_kinds(rule: Rule, scalars: Trace | None) -> Mapping[str, bool | Kind]:
    """Say what each coefficient of a rule is, for ``trace_update``.

    Args:
        rule: The rule.
        scalars: The trace of the coefficients. Without a trace, every switch may change.

    Raises:
        NotTraceable: There is no trace, and ``Rule.scalars`` fails on sample numbers.
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
