"""Gradient descent and its relatives, with the signatures of ``torch.optim``; see ``adaptive``.

>>> import multiopt.adapters.torch as optim
>>> import torch
>>> weight = torch.zeros(1, requires_grad=True)
>>> sgd = optim.SGD([weight], lr=0.5)
>>> def loss():
...     sgd.zero_grad()
...     (weight - 3).square().sum().backward()
>>> sgd.step(loss)
>>> weight
tensor([3.], requires_grad=True)
"""

from typing import Unpack

import torch

from multiopt.adapters.torch.arguments import Params, Settings
from multiopt.adapters.torch.optimizer import Optimizer

__all__ = [
    "ASGD",
    "SGD",
    "Muon",
    "Rprop",
]


class ASGD(Optimizer):
    """Averaged SGD: ``torch.optim.ASGD`` with the rule ``multiopt.ASGD``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 0.01,
        lambd: float = 0.0001,
        alpha: float = 0.75,
        t0: float = 1000000.0,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.ASGD``."""
        self._begin_as(
            torch.optim.ASGD,
            params,
            settings,
            lr=lr,
            lambd=lambd,
            alpha=alpha,
            t0=t0,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )


class SGD(Optimizer):
    """Stochastic gradient descent: ``torch.optim.SGD`` with the rule ``multiopt.SGD``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 0.001,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.SGD``."""
        self._begin_as(
            torch.optim.SGD,
            params,
            settings,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )


class Muon(Optimizer):
    """Muon, for matrices: ``torch.optim.Muon`` with the rule ``multiopt.Muon``."""

    def __init__(
        self,
        params: Params,
        lr: float = 0.001,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-07,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.Muon``."""
        self._begin_as(
            torch.optim.Muon,
            params,
            settings,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim != 2:
                    raise ValueError(
                        "Muon only supports 2D parameters whereas we found a parameter with size: "
                        f"{param.size()}"
                    )


class Rprop(Optimizer):
    """Resilient backpropagation: ``torch.optim.Rprop`` with the rule ``multiopt.Rprop``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 0.01,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-06, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.Rprop``."""
        self._begin_as(
            torch.optim.Rprop,
            params,
            settings,
            lr=lr,
            etas=etas,
            step_sizes=step_sizes,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
