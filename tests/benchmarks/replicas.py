"""``Replicas`` on two ranks of this machine, against the least that data parallelism takes.

That is one ``all_reduce`` of all gradients in one vector, and a step. Ranks wait for each other, so
both take as many calls a turn.
"""

from functools import partial
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from multiopt.bench.work import Work
from tests.ranks.processes import on_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["REDUCTIONS", "measured"]

REDUCTIONS: tuple[Literal["ordered", "fast"], ...] = ("ordered", "fast")

#: The number of turns, and of both sides' calls in each.
TURNS, CALLS = 15, 5


def measured(work: Work, quick: bool) -> dict[str, tuple[float, float, float]]:
    """Measure two ranks.

    Returns:
        For each reduction, the seconds of a step with ``Replicas``, those of an ``all_reduce`` and
        a step, and the median of the turns' ratios, all of the slower rank.
    """
    turns = 2 if quick else TURNS
    ranks = on_ranks(2, _turns, work, turns)
    found: dict[str, tuple[float, float, float]] = {}
    for k, reduction in enumerate(REDUCTIONS):
        theirs, ours = (
            [max(rank[i][turn] for rank in ranks) for turn in range(turns)] for i in (0, k + 1)
        )
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        found[reduction] = median(ours), median(theirs), median(ratios)
    return found


def _turns(work: Work, turns: int) -> list[list[float]]:
    """Seconds a call, by side and turn: an ``all_reduce`` and a step first, then ``Replicas``."""
    import torch
    import torch.distributed as dist

    import multiopt as mo
    from multiopt.distributed import Replicas

    params, grads = work.arrays()
    opt, flat = mo.Optimizer(mo.Adam()), torch.zeros(sum(x.size for x in grads.values()))

    def bare() -> None:
        dist.all_reduce(flat)
        opt.step(params, grads)

    sides: list[Callable[[], Any]] = [bare]
    for reduction in REDUCTIONS:
        step = Replicas(mo.Optimizer(mo.Adam()), reduction=reduction).step
        sides.append(partial(step, work.arrays()[0], grads))
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(turns + 1):
        for side, seconds in zip(sides, times, strict=True):
            np.empty(8192)
            dist.barrier()
            start = perf_counter()
            for _ in range(CALLS):
                side()
            if turn:
                seconds.append((perf_counter() - start) / CALLS)
    return times
