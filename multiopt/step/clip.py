"""Gradient clipping, by norm, by global norm and by value: ``spec/clipping.md``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from multiopt.arrays import Part
from multiopt.rules.arithmetic import Host, clip_coefficient, fold, rescaling, tree_sum
from multiopt.rules.declared import BOUND, Declared, Range, number

__all__ = ["Clip", "Together", "clip_by_global_norm"]

#: Sums that are added up one by one.
FEW = 64


@dataclass(frozen=True)
class Clip(Declared):
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

    norm: float | None = number(None, BOUND._replace(optional=True))
    global_norm: float | None = number(None, BOUND._replace(optional=True))
    value: float | None = number(None, BOUND._replace(optional=True))
    eps: float = number(1e-6, Range("a number >= 0"))


class Together(NamedTuple):
    """The clips of a list of names that measure several gradients together.

    Attributes:
        clips: They, with the numbers that the column ``clip`` has for them.
        ranks: For each name its place in the order of names, in which is summed.
        order: The places of the names in that order.
    """

    clips: dict[int, Clip]
    ranks: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], clips: dict[int, Clip]) -> "Together":
        """Those of some names."""
        order = np.array(sorted(range(len(names)), key=names.__getitem__))
        return cls(clips, np.argsort(order), order)


def clip_by_global_norm(
    parts: Sequence[Part], together: Together, threads: int | None
) -> dict[Clip, float]:
    """Measure the norms over all gradients of equal clips, which their own norms have scaled.

    It fills the column ``shared`` of the groups.

    Args:
        parts: Parts that have clips.
        together: The clips.
        threads: The largest number of threads, or None.

    Returns:
        The norms.
    """
    found: dict[Clip, float] = {}
    for code, clip in together.clips.items():
        pairs: list[tuple[Part, np.ndarray | slice]] = []
        for part in parts:
            which = _carriers(part, code)
            if isinstance(which, slice) or which.size:
                pairs.append((part, which))
        if not pairs:
            continue
        assert clip.global_norm is not None
        norm = _global_norm(pairs, together, threads)
        coefficient = clip_coefficient(Host, clip.global_norm, norm, clip.eps)
        for part, which in pairs:
            group = part.group
            group.shared[group.all_or(part.rows[which])] = group.dtype.type(coefficient)
        found[clip] = norm
    return found


def _carriers(part: Part, code: int) -> np.ndarray | slice:
    """The positions of rows with a clip; a slice for all."""
    column = part.group.clip
    clips = column[part.group.all_or(part.rows)]
    if clips.tobytes() == column.dtype.type(code).tobytes() * len(clips):
        return slice(len(clips))
    return np.flatnonzero(column[part.rows] == code)


def _global_norm(
    pairs: Sequence[tuple[Part, np.ndarray | slice]], together: Together, threads: int | None
) -> float:
    """The norm over the gradients at some positions of each part, summed in the order of names."""
    _, first = pairs[0]
    if isinstance(first, slice) and first.stop == len(together.order):
        order = together.order  # all names of the step
    else:
        places = np.concatenate([part.places[which] for part, which in pairs])
        order = np.argsort(together.ranks[places])

    def squares(factor: float) -> float:
        sums = [part.group.squares(part, which, factor, threads) for part, which in pairs]
        ordered = (np.concatenate(sums) if len(sums) > 1 else sums[0])[order]
        # NumPy takes 5 us for 16 numbers, and Python 50 for 1000.
        if len(ordered) <= FEW:
            return fold(ordered.tolist(), len(ordered))
        with np.errstate(over="ignore"):
            return float(tree_sum(np, ordered))

    total = squares(1.0)
    factor = rescaling(Host, total)
    norm: float = Host.sqrt(total if factor == 1 else squares(factor)) / factor
    return norm
