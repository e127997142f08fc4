"""Adam, with AMSGrad: ``spec/rules/adam.md``."""

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
    """Kingma & Ba, Algorithm 1."""
    exp_avg, exp_avg_sq = slots
    grad = penalized(param, descending(grad, c), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_sq = second_moment(exp_avg_sq, grad, c)
    return descend(xp, shrunk(param, c), exp_avg, exp_avg_sq, c), (exp_avg, exp_avg_sq)


def amsgrad(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """AMSGrad as torch has it: the largest raw second moment, its bias corrected afterwards."""
    exp_avg, exp_avg_sq, largest = slots
    grad = penalized(param, descending(grad, c), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_sq = second_moment(exp_avg_sq, grad, c)
    largest = maximum(xp, largest, exp_avg_sq)
    return descend(xp, shrunk(param, c), exp_avg, largest, c), (exp_avg, exp_avg_sq, largest)


def amsgrad_corrected(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """AMSGrad of the corrected second moment, so that the denominator never shrinks."""
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

    ``(1 - beta2) * grad`` comes first, as in torch: float32 then holds up to 5.8e20 instead of
    1.8e19 before the square is infinite.
    """
    return c.beta2 * exp_avg_sq + c.one_minus_beta2 * grad * grad


def descend(xp: Any, param: Any, exp_avg: Any, exp_avg_sq: Any, c: Any) -> Any:
    """Descend along the first moment over the root of the second."""
    return param - c.step_size * exp_avg / (c.root_scale * xp.sqrt(exp_avg_sq) + c.eps)


def adam_scalars(h: Any, step: Any, decoupled: bool) -> dict[str, Any]:
    """The numbers of a step of Adam, AdamW or AdaBelief."""
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
        betas: How much of the two averages stays at a step, each >= 0 and < 1.
        eps: Added to the root of the corrected second moment, >= 0.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        amsgrad: Divide by the largest second moment so far. ``True`` is torch's: the largest raw
            moment, its bias corrected afterwards, which can shrink. ``"corrected"`` is the largest
            corrected moment, which cannot.
        maximize: Ascend instead.
        decoupled_weight_decay: The decay shrinks the parameter, instead: ``AdamW``.

    ``lr``, ``eps``, ``weight_decay`` and either of ``betas`` may be a schedule ``step -> number``.

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

        Its name says whether it is raw, as torch's ``max_exp_avg_sq``, or corrected, so that the
        one is never taken for the other.
        """
        if self.amsgrad == "corrected":
            return ("exp_avg", "exp_avg_sq", "max_corrected_exp_avg_sq")
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    @property
    def update(self) -> Update:
        """One step."""
        if self.amsgrad == "corrected":
            return amsgrad_corrected
        return amsgrad if self.amsgrad else adam

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """The numbers of a step."""
        return adam_scalars(h, step, h.decoupled_weight_decay)
