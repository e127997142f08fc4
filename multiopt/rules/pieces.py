"""Pieces of numbers, so short that their products and sums are exact: what exact sums are made of.

A product of two float64 numbers has up to 106 bits, but a product of numbers of 26 bits is exact,
and so is the sum of numbers that are multiples of one unit and not too large. Many numbers are cut
on such grids (``sum_of_squares``). Few are faster one by one (``few_squares``):

>>> from math import fsum
>>> for terms in few_squares(np.asarray([3.0, 1.0 + 2.0**-52]), "float64"):
...     print([term.hex() for term in terms])
['0x1.2000000000000p+3', '0x1.0000000000000p+0']
['0x0.0p+0', '0x1.0000000000000p-51']
['0x0.0p+0', '0x1.0000000000000p-104']
"""

from collections.abc import Iterator
from math import frexp, inf, ldexp
from typing import Any

import numpy as np

__all__ = [
    "FEW",
    "LARGEST",
    "bands",
    "bits",
    "few_squares",
    "highest",
    "on_grid",
    "sum_of_numbers",
    "sum_of_squares",
]

#: The exponents of the last bit and of the largest number of a float64.
LAST, LARGEST = -1074, 1024

#: float64 numbers smaller than the largest by more than this many powers of two are summed apart,
#: so that no product of their pieces underflows.
BAND = 200

#: Up to so many numbers of float32 and float64, Python adds faster than NumPy cuts and adds.
FEW = {"float32": 256, "float64": 128}

#: A float64 times this, minus what that is more than itself, has 26 bits (Veltkamp).
SPLIT = np.full(1, 2.0**27 + 1.0)

#: Between these, and if it is zero, the square of a float64 is the sum of three float64 products.
SMALLEST_SQUARE, LARGEST_SQUARE = 2.0**-900, 2.0**1000


def few_squares(x: np.ndarray, dtype: str) -> list[list[float]] | None:
    """The squares of a few numbers, each as the exact sum of one or three numbers.

    Args:
        x: The numbers, as a one-dimensional array.
        dtype: Its dtype, ``"float32"`` or ``"float64"``.

    Returns:
        The first numbers of the sums, the second ones and so on, of which 2^20 and more add up
        without overflow; None if an element is not finite, too large or too small.
    """
    if dtype == "float32":
        squares: list[float] = np.square(x, dtype=np.float64).tolist()
        return [squares] if sum(squares) < inf else None
    with np.errstate(all="ignore"):
        wide = SPLIT * x
        high = wide - (wide - x)
        low = x - high
        products = high * high, (high + high) * low, low * low
    squares, *_ = terms = [product.tolist() for product in products]
    # NaN is not below a bound. Of an infinity or a number that is too large, ``high`` is NaN.
    if not sum(squares) < LARGEST_SQUARE:
        return None
    if min(squares, default=inf) < SMALLEST_SQUARE:
        pairs = zip(squares, x.tolist(), strict=True)
        if not all(square >= SMALLEST_SQUARE or number == 0.0 for square, number in pairs):
            return None
    return terms


def bands(
    xp: Any, sizes: Any, largest: float, dtype: str
) -> Iterator[tuple[Any, tuple[int, int], int]]:
    """Numbers >= 0 as float64 arrays, of which products neither overflow nor underflow.

    Yields:
        The numbers divided by 2^exponent, those outside of the band as zeros; the exponents
        between which their bits are: they are below 2^top and multiples of 2^unit; the exponent.
    """
    while largest > 0:
        top = frexp(largest)[1]
        if dtype == "float32":
            unit = max(frexp(_smallest(xp, sizes))[1] - 24, -149)
            yield xp.astype(sizes, xp.float64), (top, unit), 0
            return
        is_near = sizes >= ldexp(1.0, max(top - BAND, LAST))
        # Two factors, since 2^-top may be out of range. Exact: it makes numbers of 2^-200 and more.
        near = xp.where(is_near, sizes, 0.0) * 2.0 ** (-top // 2) * 2.0 ** (-top - -top // 2)
        # A number has 53 bits, of which the last is not below that of the subnormal ones.
        yield near, (0, max(frexp(_smallest(xp, near))[1] - 53, LAST - top)), top
        sizes = xp.where(is_near, 0.0, sizes)
        largest = highest(xp, sizes)


def highest(xp: Any, numbers: Any) -> float:
    """The largest of some numbers; NaN if one is NaN."""
    # NumPy's ``max`` calls this function, and takes 2 us more for a chunk that takes 25.
    return float(np.maximum.reduce(numbers) if xp is np else xp.max(numbers))


def _smallest(xp: Any, numbers: Any) -> float:
    """The smallest of numbers >= 0 that is not zero; there must be one."""
    smallest = float(np.minimum.reduce(numbers) if xp is np else xp.min(numbers))
    return smallest or float(xp.min(xp.where(numbers > 0.0, numbers, inf)))


def sum_of_squares(xp: Any, numbers: Any, span: tuple[int, int]) -> tuple[int, int]:
    """The exact sum of squares, as an integer and the exponent of its unit.

    The numbers are cut into pieces of so few bits that the scalar product of two is exact in any
    order of additions.
    """
    pieces = _pieces(numbers, span, (53 - bits(numbers.shape[0])) // 2)
    total, unit = 0, 2 * span[1]
    for k, (one, exponent) in enumerate(pieces):
        total += _integer(one @ one, 2 * exponent) << (2 * exponent - unit)
        for other, more in pieces[:k]:
            product = _integer(one @ other, exponent + more)
            total += product << (exponent + more + 1 - unit)
    return total, unit


def sum_of_numbers(xp: Any, numbers: Any, span: tuple[int, int]) -> tuple[int, int]:
    """The exact sum, as an integer and the exponent of its unit."""
    pieces = _pieces(numbers, span, 53 - bits(numbers.shape[0]))
    total = sum(_integer(xp.sum(x), grid) << (grid - span[1]) for x, grid in pieces)
    return total, span[1]


def _pieces(numbers: Any, span: tuple[int, int], width: int) -> list[tuple[Any, int]]:
    """Cut numbers into pieces, each with the exponent of the unit of which it is a multiple.

    Args:
        numbers: The numbers, which may be overwritten.
        span: Two exponents: the numbers are at most 2^top in size, and multiples of 2^unit.
        width: The number of bits of a piece: it has at most 2^width units.
    """
    pieces, (top, unit) = [], span
    while top - unit > width:
        upper = on_grid(numbers, top - width)
        pieces.append((upper, top - width))
        numbers -= upper
        top -= width + 1
    return [*pieces, (numbers, unit)]


def _integer(number: Any, unit: int) -> int:
    return int(ldexp(float(number), -unit))


def bits(count: int) -> int:
    """By how many bits a sum of so many numbers is longer than the numbers; at least two."""
    return max((count - 1).bit_length(), 2)


def on_grid(numbers: Any, grid: int) -> Any:
    """Round numbers of up to 51 bits to multiples of 2^grid."""
    anchor = ldexp(1.5, 52 + grid)
    upper = numbers + anchor
    upper -= anchor
    return upper
