"""Traces: what a rule computes, as a list of operations that an engine can print or run.

A rule's update is an ordinary Python function, ``update(xp, param, grad, slots, c)``. It is called
with stand-ins for the arrays and coefficients, and the stand-ins record every operation on them.
``Rule.scalars``, which computes the coefficients, is traced in the same way with stand-ins for the
hyperparameters and the step. A trace has no branches: if a switch may change from step to step,
both alternatives are recorded, and a ``where`` selects one.

>>> def descend(xp, param, grad, slots, c):
...     return param - c.lr * (grad + 0.5 * param if c.decays else grad), slots
>>> trace = trace_update(descend, 0, {"lr": Kind.NUMBER, "decays": Kind.BOOL})
>>> for operation in trace.operations:
...     print(operation.function, operation.inputs, operation.output)
multiply (4, 0) 5
add (1, 5) 6
where (3, 6, 1) 7
multiply (2, 7) 8
subtract (0, 8) 9
>>> trace.inputs, trace.literals, trace.results
(('param', 'grad', 'lr', 'decays'), ((4, 0.5),), (9,))

A function that does anything which an engine could not repeat to the last bit has no trace
(``NotTraceable``). The reference engine then runs the update as it is written, or the host computes
the coefficients.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, TypeVar

import numpy as np

from multiopt.rules.rule import Coefficients, named, namespace
from multiopt_kernels.extents import Form
from multiopt_kernels.operations import (
    Kind,
    NotTraceable,
    Trace,
)
from multiopt_kernels.recorder import Axes, Recorder, StandIn, WholeNumPy, traced

_T = TypeVar("_T")

__all__ = ["attempt", "trace_function", "trace_scalars", "trace_update"]

#: The largest number of switches that may change. Each one doubles how often an update is traced.
MOST_SWITCHES = 8


def trace_update(
    update: Callable[..., Any],
    slots: int,
    coefficients: Mapping[str, bool | Kind],
    form: Form | None = None,
) -> Trace:
    """Trace the update of a rule.

    Args:
        update: The update.
        slots: The number of slots.
        coefficients: What each coefficient is, by name: True or False for a switch that is the same
            at every step, ``Kind.BOOL`` for a switch that may change, ``Kind.NUMBER`` for a number.
        form: The form of the parameter if the update treats it as a whole, so that it may take
            norms and means and convert arrays. Of an elementwise update there is none.

    Returns:
        The trace. Its inputs are the parameter, the gradient, the slots and all coefficients; its
        results are the new parameter and the new slots.

    Raises:
        NotTraceable: The update has no trace.
    """
    recorder = Recorder(is_host=False, form=form)
    kept_names = [f"slot{k}" for k in range(slots)]
    axes: list[Axes] = [()] * (2 + slots)
    if form is not None:
        axes = [form.axes_of(extent) for extent in form.extents]
    names = ["param", "grad", *kept_names]
    param, grad, *kept = map(recorder.input, names, [Kind.FLOAT] * len(names), axes)
    c = {
        name: recorder.input(name, Kind.BOOL if isinstance(kind, bool) else kind)
        for name, kind in coefficients.items()
    }

    xp: Any = np if form is None else WholeNumPy(form.dtype)

    def outcome(switches: Mapping[str, bool]) -> list[StandIn]:
        now = Coefficients(**{**c, **switches})
        return _checked(update(xp, param, grad, tuple(kept), now), [param, *kept])

    fixed = {name: kind for name, kind in coefficients.items() if isinstance(kind, bool)}
    free = [name for name, kind in coefficients.items() if kind is Kind.BOOL]
    if len(free) > MOST_SWITCHES:
        raise NotTraceable(f"the update has {len(free)} switches that may change: {free}")

    def every() -> list[StandIn]:
        settings = product([False, True], repeat=len(free))
        outcomes = [
            outcome({**fixed, **dict(zip(free, values, strict=True))}) for values in settings
        ]
        # Settings that differ only in the last switch are neighbors.
        for name in reversed(free):
            pairs = zip(outcomes[::2], outcomes[1::2], strict=True)
            outcomes = [
                [recorder.selected(c[name], x, y) for x, y in zip(on, off, strict=True)]
                for off, on in pairs
            ]
        return outcomes[0]

    results = attempt("the update", every)
    return recorder.trace(results, ["param", *kept_names])


def _checked(new: Any, old: "Sequence[StandIn]") -> "list[StandIn]":
    """Check what an update returned, and return the new parameter and slots as one list.

    Args:
        new: What it returned.
        old: The old parameter and slots.

    Raises:
        NotTraceable: It is not a parameter and a tuple of as many slots, all arrays of the dtype
            and of the shapes of the old ones.
    """
    slots = len(old) - 1
    if not (isinstance(new, tuple) and len(new) == 2):
        raise NotTraceable(f"returns {new!r}, which is not (param, slots)")
    param, kept = new
    if not isinstance(kept, tuple) or len(kept) != slots:
        raise NotTraceable(f"returns {kept!r} as {slots} slots")
    for value, before in zip((param, *kept), old, strict=True):
        if not (isinstance(value, StandIn) and value.kind is Kind.FLOAT):
            raise NotTraceable(f"returns {value!r}, which is not an array of its dtype")
        if value.axes != before.axes:
            raise NotTraceable(f"returns {value!r}, which has not its shape")
    return [param, *kept]


def trace_scalars(
    scalars: Callable[..., Any],
    numbers: Sequence[tuple[str, int | None]],
    others: Mapping[str, Any],
) -> Trace:
    """Trace the function that computes the coefficients of a rule.

    Args:
        scalars: The function, ``scalars(h, step)``.
        numbers: The numeric hyperparameters: for each the name of its field, and the index in it if
            the field is a tuple.
        others: The other hyperparameters.

    Returns:
        The trace. Its inputs are the step and the numbers; its results are the coefficients, as
        float64 numbers and bools.

    Raises:
        NotTraceable: A kernel, or NumPy on arrays of steps, might compute different numbers: the
            function uses ``**`` or ``math``, for example, or branches on a number.
    """
    recorder = Recorder(is_host=True)
    step = recorder.input("step", Kind.INTEGER)
    labels = [name if place is None else f"{name}[{place}]" for name, place in numbers]
    h = namespace(numbers, [recorder.input(label, Kind.FLOAT) for label in labels], others)

    def recorded() -> Trace:
        found = named(scalars(h, step))
        return recorder.trace(found.values(), list(found))

    return attempt("the function scalars", recorded)


def trace_function(function: Callable[..., Any], inputs: Sequence[str]) -> Trace:
    """Trace ``function(xp, *numbers)``, a function of float64 numbers with one result.

    Args:
        function: The function.
        inputs: Names for the numbers.

    Raises:
        NotTraceable: The function has no trace.
    """
    name = function.__name__
    return attempt(
        f"the function {name}", lambda: traced(lambda *x: (function(np, *x),), inputs, [name])
    )


def attempt(what: str, function: Callable[[], _T]) -> _T:
    """Call a function that may be a user's, and turn its errors into ``NotTraceable``.

    Raises:
        NotTraceable: The function raised an error. The message names it and says why there is no
            trace.
    """
    try:
        return function()
    except NotTraceable as refusal:
        raise NotTraceable(f"{what} {refusal}") from None
    except Exception as error:
        raise NotTraceable(f"{what} fails: {error}") from error
