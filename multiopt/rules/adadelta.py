"""Adadelta: two averages, of squared gradients and of squared steps, set the length of a step.

The ratio of their roots has the unit of a step over a gradient, so no learning rate is needed.
``spec/rules/adadelta.md`` gives the formula in the order in which it is computed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from multiopt.rules.adam import second_moment
from multiopt.rules.decay import descending, descent, penalized, shrunk
from multiopt.rules.rule import NONNEGATIVE, SHARE, Hyperparameter, Rule, number, switch

__all__ = ["Adadelta"]


def adadelta(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Adadelta: Zeiler, Algorithm 1."""
    square_avg, acc_delta = slots
    grad = penalized(param, descending(grad, c), c)
    square_avg = second_moment(square_avg, grad, c)
    delta = xp.sqrt(acc_delta + c.eps) / xp.sqrt(square_avg + c.eps) * grad
    return shrunk(param, c) - c.lr * delta, (square_avg, second_moment(acc_delta, delta, c))


@dataclass(frozen=True)
class Adadelta(Rule):
    """Adadelta: steps as long as earlier steps on average, whatever the unit of the gradient.

    Source: Zeiler, "ADADELTA: An Adaptive Learning Rate Method" (2012, arXiv:1212.5701),
    Algorithm 1, with a learning rate of 1. Names and defaults are those of
    ``torch.optim.Adadelta``.

    Args:
        lr: Factor of every step, >= 0; 1 in the paper.
        rho: Decay rate of both averages, from 0 to 1.
        eps: Added to both averages inside their roots, >= 0. It also sets the length of the first
            steps.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        maximize: Ascend instead of descending.
        decoupled_weight_decay: Shrink the parameter as ``AdamW`` does instead of adding a penalty.

    ``lr``, ``rho``, ``eps`` and ``weight_decay`` may be schedules ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.Adadelta(rho=0.75, eps=0.25))
    >>> w = np.array([1.0, 1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([3.0 ** 0.5, 0.0])})
    >>> w.round(4).tolist()
    [0.134, 1.0]
    """

    lr: Hyperparameter = number(1.0, NONNEGATIVE)
    rho: Hyperparameter = number(0.9, SHARE)
    eps: Hyperparameter = number(1e-6, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    maximize: bool = switch()
    decoupled_weight_decay: bool = switch()

    slots: ClassVar = ("square_avg", "acc_delta")
    update: ClassVar = staticmethod(adadelta)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        return dict(
            lr=h.lr,
            beta2=h.rho,
            one_minus_beta2=1.0 - h.rho,
            eps=h.eps,
            **descent(h, h.lr, h.decoupled_weight_decay),
        )
