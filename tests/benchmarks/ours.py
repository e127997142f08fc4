"""Our side: a step of multiopt."""

from typing import Any

import multiopt as mo
from multiopt.bench.paired import Run, Side
from multiopt.bench.sides import ADAM, torch_values
from multiopt.bench.work import Work
from tests.benchmarks.peers import pyro_run, tensors

__all__ = ["distinct", "drop_in", "on_numpy", "on_torch"]


def on_numpy(name: str = "NumPy", clip: mo.Clip | None = None, rule: mo.Rule = ADAM) -> Side:
    """``Optimizer.step`` on NumPy arrays.

    Args:
        name: What the table calls it.
        clip: A clip for all names.
        rule: The rule.
    """

    def begin(work: Work, threads: int) -> Run:
        params, grads = work.arrays()
        opt = mo.Optimizer(rule, clip, threads=threads)
        return Run(lambda: opt.step(params, grads), lambda: params)

    return Side(name, begin)


def on_torch(name: str = "torch", clip: mo.Clip | None = None, rule: mo.Rule = ADAM) -> Side:
    """``Optimizer.step`` on torch tensors, the gradients read from ``.grad``."""

    def begin(work: Work, threads: int) -> Run:
        params = tensors(work)
        opt = mo.Optimizer(rule, clip, threads=threads)
        return Run(lambda: opt.step(params), lambda: torch_values(params))

    return Side(name, begin, ("torch",))


def distinct() -> Side:
    """``Optimizer.step`` on NumPy arrays; every name has a learning rate and a clock of its own."""

    def begin(work: Work, threads: int) -> Run:
        params, grads = work.arrays()
        rates = {name: 1e-3 + 1e-6 * i for i, name in enumerate(params)}
        opt = mo.Optimizer(lambda name: mo.Adam(lr=rates[name]), threads=threads)
        opt.step(params, grads)
        state = opt.state_dict()
        for clock, entry in enumerate(state["entries"].values(), 1):
            entry["step"] = clock
        opt.load_state_dict(state)
        return Run(lambda: opt.step(params, grads), lambda: params)

    return Side("NumPy, names distinct", begin)


def drop_in(clip_args: dict[str, Any] | None = None) -> Side:
    """``multiopt.adapters.pyro``, called with a set of tensors, as ``SVI`` calls it."""

    def begin(work: Work, threads: int) -> Run:
        import multiopt.adapters.pyro as optim

        return pyro_run(work, optim.Adam, clip_args)

    return Side(f"drop-in{', clip_norm' if clip_args else ''}", begin, ("torch", "pyro"))
