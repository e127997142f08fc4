"""AdamW: Adam whose weight decay shrinks the parameter and leaves the gradient alone.

The formulas are Adam's, with ``decoupled_weight_decay`` fixed. ``spec/rules/adamw.md`` gives them
in the order in which they are computed.
"""

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
        betas: Decay rates of the averages of the gradient and of its square, each >= 0 and < 1.
        eps: Added to the root of the corrected second moment, >= 0.
        weight_decay: Decay, >= 0: a step multiplies the parameter by ``1 - lr * weight_decay``.
        amsgrad: Divide by the largest second moment so far. ``True`` is torch's form, the maximum
            of the raw moments; ``"corrected"`` is the maximum of the bias-corrected moments.
        maximize: Ascend instead of descending; the decay still shrinks the parameter.

    ``lr``, ``eps``, ``weight_decay`` and either of ``betas`` may be schedules ``step -> number``.

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

    #: A constant here, not a field as in ``Adam``: decoupled weight decay is what defines AdamW.
    decoupled_weight_decay: ClassVar[bool] = True  # type: ignore[misc]

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        return adam_scalars(h, step, decoupled=True)
