"""Every configuration that PyTorch's own database of optimizers lists, against the torch class."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import multiopt as mo
from tests.cases import TOLERANCE
from tests.hosts.optim_db import CLASSES, WITHOUT_RULE, Invalid, database, invalid, valid

#: Where multiopt differs on purpose: what the looser tolerance is for.
DIFFERENT: dict[str, tuple[str, dict[str, Any]]] = {
    "Muon": (
        "torch orthogonalizes in bfloat16, multiopt in the working precision (spec/rules/muon.md)",
        {"rtol": 0.0, "atol": 0.05},
    ),
}

#: Not about hyperparameters, or about the ways in which torch runs.
NOT_OURS = ("foreach", "fused", "capturable", "differentiable")


def test_the_lists_are_those_of_the_database() -> None:
    assert sorted(database()) == sorted([*CLASSES, *WITHOUT_RULE])


def plain(value: Any) -> Any:
    """A setting as multiopt's rules take it, numbers in the place of tensors."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


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
    for _, given in valid(name):
        settings = {key: plain(value) for key, value in given.items()}
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
    refused = [one for one in invalid(name) if is_about_numbers(name, one)]
    assert refused
    for one in refused:
        settings = {key: plain(value) for key, value in one.settings.items()}
        with pytest.raises(ValueError, match=name):
            getattr(mo, name)(**settings)


def is_about_numbers(name: str, one: Invalid) -> bool:
    """Whether hyperparameters are what torch refuses, and their values are why."""
    if one.in_step or one.error != "ValueError" or not one.settings:
        return False
    if set(NOT_OURS) & set(one.settings):
        return False
    # A tensor of one element in place of a number is one here; torch wants both betas alike.
    betas = plain(one.settings.get("betas", (1.0,)))
    return not (name in ("Adam", "AdamW") and all(0 <= beta < 1 for beta in betas))
