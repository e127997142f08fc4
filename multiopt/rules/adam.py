"""Adam and AMSGrad, and the two moments that many other rules share with Adam.

The first moment is an exponential average of the gradient, the second of its square. Both start at
zero, and the coefficients of a step correct that bias. ``spec/rules/adam.md`` gives the formulas in
the order in which they are computed.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from multiopt.rules.arithmetic import maximum, one_minus_power
from multiopt.rules.decay import descending, descent, penalized, shrunk
from multiopt.rules.rule import (
    FRACTION,
    NONNEGATIVE,
    Hyperparameter,
    Rule,
    Update,
    choice,
    number,
    switch,
)

__all__ = ["Adam", "adam_scalars", "descend", "first_moment", "moments", "second_moment"]


def adam(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Adam: Kingma & Ba, Algorithm 1."""
    exp_avg, exp_avg_sq = slots
    grad = penalized(param, descending(grad, c), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_sq = second_moment(exp_avg_sq, grad, c)
    return descend(xp, shrunk(param, c), exp_avg, exp_avg_sq, c), (exp_avg, exp_avg_sq)


def amsgrad(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """AMSGrad in torch's form: the maximum of the raw second moment, then its bias correction."""
    exp_avg, exp_avg_sq, largest = slots
    grad = penalized(param, descending(grad, c), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_sq = second_moment(exp_avg_sq, grad, c)
    largest = maximum(xp, largest, exp_avg_sq)
    return descend(xp, shrunk(param, c), exp_avg, largest, c), (exp_avg, exp_avg_sq, largest)


def amsgrad_corrected(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """AMSGrad with the maximum of the corrected second moment; the denominator never shrinks."""
    exp_avg, exp_avg_sq, largest = slots
    grad = penalized(param, descending(grad, c), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_sq = second_moment(exp_avg_sq, grad, c)
    largest = maximum(xp, largest, c.second_moment_scale * exp_avg_sq)
    param = shrunk(param, c) - c.step_size * exp_avg / (xp.sqrt(largest) + c.eps)
    return param, (exp_avg, exp_avg_sq, largest)


def moments(beta1: Any, beta2: Any) -> dict[str, Any]:
    """The coefficients of ``first_moment`` and ``second_moment``."""
    return dict(beta1=beta1, one_minus_beta1=1.0 - beta1, beta2=beta2, one_minus_beta2=1.0 - beta2)


def first_moment(exp_avg: Any, grad: Any, c: Any) -> Any:
    """The exponential average of the gradient."""
    return c.beta1 * exp_avg + c.one_minus_beta1 * grad


def second_moment(exp_avg_sq: Any, grad: Any, c: Any) -> Any:
    """The exponential average of the squared gradient.

    ``(1 - beta2) * grad`` is computed first, as in torch. For a ``beta2`` of 0.999, a float32
    gradient may then be as large as 5.8e20, instead of 1.8e19, before the product overflows.
    """
    return c.beta2 * exp_avg_sq + c.one_minus_beta2 * grad * grad


def descend(xp: Any, param: Any, exp_avg: Any, exp_avg_sq: Any, c: Any) -> Any:
    """Descend along the first moment, divided by the root of the second."""
    return param - c.step_size * exp_avg / (c.root_scale * xp.sqrt(exp_avg_sq) + c.eps)


def adam_scalars(h: Any, step: Any, decoupled: bool) -> dict[str, Any]:
    """Compute the coefficients of a step of Adam, AdamW or AdaBelief."""
    beta1, beta2 = h.betas
    correction2 = one_minus_power(beta2, step)
    return dict(
        **moments(beta1, beta2),
        step_size=h.lr / one_minus_power(beta1, step),
        root_scale=1.0 / np.sqrt(correction2),
        second_moment_scale=1.0 / correction2,
        eps=h.eps,
        **descent(h, h.lr, decoupled),
    )


@dataclass(frozen=True)
class Adam(Rule):
    """Adam: steps scaled by running averages of the gradient and of its square.

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (ICLR 2015,
    arXiv:1412.6980), Algorithm 1, with ``eps`` outside the root of the corrected second moment;
    AMSGrad: Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond" (ICLR 2018), Algorithm 2.
    Names and defaults are those of ``torch.optim.Adam``.

    Args:
        lr: Learning rate, >= 0.
        betas: Decay rates of the averages of the gradient and of its square, each >= 0 and < 1.
        eps: Added to the root of the corrected second moment, >= 0.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        amsgrad: Divide by the largest second moment so far. ``True`` is torch's form: the maximum
            of the raw moments is corrected for its bias afterwards, so the result can shrink.
            ``"corrected"`` is the maximum of the corrected moments, which cannot shrink.
        maximize: Ascend instead of descending.
        decoupled_weight_decay: Shrink the parameter as ``AdamW`` does instead of adding a penalty.

    ``lr``, ``eps``, ``weight_decay`` and either of ``betas`` may be schedules ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.Adam(lr=0.5))
    >>> w = np.array([1.0, -1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([4.0, -0.01])})
    >>> w.round(4).tolist()
    [0.5, -0.5]
    """

    lr: Hyperparameter = number(1e-3, NONNEGATIVE)
    betas: tuple[Hyperparameter, Hyperparameter] = number((0.9, 0.999), FRACTION)
    eps: Hyperparameter = number(1e-8, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    amsgrad: bool | Literal["corrected"] = choice(False, True, "corrected", default=False)
    maximize: bool = switch()
    decoupled_weight_decay: bool = switch()

    @property
    def slots(self) -> tuple[str, ...]:
        """``exp_avg``, ``exp_avg_sq`` and, for AMSGrad, the largest second moment.

        The name of the third slot says whether the moment is raw, as torch's ``max_exp_avg_sq``,
        or corrected, so that the two are never confused.
        """
        if self.amsgrad == "corrected":
            return ("exp_avg", "exp_avg_sq", "max_corrected_exp_avg_sq")
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    @property
    def update(self) -> Update:
        """The formula for the options of this rule."""
        if self.amsgrad == "corrected":
            return amsgrad_corrected
        return amsgrad if self.amsgrad else adam

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        return adam_scalars(h, step, h.decoupled_weight_decay)
