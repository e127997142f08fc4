"""Gradient clipping, by norm, by global norm and by value: ``spec/clipping.md``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, nan
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from multiopt.backend import Limits, Scaling
from multiopt.errors import brief
from multiopt.rules.arithmetic import GROW, SHRINK, clip_coefficient, rescaling, tree_sum

__all__ = ["Clip", "Clipping", "Norms"]

#: ``sums(where, own, factor)``: for each of the positions ``where`` the sum of squares of its
#: gradient, times ``own`` (by position, over all) in the compute dtype, then times ``factor``.
Sums: TypeAlias = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


@dataclass(frozen=True)
class Clip:
    """Bounds for gradients, applied in this order: norm, global norm, value.

    A norm is the Euclidean one. A gradient is multiplied by ``min(1, bound / (norm + eps))``; where
    that is 1, not a bit changes. An infinite bound never clips.

    Args:
        norm: Bound of the norm of each parameter's gradient, >= 0, or None.
        global_norm: Bound of the norm over the gradients, already clipped by ``norm``, of all
            parameters of the step that carry an equal ``Clip``, >= 0, or None.
        value: Bound of each element's magnitude, >= 0, or None.
        eps: Added to a norm before it divides, >= 0. The default is that of
            ``torch.nn.utils.clip_grad_norm_``, which stays a little below the bound (and far
            below one under 1e-5); ``eps=0`` meets the bound itself, to one ulp.

    Raises:
        ValueError: A bound is negative, NaN or no number.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.SGD(lr=1.0), clip=mo.Clip(norm=1.0, eps=0.0))
    >>> w = np.zeros(2)
    >>> _ = opt.step({"w": w}, {"w": np.array([-3.0, -4.0])})
    >>> w.round(6).tolist(), opt.last.norms
    ([0.6, 0.8], {'w': 5.0})
    """

    norm: float | None = None
    global_norm: float | None = None
    value: float | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check the bounds and store them as floats."""
        for name in ("norm", "global_norm", "value", "eps"):
            value = getattr(self, name)
            if value is None and name != "eps":
                continue
            real = isinstance(value, Real) and not isinstance(value, bool)
            number = float(value) if real else nan
            if not number >= 0 or (name == "eps" and number == inf):
                raise ValueError(f"Clip: {name} must be a number >= 0; got {brief(value)}")
            object.__setattr__(self, name, number)


class Clipping:
    """The clips of the parameters of a plan, by position, ready to be measured at every step.

    Args:
        names: The parameters.
        clips: The clip of each.
        dtypes: The compute dtype of each.
    """

    def __init__(
        self, names: Sequence[str], clips: Sequence[Clip | None], dtypes: Sequence[str]
    ) -> None:
        """Sort the clips by what they bound."""
        self._narrow = np.array([dtype == "float32" for dtype in dtypes])
        self.carried = np.array([clip is not None for clip in clips])
        values = [inf if clip is None or clip.value is None else clip.value for clip in clips]
        self._bounds = self._rounded(np.array(values), np.arange(len(values)))
        normed = [
            (i, clip.norm, clip.eps)
            for i, clip in enumerate(clips)
            if clip is not None and clip.norm is not None
        ]
        self._normed = np.array([i for i, _, _ in normed], np.int64)
        self._norm_bounds = np.array([bound for _, bound, _ in normed])
        self._norm_eps = np.array([eps for _, _, eps in normed])
        sharing: dict[Clip, list[int]] = {}
        for i in sorted(range(len(names)), key=names.__getitem__):
            clip = clips[i]
            if clip is not None and clip.global_norm is not None:
                sharing.setdefault(clip, []).append(i)
        self._sharing = [(clip, np.array(where, np.int64)) for clip, where in sharing.items()]
        count = len(names)
        bounds, eps_of = np.full(count, nan), np.zeros(count)
        bounds[self._normed], eps_of[self._normed] = self._norm_bounds, self._norm_eps
        ones = np.ones(count)
        #: The same for an engine that measures by itself; None if names share a norm.
        self.limits = (
            None
            if sharing
            else Limits(bounds, eps_of, np.zeros(count), Scaling(ones.copy(), ones, self._bounds))
        )

    def norms(self) -> "Norms":
        """What an engine measured."""
        assert self.limits is not None
        return Norms(self._normed, self.limits.norms[self._normed], {})

    def scaling(self, active: np.ndarray, sums: Sums) -> "tuple[Scaling, Norms]":
        """Measure the gradients of a step.

        Args:
            active: By position, whether the parameter takes part.
            sums: Sums of squares of gradients.
        """
        ones = np.ones(len(self._bounds))
        own, shared = ones.copy(), ones.copy()
        some = active[self._normed]
        where, bounds, eps = self._normed[some], self._norm_bounds[some], self._norm_eps[some]
        norms = _norms(len(where), lambda which, factor: sums(where[which], ones, factor))
        own[where] = self._rounded(clip_coefficient(np, bounds, norms, eps), where)

        groups = [(clip, at[active[at]]) for clip, at in self._sharing]
        groups = [(clip, at) for clip, at in groups if at.size]

        def folded(which: np.ndarray, factor: float) -> np.ndarray:
            return np.array([tree_sum(np, sums(groups[i][1], own, factor)) for i in which])

        shared_norms = _norms(len(groups), folded)
        for (clip, at), norm in zip(groups, shared_norms, strict=True):
            assert clip.global_norm is not None
            found = clip_coefficient(np, clip.global_norm, norm, clip.eps)
            shared[at] = self._rounded(found, at)
        by_clip = dict(zip([clip for clip, _ in groups], shared_norms.tolist(), strict=True))
        return Scaling(own, shared, self._bounds), Norms(where, norms, by_clip)

    def _rounded(self, numbers: Any, where: np.ndarray) -> np.ndarray:
        """Numbers rounded to the compute dtypes of their positions, as float64."""
        narrow = np.asarray(numbers, np.float32).astype(np.float64)
        rounded: np.ndarray = np.where(self._narrow[where], narrow, numbers)
        return rounded


class Norms(NamedTuple):
    """The norms that a step measured, each before its clipping.

    Attributes:
        where: Positions of the parameters with ``Clip(norm=...)``.
        own: Their norms.
        shared: The global norms.
    """

    where: np.ndarray
    own: np.ndarray
    shared: dict[Clip, float]


def _norms(count: int, sums: Callable[[np.ndarray, float], np.ndarray]) -> np.ndarray:
    """Norms that neither overflow nor underflow.

    A sum of squares near the ends of float64's range is taken again of scaled gradients.

    Args:
        count: How many norms.
        sums: For some of them the sums of squares of the gradients times a factor.
    """
    if not count:
        return np.empty(0)
    totals = sums(np.arange(count), 1.0)
    norms: np.ndarray = np.sqrt(totals)
    factors = rescaling(np, totals)
    for factor in (SHRINK, GROW):
        which = np.flatnonzero(factors == factor)
        if which.size:
            norms[which] = np.sqrt(sums(which, factor)) / factor
    return norms
