"""A model in parts, with FSDP2: ``torchrun --nproc-per-node 2 docs/examples/fsdp_ranks.py``.

Only the import of the optimizer differs from a script for ``torch.optim``. Gradients are clipped by
the norm over all ranks, and the checkpoint can be loaded on any number of ranks.
"""

import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import multiopt as mo
import multiopt.adapters.torch as optim
from multiopt.distributed import load_sharded, save_sharded


def made() -> tuple[torch.nn.Sequential, Any]:
    """A model whose layers lie on all ranks in parts, and its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 1))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = optim.AdamW(
        model.named_parameters(),
        lr=1e-2,
        clip=mo.Clip(global_norm=1.0),
        process_group="world",
    )
    return model, optimizer


def train(model: torch.nn.Module, optimizer: Any, steps: int) -> float:
    """Train on what this rank sees; return the last loss."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    inputs = torch.randn(64, 7, generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((model(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean()
        loss.backward()
        optimizer.step()
    return float(loss.item())


def main(directory: str) -> dict[str, Any]:
    """Train, save, and go on in a model that has loaded what was saved."""
    model, optimizer = made()
    first = train(model, optimizer, 20)
    save_sharded(directory, optimizer, metadata={"loss": first})
    resumed, its_optimizer = made()
    load_sharded(directory, its_optimizer)
    losses = [train(*one, 20) for one in ((model, optimizer), (resumed, its_optimizer))]
    norms = [list(one.last.global_norms.values()) for one in (optimizer, its_optimizer)]
    return {"first": first, "losses": losses, "norms": norms}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder = [sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    for key, value in main(folder[0]).items():
        print(f"rank {dist.get_rank()}: {key} {value}")
    dist.destroy_process_group()
