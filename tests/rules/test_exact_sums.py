"""Accumulators against fractions: exact, rounded once, and the same for every cut and order."""

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multiopt.exact import Accumulator
from multiopt.rules.sums import few_norms
from tests.exact_sums import exact_norm, exact_sum, to_float
from tests.libraries import LIBRARIES, Library, missing

DTYPES = ["float32", "float64"]


def exact(x: np.ndarray, squares: bool = True) -> Fraction:
    return exact_sum([x], squares)


def held(total: Accumulator) -> Fraction:
    """What an accumulator holds, by the definition of its integers."""
    *limbs, _, _ = total.to_integers().tolist()
    lowest = {18: -298, 110: -2148}[len(limbs) + 2]
    return sum(
        (Fraction(limb) * Fraction(2) ** (40 * k) for k, limb in enumerate(limbs)), Fraction(0)
    ) * (Fraction(2) ** lowest)


def summed(x: np.ndarray, squares: bool = True) -> Accumulator:
    total = Accumulator("float64" if x.dtype == np.float64 else "float32", squares)
    total.add(x)
    return total


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Numbers from a part of the whole range, with zeros among them, and perhaps a huge one."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    lowest, highest = (-149, 128) if dtype == np.float32 else (-1074, 1024)
    low, high = sorted(draw(st.lists(st.integers(lowest, highest - 1), min_size=2, max_size=2)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([1, 2, 3, 10, 200]))
    x = np.ldexp(rng.uniform(-1, 1, size), rng.integers(low, high + 1, size)).astype(dtype)
    x[rng.random(size) < draw(st.sampled_from([0, 0.1, 0.9]))] = 0
    if draw(st.booleans()):
        x[0] = np.finfo(dtype).max
    return x


@settings(deadline=None)
@given(x=arrays(), cut=st.integers(0, 200), order=st.integers(0, 2**32))
def test_a_sum_is_exact_and_its_norm_rounded_once(x: np.ndarray, cut: int, order: int) -> None:
    total, expected = summed(x), exact(x)
    assert held(total) == expected
    assert total.rounded() == to_float(expected)
    assert total.norm() == exact_norm(x)
    assert held(summed(np.abs(x), squares=False)) == exact(np.abs(x), squares=False)
    # Any cut, in any order.
    mixed = np.random.default_rng(order).permutation(x)
    parts = summed(mixed[:cut]) + summed(mixed[cut:])
    assert parts == total
    assert parts.norm() == total.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2**13 - 1, 2**13, 2**13 + 1, 10**6])
def test_large_arrays(dtype: str, size: int) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(dtype)
    x[::7] *= np.array(1e-12, dtype)
    assert held(summed(x)) == exact(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_ties_go_to_even(dtype: str) -> None:
    # 1 + 2^-53 lies between 1 and the next number; 1 + 3 * 2^-53 between two others.
    plain = Accumulator(dtype, squares=False)
    plain.add(np.array([1.0, 2.0**-53], dtype))
    assert plain.rounded() == 1.0
    plain.add(np.array([2.0**-52], dtype))
    assert plain.rounded() == 1.0 + 2.0**-51
    plain.add(np.array([2.0**-120], dtype))
    assert plain.rounded() == 1.0 + 2.0**-51
    more = Accumulator(dtype, squares=False)
    more.add(np.array([1.0, 2.0**-53, 2.0**-120], dtype))
    assert more.rounded() == 1.0 + 2.0**-52


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_and_many_numbers_make_one_sum(dtype: str) -> None:
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal(n).astype(dtype) for n in (3, 5000, 7, 1)]
    total = Accumulator(dtype)
    for k, part in enumerate(parts):
        total.add(part)
        assert total.norm() == exact_norm(*parts[: k + 1])
    assert held(total) == exact_sum(parts)
    # So many that they do not wait any longer; what comes after them waits again.
    small = [rng.standard_normal(100).astype(dtype) for _ in range(700)]
    total = Accumulator(dtype)
    for part in small:
        total.add(part)
    assert len(total._few) < 2**16
    assert total.norm() == exact_norm(*small)
    assert held(total) == exact_sum(small)


@pytest.mark.parametrize(
    "exponent", [-1074, -540, -538, -512, -485, -451, -450, -449, 490, 499, 500]
)
@pytest.mark.parametrize("more", [0, 1, 3, 500, 511, 512, 900])
def test_numbers_at_the_borders_of_what_is_added_one_by_one(exponent: int, more: int) -> None:
    rng = np.random.default_rng(4)
    # All bits, and others that are larger or zero among them.
    x = np.ldexp(rng.uniform(1, 2, 5), exponent)
    for others in ([], [0.0], [0.0, math.ldexp(1.1, min(exponent + more, 1023))]):
        grad = rng.permutation([*x, *others])
        assert held(summed(grad)) == exact(grad)
        assert summed(grad).norm() == exact_norm(grad)
        assert summed(grad).rounded() == to_float(exact(grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_small_arrays_at_once(dtype: str) -> None:
    rng = np.random.default_rng(5)
    grads = [rng.standard_normal(shape).astype(dtype) for shape in ((3,), (), (0, 2), (7, 9))]
    assert few_norms(grads, dtype) == list(map(exact_norm, grads))
    assert few_norms([*grads, np.full(2, np.inf, dtype)], dtype) is None
    assert few_norms([*grads, np.full(2, np.nan, dtype)], dtype) is None
    assert few_norms([*grads, np.zeros(2**12, dtype)], dtype) is None
    assert few_norms([np.zeros(100, dtype)] * 1000, dtype) is None
    if dtype == "float64":
        assert few_norms([*grads, np.full(2, 1e-200)], dtype) is None
        assert few_norms([*grads, np.full(2, 1e200)], dtype) is None


def test_extreme_magnitudes() -> None:
    assert summed(np.full(4, 1e200)).norm() == 2e200
    assert summed(np.full(4, 1e200)).rounded() == math.inf
    assert summed(np.full(4, 1e-200)).norm() == 2e-200
    assert summed(np.full(4, 5e-324)).norm() == 1e-323
    assert summed(np.full(2, 5e-324)).norm() == 5e-324
    assert summed(np.full(3, np.finfo(np.float64).max)).norm() == math.inf
    assert summed(np.array([3e-45, 1e-45], np.float32)).norm() > 0
    assert summed(np.empty(0)).norm() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_counted(dtype: str) -> None:
    total = summed(np.array([1.0, np.inf, -np.inf, 2.0], dtype))
    assert (total.infinities, total.nans) == (2, 0)
    assert total.rounded() == total.norm() == math.inf
    total.add(np.array([np.nan], dtype))
    assert math.isnan(total.norm())
    assert math.isnan(total.rounded())
    assert held(total) == 5
    again = Accumulator.from_integers(total.to_integers(), dtype)
    assert (again.infinities, again.nans) == (2, 1)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.id)
def test_every_library_gives_the_same_sum(library: Library) -> None:
    if missing(library):
        pytest.skip(str(missing(library)))
    kinds: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16}
    for name in library.dtypes:
        x = np.random.default_rng(1).standard_normal((5, 3)).astype(kinds.get(name, name))
        total = Accumulator("float64" if name == "float64" else "float32")
        total.add(library.param(x))
        assert held(total) == exact(x.astype(np.float64))
    z = (np.arange(6) + 2j).astype(np.complex64)
    total = Accumulator("float32")
    total.add(library.param(z))
    assert total.rounded() == 55 + 24


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_travel_and_add_up(dtype: str) -> None:
    rng = np.random.default_rng(2)
    shards = [
        np.ldexp(rng.uniform(-1, 1, 50), rng.integers(-90, 60, 50)).astype(dtype) for _ in range(9)
    ]
    travelled = np.sum([summed(shard).to_integers() for shard in shards], axis=0)
    assert Accumulator.from_integers(travelled, dtype) == summed(np.concatenate(shards))
    # As many as may be added.
    largest = Accumulator(dtype)
    largest.add(np.full(100, np.finfo(dtype).max))
    many = largest.to_integers() * 2**23
    assert held(Accumulator.from_integers(many, dtype)) == held(largest) * 2**23


def test_bad_input_is_refused_and_changes_nothing() -> None:
    total = summed(np.ones(3, np.float32))
    for given_array, error, message in (
        (np.ones(2), TypeError, r"dtype float64, which needs Accumulator\('float64'\)"),
        (np.ones(2, int), TypeError, "dtype int64; expected one of"),
        ([1.0], TypeError, "the array is a list of 1"),
    ):
        with pytest.raises(error, match=message):
            total.add(given_array)
    plain = Accumulator("float64", squares=False)
    with pytest.raises(ValueError, match="negative elements"):
        plain.add(np.array([1.0, -1.0]))
    with pytest.raises(TypeError, match="expected real numbers"):
        plain.add(np.ones(2, complex))
    with pytest.raises(TypeError, match="expected one of squares"):
        plain.norm()
    with pytest.raises(TypeError, match="expected two of one kind"):
        total + plain
    with pytest.raises(ValueError, match="expected 18 integers"):
        Accumulator.from_integers(np.zeros(17, np.int64), "float32")
    with pytest.raises(ValueError, match="dtype must be"):
        Accumulator("float16")
    assert total.rounded() == 3.0
    assert plain.rounded() == 0.0
    assert repr(total) == "<Accumulator of float32 squares: 3.0>"
