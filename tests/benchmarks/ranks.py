"""What several ranks take, on two of this machine.

``Replicas`` is measured against the least that data parallelism takes: one ``all_reduce`` of all
gradients in one vector, and a step. Norms and clips of parameters in parts are measured against
torch's. Ranks wait for each other, so all sides take as many calls a turn.
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

__all__ = ["REDUCTIONS", "clipped", "measured"]

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
    return _timed(sides, turns)


def clipped(work: Work, quick: bool) -> dict[str, tuple[float, float, float]]:
    """Measure norms and clipping of parameters in parts, on two ranks.

    Returns:
        What a clip adds to a step, and ``global_norm``: the seconds, those of torch's
        ``clip_grad_norm_``, and the median of the turns' ratios, all of the slower rank.
    """
    turns = 2 if quick else TURNS
    ranks = on_ranks(2, _clip_turns, work, turns)
    torch_clips, plain, clips, norms = (
        [max(rank[i][turn] for rank in ranks) for turn in range(turns)] for i in range(4)
    )
    adds = [a - b for a, b in zip(clips, plain, strict=True)]
    return {
        name: (
            median(ours),
            median(torch_clips),
            median(a / b for a, b in zip(ours, torch_clips, strict=True)),
        )
        for name, ours in (("a clip of a step", adds), ("global_norm", norms))
    }


def _clip_turns(work: Work, turns: int) -> list[list[float]]:
    """Seconds a call: ``clip_grad_norm_``, a step, a step with a clip, and ``global_norm``."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import multiopt as mo
    import multiopt.adapters.torch as optim
    from multiopt.distributed import global_norm

    mesh, named = init_device_mesh("cpu", (2,)), {}
    for name, grad in work.arrays()[1].items():
        whole = torch.from_numpy(grad)
        param = torch.nn.Parameter(distribute_tensor(torch.zeros_like(whole), mesh, [Shard(0)]))
        param.grad = distribute_tensor(whole, mesh, [Shard(0)])
        named[name] = param
    plain = optim.SGD(named.items(), lr=1e-9, threads=1)
    clip = optim.SGD(
        named.items(),
        lr=1e-9,
        threads=1,
        clip=mo.Clip(global_norm=1e-3),
        process_group="world",
    )
    grads = {name: param.grad for name, param in named.items()}
    sides: list[Callable[[], Any]] = [
        partial(torch.nn.utils.clip_grad_norm_, list(named.values()), 1e9),
        plain.step,
        clip.step,
        partial(global_norm, grads),
    ]
    return _timed(sides, turns)


def _timed(sides: "list[Callable[[], Any]]", turns: int) -> list[list[float]]:
    """Seconds a call, by side and turn; ranks begin together."""
    import torch.distributed as dist

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
