"""AdaBelief: ``spec/rules/adabelief.md``."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from multiopt.rules.adam import descend, first_moment, second_moment
from multiopt.rules.arithmetic import one_minus_power
from multiopt.rules.decay import descending, penalized, shrunk
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule, Update, check_tuple

__all__ = ["AdaBelief"]


class Scalars(NamedTuple):
    """The numbers of one step of AdaBelief."""

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    root_scale: float
    eps: float
    weight_decay: float
    penalizes: bool
    shrinkage: float
    shrinks: bool
    maximizes: bool


def adabelief(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Zhuang et al., Algorithm 2."""
    exp_avg, exp_avg_var = slots
    grad = penalized(param, descending(grad, c), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_var = second_moment(exp_avg_var, grad - exp_avg, c) + c.eps
    return descend(xp, shrunk(param, c), exp_avg, exp_avg_var, c), (exp_avg, exp_avg_var)


@dataclass(frozen=True)
class AdaBelief(Rule):
    """AdaBelief: Adam with the squared deviation from the average in place of the square.

    Source: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
    Gradients" (NeurIPS 2020, arXiv:2010.07468), Algorithm 2. As there, ``eps`` stands in two
    places: each step adds it to the average of the squares, and it stands beside the root.

    Args:
        lr: Learning rate, >= 0.
        betas: How much of the two averages stays at a step, each >= 0 and < 1.
        eps: Added to ``exp_avg_var`` at each step, and to the root of the corrected one, >= 0.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        decoupled_weight_decay: The decay shrinks the parameter as ``AdamW``'s, instead.
        maximize: Ascend instead.

    ``lr``, ``eps``, ``weight_decay`` and either of ``betas`` may be a schedule ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.AdaBelief(lr=0.45))
    >>> w = np.array([1.0, -1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([4.0, -0.01])})
    >>> w.round(4).tolist()
    [0.5, -0.5]
    """

    lr: Hyperparameter = 1e-3
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999)
    eps: Hyperparameter = 1e-16
    weight_decay: Hyperparameter = 0.0
    decoupled_weight_decay: bool = False
    maximize: bool = False

    ranges: ClassVar = {
        "lr": NONNEGATIVE,
        "betas": FRACTION,
        "eps": NONNEGATIVE,
        "weight_decay": NONNEGATIVE,
    }
    switches: ClassVar = ("decoupled_weight_decay", "maximize")

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_tuple(self, "betas", 2)
        super().__post_init__()

    @property
    def slots(self) -> tuple[str, ...]:
        """``exp_avg`` and ``exp_avg_var``."""
        return ("exp_avg", "exp_avg_var")

    @property
    def update(self) -> Update:
        """One step."""
        return adabelief

    @classmethod
    def scalars(cls, h: Any, step: Any) -> Scalars:
        """The numbers of a step."""
        beta1, beta2 = h.betas
        return Scalars(
            beta1=beta1,
            one_minus_beta1=1.0 - beta1,
            beta2=beta2,
            one_minus_beta2=1.0 - beta2,
            step_size=h.lr / one_minus_power(beta1, step),
            root_scale=1.0 / np.sqrt(one_minus_power(beta2, step)),
            eps=h.eps,
            weight_decay=h.weight_decay,
            penalizes=not h.decoupled_weight_decay and h.weight_decay != 0,
            shrinkage=1.0 - h.lr * h.weight_decay,
            shrinks=h.decoupled_weight_decay and h.weight_decay != 0,
            maximizes=h.maximize,
        )
