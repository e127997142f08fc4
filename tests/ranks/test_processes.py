"""The processes that other tests run on: a failure on one rank is a failure of the test."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks.processes import on_ranks


def _sum_of_ranks(offset: int) -> tuple[int, int, float]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("as planned")


@pytest.mark.parametrize("ranks", [2, 1, 3])
def test_a_function_runs_on_each_rank(ranks: int) -> None:
    expected = sum(10 + rank for rank in range(ranks))
    assert on_ranks(ranks, _sum_of_ranks, 10) == [(rank, ranks, expected) for rank in range(ranks)]


def test_a_failure_on_one_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1: .*as planned"):
        on_ranks(2, _fail_on, 1)
    assert on_ranks(2, _sum_of_ranks, 0) == [(0, 2, 1.0), (1, 2, 1.0)]
