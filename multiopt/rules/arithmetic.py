"""Arithmetic of rules and clipping with the same result everywhere: ``spec/arithmetic.md`` in code.

IEEE 754 leaves no freedom in the results of ``+ - * / sqrt`` and comparisons, and negation, ``abs``
and ``where`` do not round. The functions here use only these operations, in a written order. So any
array library that performs them one by one returns the same bits. Powers are computed so as well,
since libm's ``pow`` may differ in the last bit:

>>> power(0.9, 3) == 0.9 * (0.9 * 0.9)
True

Sums, whose result would depend on their order, are in ``sums``.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from itertools import accumulate
from math import inf, sqrt
from typing import Any

import numpy as np

__all__ = [
    "Host",
    "by_squaring",
    "clamp",
    "clip_coefficient",
    "maximum",
    "one_minus_power",
    "power",
    "rounded",
    "sign",
    "vectorized",
    "where",
]

#: The types of numbers that the loop of powers takes as they are.
HOST = frozenset({int, float, np.float64})


def power(base: Any, exponent: Any) -> Any:
    """``base ** exponent`` for an integer exponent >= 0, in float64, by repeated squaring.

    The bits of the exponent are taken from the lowest to the highest. Only multiplications are
    used, because libm's ``pow`` differs between platforms in the last bit.

    Args:
        base: A number, or an array of numbers.
        exponent: An integer, or an array of integers that broadcasts with ``base``.

    Returns:
        A float, or a float64 array where either argument is an array.

    >>> power(0.9, 3) == 0.9 * (0.9 * 0.9)
    True
    >>> power(0.5, np.array([0, 1, 10])).tolist()
    [1.0, 0.5, 0.0009765625]
    """
    return by_squaring(exponent, (1.0,), (base,), _product, _square)


def one_minus_power(base: Any, exponent: Any) -> Any:
    """``1 - base ** exponent`` for 0 <= base <= 1 and an integer exponent >= 0, in float64.

    This is the loop of ``power`` on complements: for ``r = 1 - x`` and ``s = 1 - y``,
    ``1 - x * y`` is ``r + (1 - r) * s``. Nothing cancels, so the result is within 3 units of
    rounding; the difference ``1 - power(base, exponent)`` is 170 off for a base of 0.999.

    Args:
        base: A number, or an array of numbers.
        exponent: An integer, or an array of integers that broadcasts with ``base``.

    Returns:
        A float, or a float64 array where either argument is an array.

    >>> one_minus_power(0.5, 3)
    0.875
    """
    complements = _complement_of_product, _complement_of_square
    return by_squaring(exponent, (0.0,), (1.0 - base,), *complements)


def _product(result: Any, square: Any) -> tuple[Any, ...]:
    return (result * square,)


def _square(square: Any) -> tuple[Any, ...]:
    return (square * square,)


def _complement_of_product(result: Any, square: Any) -> tuple[Any, ...]:
    return (result + (1.0 - result) * square,)


def _complement_of_square(square: Any) -> tuple[Any, ...]:
    return (square * (2.0 - square),)


def by_squaring(
    exponent: Any,
    result: tuple[Any, ...],
    square: tuple[Any, ...],
    combined: Callable[..., tuple[Any, ...]],
    squared: Callable[..., tuple[Any, ...]],
) -> Any:
    """Run the loop of repeated squaring over the bits of an exponent, lowest bit first.

    If a bit is set, ``square`` is combined into ``result``; after each bit, ``square`` is squared.
    A trace of ``Rule.scalars`` records the loop as one operation, whatever the exponent: if one of
    the numbers is a stand-in, its ``__array_function__`` is called, as by NumPy's own functions
    (NEP 18).

    Args:
        exponent: An integer >= 0, or an array of integers.
        result: Numbers to begin with, or arrays that broadcast with the exponents.
        square: The numbers or arrays that are squared.
        combined: ``combined(*result, *square) -> result``. It uses only ``+ - * /``, its arguments
            and literals.
        squared: ``squared(*square) -> square``, under the same restriction.

    Returns:
        The first element of ``result``: a float, or a float64 array where any argument is an array.

    >>> by_squaring(10, (1.0,), (2.0,), lambda r, s: (r * s,), lambda s: (s * s,))
    1024.0
    """
    for number in (exponent, *result, *square):
        if type(number) in HOST:
            continue
        if isinstance(number, np.ndarray) and number.ndim:
            return _by_squaring_arrays(exponent, result, square, combined, squared)
        if not isinstance(number, np.ndarray) and hasattr(number, "__array_function__"):
            arguments = exponent, result, square, combined, squared
            return number.__array_function__(by_squaring, (type(number),), arguments, {})
    result, square = tuple(map(float, result)), tuple(map(float, square))
    bits = int(exponent)
    for k, factor in enumerate(_squares(square, squared, bits.bit_length())):
        if bits >> k & 1:
            result = combined(*result, *factor)
    return result[0]


@lru_cache(maxsize=256)
def _squares(
    square: tuple[float, ...], squared: Callable[..., tuple[float, ...]], count: int
) -> list[tuple[float, ...]]:
    """Numbers squared 0, 1, ... times. They are the same at every step, and two thirds of its time.

    >>> _squares((3.0,), _square, 3)
    [(3.0,), (9.0,), (81.0,)]
    """
    return list(accumulate(range(1, count), lambda numbers, _: squared(*numbers), initial=square))


def _by_squaring_arrays(
    exponent: Any,
    result: tuple[Any, ...],
    square: tuple[Any, ...],
    combined: Callable[..., tuple[Any, ...]],
    squared: Callable[..., tuple[Any, ...]],
) -> Any:
    bits = np.asarray(exponent, np.int64)
    shape = np.broadcast_shapes(bits.shape, *map(np.shape, (*result, *square)))
    result = tuple(np.full(shape, number, np.float64) for number in result)
    square = tuple(np.asarray(number, np.float64) for number in square)
    for bit in range(int(bits.max(initial=0)).bit_length()):
        is_set = bits & (1 << bit) != 0
        pairs = zip(combined(*result, *square), result, strict=True)
        result = tuple(np.where(is_set, new, old) for new, old in pairs)
        square = squared(*square)
    return result[0]


def vectorized(function: Callable[..., float]) -> Callable[..., Any]:
    """Make a function of host numbers accept arrays of them as well, with the same results.

    >>> vectorized(max)(np.array([1.0, 3.0]), 2.0).tolist()
    [2.0, 3.0]
    """

    @wraps(function)
    def either(*arguments: Any) -> Any:
        if any(map(np.ndim, arguments)):
            return np.vectorize(function, [np.float64])(*arguments)
        return function(*arguments)

    return either


def where(condition: Any, x: Any, y: Any) -> Any:
    """``numpy.where`` for host numbers: a condition that is a bool chooses without NumPy's 1.5 us.

    >>> where(1 < 2, 3.0, 4.0), where(np.array([True, False]), 3.0, 4.0).tolist()
    (3.0, [3.0, 4.0])
    """
    if condition is True:
        return x
    return y if condition is False else np.where(condition, x, y)


def rounded(value: Any, dtype: str) -> float:
    """Round a host number once to ``"float32"`` or ``"float64"``; return it as a Python float.

    In every library a Python float takes the dtype of the array that it is combined with, while an
    ``np.float64`` would promote a float32 array.

    >>> rounded(0.1, "float32")
    0.10000000149011612
    """
    return float(np.dtype(dtype).type(value))


def maximum(xp: Any, a: Any, b: Any) -> Any:
    """The elementwise maximum of two arrays; NaN where either is NaN.

    It is written out because the ``maximum`` of libraries differs on NaN and on the sign of zero.

    >>> maximum(np, np.asarray([1.0, np.nan]), np.asarray([2.0, 0.0])).tolist()
    [2.0, nan]
    """
    return xp.where(a != a, a, xp.where(a > b, a, b))


def clamp(xp: Any, x: Any, bound: float) -> Any:
    """``x`` limited elementwise to [-bound, bound]; NaN stays NaN.

    >>> clamp(np, np.asarray([-3.0, 0.5, np.nan]), 1.0).tolist()
    [-1.0, 0.5, nan]
    """
    x = xp.where(x > bound, bound, x)
    return xp.where(x < -bound, -bound, x)


def sign(xp: Any, x: Any) -> Any:
    """1 for positive and -1 for negative elements; zeros and NaN stay as they are.

    >>> sign(np, np.asarray([-3.0, 0.0, 0.5, np.nan])).tolist()
    [-1.0, 0.0, 1.0, nan]
    """
    return xp.where(x > 0.0, 1.0, xp.where(x < 0.0, -1.0, x))


class Host:
    """A namespace for Python numbers; NumPy would take 5 us for an operation on one."""

    sqrt = staticmethod(sqrt)

    @staticmethod
    def where(condition: bool, x: float, y: float) -> float:
        """``x`` if the condition holds, else ``y``."""
        return x if condition else y


def clip_coefficient(xp: Any, bound: Any, norm: Any, eps: Any) -> Any:
    """The float64 factor that scales a norm down to a bound; 1 if the norm is below it.

    It is NaN for a NaN norm and 0 for an infinite norm, but always 1 for an infinite bound.

    >>> clip_coefficient(np, 1.0, np.array([0.5, 4.0]), 0.0).tolist()
    [1.0, 0.25]
    """
    reach = norm + eps
    ratio = xp.where(reach == 0, inf, bound / xp.where(reach == 0, 1.0, reach))
    return xp.where((bound == inf) | (ratio >= 1), 1.0, ratio)
