"""Pyro's DCTAdam, for time series: one Adam in time, and one in the frequencies of the gradient.

Both share their slots, which hold time and frequencies one after the other. The transform is a
discrete cosine transform (``cosine``). ``spec/rules/dct_adam.md`` gives the formula in the order in
which it is computed.
"""

from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, ClassVar

from array_api_compat import device

from multiopt.rules.adam import first_moment, moments, second_moment
from multiopt.rules.arithmetic import clamp
from multiopt.rules.clipped_adam import clipped_adam, decayed_step_size
from multiopt.rules.cosine import dct, idct, next_fast_len
from multiopt.rules.rule import (
    BOUND,
    FRACTION,
    NONNEGATIVE,
    Hyperparameter,
    Range,
    Rule,
    Update,
    number,
)

__all__ = ["DCTAdam"]


def dct_adam(dim: int, xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """ClippedAdam in time and in frequencies at once; the steps of both are added."""
    exp_avg, exp_avg_sq = slots
    time = xp.moveaxis(clamp(xp, grad, c.clip_norm), dim, -1)
    size = time.shape[-1]
    missing = (*time.shape[:-1], exp_avg.shape[dim] - size - size)
    padding = xp.zeros(missing, dtype=time.dtype, device=device(time))
    frequency = dct(xp, xp.concat([time, padding], axis=-1))
    grad = xp.moveaxis(xp.concat([time, frequency], axis=-1), -1, dim)
    exp_avg = first_moment(exp_avg, grad, c)
    exp_avg_sq = second_moment(exp_avg_sq, grad, c)
    steps = xp.moveaxis(c.step_size * exp_avg / (xp.sqrt(exp_avg_sq) + c.eps), dim, -1)
    step = steps[..., :size] + idct(xp, steps[..., size:])[..., :size]
    return param - xp.moveaxis(step, -1, dim), (exp_avg, exp_avg_sq)


@dataclass(frozen=True)
class DCTAdam(Rule):
    """Pyro's ClippedAdam for time series: a second Adam works on the frequencies of the gradient.

    Source: ``pyro.optim.dct_adam.DCTAdam`` (Pyro 1.9). Names and defaults are Pyro's. In Pyro an
    attribute of the parameter says which dimension is time; here ``dct_dim`` does. Pyro's
    ``subsample_aware`` is not supported.

    Args:
        lr: Learning rate before the first decay, >= 0.
        betas: Decay rates of the averages of the gradient and of its square, each >= 0 and < 1.
        eps: Added to the root of the uncorrected second moment, >= 0.
        clip_norm: Bound on the magnitude of each element of the gradient, >= 0; infinity for none.
            The name is Pyro's, although values are limited and not norms.
        lrd: Factor of the learning rate, >= 0: step ``t`` uses ``lr * lrd ** t``, so the first
            step uses ``lr * lrd``.
        dct_dim: The dimension of time, counted as NumPy counts axes. With None the rule is
            ClippedAdam without weight decay.

    ``lr``, ``eps``, ``clip_norm``, ``lrd`` and either of ``betas`` may be schedules
    ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.DCTAdam(lr=0.5, dct_dim=-1))
    >>> w = np.zeros((1, 4))
    >>> _ = opt.step({"w": w}, {"w": np.array([[4.0, 1.0, 2.0, -1.0]])})
    >>> w.round(4).tolist()
    [[-1.2119, -0.5587, -0.9413, 0.7119]]
    >>> opt.state("w").slots["exp_avg"].shape
    (1, 8)
    """

    lr: Hyperparameter = number(1e-3, NONNEGATIVE)
    betas: tuple[Hyperparameter, Hyperparameter] = number((0.9, 0.999), FRACTION)
    eps: Hyperparameter = number(1e-8, NONNEGATIVE)
    clip_norm: Hyperparameter = number(10.0, BOUND)
    lrd: Hyperparameter = number(1.0, NONNEGATIVE)
    dct_dim: int | None = number(
        None, Range("an integer or None", low=-inf, whole=True, optional=True)
    )

    slots: ClassVar = ("exp_avg", "exp_avg_sq")

    @property
    def elementwise(self) -> bool:  # type: ignore[override]  # an option decides, not the class
        """Whether each element is updated by itself, which is so without a transform."""
        return self.dct_dim is None

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The slots hold time and frequencies one after the other in the dimension of time.

        Raises:
            ValueError: The shape does not have the dimension ``dct_dim``.
        """
        dim = self.dct_dim
        if dim is None:
            return super().slot_shapes(shape)
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"DCTAdam: dct_dim={dim} is not a dimension of the shape {shape}")
        doubled = list(shape)
        doubled[dim] += next_fast_len(shape[dim])
        return dict.fromkeys(self.slots, tuple(doubled))

    @property
    def update(self) -> Update:
        """The formula for the options of this rule."""
        return clipped_adam if self.dct_dim is None else partial(dct_adam, self.dct_dim)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        return dict(
            **moments(*h.betas),
            clip_norm=h.clip_norm,
            step_size=decayed_step_size(h, step),
            root_scale=1.0,
            eps=h.eps,
            weight_decay=0.0,
            penalizes=False,
            centered=False,
        )
