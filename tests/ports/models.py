"""Five models: gradients by hand in NumPy, and losses that torch and JAX differentiate.

The batches depend on the step alone, as ``compare_training`` asks.
"""

# mypy: allow-untyped-calls

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

Arrays = dict[str, Any]
Loss = Callable[[Any, Arrays, Arrays], Any]


@dataclass(frozen=True)
class Model:
    """A model to port.

    Attributes:
        id: Its name among the tests.
        start: Its parameters as training begins.
        batch: From a step to its data.
        by_hand: From parameters and data to gradients, in NumPy.
        loss: From a namespace, parameters and data to the number that is minimized.
    """

    id: str
    start: dict[str, np.ndarray]
    batch: Callable[[int], dict[str, np.ndarray]]
    by_hand: Callable[[Arrays, Arrays], Arrays]
    loss: Loss

    def prototype(self, params: Arrays, step: int) -> Arrays:
        """The prototype, as ``compare_training`` calls it."""
        return self.by_hand(params, self.batch(step))


def in_torch(model: Model, loss: Loss | None = None) -> Callable[[Arrays, int], Arrays]:
    """The port to torch, or one with another loss."""

    def port(params: Arrays, step: int) -> Arrays:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in params.items()}
        some = next(iter(leaves.values()))
        batch = {k: torch.tensor(x) for k, x in model.batch(step).items()}
        batch = {k: x.to(some.dtype) if x.is_floating_point() else x for k, x in batch.items()}
        (loss or model.loss)(torch, leaves, batch).backward()
        return {name: x.grad for name, x in leaves.items()}

    return port


def in_jax(model: Model, loss: Loss | None = None) -> Callable[[Arrays, int], Arrays]:
    """The port to JAX, or one with another loss."""

    @jax.jit
    def grad(params: Arrays, batch: Arrays) -> Any:
        # A bias is added to every row.
        with jax.numpy_rank_promotion("allow"):
            return jax.grad(lambda p: (loss or model.loss)(jnp, p, batch))(params)

    def port(params: Arrays, step: int) -> Arrays:
        dtype = next(iter(params.values())).dtype
        batch = {k: jnp.asarray(x) for k, x in model.batch(step).items()}
        return dict(
            grad(
                params,
                {k: x.astype(dtype) if x.dtype.kind == "f" else x for k, x in batch.items()},
            )
        )

    return port


def _linear() -> Model:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 4))
    y = x @ np.array([1.0, -2.0, 3.0, 0.5]) + 0.1 * rng.standard_normal(64)

    def batch(step: int) -> Arrays:
        rows = np.random.default_rng(step).choice(64, 16, replace=False)
        return {"x": x[rows], "y": y[rows]}

    def by_hand(p: Arrays, d: Arrays) -> Arrays:
        off = d["x"] @ p["w"] + p["b"] - d["y"]
        return {"w": d["x"].T @ off / len(off), "b": np.mean(off)}

    def loss(xp: Any, p: Arrays, d: Arrays) -> Any:
        return 0.5 * xp.mean((d["x"] @ p["w"] + p["b"] - d["y"]) ** 2)

    return Model("linear", {"w": np.zeros(4), "b": np.zeros(())}, batch, by_hand, loss)


def _softmax() -> Model:
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((60, 5)), rng.integers(0, 3, 60)

    def batch(step: int) -> Arrays:
        rows = np.random.default_rng(step).choice(60, 20, replace=False)
        return {"x": x[rows], "hot": np.eye(3)[y[rows]]}

    def by_hand(p: Arrays, d: Arrays) -> Arrays:
        z = d["x"] @ p["W"] + p["b"]
        e = np.exp(z - z.max(axis=1, keepdims=True))
        off = (e / e.sum(axis=1, keepdims=True) - d["hot"]) / len(z)
        return {"W": d["x"].T @ off, "b": off.sum(axis=0)}

    def loss(xp: Any, p: Arrays, d: Arrays) -> Any:
        z = d["x"] @ p["W"] + p["b"]
        return xp.mean(xp.log(xp.sum(xp.exp(z), axis=1)) - xp.sum(z * d["hot"], axis=1))

    start = {"W": 0.1 * rng.standard_normal((5, 3)), "b": 0.1 * rng.standard_normal(3)}
    return Model("softmax", start, batch, by_hand, loss)


def _network() -> Model:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((50, 4))
    y = np.sin(x @ rng.standard_normal(4))

    def batch(step: int) -> Arrays:
        rows = np.random.default_rng(step).choice(50, 10, replace=False)
        return {"x": x[rows], "y": y[rows]}

    def by_hand(p: Arrays, d: Arrays) -> Arrays:
        first = np.tanh(d["x"] @ p["W1"] + p["b1"])
        second = np.tanh(first @ p["W2"] + p["b2"])
        off = (second @ p["w3"] - d["y"]) / len(d["y"])
        above = np.outer(off, p["w3"]) * (1 - second**2)
        below = above @ p["W2"].T * (1 - first**2)
        return {
            "W1": d["x"].T @ below,
            "b1": below.sum(axis=0),
            "W2": first.T @ above,
            "b2": above.sum(axis=0),
            "w3": second.T @ off,
        }

    def loss(xp: Any, p: Arrays, d: Arrays) -> Any:
        first = xp.tanh(d["x"] @ p["W1"] + p["b1"])
        second = xp.tanh(first @ p["W2"] + p["b2"])
        return 0.5 * xp.mean((second @ p["w3"] - d["y"]) ** 2)

    shapes = {"W1": (4, 8), "b1": (8,), "W2": (8, 8), "b2": (8,), "w3": (8,)}
    start = {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}
    return Model("network", start, batch, by_hand, loss)


def _variational() -> Model:
    """A normal guide for normal locations; the noise of a step is a part of its batch."""
    rng = np.random.default_rng(4)
    y = rng.standard_normal((100, 6)) + np.arange(6)

    def batch(step: int) -> Arrays:
        rng = np.random.default_rng(step)
        rows = rng.choice(100, 20, replace=False)
        return {"y": y[rows], "noise": rng.standard_normal(6)}

    def by_hand(p: Arrays, d: Arrays) -> Arrays:
        scale = np.exp(p["log_scale"])
        z = p["loc"] + scale * d["noise"]
        off = 100 / len(d["y"]) * (z - d["y"]).sum(axis=0)
        return {
            "loc": off + p["loc"],
            "log_scale": off * d["noise"] * scale + scale**2 - 1,
        }

    def loss(xp: Any, p: Arrays, d: Arrays) -> Any:
        return likelihood(xp, p, d) + divergence(xp, p)

    start = {"loc": rng.standard_normal(6), "log_scale": 0.3 * rng.standard_normal(6)}
    return Model("variational", start, batch, by_hand, loss)


def likelihood(xp: Any, p: Arrays, d: Arrays) -> Any:
    """Minus the expected log likelihood of all data, from a batch."""
    z = p["loc"] + xp.exp(p["log_scale"]) * d["noise"]
    return 100 / len(d["y"]) * 0.5 * xp.sum((d["y"] - z) ** 2)


def divergence(xp: Any, p: Arrays) -> Any:
    """From the guide to a standard normal prior, but for a constant."""
    return xp.sum(0.5 * (xp.exp(2 * p["log_scale"]) + p["loc"] ** 2) - p["log_scale"])


def _factors() -> Model:
    rng = np.random.default_rng(5)
    ratings = rng.standard_normal((12, 10))

    def batch(step: int) -> Arrays:
        return {"y": ratings, "seen": np.random.default_rng(step).random((12, 10)) < 0.5}

    def by_hand(p: Arrays, d: Arrays) -> Arrays:
        off = (p["U"] @ p["V"].T - d["y"]) * d["seen"]
        return {"U": off @ p["V"] + 0.1 * p["U"], "V": off.T @ p["U"] + 0.1 * p["V"]}

    def loss(xp: Any, p: Arrays, d: Arrays) -> Any:
        return misfit(xp, p, d) + 0.05 * (xp.sum(p["U"] ** 2) + xp.sum(p["V"] ** 2))

    start = {"U": rng.standard_normal((12, 3)), "V": rng.standard_normal((10, 3))}
    return Model("factors", start, batch, by_hand, loss)


def misfit(xp: Any, p: Arrays, d: Arrays) -> Any:
    """Half the squares of what the factors leave over."""
    return 0.5 * xp.sum(((p["U"] @ p["V"].T - d["y"]) * d["seen"]) ** 2)


LINEAR, SOFTMAX, NETWORK = _linear(), _softmax(), _network()
VARIATIONAL, FACTORS = _variational(), _factors()
MODELS = [LINEAR, SOFTMAX, NETWORK, VARIATIONAL, FACTORS]
