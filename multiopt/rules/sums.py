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
the grids. Compiled kernels compute the same integers. Small arrays of NumPy are added up by
``math.fsum``, which rounds once too, and become part of the integer only if that is asked for.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, chain
from math import fsum, inf, isqrt, nan, prod, sqrt
from typing import Any, Self

import numpy as np
from array_api_compat import device

from multiopt.rules.pieces import (
    FEW,
    bands,
    few_squares,
    highest,
    sum_of_numbers,
    sum_of_squares,
)

__all__ = [
    "LIMB",
    "RANGES",
    "MissingSumError",
    "Sum",
    "few_norms",
    "known_sums",
    "length",
    "norm",
    "root_mean_square",
]

#: The bits of a limb in the integers that travel. A limb has 23 more, so that 2^23 sums can be
#: added as arrays of int64 before a limb overflows.
LIMB = 40

#: By dtype: the exponent of the last bit of the smallest square, and the number of limbs from there
#: to the largest sum of 2^63 squares.
RANGES = {"float32": (-298, 16), "float64": (-2148, 108)}


def length(dtype: str) -> int:
    """How many int64 numbers a sum is: its limbs, and the counts of infinities and NaNs."""
    return RANGES[dtype][1] + 2


#: How many elements are split at once: in the host's memory few enough to stay in its cache, on
#: other devices enough to keep them busy.
ON_HOST, ELSEWHERE = 2**13, 2**20

#: How many numbers wait to be added together.
MOST = 2**16


class Sum:
    """An exact sum of the squares of numbers, or of the numbers themselves.

    Args:
        dtype: ``"float32"`` or ``"float64"``: the dtype of the numbers.
        squares: Whether squares are summed; otherwise the numbers, which must not be negative.

    Attributes:
        infinities: How many infinite elements were added. They are not part of the sum.
        nans: How many elements that are not a number were added.
    """

    __slots__ = ("_dtype", "_few", "_squares", "_total", "infinities", "nans")

    def __init__(self, dtype: str, squares: bool = True) -> None:
        """Begin with the sum of nothing."""
        if dtype not in RANGES:
            raise ValueError(f"dtype must be 'float32' or 'float64'; got {dtype!r}")
        self._dtype, self._squares = dtype, squares
        #: The sum, in units of the last bit of the smallest square.
        self._total = 0
        #: Numbers that belong to the sum too. Their own sum is rounded once in a tenth of the time.
        self._few: list[float] = []
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
        # NumPy's function takes three times as long as the method.
        flat = x.reshape(-1) if xp is np else xp.reshape(x, (-1,))
        size = prod(x.shape)
        if xp is np and self._squares and size <= FEW[self._dtype]:
            terms = few_squares(flat, self._dtype)
            if terms is not None:
                self._few += chain.from_iterable(terms)
                if len(self._few) > MOST:
                    self._settle()
                return
        step = ON_HOST if xp is np else ELSEWHERE
        summed = sum_of_squares if self._squares else sum_of_numbers
        lowest, _ = RANGES[self._dtype]
        total = infinities = nans = 0
        for first in range(0, size, step):
            chunk = flat[first : min(first + step, size)]
            sizes = xp.abs(chunk)
            # NaN and infinity propagate, so one of them shows in the largest.
            largest = highest(xp, sizes)
            if not largest < inf:
                nan_count = _count(xp, xp.isnan(chunk))
                finite = xp.isfinite(chunk)
                infinities += chunk.shape[0] - _count(xp, finite) - nan_count
                nans += nan_count
                sizes = xp.where(finite, sizes, 0.0)
                largest = highest(xp, sizes)
            for numbers, unit, exponent in bands(xp, sizes, largest, self._dtype):
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
            total._few += one._few
            total.infinities += one.infinities
            total.nans += one.nans
        return total

    def __eq__(self, other: object) -> bool:
        """Whether both are exactly the same sum."""
        if not isinstance(other, Sum):
            return NotImplemented
        self._settle()
        other._settle()
        return all(getattr(self, x) == getattr(other, x) for x in Sum.__slots__)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _settle(self) -> None:
        """Add the few numbers to the integer."""
        few, (lowest, _) = self._few, RANGES[self._dtype]
        # The rounded sum, the rounded sum of what is left, and so on until nothing is left.
        while part := fsum(few):
            few.append(-part)
            numerator, denominator = part.as_integer_ratio()
            self._total += (numerator << -lowest) // denominator
        self._few = []

    def _special(self) -> float | None:
        return nan if self.nans else inf if self.infinities else None

    def _significand(self) -> tuple[int, int]:
        """The sum rounded to 53 bits, ties to even: an integer and the exponent of its last bit."""
        self._settle()
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
        if self._few and not self._total:
            return fsum(self._few)
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
        if self._few and not self._total:
            return sqrt(fsum(self._few))
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
        self._settle()
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
        count, numbers = length(dtype), np.asarray(integers).reshape(-1).tolist()
        if len(numbers) != count:
            raise ValueError(f"expected {count} integers for {dtype}; got {len(numbers)}")
        *limbs, made.infinities, made.nans = numbers
        for limb in reversed(limbs):
            made._total = (made._total << LIMB) + limb
        return made


def few_norms(arrays: Sequence[np.ndarray], dtype: str) -> list[float] | None:
    """The norms of small arrays, in a quarter of the time of a ``Sum`` for each.

    Args:
        arrays: The arrays, at least one.
        dtype: Their dtype, ``"float32"`` or ``"float64"``.

    Returns:
        The norms; None if there are too many elements, or elements that ``few_squares`` does not
        take.

    >>> few_norms([np.asarray([3.0, 4.0]), np.zeros((0, 2)), np.asarray(2.0)], "float64")
    [5.0, 0.0, 2.0]
    """
    ends = list(accumulate(array.size for array in arrays))
    if ends[-1] > min(MOST, FEW[dtype] * len(arrays)):
        return None
    terms = few_squares(np.concatenate(arrays, axis=None), dtype)
    if terms is None:
        return None
    spans = list(map(slice, [0, *ends], ends))
    return [sqrt(fsum(chain.from_iterable([x[span] for x in terms]))) for span in spans]


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

    A trace records it as one operation, as it does ``norm``.

    >>> float(root_mean_square(np, np.asarray([[1.0, 7.0]])))
    5.0
    """
    if not isinstance(x, np.ndarray) and hasattr(x, "__array_function__"):
        return x.__array_function__(root_mean_square, (type(x),), (xp, x), {})
    return xp.sqrt((1.0 / max(prod(x.shape), 1)) * _scalar(xp, _squares(xp, x).rounded(), x))


class MissingSumError(Exception):
    """A rule asks for a sum over a whole parameter that is not known yet.

    Attributes:
        part: The sum over the part that is here.
    """

    def __init__(self, part: Sum) -> None:
        """Note the sum."""
        super().__init__("the sum over the whole parameter is not known")
        self.part = part


#: The sums of squares over whole parameters that an update gets in the place of its own.
_known: ContextVar[Iterator[Sum] | None] = ContextVar("known sums", default=None)


@contextmanager
def known_sums(sums: Iterable[Sum]) -> Iterator[None]:
    """Give an update of a part of a parameter the sums of squares over all of it, in order.

    Raises:
        MissingSumError: The update asks for one more.

    >>> whole = Sum("float64")
    >>> whole.add_values(np, np.asarray([3.0, 4.0]))
    >>> with known_sums([whole]):
    ...     float(norm(np, np.asarray([3.0])))
    5.0
    """
    token = _known.set(iter(sums))
    try:
        yield
    finally:
        _known.reset(token)


def _squares(xp: Any, x: Any) -> Sum:
    known = _known.get()
    if known is not None and (given := next(known, None)) is not None:
        return given
    total = Sum("float64" if x.dtype == xp.float64 else "float32")
    total.add_values(xp, x)
    if known is not None:
        raise MissingSumError(total)
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
