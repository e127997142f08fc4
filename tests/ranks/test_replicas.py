"""Replicas: whatever each rank sees, all have the bits of one process on the averaged gradients."""

from typing import Any

import pytest

from tests.ranks.processes import on_ranks
from tests.ranks.training import Training, in_one_process, is_local, on_this_rank


def _all(trainings: list[Training], reduction: str) -> list[Any]:
    return [on_this_rank(training, reduction) for training in trainings]


def _trainings(ranks: int) -> list[Training]:
    return [
        Training(1, ranks),
        Training(2, ranks, on_nonfinite="skip"),
        Training(3, ranks, has_local=True),
        Training(4, ranks, has_local=True, on_nonfinite="skip", clips=False),
        Training(5, ranks, masters=True, average=True),
        *(Training(seed, ranks, steps=6) for seed in range(10, 14)),
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_has_the_bits_of_one_process(ranks: int) -> None:
    trainings = _trainings(ranks)
    results = on_ranks(ranks, _all, trainings, "ordered")
    for k, training in enumerate(trainings):
        norms, state, steps = in_one_process(training)
        for rank in range(ranks):
            found_norms, found, found_steps = results[rank][k]
            assert found_norms == norms, training
            shared = {name: one for name, one in state.items() if not is_local(name)}
            own = {name: one for name, one in state.items() if name == f"local {rank}"}
            assert found == shared | own, training
            assert found_steps <= steps
        assert max(results[rank][k][2] for rank in range(ranks)) == steps, training


def test_two_ranks_have_one_order() -> None:
    training = Training(6, 2)
    norms, state, steps = in_one_process(training)
    for result in on_ranks(2, _all, [training], "fast"):
        assert result == [(norms, state, steps)]
