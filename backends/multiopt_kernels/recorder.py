"""Stand-ins for arrays and numbers, and the recorder of what is done with them.

A traced function is called with stand-ins (``trace``). They have no values: whatever is done with
them is recorded as an operation, or refused (``NotTraceable``).

>>> recorder = Recorder(is_host=False)
>>> x = recorder.input("x", Kind.FLOAT)
>>> (x * x + x).number, [value.function for value in recorder.values]
(2, [None, 'multiply', 'add'])
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from multiopt.rules.arithmetic import by_squaring
from multiopt.rules.means import means
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

__all__ = ["Axes", "Recorder", "StandIn", "WholeNumPy", "traced"]

#: The names of the axes of an array, as in ``Form``; None for an axis of length 1.
Axes = tuple[str | None, ...]

#: The dtype of a stand-in for an array: the compute dtype, whichever it is.
COMPUTE = object()


def traced(
    function: Callable[..., tuple[Any, ...]], inputs: Iterable[str], outputs: Sequence[str]
) -> Trace:
    """Trace a function from float64 numbers to a tuple of float64 numbers."""
    recorder = Recorder(is_host=True)
    results = function(*(recorder.input(name, Kind.FLOAT) for name in inputs))
    if not isinstance(results, tuple) or len(results) != len(outputs):
        raise NotTraceable(f"returns {results!r} as {len(outputs)} numbers")
    return recorder.trace(results, outputs)


class StandIn(NDArrayOperatorsMixin):
    """What a traced function gets in place of an array or a number.

    It records the operations on it. It has no value, so a branch on it is refused.
    """

    def __init__(self, recorder: "Recorder", number: int, axes: Axes = ()) -> None:
        """Stand for a value of a recorder, an array with these axes."""
        self.recorder = recorder
        self.number = number
        self.axes = axes

    @property
    def kind(self) -> Kind:
        """What it stands for."""
        return self.recorder.values[self.number].kind

    @property
    def dtype(self) -> Any:
        """The compute dtype, where an update may ask for it."""
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
        """For messages."""
        return f"a stand-in for a {self.kind.value}"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotTraceable("asks for the value of an array or of a number")

    __bool__ = __float__ = __int__ = __index__ = __array__ = _refuse

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Record an operation of NumPy on elements (NEP 13)."""
        if ufunc not in EXACT or method != "__call__" or options:
            more = "".join(f", {name}=" for name in options)
            raise NotTraceable(f"uses numpy.{ufunc.__name__} ({method}{more})")
        return self.recorder.record(EXACT[ufunc], inputs)

    def __array_function__(self, function: Any, types: Any, inputs: Any, options: Any) -> Any:
        """Record another function (NEP 18)."""
        if function is np.where and len(inputs) == 3 and not options:
            return self.recorder.record("where", inputs)
        if function in (norm, root_mean_square):
            return self.recorder.record(function.__name__, inputs[1:], ())
        if function is means and self.axes[-1:] in (("columns",), ("rows",)):
            name = "row_means" if self.axes[-1] == "columns" else "column_means"
            return self.recorder.record(name, inputs[1:], self.axes[:-1])
        if function is np.matrix_transpose and len(self.axes) > 1:
            *rest, rows, columns = self.axes
            return StandIn(self.recorder, self.number, (*rest, columns, rows))
        if function is np.expand_dims and options.get("axis") in (-1, -2):
            after = len(self.axes) + 1 + options["axis"]
            axes = *self.axes[:after], None, *self.axes[after:]
            return StandIn(self.recorder, self.number, axes)
        if function is by_squaring:
            exponent, result, square, combined, squared = inputs
            return self.recorder.loop(exponent, result, square, combined, squared)
        raise NotTraceable(f"uses {function.__module__}.{function.__name__}")


class WholeNumPy:
    """NumPy, with conversions, which it does not dispatch to stand-ins by itself."""

    def __init__(self, dtype: str) -> None:
        """Compute in a dtype."""
        self._dtype = dtype

    def finfo(self, dtype: Any) -> Any:
        """The limits of the compute dtype."""
        if dtype is not COMPUTE:
            raise NotTraceable(f"asks for the limits of {dtype!r}")
        return np.finfo(self._dtype)

    def __getattr__(self, name: str) -> Any:
        """Everything else is NumPy's."""
        return getattr(np, name)

    def asarray(self, x: Any, dtype: Any) -> Any:
        """Convert a stand-in to float64, or to the compute dtype."""
        if not isinstance(x, StandIn) or dtype not in (np.float64, COMPUTE):
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
    given = [x.axes[::-1] for x in inputs if isinstance(x, StandIn)]
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


class Recorder:
    """Records what traced functions do with stand-ins.

    Args:
        is_host: Whether the values are coefficients, computed in float64 on the host. Otherwise
            they are elements of arrays, combined with host numbers.
        form: The form of the parameter if the update treats it as a whole.
    """

    def __init__(self, is_host: bool, form: Form | None = None) -> None:
        """Begin without values."""
        self.is_host, self.form = is_host, form
        self.names: list[str] = []
        self.values: list[_Value] = []
        # The number of each value by how it is made, so that nothing is computed twice.
        self._known: dict[Any, int] = {}

    def input(self, name: str, kind: Kind, axes: Axes = ()) -> StandIn:
        """A stand-in for an input."""
        self.names.append(name)
        self.values.append(_Value(kind))
        return StandIn(self, len(self.values) - 1, axes)

    def record(self, function: str, inputs: Sequence[Any], axes: Axes | None = None) -> StandIn:
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
    ) -> StandIn:
        """Record a call of ``by_squaring``, as one operation."""
        if not self.is_host:
            raise NotTraceable("uses by_squaring, which is for coefficients")
        results = [f"result{k}" for k in range(len(result))]
        squares = [f"square{k}" for k in range(len(square))]
        loop = Loop(
            traced(combined, [*results, *squares], results), traced(squared, squares, squares)
        )
        numbers = tuple(self._number(value) for value in (exponent, *result, *square))
        if any(self.values[n].kind is Kind.BOOL for n in numbers):
            raise NotTraceable("uses by_squaring of what a comparison gives")
        return self._made(_Value(Kind.FLOAT, loop, numbers))

    def selected(self, switch: StandIn, on: StandIn, off: StandIn) -> StandIn:
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

        return StandIn(self, chosen(on.number, off.number), on.axes)

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

    def _made(self, value: _Value) -> StandIn:
        # Literals are compared as text, which tells 0.0 from -0.0 and 1 from True.
        key = value.kind, repr(value.function), value.inputs, repr(value.literal)
        if key not in self._known:
            self._known[key] = len(self.values)
            self.values.append(value)
        return StandIn(self, self._known[key])

    def _number(self, value: Any) -> int:
        """Return the number of a value. A literal is recorded first."""
        if isinstance(value, StandIn):
            if value.recorder is not self:
                raise NotTraceable("uses a number that is not among its arguments")
            return value.number
        kind = kind_of_literal(value, self.is_host)
        # Converted to Python's own type, whose text determines the value.
        plain = bool(value) if kind is Kind.BOOL else value if type(value) is int else float(value)
        return self._made(_Value(kind, literal=plain)).number
