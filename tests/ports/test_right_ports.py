"""Of right ports nothing is said."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import multiopt as mo
from multiopt.testing import assert_same_training, compare_training
from tests.ports.models import FACTORS, MODELS, Model, in_jax, in_torch

PORTS: dict[str, tuple[Callable[[Model], Any], Callable[[Any], Any]]] = {
    "numpy": (lambda model: model.prototype, np.copy),
    "torch": (in_torch, torch.tensor),
    "torch, memory shared with copies": (in_torch, torch.from_numpy),
    "jax": (in_jax, jnp.asarray),
}
RULES = [mo.Adam(lr=0.05), lambda name: mo.SGD(lr=1e-3, momentum=0.9)]


def with_dtype(model: Model, dtype: str) -> dict[str, np.ndarray]:
    return {name: x.astype(dtype) for name, x in model.start.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("to", PORTS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_a_right_port_is_not_accused(model: Model, to: str, dtype: str) -> None:
    make, to_port = PORTS[to]
    gradients = make(model)

    def prototype(params: dict[str, Any], step: int) -> dict[str, Any]:
        grads = model.prototype(params, step)
        return {name: np.asarray(g).astype(dtype) for name, g in grads.items()}

    def port(params: dict[str, Any], step: int) -> dict[str, Any]:
        grads = gradients(params, step)
        return {
            n: g.astype(dtype) if isinstance(g, np.ndarray | np.generic) else g
            for n, g in grads.items()
        }

    start = with_dtype(model, dtype)
    before = {name: x.copy() for name, x in start.items()}
    for rule in RULES:
        assert_same_training(
            prototype, port, start, to_port=to_port, rule=rule, clip=mo.Clip(norm=10.0), steps=30
        )
    assert all((start[name] == x).all() for name, x in before.items())


def test_either_side_may_be_any_library() -> None:
    start = {name: torch.tensor(x) for name, x in FACTORS.start.items()}
    for to_port, port in (
        (lambda x: jnp.asarray(x.numpy()), in_jax(FACTORS)),
        (lambda x: x.numpy().copy(), FACTORS.prototype),
        (torch.clone, in_torch(FACTORS)),
    ):
        found = compare_training(in_torch(FACTORS), port, start, to_port=to_port, rule=mo.Adam())
        assert found is None


def test_a_converged_model_is_not_accused() -> None:
    # Where gradients vanish, what is left of them is rounding.
    def prototype(params: dict[str, Any], step: int) -> dict[str, Any]:
        return {"w": 1e3 * (params["w"] - 1.0) + 0.0}

    def port(params: dict[str, Any], step: int) -> dict[str, Any]:
        return {"w": 1e3 * params["w"] - 1e3}

    start = {"w": np.linspace(-2, 2, 7)}
    found = compare_training(
        prototype, port, start, to_port=np.copy, rule=mo.SGD(lr=1e-3), steps=200
    )
    assert found is None


def test_terms_that_cancel_in_one_library_need_not_in_another() -> None:
    def prototype(params: dict[str, Any], step: int) -> dict[str, Any]:
        return {"w": params["w"] - 3.0, "shift": np.zeros(2)}

    def port(params: dict[str, Any], step: int) -> dict[str, Any]:
        return {"w": params["w"] - 3.0, "shift": np.full(2, 0.1 + 0.2 - 0.3)}

    start = {"w": np.ones(3), "shift": np.ones(2)}
    assert compare_training(prototype, port, start, to_port=np.copy, rule=mo.Adam()) is None


def test_names_may_be_left_out_of_a_step() -> None:
    def some(params: dict[str, Any], step: int) -> dict[str, Any]:
        grads = FACTORS.prototype(params, step)
        return grads if step % 2 else {"U": grads["U"], "V": None}

    assert compare_training(some, some, FACTORS.start, to_port=np.copy, rule=mo.Adam()) is None


def test_complex_parameters() -> None:
    def prototype(params: dict[str, Any], step: int) -> dict[str, Any]:
        return {"z": params["z"] - (1 + 2j)}

    def conjugated(params: dict[str, Any], step: int) -> dict[str, Any]:
        return {"z": (params["z"] - (1 + 2j)).conj()}

    start = {"z": np.zeros(3, complex)}
    options: dict[str, Any] = {"to_port": np.copy, "rule": mo.Adam()}
    assert compare_training(prototype, prototype, start, **options) is None
    found = compare_training(prototype, conjugated, start, **options)
    assert found is not None
    assert (found.step, found.expected, found.found) == (1, -1 - 2j, -1 + 2j)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1; got 0"),
        ({"steps": 2.0}, "steps must be an integer >= 1; got 2.0"),
        ({"rtol": -1.0}, "rtol must be a number from 0 to below 1, or None; got -1.0"),
        ({"rtol": "1e-3"}, "rtol must be a number from 0"),
        ({"params": {}}, "there are no parameters to train"),
        ({"port": lambda params, step: None}, "the port gave None at step 1; expected gradients"),
        ({"port": lambda params, step: {"W": params["U"]}}, "a gradient of 'W' at step 1"),
    ],
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "reference": FACTORS.prototype,
        "port": FACTORS.prototype,
        "params": FACTORS.start,
        "to_port": np.copy,
        "rule": mo.Adam(),
    }
    with pytest.raises(ValueError, match=message):
        compare_training(**(arguments | changed))


def test_a_prototype_that_writes_its_parameters_is_refused() -> None:
    def prototype(params: dict[str, Any], step: int) -> dict[str, Any]:
        params["U"] -= 1.0
        return FACTORS.prototype(params, step)

    with pytest.raises(ValueError, match=r"the prototype changed parameter 'U'.*on a copy"):
        compare_training(
            prototype, FACTORS.prototype, FACTORS.start, to_port=np.copy, rule=mo.Adam()
        )


def test_an_error_says_on_which_side_it_was_raised() -> None:
    def port(params: dict[str, Any], step: int) -> dict[str, Any]:
        if step == 3:
            raise ZeroDivisionError("no")
        return FACTORS.prototype(params, step)

    with pytest.raises(ZeroDivisionError) as caught:
        compare_training(FACTORS.prototype, port, FACTORS.start, to_port=np.copy, rule=mo.Adam())
    assert caught.value.__notes__ == ["raised by the port at step 3"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_of_16_bits(dtype: torch.dtype) -> None:
    start = {"w": torch.linspace(-1.0, 1.0, 6).to(dtype)}

    def doubled(params: dict[str, Any], step: int) -> dict[str, Any]:
        return {"w": 2.0 * params["w"]}

    def halved(params: dict[str, Any], step: int) -> dict[str, Any]:
        return {"w": 0.5 * params["w"]}

    port: dict[str, Any] = {"to_port": torch.clone, "rule": mo.Adam(lr=0.1)}
    assert_same_training(doubled, doubled, start, **port)
    departure = compare_training(doubled, halved, start, **port)
    assert departure is not None
    assert (departure.step, departure.what) == (1, "gradient")
