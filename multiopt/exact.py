"""Exact sums: the real sum of squares, or of non-negative numbers, rounded once at the very end.

A sum of floating-point numbers depends on the order in which it is added up. An ``Accumulator``
holds the exact sum as an integer instead, so it has the same bits for any order, any split of the
numbers over arrays, threads or machines, and any library:

>>> import numpy as np
>>> from multiopt.exact import Accumulator
>>> x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
>>> whole, front, back = (Accumulator("float32") for _ in range(3))
>>> whole.add(x), front.add(x[:17]), back.add(x[17:][::-1])
(None, None, None)
>>> whole.norm() == (front + back).norm() == (back + front).norm()
True

The passes over an array are NumPy's. Each splits numbers on a grid so coarse that the sum of the
upper parts is exact whatever the order, until nothing is left.
"""

from collections.abc import Iterator
from math import inf, isqrt, ldexp, nan
from typing import Any

import numpy as np

from multiopt.backend import backend_for

__all__ = ["Accumulator"]

#: How many elements are split at once: so few that they stay in the cache.
BLOCK = 2**14

#: The bits of a limb in the integers that travel. A limb has 23 more, so that 2^23 accumulators can
#: be added as arrays of int64 before a limb overflows.
LIMB = 40

#: By dtype: the exponent of the last bit of the smallest square, and the number of limbs from there
#: to the largest sum of 2^63 squares.
RANGES = {"float32": (-298, 16), "float64": (-2148, 108)}

#: float64 numbers smaller than the largest by more than this many powers of two are summed apart,
#: so that no product of halves of them underflows.
BAND = 200


class Accumulator:
    """An exact sum of the squares of numbers, or of the numbers themselves.

    Args:
        dtype: ``"float32"``, for arrays of 32 and 16 bits, or ``"float64"``.
        squares: Whether squares are summed; otherwise the numbers, which must not be negative.

    Attributes:
        infinities: How many infinite elements were added. They are not part of the sum.
        nans: How many elements that are not a number were added.

    Raises:
        ValueError: ``dtype`` is neither of the two.

    >>> total = Accumulator("float64")
    >>> total.add(np.full(4, 1e200))
    >>> total.norm(), total.rounded()
    (2e+200, inf)
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
        return f"<Accumulator of {self._dtype} {what}: {self.rounded()!r}>"

    def add(self, array: Any) -> None:
        """Add all elements of an array; of a complex one, the squares of both parts.

        Args:
            array: An array of any library and shape: float16, bfloat16, float32 or complex64 for an
                accumulator of float32, float64 or complex128 for one of float64.

        Raises:
            TypeError: It is not an array, or its dtype is for the other accumulator.
            ValueError: An element is negative, and numbers are summed instead of squares.
        """
        backend = backend_for(array, "the array")
        layout = backend.layout(array, "the array")
        if layout.compute_dtype != self._dtype:
            raise TypeError(
                f"the array has dtype {layout.dtype}, which needs Accumulator"
                f"({layout.compute_dtype!r}); this one is for {self._dtype}"
            )
        if layout.is_complex and not self._squares:
            raise TypeError(f"the array has dtype {layout.dtype}; expected real numbers")
        real = backend.as_real(array, layout)
        values = backend.to_host(backend.to_compute(real, layout)).reshape(-1)
        if not self._squares and bool((values < 0).any()):
            raise ValueError("the array has negative elements; expected numbers >= 0")
        lowest, _ = RANGES[self._dtype]
        total = infinities = nans = 0
        for first in range(0, values.size, BLOCK):
            block = values[first : first + BLOCK]
            finite = np.isfinite(block)
            if not finite.all():
                nans += int(np.isnan(block).sum())
                infinities += int(np.isinf(block).sum())
                block = block[finite]
            parts = _parts_of_float32 if self._dtype == "float32" else _parts_of_float64
            for numbers, top, unit, exponent in parts(block, self._squares):
                total += _exact_sum(numbers, top, unit) << (unit + exponent - lowest)
        self._total += total
        self.infinities += infinities
        self.nans += nans

    def __add__(self, other: "Accumulator") -> "Accumulator":
        """The sum of both sums; neither changes.

        Raises:
            TypeError: The other is of another kind.
        """
        if not isinstance(other, Accumulator):
            return NotImplemented
        if (self._dtype, self._squares) != (other._dtype, other._squares):
            raise TypeError(f"cannot add {self!r} and {other!r}: expected two of one kind")
        total = Accumulator(self._dtype, self._squares)
        total._total = self._total + other._total
        total.infinities = self.infinities + other.infinities
        total.nans = self.nans + other.nans
        return total

    def __eq__(self, other: object) -> bool:
        """Whether both are exactly the same sum."""
        if not isinstance(other, Accumulator):
            return NotImplemented
        return all(getattr(self, x) == getattr(other, x) for x in self.__slots__)

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
    def from_integers(cls, integers: np.ndarray, dtype: str, squares: bool = True) -> "Accumulator":
        """Make an accumulator from what ``to_integers`` gave, or from a sum of several.

        Args:
            integers: The numbers.
            dtype: As for the constructor.
            squares: As for the constructor.

        Raises:
            ValueError: There are more or fewer numbers than an accumulator of the dtype has.

        >>> one = Accumulator("float32")
        >>> one.add(np.float32([3.0, 4.0]))
        >>> Accumulator.from_integers(one.to_integers() + one.to_integers(), "float32").rounded()
        50.0
        """
        made = cls(dtype, squares)
        _, count = RANGES[dtype]
        numbers = [int(number) for number in np.asarray(integers).reshape(-1)]
        if len(numbers) != count + 2:
            raise ValueError(
                f"expected {count + 2} integers for an accumulator of {dtype}; got {len(numbers)}"
            )
        *limbs, made.infinities, made.nans = numbers
        made._total = sum(limb << (LIMB * k) for k, limb in enumerate(limbs))
        return made


def _quotient(number: int, exponent: int) -> float:
    """A number times a power of two, rounded once; infinity where that is too large."""
    try:
        # Python rounds the quotient of two integers correctly, subnormal ones too.
        return float(number << exponent) if exponent >= 0 else number / (1 << -exponent)
    except OverflowError:
        return inf


#: Numbers to be summed, with two exponents: the numbers are smaller than 2^top in size and
#: multiples of 2^unit; and a third, of the power of two by which they were divided.
Parts = Iterator[tuple[np.ndarray, int, int, int]]


def _parts_of_float32(values: np.ndarray, squares: bool) -> Parts:
    """The squares of float32 numbers, which float64 holds exactly, or the numbers."""
    sizes = np.abs(values).astype(np.float64)
    present = sizes[sizes > 0]
    if present.size:
        top, bottom = (int(np.frexp(size)[1]) for size in (present.max(), present.min()))
        # A number has 24 bits, of which the last is not below that of the subnormal ones.
        unit = max(bottom - 24, -149)
        if squares:
            yield present * present, 2 * top, 2 * unit, 0
        else:
            yield present, top, unit, 0


def _parts_of_float64(values: np.ndarray, squares: bool) -> Parts:
    """Products of the halves of float64 numbers, or the numbers, by bands of their exponents."""
    sizes = np.abs(values)
    left = sizes[sizes > 0]
    while left.size:
        top = int(np.frexp(left.max())[1])
        is_near = left >= ldexp(1.0, max(top - BAND, -1074))
        near, left = left[is_near], left[~is_near]
        # Exact: it makes numbers of at least 2^-200 of them.
        scaled = np.ldexp(near, -top)
        # A number has 53 bits, of which the last is not below that of the subnormal ones.
        unit = max(int(np.frexp(scaled.min())[1]) - 53, -1074 - top)
        if not squares:
            yield scaled, 0, unit, top
            continue
        # Veltkamp's splitting: two halves of 26 bits, whose products are exact.
        wide = scaled * (2.0**27 + 1)
        high = wide - (wide - scaled)
        low = scaled - high
        yield np.concatenate([high * high, 2 * high * low, low * low]), 1, 2 * unit, 2 * top


def _exact_sum(numbers: np.ndarray, top: int, unit: int) -> int:
    """The exact sum of numbers smaller than 2^top in size, in units of 2^unit, which divides them.

    Args:
        numbers: The numbers, float64.
        top: An exponent.
        unit: An exponent.
    """
    total, bits = 0, max((numbers.size - 1).bit_length(), 2)
    while top + bits - unit > 53:
        # Rounded to multiples of 2^grid, so few of them that their sum has 53 bits.
        grid = top + bits - 53
        anchor = ldexp(1.5, 52 + grid)
        upper = (numbers + anchor) - anchor
        total += int(ldexp(float(upper.sum()), -grid)) << (grid - unit)
        numbers = numbers - upper
        top = grid
    return total + int(ldexp(float(numbers.sum()), -unit))
