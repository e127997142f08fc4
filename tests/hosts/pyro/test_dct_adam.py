"""DCTAdam: what tensors are marked with, and what is left to Pyro."""

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.contrib.forecast import Forecaster, ForecastingModel

import multiopt.adapters.pyro as optim
from multiopt import CheckpointError
from multiopt.adapters.pyro.joint import JointOptim
from tests.hosts.pyro.tensors import BOTH, PYRO, give, leaf, param, steps_of


class Drift(ForecastingModel):
    """A random walk, seen through noise."""

    def model(self, zero_data: torch.Tensor, covariates: torch.Tensor) -> None:
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        motion = drift.cumsum(-1).unsqueeze(-1)
        self.predict(dist.Normal(0.0, pyro.param("scale", torch.tensor(1.0))), motion)


def series(name: str, size: int = 7) -> torch.Tensor:
    """A parameter of two time series, marked as ``pyro.contrib.forecast`` does."""
    tensor: Any = leaf(pyro.param(name, torch.zeros(2, size)))
    tensor._pyro_dct_dim = -1
    return tensor


def wavy(tensor: torch.Tensor, step: int) -> torch.Tensor:
    tensor.grad = torch.cos((step + 1.0) * torch.arange(1.0, tensor.numel() + 1)).view_as(tensor)
    return tensor


def test_forecasting_gives_pyros_parameters() -> None:
    data, fits = torch.randn(11, 1).cumsum(0), []
    for module in (pyro.optim, optim):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        opt: Any = module.DCTAdam({"lr": 0.05, "lrd": 0.98, "clip_norm": 5.0})
        Forecaster(
            Drift(),
            data,
            torch.zeros(11, 0),
            optim=opt,
            num_steps=30,
            dct_gradients=True,
            log_every=0,
        )
        store = pyro.get_param_store()
        fits.append({name: value.detach().numpy().copy() for name, value in store.items()})
        marks = [hasattr(p, "_pyro_dct_dim") for _, p in store.named_parameters()]
        assert True in marks
        assert False in marks
        (shape,) = {
            tuple(state["state"][0]["exp_avg"].shape)
            for name, state in opt.get_state().items()
            if "drift" in name
        }
        assert shape == (11 + 12,)
    for name, value in fits[0].items():
        np.testing.assert_allclose(fits[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@BOTH
def test_a_checkpoint_goes_on_here(module: Any, tmp_path: Path) -> None:
    ours, theirs = optim.DCTAdam({"lr": 0.1}), module.DCTAdam({"lr": 0.1})
    first = series("w")
    for step in range(3):
        theirs({wavy(first, step)})
    theirs.save(str(tmp_path / "state"))
    ours.load(tmp_path / "state")
    start = first.detach().clone()
    theirs({wavy(first, 3)})
    with torch.no_grad():
        expected = first.clone()
        first.copy_(start)
    ours({wavy(first, 3)})
    assert steps_of(ours, "w") == 4
    torch.testing.assert_close(first.detach(), expected, rtol=1e-5, atol=1e-6)


def test_pyro_reads_the_state() -> None:
    opt, tensor = optim.DCTAdam({"lr": 0.1}), series("w")
    opt({wavy(tensor, 0)})
    theirs = PYRO.DCTAdam({"lr": 0.1})
    theirs.set_state(opt.get_state())
    theirs({wavy(tensor, 1)})
    assert steps_of(theirs, "w") == 2


def test_settings_change_and_the_dimension_stays() -> None:
    opt, tensor = optim.DCTAdam({"lr": 0.1}), series("w")
    opt({wavy(tensor, 0)})
    opt.optim_objs[tensor].param_groups[0]["lr"] = 0.0
    before = tensor.detach().clone()
    opt({wavy(tensor, 1)})
    assert torch.equal(tensor, before)
    assert opt.get_state()["w"]["state"][0]["exp_avg"].shape == (2, 15)


def test_subsamples_are_left_to_pyro() -> None:
    assert isinstance(optim.DCTAdam({"subsample_aware": False}), JointOptim)
    with pytest.raises(ValueError, match="subsample_aware=True"):
        optim.DCTAdam(lambda name: {"subsample_aware": True})({give(param("w"))})
    with pytest.warns(UserWarning, match="no rule for DCTAdam with subsample_aware: Pyro steps"):
        theirs = optim.DCTAdam({"subsample_aware": True})
    assert isinstance(theirs, optim.PyroOptim)
    assert not isinstance(theirs, JointOptim)
    theirs({give(param("w"))})
    with pytest.raises(CheckpointError, match="subsample_aware=True"):
        optim.DCTAdam({}).set_state(theirs.get_state())
