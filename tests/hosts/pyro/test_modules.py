"""Parameters that are in modules alone: ``module_local_params``, and loops of one's own."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

import multiopt.adapters.pyro as optim
from tests.hosts.pyro.tensors import give, steps_of


class Model(PyroModule):
    """One whose parameters are Pyro's: of others, ``SVI`` fails where they are in modules alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = PyroParam(torch.ones(1), constraints.positive)
        self.inner = PyroModule()
        self.inner.bias = PyroParam(torch.zeros(1))

    def forward(self) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w + self.inner.bias, self.scale), obs=torch.ones(1))


class Network(Model):
    """One with parameters of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(1))
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
        kind: Any = PyroModule
        self.linear = kind[torch.nn.Linear](1, 1)

    def forward(self) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0)).reshape(1)
        loc = self.linear(self.net(w)) + self.shift + self.inner.bias
        pyro.sample("y", dist.Normal(loc, self.scale), obs=torch.ones(1))


@pytest.fixture
def local() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


def trained(opt: Any, steps: int = 3, kind: type[Model] = Model) -> tuple[Model, Any]:
    pyro.set_rng_seed(0)
    model = kind()
    guide = AutoNormal(model)
    svi = SVI(model, guide, opt, Trace_ELBO())
    for _ in range(steps):
        svi.step()
    return model, guide


def test_names_are_those_that_the_store_would_have(tmp_path: Path) -> None:
    in_store = optim.Adam({"lr": 0.1})
    trained(in_store)
    expected = in_store.get_state()
    pyro.clear_param_store()
    asked: list[str] = []

    def settings(name: str) -> dict[str, float]:
        asked.append(name)
        return {"lr": 0.1}

    with pyro.settings.context(module_local_params=True):
        opt = optim.Adam(settings)
        modules = trained(opt)
    state = opt.get_state()
    assert state.keys() == expected.keys()
    assert {"scale", "inner.bias", "AutoNormal.locs.w"} <= state.keys()
    assert {"scale", "inner.bias", "AutoNormal.locs.w"} <= set(asked)
    for name, one in state.items():
        for slot, value in one["state"][0].items():
            assert value.tolist() == pytest.approx(expected[name]["state"][0][slot].tolist())
    assert len(opt.get_state()) == len(expected)
    del modules
    gc.collect()
    assert opt.get_state() == {}


def test_modules_of_every_kind_are_named_as_in_the_store() -> None:
    in_store = optim.Adam({"lr": 0.1})
    modules = trained(in_store, kind=Network)
    expected = in_store.get_state().keys()
    assert {"shift", "net$$$0.weight", "linear.weight", "AutoNormal.scales.w"} <= expected
    pyro.clear_param_store()
    opt = optim.Adam({"lr": 0.1})
    opt.name_by(*modules)
    opt([give(p) for module in modules for p in module.parameters()])
    assert opt.get_state().keys() == expected


@pytest.mark.usefixtures("local")
@pytest.mark.parametrize("how", ["save", "set_state"])
def test_a_run_goes_on_by_the_names_of_modules(how: str, tmp_path: Path) -> None:
    first = optim.Adam({"lr": 0.1})
    modules = trained(first)
    first.save(tmp_path / "opt")
    resumed = optim.Adam({"lr": 0.5})
    if how == "save":
        resumed.load(tmp_path / "opt")
    else:
        resumed.set_state(first.get_state())
    others = trained(resumed, 1)
    assert {steps_of(resumed, name) for name in resumed.get_state()} == {4}
    assert len(resumed.get_state()) == len(first.get_state())
    assert modules is not others


def test_a_loop_of_ones_own_says_its_modules() -> None:
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    opt = optim.SGD(lambda name: {"lr": 0.5 if name == "bias" else 0.25})
    with pytest.raises(ValueError, match=r"has none; pass a dict, or name_by\(module\)"):
        opt([give(a.bias)])
    opt.name_by(a, print)
    opt.name_by(a, b)
    start = [p.item() for p in (a.bias, b.bias, b.weight)]
    opt([give(p) for p in (*a.parameters(), *b.parameters())])
    moved = [p.item() - s for p, s in zip((a.bias, b.bias, b.weight), start, strict=True)]
    assert moved == pytest.approx([-0.5, -0.25, -0.25])
    assert list(opt.get_state()) == ["weight", "bias", "weight (2)", "bias (2)"]


def test_modules_are_not_held() -> None:
    opt, linear = optim.SGD({"lr": 0.5}), torch.nn.Linear(1, 1)
    opt.name_by(linear)
    opt([give(p) for p in linear.parameters()])
    gone = weakref.ref(linear)
    del linear
    gc.collect()
    assert gone() is None
    assert opt.get_state() == {}


def test_without_modules_nobody_is_asked() -> None:
    """A step of SVI whose parameters are in the store looks at no caller."""
    opt = optim.SGD({"lr": 0.5})
    trained(opt, 1)
    assert opt._names._modules == []
