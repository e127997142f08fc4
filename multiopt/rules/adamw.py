"""AdamW: ``spec/rules/adamw.md``."""

from dataclasses import dataclass
from typing import Any, ClassVar

from multiopt.rules.adam import Adam, adam_scalars
from multiopt.rules.rule import NONNEGATIVE, Hyperparameter, number

__all__ = ["AdamW"]


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: the parameter shrinks, the gradient stays as it is.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019,
    arXiv:1711.05101), Algorithm 2, in torch's form: ``param *= 1 - lr * weight_decay``, then
    Adam's step. Names and defaults are those of ``torch.optim.AdamW``.

    Args:
        lr: Learning rate, >= 0.
        betas: How much of the two averages stays at a step, each >= 0 and < 1.
        eps: Added to the root of the corrected second moment, >= 0.
        weight_decay: Decay, >= 0: a step multiplies the parameter by ``1 - lr * weight_decay``.
        amsgrad: Divide by the largest second moment so far; ``"corrected"`` takes the largest after
            the correction of its bias.
        maximize: Ascend instead; the decay still shrinks.

    ``lr``, ``eps``, ``weight_decay`` and either of ``betas`` may be a schedule ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.AdamW(lr=0.5, weight_decay=0.25))
    >>> w = np.array([1.0, -1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([4.0, 0.0])})
    >>> w.round(4).tolist()
    [0.375, -0.875]
    """

    weight_decay: Hyperparameter = number(1e-2, NONNEGATIVE)

    #: No field: what it is in ``Adam`` is what makes it this rule.
    decoupled_weight_decay: ClassVar[bool] = True  # type: ignore[misc]

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """The numbers of a step."""
        return adam_scalars(h, step, decoupled=True)
