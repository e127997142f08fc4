"""What ``multiopt bench`` compares: Adam with torch's defaults, by multiopt and by each peer."""

# mypy: allow-untyped-calls
# Most of these libraries have no annotations.

from collections.abc import Callable
from functools import partial
from itertools import count, cycle
from typing import Any

import numpy as np

import multiopt as mo
from multiopt.bench.paired import Run, Side
from multiopt.bench.work import Arrays, Work

__all__ = [
    "ADAM",
    "JAX",
    "NUMPY",
    "OPTAX",
    "TEXTBOOK",
    "comparisons",
    "pyro_leaves",
    "tensors",
    "torch_values",
]

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8
ADAM = mo.Adam(lr=LR)

#: So that no two runs share tensors of Pyro's store.
NUMBERS = count()


def comparisons(quick: bool) -> list[tuple[Work, Side, Side]]:
    """Each work with our side and the peer, those of one work together.

    Args:
        quick: Whether to make fewer parameters, for a look or a test.
    """
    many, large = (100, "1e5") if quick else (1000, "1e6")
    few_small = Work("10 arrays of 10", ((10,),) * 10)
    many_small = Work(f"{many} arrays of 10", ((10,),) * many)
    one = Work(f"one array of {large}", ((int(float(large)),),))
    drawn = Work(f"a random {many // 10} of {many}", ((10,),) * many, many // 10)
    in_numpy, in_torch, fused = (NUMPY, TEXTBOOK), (TORCH, TORCH_OPTIM), (TORCH, TORCH_FUSED)
    in_jax, in_pyro = (JAX, OPTAX), (DROP_IN, PYRO)
    # As many as a terminal has lines for. Under jit, each set of names would be compiled.
    table = {
        few_small: (in_numpy, in_torch, fused, in_jax, in_pyro),
        many_small: (in_numpy, in_torch, fused, in_jax, in_pyro),
        one: (in_numpy, fused, in_jax),
        drawn: (in_numpy, in_torch, in_pyro),
    }
    return [(work, *pair) for work, pairs in table.items() for pair in pairs]


def _in_numpy(work: Work, threads: int) -> Run:
    params, grads = work.arrays()
    opt = mo.Optimizer(ADAM, threads=threads)
    turns = cycle(
        [({n: params[n] for n in names}, {n: grads[n] for n in names}) for names in work.turns()]
    )
    return Run(lambda: opt.step(*next(turns)), lambda: params)


def _textbook(work: Work, threads: int) -> Run:
    """As one writes it down: a loop over names, an array for each intermediate."""
    params, grads = work.arrays()
    first, second = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
    clock, turns = dict.fromkeys(params, 0), cycle(work.turns())

    def step() -> None:
        for name in next(turns):
            clock[name] = t = clock[name] + 1
            grad = grads[name]
            first[name] = BETA1 * first[name] + (1 - BETA1) * grad
            second[name] = BETA2 * second[name] + (1 - BETA2) * grad**2
            m_hat = first[name] / (1 - BETA1**t)
            v_hat = second[name] / (1 - BETA2**t)
            params[name] = params[name] - LR * m_hat / (np.sqrt(v_hat) + EPS)

    return Run(step, lambda: params)


def _in_torch(work: Work, threads: int) -> Run:
    """Gradients are read from ``.grad``."""
    leaves, opt = tensors(work), mo.Optimizer(ADAM, threads=threads)
    turns = cycle([{name: leaves[name] for name in names} for names in work.turns()])
    return Run(lambda: opt.step(next(turns)), partial(torch_values, leaves))


def _torch_optim(work: Work, threads: int, fused: bool | None = None) -> Run:
    import torch

    leaves = tensors(work)
    optimizer = torch.optim.Adam(leaves.values(), lr=LR, fused=fused)
    (group,) = optimizer.param_groups
    turns = cycle([[leaves[name] for name in names] for names in work.turns()])

    def step() -> None:
        # Cheaper for torch than 900 tensors whose gradient is None.
        group["params"] = next(turns)
        optimizer.step()

    return Run(step, partial(torch_values, leaves))


def _in_jax(work: Work, threads: int) -> Run:
    """JAX arrays cannot be written: new ones come back."""
    import jax

    params, grads = jax_arrays(work)
    opt = mo.Optimizer(ADAM, threads=threads)

    def step() -> None:
        nonlocal params
        params = jax.block_until_ready(opt.step(params, grads))

    return Run(step, lambda: {name: np.asarray(x) for name, x in params.items()})


def _optax(work: Work, threads: int) -> Run:
    """Under ``jax.jit``, which may use the memory of parameters and state again."""
    import jax
    import optax

    transform = optax.adam(LR, BETA1, BETA2, EPS)
    params, grads = jax_arrays(work)
    state = transform.init(params)

    def pure(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transform.update(grads, state)
        return optax.apply_updates(params, updates), state

    update = jax.jit(pure, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(update(params, state, grads))

    return Run(step, lambda: {name: np.asarray(x) for name, x in params.items()})


def _drop_in(work: Work, threads: int) -> Run:
    import multiopt.adapters.pyro as optim

    return _by_svi(work, optim.Adam)


def _pyro(work: Work, threads: int) -> Run:
    import pyro.optim

    # Pyro wraps the classes of torch.optim when it is imported.
    return _by_svi(work, vars(pyro.optim)["Adam"])


def _by_svi(work: Work, optimizer_class: Callable[..., Any]) -> Run:
    """Called with a set of tensors of Pyro's store, as ``SVI`` calls an optimizer."""
    leaves, optimizer = pyro_leaves(work), optimizer_class({"lr": LR})
    turns = cycle([{leaves[name] for name in names} for names in work.turns()])
    return Run(lambda: optimizer(next(turns)), partial(torch_values, leaves))


def tensors(work: Work) -> dict[str, Any]:
    """The work as leaf tensors that have a gradient, in memory of torch's own."""
    import torch

    params, grads = work.arrays()
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in params.items()}
    for name, leaf in leaves.items():
        leaf.grad = torch.tensor(grads[name])
    return leaves


def pyro_leaves(work: Work) -> dict[str, Any]:
    """The work as unconstrained parameters of Pyro's store, which have a gradient."""
    import pyro

    prefix, leaves = f"bench{next(NUMBERS)}", {}
    for name, given in tensors(work).items():
        param: Any = pyro.param(f"{prefix}.{name}", given.detach())
        leaves[name] = param.unconstrained()
        leaves[name].grad = given.grad
    return leaves


def torch_values(leaves: dict[str, Any]) -> Arrays:
    """Tensors as NumPy arrays."""
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}


def jax_arrays(work: Work) -> list[dict[str, Any]]:
    """The parameters and the gradients as arrays of JAX's own, which may be donated, on the CPU."""
    import jax

    (cpu, *_) = jax.devices("cpu")
    return [
        {name: jax.numpy.array(x, device=cpu) for name, x in arrays.items()}
        for arrays in work.arrays()
    ]


NUMPY, TEXTBOOK = Side("NumPy", _in_numpy), Side("textbook NumPy", _textbook)
TORCH = Side("torch", _in_torch, ("torch",))
TORCH_OPTIM = Side("torch.optim", _torch_optim, ("torch",))
TORCH_FUSED = Side("torch.optim fused", partial(_torch_optim, fused=True), ("torch",))
JAX = Side("JAX", _in_jax, ("jax",))
OPTAX = Side("optax, jit", _optax, ("jax", "optax"))
DROP_IN = Side("Pyro", _drop_in, ("torch", "pyro"))
PYRO = Side("pyro.optim", _pyro, ("torch", "pyro"))
