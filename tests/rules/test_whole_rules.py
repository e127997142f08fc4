"""Rules that treat a parameter as a whole: LAMB, Adafactor and Muon."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import array_api_strict
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import multiopt as mo
from multiopt.rules.means import means
from multiopt.rules.sums import norm, root_mean_square
from spec.check_vectors import exact, ulp
from tests.cases import TOLERANCE, WHOLE, Case
from tests.exact_sums import exact_norm, exact_sum, to_float
from tests.histories import SIZES, laid_out
from tests.libraries import JAX, NUMPY, STRICT, TORCH, Library, assert_equal

SHAPES = [(), (1,), (50,), (7, 9), (1, 1), (9, 7), (2, 3, 4, 5)]
EMPTY = [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0)]


def drawn(seed: int, *shape: int, dtype: Any = "float64") -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# The sums


def exact_mean(x: np.ndarray) -> float:
    """The mean of numbers >= 0, from their rounded sum."""
    return to_float(exact_sum([x], squares=False)) * (1 / max(x.size, 1))


def exact_rms(x: np.ndarray) -> Any:
    return np.sqrt(to_float(exact_sum([x])) * (1 / max(x.size, 1)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [1, 20, 300])
def test_means_are_from_exact_sums(size: int, spread: int) -> None:
    x = drawn(0, 3, size) ** 2 * np.exp2(np.clip(drawn(1, 3, size) * spread, -1000, 900))
    x[2] = np.where(np.arange(size) % 7 == 0, x[2], 0.0)
    wanted = [exact_mean(row) for row in x]
    strided = np.array(x.T, order="C").T
    for xp, to in ((np, np.asarray), (array_api_strict, array_api_strict.asarray)):
        assert np.from_dlpack(means(xp, to(x))).tolist() == wanted
        assert np.from_dlpack(means(xp, to(strided))).tolist() == wanted
        assert float(root_mean_square(xp, to(x[0]))) == exact_rms(x[0])
        assert float(norm(xp, to(x[0]))) == exact_norm(x[0])


@given(seed=st.integers(0, 2**32 - 1), low=st.integers(-1074, 1023), high=st.integers(-1074, 1023))
def test_rows_are_summed_exactly(seed: int, low: int, high: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = sorted((low, high))
    rows, size = int(rng.integers(1, 4)), int(rng.integers(1, 40))
    exponents = rng.integers(low, high + 1, (rows, size))
    x = np.ldexp(rng.integers(1, 2**53, (rows, size)) * 2.0**-53, exponents)
    if rng.random() < 0.5:  # few bits each, so that ties come up
        x = np.ldexp(np.where(x > 0, rng.choice([0.0, 0.5, 0.75], x.shape), 0.0), exponents)
    with np.errstate(over="ignore"):
        assert means(np, x).tolist() == [exact_mean(row) for row in x]


def test_rows_that_are_hard_to_sum() -> None:
    def sums(*rows: list[float]) -> list[float]:
        return [float(total) for total in 4 * means(np, np.array(rows))]

    # A tie, which the rest decides, however small it is and however many parts that takes.
    rests = 2.0**-80, 2.0**-200, 2.0**-1000, 5e-324, 0.0, 2.0**-52
    up = 1 + 2.0**-52
    ties = [[1.0, 2.0**-53, rest, 0.0] for rest in rests]
    assert sums(*ties) == [up, up, up, up, 1.0, 1 + 2.0**-51]
    assert sums([1.0, 2.0**-54, 2.0**-54, 2.0**-300]) == [up]
    assert sums([1.0, 2.0**-54, 2.0**-55, 2.0**-300]) == [1.0]
    assert sums([up, 2.0**-53, 2.0**-300, 0.0], [up, 2.0**-53, 0.0, 0.0]) == [1 + 2.0**-51] * 2
    # Numbers of all bits, as many as go into one sum.
    for size in (1023, 1024, 1025):
        x = np.full((2, size), 1 - 2.0**-53)
        x[1, ::2] = 2.0**-30 - 2.0**-83
        assert means(np, x).tolist() == [exact_mean(row) for row in x]


def test_means_with_what_is_not_finite() -> None:
    x = np.array([[1.0, 2.0, 3.0], [1.0, np.inf, 3.0], [np.inf, np.nan, 0.0], [1e308] * 3])
    with np.errstate(over="ignore"):
        assert_equal(means(np, x), np.array([2.0, np.inf, np.nan, np.inf]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lamb_is_the_text_of_the_spec(dtype: Any) -> None:
    # All libraries of the CPU compute in NumPy, so a sum in its order would be equal everywhere.
    rule = mo.LAMB(lr=0.5, weight_decay=0.1)
    w, opt = {"w": drawn(0, 90, 100, dtype=dtype)}, mo.Optimizer(rule)
    c: Any
    p, m, v = w["w"].copy(), dtype(0), dtype(0)
    for step in range(1, 9):
        g, c = drawn(step, 90, 100, dtype=dtype), rule.coefficients(step, dtype.__name__)
        m = c.beta1 * m + c.one_minus_beta1 * g
        v = c.beta2 * v + c.one_minus_beta2 * g * g
        u = (c.first_moment_scale * m) / (c.root_scale * np.sqrt(v) + c.eps) + c.weight_decay * p
        size, length = exact_norm(p), exact_norm(u)
        p = p - (c.lr * (size / length) * u.astype(np.float64)).astype(dtype)
        opt.step(w, {"w": g})
        assert_equal(w["w"], p)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5000, 3), (3, 5000), (2, 30, 40), (9000,)], ids=str)
def test_adafactor_is_the_text_of_the_spec(shape: tuple[int, ...], dtype: Any) -> None:
    def along(axis: int, x: np.ndarray) -> Any:
        found = np.expand_dims(np.apply_along_axis(exact_mean, axis, x.astype(np.float64)), axis)
        return found.astype(dtype)

    rule = mo.Adafactor(weight_decay=0.1)
    w, opt = {"w": drawn(0, *shape, dtype=dtype)}, mo.Optimizer(rule)
    c: Any
    p, eps1 = w["w"].copy(), np.finfo(dtype).eps
    v: Any = dtype(0)
    rows: Any = dtype(0)
    columns: Any = dtype(0)
    for step in range(1, 4):
        g, c = drawn(step, *shape, dtype=dtype), rule.coefficients(step, dtype.__name__)
        if len(shape) > 1:
            squares = g.astype(np.float64) ** 2
            rows = c.beta2 * rows + c.one_minus_beta2 * along(-1, squares)
            columns = c.beta2 * columns + c.one_minus_beta2 * along(-2, squares)
            v = rows / np.maximum(along(-2, rows), eps1) * columns
        else:
            v = c.beta2 * v + c.one_minus_beta2 * g * g
        u = g / np.maximum(np.sqrt(v), eps1)
        step_size = (
            c.relative_step * max(exact_rms(p), c.eps2) / max(c.inverse_d * exact_rms(u), 1.0)
        )
        p = c.shrinkage * p - dtype(step_size) * u
        opt.step(w, {"w": g})
        assert_equal(w["w"], p)


# Against exact arithmetic


root = np.frompyfunc(exact.sqrt, 1, 1)


def exactly(value: Any) -> Any:
    """A float, or an array of floats, in mpmath; switches stay."""
    if isinstance(value, bool):
        return value
    return np.frompyfunc(exact.mpf, 1, 1)(np.asarray(value, np.float64))


def length(x: np.ndarray) -> Any:
    return exact.sqrt((x * x).sum() + exact.zero)


def rms(x: np.ndarray) -> Any:
    return length(x) / exact.sqrt(x.size)


def lamb(param: Any, grads: list[Any], h: SimpleNamespace) -> Iterator[dict[str, Any]]:
    """You et al. (2020), Algorithm 2."""
    m = v = param * 0
    beta1, beta2 = h.betas
    for t, grad in enumerate(grads, start=1):
        grad = -grad if h.maximize else grad
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad * grad
        r = (m / (1 - beta1**t)) / (root(v / (1 - beta2**t)) + h.eps)
        u = r + h.weight_decay * param
        zero = length(param) == 0 or length(u) == 0
        param = param - h.lr * (1 if zero else length(param) / length(u)) * u
        yield {"param": param, "exp_avg": m, "exp_avg_sq": v}


def adafactor(param: Any, grads: list[Any], h: SimpleNamespace) -> Iterator[dict[str, Any]]:
    """Shazeer & Stern (2018), Algorithms 4 and 5, with torch's ``lr`` and ``eps``."""
    factored = param.ndim > 1
    rows = columns = v = exact.zero
    for t, grad in enumerate(grads, start=1):
        grad = -grad if h.maximize else grad
        share = exact.mpf(t) ** h.beta2_decay
        alpha = max(h.eps[1], rms(param)) * min(h.lr, 1 / exact.sqrt(t))
        squares = grad * grad
        if factored:
            row_means = squares.sum(axis=-1, keepdims=True) / grad.shape[-1]
            column_means = squares.sum(axis=-2, keepdims=True) / grad.shape[-2]
            rows = (1 - share) * rows + share * row_means
            columns = (1 - share) * columns + share * column_means
            middle = rows.sum(axis=-2, keepdims=True) / grad.shape[-2]
            v = rows * columns / np.maximum(middle, h.eps[0])
            slots = {"row_var": rows, "col_var": columns}
        else:
            v = (1 - share) * v + share * squares
            slots = {"variance": v}
        u = grad / np.maximum(root(v), h.eps[0])
        u = u / max(exact.one, rms(u) / h.d)
        param = (1 - h.lr * h.weight_decay) * param - alpha * u
        yield {"param": param, **slots}


LR = st.floats(1e-4, 0.1)
DECAY = st.just(0.0) | st.floats(1e-4, 0.1)
LAMBS = st.builds(
    mo.LAMB,
    lr=LR,
    betas=st.tuples(st.floats(0.5, 0.99), st.floats(0.5, 0.999)),
    eps=st.floats(1e-8, 1e-2),
    weight_decay=DECAY,
    maximize=st.booleans(),
)
ADAFACTORS = st.builds(
    mo.Adafactor,
    lr=st.floats(1e-4, 1.0),
    beta2_decay=st.floats(-1.0, -0.1),
    eps=st.tuples(st.none() | st.floats(1e-6, 1.0), st.floats(0.0, 1.0)),
    d=st.floats(1.0, 3.0),
    weight_decay=DECAY,
    maximize=st.booleans(),
)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("truth", "rules"), [(lamb, LAMBS), (adafactor, ADAFACTORS)])
@given(data=st.data())
def test_rule_is_close_to_exact_arithmetic(
    truth: Any, rules: Any, dtype: str, data: st.DataObject
) -> None:
    """Within t + 8 ulps after step t, as in ``test_exact.py``, of the largest element so far.

    Of the largest of the array, since the norms make every element move with all others. Norms
    and means are off by some ulps of float64 at most, the number of their folds; a step then
    rounds as often as Adam's.
    """
    rule = data.draw(rules)
    shape = data.draw(st.sampled_from([(1,), (5,), (3, 4), (4, 3), (2, 3, 2)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    w = rng.standard_normal(shape).astype(dtype)
    sizes = rng.uniform(0.1, 10.0, (data.draw(st.integers(1, 20)), *shape))
    grads = [g.astype(dtype) for g in sizes * rng.choice([-1, 1], sizes.shape)]
    machine_eps = float(np.finfo(dtype).eps)
    numbers = {
        name: exactly(tuple(machine_eps if part is None else part for part in value))
        if isinstance(value, tuple)
        else exactly(value)
        for name, value in vars(rule).items()
    }
    history = truth(exactly(w), [exactly(grad) for grad in grads], SimpleNamespace(**numbers))
    opt = mo.Optimizer(rule)
    largest: dict[str, Any] = {"param": abs(exactly(w)).max()}
    for step, (grad, wanted) in enumerate(zip(grads, history, strict=True), start=1):
        opt.step({"w": w}, {"w": grad})
        got = {"param": w, **opt.state("w").slots}
        assert list(got) == list(wanted)
        for name, array in got.items():
            right = np.asarray(wanted[name], object)
            largest[name] = max(largest.get(name, exact.zero), abs(right).max())
            off = abs(array.astype(float) - right).max() / ulp(largest[name], dtype)
            assert off <= step + 8, f"{name} after step {step}: {float(off):.1f} ulps"


# Against peers


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", [case for case in WHOLE if case.peer], ids=lambda case: case.id)
def test_two_hundred_steps_follow_the_peer(case: Case, shape: tuple[int, ...], dtype: str) -> None:
    ours = {"w": drawn(0, *shape, dtype=dtype)}
    theirs = torch.from_numpy(ours["w"].copy()).requires_grad_()
    opt, peer = mo.Optimizer(case.rule), case.peer([theirs], **case.arguments)
    start = ours["w"].copy()
    for step in range(200):
        grad = drawn(1 + step, *shape, dtype=dtype) + ours["w"] / 4
        theirs.grad = torch.from_numpy(np.array(grad))
        opt.step(ours, {"w": np.array(grad)})
        peer.step()
    assert abs(ours["w"] - start).max() > 1e-3
    np.testing.assert_allclose(ours["w"], theirs.detach().numpy(), **TOLERANCE[dtype])
    slots = opt.state("w").slots
    for slot, array in slots.items():
        assert array.shape == tuple(peer.state[theirs][slot].shape)
        np.testing.assert_allclose(array, peer.state[theirs][slot].numpy(), **TOLERANCE[dtype])
    assert set(slots) == set(peer.state[theirs]) - {"step"}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"learning_rate": 1e-3}),
        (
            {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1, "weight_decay": 0.1},
            {"learning_rate": 0.1, "b1": 0.5, "b2": 0.9, "eps": 0.1, "weight_decay": 0.1},
        ),
    ],
)
def test_lamb_follows_optax(
    ours: dict[str, Any], theirs: dict[str, Any], shape: tuple[int, ...], dtype: str
) -> None:
    opt, peer = mo.Optimizer(mo.LAMB(**ours)), optax.lamb(**theirs)
    w = {"w": drawn(0, *shape, dtype=dtype)}
    other = jnp.array(w["w"])
    state = peer.init(other)
    for step in range(200):
        grad = drawn(1 + step, *shape, dtype=dtype) + w["w"] / 4
        opt.step(w, {"w": np.array(grad)})
        updates, state = peer.update(jnp.array(grad), state, other)
        other = optax.apply_updates(other, updates)
    np.testing.assert_allclose(w["w"], np.asarray(other), **TOLERANCE[dtype])


@pytest.mark.parametrize("rule", [mo.Adafactor(), mo.Muon()], ids=lambda rule: type(rule).__name__)
def test_defaults_are_the_peers(rule: mo.Rule) -> None:
    peer: Any = getattr(torch.optim, type(rule).__name__)
    (group,) = peer([torch.zeros(1, 1)]).param_groups
    for name, value in vars(rule).items():
        assert value == group[name], name


# LAMB


def test_lamb_takes_the_direction_itself_where_a_length_is_zero() -> None:
    opt, w = mo.Optimizer(mo.LAMB(lr=0.5, eps=0.0)), np.zeros((2, 2))
    opt.step({"w": w}, {"w": np.array([[1.0, -1.0], [2.0, -2.0]])})
    np.testing.assert_allclose(w, [[-0.5, 0.5], [-0.5, 0.5]])
    opt, w = mo.Optimizer(mo.LAMB(lr=0.5)), np.ones((2, 2))
    opt.step({"w": w}, {"w": np.zeros((2, 2))})
    assert_equal(w, np.ones((2, 2)))


def test_lamb_survives_a_long_pause_of_the_gradient() -> None:
    # The direction falls to 1e-45, its ratio rises beyond float32: infinity times 0 would be NaN.
    opt, w = mo.Optimizer(mo.LAMB(lr=1e-6)), np.ones(3, np.float32)
    opt.step({"w": w}, {"w": np.array([1.0, 1e-3, 0.0], np.float32)})
    for _ in range(1200):
        opt.step({"w": w}, {"w": np.zeros(3, np.float32)})
        assert np.isfinite(w).all()
    assert w[2] == 1


# Adafactor


def test_adafactor_knows_no_order_of_dtypes() -> None:
    # torch gives the machine epsilon of the first parameter to all that come after it.
    start = {"half": np.ones((2, 3), np.float16), "wide": np.full((2, 3), 1e-9)}
    results = []
    for names in (["half", "wide"], ["wide", "half"]):
        opt, params = mo.Optimizer(mo.Adafactor()), {n: start[n].copy() for n in names}
        for _ in range(3):
            opt.step(params, {n: params[n] * np.asarray(1e-3, params[n].dtype) for n in names})
        results.append(params)
    for name in start:
        assert_equal(results[0][name], results[1][name])


def test_adafactor_divides_zero_by_no_zero() -> None:
    # torch squares eps[0], which is zero in float32 from 2.6e-23 on.
    opt, w = mo.Optimizer(mo.Adafactor(eps=(1e-30, 1e-3))), np.ones((2, 3), np.float32)
    opt.step({"w": w}, {"w": np.zeros((2, 3), np.float32)})
    assert_equal(w, np.ones((2, 3), np.float32))


def test_adafactor_takes_large_gradients() -> None:
    # The product of two variances, before it is divided, would be infinite in float32.
    w = {name: np.ones((2, 3), np.float32) for name in ("small", "large")}
    grad = drawn(0, 2, 3, dtype="float32")
    mo.Optimizer(mo.Adafactor(lr=0.1)).step(w, {"small": grad, "large": grad * np.float32(2**40)})
    np.testing.assert_allclose(w["large"], w["small"], rtol=1e-5)
    assert (w["large"] != 1).all()


# Muon


def singular_values_mapped(x: np.ndarray, rule: Any) -> np.ndarray:
    """The iteration of the paper by way of the singular values, in float64."""
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s = s / max(np.sqrt((s * s).sum()), rule.eps)
    a, b, c = rule.ns_coefficients
    for _ in range(rule.ns_steps):
        s = a * s + b * s**3 + c * s**5
    product: np.ndarray = (u * s) @ v
    return product


MUONS = [
    {},
    {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.5, "nesterov": False},
    {"lr": 0.1, "adjust_lr_fn": "match_rms_adamw", "ns_coefficients": (2.0, -1.5, 0.5)},
    {"lr": 0.1, "adjust_lr_fn": "original", "ns_steps": 0, "eps": 1.0},
]
MATRICES = [(7, 9), (9, 7), (1, 1), (40, 10), (64, 64)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # A singular value that starts small grows by 3.4445 a step, 485 in five, and with it the error
    # of an entry; the size of a sum of up to 64 products is the rest.
    [("float32", 500 * 64 * 2.0**-24), ("float64", 500 * 64 * 2.0**-53)],
)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("options", MUONS, ids=str)
def test_muon_maps_singular_values(
    options: dict[str, Any], shape: tuple[int, int], dtype: str, tolerance: float
) -> None:
    rule = mo.Muon(**options)
    opt, w = mo.Optimizer(rule), {"w": drawn(0, *shape, dtype=dtype)}
    buffer: Any = 0.0
    lr, momentum = rule.lr, rule.momentum
    assert isinstance(lr, float)
    assert isinstance(momentum, float)
    factor = {
        "match_rms_adamw": 0.2 * np.sqrt(max(shape)),
    }.get(rule.adjust_lr_fn or "", np.sqrt(max(1, shape[0] / shape[1])))
    for step in range(5):
        grad, before = drawn(1 + step, *shape, dtype=dtype), w["w"].astype(np.float64)
        buffer = momentum * buffer + (1 - momentum) * grad.astype(np.float64)
        ahead = momentum * buffer + (1 - momentum) * grad if rule.nesterov else buffer
        direction = singular_values_mapped(ahead, rule)
        opt.step(w, {"w": grad})
        wanted = (1 - lr * rule.weight_decay) * before - lr * factor * direction  # type: ignore[operator]
        np.testing.assert_allclose(w["w"], wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("options", MUONS, ids=str)
@pytest.mark.parametrize("wide", [True, False])
def test_muon_follows_torch(
    options: dict[str, Any], shape: tuple[int, int], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's rounding to bfloat16 taken away, and as it is.

    As it is, torch rounds three times in the beginning and four times in each step of the
    iteration, by 2^-9 at most, and what is off there may double in the steps that follow.
    """
    if wide:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    rule = mo.Muon(**options)
    opt, w = mo.Optimizer(rule), {"w": drawn(0, *shape)}
    theirs = torch.from_numpy(w["w"].copy()).requires_grad_()
    peer = torch.optim.Muon([theirs], **options)
    bound = 1e-11 if wide else (3 + 4 * rule.ns_steps * 2) * 2.0**-9
    for step in range(50):
        grad = drawn(1 + step, *shape)
        theirs.grad = torch.from_numpy(grad.copy())
        with torch.no_grad():
            theirs.copy_(torch.from_numpy(w["w"]))
        shrunk = (1 - rule.lr * rule.weight_decay) * w["w"]  # type: ignore[operator]
        opt.step(w, {"w": grad})
        peer.step()
        change, other = w["w"] - shrunk, theirs.detach().numpy() - shrunk
        assert np.linalg.norm(change - other) <= bound * np.linalg.norm(change)
    buffer = opt.state("w").slots["momentum_buffer"]
    np.testing.assert_allclose(
        buffer, peer.state[theirs]["momentum_buffer"], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2)], ids=str)
def test_muon_refuses_what_is_no_matrix(library: Library, shape: tuple[int, ...]) -> None:
    opt = mo.Optimizer(mo.Muon())
    params = {name: library.param(drawn(0, *s)) for name, s in {"m": (2, 2), "b": shape}.items()}
    grads = {name: library.grad(library.numpy(param).copy()) for name, param in params.items()}
    with pytest.raises(ValueError, match=r"parameter 'b': Muon is for matrices; got shape .*AdamW"):
        opt.step(params, grads)
    assert opt.names == ()
    assert_equal(library.numpy(params["m"]), drawn(0, 2, 2))
    opt = mo.Optimizer(lambda name: mo.Muon() if name == "m" else mo.AdamW())
    opt.step(params, grads)
    assert opt.last.updated == ("m", "b")
    with pytest.raises(ValueError, match="parameter 'b': Muon is for matrices"):
        opt.rule = mo.Muon()


def test_muon_agrees_between_libraries() -> None:
    # A matrix product has no order of its own: a tolerance, not ==.
    results = []
    for library in (NUMPY, TORCH, JAX, STRICT):
        opt, params = mo.Optimizer(mo.Muon(lr=0.1)), {"w": library.param(drawn(0, 40, 30))}
        for step in range(10):
            params = opt.step(params, {"w": library.grad(drawn(1 + step, 40, 30))})
        results.append(library.numpy(params["w"]))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mo.Muon(ns_steps=100), "ns_steps must be an integer from 0 to 99; got 100"),
        (lambda: mo.Muon(ns_steps=True), "ns_steps must be an integer from 0 to 99; got True"),
        (lambda: mo.Muon(ns_steps=5.0), "ns_steps must be an integer"),  # type: ignore[arg-type]
        (lambda: mo.Muon(adjust_lr_fn="x"), "adjust_lr_fn must be None, 'original' or"),  # type: ignore[arg-type]
        (lambda: mo.Muon(ns_coefficients=(1.0, 2.0)), "ns_coefficients must be a triple of"),  # type: ignore[arg-type]
        (lambda: mo.Muon(ns_coefficients=(1.0, 2.0, np.inf)), "ns_coefficients must be a finite"),
        (lambda: mo.Adafactor(eps=1e-3), "eps must be a pair of numbers; got 0.001"),  # type: ignore[arg-type]
        (lambda: mo.Adafactor(eps=(1e-3, None)), r"eps\[1\] must be a number"),  # type: ignore[arg-type]
        (lambda: mo.Adafactor(eps=(-1.0, 1.0)), "eps must be a finite number >= 0"),
        (lambda: mo.Adafactor(beta2_decay=0.1), "beta2_decay must be a finite number <= 0"),
        (lambda: mo.Adafactor(d=0.9), "d must be a number >= 1"),
        (lambda: mo.LAMB(betas=0.9), "LAMB: betas must be a pair of numbers"),  # type: ignore[arg-type]
        (lambda: mo.LAMB(betas=(0.9, 1.0)), "LAMB: betas must be a number >= 0 and < 1"),
    ],
)
def test_hyperparameters_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# All of them


RULES = [mo.LAMB(lr=0.1, weight_decay=0.1), mo.Adafactor(lr=0.1, weight_decay=0.1), mo.Muon(lr=0.1)]
EACH = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def may_have(rule: mo.Rule, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or not isinstance(rule, mo.Muon)


@EACH
def test_slots_have_the_shapes_of_torch(library: Library, rule: mo.Rule) -> None:
    shapes = {str(shape): shape for shape in SHAPES + EMPTY if may_have(rule, shape)}
    params = {name: library.param(drawn(0, *shape)) for name, shape in shapes.items()}
    opt = mo.Optimizer(rule)
    opt.step(params, {name: library.grad(drawn(1, *shape)) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        slots = {key: tuple(slot.shape) for key, slot in opt.state(name).slots.items()}
        if not isinstance(rule, mo.Adafactor):
            assert slots == dict.fromkeys(rule.slots, shape)
        elif len(shape) < 2:
            assert slots == {"variance": shape}
        else:
            rows, columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
            assert slots == {"row_var": rows, "col_var": columns}


@EACH
def test_zero_size_and_no_dimensions(library: Library, rule: mo.Rule) -> None:
    for shape in [*EMPTY, ()]:
        if may_have(rule, shape):
            opt, params = mo.Optimizer(rule), {"w": library.param(np.ones(shape))}
            for _ in range(3):
                params = opt.step(params, {"w": library.grad(np.ones(shape))})
            w = library.numpy(params["w"])
            assert w.shape == shape
            assert ((w < 1) & (w > 0)).all()
            slots = [library.numpy(slot) for slot in opt.state("w").slots.values()]
            assert all(np.isfinite(slot).all() for slot in slots)


@EACH
@pytest.mark.parametrize("layout", ["strided", "fortran"])
def test_the_layout_changes_nothing(library: Library, rule: mo.Rule, layout: str) -> None:
    shape = (70, 90)
    results = []
    for order in ("plain", layout):
        opt = mo.Optimizer(rule)
        params = {"w": library.param(laid_out(drawn(0, *shape), order))}
        for step in range(3):
            grad = laid_out(drawn(1 + step, *shape), order)
            params = opt.step(params, {"w": library.grad(grad)})
        results.append(library.numpy(params["w"]))
    assert_equal(results[1], results[0])


def test_arrays_come_in_row_major_order() -> None:
    seen = []

    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        seen.extend([param, grad])
        return param - c.lr * grad, slots

    body = {"elementwise": False, "update": property(lambda self: update)}
    rule: Any = type("Own", (mo.SGD,), body)()
    for library in (NUMPY, TORCH):
        for grad in (
            np.ones((4, 3)).T,
            np.broadcast_to(np.ones(4), (3, 4)),
            np.ones((6, 8))[::2, ::2],
        ):
            mo.Optimizer(rule).step(
                {"w": library.param(np.ones((4, 3)).T)}, {"w": library.grad(grad)}
            )
    assert len(seen) == 12
    assert all(x.flags.c_contiguous for x in seen)


@EACH
@pytest.mark.parametrize("way", ["state_dict", "file"])
def test_state_goes_to_another_library(
    library: Library, rule: mo.Rule, way: str, tmp_path: Path
) -> None:
    shapes = {"m": (3, 4), **({"v": (5,)} if may_have(rule, (5,)) else {})}
    first, params = mo.Optimizer(rule), {n: drawn(0, *s) for n, s in shapes.items()}
    for step in range(2):
        first.step(params, {name: drawn(step, *s) for name, s in shapes.items()})
    other = mo.Optimizer(rule)
    if way == "file":
        first.save(tmp_path / "run.safetensors")
        other.load(tmp_path / "run.safetensors")
    else:
        other.load_state_dict(first.state_dict())
    theirs = {name: library.param(param) for name, param in params.items()}
    for step in range(2, 4):
        grads = {name: drawn(step, *s) for name, s in shapes.items()}
        first.step(params, grads)
        theirs = other.step(theirs, {name: library.grad(grad) for name, grad in grads.items()})
    for name, param in params.items():
        assert_equal(library.numpy(theirs[name]), param)
        assert other.state(name).step == 4


@EACH
def test_state_of_another_shape_is_refused(rule: mo.Rule) -> None:
    first = mo.Optimizer(rule)
    first.step({"w": drawn(0, 3, 4)}, {"w": drawn(1, 3, 4)})
    for shape in [(4, 4), *([(4,)] if may_have(rule, (4,)) else [])]:
        other, w = mo.Optimizer(rule), drawn(0, *shape)
        other.load_state_dict(first.state_dict())
        with pytest.raises(ValueError, match=r"the loaded s.* of parameter 'w' has"):
            other.step({"w": w}, {"w": w.copy()})
        assert_equal(w, drawn(0, *shape))


@EACH
def test_sixteen_bits_are_computed_in_float32(rule: mo.Rule) -> None:
    w, wide = drawn(0, 5, 6, dtype=np.float16), drawn(0, 5, 6, dtype=np.float16).astype("f4")
    grad = drawn(1, 5, 6, dtype=np.float16)
    mo.Optimizer(rule).step({"w": w}, {"w": grad})
    mo.Optimizer(rule).step({"w": wide}, {"w": grad.astype("f4")})
    assert_equal(w, wide.astype(np.float16))


@EACH
def test_schedules(rule: mo.Rule) -> None:
    halves = lambda step: 0.5  # noqa: E731
    for name in (name for name in rule.ranges if name not in ("beta2_decay", "d")):
        value = getattr(rule, name)
        count = len(value) if isinstance(value, tuple) else 0
        constant = type(rule)(**{name: (0.5,) * count if count else 0.5})
        scheduled = type(rule)(**{name: (halves,) * count if count else halves})
        assert scheduled.at(3) == constant
        assert scheduled.coefficients(3) == constant.coefficients(3)
