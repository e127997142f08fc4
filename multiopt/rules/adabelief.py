"""AdaBelief: Adam that divides by how much the gradient deviates from its average.

Where gradients agree with their average, steps are longer than Adam's. ``spec/rules/adabelief.md``
gives the formula in the order in which it is computed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from multiopt.rules.adam import adam_scalars, descend, first_moment, second_moment
from multiopt.rules.decay import descending, penalized, shrunk
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule, number, switch

__all__ = ["AdaBelief"]


def adabelief(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """AdaBelief: Zhuang et al., Algorithm 2."""
    exp_avg, exp_avg_var = slots
    grad = penalized(param, descending(grad, c), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_var = second_moment(exp_avg_var, grad - exp_avg, c) + c.eps
    return descend(xp, shrunk(param, c), exp_avg, exp_avg_var, c), (exp_avg, exp_avg_var)


@dataclass(frozen=True)
class AdaBelief(Rule):
    """AdaBelief: Adam with the squared deviation from the average in place of the square.

    Source: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
    Gradients" (NeurIPS 2020, arXiv:2010.07468), Algorithm 2. As there, ``eps`` is
    added in two places: at each step to the average of the squares, and to the root.

    Args:
        lr: Learning rate, >= 0.
        betas: Decay rates of the averages of the gradient and of its squared deviation, each >= 0
            and < 1.
        eps: Added to ``exp_avg_var`` at each step, and to its root after the bias correction, >= 0.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        decoupled_weight_decay: Shrink the parameter as ``AdamW`` does instead of adding a penalty.
        maximize: Ascend instead of descending.

    ``lr``, ``eps``, ``weight_decay`` and either of ``betas`` may be schedules ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.AdaBelief(lr=0.45))
    >>> w = np.array([1.0, -1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([4.0, -0.01])})
    >>> w.round(4).tolist()
    [0.5, -0.5]
    """

    lr: Hyperparameter = number(1e-3, NONNEGATIVE)
    betas: tuple[Hyperparameter, Hyperparameter] = number((0.9, 0.999), FRACTION)
    eps: Hyperparameter = number(1e-16, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    decoupled_weight_decay: bool = switch()
    maximize: bool = switch()

    slots: ClassVar = ("exp_avg", "exp_avg_var")
    update: ClassVar = staticmethod(adabelief)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        return adam_scalars(h, step, h.decoupled_weight_decay)
