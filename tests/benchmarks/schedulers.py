"""Optimizers of ``torch.optim`` whose rate changes at every step, as a scheduler has it.

The rates are written as ``scheduler.step()`` writes them, without its own time, which is torch's
and the same on both sides. The side in which nothing changes writes the rate that there is.
"""

from collections.abc import Callable
from typing import Any

from multiopt.bench.paired import Run, Side
from multiopt.bench.sides import LR, torch_values
from multiopt.bench.work import Work
from tests.benchmarks.peers import tensors

__all__ = ["fused", "ours"]

#: The factor of the rate from one step to the next.
GAMMA = 0.9999


def ours(each: bool = False, gamma: float = GAMMA) -> Side:
    """``Adam`` of ``multiopt.adapters.torch``.

    Args:
        each: Whether every parameter has a group of its own.
        gamma: The factor of the rate; 1 for one that stays.
    """

    def begin(work: Work, threads: int) -> Run:
        import multiopt.adapters.torch as optim

        return _run(work, lambda groups: optim.Adam(groups, lr=LR, threads=threads), each, gamma)

    return Side(f"torch.optim, rates {_moves(gamma)}{_groups(each)}", begin, ("torch",))


def fused(each: bool = False) -> Side:
    """``torch.optim.Adam(fused=True)``, with rates that change."""

    def begin(work: Work, threads: int) -> Run:
        import torch

        return _run(work, lambda groups: torch.optim.Adam(groups, lr=LR, fused=True), each, GAMMA)

    return Side(f"torch fused{_groups(each)}", begin, ("torch",))


def _run(work: Work, make: Callable[[Any], Any], each: bool, gamma: float) -> Run:
    leaves = tensors(work)
    params = list(leaves.values())
    optimizer = make([{"params": [param]} for param in params] if each else params)

    def step() -> None:
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= gamma

    return Run(step, lambda: torch_values(leaves))


def _moves(gamma: float) -> str:
    return "kept" if gamma == 1 else "moved"


def _groups(each: bool) -> str:
    return ", a group each" if each else ""
