"""Steps over parameters that lie on several ranks: what is decided of the whole has its bits."""

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import multiopt as mo
import multiopt.adapters.torch as optim
from tests.ranks.models import full
from tests.ranks.processes import on_ranks

#: Parameters of all placements, on a mesh of one dimension, and on one of two.
SHAPES = {"a": (7, 3), "b": (2, 5), "c": (4,), "d": (1, 2), "e": (6, 4), "plain": (3, 2)}
LINE: dict[str, tuple[Any, ...]] = {
    "a": (Shard(0),),
    "b": (Shard(1),),
    "c": (Replicate(),),
    "d": (Shard(0),),
    "e": (Shard(0),),
}
SQUARE: dict[str, tuple[Any, ...]] = {
    "a": (Replicate(), Shard(0)),
    "b": (Shard(0), Replicate()),
    "c": (Replicate(), Replicate()),
    "d": (Replicate(), Shard(1)),
    "e": (Shard(1), Shard(0)),
}
STEPS = 4

RULES: dict[str, mo.Rule] = {
    "AdamW": mo.AdamW(lr=0.1, weight_decay=0.1),
    "LAMB": mo.LAMB(lr=0.1, weight_decay=0.1),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "norm": {"clip": mo.Clip(norm=0.9)},
    "global norm": {"clip": mo.Clip(global_norm=1.5)},
    "all": {"clip": mo.Clip(norm=2.0, global_norm=2.5, value=0.7), "on_nonfinite": "skip"},
    "by name": {
        "clip": lambda name: None if name == "b" else mo.Clip(global_norm=ord(name[0]) % 3)
    },
    "skip": {"on_nonfinite": "skip"},
    "none": {},
}


def _value(name: str, step: int, dtype: torch.dtype, bad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * ord(name[0]) + step)
    value = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(dtype)
    if bad and (name, step) in (("e", 2), ("plain", 3)):
        value.view(-1)[-1] = float("nan")
    return value


def _train(
    rule: str, settings: str, dtype: torch.dtype, mesh_shape: tuple[int, ...] | None, layout: Any
) -> Any:
    """Train, with or without ranks; return all that there is afterwards, as plain data."""
    mesh = None if mesh_shape is None else init_device_mesh("cpu", mesh_shape)

    def placed(name: str, value: torch.Tensor) -> torch.Tensor:
        if mesh is None or name not in layout:
            return value
        return distribute_tensor(value, mesh, layout[name])

    bad = "skip" in str(SETTINGS[settings])
    params = {n: torch.nn.Parameter(placed(n, _value(n, 0, dtype))) for n in SHAPES}
    ranked = {} if mesh is None else {"process_group": "world"}
    more: Any = {**SETTINGS[settings], **ranked, "master_weights": dtype == torch.bfloat16}
    optimizer = optim.Optimizer(params.items(), RULES[rule], **more)
    reports = []
    for step in range(1, STEPS + 1):
        for name, param in params.items():
            # A name that comes late, and one that pauses.
            here = not (name == "a" and step == 1) and not (name == "c" and step == 3)
            param.grad = placed(name, _value(name, step, dtype, bad)) if here else None
        optimizer.step()
        last = optimizer.last
        totals = sorted((repr(clip), norm) for clip, norm in last.global_norms.items())
        reports.append([last.updated, last.skipped, last.norms, last.clipped, totals])
    state = {
        name: [full(x).reshape(-1).tolist() for x in (p, *dict(optimizer.state[p]).values())]
        for name, p in params.items()
    }
    return state, reports, {name: tuple(skips) for name, skips in optimizer.skips.items()}


def _trained(every: list[Any]) -> list[str]:
    """Several runs on ranks that are there already."""
    return [repr(_train(*one)) for one in every]


@pytest.mark.parametrize(
    ("ranks", "mesh", "layout"), [(2, (2,), LINE), (3, (3,), LINE), (4, (2, 2), SQUARE)]
)
def test_the_bits_are_those_of_one_process(ranks: int, mesh: Any, layout: Any) -> None:
    runs = [("AdamW", settings, torch.float64) for settings in SETTINGS]
    runs += [("AdamW", "all", dtype) for dtype in (torch.float32, torch.bfloat16)]
    runs += [("LAMB", settings, torch.float64) for settings in ("none", "all")]
    found = on_ranks(ranks, _trained, [(*run, mesh, layout) for run in runs])
    for run, *results in zip(runs, *found, strict=True):
        assert results == [repr(_train(*run, None, None))] * ranks, run  # type: ignore[call-arg]
