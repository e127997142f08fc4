"""Clipping: the bound, the direction, the extremes and the order. Norms are in ``test_norms``."""

import math

import ml_dtypes
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import multiopt as mo
from tests.histories import fill
from tests.libraries import LIBRARIES, NUMPY, Library, assert_equal, engine

#: With this rule a step from zero leaves the negative of the clipped gradient behind.
IDENTITY = mo.SGD(lr=1.0)


def clipped(clip: mo.Clip, library: Library = NUMPY, **grads: np.ndarray) -> dict[str, np.ndarray]:
    """The gradients after clipping, as a step sees them, and the report."""
    opt = mo.Optimizer(IDENTITY, clip)
    params = {name: library.param(np.zeros(g.shape, g.dtype)) for name, g in grads.items()}
    params = opt.step(params, {name: library.grad(g) for name, g in grads.items()})
    return {name: -library.numpy(param) for name, param in params.items()}


def exact_norm(*arrays: np.ndarray) -> mpmath.mpf:
    with mpmath.workprec(2200):
        return mpmath.sqrt(
            mpmath.fsum(mpmath.mpf(float(x)) ** 2 for a in arrays for x in a.ravel())
        )


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 10, 4097]),
    dtype=st.sampled_from(["float32", "float64"]),
    bound=st.sampled_from([1e-3, 0.7, 1.0, 1e3]),
    shared=st.booleans(),
)
def test_the_bound_holds_to_one_ulp_and_the_direction_stays(
    seed: int, size: int, dtype: str, bound: float, shared: bool
) -> None:
    rng = np.random.default_rng(seed)
    grad = fill(rng, (size,), dtype, "moderate") * 10 ** rng.uniform(-3, 3)
    grad = grad.astype(dtype)
    which = {"global_norm" if shared else "norm": bound}
    result = clipped(mo.Clip(**which, eps=0.0), w=grad)["w"]
    norm = exact_norm(grad)
    if norm < bound * (1 - 1e-12):
        # Below the bound not a bit changes.
        assert_equal(result, grad)
    else:
        ulp = float(np.finfo(dtype).eps)
        assert abs(exact_norm(result) / mpmath.mpf(bound) - 1) <= ulp
        # Three roundings of ours (norm, coefficient, product), two of this comparison's own.
        np.testing.assert_allclose(result, grad * float(bound / norm), rtol=2.5 * ulp)
        assert_equal(np.sign(result), np.sign(grad))


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float32", "float64"]),
    value=st.sampled_from([0.0, 1e-3, 0.5, 1e30]),
)
def test_value_clipping_is_exact(seed: int, dtype: str, value: float) -> None:
    grad = fill(np.random.default_rng(seed), (50,), dtype, "special")
    result = clipped(mo.Clip(value=value), w=grad)["w"]
    bound = np.dtype(dtype).type(value)
    with np.errstate(invalid="ignore"):
        assert_equal(result, np.clip(grad, -bound, bound))


def test_the_defaults_are_torchs(library: Library) -> None:
    grads = {name: fill(np.random.default_rng(i), (7,), "float64", "moderate")
             for i, name in enumerate("abc")}  # fmt: skip
    for own, bound in ((True, 0.5), (False, 0.5), (True, 1e3), (True, 5e-8)):
        tensors = {name: torch.zeros(7, dtype=torch.float64) for name in grads}
        for name, t in tensors.items():
            t.grad = torch.from_numpy(grads[name].copy())
            if own:
                torch.nn.utils.clip_grad_norm_([t], bound)
        if not own:
            torch.nn.utils.clip_grad_norm_(tensors.values(), bound)
        clip = mo.Clip(norm=bound) if own else mo.Clip(global_norm=bound)
        for name, result in clipped(clip, library, **grads).items():
            gradient = tensors[name].grad
            assert gradient is not None
            np.testing.assert_allclose(result, gradient.numpy(), rtol=1e-12)


def test_the_order_is_norm_then_global_norm_then_value(library: Library) -> None:
    grads = {"a": np.array([3.0, 4.0]), "b": np.array([30.0, 40.0])}
    clip = mo.Clip(norm=5.0, global_norm=math.sqrt(12.5), value=1.75, eps=0.0)
    result = clipped(clip, library, **grads)
    for array in result.values():
        # 5 and 50 become 5 and 5, then their global norm sqrt(50) is halved: (1.5, 2).
        np.testing.assert_allclose(array, [1.5, 1.75], rtol=1e-15)


def test_a_global_norm_is_over_equal_clips_of_the_step() -> None:
    clips = {"a": mo.Clip(global_norm=1.0), "b": mo.Clip(global_norm=1.0), "c": mo.Clip(norm=1e9)}
    clips["d"] = mo.Clip(global_norm=2.0)
    opt = mo.Optimizer(IDENTITY, clips.get)
    params = {name: np.zeros(1) for name in clips}
    opt.step(params, {"a": np.full(1, 3.0), "b": np.full(1, 4.0), "c": np.ones(1), "d": np.ones(1)})
    assert opt.last.global_norms == {clips["a"]: 5.0, clips["d"]: 1.0}
    opt.step(params, {"a": np.full(1, 3.0)})
    assert opt.last.global_norms == {clips["a"]: 3.0}


EXTREMES = [
    ("float16", 300.0),
    ("float16", 6e4),
    ("float32", 1e20),
    ("float32", 1e-23),
    ("float32", 1e-45),
    ("float64", 1e200),
    ("float64", 1e307),
    ("float64", 1e-157),  # its square is subnormal
    ("float64", 1e-200),
    ("float64", 5e-324),
]


@pytest.mark.parametrize("shared", [False, True], ids=["norm", "global_norm"])
@pytest.mark.parametrize(("dtype", "size"), EXTREMES)
def test_norms_neither_overflow_nor_underflow(
    library: Library, dtype: str, size: float, shared: bool
) -> None:
    if dtype not in library.dtypes:
        pytest.skip(f"{library.id} has no {dtype}")
    grads = {"a": np.array([size, -size], dtype), "b": np.array([size], dtype)}
    opt = mo.Optimizer(IDENTITY, mo.Clip(global_norm=1.0) if shared else mo.Clip(norm=1.0))
    params = {name: library.param(0 * grad) for name, grad in grads.items()}
    opt.step(params, {name: library.grad(grad) for name, grad in grads.items()})
    x = float(np.array(size, dtype))
    if shared:
        (norm,) = opt.last.global_norms.values()
        assert norm == pytest.approx(x * math.sqrt(3), rel=1e-15, abs=0)
    else:
        assert opt.last.norms["a"] == pytest.approx(x * math.sqrt(2), rel=1e-15, abs=0)
        assert opt.last.norms["b"] == x


@pytest.mark.parametrize(("dtype", "size"), EXTREMES)
def test_extreme_gradients_are_brought_to_the_bound(dtype: str, size: float) -> None:
    bound = min(0.7 * size, 1.0) if size < 1 else 1.0
    if size < np.finfo(dtype).smallest_normal:
        return  # the clipped elements are subnormal too: the bound cannot hold to a relative ulp
    result = clipped(mo.Clip(norm=bound, eps=0.0), w=np.array([size, -size], dtype))["w"]
    expected = bound / math.sqrt(2)
    np.testing.assert_allclose(result.astype(float), [expected, -expected], rtol=2e-3)
    if dtype != "float16":
        np.testing.assert_allclose(
            result, [expected, -expected], rtol=2 * float(np.finfo(dtype).eps)
        )


def test_nan_and_infinite_norms(library: Library) -> None:
    nan, inf = np.nan, np.inf
    for clip in (mo.Clip(norm=1.0), mo.Clip(global_norm=1.0), mo.Clip(norm=1.0, eps=0.0)):
        assert_equal(clipped(clip, library, w=f32(1, nan))["w"], f32(nan, nan))
        assert_equal(clipped(clip, library, w=f32(1, inf))["w"], f32(0, nan))
        assert_equal(clipped(clip, library, w=f32(0, 0))["w"], f32(0, 0))
        assert clipped(clip, library, w=f32())["w"].shape == (0,)
    value = clipped(mo.Clip(value=1.0), library, w=f32(0.5, -inf, nan))
    assert_equal(value["w"], f32(0.5, -1, nan))


def test_a_bound_of_zero_and_of_infinity() -> None:
    assert_equal(clipped(mo.Clip(norm=0.0, eps=0.0), w=f32(3, 4))["w"], f32(0, 0))
    assert_equal(clipped(mo.Clip(norm=0.0, eps=0.0), w=f32(0, 0))["w"], f32(0, 0))
    assert_equal(clipped(mo.Clip(norm=math.inf), w=f32(3, 4))["w"], f32(3, 4))
    assert_equal(clipped(mo.Clip(value=math.inf), w=f32(3, 4))["w"], f32(3, 4))
    bad = f32(1, math.inf, math.nan)
    for clip in (mo.Clip(norm=math.inf), mo.Clip(global_norm=math.inf), mo.Clip(value=math.inf)):
        assert_equal(clipped(clip, w=bad)["w"], bad)


def test_an_element_at_its_bound_is_not_clipped() -> None:
    opt = mo.Optimizer(IDENTITY, mo.Clip(value=0.5))
    opt.step({"w": np.zeros(2)}, {"w": np.array([0.5, -0.5])})
    assert opt.last.clipped == ()


def test_sixteen_bits_are_scaled_once_in_float32() -> None:
    # Rounded to bfloat16 twice, (6e4, 6e4) would come out as .7031.
    grad = np.array([6e4, 6e4], ml_dtypes.bfloat16)
    assert (
        clipped(mo.Clip(norm=1.0, eps=0.0), w=grad)["w"].astype(float).tolist() == [0.70703125] * 2
    )


def test_gradients_at_the_bound_stay() -> None:
    assert_equal(clipped(mo.Clip(norm=5.0, eps=0.0), w=f32(3, 4))["w"], f32(3, 4))


def test_a_norm_within_eps_of_the_bound_is_clipped_as_torch_does() -> None:
    grad = np.array([1.0 - 1e-7])
    result = clipped(mo.Clip(norm=1.0), w=grad)["w"]
    assert result == grad * (1.0 / (grad.item() + 1e-6)) < grad


def test_each_coefficient_is_rounded_and_multiplied_by_itself() -> None:
    grad = fill(np.random.default_rng(0), (1000,), "float32", "moderate")
    opt = mo.Optimizer(IDENTITY, mo.Clip(norm=0.7, global_norm=0.3))
    params = opt.step({"w": np.zeros(1000, np.float32)}, {"w": grad})
    (shared,) = opt.last.global_norms.values()
    coefficients = [
        np.float32(0.7 / (opt.last.norms["w"] + 1e-6)),
        np.float32(0.3 / (shared + 1e-6)),
    ]
    assert_equal(-params["w"], coefficients[1] * (coefficients[0] * grad))
    assert (coefficients[1] * coefficients[0] * grad != -params["w"]).any()


def test_norms_span_libraries() -> None:
    opt = mo.Optimizer(IDENTITY, mo.Clip(global_norm=1.0, eps=0.0))
    libraries = [lib for lib in LIBRARIES if not lib.needs_cuda]
    params = {lib.id: lib.param(np.zeros(1, np.float32)) for lib in libraries}
    params = opt.step(params, {lib.id: lib.grad(f32(2)) for lib in libraries})
    share = np.float32(1 / math.sqrt(len(libraries)))
    for lib in libraries:
        np.testing.assert_allclose(lib.numpy(params[lib.id]), -share, rtol=2e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clipped_steps_equal_those_of_the_rule_as_it_stands(library: Library, dtype: str) -> None:
    clips = {
        "norm": mo.Clip(norm=0.5),
        "exact": mo.Clip(norm=0.5, eps=0.0),
        "both": mo.Clip(norm=3.0, value=0.1),
        "value": mo.Clip(value=0.2),
        "wide": mo.Clip(norm=math.inf),
        "huge": mo.Clip(norm=1.0),
        "tiny": mo.Clip(norm=1e-300),
        "zero": mo.Clip(norm=0.0),
        "free": None,
    }
    scale = {"huge": 1e30 if dtype == "float32" else 1e200, "tiny": 1e-30, "exact": 0.0}
    rng = np.random.default_rng(0)
    start = {name: fill(rng, (5, 7), dtype, "moderate") for name in clips}
    steps = [
        {
            name: (fill(rng, (5, 7), dtype, "moderate") * scale.get(name, 1.0)).astype(dtype)
            for name in clips
        }
        for _ in range(4)
    ]

    def run(lib: Library) -> tuple[dict[str, np.ndarray], list[mo.Report]]:
        opt, reports = mo.Optimizer(mo.Adam(lr=0.1), clips.get), []
        params = {name: lib.param(x) for name, x in start.items()}
        with engine(lib.engine):
            for grads in steps:
                params = opt.step(params, {name: lib.grad(g) for name, g in grads.items()})
                reports.append(opt.last)
        return {name: lib.numpy(x) for name, x in params.items()}, reports

    (actual, reports), (expected, references) = run(library), run(NUMPY)
    for name in clips:
        assert_equal(actual[name], expected[name], name)
    for report, reference in zip(reports, references, strict=True):
        assert report.norms == reference.norms
        assert report.clipped == reference.clipped
