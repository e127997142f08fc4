"""Mistakes of ports are found where they are made, and mostly recognized."""

from typing import Any

import numpy as np
import pytest
import torch

import multiopt as mo
from multiopt.testing import assert_same_training, compare_training
from tests.ports.mistakes import MISTAKES, Mistake, remembered, without_divergence
from tests.ports.models import VARIATIONAL, in_torch


def arguments(wrong: Mistake) -> dict[str, Any]:
    def prototype(params: dict[str, Any], step: int) -> dict[str, Any]:
        grads = wrong.model.prototype(params, step)
        return {name: np.asarray(g).astype(wrong.dtype) for name, g in grads.items()}

    return {
        "reference": remembered if wrong.departs == "memory" else prototype,
        "port": wrong.port,
        "params": {name: x.astype(wrong.dtype) for name, x in wrong.model.start.items()},
        "to_port": wrong.to_port,
        # It hides what is wrong with the scale of a gradient from the parameters.
        "rule": mo.Adam(lr=0.05),
        "clip": mo.Clip(norm=10.0),
    }


@pytest.mark.parametrize("wrong", MISTAKES, ids=lambda wrong: wrong.what)
def test_a_mistake_is_found_where_it_is_made(wrong: Mistake) -> None:
    found = compare_training(**arguments(wrong))
    assert found is not None
    assert (found.step, found.name, found.what) == (wrong.step, wrong.name, wrong.departs)
    assert found.cause == wrong.cause, str(found)
    assert f"of {found.name!r}" in str(found)


def test_most_are_recognized() -> None:
    assert len(MISTAKES) >= 30
    assert len({wrong.what for wrong in MISTAKES}) == len(MISTAKES)
    assert sum(wrong.cause is None for wrong in MISTAKES) <= 5


def test_a_late_mistake_is_found_late() -> None:
    right, wrong = (in_torch(VARIATIONAL, loss) for loss in (None, without_divergence))
    found = compare_training(
        VARIATIONAL.prototype,
        lambda params, step: (right if step < 8 else wrong)(params, step),
        VARIATIONAL.start,
        to_port=torch.tensor,
        rule=mo.Adam(lr=0.05),
    )
    assert found is not None
    assert (found.step, found.name, found.cause) == (8, "loc", "term")


@pytest.mark.parametrize("shared", ["parameters", "gradients"])
def test_a_port_that_writes_where_the_prototype_reads(shared: str) -> None:
    # What every step of it writes is what the prototype trains with.
    arrays = {name: x.copy() for name, x in VARIATIONAL.start.items()}
    kept = {name: np.zeros_like(x) for name, x in arrays.items()}

    def prototype(params: dict[str, Any], step: int) -> dict[str, Any]:
        for name, g in VARIATIONAL.prototype(params, step).items():
            kept[name][...] = g
        return dict(kept)

    def port(params: dict[str, Any], step: int) -> dict[str, Any]:
        grads = in_torch(VARIATIONAL)(params, step)
        for name, x in (arrays if shared == "parameters" else kept).items():
            torch.from_numpy(x).sub_(grads[name], alpha=0.1)
        return grads

    found = compare_training(prototype, port, arrays, to_port=torch.tensor, rule=mo.Adam())
    assert found is not None
    assert (found.step, found.name, found.cause) == (1, "loc", "shared memory")
    assert "torch.tensor(x) copies" in str(found).replace("\n", " ")


def test_a_gradient_of_a_parameter_that_the_prototype_does_not_use() -> None:
    right = in_torch(VARIATIONAL)

    def prototype(params: dict[str, Any], step: int) -> dict[str, Any]:
        grads = VARIATIONAL.prototype(params, step)
        return grads if step < 3 else {"loc": grads["loc"]}

    options: dict[str, Any] = {"to_port": torch.tensor, "rule": mo.Adam()}
    found = compare_training(prototype, right, VARIATIONAL.start, **options)
    assert found is not None
    assert (found.step, found.name, found.what) == (3, "log_scale", "missing")
    assert (found.expected, found.found) == ("none", "one")


def test_another_precision_is_meant() -> None:
    def to_port(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.float32)

    options: dict[str, Any] = {"to_port": to_port, "rule": mo.Adam()}
    arguments = VARIATIONAL.prototype, in_torch(VARIATIONAL), VARIATIONAL.start
    found = compare_training(*arguments, **options)
    assert found is not None
    assert (found.what, found.expected, found.found) == ("dtype", "float64", "float32")
    assert compare_training(*arguments, rtol=1e-4, **options) is None


def test_a_library_that_computes_otherwise() -> None:
    # As if: its gradients arrive with other bits.
    calls: list[int] = []

    def to_port(x: np.ndarray) -> torch.Tensor:
        calls.append(1)
        # Two parameters, again, and their gradients: those of the first step are off.
        return torch.tensor(x * (1 + 1e-13) if 4 < len(calls) <= 6 else x)

    found = compare_training(
        VARIATIONAL.prototype,
        in_torch(VARIATIONAL),
        VARIATIONAL.start,
        to_port=to_port,
        rule=mo.SGD(lr=1e-3),
    )
    assert found is not None
    assert (found.step, found.name, found.what) == (1, "loc", "update")


def test_the_assertion_says_what_is_found() -> None:
    (wrong,) = (wrong for wrong in MISTAKES if wrong.what == "a sum for a mean")
    with pytest.raises(AssertionError, match=r"step 1, gradient of 'W'(?s:.)*20 times as large"):
        assert_same_training(**arguments(wrong))
