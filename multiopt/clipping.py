"""Gradient clipping, by norm, by global norm and by value: ``spec/clipping.md``."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan, sqrt
from numbers import Real
from typing import NamedTuple

import numpy as np

from multiopt.backend import Task, by_backend
from multiopt.rules.arithmetic import rounded, tree_sum

__all__ = ["Clip", "clip_by_norms"]


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
                raise ValueError(f"Clip: {name} must be a number >= 0; got {value!r}")
            object.__setattr__(self, name, number)

    def coefficient(self, bound: float, norm: float) -> float:
        """The factor, in float64, that brings a norm down to a bound: 1 if it is below.

        NaN for a NaN norm; 0 for an infinite one; 1 for an infinite bound, whatever the norm.

        >>> Clip(norm=1.0, eps=0.0).coefficient(1.0, 4.0)
        0.25
        """
        if bound == inf:
            return 1.0
        reach = norm + self.eps
        ratio = bound / reach if reach else inf
        return 1.0 if ratio >= 1 else ratio


def clip_by_norms(
    tasks: Sequence[Task], clips: Sequence[Clip | None]
) -> tuple[dict[str, float], dict[Clip, float]]:
    """Append to the tasks the coefficients of their norms and of their global norms.

    Args:
        tasks: The tasks of a step.
        clips: The clip of each task.

    Returns:
        The norms by name, and the global norms by clip, each as it was before its clipping.
    """
    own = [
        _Group(clip, clip.norm, [task])
        for task, clip in zip(tasks, clips, strict=True)
        if clip is not None and clip.norm is not None
    ]
    norms = {group.tasks[0].name: norm for group, norm in _scale(own)}

    shared: dict[Clip, _Group] = {}
    for task, clip in sorted(zip(tasks, clips, strict=True), key=lambda pair: pair[0].name):
        if clip is not None and clip.global_norm is not None:
            shared.setdefault(clip, _Group(clip, clip.global_norm, [])).tasks.append(task)
    global_norms = {group.clip: norm for group, norm in _scale(list(shared.values()))}
    return norms, global_norms


class _Group(NamedTuple):
    """Tasks whose gradients have one norm together, in the order of their names."""

    clip: Clip
    bound: float
    tasks: list[Task]


def _scale(groups: list[_Group]) -> list[tuple[_Group, float]]:
    """Append the coefficient of its group to each task; return the groups with their norms."""
    measured = list(zip(groups, _norms(groups), strict=True))
    for group, norm in measured:
        coefficient = group.clip.coefficient(group.bound, norm)
        for task in group.tasks:
            task.scales.append(rounded(coefficient, task.layout.compute_dtype))
    return measured


def _norms(groups: list[_Group]) -> list[float]:
    """Norms that neither overflow nor underflow.

    A sum of squares near the ends of float64's range is taken again of scaled gradients.
    """
    sums = _sums_of_squares(groups, 1.0)
    norms = [sqrt(total) for total in sums]
    large = [i for i, total in enumerate(sums) if not total < 2.0**1000]
    small = [i for i, total in enumerate(sums) if total < 2.0**-900]
    for chosen, factor in ((large, 2.0**-600), (small, 2.0**600)):
        again = _sums_of_squares([groups[i] for i in chosen], factor)
        for i, total in zip(chosen, again, strict=True):
            norms[i] = sqrt(total) / factor
    return norms


def _sums_of_squares(groups: list[_Group], factor: float) -> list[float]:
    """For each group the sum of squares of ``factor`` times its gradients."""
    sums: dict[str, float] = {}
    for backend, tasks in by_backend(task for group in groups for task in group.tasks):
        names = [task.name for task in tasks]
        sums.update(zip(names, backend.sums_of_squares(tasks, factor), strict=True))
    return [
        float(tree_sum(np, np.asarray([sums[task.name] for task in group.tasks])))
        for group in groups
    ]
