"""Norms are exact sums, rounded once: for every library, engine, layout, order and division."""

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import multiopt as mo
from multiopt.rules.sums import Sum
from tests.exact_sums import exact_norm, exact_sum, root_to_float, rounded_to_53_bits
from tests.histories import fill, laid_out
from tests.libraries import LIBRARIES, NUMPY, TORCH, Library, engine, missing

#: Sizes on both sides of what is summed at once, in kernels and elsewhere, and of several of it.
SIZES = (0, 1, 2, 3, 10, 255, 1000, 1023, 1024, 1025, 4095, 4096, 4097, 8193, 20_000)

RULE = mo.SGD(lr=0.0)

KINDS = ["moderate", "any", "sparse", "spread", "ties", "subnormal", "huge", "edge"]


def numbers(rng: np.random.Generator, size: int, dtype: str, kind: str) -> np.ndarray:
    """Finite numbers of a kind that some way of summing would get wrong."""
    info = ml_dtypes.finfo(dtype)
    if kind in ("moderate", "any"):
        x = fill(rng, (size,), dtype, kind)
    elif kind == "sparse":
        x = np.where(rng.random(size) < 0.95, 0.0, rng.standard_normal(size))
    elif kind == "spread":
        x = rng.standard_normal(size) * 2.0 ** rng.integers(-12, 3, size)
    elif kind == "ties":
        # One, half of its last bit, and perhaps a little more: the rest decides.
        x = np.zeros(size)
        some = [1.0, *[2.0 ** -int(rng.integers(10, 28)) for _ in range(4)]][:size]
        x[: len(some)] = some
        x = rng.permutation(x)
    elif kind == "subnormal":
        x = rng.integers(-5, 6, size) * float(info.smallest_subnormal)
    elif kind == "huge":
        x = rng.uniform(-1, 1, size) * float(info.max)
    else:
        # As far apart as two pieces of a float32 square, or three of a float64, just reach.
        x = rng.choice([-1.0, 1.0], size) * 2.0 ** rng.choice([-29, -28, -27, -26, -25, 0], size)
        x = x * rng.choice([1.0, 1 + float(info.eps), 2 - float(info.eps)], size)
    with np.errstate(all="ignore"):
        x = np.asarray(x, dtype)
    return np.where(np.isfinite(x), x, np.ones_like(x))


@cache
def case(
    dtype: str, kind: str, sizes: tuple[int, ...]
) -> tuple[dict[str, np.ndarray], dict[str, float], Fraction]:
    """Gradients, their norms, and the exact sum of all squares."""
    rng = np.random.default_rng(0)
    grads = {f"w{k}": numbers(rng, n, dtype, kind) for k, n in enumerate(sizes)}
    norms = {name: exact_norm(g) for name, g in grads.items()}
    return grads, norms, exact_sum(grads.values())


@pytest.fixture(params=LIBRARIES, ids=lambda library: library.id)
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    chosen: Library = request.param
    if missing(chosen):
        pytest.skip(str(missing(chosen)))
    with engine(chosen.engine):
        yield chosen


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[Sum]:
    """The sums whose norms were taken: rounding hides most of what may be wrong with them."""
    found: list[Sum] = []
    plain = Sum.norm

    def norm(self: Sum) -> float:
        found.append(self)
        return plain(self)

    monkeypatch.setattr(Sum, "norm", norm)
    return found


def held(total: Sum) -> Fraction:
    """The value of a sum, by the definition of its integers."""
    *limbs, _, _ = total.to_integers().tolist()
    lowest = {18: -298, 110: -2148}[len(limbs) + 2]
    return sum((limb << (40 * k)) * Fraction(2) ** lowest for k, limb in enumerate(limbs))


def step(
    library: Library, clip: mo.Clip, grads: dict[str, Any], threads: int | None = None
) -> mo.Report:
    """One step of parameters of zeros, with gradients of the library."""
    opt = mo.Optimizer(RULE, clip, threads=threads)
    with engine(library.engine):
        opt.step(
            {name: library.param(np.zeros(g.shape, g.dtype)) for name, g in grads.items()},
            {name: library.grad(g) for name, g in grads.items()},
        )
    return opt.last


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_the_definition(library: Library, kind: str, sums: list[Sum]) -> None:
    for dtype in library.dtypes:
        grads, norms, total = case(dtype, kind, SIZES)
        assert step(library, mo.Clip(norm=1.0), grads).norms == norms
        sums.clear()
        (norm,) = step(library, mo.Clip(global_norm=1.0), grads).global_norms.values()
        assert norm == root_to_float(rounded_to_53_bits(total))
        (found,) = sums
        assert held(found) == total


@pytest.mark.parametrize("layout", ["strided", "fortran"])
def test_norms_do_not_depend_on_the_order_in_memory(library: Library, layout: str) -> None:
    rng = np.random.default_rng(1)
    for dtype in library.dtypes:
        grad = laid_out(numbers(rng, 60 * 70, dtype, "any").reshape(60, 70), layout)
        assert step(library, mo.Clip(norm=1.0), {"w": grad}).norms["w"] == exact_norm(grad)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("lib", [NUMPY, TORCH], ids=["numpy", "torch"])
@pytest.mark.parametrize("kind", ["moderate", "any", "edge"])
def test_threads_share_large_gradients(
    lib: Library, dtype: str, kind: str, sums: list[Sum]
) -> None:
    grads, expected, together = case(dtype, kind, (300_001, 0, 5, 70_000, 1000, 4096 * 8, 20_000))
    for name, counts in (("compiled", (1, 2, 3)), ("blocks", (1,))):
        for threads in counts:
            with engine(name):
                opt = mo.Optimizer(RULE, mo.Clip(norm=1.0), threads=threads)
                # The factors of a step before must not count.
                for _ in range(2):
                    opt.step(
                        {n: lib.param(np.zeros_like(g)) for n, g in grads.items()},
                        {n: lib.grad(g) for n, g in grads.items()},
                    )
                    assert opt.last.norms == expected
                sums.clear()
                opt = mo.Optimizer(RULE, mo.Clip(global_norm=1.0), threads=threads)
                opt.step(
                    {n: lib.param(np.zeros_like(g)) for n, g in grads.items()},
                    {n: lib.grad(g) for n, g in grads.items()},
                )
            (found,) = sums
            assert held(found) == together


@pytest.mark.parametrize("threads", [1, 2])
def test_large_gradients_without_a_bound_beside_bounded_ones(threads: int) -> None:
    clips = {"a": mo.Clip(norm=1.0), "b": mo.Clip(value=1.0)}
    opt = mo.Optimizer(RULE, clips.get, threads=threads)
    params = {"a": np.zeros(2, np.float32), "b": np.zeros(300_000, np.float32)}
    grads = {name: np.full_like(x, 3.0) for name, x in params.items()}
    with engine("compiled"):
        opt.step(params, grads)
        assert opt.last.norms == {"a": exact_norm(grads["a"])}
        opt.step({"b": params["b"]}, {"b": grads["b"]})
        assert opt.last.norms == {}


@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_a_global_norm_does_not_depend_on_names_or_their_division(
    data: st.DataObject, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    kind = data.draw(st.sampled_from(KINDS))
    whole = numbers(rng, data.draw(st.sampled_from([1, 10, 1000, 5000])), dtype, kind)
    expected = exact_norm(whole)
    mixed = rng.permutation(whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, whole.size), max_size=5)))
    parts = np.split(mixed, cuts)
    names = data.draw(st.permutations([chr(ord("a") + k) for k in range(len(parts))]))
    some = [lib for lib in LIBRARIES if dtype in lib.dtypes and not lib.needs_cuda]
    # Each part may be of a library of its own.
    libraries = [data.draw(st.sampled_from(some)) for _ in parts]
    opt = mo.Optimizer(RULE, mo.Clip(global_norm=1.0))
    opt.step(
        {n: lib.param(np.zeros_like(x)) for n, lib, x in zip(names, libraries, parts, strict=True)},
        {n: lib.grad(x) for n, lib, x in zip(names, libraries, parts, strict=True)},
    )
    assert list(opt.last.global_norms.values()) == [expected]


def test_a_global_norm_over_libraries_is_rounded_once() -> None:
    libraries = [lib for lib in LIBRARIES if "float64" in lib.dtypes and not lib.needs_cuda]
    for seed in range(20):
        parts = [
            numbers(np.random.default_rng([seed, k]), 50, "float64", "moderate")
            for k in range(len(libraries))
        ]
        opt = mo.Optimizer(RULE, mo.Clip(global_norm=1.0))
        opt.step(
            {lib.id: lib.param(np.zeros(50)) for lib in libraries},
            {lib.id: lib.grad(x) for lib, x in zip(libraries, parts, strict=True)},
        )
        assert list(opt.last.global_norms.values()) == [exact_norm(*parts)]


def test_a_global_norm_spans_dtypes() -> None:
    rng = np.random.default_rng(3)
    for kind in KINDS:
        grads = {dtype: numbers(rng, 100, dtype, kind) for dtype in TORCH.dtypes}
        (norm,) = step(TORCH, mo.Clip(global_norm=1.0), grads).global_norms.values()
        assert norm == exact_norm(*grads.values())


def test_a_global_norm_is_of_what_own_norms_have_scaled(library: Library) -> None:
    rng = np.random.default_rng(4)
    for dtype in library.dtypes:
        # 16-bit gradients are scaled in float32.
        compute = dtype if dtype in ("float32", "float64") else "float32"
        grads = {name: numbers(rng, 1500, dtype, "moderate") for name in "ab"}
        report = step(library, mo.Clip(norm=0.3, global_norm=1.0), grads)
        scaled = []
        for name, grad in grads.items():
            factor = np.dtype(compute).type(0.3 / (report.norms[name] + 1e-6))
            scaled.append(factor * grad.astype(compute))
        assert list(report.global_norms.values()) == [exact_norm(*scaled)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extremes(library: Library, dtype: str) -> None:
    inf, nan = math.inf, math.nan
    tiny, large = (1e-45, 1e38) if dtype == "float32" else (5e-324, 1e308)
    cases = [
        ([inf, 1.0], inf),
        ([-inf, nan], nan),
        ([nan], nan),
        ([0.0, -0.0], 0.0),
        ([], 0.0),
    ]
    for values, expected in cases:
        (found,) = step(library, mo.Clip(norm=1.0), {"w": np.array(values, dtype)}).norms.values()
        assert found == expected or (expected != expected and found != found)
        # In a large gradient, on threads.
        big = np.ones(300_000, dtype)
        big[7777 : 7777 + len(values)] = values
        (found,) = step(library, mo.Clip(norm=1.0), {"w": big}).norms.values()
        assert found == exact_norm(big) or (nan in values and found != found)
    magnitudes = [np.full(n, x, dtype) for x in (tiny, large) for n in (1, 2, 3, 5000)]
    if dtype == "float64":
        magnitudes += [np.full(4, x) for x in (1e200, 1e-200, 1e-162, 3e-308)]
    for x in magnitudes:
        assert step(library, mo.Clip(norm=1.0), {"w": x}).norms["w"] == exact_norm(x)
        (shared,) = step(library, mo.Clip(global_norm=1.0), {"w": x}).global_norms.values()
        assert shared == exact_norm(x)


def test_more_squares_than_the_lanes_of_a_kernel_hold() -> None:
    # 2^20 equal squares of 53 bits would overflow an integer of 64 bits that is never emptied.
    x = np.full(2**21 + 3, np.float32(2) - np.float32(2**-22))
    want = math.sqrt(float(Fraction(x.size) * Fraction(float(x[0])) ** 2))
    for threads in (1, 2):
        for grad in (x, x.astype(np.float64)):
            compiled = replace(NUMPY, engine="compiled")
            assert step(compiled, mo.Clip(norm=1.0), {"w": grad}, threads).norms["w"] == want


def tied(rng: np.random.Generator, dtype: str) -> np.ndarray:
    """Numbers whose sum of squares is a tie, but for a last one that decides the norm."""
    while True:
        # The sum is between 2^52 and 2^53, so half of its last bit is 0.5.
        most, size = (2**24, 24) if dtype == "float32" else (2**26, 2)
        x = rng.integers(most // 2, most, size).astype(dtype)
        x = np.concatenate([x, np.array([0.5, 0.5], dtype)])
        more = np.append(x, np.array(2.0**-40, dtype))
        if exact_norm(x) != exact_norm(more):
            return more


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_small_number_decides_a_tie(library: Library, dtype: str) -> None:
    rng = np.random.default_rng(5)
    grads = {str(k): rng.permutation(tied(rng, dtype)) for k in range(20)}
    grads |= {f"long {name}": np.append(g, np.zeros(2000, dtype)) for name, g in grads.items()}
    expected = {name: exact_norm(g) for name, g in grads.items()}
    assert step(library, mo.Clip(norm=1.0), grads).norms == expected
    grads["threads"] = np.append(tied(rng, dtype), np.zeros(300_000, dtype))
    expected["threads"] = exact_norm(grads["threads"])
    assert step(library, mo.Clip(norm=1.0), grads).norms == expected


def test_a_subnormal_norm_is_rounded_once(library: Library) -> None:
    rng = np.random.default_rng(6)
    grads = {str(k): rng.integers(2**50, 2**51, 3) * 5e-324 for k in range(20)}
    expected = {name: exact_norm(g) for name, g in grads.items()}
    assert step(library, mo.Clip(norm=1.0), grads).norms == expected
    for name in list(grads):
        grads[name] = np.append(grads[name], np.zeros(20_000))
    assert step(library, mo.Clip(norm=1.0), grads).norms == expected
