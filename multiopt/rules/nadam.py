"""NAdam: Adam with Nesterov's momentum, which grows from a half of ``beta1`` to all of it.

A step needs the product of the momentum of all steps so far. It is computed from the clock instead
of being kept as state. ``spec/rules/nadam.md`` gives the formula in the order in which it is
computed.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.adam import first_moment, moments, second_moment
from multiopt.rules.arithmetic import one_minus_power, power, vectorized
from multiopt.rules.decay import descending, descent, penalized, shrunk
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule, number, switch

__all__ = ["NAdam"]


def nadam(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """NAdam: the gradient plus the momentum of the next step, divided by Adam's root."""
    exp_avg, exp_avg_sq = slots
    grad = penalized(param, descending(grad, c), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_sq = second_moment(exp_avg_sq, grad, c)
    change = c.gradient_step * grad + c.momentum_step * exp_avg
    param = shrunk(param, c) - change / (c.root_scale * xp.sqrt(exp_avg_sq) + c.eps)
    return param, (exp_avg, exp_avg_sq)


@vectorized
def share(momentum_decay: Any, step: Any) -> Any:
    """The momentum of a step as a share of ``beta1``; it grows from a half to one."""
    return 1.0 - 0.5 * 0.96 ** float(step * momentum_decay)


@vectorized
def product_of_shares(momentum_decay: Any, step: Any) -> Any:
    """The product of the shares of steps 1 to ``step``; 1 before the first."""
    products = _products(momentum_decay)
    return products[min(int(step), len(products) - 1)]


@lru_cache(maxsize=256)
def _products(momentum_decay: float) -> tuple[float, ...]:
    """The products of the first shares, up to the step from which they change no coefficient.

    From there on, either a share is one, or one minus the product is one. That step comes within
    2500 steps, whatever the decay.
    """
    factor, products = 0.0, [1.0]
    while factor < 1.0 and products[-1] > 2.0**-54:
        factor = share(momentum_decay, len(products))
        products.append(products[-1] * factor)
    return tuple(products)


@dataclass(frozen=True)
class NAdam(Rule):
    """NAdam: Adam with Nesterov's momentum, which warms up.

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (ICLR 2016 workshop), Algorithm 2,
    in torch's form: the average keeps ``beta1``, and only the step uses the momentum of the
    schedule, ``beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))``. Names and defaults are those of
    ``torch.optim.NAdam``.

    Args:
        lr: Learning rate, >= 0.
        betas: Decay rates of the averages of the gradient and of its square, each >= 0 and < 1.
        eps: Added to the root of the corrected second moment, >= 0.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        momentum_decay: How fast the momentum grows from a half of ``beta1`` to ``beta1``, >= 0.
        decoupled_weight_decay: Shrink the parameter as ``AdamW`` does instead of adding a penalty.
        maximize: Ascend instead of descending.

    ``lr``, ``eps``, ``weight_decay``, ``momentum_decay`` and either of ``betas`` may be schedules
    ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.NAdam(lr=0.5))
    >>> w = np.array([1.0, -1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([4.0, -0.01])})
    >>> w.round(4).tolist()
    [0.4718, -0.4718]
    """

    lr: Hyperparameter = number(2e-3, NONNEGATIVE)
    betas: tuple[Hyperparameter, Hyperparameter] = number((0.9, 0.999), FRACTION)
    eps: Hyperparameter = number(1e-8, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    momentum_decay: Hyperparameter = number(4e-3, NONNEGATIVE)
    decoupled_weight_decay: bool = switch()
    maximize: bool = switch()

    slots: ClassVar = ("exp_avg", "exp_avg_sq")
    update: ClassVar = staticmethod(nadam)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        beta1, beta2 = h.betas
        momentum = beta1 * share(h.momentum_decay, step)
        next_momentum = beta1 * share(h.momentum_decay, step + 1)
        product = power(beta1, step) * product_of_shares(h.momentum_decay, step)
        return dict(
            **moments(beta1, beta2),
            gradient_step=h.lr * (1.0 - momentum) / (1.0 - product),
            momentum_step=h.lr * next_momentum / (1.0 - product * next_momentum),
            root_scale=1.0 / np.sqrt(one_minus_power(beta2, step)),
            eps=h.eps,
            **descent(h, h.lr, h.decoupled_weight_decay),
        )
