"""State that travels between ranks, what is remembered of names, and what is sent."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import multiopt as mo
from multiopt.distributed import Replicas
from multiopt.distributed.transport import Transport
from tests.ranks.processes import on_ranks
from tests.ranks.training import digest


def _optimizer(**more: Any) -> mo.Optimizer:
    return mo.Optimizer(mo.Adam(lr=0.1), average=mo.Average(), **more)


def _grad(step: int, size: int = 3) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(size)


def _started(steps: int = 3) -> tuple[mo.Optimizer, dict[str, Any]]:
    """An optimizer that has trained "w" by itself, with something set for it and a skip."""
    opt = _optimizer(on_nonfinite="skip")
    params: dict[str, Any] = {"w": np.zeros(3)}
    for step in range(steps):
        params = opt.step(params, {"w": _grad(step)})
    opt.set_hyperparameters("w", lr=0.3)
    opt.step(params, {"w": np.full(3, np.nan)})
    return opt, params


def _resumed(folder: str | None, holder: int) -> Any:
    """One rank goes on from what it, or a file, has; the others start anew."""
    rank = dist.get_rank()
    opt, params = _optimizer(on_nonfinite="skip"), {"w": np.full(3, 7.0 + rank)}
    if rank == holder and folder is None:
        opt, params = _started()
    elif rank == holder:
        opt.load(Path(str(folder)) / "started", params=params)
        assert opt.pending == ("w",)
    elif rank == 2:
        # Its own state of the name does not count.
        opt.step(params, {"w": np.ones(3)})
    replicas = Replicas(opt)
    mine = params if rank >= holder else {}
    for step in range(3, 6):
        replicas.step(mine, {name: _grad(step) for name in mine})
    assert opt.pending == ()
    return digest(opt, replicas.params), opt.hyperparameters("w")["lr"], opt.steps


@pytest.mark.parametrize("holder", [0, 1])
@pytest.mark.parametrize("by_file", [False, True])
def test_a_name_brings_value_and_state(holder: int, by_file: bool, tmp_path: Path) -> None:
    opt, params = _started()
    opt.save(tmp_path / "started", params=params)
    results = on_ranks(3, _resumed, str(tmp_path) if by_file else None, holder)
    for step in range(3, 6):
        total = np.zeros(3)
        for _ in range(holder, 3):
            total = total + _grad(step)
        opt.step(params, {"w": total / 3})
    for result in results:
        assert result == (digest(opt, params), 0.3, 6)
        assert result[0]["w"][0] == (1, 0)


def _forgotten() -> list[Any]:
    """All ranks forget and rename; what is stepped then begins or goes on alike."""
    rank = dist.get_rank()
    replicas = Replicas(_optimizer())
    opt = replicas.optimizer
    params = {"w": np.full(3, 1.0 + rank), "b": np.full(3, 2.0 + rank)}
    replicas.step(params, {name: _grad(1) for name in params})
    opt.forget("w")
    opt.rename({"b": "c"})
    # Rank 1 has "w", anew, and rank 0 does not; "c" is passed by rank 0 only.
    mine = {"w": np.full(3, 9.0)} if rank else {"c": params["b"]}
    replicas.step(mine, {name: _grad(2) for name in mine})
    assert sorted(replicas.params) == sorted(opt) == ["c", "w"]
    return [digest(opt, replicas.params), opt.state("w").step, opt.state("c").step]


def test_names_are_forgotten_and_renamed_on_all_ranks() -> None:
    first, second = on_ranks(2, _forgotten)
    assert first == second
    assert first[1:] == [1, 2]
    opt, params = _optimizer(), {"w": np.full(3, 9.0)}
    opt.step(params, {"w": _grad(2) / 2})
    assert digest(opt, params)["w"] == first[0]["w"]


def _first_passed() -> None:
    """An array that is passed for the first time takes over the value, with a gradient or not."""
    rank = dist.get_rank()
    replicas = Replicas(mo.Optimizer(mo.SGD(lr=1.0)))
    first, late = torch.full((2,), 1.0), torch.full((2,), 5.0, requires_grad=True)
    replicas.step({"w": first} if rank == 0 else {}, {"w": torch.ones(2)} if rank == 0 else {})
    if rank == 0:
        replicas.step({}, {})
        replicas.step({"w": first}, {"w": torch.ones(2)})
        assert first.tolist() == [0.0, 0.0]
        return
    held = replicas.params["w"]
    assert held.tolist() == [0.5, 0.5]
    assert replicas.step({"w": late}, {})["w"] is late
    assert late.tolist() == [0.5, 0.5]
    assert replicas.params["w"] is late
    version = late._version
    replicas.step({}, {})
    assert late.tolist() == [0.0, 0.0]
    assert late._version > version
    assert late.requires_grad
    assert held.tolist() == [0.5, 0.5]


def test_the_first_array_that_is_passed_takes_over() -> None:
    on_ranks(2, _first_passed)


def _sent() -> list[Any]:
    """The collectives of each step, by name and number of bytes."""
    sent: list[Any] = []
    before = Transport._complete

    def watched(self: Transport, collective: Any, first: torch.Tensor, *rest: Any) -> None:
        sent[-1].append((collective.__name__.removesuffix("_into_tensor"), first.nbytes))
        before(self, collective, first, *rest)

    Transport._complete = watched  # type: ignore[method-assign]
    try:
        replicas = Replicas(mo.Optimizer(mo.Adam()))
        params = {"w": np.zeros(1000), "v": np.zeros(10)}
        # On rank 1 "v" comes and goes.
        for k in (2, 2, 1, 2, 1, 2):
            sent.append([])
            names = list(params)[: k if dist.get_rank() else 2]
            replicas.step({n: params[n] for n in names}, {n: params[n] + 1.0 for n in names})
    finally:
        Transport._complete = before  # type: ignore[method-assign]
    return [[(name.removesuffix("_single"), size) for name, size in step] for step in sent]


def test_a_hash_and_the_gradients_travel_when_names_repeat() -> None:
    for steps in on_ranks(2, _sent):
        message = ("all_gather", 2 * 8 * 8)
        usual = [message, ("all_to_all", 8080), ("all_gather", 8080), message]
        assert [len(step) for step in steps] == [7, 4, 5, 4, 4, 4]
        assert steps[1] == steps[3] == steps[4] == steps[5] == usual
        kinds = [name for name, _ in steps[0]]
        assert kinds[:4] == ["all_gather", "broadcast", "all_gather", "broadcast"]


def _one_array_of_all() -> bytes:
    replicas = Replicas(_optimizer())
    rank, file = dist.get_rank(), io.BytesIO()
    name = f"only {rank}"
    replicas.step({name: np.full(2, 1.0)}, {name: np.ones(2)})
    replicas.optimizer.save(file, params=replicas.params)
    return file.getvalue()


def test_one_rank_saves_all() -> None:
    first, second = (io.BytesIO(data) for data in on_ranks(2, _one_array_of_all))
    params = {"only 0": np.zeros(2), "only 1": np.zeros(2)}
    opt, other = _optimizer(), _optimizer()
    found = dict(opt.load(first, params=params).params or {})
    assert sorted(opt.pending) == ["only 0", "only 1"]
    texts = {name: array.tobytes() for name, array in found.items()}
    found = dict(other.load(second, params=params).params or {})
    assert texts == {name: array.tobytes() for name, array in found.items()}
