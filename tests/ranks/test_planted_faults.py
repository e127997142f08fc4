"""Faults that are planted in what ranks do: the comparison with one process must notice each."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import multiopt as mo
import multiopt.adapters.torch as optim
from multiopt.distributed import ranks as ranks_module
from tests.ranks.processes import on_ranks
from tests.ranks.test_across import LINE, _train

#: What is run, and so what must differ.
RUN = ("AdamW", "global norm", torch.float64)


def _merged_as_whole(self: Any) -> None:
    """A partition is taken for a replica: only rank 0 counts what is whole somewhere."""
    _merge(self)
    self.counted = set(self.counted) if self._transport.rank == 0 else set()


def _merged_twice(self: Any) -> None:
    """A replica is counted on each rank."""
    _merge(self)
    self.counted = set(self.names)


_merge = ranks_module.Ranks._merge

FAULTS: dict[str, Any] = {
    "replicas of a DTensor are counted twice": (
        "multiopt.adapters.torch.groups.counts_here",
        lambda array, label: True,
    ),
    "plain replicas are counted twice": (
        "multiopt.distributed.ranks.Ranks._merge",
        _merged_twice,
    ),
    "an all_reduce is left out": (
        "multiopt.distributed.transport.Transport.all_reduce",
        lambda self, tensor: None,
    ),
    "no fault": ("multiopt.distributed.ranks.Ranks._merge", _merge),
}


def _faulty(fault: str) -> str:
    where, what = FAULTS[fault]
    with patch(where, what):
        return repr(_train(*RUN, (2,), LINE))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str) -> None:
    expected = repr(_train(*RUN, None, None))
    for found in on_ranks(2, _faulty, fault):
        assert (found == expected) == (fault == "no fault")


def _partition(is_planted: bool) -> float:
    """Each rank has a parameter of its own, as ZeRO divides them."""
    rank = dist.get_rank()
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0]) * (1 + rank)
    optimizer = optim.SGD(
        [(f"w{rank}", param)], clip=mo.Clip(global_norm=1.0), process_group="world"
    )
    with patch.object(ranks_module.Ranks, "_merge", _merged_as_whole if is_planted else _merge):
        optimizer.step()
    (norm,) = optimizer.last.global_norms.values()
    return norm


def test_a_partition_that_is_taken_for_a_replica_is_noticed() -> None:
    expected = 125.0**0.5
    assert on_ranks(2, _partition, False) == [expected] * 2
    assert expected not in on_ranks(2, _partition, True)


def _partial(is_planted: bool) -> list[float]:
    """A gradient that is not added up yet, of a parameter that is whole on each rank."""
    mesh = init_device_mesh("cpu", (2,))
    param = torch.nn.Parameter(torch.distributed.tensor.distribute_tensor(torch.zeros(2), mesh))
    param.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    optimizer = optim.SGD([("w", param)], lr=1.0)
    if is_planted:
        with patch("multiopt.adapters.torch.gradients.local_gradient", lambda p: p.grad.to_local()):
            optimizer.step()
    else:
        optimizer.step()
    values: list[float] = param.to_local().tolist()  # type: ignore[attr-defined]
    return values


def test_a_partial_gradient_that_is_taken_as_whole_is_noticed() -> None:
    assert on_ranks(2, _partial, False) == [[-2.0, -2.0]] * 2
    assert on_ranks(2, _partial, True) == [[-1.0, -1.0]] * 2
