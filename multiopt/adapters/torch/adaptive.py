"""Adam and its relatives, which scale each element by the sizes of its gradients.

They have the signatures of ``torch.optim``, and by keyword take what ``Optimizer`` takes besides a
rule: ``clip``, ``names`` and so on. ``foreach``, ``fused`` and ``capturable`` say how torch runs;
they are accepted and change nothing.

>>> import multiopt.adapters.torch as optim
>>> import torch
>>> model = torch.nn.Linear(2, 1)
>>> adam = optim.AdamW(model.parameters(), lr=0.5, betas=(0.5, 0.9))
>>> model(torch.ones(2)).backward()
>>> adam.step()
>>> adam.load_state_dict(torch.optim.AdamW(model.parameters(), lr=0.25).state_dict())
>>> adam.param_groups[0]["lr"]
0.25
"""

from typing import Unpack

import torch

from multiopt.adapters.torch.arguments import Params, Settings
from multiopt.adapters.torch.optimizer import Optimizer

__all__ = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
]


class Adadelta(Optimizer):
    """Adadelta: ``torch.optim.Adadelta`` with the rule ``multiopt.Adadelta``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-06,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.Adadelta``."""
        self._begin_as(
            torch.optim.Adadelta,
            params,
            settings,
            lr=lr,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
        )


class Adafactor(Optimizer):
    """Adafactor: ``torch.optim.Adafactor`` with the rule ``multiopt.Adafactor``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 0.01,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 0.001),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.Adafactor``."""
        self._begin_as(
            torch.optim.Adafactor,
            params,
            settings,
            lr=lr,
            beta2_decay=beta2_decay,
            eps=eps,
            d=d,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
        )


class Adagrad(Optimizer):
    """Adagrad: ``torch.optim.Adagrad`` with the rule ``multiopt.Adagrad``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 0.01,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.Adagrad``."""
        self._begin_as(
            torch.optim.Adagrad,
            params,
            settings,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )


class Adam(Optimizer):
    """Adam: ``torch.optim.Adam`` with the rule ``multiopt.Adam``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 0.001,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.Adam``."""
        self._begin_as(
            torch.optim.Adam,
            params,
            settings,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class AdamW(Optimizer):
    """Adam with decoupled weight decay: ``torch.optim.AdamW`` with the rule ``multiopt.AdamW``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 0.001,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.AdamW``."""
        self._begin_as(
            torch.optim.AdamW,
            params,
            settings,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )


class Adamax(Optimizer):
    """Adamax: ``torch.optim.Adamax`` with the rule ``multiopt.Adamax``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.Adamax``."""
        self._begin_as(
            torch.optim.Adamax,
            params,
            settings,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )


class NAdam(Optimizer):
    """Adam with Nesterov's momentum: ``torch.optim.NAdam`` with the rule ``multiopt.NAdam``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.NAdam``."""
        self._begin_as(
            torch.optim.NAdam,
            params,
            settings,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )


class RAdam(Optimizer):
    """Rectified Adam: ``torch.optim.RAdam`` with the rule ``multiopt.RAdam``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.RAdam``."""
        self._begin_as(
            torch.optim.RAdam,
            params,
            settings,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )


class RMSprop(Optimizer):
    """RMSprop: ``torch.optim.RMSprop`` with the rule ``multiopt.RMSprop``."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        """Create an optimizer with the arguments of ``torch.optim.RMSprop``."""
        self._begin_as(
            torch.optim.RMSprop,
            params,
            settings,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
