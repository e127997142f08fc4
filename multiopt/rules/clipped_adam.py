"""Pyro's ClippedAdam: Adam on gradients that are clipped by value, with a decaying learning rate.

``spec/rules/clipped_adam.md`` gives the formula in the order in which it is computed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.adam import descend, first_moment, moments, second_moment
from multiopt.rules.arithmetic import clamp, one_minus_power, power
from multiopt.rules.decay import penalized
from multiopt.rules.rule import BOUND, FRACTION, NONNEGATIVE, Hyperparameter, Rule, number, switch

__all__ = ["ClippedAdam"]


def clipped_adam(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Adam on the gradient clipped element by element."""
    exp_avg, exp_avg_sq = slots
    grad = penalized(param, clamp(xp, grad, c.clip_norm), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_sq = second_moment(exp_avg_sq, grad - exp_avg if c.centered else grad, c)
    return descend(xp, param, exp_avg, exp_avg_sq, c), (exp_avg, exp_avg_sq)


def decayed_step_size(h: Any, step: Any) -> Any:
    """The decayed learning rate of a step, multiplied by both bias corrections."""
    beta1, beta2 = h.betas
    correction1 = one_minus_power(beta1, step)
    correction2 = one_minus_power(beta2, step)
    return h.lr * power(h.lrd, step) * np.sqrt(correction2) / correction1


@dataclass(frozen=True)
class ClippedAdam(Rule):
    """Pyro's Adam with clipping by value and a learning rate that decays at each step.

    Source: ``pyro.optim.clipped_adam.ClippedAdam`` (Pyro 1.9): Kingma & Ba (arXiv:1412.6980),
    section 2, the form that adds ``eps`` to the root of the uncorrected second moment. Names and
    defaults are Pyro's.

    Args:
        lr: Learning rate before the first decay, >= 0.
        betas: Decay rates of the averages of the gradient and of its square, each >= 0 and < 1.
        eps: Added to the root of the uncorrected second moment, >= 0.
        weight_decay: L2 penalty, >= 0, added to the clipped gradient.
        clip_norm: Bound on the magnitude of each element of the gradient, >= 0; infinity for none.
            The name is Pyro's, although values are limited and not norms.
        lrd: Factor of the learning rate, >= 0: step ``t`` uses ``lr * lrd ** t``, so the first
            step uses ``lr * lrd``.
        centered_variance: Average the squared deviation from ``exp_avg`` instead of the square of
            the gradient.

    ``lr``, ``eps``, ``weight_decay``, ``clip_norm``, ``lrd`` and either of ``betas`` may be
    schedules ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.ClippedAdam(lr=0.5, lrd=0.5))
    >>> w = np.array([1.0, -1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([400.0, -0.01])})
    >>> w.round(4).tolist()
    [0.75, -0.75]
    """

    lr: Hyperparameter = number(1e-3, NONNEGATIVE)
    betas: tuple[Hyperparameter, Hyperparameter] = number((0.9, 0.999), FRACTION)
    eps: Hyperparameter = number(1e-8, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    clip_norm: Hyperparameter = number(10.0, BOUND)
    lrd: Hyperparameter = number(1.0, NONNEGATIVE)
    centered_variance: bool = switch()

    slots: ClassVar = ("exp_avg", "exp_avg_sq")
    update: ClassVar = staticmethod(clipped_adam)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        return dict(
            **moments(*h.betas),
            clip_norm=h.clip_norm,
            step_size=decayed_step_size(h, step),
            root_scale=1.0,
            eps=h.eps,
            weight_decay=h.weight_decay,
            penalizes=h.weight_decay != 0,
            centered=h.centered_variance,
        )
