"""Examples of Pyro that use torch's optimizers, shortened: ours give their losses.

Each is that of Pyro's folder ``examples`` with its name, with less data and fewer steps.
"""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.contrib.timeseries import IndependentMaternGP, LinearlyCoupledMaternGP
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_median
from pyro.nn import PyroModule
from torch.utils.data import DataLoader, TensorDataset

import multiopt.adapters.torch as multiopt_optim
from tests.hosts.training import ALONE

SIZE, BATCH = 100, 20


class Regression(PyroModule):
    """The model of svi_torch and svi_lightning."""

    def forward(self, covariates: torch.Tensor, data: torch.Tensor | None = None) -> torch.Tensor:
        coeff = pyro.sample("coeff", dist.Normal(0, 1))
        bias = pyro.sample("bias", dist.Normal(0, 1))
        scale = pyro.sample("scale", dist.LogNormal(0, 1))
        with pyro.plate("data", SIZE, len(covariates)):
            loc = bias + coeff * covariates
            return pyro.sample("obs", dist.Normal(loc, scale), obs=data)


def regression() -> tuple[Any, "DataLoader[tuple[torch.Tensor, ...]]"]:
    """The loss with its parameters, and the batches."""
    pyro.set_rng_seed(20200723)
    model = Regression()
    covariates = torch.randn(SIZE)
    with torch.no_grad():
        data = model(covariates)
    loss_fn = Trace_ELBO()(model, AutoNormal(model))
    dataset = TensorDataset(covariates, data)
    loss_fn(*dataset[:BATCH])
    return loss_fn, DataLoader(dataset, BATCH)


@pyro.settings.context(module_local_params=True)
def svi_torch(optim: ModuleType, folder: Path) -> list[float]:
    loss_fn, batches = regression()
    optimizer = optim.Adam(loss_fn.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        for batch in batches:
            optimizer.zero_grad()
            loss = loss_fn(*batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


class SVI(lightning.LightningModule):
    def __init__(self, loss_fn: Any, optim: ModuleType) -> None:
        super().__init__()
        self.loss_fn, self.optim = loss_fn, optim
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.loss_fn(*batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return self.optim.Adam(self.loss_fn.parameters(), lr=0.01)


@pyro.settings.context(module_local_params=True)
def svi_lightning(optim: ModuleType, folder: Path) -> list[float]:
    loss_fn, batches = regression()
    plan = SVI(loss_fn, optim)
    trainer = lightning.Trainer(max_epochs=4, default_root_dir=folder, **ALONE)
    trainer.fit(plan, train_dataloaders=batches)
    return plan.losses


def kernel(x: Any, eta1: Any, eta2: Any) -> Any:
    eta1sq, eta2sq, dots = eta1.square(), eta2.square(), x @ x.T
    squares = 0.5 * eta2sq * ((1.0 + dots).square() - x.square() @ x.square().T)
    return squares + (eta1sq - eta2sq) * dots + 1.0 - 0.5 * eta2sq


def sparse_model(x: torch.Tensor, y: torch.Tensor) -> None:
    count, dimensions = x.shape
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    phi = sigma / math.sqrt(count) / (dimensions - 1.0)
    eta1 = pyro.sample("eta1", dist.HalfCauchy(phi))
    msq = pyro.sample("msq", dist.InverseGamma(3.0, 1.0))
    xisq = pyro.sample("xisq", dist.InverseGamma(3.0, 1.0))
    eta2 = eta1.square() * xisq.sqrt() / msq
    lam = pyro.sample("lambda", dist.HalfCauchy(torch.ones(dimensions)).to_event(1))
    kappa = msq.sqrt() * lam / (msq + (eta1 * lam).square()).sqrt()
    covariance = kernel(kappa * x, eta1, eta2) + (sigma**2 + 1e-4) * torch.eye(count)
    pyro.sample("Y", dist.MultivariateNormal(torch.zeros(count), covariance), obs=y)


def init_loc(site: Any) -> Any:
    value = init_to_median(site, num_samples=50)
    return 0.1 * value if site["name"] == "sigma" else value


def sparse_regression(optim: ModuleType, folder: Path) -> list[float]:
    pyro.set_rng_seed(1)
    x = torch.randn(20, 6)
    y = x[:, 0] - 0.5 * x[:, 1] + x[:, 0] * x[:, 1] + 0.05 * torch.randn(20)
    data = x, (y - y.mean()) / y.std()
    loss_fn = Trace_ELBO().differentiable_loss
    guide = AutoDelta(sparse_model, init_loc_fn=init_loc)
    with poutine.block(), poutine.trace(param_only=True) as captured:
        guide(*data)
    values: list[Any] = [pyro.param(name) for name in captured.trace.nodes]
    adam = optim.Adam([value.unconstrained() for value in values], lr=0.3)
    losses = []
    for step in range(20):
        loss = loss_fn(sparse_model, guide, *data) / len(y)
        loss.backward()
        adam.step()
        adam.zero_grad()
        if step in (10, 15):
            adam.param_groups[0]["lr"] *= 0.2
        losses.append(loss.item())
    return losses


def gp_models(optim: ModuleType, kind: Any, **sizes: int) -> list[float]:
    torch.manual_seed(0)
    scales = 1.5 * torch.ones(sizes.get("num_gps", 3))
    gp = kind(nu=1.5, obs_dim=3, length_scale_init=scales, **sizes).double()
    data = torch.randn(20, 3).double()
    adam = optim.Adam(gp.parameters(), lr=0.01, betas=(0.5, 0.999), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(adam, gamma=0.9)
    losses = []
    for _ in range(10):
        # Gradients add up here, as in Pyro's program.
        loss = -gp.log_prob(data).sum() / len(data)
        loss.backward()
        adam.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def independent_gps(optim: ModuleType, folder: Path) -> list[float]:
    return gp_models(optim, IndependentMaternGP)


def coupled_gps(optim: ModuleType, folder: Path) -> list[float]:
    return gp_models(optim, LinearlyCoupledMaternGP, num_gps=4)


@pytest.mark.parametrize(
    ("example", "tolerance"),
    [
        # Losses in float32, and in float64.
        (svi_torch, 1e-5),
        (svi_lightning, 1e-5),
        (sparse_regression, 1e-5),
        (independent_gps, 1e-12),
        (coupled_gps, 1e-12),
    ],
)
def test_losses_follow_torch_where_only_the_import_changed(
    example: Any, tolerance: float, tmp_path: Path
) -> None:
    ours = example(multiopt_optim, tmp_path)
    pyro.clear_param_store()
    theirs = example(torch.optim, tmp_path)
    assert ours == pytest.approx(theirs, rel=tolerance, abs=0.0)
    assert min(ours) < ours[0]
