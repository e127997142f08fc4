"""The optimizers of torch.optim on several ranks: the same bits as one process."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import multiopt.adapters.torch as optim
from tests.ranks.models import digest, model, train, train_averaged
from tests.ranks.processes import on_ranks


def _ddp() -> Any:
    module = model()
    optimizer = optim.AdamW(module.named_parameters(), lr=1e-2)
    train(DistributedDataParallel(module), optimizer, dist.get_rank())
    return digest(module, optimizer)


def _sharded(mesh_shape: tuple[int, ...], same: bool) -> Any:
    module, optimizer = _made(mesh_shape)
    train(module, optimizer, 0 if same else dist.get_rank())
    return digest(module, optimizer)


def _made(mesh_shape: tuple[int, ...]) -> tuple[torch.nn.Module, optim.AdamW]:
    module = model()
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for layer in module:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module, optim.AdamW(module.named_parameters(), lr=1e-2)


@cache
def _one_process(*ranks: int) -> Any:
    module = model()
    optimizer = optim.AdamW(module.named_parameters(), lr=1e-2)
    train_averaged(module, optimizer, ranks)
    return digest(module, optimizer)


def test_ddp() -> None:
    assert on_ranks(2, _ddp) == [_one_process(0, 1)] * 2


@pytest.mark.parametrize(
    ("shape", "same"),
    [((2,), False), ((4,), True), ((2, 2), True)],
    ids=["fsdp 2", "fsdp 4", "hsdp"],
)
def test_fsdp(shape: tuple[int, ...], same: bool) -> None:
    # With more ranks gloo adds gradients in an order of its own, so there they are all the same.
    ranks = torch.Size(shape).numel()
    expected = _one_process(*([0] * ranks if same else range(ranks)))
    assert on_ranks(ranks, _sharded, shape, same) == [expected] * ranks


def _zero(folder: str) -> Any:
    """ZeRO, stopped in the middle and resumed by another optimizer."""
    # Importing this warns, in torch.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def made() -> tuple[torch.nn.Module, Any]:
        module = model()
        names = list(module.named_parameters())
        optimizer = ZeroRedundancyOptimizer(module.parameters(), optim.AdamW, lr=1e-2, names=names)
        return module, optimizer

    module, optimizer = made()
    train(DistributedDataParallel(module), optimizer, dist.get_rank(), steps=2)
    optimizer.consolidate_state_dict(to=0)
    state = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(state, 0)
    other, resumed = made()
    other.load_state_dict(module.state_dict())
    resumed.load_state_dict(state[0])
    train(DistributedDataParallel(other), resumed, dist.get_rank(), steps=4)
    clocks = {name: resumed.optim._core.state(name).step for name in resumed.optim._core}
    return [param.detach().tolist() for param in other.parameters()], clocks


def test_zero(tmp_path: Path) -> None:
    module = model()
    train_averaged(module, optim.AdamW(module.named_parameters(), lr=1e-2), (0, 1))
    expected = [param.detach().tolist() for param in module.parameters()]
    (first, clocks), (second, others) = on_ranks(2, _zero, str(tmp_path))
    assert first == second == expected
    assert clocks
    assert others
    assert {**clocks, **others} == {name: 6 for name, _ in module.named_parameters()}


def _post_local() -> Any:
    from torch.distributed.optim import PostLocalSGDOptimizer

    module = model()
    averager = PeriodicModelAverager(period=3, warmup_steps=0)
    inner = optim.AdamW(module.named_parameters(), lr=1e-2)
    train(module, PostLocalSGDOptimizer(inner, averager), dist.get_rank(), steps=4)
    return [param.detach().tolist() for param in module.parameters()]


def test_post_local_sgd() -> None:
    first, second = on_ranks(2, _post_local)
    assert first == second


def _checkpointed(jobs: list[tuple[str | None, int, str | None]]) -> list[Any]:
    """Load, take some steps and save, as often as asked for."""
    digests = []
    for source, steps, target in jobs:
        module, optimizer = _made((dist.get_world_size(),))
        if source is not None:
            weights, states = get_state_dict(module, optimizer)
            # Nothing was stepped to have state that can be loaded.
            assert optimizer._core.steps == 0
            assert {optimizer._core.state(name).step for name in optimizer._core} == {0}
            load_distributed({"model": weights, "optimizer": states}, checkpoint_id=source)
            set_state_dict(module, optimizer, model_state_dict=weights, optim_state_dict=states)
        train(module, optimizer, 0, steps)
        digests.append(digest(module, optimizer))
        if target is not None:
            weights, states = get_state_dict(module, optimizer)
            save_distributed({"model": weights, "optimizer": states}, checkpoint_id=target)
    return digests


def test_a_checkpoint_of_torch_is_loaded_by_other_ranks(tmp_path: Path) -> None:
    """From 2 ranks to 1, to 4, and back to 2; the first one before any step."""
    files = [str(tmp_path / f"{number}") for number in range(4)]
    on_ranks(2, _checkpointed, [(None, 0, files[0]), (files[0], 1, files[1])])
    on_ranks(1, _checkpointed, [(files[1], 2, files[2])])
    on_ranks(4, _checkpointed, [(files[2], 1, files[3])])
    resumed = on_ranks(2, _checkpointed, [(files[3], 2, None)])
    assert resumed == [[_one_process(0, 0)]] * 2
