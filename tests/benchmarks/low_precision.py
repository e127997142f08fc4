"""Tensors of 16 bits: multiopt keeps slots of float32 for them, torch slots of 16 bits."""

from typing import Any

import multiopt as mo
from multiopt.bench import sides
from multiopt.bench.paired import Run, Side
from multiopt.bench.sides import ADAM, LR
from multiopt.bench.work import Work

__all__ = ["fused", "ours"]


def ours(dtype: str, **options: Any) -> Side:
    """``Optimizer.step``, the gradients read from ``.grad``.

    Args:
        dtype: The name of a dtype of torch.
        options: Options of the optimizer.
    """

    def begin(work: Work, threads: int) -> Run:
        params = _tensors(work, dtype)
        opt = mo.Optimizer(ADAM, threads=threads, **options)
        return _run(lambda: opt.step(params), params)

    return Side(f"torch {dtype}{', masters' if options else ''}", begin, ("torch",))


def fused(dtype: str) -> Side:
    """``torch.optim.Adam(fused=True)``."""

    def begin(work: Work, threads: int) -> Run:
        import torch

        params = _tensors(work, dtype)
        return _run(torch.optim.Adam(params.values(), lr=LR, fused=True).step, params)

    return Side(f"torch fused, {dtype}", begin, ("torch",))


def _tensors(work: Work, dtype: str) -> dict[str, Any]:
    import torch

    made = {}
    for name, tensor in sides.tensors(work).items():
        made[name] = tensor.detach().to(getattr(torch, dtype)).requires_grad_()
        made[name].grad = tensor.grad.to(made[name].dtype)
    return made


def _run(step: Any, params: dict[str, Any]) -> Run:
    return Run(step, lambda: sides.torch_values({k: x.float() for k, x in params.items()}))
