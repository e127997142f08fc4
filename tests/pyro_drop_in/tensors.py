"""Parameters of the store, gradients, and the modules that are compared."""

from typing import Any

import pyro
import pyro.optim
import pytest
import torch

import multiopt.adapters.pyro as optim

NAMES = ["SGD", "Adam", "AdamW", "ClippedAdam", "DCTAdam"]
BOTH = pytest.mark.parametrize("module", [pyro.optim, optim], ids=["pyro", "multiopt"])


def param(name: str, value: float = 0.0, size: int = 2) -> torch.Tensor:
    """The unconstrained leaf behind a parameter of the store."""
    return pyro.param(name, torch.full((size,), value)).unconstrained()


def give(tensor: torch.Tensor, *grad: float) -> torch.Tensor:
    tensor.grad = torch.tensor(grad or [1.0] * tensor.numel(), dtype=tensor.dtype)
    return tensor


def steps_of(opt: Any, name: str) -> int:
    (state,) = opt.get_state()[name]["state"].values()
    return int(state["step"])
