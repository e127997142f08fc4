"""What a trace is made of: operations on values, and what each of them makes of which kinds.

>>> kind_of("add", [Kind.FLOAT, Kind.NUMBER], is_host=False)
<Kind.FLOAT: 'float'>
"""

from enum import Enum
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "EXACT",
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
ARITHMETIC = ("add", "subtract", "multiply", "divide", "sqrt", "negative", "abs")

#: What gives an element the same bits wherever it stands in an array: IEEE 754 fixes the results.
#: By NumPy's function the name in the Array API. A vectorized ``exp`` need not, and ``x ** 2`` is
#: not the operation that NumPy makes of it.
EXACT = {getattr(np, name): name for name in (*COMPARISONS, *LOGICAL, *ARITHMETIC)} | {
    np.bitwise_and: "logical_and",
    np.bitwise_or: "logical_or",
    np.invert: "logical_not",
}

#: Integers up to here are numbers of float32, and of what libraries take for an integer.
LARGEST_INTEGER = 2**24


class NotTraceable(Exception):  # noqa: N818 -- an answer, to which the caller has another way
    """A function does what no engine repeats with the same numbers."""


class Kind(Enum):
    """What a value is."""

    #: Of the working dtype: an element of an array, or float64 for coefficients.
    FLOAT = "float"
    #: A host number beside arrays, rounded to their dtype: a coefficient, a literal of an update.
    NUMBER = "number"
    #: A host integer: the number of the step.
    INTEGER = "integer"
    #: What a comparison gives; a switch.
    BOOL = "bool"


class Operation(NamedTuple):
    """One operation of a trace.

    Attributes:
        function: Its name in the Array API, or a loop.
        inputs: The numbers of the values that it takes.
        output: The number of the value that it makes.
        kind: What that is.
    """

    function: "str | Loop"
    inputs: tuple[int, ...]
    output: int
    kind: Kind


class Trace(NamedTuple):
    """What a function of arrays or of numbers does.

    Values have numbers: the inputs from 0, then the literals, then others as they are made.

    Attributes:
        inputs: The names of the inputs.
        literals: Values that are numbers in the text of the function.
        operations: What is done, in order; nothing that no result needs, and nothing twice.
        results: The values that come out.
        outputs: Their names.
        kinds: What they are.
    """

    inputs: tuple[str, ...]
    literals: tuple[tuple[int, float], ...]
    operations: tuple[Operation, ...]
    results: tuple[int, ...]
    outputs: tuple[str, ...]
    kinds: tuple[Kind, ...]


class Loop(NamedTuple):
    """``by_squaring`` as an operation: of the exponent, the results and the squares at first.

    Attributes:
        combined: From results and squares to results.
        squared: From squares to squares.
    """

    combined: Trace
    squared: Trace


def kind_of_literal(value: Any, is_host: bool) -> Kind:
    """What a number in the text of a function is.

    Args:
        value: The number.
        is_host: Whether all is float64, on the host: coefficients. Else numbers are beside arrays.

    Raises:
        NotTraceable: Libraries would make different things of it.
    """
    if is_host and isinstance(value, bool | np.bool_):
        return Kind.BOOL
    # An np.float64 promotes arrays, other numbers of NumPy fall below float64.
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
    """What an operation makes of values of some kinds.

    Args:
        function: Its name in the Array API.
        kinds: What it takes.
        is_host: Whether the host computes it, in float64.

    Raises:
        NotTraceable: Libraries would make different things of them, or none does what it says.
    """
    if function == "where":
        return _kind_of_choice(*kinds)
    if function in LOGICAL:
        if set(kinds) != {Kind.BOOL}:
            raise NotTraceable(f"uses {function} of what is no comparison")
        return Kind.BOOL
    if Kind.BOOL in kinds:
        raise NotTraceable(f"uses {function} of what a comparison gives: use where")
    if function == "negative" or (function == "abs" and is_host):
        return kinds[0]
    if not is_host:
        if Kind.FLOAT not in kinds:
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
    return Kind.FLOAT


def _kind_of_choice(condition: Kind, x: Kind, y: Kind) -> Kind:
    if condition is not Kind.BOOL:
        raise NotTraceable("uses where with a condition that is no comparison")
    if x is y and x is not Kind.NUMBER:
        return x
    if Kind.BOOL in (x, y):
        raise NotTraceable("uses where to choose between a number and a comparison")
    if x is y:
        raise NotTraceable(
            "uses where to choose between two numbers, which NumPy makes float64: one of "
            "the two must be an array (spec/arithmetic.md, rule 4)"
        )
    return Kind.FLOAT
