"""Averaged stochastic gradient descent: SGD with a decaying learning rate, and an average.

The average is a slot; it does not influence the parameter. ``spec/rules/asgd.md`` gives the formula
in the order in which it is computed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.decay import descending, penalized, shrunk
from multiopt.rules.rule import NONNEGATIVE, Hyperparameter, Rule, number, switch

__all__ = ["ASGD"]


def asgd(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Descend, then average the parameter, or copy it until averaging begins."""
    (average,) = slots
    grad = penalized(param, descending(grad, c), c)
    param = shrunk(param, c) - c.eta * grad
    return param, (average + c.mu * (param - average) if c.averages else param,)


@dataclass(frozen=True)
class ASGD(Rule):
    """Stochastic gradient descent that keeps an average of the parameters.

    Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging" (SIAM J.
    Control Optim. 1992), with the learning rate of Bottou, "Stochastic Gradient Descent Tricks"
    (2012). Names and defaults are those of ``torch.optim.ASGD``. The average is the slot ``ax``;
    the parameter itself is not averaged.

    Args:
        lr: Learning rate of the first step, >= 0.
        lambd: Decay, >= 0: step ``t`` first multiplies the parameter by ``1 - lambd * eta``, where
            ``eta``, its learning rate, is ``lr / (1 + lambd * lr * (t - 1)) ** alpha``.
        alpha: Exponent of the decay of the learning rate, >= 0.
        t0: Number of steps before averaging begins, >= 0; until then ``ax`` is the parameter.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        maximize: Ascend instead of descending; the decay still shrinks the parameter.

    ``lr``, ``lambd``, ``alpha``, ``t0`` and ``weight_decay`` may be schedules ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.ASGD(lr=0.5, lambd=0.0, t0=0.0))
    >>> w = np.array([1.0, -1.0])
    >>> for _ in range(3):
    ...     _ = opt.step({"w": w}, {"w": np.array([1.0, -1.0])})
    >>> w.tolist(), opt.state("w").slots["ax"].tolist()
    ([-0.5, 0.5], [-0.25, 0.25])
    """

    lr: Hyperparameter = number(1e-2, NONNEGATIVE)
    lambd: Hyperparameter = number(1e-4, NONNEGATIVE)
    alpha: Hyperparameter = number(0.75, NONNEGATIVE)
    t0: Hyperparameter = number(1e6, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    maximize: bool = switch()

    #: Torch's name for the average.
    slots: ClassVar = ("ax",)
    update: ClassVar = staticmethod(asgd)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        past = step - 1
        # A negative power goes to zero where a positive one would overflow, an error in Python.
        eta = h.lr * (1.0 + h.lambd * h.lr * past) ** -h.alpha
        averaged = past - h.t0
        return dict(
            eta=eta,
            mu=1.0 / np.where(averaged > 1.0, averaged, 1.0),
            averages=averaged > 1.0,
            weight_decay=h.weight_decay,
            penalizes=h.weight_decay != 0,
            shrinkage=1.0 - h.lambd * eta,
            shrinks=h.lambd != 0,
            maximizes=h.maximize,
        )
