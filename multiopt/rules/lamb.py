"""LAMB: Adam's direction, scaled so that a step is a fixed share of the parameter's length.

Lengths are exact sums over the whole parameter, so the rule is not elementwise.
``spec/rules/lamb.md`` gives the formula in the order in which it is computed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.adam import first_moment, moments, second_moment
from multiopt.rules.arithmetic import one_minus_power
from multiopt.rules.decay import descending, penalized
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule, number, switch
from multiopt.rules.sums import norm

__all__ = ["LAMB"]


def lamb(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """LAMB: You et al., Algorithm 2."""
    exp_avg, exp_avg_sq = slots
    grad = descending(grad, c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_sq = second_moment(exp_avg_sq, grad, c)
    denominator = c.root_scale * xp.sqrt(exp_avg_sq) + c.eps
    direction = penalized(param, c.first_moment_scale * exp_avg / denominator, c)
    size, length = norm(xp, param), norm(xp, direction)
    ratio = xp.where((size == 0.0) | (length == 0.0), 1.0, size / length)
    # In float64 to the end: for a direction close to zero the ratio may exceed float32.
    change = c.lr * ratio * xp.asarray(direction, dtype=xp.float64)
    change = xp.asarray(change, dtype=param.dtype)
    return param - change, (exp_avg, exp_avg_sq)


@dataclass(frozen=True)
class LAMB(Rule):
    """LAMB: Adam's direction, scaled to ``lr`` times the length of the parameter.

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes"
    (ICLR 2020, arXiv:1904.00962), Algorithm 2, with the identity for ``phi``. Names are those of
    ``AdamW``.

    Args:
        lr: Learning rate, >= 0: the length of a step divided by the length of the parameter.
        betas: Decay rates of the averages of the gradient and of its square, each >= 0 and < 1.
        eps: Added to the root of the corrected second moment, >= 0.
        weight_decay: Decay, >= 0: ``weight_decay * param`` is added to the direction before its
            length is computed.
        maximize: Ascend instead of descending; the decay still shrinks the parameter.

    ``lr``, ``eps``, ``weight_decay`` and either of ``betas`` may be schedules ``step -> number``.

    Each parameter is a layer in the sense of the paper and has one length. If its length or the
    length of the direction is zero, the direction is not scaled.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.LAMB(lr=0.5))
    >>> w = np.array([3.0, -4.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([4.0, -0.5])})
    >>> w.round(4).tolist()
    [1.2322, -2.2322]
    """

    lr: Hyperparameter = number(1e-3, NONNEGATIVE)
    betas: tuple[Hyperparameter, Hyperparameter] = number((0.9, 0.999), FRACTION)
    eps: Hyperparameter = number(1e-6, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    maximize: bool = switch()

    elementwise: ClassVar[bool] = False
    norms_only: ClassVar[bool] = True
    slots: ClassVar = ("exp_avg", "exp_avg_sq")
    update: ClassVar = staticmethod(lamb)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        beta1, beta2 = h.betas
        return dict(
            **moments(beta1, beta2),
            first_moment_scale=1.0 / one_minus_power(beta1, step),
            root_scale=1.0 / np.sqrt(one_minus_power(beta2, step)),
            eps=h.eps,
            weight_decay=h.weight_decay,
            penalizes=h.weight_decay != 0,
            lr=h.lr,
            maximizes=h.maximize,
        )
