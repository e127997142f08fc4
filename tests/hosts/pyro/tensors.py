"""Parameters of the store, gradients, and the modules that are compared."""

from typing import Any

import pyro
import pyro.optim
import pytest
import torch

import multiopt.adapters.pyro as optim
from multiopt.adapters.pyro.constructors import CONSTRUCTORS, RULES

NAMES = ["SGD", "Adam", "AdamW", "ClippedAdam", "DCTAdam"]
RULED = [name for name, constructor in CONSTRUCTORS.items() if constructor in RULES]
#: Settings for which an optimizer keeps all that it may keep.
SETTINGS: dict[str, dict[str, Any]] = {name: {"lr": 0.1} for name in CONSTRUCTORS} | {
    "ASGD": {"lr": 0.1, "lambd": 0.1, "t0": 2.0},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5},
    "AdagradRMSProp": {"eta": 0.1},
    "NAdam": {"lr": 0.1, "momentum_decay": 0.1, "decoupled_weight_decay": True},
    "RAdam": {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "RMSprop": {"lr": 0.1, "momentum": 0.9, "centered": True},
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
}
#: ``pyro.optim``, which makes its functions when it is imported, unseen by mypy.
PYRO: Any = pyro.optim
BOTH = pytest.mark.parametrize("module", [pyro.optim, optim], ids=["pyro", "multiopt"])


def leaf(constrained: Any) -> torch.Tensor:
    """The unconstrained leaf behind a value of the store."""
    return constrained.unconstrained()


def param(name: str, value: float = 0.0, size: int | tuple[int, ...] = 2) -> torch.Tensor:
    """The unconstrained leaf behind a parameter of the store."""
    shape = size if isinstance(size, tuple) else (size,)
    return leaf(pyro.param(name, torch.full(shape, value)))


def give(tensor: torch.Tensor, *grad: float) -> torch.Tensor:
    values = torch.tensor(grad or [1.0] * tensor.numel(), dtype=tensor.dtype)
    tensor.grad = values.reshape(tensor.shape)
    return tensor


def steps_of(opt: Any, name: str) -> int:
    (state,) = opt.get_state()[name]["state"].values()
    return int(state["step"])
