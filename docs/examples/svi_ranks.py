"""SVI on several ranks: a hierarchical model whose groups appear in the data as it comes in.

    torchrun --nproc-per-node 2 docs/examples/svi_ranks.py

Each rank reads its own stream. Groups are born when their first row is read, which is earlier on
one rank than on the other, and plates are subsampled differently. Only three lines know of ranks;
they are marked.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

import multiopt.adapters.pyro as optim

#: What the groups have in common, and how many rows a rank reads in a step.
MEAN, ROWS = 3.0, 8


def rows_of(rank: int, step: int) -> dict[str, torch.Tensor]:
    """The rows that a rank reads in a step, by group; the later, the more groups there are."""
    draw = torch.Generator().manual_seed(1000 * rank + step)
    groups = torch.randint(0, 1 + min(step // 10, 3) + rank, (ROWS,), generator=draw)
    values = MEAN + groups + torch.randn(ROWS, generator=draw)
    return {f"group {k}": values[groups == k] for k in groups.unique().tolist()}


def model(rows: dict[str, torch.Tensor]) -> None:
    """Each group has a mean around a common one."""
    common = pyro.sample("common", dist.Normal(0.0, 10.0))
    for name, values in rows.items():
        mean = pyro.sample(name, dist.Normal(common, 2.0))
        with pyro.plate(f"rows of {name}", len(values)):
            pyro.sample(f"values of {name}", dist.Normal(mean, 1.0), obs=values)


def guide(rows: dict[str, torch.Tensor]) -> None:
    """A normal distribution for each latent variable that the rows touch."""
    for name in ("common", *rows):
        loc = pyro.param(f"{name} loc", torch.tensor(0.0))
        scale = pyro.param(f"{name} scale", torch.tensor(0.5), constraint=constraints.positive)
        pyro.sample(name, dist.Normal(loc, scale))


def main(steps: int = 100) -> dict[str, Any]:
    """Fit the model, and return the unconstrained parameters, which are equal on all ranks."""
    pyro.clear_param_store()
    rank = torch.distributed.get_rank()
    pyro.set_rng_seed(rank)  # (1) other samples on each rank
    optimizer = optim.Distributed(optim.Adam({"lr": 0.1}))  # (2) in place of the optimizer alone
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    for step in range(steps):
        svi.step(rows_of(rank, step))
    return {name: param.tolist() for name, param in sorted(optimizer.params.items())}


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")  # (3)
    for name, value in main().items():
        print(f"rank {torch.distributed.get_rank()}: {name} {value:.4f}")
    torch.distributed.destroy_process_group()
