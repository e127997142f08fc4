"""The other sides: Adam with torch's default settings, by whoever is installed."""

# mypy: allow-untyped-calls
# Most of these libraries have no annotations.

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np

from multiopt.bench.paired import Run, Side
from multiopt.bench.work import Arrays, Work

__all__ = [
    "in_optax",
    "in_pyro",
    "in_sklearn",
    "in_torch",
    "pyro_run",
    "shared_tensors",
    "tensors",
    "textbook",
    "torch_values",
]

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8

#: So that no two runs share tensors of Pyro's store.
NUMBERS = count()


def textbook() -> Side:
    """Adam in NumPy as one writes it down: a loop over names, an array for each intermediate."""

    def begin(work: Work, threads: int) -> Run:
        params, grads = work.arrays()
        first, second = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
        t = 0

        def step() -> None:
            nonlocal t
            t += 1
            for name, grad in grads.items():
                first[name] = BETA1 * first[name] + (1 - BETA1) * grad
                second[name] = BETA2 * second[name] + (1 - BETA2) * grad**2
                m_hat = first[name] / (1 - BETA1**t)
                v_hat = second[name] / (1 - BETA2**t)
                params[name] = params[name] - LR * m_hat / (np.sqrt(v_hat) + EPS)

        return Run(step, lambda: params)

    return Side("textbook NumPy", begin)


def in_sklearn() -> Side:
    """The optimizer of scikit-learn's neural networks, which is private there."""

    def begin(work: Work, threads: int) -> Run:
        from sklearn.neural_network._stochastic_optimizers import AdamOptimizer

        params, grads = work.arrays()
        arrays, gradients = list(params.values()), list(grads.values())
        optimizer = AdamOptimizer(arrays, LR, BETA1, BETA2, EPS)
        return Run(lambda: optimizer.update_params(arrays, gradients), lambda: params)

    return Side("scikit-learn", begin, ("sklearn",))


def in_torch(how: str) -> Side:
    """``torch.optim.Adam``.

    Args:
        how: ``"fused"``, ``"foreach"``, or ``"loop"`` over the parameters.
    """

    def begin(work: Work, threads: int) -> Run:
        import torch

        params = tensors(work)
        optimizer = torch.optim.Adam(
            params.values(), lr=LR, foreach=how == "foreach", fused=how == "fused"
        )
        return Run(optimizer.step, lambda: torch_values(params))

    return Side(f"torch {how}", begin, ("torch",))


def in_pyro(clip_args: dict[str, Any] | None = None) -> Side:
    """``pyro.optim.Adam``, called with a set of tensors, as ``SVI`` calls it."""

    def begin(work: Work, threads: int) -> Run:
        import pyro.optim

        # Pyro wraps the classes of torch.optim when it is imported.
        return pyro_run(work, vars(pyro.optim)["Adam"], clip_args)

    return Side(f"pyro.optim{', clip_norm' if clip_args else ''}", begin, ("torch", "pyro"))


def in_optax() -> Side:
    """``optax.adam`` under ``jax.jit``; memory of the parameters and the state is used again."""

    def begin(work: Work, threads: int) -> Run:
        import jax
        import optax

        transform = optax.adam(LR, BETA1, BETA2, EPS)
        # Copied: what is donated must be JAX's own
        params, grads = (
            {name: jax.numpy.array(x) for name, x in arrays.items()} for arrays in work.arrays()
        )
        state = transform.init(params)

        def pure(params: Any, state: Any, grads: Any) -> Any:
            updates, state = transform.update(grads, state)
            return optax.apply_updates(params, updates), state

        update = jax.jit(pure, donate_argnums=(0, 1))

        def step() -> None:
            nonlocal params, state
            params, state = jax.block_until_ready(update(params, state, grads))

        return Run(step, lambda: {name: np.asarray(x) for name, x in params.items()})

    return Side("optax, jit", begin, ("jax", "optax"))


def tensors(work: Work) -> dict[str, Any]:
    """The work as leaf tensors that have a gradient, in memory of torch's own."""
    import torch

    def made() -> dict[str, Any]:
        params, grads = work.arrays()
        leaves = {name: torch.tensor(x, requires_grad=True) for name, x in params.items()}
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(grads[name])
        return leaves

    return _shared(("torch", work), made)


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


def torch_values(leaves: dict[str, Any]) -> Arrays:
    """Tensors as NumPy arrays."""
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}


def pyro_leaves(work: Work) -> dict[str, Any]:
    """The work as unconstrained parameters of Pyro's store, which have a gradient."""
    import pyro

    def made() -> dict[str, Any]:
        prefix = f"bench{next(NUMBERS)}"
        leaves = {}
        for name, given in tensors(work).items():
            param: Any = pyro.param(f"{prefix}.{name}", given.detach())
            leaves[name] = param.unconstrained()
            leaves[name].grad = given.grad
        return leaves

    return _shared(("pyro", work), made)


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
