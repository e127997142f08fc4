"""Adamax: Adam with a decaying maximum in place of the second moment.

Unlike Adam's second moment, the maximum needs no bias correction.
``spec/rules/adamax.md`` gives the formula in the order in which it is computed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from multiopt.rules.adam import first_moment, moments
from multiopt.rules.arithmetic import maximum, one_minus_power
from multiopt.rules.decay import descending, descent, penalized, shrunk
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule, number, switch

__all__ = ["Adamax"]


def adamax(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Adamax: Kingma & Ba, Algorithm 2."""
    exp_avg, exp_inf = slots
    grad = penalized(param, descending(grad, c), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_inf = maximum(xp, c.beta2 * exp_inf, xp.abs(grad) + c.eps)
    return shrunk(param, c) - c.step_size * exp_avg / exp_inf, (exp_avg, exp_inf)


@dataclass(frozen=True)
class Adamax(Rule):
    """Adamax: Adam with a decaying maximum of the gradient's size in place of the second moment.

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (ICLR 2015,
    arXiv:1412.6980), Algorithm 2, with torch's ``eps``, which is added to the size of each
    gradient. Names and defaults are those of ``torch.optim.Adamax``.

    Args:
        lr: Learning rate, >= 0.
        betas: Decay rates of the average of the gradient and of the maximum of its size, each
            >= 0 and < 1.
        eps: Added to the size of the gradient, >= 0.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        maximize: Ascend instead of descending.
        decoupled_weight_decay: Shrink the parameter as ``AdamW`` does instead of adding a penalty.

    ``lr``, ``eps``, ``weight_decay`` and either of ``betas`` may be schedules ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.Adamax(lr=0.5))
    >>> w = np.array([1.0, -1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([4.0, -0.01])})
    >>> w.round(4).tolist()
    [0.5, -0.5]
    """

    lr: Hyperparameter = number(2e-3, NONNEGATIVE)
    betas: tuple[Hyperparameter, Hyperparameter] = number((0.9, 0.999), FRACTION)
    eps: Hyperparameter = number(1e-8, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    maximize: bool = switch()
    decoupled_weight_decay: bool = switch()

    slots: ClassVar = ("exp_avg", "exp_inf")
    update: ClassVar = staticmethod(adamax)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        beta1, beta2 = h.betas
        return dict(
            **moments(beta1, beta2),
            step_size=h.lr / one_minus_power(beta1, step),
            eps=h.eps,
            **descent(h, h.lr, h.decoupled_weight_decay),
        )
