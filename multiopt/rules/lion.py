"""Lion: ``spec/rules/lion.md``."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from multiopt.rules.adam import first_moment
from multiopt.rules.arithmetic import sign
from multiopt.rules.decay import descending, penalized
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule, Update, check_tuple

__all__ = ["Lion"]


class Scalars(NamedTuple):
    """The numbers of one step of Lion."""

    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    weight_decay: float
    penalizes: bool
    maximizes: bool


def lion(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Chen et al., Algorithm 2."""
    (exp_avg,) = slots
    grad = descending(grad, c)
    direction = sign(xp, first_moment(exp_avg, grad, c))
    param = param - c.lr * penalized(param, direction, c)
    return param, (c.beta2 * exp_avg + c.one_minus_beta2 * grad,)


@dataclass(frozen=True)
class Lion(Rule):
    """Lion: steps of one size, in the direction of the sign of a momentum.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (NeurIPS 2023,
    arXiv:2302.06675), Algorithm 2. Names are those of ``Adam`` here, defaults those of the paper
    and of its authors' code.

    Args:
        lr: Learning rate, >= 0: every element moves by it, whatever its gradient's size.
        betas: How much of the average is in the direction of a step, and how much of it stays,
            each >= 0 and < 1.
        weight_decay: Decoupled decay, >= 0: a step subtracts ``lr * weight_decay * param``.
        maximize: Ascend instead; the decay still shrinks.

    ``lr``, ``weight_decay`` and either of ``betas`` may be a schedule ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.Lion(lr=0.5))
    >>> w = np.array([1.0, 1.0, 1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([400.0, -0.01, 0.0])})
    >>> w.tolist()
    [0.5, 1.5, 1.0]
    """

    lr: Hyperparameter = 1e-4
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.99)
    weight_decay: Hyperparameter = 0.0
    maximize: bool = False

    ranges: ClassVar = {"lr": NONNEGATIVE, "betas": FRACTION, "weight_decay": NONNEGATIVE}
    switches: ClassVar = ("maximize",)

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_tuple(self, "betas", 2)
        super().__post_init__()

    @property
    def slots(self) -> tuple[str, ...]:
        """``exp_avg``."""
        return ("exp_avg",)

    @property
    def update(self) -> Update:
        """One step."""
        return lion

    @classmethod
    def scalars(cls, h: Any, step: Any) -> Scalars:
        """The numbers of a step."""
        beta1, beta2 = h.betas
        return Scalars(
            lr=h.lr,
            beta1=beta1,
            one_minus_beta1=1.0 - beta1,
            beta2=beta2,
            one_minus_beta2=1.0 - beta2,
            weight_decay=h.weight_decay,
            penalizes=h.weight_decay != 0,
            maximizes=h.maximize,
        )
