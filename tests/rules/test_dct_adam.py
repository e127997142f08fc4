"""DCTAdam along a dimension: against Pyro, against its definition, equal on every library."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import pyro.ops.tensor_utils
import pyro.optim.dct_adam
import pytest
import torch
from mpmath import MPContext

import multiopt as mo
from multiopt.rules.cosine import dct, idct, next_fast_len
from tests.cases import TOLERANCE
from tests.histories import arrays, fill, laid_out
from tests.libraries import JAX, NUMPY, TORCH, Library, assert_equal, engine

exact = MPContext()
exact.prec = 128

#: Lengths of time that a fast Fourier transform likes and others, at both ends and in the middle.
PLACES = [((1,), -1), ((8,), -1), ((7,), 0), ((31, 2), -2), ((3, 11), 1), ((2, 49, 3), -2)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
    {"lr": 0.05, "clip_norm": 0.3, "lrd": 0.99},
]


@pytest.fixture(autouse=True)
def fft() -> Iterator[None]:
    """The one extension of the Array API that this rule needs, and no other."""
    with array_api_strict.ArrayAPIStrictFlags(enabled_extensions=("fft",)):
        yield


def marked(tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
    if dim is not None:
        tensor._pyro_dct_dim = dim - tensor.ndim if dim >= 0 else dim  # type: ignore[attr-defined]
    return tensor


# Against Pyro


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [*PLACES[2:5], ((3, 5), None)])
def test_a_hundred_steps_follow_pyro(
    shape: tuple[int, ...], dim: int | None, options: dict[str, Any], dtype: str
) -> None:
    rng = np.random.default_rng(0)
    ours = {"w": rng.standard_normal(shape).astype(dtype)}
    theirs = marked(torch.from_numpy(ours["w"].copy()).requires_grad_(), dim)
    opt = mo.Optimizer(mo.DCTAdam(**options, dct_dim=dim))
    peer = pyro.optim.dct_adam.DCTAdam([theirs], **options)
    for _ in range(100):
        # The same gradients for both: where one of frequencies is zero but for rounding, its step
        # is made of rounding.
        grad = (ours["w"] + rng.standard_normal(shape)).astype(dtype)
        theirs.grad = torch.from_numpy(grad.copy())
        opt.step(ours, {"w": grad})
        peer.step()
    np.testing.assert_allclose(ours["w"], theirs.detach().numpy(), **TOLERANCE[dtype])
    for slot, array in opt.state("w").slots.items():
        np.testing.assert_allclose(array, peer.state[theirs][slot].numpy(), **TOLERANCE[dtype])


def test_the_lengths_are_pyros() -> None:
    for size in range(1, 3000):
        assert next_fast_len(size) == pyro.ops.tensor_utils.next_fast_len(size)


# Against the definition


def matrix(n: int) -> Any:
    """The orthonormal cosine transform of type II by its definition."""
    return exact.matrix(
        [
            [
                exact.sqrt(exact.mpf(1 if k == 0 else 2) / n)
                * exact.cos(exact.pi * (2 * i + 1) * k / (2 * n))
                for i in range(n)
            ]
            for k in range(n)
        ]
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [*range(1, 21), 25, 64, 81])
def test_the_transform_is_the_cosine_transform(n: int, dtype: str) -> None:
    expected = np.array(matrix(n).tolist(), np.float64)
    unit = np.eye(n, dtype=dtype)
    for found, wanted in ((dct(np, unit).T, expected), (idct(np, unit).T, expected.T)):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted, rtol=0, atol=4 * float(np.finfo(dtype).eps))


def exactly(grads: np.ndarray, start: np.ndarray, h: mo.DCTAdam) -> list[Any]:
    """The history of one series in 38 digits, from Pyro's documentation.

    ClippedAdam, and a second one in the frequency domain of the gradient.
    """
    size, fast = start.size, next_fast_len(start.size)
    transform = matrix(fast)
    beta1, beta2 = (exact.mpf(beta) for beta in h.betas)
    param = exact.matrix(start.tolist())
    moments = [exact.matrix(size, 1) for _ in range(2)] + [exact.matrix(fast, 1) for _ in range(2)]
    for step, row in enumerate(grads.tolist(), 1):
        bound = exact.mpf(h.clip_norm)
        clipped = [max(-bound, min(exact.mpf(x), bound)) for x in row]
        padded = exact.matrix(clipped + [0] * (fast - size))
        rate = h.lr * exact.mpf(h.lrd) ** step
        rate *= exact.sqrt(1 - beta2**step) / (1 - beta1**step)
        moved = []
        for i, grad in ((0, exact.matrix(clipped)), (2, transform * padded)):
            m = moments[i] * beta1 + grad * (1 - beta1)
            v = moments[i + 1] * beta2 + grad.apply(lambda x: x * x) * (1 - beta2)
            moments[i : i + 2] = m, v
            moved.append([rate * a / (exact.sqrt(b) + h.eps) for a, b in zip(m, v, strict=True)])
        time, back = moved[0], transform.T * exact.matrix(moved[1])
        param = exact.matrix([param[k] - time[k] - back[k] for k in range(size)])
    return [param, [*moments[0], *moments[2]], [*moments[1], *moments[3]]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 7, 8, 13])
def test_it_is_close_to_exact_arithmetic(size: int, options: dict[str, Any], dtype: str) -> None:
    rng = np.random.default_rng(size)
    start, grads = rng.standard_normal(size).astype(dtype), rng.standard_normal((30, size))
    grads = grads.astype(dtype)
    rule, w = mo.DCTAdam(**options, dct_dim=-1), start.copy()
    opt = mo.Optimizer(rule)
    for grad in grads:
        opt.step({"w": w}, {"w": grad})
    found = [w, *opt.state("w").slots.values()]
    for got, wanted in zip(found, exactly(grads, start, rule), strict=True):
        wanted = np.array(list(wanted), np.float64)
        # An element has the rounding errors of its whole series.
        np.testing.assert_allclose(
            got, wanted, rtol=0, atol=64 * np.finfo(dtype).eps * abs(wanted).max()
        )


# Equal on every library


def run(
    library: Library, rule: mo.Rule, start: np.ndarray, grads: list[np.ndarray]
) -> tuple[mo.Optimizer, np.ndarray]:
    opt, params = mo.Optimizer(rule), {"w": library.param(start)}
    with engine(library.engine):
        for grad in grads:
            params = opt.step(params, {"w": library.grad(grad)})
    return opt, library.numpy(params["w"])


@pytest.mark.parametrize(
    ("layout", "kind"), [("plain", "moderate"), ("strided", "wide"), ("fortran", "special")]
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "dim"), [*PLACES, ((0, 3), 0), ((3, 0), 0)])
def test_every_library_equals_numpy(
    library: Library, shape: tuple[int, ...], dim: int, dtype: str, layout: str, kind: str
) -> None:
    if dtype not in library.dtypes:
        pytest.skip(f"{library.id} has no {dtype}")
    rng = np.random.default_rng(0)
    start = laid_out(fill(rng, shape, dtype, "moderate"), layout)
    grads = [laid_out(fill(rng, shape, dtype, kind), layout) for _ in range(20)]
    rule = mo.DCTAdam(lr=0.1, lrd=0.99, dct_dim=dim)
    ours, expected = run(library, rule, start, grads), run(NUMPY, rule, start, grads)
    if library.needs_cuda:
        if kind == "moderate":
            close = {"float16": 1e-2, "float32": 1e-4, "float64": 1e-11}[dtype]
            np.testing.assert_allclose(ours[1], expected[1], rtol=close, atol=close)
        return
    assert_equal(ours[1], expected[1], "parameter")
    for (what, a), (_, b) in zip(arrays(ours[0], library), arrays(expected[0], NUMPY), strict=True):
        assert_equal(a, b, what)


@pytest.mark.parametrize("module", ["multiopt_torch", "multiopt_jax"])
def test_off_the_cpu_the_rule_runs_as_it_stands(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The code for other devices, taken on the CPU.
    backend = __import__(f"{module}.backend").backend
    monkeypatch.setattr(backend, "_on_cpu", lambda layout: False)
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((3, 31, 2)), list(rng.standard_normal((5, 3, 31, 2)))
    rule = mo.DCTAdam(lr=0.1, dct_dim=-2)
    library = TORCH if module == "multiopt_torch" else JAX
    np.testing.assert_allclose(
        run(library, rule, start, grads)[1], run(NUMPY, rule, start, grads)[1], rtol=1e-11
    )


# What it keeps, and what it refuses


def test_without_a_dimension_it_is_clipped_adam() -> None:
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((4, 5)), list(30 * rng.standard_normal((20, 4, 5)))
    options: dict[str, Any] = {"lr": 0.1, "clip_norm": 3.0, "lrd": 0.9}
    one = run(NUMPY, mo.DCTAdam(**options), start, grads)
    two = run(NUMPY, mo.ClippedAdam(**options), start, grads)
    assert_equal(one[1], two[1])


def test_state_goes_through_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((7, 3)), list(rng.standard_normal((4, 7, 3)))
    rule = mo.DCTAdam(lr=0.1, dct_dim=0)
    opt, w = run(NUMPY, rule, start, grads[:2])
    assert {slot.shape for slot in opt.state("w").slots.values()} == {(15, 3)}
    opt.save(tmp_path / "state")
    again = mo.Optimizer(rule)
    again.load(tmp_path / "state")
    for grad in grads[2:]:
        again.step({"w": w}, {"w": grad})
    assert_equal(w, run(NUMPY, rule, start, grads)[1])


def test_another_dimension_starts_over() -> None:
    opt, w = mo.Optimizer(mo.DCTAdam(dct_dim=0)), {"w": np.ones((2, 3))}
    opt.step(w, {"w": np.ones((2, 3))})
    opt.rule = mo.DCTAdam(dct_dim=1)
    assert opt.state("w").step == 0
    assert opt.state("w").slots["exp_avg"].shape == (2, 6)
    opt.step(w, {"w": np.ones((2, 3))})


@pytest.mark.parametrize("dim", [True, 1.0, "time"])
def test_a_dimension_is_an_integer(dim: Any) -> None:
    with pytest.raises(ValueError, match="dct_dim must be an integer or None"):
        mo.DCTAdam(dct_dim=dim)


@pytest.mark.parametrize(("shape", "dim"), [((), -1), ((3,), -2), ((3,), 1)])
def test_a_dimension_must_be_there(shape: tuple[int, ...], dim: int) -> None:
    opt = mo.Optimizer(mo.DCTAdam(dct_dim=dim))
    with pytest.raises(ValueError, match=r"parameter 'w': .* is not a dimension of the shape"):
        opt.step({"w": np.ones(shape)}, {"w": np.ones(shape)})
