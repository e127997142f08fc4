"""Pyro's optimizers that differentiate a loss themselves, around and beside ours."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import constraints

import multiopt.adapters.pyro as optim
from multiopt.adapters.pyro.joint import JointOptim
from tests.hosts.pyro.tensors import give, leaf, param

KINDS: dict[str, Callable[[Any], Any]] = {
    "Pyro": lambda o: o.multi.PyroMultiOptimizer(o.Adam({"lr": 0.05}, {"clip_norm": 9.0})),
    "torch": lambda o: o.multi.TorchMultiOptimizer(torch.optim.Adam, {"lr": 0.05}),
    "Newton": lambda o: o.multi.Newton(trust_radii={"z": 0.2}),
    "mixed": lambda o: o.multi.MixedMultiOptimizer(
        [
            (["y"], o.multi.PyroMultiOptimizer(o.ClippedAdam({"lr": 0.05}))),
            (["x", "z"], o.multi.Newton()),
        ]
    ),
    "mixed bare": lambda o: o.multi.MixedMultiOptimizer(
        [(["y"], o.Adam({"lr": 0.05})), (["x", "z"], o.multi.Newton())]
    ),
}


def fit(opt: Any, steps: int) -> list[float]:
    """Losses of three normal distributions, one with a constraint and one with plates."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loc, cov = torch.tensor([-0.5, 0.5]), torch.tensor([[1.0, 0.09], [0.09, 0.1]])
    loc, cov = loc.double(), cov.double()
    losses = []
    starts = {"x": torch.randn(2), "y": torch.randn(3, 2), "z": torch.randn(4, 2).abs()}

    def model() -> None:
        for name, start in starts.items():
            bounds = constraints.greater_than(-1) if name == "z" else constraints.real
            value = pyro.param(name, start.double(), constraint=bounds)
            target = dist.MultivariateNormal(loc, cov)
            pyro.sample(f"obs_{name}", target.expand(value.shape[:-1]).to_event(), obs=value)

    for _ in range(steps):
        trace = poutine.trace(model).get_trace()
        loss: Any = -trace.log_prob_sum()
        params = {
            name: leaf(site["value"])
            for name, site in trace.nodes.items()
            if site["type"] == "param"
        }
        opt.step(loss, params)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_multi_optimizer_follows_pyros(kind: str) -> None:
    ours, theirs = (fit(KINDS[kind](module), 60) for module in (optim, pyro.optim))
    assert len(set(ours)) > 5
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_ours_are_stepped_together() -> None:
    assert isinstance(optim.multi.TorchMultiOptimizer(torch.optim.Adam, {}).optim, JointOptim)
    assert isinstance(
        optim.multi.TorchMultiOptimizer(torch.optim.Adam, {}), pyro.optim.multi.TorchMultiOptimizer
    )
    with pytest.raises(TypeError, match="Expected a PyroOptim object"):
        optim.multi.PyroMultiOptimizer(torch.optim.Adam)  # type: ignore[arg-type]


def test_every_name_of_pyros_module() -> None:
    for name in (
        "MixedMultiOptimizer",
        "MultiOptimizer",
        "Newton",
        "PyroMultiOptimizer",
        "TorchMultiOptimizer",
    ):
        assert issubclass(getattr(optim.multi, name), getattr(pyro.optim.multi, name))


def test_a_name_belongs_to_one_part() -> None:
    first, second = optim.Adam({"lr": 0.1}), optim.Adam({"lr": 0.01})
    optim.multi.MixedMultiOptimizer([(["w", "x"], first), (["y", "z"], second)])
    with pytest.raises(ValueError, match="'y' by two different optimizers"):
        optim.multi.MixedMultiOptimizer([(["x", "y"], first), (["y", "z"], second)])


def test_a_scheduler_in_a_multi_optimizer() -> None:
    settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5}
    scheduler, loc = optim.ExponentialLR(settings), param("loc")
    whole = optim.multi.PyroMultiOptimizer(scheduler)
    for _ in range(2):
        whole.step(give(loc).sum(), {"loc": loc})
        scheduler.step()
    assert loc.tolist() == [-1.5, -1.5]
