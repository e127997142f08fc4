"""A small model, its data on each rank, and training on it: on ranks, and in one process."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

__all__ = ["data", "digest", "full", "loss", "model", "train", "train_averaged"]

STEPS = 6


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 5), torch.nn.Tanh()
    return torch.nn.Sequential(*layers, torch.nn.Linear(5, 1))


def data(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank sees. More than two ranks see the same, so that sums need no order."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(16, 7, generator=generator), torch.randn(16, 1, generator=generator)


def loss(module: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    result: torch.Tensor = ((module(inputs) - targets) ** 2).mean() * 50
    return result


def train(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int = STEPS
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(module, data(rank)).backward()
        optimizer.step()


def train_averaged(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Sequence[int],
    steps: int = STEPS,
    change: Callable[[int, list[torch.Tensor]], object] | None = None,
) -> None:
    """Train in one process on the mean of the gradients that the ranks have, in their order.

    Args:
        module: The model.
        optimizer: Its optimizer.
        ranks: The ranks, or what their data is called.
        steps: How many steps.
        change: Changes the gradients of a step.
    """
    params = list(module.parameters())
    for step in range(steps):
        all_grads = []
        for rank in ranks:
            module.zero_grad()
            loss(module, data(rank)).backward()
            all_grads.append([param.grad / len(ranks) for param in params])  # type: ignore[operator]
        for param, *grads in zip(params, *all_grads, strict=True):
            total = grads[0].clone()
            for grad in grads[1:]:
                total += grad
            param.grad = total
        if change is not None:
            change(step, [param.grad for param in params])  # type: ignore[misc]
        optimizer.step()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def digest(module: torch.nn.Module, optimizer: Any) -> dict[str, list[list[float]]]:
    """The parameters, the clocks and the slots, as numbers that are equal if the bits are."""
    found = {}
    for name, param in module.named_parameters():
        state = optimizer.state[param]
        tensors = [param, *(state[key] for key in sorted(state))]
        found[name] = [full(tensor).reshape(-1).tolist() for tensor in tensors]
    return found
