"""The norm over all ranks: the same bits for every placement, and those of exact arithmetic."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from multiopt.distributed import global_norm
from tests.exact_sums import exact_norm
from tests.ranks.processes import on_ranks

SHAPES = {"a": (101, 7), "b": (813,), "c": (3, 5, 7), "d": (1, 4)}

LINE: dict[str, Any] = {
    "first": lambda n: [Shard(0)],
    "last": lambda n: [Shard(n - 1)],
    "replicas": lambda n: [Replicate()],
    "plain": None,
}
SQUARE: dict[str, Any] = {
    "replicas of shards": lambda n: [Replicate(), Shard(0)],
    "shards of replicas": lambda n: [Shard(n - 1), Replicate()],
    "shards of shards": lambda n: [Shard(0), Shard(0)],
    "shards of two": lambda n: [Shard(0), Shard(n - 1)],
}


def _grads() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    scales = {"a": 1.0, "b": 1e-3, "c": 1e30, "d": 1e-30}
    return {
        name: torch.randn(shape, generator=generator) * scales[name]
        for name, shape in SHAPES.items()
    }


def _norms(kinds: dict[str, None]) -> list[float]:
    size, grads = dist.get_world_size(), _grads()
    square = "shards of two" in kinds
    mesh = init_device_mesh("cpu", (2, size // 2) if square else (size,))
    found = []
    for kind in kinds:
        place = {**LINE, **SQUARE}[kind]
        placed = {
            name: grad if place is None else distribute_tensor(grad, mesh, place(grad.ndim))
            for name, grad in grads.items()
        }
        found += [global_norm(placed), global_norm(placed.values())]
    # A mixture, a partition, and what this rank does not have.
    mixed: dict[str, Any] = dict(grads)
    mixed["a"] = distribute_tensor(grads["a"], mesh, [Shard(0)] * mesh.ndim)
    mixed["b"] = grads["b"].numpy() if dist.get_rank() == size - 1 else None
    if dist.get_rank():
        del mixed["d"]
    return [*found, global_norm(mixed)]


@pytest.mark.parametrize(("ranks", "kinds"), [(2, LINE), (3, LINE), (4, SQUARE)])
def test_every_placement_has_the_norm_of_the_whole(ranks: int, kinds: dict[str, Any]) -> None:
    expected = exact_norm(*(grad.numpy() for grad in _grads().values()))
    assert global_norm(_grads()) == expected
    for norms in on_ranks(ranks, _norms, dict.fromkeys(kinds)):
        assert norms == [expected] * (2 * len(kinds) + 1)


def _special() -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    bad = torch.tensor([1.0, 2.0, float("inf"), float("nan")])
    found = [
        global_norm({"w": distribute_tensor(bad, mesh, [Shard(0)])}),
        global_norm({"w": distribute_tensor(bad[:3].clone(), mesh, [Shard(0)])}),
        global_norm({}),
        global_norm({"wide": torch.tensor([1e200, 1e200], dtype=torch.float64)}),
    ]
    layer = torch.nn.Linear(3, 5, bias=False)
    fully_shard(layer, mesh=mesh)
    layer(torch.ones(2, 3)).sum().backward()
    return [repr(x) for x in [*found, global_norm(p.grad for p in layer.parameters())]]


def test_special_values_and_sizes() -> None:
    expected = ["nan", "inf", "0.0", repr(float(np.sqrt(2.0) * 1e200)), repr(float(np.sqrt(60.0)))]
    assert on_ranks(2, _special) == [expected] * 2


def _refused(what: str) -> str:
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    other = torch.ones(2, dtype=torch.float64 if rank else torch.float32)
    grads: dict[str, Any] = {
        "partial": partial,
        "dtypes": other,
        "number": 1.0 if rank else torch.ones(2),
    }
    texts = []
    for _ in range(2):
        try:
            global_norm({"w": grads[what]})
        except (TypeError, ValueError) as error:
            texts.append(str(error))
    # It goes on all the same.
    assert global_norm({"w": torch.tensor([3.0, 4.0])}) == 5.0
    # And it is refused as often as it is asked for.
    assert len(texts) == 2
    assert texts[0] == texts[1]
    return texts[0]


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("partial", "gradient of 'w' is placed as", "gradient of 'w' is placed as"),
        ("dtypes", "parameter 'w' is float32, whole", "parameter 'w' is float32, whole"),
        ("number", "rank 1 cannot take the step: gradient of 'w'", "gradient of 'w'"),
    ],
)
def test_refusals(what: str, first: str, second: str) -> None:
    found = on_ranks(2, _refused, what)
    assert found[0].startswith(first)
    assert found[1].startswith(second)
