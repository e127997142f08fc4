"""What cannot be right over parts is refused, alike on all ranks; and nothing has changed."""

import os
import signal
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import multiopt as mo
import multiopt.adapters.torch as optim
from tests.ranks.models import data, digest, loss, model, train_averaged
from tests.ranks.processes import on_ranks


def _sharded(values: torch.Tensor, placement: Any = None) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = torch.nn.Parameter(distribute_tensor(values, mesh, [placement or Shard(0)]))
    param.grad = torch.ones_like(param)
    return param


def _refused(what: str) -> str:
    """The error of a step, after which everything must be as it was."""
    param = _sharded(torch.ones(4, 2))
    made: dict[str, Any] = {
        "clip": lambda: optim.SGD([("w", param)], clip=mo.Clip(norm=1.0)),
        "clip by name": lambda: optim.SGD([("w", param)], clip=lambda name: mo.Clip(global_norm=1)),
        "skip": lambda: optim.SGD([("w", param)], on_nonfinite="skip"),
        "LAMB": lambda: optim.Optimizer([("w", param)], mo.LAMB()),
        "Adafactor": lambda: optim.Adafactor([("w", param)]),
        "Muon": lambda: optim.Muon([("w", param)], process_group="world"),
    }
    optimizer = made[what]()
    try:
        optimizer.step()
    except ValueError as error:
        assert (param.full_tensor() == 1).all()
        assert not optimizer.last.updated
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("clip", "parameter 'w' lies on several ranks, and Clip(norm=1.0"),
        ("clip by name", "parameter 'w' lies on several ranks, and Clip(norm=None, global_norm=1"),
        ("skip", "parameter 'w' lies on several ranks, and on_nonfinite='skip' needs all of it"),
        ("LAMB", "parameter 'w' lies on several ranks, and LAMB needs all of it"),
        ("Adafactor", "parameter 'w' lies on several ranks, and Adafactor needs all of it"),
        ("Muon", "parameter 'w' lies on several ranks, and Muon needs all of it"),
    ],
)
def test_what_needs_the_whole_is_refused(what: str, expected: str) -> None:
    first, second = on_ranks(2, _refused, what)
    assert expected in first
    assert first == second


def test_a_process_group_is_checked() -> None:
    param = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="process_group must be a process group, 'world' or None"):
        optim.SGD([param], process_group="wrold")
    # Nothing depends on other ranks here, so there need be none.
    assert optim.SGD([param], process_group="world").param_groups
    with pytest.raises(RuntimeError, match="there is no process group; expected one"):
        optim.SGD([param], clip=mo.Clip(norm=1.0), process_group="world")


def _outside() -> str:
    """Each rank by itself is no group for a parameter that lies on both."""
    param = _sharded(torch.ones(4, 2))
    groups = [dist.new_group([rank]) for rank in range(2)]
    optimizer = optim.SGD(
        [("w", param)], clip=mo.Clip(norm=1.0), process_group=groups[dist.get_rank()]
    )
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_a_group_without_all_of_a_parameter_is_refused() -> None:
    for rank, text in enumerate(on_ranks(2, _outside)):
        assert f"parameter 'w' lies on the ranks [{1 - rank}] too, which are not in" in text


def _allowed() -> Any:
    """A bound on elements needs no norm, and replicas are whole."""
    param, whole = _sharded(torch.ones(3, 2)), _sharded(torch.ones(2, 2), Replicate())
    optim.SGD([("w", param)], lr=1.0, clip=mo.Clip(value=0.5)).step()
    optim.Muon([("whole", whole)], lr=0.5).step()
    optim.SGD([("whole", whole)], lr=1.0, clip=mo.Clip(norm=1.0, eps=0.0)).step()
    return param.full_tensor().tolist(), whole.full_tensor().tolist()


def test_what_needs_no_whole_is_not() -> None:
    whole = torch.nn.Parameter(torch.ones(2, 2))
    whole.grad = torch.ones(2, 2)
    optim.Muon([whole], lr=0.5).step()
    optim.SGD([whole], lr=1.0, clip=mo.Clip(norm=1.0, eps=0.0)).step()
    assert on_ranks(2, _allowed) == [([[0.5] * 2] * 3, whole.tolist())] * 2


def _partial() -> Any:
    """A gradient that is a sum not made yet: it is made, as torch's optimizers do."""
    param = _sharded(torch.zeros(4))
    mesh = param.device_mesh
    from torch.distributed.tensor import DTensor

    param.grad = DTensor.from_local(torch.full((4,), 2.0), mesh, [Partial()])
    optimizer = optim.SGD(
        [("w", param)], lr=1.0, clip=mo.Clip(norm=4.0, eps=0.0), process_group="world"
    )
    optimizer.step()
    odd = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    odd.grad = odd.detach().clone()
    try:
        optim.SGD([("odd", odd)]).step()
    except ValueError as error:
        return param.full_tensor().tolist(), dict(optimizer.last.norms), str(error)
    return "nothing was raised"


def test_a_partial_gradient_is_added_up_first() -> None:
    # Four elements of 2 + 2 have a norm of 8, so half of it is taken.
    values, norms, text = ([-2.0] * 4, {"w": 8.0}, "parameter 'odd' is placed as")
    for found in on_ranks(2, _partial):
        assert found[:2] == (values, norms)
        assert text in found[2]


def _failing(what: str) -> Any:
    rank = dist.get_rank()
    params = {"w": _sharded(torch.ones(4, 2)), "plain": torch.nn.Parameter(torch.ones(2))}
    params["plain"].grad = torch.ones(2)
    optimizer = optim.Adam(
        params.items(), lr=0.5, clip=mo.Clip(global_norm=1.0), on_nonfinite="raise",
        process_group="world",
    )  # fmt: skip
    optimizer.step()
    before = digest_of(params, optimizer)
    if what == "nan":
        params["w"].grad = distribute_tensor(
            torch.tensor([[1.0, 1.0]] * 3 + [[1.0, float("nan")]]),
            params["w"].device_mesh,
            [Shard(0)],
        )
    elif rank == 1:
        if what == "range":
            optimizer.param_groups[0]["lr"] = -1.0
        else:
            params["plain"].grad = torch.ones(2, dtype=torch.float64).to(torch.float32)
            params["plain"].data = torch.ones(2, dtype=torch.float64)
    try:
        optimizer.step()
    except Exception as error:
        optimizer.param_groups[0]["lr"] = 0.5
        assert what == "dtype" or digest_of(params, optimizer) == before
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def digest_of(params: dict[str, Any], optimizer: Any) -> Any:
    tensors = [x for p in params.values() for x in (p, *dict(optimizer.state[p]).values())]
    return [(x.full_tensor() if hasattr(x, "full_tensor") else x).tolist() for x in tensors]


TOLD = "rank 1 cannot take the step:"


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("nan", "ValueError: the gradient of 'w' has", "ValueError: the gradient of 'w' has"),
        ("range", f"ValueError: {TOLD} param_groups[0]", "ValueError: param_groups[0]"),
        ("dtype", f"TypeError: {TOLD} gradient of 'plain'", "TypeError: gradient of 'plain'"),
    ],
)
def test_an_error_on_one_rank_is_one_on_all(what: str, first: str, second: str) -> None:
    found = on_ranks(2, _failing, what)
    assert found[0].startswith(first)
    assert found[1].startswith(second)


def _interrupted() -> Any:
    """Rank 1 comes late, and rank 0 is interrupted while it waits."""
    param = _sharded(torch.ones(4, 2))
    optimizer = optim.SGD([("w", param)], clip=mo.Clip(global_norm=1.0), process_group="world")
    optimizer.step()
    before = param.to_local().tolist()
    if dist.get_rank() == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            optimizer.step()
        except KeyboardInterrupt:
            text = "interrupted"
            try:
                optimizer.step()
            except RuntimeError as error:
                text += f", then {error}"
            return param.to_local().tolist() == before, text
        return "not interrupted"
    time.sleep(1.0)
    return None


def test_waiting_can_be_interrupted() -> None:
    (unchanged, text), _ = on_ranks(2, _interrupted)
    assert unchanged
    assert "interrupted, then an earlier step was broken off while ranks waited" in text


CLIPPED: dict[str, Any] = {"clip": mo.Clip(global_norm=0.7), "on_nonfinite": "skip"}


def _ddp() -> Any:
    module = model()
    optimizer = optim.AdamW(module.named_parameters(), lr=1e-2, process_group="world", **CLIPPED)
    wrapped = DistributedDataParallel(module)
    for step in range(4):
        optimizer.zero_grad()
        loss(wrapped, data(dist.get_rank())).backward()
        _spoil(step, [param.grad for param in module.parameters()])
        optimizer.step()
    return digest(module, optimizer)


def _zero() -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    module = model()
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(),
        # It has an argument of this name of its own.
        partial(optim.AdamW, process_group="world"),  # type: ignore[arg-type]
        lr=1e-2,
        names=list(module.named_parameters()),
        **CLIPPED,
    )
    wrapped = DistributedDataParallel(module)
    for step in range(4):
        optimizer.zero_grad()
        loss(wrapped, data(dist.get_rank())).backward()
        _spoil(step, [param.grad for param in module.parameters()])
        optimizer.step()
    return [param.detach().tolist() for param in module.parameters()]


def _spoil(step: int, grads: list[Any]) -> None:
    """A gradient that is not finite, once, on all ranks."""
    if step == 2:
        grads[1][0] = float("inf")


def test_replicas_and_partitions_count_once() -> None:
    module = model()
    optimizer = optim.AdamW(module.named_parameters(), lr=1e-2, **CLIPPED)
    train_averaged(module, optimizer, (0, 1), steps=4, change=_spoil)
    assert optimizer.skips["0.bias"].total == 1
    assert on_ranks(2, _ddp) == [digest(module, optimizer)] * 2
    assert on_ranks(2, _zero) == [[param.detach().tolist() for param in module.parameters()]] * 2
