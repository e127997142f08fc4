"""The other sides: Adam with torch's default settings, by whoever is installed, and Adafactor."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from multiopt.bench import sides
from multiopt.bench.paired import Run, Side
from multiopt.bench.sides import BETA1, BETA2, EPS, LR, torch_values
from multiopt.bench.work import Work

__all__ = [
    "in_pyro",
    "in_sklearn",
    "in_torch",
    "in_torch_adafactor",
    "pyro_leaves",
    "pyro_run",
    "shared_tensors",
    "tensors",
    "torch_threads",
]


def in_sklearn() -> Side:
    """The optimizer of scikit-learn's neural networks, which is private there."""

    def begin(work: Work, threads: int) -> Run:
        from sklearn.neural_network._stochastic_optimizers import AdamOptimizer

        params, grads = work.arrays()
        arrays, gradients = list(params.values()), list(grads.values())
        optimizer = AdamOptimizer(arrays, LR, BETA1, BETA2, EPS)
        return Run(lambda: optimizer.update_params(arrays, gradients), lambda: params)

    return Side("scikit-learn", begin, ("sklearn",))


def in_torch(how: str, global_norm: float | None = None) -> Side:
    """``torch.optim.Adam``.

    Args:
        how: ``"fused"``, ``"foreach"``, or ``"loop"`` over the parameters.
        global_norm: The bound that ``clip_grad_norm_`` is called with first. It writes the
            gradients, so the other side would find nothing left to clip: they are not shared.
    """

    def begin(work: Work, threads: int) -> Run:
        import torch

        params = tensors(work) if global_norm is None else sides.tensors(work)
        leaves = list(params.values())
        optimizer = torch.optim.Adam(leaves, lr=LR, foreach=how == "foreach", fused=how == "fused")

        def step() -> None:
            if global_norm is not None:
                torch.nn.utils.clip_grad_norm_(leaves, global_norm)
            optimizer.step()

        return Run(step, lambda: torch_values(params))

    return Side(f"torch {how}{'' if global_norm is None else ', clipped'}", begin, ("torch",))


def in_torch_adafactor() -> Side:
    """``torch.optim.Adafactor``, whose fastest way is ``foreach``."""

    def begin(work: Work, threads: int) -> Run:
        import torch

        params = tensors(work)
        optimizer = torch.optim.Adafactor(params.values(), foreach=True)
        return Run(optimizer.step, lambda: torch_values(params))

    return Side("torch Adafactor, foreach", begin, ("torch",))


def in_pyro(clip_args: dict[str, Any] | None = None) -> Side:
    """``pyro.optim.Adam``, called with a set of tensors, as ``SVI`` calls it."""

    def begin(work: Work, threads: int) -> Run:
        import pyro.optim

        # Pyro wraps the classes of torch.optim when it is imported.
        return pyro_run(work, vars(pyro.optim)["Adam"], clip_args)

    return Side(f"pyro.optim{', clip_norm' if clip_args else ''}", begin, ("torch", "pyro"))


def tensors(work: Work) -> dict[str, Any]:
    """The work as leaf tensors that have a gradient, those of the other side if they are shared."""
    return _shared(("torch", work), partial(sides.tensors, work))


#: What the sides of a comparison share while they are timed; None for nothing.
_sharing: dict[Any, dict[str, Any]] | None = None


@contextmanager
def shared_tensors() -> Iterator[None]:
    """Let all sides step the same tensors.

    A backward pass has just touched parameters and gradients when an optimizer is called. Here the
    other side's call has.
    """
    global _sharing
    _sharing = {}
    yield
    _sharing = None


def _shared(key: Any, made: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if _sharing is None:
        return made()
    if key not in _sharing:
        _sharing[key] = made()
    return _sharing[key]


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch's number of threads, if torch is there."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pyro_leaves(work: Work) -> dict[str, Any]:
    """The work as parameters of Pyro's store, those of the other side if they are shared."""
    return _shared(("pyro", work), partial(sides.pyro_leaves, work))


def pyro_run(
    work: Work, optimizer_class: Callable[..., Any], clip_args: dict[str, Any] | None
) -> Run:
    """A run of an optimizer of ``pyro.optim``, or of one that takes its place.

    Args:
        work: The parameters; they are put into Pyro's store.
        optimizer_class: Called with the settings of the optimizer and those of the clip.
        clip_args: The settings of the clip, or None.
    """
    leaves = pyro_leaves(work)
    optimizer = optimizer_class({"lr": LR}, clip_args)
    params = set(leaves.values())
    return Run(lambda: optimizer(params), lambda: torch_values(leaves))
