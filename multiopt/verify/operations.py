"""The operations that equal results rest on, and their right results by integer arithmetic.

A number is its bits here, so that a processor that takes subnormal numbers for zeros, or a root
that is off by one unit in the last place, has no say in what is right:

>>> bits = np.array([2.0], np.float32).view(np.uint32)
>>> root = right_bits(OPERATIONS["sqrt"], [bits], FORMATS["float32"])
>>> root.view(np.float32).tolist() == np.sqrt(np.array([2.0], np.float32)).tolist()
True
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import isqrt
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "FORMATS",
    "OPERATIONS",
    "Format",
    "Operation",
    "cases",
    "differ",
    "nearest_bits",
    "right_bits",
    "wrong",
]


class Format(NamedTuple):
    """A floating-point format.

    Attributes:
        bits: The unsigned type that holds its bits.
        mantissa: The bits of a significand, the hidden one included.
        exponents: The bits of an exponent.
    """

    bits: Any
    mantissa: int
    exponents: int

    @property
    def last(self) -> int:
        """The exponent of the last bit of a subnormal number."""
        return 3 - int(2 ** (self.exponents - 1)) - self.mantissa

    @property
    def infinity(self) -> int:
        """The bits of infinity."""
        return int(2**self.exponents - 1) << (self.mantissa - 1)

    @property
    def sign(self) -> int:
        """The bit of the sign."""
        return int(2 ** (self.mantissa + self.exponents - 1))


FORMATS = {
    "float16": Format(np.uint16, 11, 5),
    "bfloat16": Format(np.uint16, 8, 8),
    "float32": Format(np.uint32, 24, 8),
    "float64": Format(np.uint64, 53, 11),
}


class Operation(NamedTuple):
    """An operation that rules use.

    Attributes:
        name: Its name in the Array API.
        perform: From a namespace and arrays to the result of a library.
        exact: From exact numbers to the exact result: a fraction, a truth value, or None where it
            has none. The root is given as its square.
        inputs: The number of arrays.
    """

    name: str
    perform: Callable[..., Any]
    exact: Callable[..., Any]
    inputs: int = 2


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("add", lambda xp, x, y: x + y, lambda x, y: x + y),
        Operation("subtract", lambda xp, x, y: x - y, lambda x, y: x - y),
        Operation("multiply", lambda xp, x, y: x * y, lambda x, y: x * y),
        Operation("divide", lambda xp, x, y: x / y, lambda x, y: x / y),
        Operation("sqrt", lambda xp, x: xp.sqrt(x), lambda x: x if x >= 0 else None, 1),
        Operation("less", lambda xp, x, y: x < y, lambda x, y: x < y),
        Operation("equal", lambda xp, x, y: x == y, lambda x, y: x == y),
    )
}


def cases(dtype: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of finite numbers of the whole range of a dtype, the same ones every time.

    A quarter are as near as can be to numbers whose roots are exact, a quarter are subnormal or
    nearly so, and a quarter of the pairs are so near to each other that their difference cancels.
    """
    form = FORMATS[dtype]
    one, sign = form.bits(1), form.bits(form.sign)
    rng = np.random.default_rng(0)
    largest = np.iinfo(form.bits).max
    x, y = (rng.integers(0, largest, count, form.bits, endpoint=True) for _ in range(2))
    low, near, roots = (rng.integers(0, count, count // 4) for _ in range(3))
    small = sign | form.bits(2**form.mantissa - 1)
    x[low], y[low] = x[low] & small, y[low] & small
    y[near] = x[near] + rng.integers(0, 3, len(near)).astype(form.bits)
    # The square of half as many bits is exact. It and its neighbours are the hardest for a root.
    half = rng.integers(1, 2 ** (form.mantissa // 2), len(roots))
    squares = (half * half).astype(dtype).view(form.bits)
    x[roots] = squares + rng.integers(0, 3, len(roots)).astype(form.bits) - one
    for bits in (x, y):
        is_special = bits & form.bits(form.infinity) == form.infinity
        bits[is_special] ^= form.bits(2 ** (form.mantissa - 1))
    # Nothing is divided by zero.
    y[y & ~sign == 0] |= one
    return x.view(dtype), y.view(dtype)


def wrong(operation: Operation, inputs: Sequence[np.ndarray], results: np.ndarray) -> np.ndarray:
    """Where results are not the right ones. Zeros of either sign are alike, and so are all NaNs."""
    form = FORMATS[str(inputs[0].dtype)]
    bits = [x.view(form.bits) for x in inputs[: operation.inputs]]
    expected = right_bits(operation, bits, form)
    if expected.dtype == np.bool_:
        return np.asarray(results != expected)
    return differ(results.view(form.bits), expected, form)


def differ(found: np.ndarray, expected: np.ndarray, form: Format) -> np.ndarray:
    """Where two arrays of bits are different numbers."""
    size = form.bits(form.sign - 1)
    a, b = found & size, expected & size
    both_nan, both_zero = (a > form.infinity) & (b > form.infinity), (a == 0) & (b == 0)
    return np.asarray((found != expected) & ~both_nan & ~both_zero)


def right_bits(operation: Operation, inputs: Sequence[np.ndarray], form: Format) -> np.ndarray:
    """The right results of an operation on finite numbers, all as bits; or truth values."""
    numbers = [[_fraction(bits, form) for bits in x.tolist()] for x in inputs]
    results = [operation.exact(*values) for values in zip(*numbers, strict=True)]
    if isinstance(results[0], bool):
        return np.array(results)
    rounded = _root if operation.name == "sqrt" else nearest
    return np.array([rounded(x, form) for x in results], form.bits)


def nearest_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of the nearest numbers of another dtype."""
    form, own = FORMATS[dtype], FORMATS[str(x.dtype)]
    numbers = [_fraction(bits, own) for bits in x.view(own.bits).tolist()]
    return np.array([nearest(number, form) for number in numbers], form.bits)


def _fraction(bits: int, form: Format) -> Fraction:
    """The number with these bits."""
    size = bits & (form.sign - 1)
    exponent, rest = divmod(size, 2 ** (form.mantissa - 1))
    if exponent:
        rest += 2 ** (form.mantissa - 1)
    power = max(exponent, 1) - 1 + form.last
    number = Fraction(rest << power) if power >= 0 else Fraction(rest, 1 << -power)
    return -number if bits & form.sign else number


def nearest(x: Fraction | None, form: Format) -> int:
    """The bits of the nearest number, ties to even; NaN for None."""
    if x is None:
        return form.infinity + 1
    return _rounded(abs(x.numerator), x.denominator, form) + (form.sign if x < 0 else 0)


def _rounded(number: int, divisor: int, form: Format, sticky: bool = False) -> int:
    """The bits of a quotient that is not negative, and a little larger if it is ``sticky``."""
    if not number:
        return 0
    power = max(number.bit_length() - divisor.bit_length() - form.mantissa, form.last - 1)
    while True:
        # At most one time too often: the quotient of lengths is off by one at most.
        upper, lower = (number, divisor << power) if power >= 0 else (number << -power, divisor)
        kept, rest = divmod(upper, lower)
        if kept.bit_length() <= form.mantissa and power >= form.last:
            break
        power += 1
    twice = 2 * rest + (1 if sticky else 0)
    if twice > lower or (twice == lower and kept & 1):
        kept += 1
    return min(kept + ((power - form.last) << (form.mantissa - 1)), form.infinity)


def _root(x: Fraction | None, form: Format) -> int:
    """The bits of the nearest number to a root."""
    if x is None:
        return form.infinity + 1
    # All denominators are powers of two. Twice as many bits as a number has, and one more that
    # says whether there are others.
    shift = 2 * (2 * form.mantissa + x.denominator.bit_length())
    square = (x.numerator << shift) // x.denominator
    root = isqrt(square)
    is_more = root * root * x.denominator != x.numerator << shift
    return _rounded(2 * root + is_more, 2 << (shift // 2), form)
