"""RAdam: Adam that waits until its second moment is reliable, and then rectifies its steps.

The first steps use momentum alone. Once the average is long enough, a factor shortens the steps as
the variance of the second moment requires. ``spec/rules/radam.md`` gives the formula in the order
in which it is computed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.adam import descend, first_moment, moments, second_moment
from multiopt.rules.arithmetic import by_squaring, one_minus_power
from multiopt.rules.decay import descending, descent, penalized, shrunk
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule, number, switch

__all__ = ["RAdam"]


def radam(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Adam's step, or momentum alone while the second moment is not reliable."""
    exp_avg, exp_avg_sq = slots
    grad = penalized(param, descending(grad, c), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_sq = second_moment(exp_avg_sq, grad, c)
    param = shrunk(param, c)
    if c.rectifies:
        return descend(xp, param, exp_avg, exp_avg_sq, c), (exp_avg, exp_avg_sq)
    return param - c.step_size * exp_avg, (exp_avg, exp_avg_sq)


def mean_age(beta: Any, step: Any) -> Any:
    """The mean of the ages 0 to ``step - 1`` of the gradients in an average, weighted ``beta^age``.

    It is assembled from blocks of 1, 2, 4, ... ages, as ``one_minus_power`` is. The difference in
    the paper, ``beta / (1 - beta) - t * beta^t / (1 - beta^t)``, loses three digits at 0.999.
    """
    return by_squaring(step, (0.0, 0.0), (0.0, 1.0 - beta, 1.0), _older, _doubled)


def _older(mean: Any, mass: Any, block_mean: Any, block_mass: Any, block: Any) -> Any:
    """The mean and the mass of a block of ages, followed by others that it makes older."""
    mass = (1.0 - block_mass) * mass
    total = block_mass + mass
    return (block_mass * block_mean + mass * (block + mean)) / total, total


def _doubled(mean: Any, mass: Any, block: Any) -> Any:
    """A block followed by an equal block, which the length of the first makes older."""
    return *_older(mean, mass, mean, mass, block), block + block


@dataclass(frozen=True)
class RAdam(Rule):
    """RAdam: Adam that starts with momentum alone, and then rectifies the length of its steps.

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (ICLR 2020,
    arXiv:1908.03265), Algorithm 2, in torch's form: the second moment is used where the length
    ``rho`` of its average is above 5, and ``eps`` is added to the root of the uncorrected moment.
    Names and defaults are those of ``torch.optim.RAdam``.

    Args:
        lr: Learning rate, >= 0.
        betas: Decay rates of the averages of the gradient and of its square, each >= 0 and < 1.
        eps: Added to the root of the uncorrected second moment, >= 0.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        decoupled_weight_decay: Shrink the parameter as ``AdamW`` does instead of adding a penalty.
        maximize: Ascend instead of descending.

    ``lr``, ``eps``, ``weight_decay`` and either of ``betas`` may be schedules ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.RAdam(lr=0.5))
    >>> w = np.array([1.0, -1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([4.0, -0.01])})
    >>> w.round(4).tolist()
    [-1.0, -0.995]
    """

    lr: Hyperparameter = number(1e-3, NONNEGATIVE)
    betas: tuple[Hyperparameter, Hyperparameter] = number((0.9, 0.999), FRACTION)
    eps: Hyperparameter = number(1e-8, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    decoupled_weight_decay: bool = switch()
    maximize: bool = switch()

    slots: ClassVar = ("exp_avg", "exp_avg_sq")
    update: ClassVar = staticmethod(radam)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        beta1, beta2 = h.betas
        rho = 1.0 + 2.0 * mean_age(beta2, step)
        rectifies = rho > 5.0
        # Where it does not rectify, any length will do that gives a finite factor.
        rho = np.where(rectifies, rho, 6.0)
        limit = np.where(rectifies, 2.0 / (1.0 - beta2) - 1.0, 6.0)
        rectification = np.sqrt(
            (rho - 4.0) * (rho - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * rho)
        )
        adaptive = rectification * np.sqrt(one_minus_power(beta2, step))
        return dict(
            **moments(beta1, beta2),
            step_size=h.lr * np.where(rectifies, adaptive, 1.0) / one_minus_power(beta1, step),
            root_scale=1.0,
            eps=h.eps,
            rectifies=rectifies,
            **descent(h, h.lr, h.decoupled_weight_decay),
        )
