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

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product, zip_longest
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from multiopt.rules.arithmetic import by_squaring
from multiopt.rules.means import means
from multiopt.rules.rule import Coefficients, named, namespace
from multiopt.rules.sums import norm, root_mean_square
from multiopt_kernels.extents import Form
from multiopt_kernels.operations import (
    EXACT,
    Kind,
    Loop,
    NotTraceable,
    Operation,
    Trace,
    kind_of,
    kind_of_literal,
)

_T = TypeVar("_T")

__all__ = ["attempt", "trace_function", "trace_scalars", "trace_update"]

#: The names of the axes of an array, as in ``Form``; None for an axis of length 1.
Axes = tuple[str | None, ...]

#: The dtype of a stand-in for an array: the compute dtype, whichever it is.
COMPUTE = object()

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
    recorder = _Recorder(is_host=False, form=form)
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

    xp: Any = np if form is None else _Whole(form.dtype)

    def outcome(switches: Mapping[str, bool]) -> list[_StandIn]:
        now = Coefficients(**{**c, **switches})
        return _checked(update(xp, param, grad, tuple(kept), now), [param, *kept])

    fixed = {name: kind for name, kind in coefficients.items() if isinstance(kind, bool)}
    free = [name for name, kind in coefficients.items() if kind is Kind.BOOL]
    if len(free) > MOST_SWITCHES:
        raise NotTraceable(f"the update has {len(free)} switches that may change: {free}")

    def every() -> list[_StandIn]:
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


def _checked(new: Any, old: "Sequence[_StandIn]") -> "list[_StandIn]":
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
        if not (isinstance(value, _StandIn) and value.kind is Kind.FLOAT):
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
    recorder = _Recorder(is_host=True)
    step = recorder.input("step", Kind.INTEGER)
    labels = [name if place is None else f"{name}[{place}]" for name, place in numbers]
    h = namespace(numbers, [recorder.input(label, Kind.FLOAT) for label in labels], others)

    def traced() -> Trace:
        found = named(scalars(h, step))
        return recorder.trace(found.values(), list(found))

    return attempt("the function scalars", traced)


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
        f"the function {name}", lambda: _traced(lambda *x: (function(np, *x),), inputs, [name])
    )


def _traced(
    function: Callable[..., tuple[Any, ...]], inputs: Iterable[str], outputs: Sequence[str]
) -> Trace:
    """Trace a function from float64 numbers to a tuple of float64 numbers."""
    recorder = _Recorder(is_host=True)
    results = function(*(recorder.input(name, Kind.FLOAT) for name in inputs))
    if not isinstance(results, tuple) or len(results) != len(outputs):
        raise NotTraceable(f"returns {results!r} as {len(outputs)} numbers")
    return recorder.trace(results, outputs)


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


class _StandIn(NDArrayOperatorsMixin):
    """What a traced function gets in place of an array or a number.

    It records the operations on it. It has no value, so a branch on it is refused.
    """

    def __init__(self, recorder: "_Recorder", number: int, axes: Axes = ()) -> None:
        self.recorder = recorder
        self.number = number
        self.axes = axes

    @property
    def kind(self) -> Kind:
        return self.recorder.values[self.number].kind

    @property
    def dtype(self) -> Any:
        if self.kind is Kind.FLOAT and self.recorder.form is not None:
            return COMPUTE
        raise AttributeError(f"{self!r} has no attribute 'dtype'")

    @property
    def ndim(self) -> int:
        """The number of axes; that of a stack of matrices is that of a matrix."""
        form = self.recorder.form
        if form is not None and form.axes != ("elements",):
            return len(self.axes)
        raise AttributeError(f"{self!r} has no attribute 'ndim'")

    def __repr__(self) -> str:
        return f"a stand-in for a {self.kind.value}"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotTraceable("asks for the value of an array or of a number")

    __bool__ = __float__ = __int__ = __index__ = __array__ = _refuse

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if ufunc not in EXACT or method != "__call__" or options:
            more = "".join(f", {name}=" for name in options)
            raise NotTraceable(f"uses numpy.{ufunc.__name__} ({method}{more})")
        return self.recorder.record(EXACT[ufunc], inputs)

    def __array_function__(self, function: Any, types: Any, inputs: Any, options: Any) -> Any:
        if function is np.where and len(inputs) == 3 and not options:
            return self.recorder.record("where", inputs)
        if function in (norm, root_mean_square):
            return self.recorder.record(function.__name__, inputs[1:], ())
        if function is means and self.axes[-1:] in (("columns",), ("rows",)):
            name = "row_means" if self.axes[-1] == "columns" else "column_means"
            return self.recorder.record(name, inputs[1:], self.axes[:-1])
        if function is np.matrix_transpose and len(self.axes) > 1:
            *rest, rows, columns = self.axes
            return _StandIn(self.recorder, self.number, (*rest, columns, rows))
        if function is np.expand_dims and options.get("axis") in (-1, -2):
            after = len(self.axes) + 1 + options["axis"]
            axes = *self.axes[:after], None, *self.axes[after:]
            return _StandIn(self.recorder, self.number, axes)
        if function is by_squaring:
            exponent, result, square, combined, squared = inputs
            return self.recorder.loop(exponent, result, square, combined, squared)
        raise NotTraceable(f"uses {function.__module__}.{function.__name__}")


class _Whole:
    """NumPy, with conversions, which it does not dispatch to stand-ins by itself."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def finfo(self, dtype: Any) -> Any:
        """The limits of the compute dtype."""
        if dtype is not COMPUTE:
            raise NotTraceable(f"asks for the limits of {dtype!r}")
        return np.finfo(self._dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def asarray(self, x: Any, dtype: Any) -> Any:
        """Convert a stand-in to float64, or to the compute dtype."""
        if not isinstance(x, _StandIn) or dtype not in (np.float64, COMPUTE):
            raise NotTraceable(f"converts {x!r} to {dtype!r}")
        is_wide = dtype is not COMPUTE
        if x.kind is (Kind.WIDE if is_wide else Kind.FLOAT):
            return x
        return x.recorder.record("wide" if is_wide else "narrow", [x], x.axes)


def _together(inputs: Iterable[Any]) -> Axes:
    """The axes of the result of an elementwise operation.

    Raises:
        NotTraceable: Some inputs have different axes in the same place.
    """
    given = [x.axes[::-1] for x in inputs if isinstance(x, _StandIn)]
    places = [set(names) - {None} for names in zip_longest(*given)]
    if any(len(names) > 1 for names in places):
        raise NotTraceable(f"combines arrays with the axes {[axes[::-1] for axes in given]}")
    return tuple(next(iter(names), None) for names in reversed(places))


class _Value(NamedTuple):
    """A value of a recorder: an input, a literal, or the result of an operation."""

    kind: Kind
    function: Any = None
    inputs: tuple[int, ...] = ()
    literal: Any = None


class _Recorder:
    """Records what traced functions do with stand-ins.

    Args:
        is_host: Whether the values are coefficients, computed in float64 on the host. Otherwise
            they are elements of arrays, combined with host numbers.
        form: The form of the parameter if the update treats it as a whole.
    """

    def __init__(self, is_host: bool, form: Form | None = None) -> None:
        self.is_host, self.form = is_host, form
        self.names: list[str] = []
        self.values: list[_Value] = []
        # The number of each value by how it is made, so that nothing is computed twice.
        self._known: dict[Any, int] = {}

    def input(self, name: str, kind: Kind, axes: Axes = ()) -> _StandIn:
        self.names.append(name)
        self.values.append(_Value(kind))
        return _StandIn(self, len(self.values) - 1, axes)

    def record(self, function: str, inputs: Sequence[Any], axes: Axes | None = None) -> _StandIn:
        """Record an operation and return a stand-in for its result.

        Args:
            function: The name of the operation.
            inputs: Its inputs.
            axes: The axes of the result; None for those of the inputs together.
        """
        numbers = tuple(self._number(value) for value in inputs)
        kind = kind_of(function, [self.values[n].kind for n in numbers], self.is_host)
        made = self._made(_Value(kind, function, numbers))
        made.axes = _together(inputs) if axes is None else axes
        return made

    def loop(
        self,
        exponent: Any,
        result: tuple[Any, ...],
        square: tuple[Any, ...],
        combined: Callable[..., tuple[Any, ...]],
        squared: Callable[..., tuple[Any, ...]],
    ) -> _StandIn:
        """Record a call of ``by_squaring``, as one operation."""
        if not self.is_host:
            raise NotTraceable("uses by_squaring, which is for coefficients")
        results = [f"result{k}" for k in range(len(result))]
        squares = [f"square{k}" for k in range(len(square))]
        loop = Loop(
            _traced(combined, [*results, *squares], results), _traced(squared, squares, squares)
        )
        numbers = tuple(self._number(value) for value in (exponent, *result, *square))
        if any(self.values[n].kind is Kind.BOOL for n in numbers):
            raise NotTraceable("uses by_squaring of what a comparison gives")
        return self._made(_Value(Kind.FLOAT, loop, numbers))

    def selected(self, switch: _StandIn, on: _StandIn, off: _StandIn) -> _StandIn:
        """Record a choice between two values.

        If both are made by the same operation, the choice is made between its inputs, so that the
        operation is computed once.
        """
        known: dict[tuple[int, int], int] = {}

        def chosen(x: int, y: int) -> int:
            if x == y:
                return x
            if (x, y) not in known:
                a, b = self.values[x], self.values[y]
                if a.function is not None and (a.function, a.kind) == (b.function, b.kind):
                    inputs = tuple(map(chosen, a.inputs, b.inputs))
                    made = _Value(a.kind, a.function, inputs)
                else:
                    kind = a.kind if a.kind is b.kind else Kind.FLOAT
                    made = _Value(kind, "where", (switch.number, x, y))
                known[x, y] = self._made(made).number
            return known[x, y]

        return _StandIn(self, chosen(on.number, off.number), on.axes)

    def trace(self, results: Iterable[Any], outputs: Sequence[str]) -> Trace:
        """Return the trace of some results, without the operations that none of them needs."""
        ends = [self._number(value) for value in results]
        count = len(self.names)
        needed, waiting = set(range(count)), list(ends)
        while waiting:
            value = waiting.pop()
            if value not in needed:
                needed.add(value)
                waiting += self.values[value].inputs
        made = sorted(needed, key=lambda n: (n >= count and self.values[n].function is not None, n))
        number = {value: k for k, value in enumerate(made)}
        rest = [(number[n], self.values[n]) for n in made[count:]]
        return Trace(
            tuple(self.names),
            tuple((k, v.literal) for k, v in rest if v.function is None),
            tuple(
                Operation(v.function, tuple(number[n] for n in v.inputs), k, v.kind)
                for k, v in rest
                if v.function is not None
            ),
            tuple(number[end] for end in ends),
            tuple(outputs),
            tuple(self.values[end].kind for end in ends),
        )

    def _made(self, value: _Value) -> _StandIn:
        # Literals are compared as text, which tells 0.0 from -0.0 and 1 from True.
        key = value.kind, repr(value.function), value.inputs, repr(value.literal)
        if key not in self._known:
            self._known[key] = len(self.values)
            self.values.append(value)
        return _StandIn(self, self._known[key])

    def _number(self, value: Any) -> int:
        """Return the number of a value. A literal is recorded first."""
        if isinstance(value, _StandIn):
            if value.recorder is not self:
                raise NotTraceable("uses a number that is not among its arguments")
            return value.number
        kind = kind_of_literal(value, self.is_host)
        # Converted to Python's own type, whose text determines the value.
        plain = bool(value) if kind is Kind.BOOL else value if type(value) is int else float(value)
        return self._made(_Value(kind, literal=plain)).number
