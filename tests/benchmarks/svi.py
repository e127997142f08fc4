"""A whole ``SVI.step`` of Pyro, to see what the optimizer's share of it is. Needs ``pyro-ppl``."""

from collections.abc import Callable
from itertools import count
from typing import Any

from multiopt.bench.paired import Run, Side
from multiopt.bench.work import Work

__all__ = ["with_drop_in", "with_pyro"]

NEEDS = ("torch", "pyro")

#: So that no two guides share parameters of Pyro's store.
NUMBERS = count()


def with_drop_in(clip_args: dict[str, Any] | None = None) -> Side:
    """``SVI`` with ``multiopt.adapters.pyro``."""

    def begin(work: Work, threads: int) -> Run:
        import multiopt.adapters.pyro as optim

        return _run(work, optim.Adam, clip_args)

    return Side(f"SVI.step, drop-in{', clip_norm' if clip_args else ''}", begin, NEEDS)


def with_pyro(clip_args: dict[str, Any] | None = None) -> Side:
    """``SVI`` with ``pyro.optim``."""

    def begin(work: Work, threads: int) -> Run:
        import pyro.optim

        # Pyro wraps the classes of torch.optim when it is imported.
        return _run(work, vars(pyro.optim)["Adam"], clip_args)

    return Side(f"SVI.step, pyro.optim{', clip_norm' if clip_args else ''}", begin, NEEDS)


def _run(work: Work, optimizer_class: Callable[..., Any], clip_args: dict[str, Any] | None) -> Run:
    """Half as many normal latents as there are shapes: a guide gives each two parameters."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal

    data = [torch.tensor(x) for x in work.arrays()[0].values()][::2]

    def model() -> None:
        for i, y in enumerate(data):
            prior = dist.Normal(torch.zeros_like(y), 1.0).to_event(1)
            z = pyro.sample(f"z{i}", prior)
            pyro.sample(f"y{i}", dist.Normal(z, 1.0).to_event(1), obs=y)

    # A guide's class gives its parameters their prefix in the store.
    guide = type(f"Guide{next(NUMBERS)}", (AutoNormal,), {})(model)
    svi = SVI(model, guide, optimizer_class({"lr": 0.01}, clip_args), Trace_ELBO())
    steps = 0

    def step() -> None:
        nonlocal steps
        # Both sides draw the same noise.
        torch.manual_seed(steps)
        svi.step()
        steps += 1

    return Run(
        step, lambda: {name: leaf.detach().numpy() for name, leaf in guide.named_parameters()}
    )
