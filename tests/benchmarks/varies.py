"""Steps in which something varies: other names, other numbers, and all that is out of the ordinary.

The other side is the step in which nothing does, or the same by Pyro.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import count, cycle
from random import Random
from typing import Any

import numpy as np

import multiopt as mo
from multiopt.bench.paired import Run, Side
from multiopt.bench.sides import ADAM, LR, torch_values
from multiopt.bench.work import Work
from tests.benchmarks.peers import pyro_leaves, tensors

__all__ = [
    "VARIATIONS",
    "changed_rate",
    "drawn",
    "drawn_by",
    "in_turn",
    "moved_by",
    "one_new",
    "one_of_all",
    "varying",
]

#: What of an optimizer varies, by what the table calls it: the arguments of ``Optimizer``.
VARIATIONS: Mapping[str, dict[str, Any]] = {
    "a gradient missing": {},
    "an average": {"average": mo.Average()},
    "a schedule": {"rule": mo.Adam(lr=mo.schedules.Exponential(LR, gamma=0.999))},
    "on_nonfinite='skip'": {"on_nonfinite": "skip"},
    "two rules": {"rule": lambda name: ADAM if int(name[1:]) % 2 else mo.SGD(momentum=0.9)},
    "two dtypes": {},
    "a global norm": {"clip": mo.Clip(global_norm=10.0)},
    "one float16": {},
}

#: For which share of the names a step is.
SHARE = 10


def varying(what: str) -> Side:
    """``Optimizer.step`` on NumPy arrays with one of ``VARIATIONS``."""

    def begin(work: Work, threads: int) -> Run:
        params, grads = work.arrays()
        opt = mo.Optimizer(**{"rule": ADAM, "threads": threads, **VARIATIONS[what]})
        names = list(params)
        other = {"two dtypes": (names[::2], np.float64), "one float16": (names[-1:], np.float16)}
        some, dtype = other.get(what, ([], None))
        for arrays in (params, grads):
            arrays |= {name: arrays[name].astype(dtype) for name in some}
        opt.step(params, grads)
        if what == "a gradient missing":
            del grads[names[-1]]
        return Run(lambda: opt.step(params, grads), lambda: params)

    return Side(f"NumPy, {what}", begin)


def changed_rate() -> Side:
    """``set_hyperparameters`` before each step."""

    def begin(work: Work, threads: int) -> Run:
        params, grads = work.arrays()
        opt, steps = mo.Optimizer(ADAM, threads=threads), count()

        def step() -> None:
            opt.set_hyperparameters(lr=LR * 0.999 ** next(steps))
            opt.step(params, grads)

        return Run(step, lambda: params)

    return Side("NumPy, lr set before each step", begin)


def drawn(library: str) -> Side:
    """``Optimizer.step`` of a tenth of the names, another at every step."""

    def begin(work: Work, threads: int) -> Run:
        names, each = [f"p{i}" for i in range(len(work.shapes))], len(work.shapes) // SHARE
        rng = Random(0)
        return _selected(library, work, threads, iter(lambda: rng.sample(names, each), None))

    return Side(f"{library}, a tenth drawn", begin, ("torch",) if library == "torch" else ())


def in_turn(library: str) -> Side:
    """The same of four tenths that come again in turn. Drawing is paid for on both sides."""

    def begin(work: Work, threads: int) -> Run:
        names, each = [f"p{i}" for i in range(len(work.shapes))], len(work.shapes) // SHARE
        rng = Random(0)
        mixed = rng.sample(names, len(names))
        tenths = cycle([mixed[k * each : (k + 1) * each] for k in range(4)])

        def turns() -> Iterator[list[str]]:
            while True:
                rng.sample(names, each)
                yield next(tenths)

        return _selected(library, work, threads, turns())

    return Side(f"{library}, four tenths in turn", begin, ("torch",) if library == "torch" else ())


def _selected(library: str, work: Work, threads: int, chosen: Iterator[list[str]]) -> Run:
    opt = mo.Optimizer(ADAM, threads=threads)
    if library == "torch":
        leaves = tensors(work)
        opt.step(leaves)
        return Run(
            lambda: opt.step({name: leaves[name] for name in next(chosen)}),
            lambda: torch_values(leaves),
        )
    params, grads = work.arrays()
    opt.step(params, grads)

    def step() -> None:
        names = next(chosen)
        opt.step({name: params[name] for name in names}, {name: grads[name] for name in names})

    return Run(step, lambda: params)


def one_new() -> Side:
    """``Optimizer.step`` with one name at every step that has not been seen before."""

    def begin(work: Work, threads: int) -> Run:
        params, grads = work.arrays()
        opt, numbers = mo.Optimizer(ADAM, threads=threads), count()
        opt.step(params, grads)
        shape = work.shapes[0]

        def step() -> None:
            name = f"new {next(numbers)}"
            more, its = np.ones(shape, np.float32), np.ones(shape, np.float32)
            opt.step({**params, name: more}, {**grads, name: its})

        return Run(step, lambda: params)

    return Side("NumPy, one new name", begin)


def drawn_by(kind: str) -> Side:
    """The drop-in, or Pyro, called with a tenth of the tensors, another at every call."""
    return _called(
        kind, "a tenth drawn", lambda rng, leaves: rng.sample(leaves, len(leaves) // SHARE)
    )


def one_of_all(kind: str) -> Side:
    """The same, called with one tensor, another at every call."""
    return _called(kind, "one tensor", lambda rng, leaves: [rng.choice(leaves)])


def _called(kind: str, what: str, choose: Callable[[Random, list[Any]], list[Any]]) -> Side:
    def begin(work: Work, threads: int) -> Run:
        leaves = pyro_leaves(work)
        opt, rng, every = _optimizer(kind), Random(0), list(leaves.values())
        opt(every)
        return Run(lambda: opt(choose(rng, every)), lambda: torch_values(leaves))

    return Side(f"{kind}, {what}", begin, ("torch", "pyro"))


def moved_by(kind: str) -> Side:
    """The drop-in, or Pyro, with a scheduler of torch that is stepped after every call."""

    def begin(work: Work, threads: int) -> Run:
        leaves = pyro_leaves(work)
        opt, every = _optimizer(kind, gamma=0.999), list(leaves.values())

        def step() -> None:
            opt(every)
            opt.step()

        return Run(step, lambda: torch_values(leaves))

    return Side(f"{kind}, ExponentialLR", begin, ("torch", "pyro"))


def _optimizer(kind: str, gamma: float | None = None) -> Any:
    import pyro.optim
    import torch

    import multiopt.adapters.pyro

    module: Any = multiopt.adapters.pyro if kind == "drop-in" else pyro.optim
    if gamma is None:
        return module.Adam({"lr": LR})
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": LR}, "gamma": gamma}
    return module.ExponentialLR(adam)
