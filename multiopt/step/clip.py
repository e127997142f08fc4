"""Gradient clipping by norm, by global norm and by value: ``spec/clipping.md`` in code.

Norms are measured before a step writes anything. The factors that follow from them go into columns
of the groups, and engines apply them while they update.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from multiopt.arrays import Part
from multiopt.rules.arithmetic import Host, clip_coefficient
from multiopt.rules.declared import BOUND, Declared, Range, number

__all__ = ["Clip", "carriers", "clip_by_global_norm", "share_norm"]


@dataclass(frozen=True)
class Clip(Declared):
    """Bounds for gradients, applied in this order: norm, global norm, value.

    Norms are Euclidean. A gradient is multiplied by ``min(1, bound / (norm + eps))``; if that is
    1, not a bit of it changes. An infinite bound never clips.

    Args:
        norm: Bound on the norm of each gradient, >= 0, or None.
        global_norm: Bound on the norm over the gradients of all parameters of the step that have an
            equal ``Clip``, after they have been clipped by ``norm``, >= 0, or None.
        value: Bound on the magnitude of each element, >= 0, or None.
        eps: Added to a norm before the division, >= 0. The default is that of
            ``torch.nn.utils.clip_grad_norm_``. It makes clipped norms a little smaller than the
            bound, and much smaller than a bound under 1e-5. With ``eps=0`` a clipped norm equals
            the bound to one ulp.

    Raises:
        ValueError: A bound is negative, NaN, or not of a numeric type.

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


def clip_by_global_norm(
    parts: Sequence[Part], clips: Mapping[int, Clip], threads: int | None
) -> dict[Clip, float]:
    """Measure global norms of gradients that have been clipped by their own norms.

    The resulting factors are written into the column ``shared`` of the groups.

    Args:
        parts: The parts whose groups have clips.
        clips: The clips with a global norm by their numbers in the column ``clip``.
        threads: The largest number of threads, or None.

    Returns:
        The norm over the gradients of each clip that any of the parts has.
    """
    found: dict[Clip, float] = {}
    for code, clip in clips.items():
        pairs = carriers(parts, code)
        if pairs:
            total, *others = (part.group.squares(part, which, threads) for part, which in pairs)
            found[clip] = norm = sum(others, total).norm()
            share_norm(pairs, clip, norm)
    return found


def carriers(parts: Sequence[Part], code: int) -> list[tuple[Part, np.ndarray | slice]]:
    """The parts with rows that have a clip, and the positions of those; a slice if all have it."""
    pairs: list[tuple[Part, np.ndarray | slice]] = []
    for part in parts:
        column = part.group.clip
        clips = column[part.group.all_or(part.rows)]
        if clips.tobytes() == column.dtype.type(code).tobytes() * len(clips):
            which: np.ndarray | slice = slice(len(clips))
        else:
            which = np.flatnonzero(column[part.rows] == code)
        if isinstance(which, slice) or which.size:
            pairs.append((part, which))
    return pairs


def share_norm(pairs: Iterable[tuple[Part, np.ndarray | slice]], clip: Clip, norm: float) -> None:
    """Write the factor that follows from a global norm into the column ``shared`` of rows."""
    assert clip.global_norm is not None
    coefficient = clip_coefficient(Host, clip.global_norm, norm, clip.eps)
    for part, which in pairs:
        group = part.group
        group.shared[group.all_or(part.rows[which])] = group.dtype.type(coefficient)
