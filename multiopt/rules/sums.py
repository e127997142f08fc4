"""Exact sums of squares and of numbers, and the norms of rules and clipping.

A sum of floating-point numbers depends on the order in which it is added up, so here it is *the
exact real sum, rounded once*: ``spec/arithmetic.md``. Numbers are split on a grid so coarse that
the sum of the upper parts is exact whatever the order, until nothing is left. A ``Sum`` holds the
result as an integer, so it may be put together from parts, in any order:

>>> x = np.asarray([1e16, 1.0, 1.0])
>>> whole, front, back = (Sum("float64", squares=False) for _ in range(3))
>>> whole.add_values(np, x), front.add_values(np, x[:2]), back.add_values(np, x[2:])
(None, None, None)
>>> whole.rounded() == (back + front).rounded() != (1.0 + 1.0) + 1e15
True

All passes over arrays are those of the Array API, with a few numbers brought to the host to choose
the grids. Compiled kernels compute the same integers.
"""

from collections.abc import Iterator
from math import frexp, inf, isqrt, ldexp, nan, prod
from typing import Any, Self

import numpy as np
from array_api_compat import device

__all__ = ["LAST", "LIMB", "RANGES", "Sum", "extra_bits", "norm", "on_grid", "root_mean_square"]

#: The bits of a limb in the integers that travel. A limb has 23 more, so that 2^23 sums can be
#: added as arrays of int64 before a limb overflows.
LIMB = 40

#: By dtype: the exponent of the last bit of the smallest square, and the number of limbs from there
#: to the largest sum of 2^63 squares.
RANGES = {"float32": (-298, 16), "float64": (-2148, 108)}

#: How many elements are split at once: in the host's memory few enough to stay in its cache, on
#: other devices enough to keep them busy.
ON_HOST, ELSEWHERE = 2**13, 2**20

#: The exponent of the last bit of a float64.
LAST = -1074

#: float64 numbers smaller than the largest by more than this many powers of two are summed apart,
#: so that no product of their pieces underflows.
BAND = 200


class Sum:
    """An exact sum of the squares of numbers, or of the numbers themselves.

    Args:
        dtype: ``"float32"`` or ``"float64"``: the dtype of the numbers.
        squares: Whether squares are summed; otherwise the numbers, which must not be negative.

    Attributes:
        infinities: How many infinite elements were added. They are not part of the sum.
        nans: How many elements that are not a number were added.
    """

    __slots__ = ("_dtype", "_squares", "_total", "infinities", "nans")

    def __init__(self, dtype: str, squares: bool = True) -> None:
        """Begin with the sum of nothing."""
        if dtype not in RANGES:
            raise ValueError(f"dtype must be 'float32' or 'float64'; got {dtype!r}")
        self._dtype, self._squares = dtype, squares
        #: The sum, in units of the last bit of the smallest square.
        self._total = 0
        self.infinities = self.nans = 0

    def __repr__(self) -> str:
        """The kind of sum, and its value."""
        what = "squares" if self._squares else "numbers"
        return f"<{type(self).__name__} of {self._dtype} {what}: {self.rounded()!r}>"

    def add_values(self, xp: Any, x: Any) -> None:
        """Add all elements of an array.

        Args:
            xp: The namespace of ``x``.
            x: An array of the dtype of the sum and of any shape. If numbers are summed, it may also
                be a float64 array of float32 values.
        """
        flat, size = xp.reshape(x, (-1,)), prod(x.shape)
        step = ON_HOST if xp is np else ELSEWHERE
        summed = _sum_of_squares if self._squares else _sum_of_numbers
        lowest, _ = RANGES[self._dtype]
        total = infinities = nans = 0
        for first in range(0, size, step):
            chunk = flat[first : min(first + step, size)]
            sizes = xp.abs(chunk)
            # NaN and infinity propagate, so one of them shows in the largest.
            largest = float(xp.max(sizes))
            if not largest < inf:
                nan_count = _count(xp, xp.isnan(chunk))
                finite = xp.isfinite(chunk)
                infinities += chunk.shape[0] - _count(xp, finite) - nan_count
                nans += nan_count
                sizes = xp.where(finite, sizes, 0.0)
                largest = float(xp.max(sizes))
            for numbers, unit, exponent in _bands(xp, sizes, largest, self._dtype):
                found, last = summed(xp, numbers, unit)
                total += found << (last + exponent * (1 + self._squares) - lowest)
        self._total += total
        self.infinities += infinities
        self.nans += nans

    def __add__(self, other: "Sum") -> Self:
        """The sum of both sums, of float64 if one of them is; neither changes.

        Raises:
            TypeError: One is a sum of squares, the other of numbers.
        """
        if not isinstance(other, Sum):
            return NotImplemented
        if self._squares != other._squares:
            raise TypeError(f"cannot add {self!r} and {other!r}: expected two of one kind")
        dtype = "float64" if "float64" in (self._dtype, other._dtype) else "float32"
        total = type(self)(dtype, self._squares)
        lowest, _ = RANGES[total._dtype]
        for one in (self, other):
            total._total += one._total << (RANGES[one._dtype][0] - lowest)
            total.infinities += one.infinities
            total.nans += one.nans
        return total

    def __eq__(self, other: object) -> bool:
        """Whether both are exactly the same sum."""
        if not isinstance(other, Sum):
            return NotImplemented
        return all(getattr(self, x) == getattr(other, x) for x in Sum.__slots__)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _special(self) -> float | None:
        return nan if self.nans else inf if self.infinities else None

    def _significand(self) -> tuple[int, int]:
        """The sum rounded to 53 bits, ties to even: an integer and the exponent of its last bit."""
        lowest, _ = RANGES[self._dtype]
        extra = max(self._total.bit_length() - 53, 0)
        kept, rest = self._total >> extra, self._total & ((1 << extra) - 1)
        half = 1 << extra >> 1
        if extra and (rest > half or (rest == half and kept & 1)):
            kept += 1
        return kept, extra + lowest

    def rounded(self) -> float:
        """The sum, rounded once to 53 bits, ties to even.

        Returns:
            NaN if a NaN was added, else infinity if an infinity was; infinity also beyond the range
            of float64, where ``norm`` is still right.
        """
        special = self._special()
        if special is not None:
            return special
        significand, exponent = self._significand()
        return _quotient(significand, exponent)

    def norm(self) -> float:
        """The square root of the rounded sum, with an unbounded exponent, rounded once to float64.

        Raises:
            TypeError: The sum is not one of squares.
        """
        if not self._squares:
            raise TypeError("this is a sum of numbers; expected one of squares for a norm")
        special = self._special()
        if special is not None:
            return special
        significand, exponent = self._significand()
        if exponent % 2:
            significand, exponent = 2 * significand, exponent - 1
        # 64 bits of the root, and one that says whether there is more: rounded once below.
        shift = 2 * 64
        root = isqrt(significand << shift)
        sticky = root * root != significand << shift
        return _quotient(2 * root + sticky, exponent // 2 - 64 - 1)

    def to_integers(self) -> np.ndarray:
        """The sum as int64 numbers, which add up elementwise: a form that travels.

        Returns:
            A new array of limbs of 40 bits, lowest first, and the counts of infinities and NaNs: 18
            numbers for float32, 110 for float64. The sum of up to 2^23 such arrays, by NumPy or by
            an ``all_reduce``, is what ``from_integers`` takes.
        """
        _, count = RANGES[self._dtype]
        mask = (1 << LIMB) - 1
        limbs = [(self._total >> (LIMB * k)) & mask for k in range(count)]
        return np.array([*limbs, self.infinities, self.nans], np.int64)

    @classmethod
    def from_integers(cls, integers: np.ndarray, dtype: str, squares: bool = True) -> Self:
        """Make a sum from what ``to_integers`` gave, or from the total of several.

        Args:
            integers: The numbers.
            dtype: As for the constructor.
            squares: As for the constructor.

        Raises:
            ValueError: There are more or fewer numbers than a sum of the dtype has.
        """
        made = cls(dtype, squares)
        _, count = RANGES[dtype]
        numbers = np.asarray(integers).reshape(-1).tolist()
        if len(numbers) != count + 2:
            raise ValueError(f"expected {count + 2} integers for {dtype}; got {len(numbers)}")
        *limbs, made.infinities, made.nans = numbers
        for limb in reversed(limbs):
            made._total = (made._total << LIMB) + limb
        return made


def norm(xp: Any, x: Any) -> Any:
    """The Euclidean norm of all elements: exact until the sum and its root are rounded once each.

    Args:
        xp: The namespace of ``x``.
        x: An array of float32 or float64, of any shape.

    Returns:
        A 0-d float64 array, 0 for an empty array. NaN and infinity propagate, NaN first.

    A trace of an update records a norm as one operation: if ``x`` is a stand-in, its
    ``__array_function__`` is called (NEP 18).

    >>> float(norm(np, np.asarray([[3.0, 4.0], [0.0, 12.0]])))
    13.0
    """
    if not isinstance(x, np.ndarray) and hasattr(x, "__array_function__"):
        return x.__array_function__(norm, (type(x),), (xp, x), {})
    return _scalar(xp, _squares(xp, x).norm(), x)


def root_mean_square(xp: Any, x: Any) -> Any:
    """The root mean square of all elements, from the rounded sum of squares; 0 without elements.

    >>> float(root_mean_square(np, np.asarray([[1.0, 7.0]])))
    5.0
    """
    return xp.sqrt((1.0 / max(prod(x.shape), 1)) * _scalar(xp, _squares(xp, x).rounded(), x))


def _squares(xp: Any, x: Any) -> Sum:
    total = Sum("float64" if x.dtype == xp.float64 else "float32")
    total.add_values(xp, x)
    return total


def _scalar(xp: Any, value: float, x: Any) -> Any:
    """A host number as a 0-d float64 array where ``x`` is."""
    return xp.asarray(value, dtype=xp.float64, device=device(x))


def _quotient(number: int, exponent: int) -> float:
    """A number times a power of two, rounded once; infinity where that is too large."""
    try:
        # Python rounds the quotient of two integers correctly, subnormal ones too.
        return float(number << exponent) if exponent >= 0 else number / (1 << -exponent)
    except OverflowError:
        return inf


def _count(xp: Any, flags: Any) -> int:
    return int(xp.sum(xp.astype(flags, xp.int64)))


def _bands(
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
        largest = float(xp.max(sizes))


def _smallest(xp: Any, numbers: Any) -> float:
    """The smallest of numbers >= 0 that is not zero; there must be one."""
    smallest = float(xp.min(numbers))
    return smallest or float(xp.min(xp.where(numbers > 0.0, numbers, inf)))


def _sum_of_squares(xp: Any, numbers: Any, span: tuple[int, int]) -> tuple[int, int]:
    """The exact sum of squares, as an integer and the exponent of its unit.

    The numbers are cut into pieces of so few bits that the scalar product of two is exact in any
    order of additions.
    """
    pieces = _pieces(numbers, span, (53 - extra_bits(numbers.shape[0])) // 2)
    total, unit = 0, 2 * span[1]
    for k, (one, exponent) in enumerate(pieces):
        total += _integer(one @ one, 2 * exponent) << (2 * exponent - unit)
        for other, more in pieces[:k]:
            product = _integer(one @ other, exponent + more)
            total += product << (exponent + more + 1 - unit)
    return total, unit


def _sum_of_numbers(xp: Any, numbers: Any, span: tuple[int, int]) -> tuple[int, int]:
    """The exact sum, as an integer and the exponent of its unit."""
    pieces = _pieces(numbers, span, 53 - extra_bits(numbers.shape[0]))
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


def extra_bits(count: int) -> int:
    """By how many bits a sum of so many numbers is longer than the numbers; at least two."""
    return max((count - 1).bit_length(), 2)


def on_grid(numbers: Any, grid: int) -> Any:
    """Round numbers of up to 51 bits to multiples of 2^grid."""
    anchor = ldexp(1.5, 52 + grid)
    upper = numbers + anchor
    upper -= anchor
    return upper
