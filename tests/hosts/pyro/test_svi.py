"""Programs of Pyro with only the import changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import multiopt.adapters.pyro as optim
from tests.hosts.pyro.tensors import BOTH

# Three of Pyro's own example models, in short.


def linear_regression(data: torch.Tensor) -> Callable[[], None]:
    """Of Pyro's regression tutorial: a module, whose parameters have dotted names."""

    class Regression(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            kind: Any = pyro.nn.PyroModule
            self.linear = kind[torch.nn.Linear](3, 1)
            self.linear.double()

        def forward(self) -> None:
            mean = self.linear(data[:, :3]).squeeze(-1)
            with pyro.plate("data", len(data)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=data[:, 3])

    pyro.set_rng_seed(1)
    return Regression()


def no_guide() -> None:
    pass


def coin(data: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """Of Pyro's SVI tutorial, part I: positive parameters of a Beta guide."""
    tosses = (data[:, 0] > 0).double()
    ten = torch.tensor(10.0, dtype=torch.float64)

    def model() -> None:
        fairness = pyro.sample("fairness", dist.Beta(ten, ten))
        with pyro.plate("tosses", len(tosses)):
            pyro.sample("toss", dist.Bernoulli(fairness), obs=tosses)

    def guide() -> None:
        alpha = pyro.param("alpha", 1.5 * ten, constraint=constraints.positive)
        beta = pyro.param("beta", 1.5 * ten, constraint=constraints.positive)
        pyro.sample("fairness", dist.Beta(alpha, beta))

    return model, guide


def growing(data: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """A mixture whose later components, and their parameters, arrive while it trains."""
    calls = [0]

    def model() -> None:
        calls[0] += 1
        for k in range(1 + calls[0] // 20):
            loc = pyro.param(f"loc_{k}", torch.tensor(0.5 * k, dtype=torch.float64))
            with pyro.plate(f"data_{k}", len(data)):
                pyro.sample(f"y_{k}", dist.Normal(loc, 1.0), obs=data[:, k % 4])

    return model, no_guide


MODELS: dict[str, Callable[[torch.Tensor], tuple[Callable[[], None], Callable[[], None]]]] = {
    "a module of dotted names": lambda data: (linear_regression(data), no_guide),
    "constraints": coin,
    "a parameter born late": growing,
}
SETTINGS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "Adam": ("Adam", ({"lr": 0.05},)),
    "Adam by name, clipped": (
        "Adam",
        (
            lambda name: {"lr": 0.05 if name.endswith(("weight", "alpha", "0")) else 0.02},
            {"clip_norm": 5.0, "clip_value": 3.0},
        ),
    ),
    "AdamW": ("AdamW", ({"lr": 0.05, "betas": (0.8, 0.99), "amsgrad": True},)),
    "ClippedAdam": ("ClippedAdam", ({"lr": 0.05, "lrd": 0.99, "clip_norm": 2.0},)),
    "SGD": ("SGD", ({"lr": 1e-3, "momentum": 0.9, "nesterov": True}, {"clip_norm": 50.0})),
}


def losses(module: Any, model_name: str, setting: str, steps: int = 100) -> list[float]:
    pyro.clear_param_store()
    data = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 4)) + 0.5)
    model, guide = MODELS[model_name](data)
    name, arguments = SETTINGS[setting]
    pyro.set_rng_seed(2)
    svi = SVI(model, guide, getattr(module, name)(*arguments), Trace_ELBO())
    return [svi.step() for _ in range(steps)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_svi_follows_pyro_with_only_the_import_changed(model: str, setting: str) -> None:
    ours, theirs = losses(optim, model, setting), losses(pyro.optim, model, setting)
    assert len(set(ours)) > 90
    # The tolerance against torch in float64, spec/arithmetic.md; a loss sums 40 to 200 terms.
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@BOTH
def test_module_local_params(module: Any) -> None:
    with pyro.settings.context(module_local_params=True):

        class Spread(pyro.nn.PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.scale: Any = pyro.nn.PyroParam(torch.tensor(9.0), constraints.positive)

            def forward(self) -> None:
                pyro.sample("x", dist.Normal(0.0, self.scale), obs=torch.tensor(1.0))

        spread, opt = Spread(), module.Adam({"lr": 0.1})
        svi = SVI(spread, no_guide, opt, Trace_ELBO())
        first, *_, last = [svi.step() for _ in range(30)]
        assert list(pyro.get_param_store()) == []
    assert last < first
    assert len(opt.optim_objs) == 1


def test_an_autoguide_trains_over_a_restart(tmp_path: Path) -> None:
    data = torch.tensor([1.0, 2.0, 3.0])

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=data)

    def run(stop: int | None) -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        opt = optim.Adam({"lr": 0.1}, {"clip_norm": 10.0})
        svi = SVI(model, AutoNormal(model), opt, Trace_ELBO())
        found = []
        for i in range(20):
            if i == stop:
                opt.save(tmp_path / "opt")
                svi.optim = optim.Adam({"lr": 0.1}, {"clip_norm": 10.0})
                svi.optim.load(tmp_path / "opt")
            found.append(svi.step())
        return found

    assert run(10) == run(None)
