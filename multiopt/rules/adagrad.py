"""Adagrad: elements whose gradients have been large so far take shorter steps.

The rule keeps the sum of all squared gradients, which never shrinks. ``spec/rules/adagrad.md``
gives the formula in the order in which it is computed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.adam import descend
from multiopt.rules.decay import descending, descent, penalized, shrunk
from multiopt.rules.rule import NONNEGATIVE, Hyperparameter, Rule, number, switch

__all__ = ["Adagrad"]


def adagrad(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Adagrad: Duchi, Hazan & Singer, with diagonal matrices."""
    (total,) = slots
    grad = penalized(param, descending(grad, c), c)
    total = total + c.start + grad * grad
    return descend(xp, shrunk(param, c), grad, total, c), (total,)


@dataclass(frozen=True)
class Adagrad(Rule):
    """Adagrad: steps scaled by the root of the sum of all squared gradients.

    Source: Duchi, Hazan & Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization" (JMLR 12, 2011), Figure 1 with diagonal matrices, unconstrained. Names and
    defaults are those of ``torch.optim.Adagrad``.

    Args:
        lr: Learning rate of the first step, >= 0.
        lr_decay: Decay of the learning rate, >= 0: step ``t`` uses
            ``lr / (1 + (t - 1) * lr_decay)``.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        initial_accumulator_value: The first value of the sum of squares, >= 0.
        eps: Added to the root of the sum, >= 0.
        maximize: Ascend instead of descending.
        decoupled_weight_decay: Shrink the parameter as ``AdamW`` does instead of adding a penalty,
            with the decayed learning rate of the step.

    ``lr``, ``lr_decay``, ``weight_decay``, ``initial_accumulator_value`` and ``eps`` may be
    schedules ``step -> number``. Only the first number of ``initial_accumulator_value`` counts.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.Adagrad(lr=0.5))
    >>> w = np.array([1.0, -1.0])
    >>> for grad in ([3.0, -0.01], [4.0, 0.0]):
    ...     _ = opt.step({"w": w}, {"w": np.array(grad)})
    >>> w.round(4).tolist()
    [0.1, -0.5]
    """

    lr: Hyperparameter = number(1e-2, NONNEGATIVE)
    lr_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    initial_accumulator_value: Hyperparameter = number(0.0, NONNEGATIVE)
    eps: Hyperparameter = number(1e-10, NONNEGATIVE)
    maximize: bool = switch()
    decoupled_weight_decay: bool = switch()

    slots: ClassVar = ("sum",)
    update: ClassVar = staticmethod(adagrad)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        rate = h.lr / (1.0 + (step - 1) * h.lr_decay)
        return dict(
            start=np.where(step == 1, h.initial_accumulator_value, 0.0),
            step_size=rate,
            root_scale=1.0,
            eps=h.eps,
            **descent(h, rate, h.decoupled_weight_decay),
        )
