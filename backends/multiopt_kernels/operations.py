"""The parts of a trace: values of four kinds, and operations on them.

A trace has only operations whose results IEEE 754 fixes to the last bit, and only on kinds of
values that every library treats alike (``spec/arithmetic.md``). ``kind_of`` checks this, and
returns the kind of the result.

>>> kind_of("add", [Kind.FLOAT, Kind.NUMBER], is_host=False)
<Kind.FLOAT: 'float'>
"""

from enum import Enum
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "EXACT",
    "SUMS",
    "Kind",
    "Loop",
    "NotTraceable",
    "Operation",
    "Trace",
    "kind_of",
    "kind_of_literal",
]

COMPARISONS = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
LOGICAL = ("logical_and", "logical_or", "logical_not")
#: Sums over all elements of an array, over each of its rows, and over each of its columns.
SUMS = ("norm", "root_mean_square", "row_means", "column_means")
ARITHMETIC = ("add", "subtract", "multiply", "divide", "sqrt", "negative", "abs")

#: NumPy's functions whose results IEEE 754 fixes, with their names in the Array API. They give an
#: element the same bits wherever it stands in an array; a vectorized ``exp`` may not. ``**`` is not
#: among them because NumPy replaces ``x ** 2``, for example, by another operation.
EXACT = {getattr(np, name): name for name in (*COMPARISONS, *LOGICAL, *ARITHMETIC)} | {
    np.bitwise_and: "logical_and",
    np.bitwise_or: "logical_or",
    np.invert: "logical_not",
}

#: Integers up to this one are exact in float32, and fit the integer types of all libraries.
LARGEST_INTEGER = 2**24


class NotTraceable(Exception):  # noqa: N818 -- an answer, to which the caller has another way
    """A function does something that an engine could not repeat to the last bit."""


class Kind(Enum):
    """What a value is."""

    #: A number in the precision of the function: an element of an array in the compute dtype, or a
    #: float64 number where coefficients are computed.
    FLOAT = "float"
    #: A host number that is combined with arrays and rounded to their dtype: a coefficient, or a
    #: literal in an update.
    NUMBER = "number"
    #: A float64 number in an update, where that is not the compute dtype or need not be: what
    #: ``asarray`` converts, and the norms of arrays.
    WIDE = "wide"
    #: A host integer, such as the step.
    INTEGER = "integer"
    #: The result of a comparison, or a switch.
    BOOL = "bool"


#: From what to what each of these converts, or sums.
CONVERSIONS = {
    "wide": (Kind.FLOAT, Kind.WIDE),
    "narrow": (Kind.WIDE, Kind.FLOAT),
    **dict.fromkeys(("norm", "root_mean_square"), (Kind.FLOAT, Kind.WIDE)),
    **dict.fromkeys(("row_means", "column_means"), (Kind.WIDE, Kind.WIDE)),
}


class Operation(NamedTuple):
    """One operation of a trace.

    Attributes:
        function: The name of the function in the Array API, or a loop.
        inputs: The numbers of its inputs.
        output: The number of its result.
        kind: The kind of its result.
    """

    function: "str | Loop"
    inputs: tuple[int, ...]
    output: int
    kind: Kind


class Trace(NamedTuple):
    """The operations of a function of arrays or of numbers.

    Values are numbered: first the inputs, from 0, then the literals, then the results of the
    operations in their order.

    Attributes:
        inputs: The names of the inputs.
        literals: The numbers that are written in the function, each with the number of its value.
        operations: The operations, in order. Each is needed for a result, and none occurs twice.
        results: The numbers of the values that the function returns.
        outputs: Their names.
        kinds: Their kinds.
    """

    inputs: tuple[str, ...]
    literals: tuple[tuple[int, float], ...]
    operations: tuple[Operation, ...]
    results: tuple[int, ...]
    outputs: tuple[str, ...]
    kinds: tuple[Kind, ...]


class Loop(NamedTuple):
    """A call of ``by_squaring`` as an operation.

    Its inputs are the exponent and the initial numbers of ``result`` and ``square``.

    Attributes:
        combined: The trace of the function from results and squares to results.
        squared: The trace of the function from squares to squares.
    """

    combined: Trace
    squared: Trace


def kind_of_literal(value: Any, is_host: bool) -> Kind:
    """Return the kind of a number that is written in a function.

    Args:
        value: The number.
        is_host: Whether the function computes coefficients, in float64 on the host. Otherwise the
            number is combined with arrays.

    Raises:
        NotTraceable: Libraries would treat the number differently.
    """
    if is_host and isinstance(value, bool | np.bool_):
        return Kind.BOOL
    # An np.float64 promotes arrays. NumPy's other numbers may be less precise than float64.
    if type(value) not in ((int, float, np.float64) if is_host else (int, float)):
        raise NotTraceable(f"computes with {value!r} ({type(value).__name__})")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise NotTraceable(f"computes with the integer {value}; write a float")
    if is_host:
        return Kind.INTEGER if isinstance(value, int) else Kind.FLOAT
    if isfinite(value) and abs(value) > np.finfo(np.float32).max:
        raise NotTraceable(f"computes with {value!r}, which is beyond float32")
    return Kind.NUMBER


def kind_of(function: str, kinds: list[Kind], is_host: bool) -> Kind:
    """Return the kind of the result of an operation.

    Args:
        function: The name of the operation in the Array API.
        kinds: The kinds of its inputs.
        is_host: Whether it is computed on the host, in float64.

    Raises:
        NotTraceable: Libraries would compute different results, or the operation makes no sense for
            these kinds.
    """
    if function == "where":
        return _kind_of_choice(*kinds)
    if function in LOGICAL:
        if set(kinds) != {Kind.BOOL}:
            raise NotTraceable(f"uses {function} of something other than a comparison")
        return Kind.BOOL
    if Kind.BOOL in kinds:
        raise NotTraceable(f"uses {function} of what a comparison gives: use where")
    if function in CONVERSIONS:
        given, made = CONVERSIONS[function]
        if kinds != [given]:
            raise NotTraceable(f"uses {function} of a {kinds[0].value}")
        return made
    if function == "negative" or (function == "abs" and is_host):
        return kinds[0]
    if Kind.WIDE in kinds and Kind.FLOAT in kinds:
        raise NotTraceable(
            f"uses {function} of float64 and the compute dtype: convert with asarray"
        )
    if not is_host:
        if Kind.FLOAT not in kinds and Kind.WIDE not in kinds:
            raise NotTraceable(f"uses {function} of coefficients alone: do it in scalars")
        if function == "divide" and Kind.NUMBER in kinds:
            raise NotTraceable(
                "uses divide with a number, which libraries do in two ways: multiply by its "
                "inverse, or divide an array by an array (spec/arithmetic.md, rule 5)"
            )
    if function in COMPARISONS:
        return Kind.BOOL
    if set(kinds) == {Kind.INTEGER} and function in ("add", "subtract", "multiply"):
        if function == "multiply":
            raise NotTraceable("uses multiply of integers, which may overflow: use floats")
        return Kind.INTEGER
    return Kind.WIDE if Kind.WIDE in kinds else Kind.FLOAT


def _kind_of_choice(condition: Kind, x: Kind, y: Kind) -> Kind:
    if condition is not Kind.BOOL:
        raise NotTraceable("uses where with a condition that is not a comparison")
    if x is y and x is not Kind.NUMBER:
        return x
    if Kind.BOOL in (x, y):
        raise NotTraceable("uses where to choose between a number and a comparison")
    if {x, y} == {Kind.WIDE, Kind.FLOAT}:
        raise NotTraceable("uses where of float64 and the compute dtype: convert with asarray")
    if x is y:
        raise NotTraceable(
            "uses where to choose between two numbers, which NumPy makes float64: one of "
            "the two must be an array (spec/arithmetic.md, rule 4)"
        )
    return Kind.WIDE if Kind.WIDE in (x, y) else Kind.FLOAT
