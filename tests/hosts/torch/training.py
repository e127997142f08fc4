"""Two copies of some parameters, ours and torch's, that take the same gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import multiopt.adapters.torch as optim
from tests.cases import TOLERANCE

__all__ = ["OPTIONS", "Pair", "assert_close", "default_dtype", "give", "parameters", "same"]

#: Options with which every class keeps all that it may keep.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{"lr": 0.1, "lambd": 0.1, "t0": 2.0, "weight_decay": 0.1}],
    "Adadelta": [{"lr": 0.5, "rho": 0.8, "maximize": True}],
    "Adafactor": [{"lr": 0.1, "eps": (1e-20, 0.1), "weight_decay": 0.1}],
    "Adagrad": [{"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}],
    "Adam": [{"lr": 0.1}, {"lr": 0.1, "amsgrad": True, "decoupled_weight_decay": True}],
    "AdamW": [{"lr": 0.1, "amsgrad": True}],
    "Adamax": [{"lr": 0.1, "weight_decay": 0.1}],
    "Muon": [{"lr": 0.01, "nesterov": False}],
    "NAdam": [{"lr": 0.1, "momentum_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{"lr": 0.1, "weight_decay": 0.1}],
    "RMSprop": [{"lr": 0.1, "momentum": 0.9, "centered": True}],
    "Rprop": [{"lr": 0.1}],
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}],
}


def tolerance(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """How far torch's class may be off; its Muon works in bfloat16."""
    if name == "Muon":
        return {"rtol": 0.0, "atol": 0.05}
    return TOLERANCE[str(dtype).removeprefix("torch.")]


def parameters(
    name: str, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Some parameters that the class of a name takes."""
    shapes: Sequence[tuple[int, ...]] = [(3, 4), (5,), ()] if name != "Muon" else [(3, 4), (2, 2)]
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def give(params: Sequence[torch.Tensor], step: int) -> None:
    """Set gradients that depend on the number of the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = grad.to(param.dtype)


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Whether tensors are equal to the last bit."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def assert_close(
    name: str, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], message: str = ""
) -> None:
    """Check that tensors are those of torch's class, within the tolerance for strangers."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype, message
        within = tolerance(name, a.dtype)
        torch.testing.assert_close(a, b, **within, msg=lambda text: f"{message}: {text}")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let torch keep numbers of ASGD and NAdam in the dtype of the parameters, as ours are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Pair:
    """An optimizer of ours and torch's class of the same name, on copies of the same parameters.

    Args:
        name: The name of the class.
        settings: Its arguments.
        grouped: Makes the groups from the parameters.
        dtype: That of the parameters.
    """

    def __init__(
        self,
        name: str,
        settings: dict[str, Any],
        grouped: Callable[[list[torch.nn.Parameter]], Any] = list,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.name, self.dtype = name, dtype
        self.mine, self.theirs = parameters(name, dtype), parameters(name, dtype)
        self.ours: optim.Optimizer = getattr(optim, name)(grouped(self.mine), **settings)
        self.peer: torch.optim.Optimizer = getattr(torch.optim, name)(
            grouped(self.theirs), **settings
        )
        self.steps = 0

    def step(self, times: int = 1) -> None:
        """Let both take some steps."""
        for _ in range(times):
            give(self.mine, self.steps)
            give(self.theirs, self.steps)
            self.ours.step()
            with default_dtype(self.dtype):
                self.peer.step()
            self.steps += 1

    def check(self, message: str = "") -> None:
        """Check that the parameters agree."""
        assert_close(self.name, self.mine, self.theirs, message)
