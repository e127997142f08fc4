"""Adamax: ``spec/rules/adamax.md``."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from multiopt.rules.adam import first_moment
from multiopt.rules.arithmetic import maximum, one_minus_power
from multiopt.rules.decay import descending, penalized
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule, Update, check_tuple

__all__ = ["Adamax"]


class Scalars(NamedTuple):
    """The numbers of one step of Adamax."""

    beta1: float
    one_minus_beta1: float
    beta2: float
    step_size: float
    eps: float
    weight_decay: float
    penalizes: bool
    maximizes: bool


def adamax(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Kingma & Ba, Algorithm 2."""
    exp_avg, exp_inf = slots
    grad = penalized(param, descending(grad, c), c)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_inf = maximum(xp, c.beta2 * exp_inf, xp.abs(grad) + c.eps)
    return param - c.step_size * exp_avg / exp_inf, (exp_avg, exp_inf)


@dataclass(frozen=True)
class Adamax(Rule):
    """Adamax: Adam with a decaying maximum of the gradient's size in place of the second moment.

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (ICLR 2015,
    arXiv:1412.6980), Algorithm 2, with torch's ``eps``, which is added to the size of each
    gradient. Names and defaults are those of ``torch.optim.Adamax``.

    Args:
        lr: Learning rate, >= 0.
        betas: How much of the average and of the maximum stays at a step, each >= 0 and < 1.
        eps: Added to the size of the gradient, >= 0.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        maximize: Ascend instead.

    ``lr``, ``eps``, ``weight_decay`` and either of ``betas`` may be a schedule ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.Adamax(lr=0.5))
    >>> w = np.array([1.0, -1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([4.0, -0.01])})
    >>> w.round(4).tolist()
    [0.5, -0.5]
    """

    lr: Hyperparameter = 2e-3
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999)
    eps: Hyperparameter = 1e-8
    weight_decay: Hyperparameter = 0.0
    maximize: bool = False

    ranges: ClassVar = {
        "lr": NONNEGATIVE,
        "betas": FRACTION,
        "eps": NONNEGATIVE,
        "weight_decay": NONNEGATIVE,
    }
    switches: ClassVar = ("maximize",)

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_tuple(self, "betas", 2)
        super().__post_init__()

    @property
    def slots(self) -> tuple[str, ...]:
        """``exp_avg`` and ``exp_inf``."""
        return ("exp_avg", "exp_inf")

    @property
    def update(self) -> Update:
        """One step."""
        return adamax

    @classmethod
    def scalars(cls, h: Any, step: Any) -> Scalars:
        """The numbers of a step."""
        beta1, beta2 = h.betas
        return Scalars(
            beta1=beta1,
            one_minus_beta1=1.0 - beta1,
            beta2=beta2,
            step_size=h.lr / one_minus_power(beta1, step),
            eps=h.eps,
            weight_decay=h.weight_decay,
            penalizes=h.weight_decay != 0,
            maximizes=h.maximize,
        )
