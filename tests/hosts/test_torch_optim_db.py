"""Every configuration that PyTorch's own database of optimizers lists, against the torch class."""

import json
import subprocess
import sys
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

import multiopt as mo
from tests.cases import TOLERANCE

#: Prints the valid and the invalid hyperparameters of each class. In a process of its own, for
#: ``torch.testing._internal`` changes settings of torch when it is imported.
READ = """
import json, torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

def plain(x):
    if isinstance(x, torch.Tensor):
        return x.tolist()
    return [plain(y) for y in x] if isinstance(x, tuple) else x

def inputs(given):
    return [{name: plain(value) for name, value in one.kwargs.items()} for one in given]

print(json.dumps({
    info.optim_cls.__name__: {
        "valid": inputs(info.optim_inputs_func(device="cpu")),
        "invalid": inputs(
            error.optimizer_error_input
            for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
            if error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
            and error.error_type is ValueError
        ),
    }
    for info in optim_db
}))
"""

#: Classes that multiopt has no rule for.
WITHOUT_RULE = {
    "LBFGS": "evaluates the loss again within a step, which no rule can",
    "SparseAdam": "is for sparse gradients, which multiopt refuses",
}

CLASSES = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam"),
    *("RAdam", "RMSprop", "Rprop", "SGD"),
)

#: Where multiopt differs on purpose: what the looser tolerance is for.
DIFFERENT: dict[str, tuple[str, dict[str, Any]]] = {
    "Muon": (
        "torch orthogonalizes in bfloat16, multiopt in the working precision (spec/rules/muon.md)",
        {"rtol": 0.0, "atol": 0.05},
    ),
}

#: Not about hyperparameters, or about the ways in which torch runs.
NOT_OURS = ("foreach", "fused", "capturable", "differentiable")


@cache
def database() -> dict[str, dict[str, list[dict[str, Any]]]]:
    run = [sys.executable, "-W", "ignore", "-c", READ]
    output = subprocess.run(run, stdout=subprocess.PIPE, check=True, text=True).stdout
    found: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(output)
    return found


def test_the_lists_are_those_of_the_database() -> None:
    assert sorted(database()) == sorted([*CLASSES, *WITHOUT_RULE])


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CLASSES)
def test_fifty_steps_of_every_valid_configuration(
    name: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    # torch keeps the learning rate of ASGD in its default dtype, whatever that of the parameter.
    request.addfinalizer(partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(getattr(torch, dtype))
    shapes = {"matrix": (6, 4)} if name == "Muon" else {"matrix": (6, 4), "w": (5,), "c": ()}
    tolerance = DIFFERENT[name][1] if name in DIFFERENT else TOLERANCE[dtype]
    configurations = database()[name]["valid"]
    assert len(configurations) > 3
    for settings in map(arguments, configurations):
        rng = np.random.default_rng(7)
        ours = {key: np.asarray(rng.standard_normal(shape), dtype) for key, shape in shapes.items()}
        theirs = {k: torch.from_numpy(x.copy()).requires_grad_() for k, x in ours.items()}
        opt = mo.Optimizer(getattr(mo, name)(**settings))
        peer = getattr(torch.optim, name)(list(theirs.values()), **settings)
        start = {key: x.copy() for key, x in ours.items()}
        for _ in range(50):
            grads = {
                key: np.asarray(rng.standard_normal(x.shape), dtype) for key, x in ours.items()
            }
            for key, x in theirs.items():
                x.grad = torch.from_numpy(grads[key].copy())
            opt.step(ours, grads)
            peer.step()
        for key, x in theirs.items():
            message = f"{name}({settings}): {key}"
            assert (ours[key] != start[key]).all(), message
            np.testing.assert_allclose(ours[key], x.detach().numpy(), **tolerance, err_msg=message)


@pytest.mark.parametrize("name", CLASSES)
def test_invalid_configurations_are_refused(name: str) -> None:
    invalid = [x for x in database()[name]["invalid"] if x and not set(NOT_OURS) & set(x)]
    # A tensor of one element in place of a number is one here; torch wants both betas alike.
    invalid = [x for x in invalid if not is_tensors_quarrel(name, x)]
    assert invalid
    for settings in map(arguments, invalid):
        with pytest.raises(ValueError, match=name):
            getattr(mo, name)(**settings)


def is_tensors_quarrel(name: str, settings: dict[str, Any]) -> bool:
    """Whether torch refuses tensors for betas, whose values are in range."""
    betas = settings.get("betas", [1.0])
    return name in ("Adam", "AdamW") and all(0 <= beta < 1 for beta in betas)
