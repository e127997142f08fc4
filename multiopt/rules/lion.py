"""Lion: only the sign of an average of the gradients decides where a step goes.

The rule needs one slot, half of Adam's memory. ``spec/rules/lion.md`` gives the formula in the
order in which it is computed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from multiopt.rules.adam import first_moment, moments
from multiopt.rules.arithmetic import sign
from multiopt.rules.decay import descending, penalized
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule, number, switch

__all__ = ["Lion"]


def lion(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Lion: Chen et al., Algorithm 2."""
    (exp_avg,) = slots
    grad = descending(grad, c)
    direction = sign(xp, first_moment(exp_avg, grad, c))
    param = param - c.lr * penalized(param, direction, c)
    return param, (c.beta2 * exp_avg + c.one_minus_beta2 * grad,)


@dataclass(frozen=True)
class Lion(Rule):
    """Lion: steps of one size, in the direction of the sign of a momentum.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (NeurIPS 2023,
    arXiv:2302.06675), Algorithm 2. Names are those of multiopt's ``Adam``; defaults are those of
    the paper and of its authors' code.

    Args:
        lr: Learning rate, >= 0: every element moves by it, whatever the size of its gradient.
        betas: Weight of the average in the direction of a step, and decay rate of the average,
            each >= 0 and < 1.
        weight_decay: Decoupled decay, >= 0: a step subtracts ``lr * weight_decay * param``.
        maximize: Ascend instead of descending; the decay still shrinks the parameter.

    ``lr``, ``weight_decay`` and either of ``betas`` may be schedules ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.Lion(lr=0.5))
    >>> w = np.array([1.0, 1.0, 1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([400.0, -0.01, 0.0])})
    >>> w.tolist()
    [0.5, 1.5, 1.0]
    """

    lr: Hyperparameter = number(1e-4, NONNEGATIVE)
    betas: tuple[Hyperparameter, Hyperparameter] = number((0.9, 0.99), FRACTION)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    maximize: bool = switch()

    slots: ClassVar = ("exp_avg",)
    update: ClassVar = staticmethod(lion)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        return dict(
            **moments(*h.betas),
            lr=h.lr,
            weight_decay=h.weight_decay,
            penalizes=h.weight_decay != 0,
            maximizes=h.maximize,
        )
