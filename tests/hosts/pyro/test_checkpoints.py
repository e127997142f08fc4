"""Checkpoints of Pyro's own optimizers, from and to the core."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

import multiopt as mo
import multiopt.adapters.pyro as optim
from multiopt.adapters.pyro.checkpoints import from_pyro, to_pyro
from multiopt.adapters.torch_optim import read, rules_of
from tests.hosts.pyro.tensors import PYRO, RULED, SETTINGS, give, leaf, param, steps_of

STEPS = 9
#: torch's Muon orthogonalizes in bfloat16.
ROUNDED = {"Muon": 1e-2}
DATA = torch.linspace(-1.0, 2.0, 6).reshape(2, 3)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """State is what is tested here, and every engine makes the same: no kernel need be compiled."""
    monkeypatch.setenv("MULTIOPT_ENGINE", "plain")


def model() -> None:
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
        latent = pyro.sample("latent", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(latent, 0.5), obs=DATA)


def guide() -> None:
    loc = pyro.param("loc", torch.zeros(2, 3))
    scale = pyro.param("scale", torch.full((2, 3), 0.5), constraint=constraints.positive)
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
        pyro.sample("latent", dist.Normal(loc, scale))


def by_pyro(optimizer: Any) -> Callable[[int], None]:
    svi = SVI(model, guide, optimizer, Trace_ELBO())

    def step(number: int) -> None:
        pyro.set_rng_seed(number)
        svi.step()

    return step


def by_core(opt: mo.Optimizer) -> Callable[[int], None]:
    def step(number: int) -> None:
        pyro.set_rng_seed(number)
        Trace_ELBO().loss_and_grads(model, guide)
        params = dict(pyro.get_param_store().named_parameters())
        opt.step(params)
        pyro.infer.util.zero_grads(params.values())

    return step


def values() -> dict[str, np.ndarray]:
    return {n: p.detach().numpy().copy() for n, p in pyro.get_param_store().named_parameters()}


def run(*parts: tuple[Callable[[int], None], range]) -> None:
    for step, numbers in parts:
        for number in numbers:
            step(number)


def core_from(path: Path, name: str) -> mo.Optimizer:
    state = from_pyro(read(path), getattr(pyro.optim, name))
    opt = mo.Optimizer(rules_of(state).__getitem__)
    opt.load_state_dict(state)
    return opt


@pytest.mark.parametrize("name", RULED)
def test_svi_goes_over_and_back_as_if_it_had_never_left_pyro(tmp_path: Path, name: str) -> None:
    settings = {**SETTINGS[name], **({"lrd": 0.9} if name == "ClippedAdam" else {})}
    run((by_pyro(getattr(pyro.optim, name)(dict(settings))), range(STEPS)))
    expected = values()
    pyro.clear_param_store()

    theirs = getattr(pyro.optim, name)(dict(settings))
    run((by_pyro(theirs), range(3)))
    theirs.save(str(tmp_path / "theirs"))
    opt = core_from(tmp_path / "theirs", name)
    assert opt.pending == ("loc", "scale")
    run((by_core(opt), range(3, 6)))
    torch.save(to_pyro(opt.state_dict()), tmp_path / "back")
    # The learning rate of the file wins, as in Pyro.
    back = getattr(pyro.optim, name)({**settings, next(iter(settings)): 123.0})
    back.load(str(tmp_path / "back"))
    run((by_pyro(back), range(6, STEPS)))
    for label, value in values().items():
        atol = ROUNDED.get(name, 1e-6)
        np.testing.assert_allclose(value, expected[label], rtol=1e-5, atol=atol, err_msg=label)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", RULED)
def test_from_pyro_and_back_is_the_same_checkpoint(tmp_path: Path, name: str, steps: int) -> None:
    theirs, loc = getattr(pyro.optim, name)(SETTINGS[name]), param("loc", size=(2, 3))
    theirs([loc])
    for _ in range(steps):
        theirs([give(loc)])
    theirs.save(str(tmp_path / "run"))
    opt = core_from(tmp_path / "run", name)
    opt.save(tmp_path / "ours")
    opt.load(tmp_path / "ours")
    (found,) = to_pyro(opt.state_dict()).values()
    (expected,) = theirs.get_state().values()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    kept = {k: v for k, v in expected["state"].get(0, {}).items() if v is not None}
    assert found["state"].get(0, {}).keys() == kept.keys()
    for key, value in kept.items():
        ours = found["state"][0][key]
        assert type(ours) is type(value)
        if key in ("eta", "mu_product"):
            torch.testing.assert_close(ours, value, rtol=1e-6, atol=0)
        else:
            assert np.array_equal(ours, value), key


ARGUMENTS: dict[str, dict[str, Any]] = {
    "ExponentialLR": {"gamma": 0.9},
    "OneCycleLR": {"max_lr": 0.3, "total_steps": 40},
    "MultiStepLR": {"milestones": [2, 4], "gamma": 0.5},
    "ReduceLROnPlateau": {"patience": 0, "factor": 0.5},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_schedule_of_pyro_waits_while_the_core_goes_on(tmp_path: Path, name: str) -> None:
    def made() -> Any:
        settings = {"optimizer": torch.optim.AdamW, "optim_args": {"lr": 0.1}}
        return getattr(pyro.optim, name)({**settings, **ARGUMENTS[name]})

    def scheduled(optimizer: Any) -> Callable[[int], None]:
        step = by_pyro(optimizer)

        def both(number: int) -> None:
            step(number)
            optimizer.step(*([1.0] if name == "ReduceLROnPlateau" else []))

        return both

    whole = made()
    run(
        (scheduled(whole), range(3)), (by_pyro(whole), range(3, 6)), (scheduled(whole), range(6, 9))
    )
    expected, last = values(), whole.get_state()
    pyro.clear_param_store()

    theirs = made()
    run((scheduled(theirs), range(3)))
    theirs.save(str(tmp_path / "theirs"))
    saved = read(tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"schedules of \['loc', 'scale'\]: give the") as caught:
        state = from_pyro(saved, torch.optim.AdamW)
    assert caught[0].filename == __file__
    opt = mo.Optimizer(rules_of(state).__getitem__)
    opt.load_state_dict(state)
    run((by_core(opt), range(3, 6)))
    torch.save(to_pyro(opt.state_dict(), saved), tmp_path / "back")
    back = made()
    back.load(str(tmp_path / "back"))
    run((scheduled(back), range(6, 9)))
    for label, value in values().items():
        np.testing.assert_allclose(value, expected[label], rtol=1e-5, atol=1e-6)
        ours = back.get_state()[label]
        assert ours["scheduler"]["_last_lr"] == last[label]["scheduler"]["_last_lr"]
        assert ours["optimizer"]["param_groups"] == last[label]["optimizer"]["param_groups"]
    # What was lent has not changed.
    assert saved["loc"]["scheduler"] == theirs.get_state()["loc"]["scheduler"]


def test_a_scheduler_needs_a_schedule_for_each_name() -> None:
    opt = mo.Optimizer(mo.SGD())
    opt.step({"loc": np.zeros(2)}, {"loc": np.ones(2)})
    theirs, loc = PYRO.SGD({"lr": 0.1}), param("loc")
    theirs([give(loc)])
    without: dict[str, Any] = {}
    for schedulers in (without, theirs.get_state()):
        with pytest.raises(ValueError, match="parameter 'loc' has no schedule in schedulers"):
            to_pyro(opt.state_dict(), schedulers)


def test_state_without_a_name_is_left_out_with_a_warning() -> None:
    theirs, loc = PYRO.Adam({"lr": 0.1}), param("loc")
    theirs([give(loc)])
    pyro.clear_param_store()
    assert list(theirs.get_state()) == [None]
    with pytest.warns(UserWarning, match="left out a state without a parameter name") as caught:
        state = from_pyro(theirs.get_state(), mo.Adam)
    assert caught[0].filename == __file__
    assert state["entries"] == {}


def test_complex_state_goes_over_and_back(tmp_path: Path) -> None:
    start = torch.ones(3, dtype=torch.complex64)
    loc, whole = leaf(pyro.param("loc", start.clone())), start.requires_grad_()
    theirs, never, back = (PYRO.Adam({"lr": 0.1}) for _ in range(3))
    grads = torch.randn(6, 3, dtype=torch.complex64)

    def give_both(i: int) -> None:
        loc.grad, whole.grad = grads[i].clone(), grads[i].clone()
        never([whole])

    for i in range(2):
        give_both(i)
        theirs([loc])
    state = from_pyro(theirs.get_state(), mo.Adam)
    opt = mo.Optimizer(rules_of(state).__getitem__)
    opt.load_state_dict(state)
    opt.save(tmp_path / "run")
    opt.load(tmp_path / "run")
    (buffer,) = theirs.get_state()["loc"]["state"].values()
    assert torch.equal(to_pyro(opt.state_dict())["loc"]["state"][0]["exp_avg"], buffer["exp_avg"])
    for i in range(2, 4):
        give_both(i)
        opt.step({"loc": loc})
    back.set_state(to_pyro(opt.state_dict()))
    for i in range(4, 6):
        give_both(i)
        back([loc])
    torch.testing.assert_close(loc, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([1, 2], "expected the states of parameters by name; got a list"),
        ({"loc": 3}, "'loc' is not a state of Adam"),
        ({"loc": {"state": {}, "param_groups": []}}, "'loc' is not a state of Adam"),
        (
            {"loc": {"state": {}, "param_groups": [{"lr": 0.1, "momentum": 0.0}]}},
            r"'loc' .* got \['momentum'\] besides and none for \['amsgrad'",
        ),
    ],
)
def test_a_checkpoint_of_another_form_is_refused(states: Any, message: str) -> None:
    with pytest.raises(mo.CheckpointError, match=message):
        from_pyro(states, PYRO.Adam)


def stepped(name: str, steps: int = 3) -> tuple[Any, torch.Tensor]:
    """An optimizer of Pyro after some steps of a matrix of the store."""
    theirs, loc = getattr(pyro.optim, name)(dict(SETTINGS[name])), param("loc", size=(2, 3))
    for _ in range(steps):
        theirs([give(loc)])
    return theirs, loc


@pytest.mark.parametrize("name", sorted({*RULED} - {"SGD", "Muon"}))
def test_state_without_a_clock_is_refused_as_in_pyro(name: str) -> None:
    theirs, loc = stepped(name)
    state = theirs.get_state()
    del state["loc"]["state"][0]["step"]
    with pytest.raises(mo.CheckpointError, match=r"'loc' .* under 'step', .*; got none, beside"):
        from_pyro(state, getattr(pyro.optim, name))
    ours = getattr(optim, name)(dict(SETTINGS[name]))
    with pytest.raises(mo.CheckpointError, match=r"'loc' .* under 'step', .*; got none, beside"):
        ours.set_state(state)
    assert ours.get_state() == {}
    back = getattr(pyro.optim, name)(dict(SETTINGS[name]))
    back.set_state(state)
    with pytest.raises(KeyError):
        back([give(loc)])


@pytest.mark.parametrize("name", ["Adam", "ClippedAdam", "AdagradRMSProp", "SGD"])
@pytest.mark.parametrize("clock", [1.5, -1, float("nan"), True, "3", torch.tensor([1.0, 2.0])])
def test_a_clock_is_a_whole_number(name: str, clock: Any) -> None:
    state = stepped(name)[0].get_state()
    state["loc"]["state"][0]["step"] = clock
    with pytest.raises(mo.CheckpointError, match=r"'loc' .* a whole number up to 2"):
        from_pyro(state, getattr(pyro.optim, name))
    ours = getattr(optim, name)(dict(SETTINGS[name]))
    with pytest.raises(mo.CheckpointError, match=r"'loc' .* a whole number up to 2"):
        ours.set_state(state)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [601, 70_001, 2**24 + 1, 2**53 - 1])
@pytest.mark.parametrize("name", RULED)
def test_clocks_are_whole_whatever_the_default_dtype(
    name: str, steps: int, default: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Through the drop-in, the core and Pyro."""
    theirs, loc = stepped(name)
    state = theirs.get_state()
    state["loc"]["state"][0]["step"] = steps
    request.addfinalizer(partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(default)
    ours = getattr(optim, name)(dict(SETTINGS[name]))
    ours.set_state(state)
    resumed = getattr(optim, name)(dict(SETTINGS[name]))
    resumed.set_state(ours.get_state())
    assert steps_of(resumed, "loc") == steps
    core = from_pyro(resumed.get_state(), getattr(pyro.optim, name))
    assert core["entries"]["loc"]["step"] == steps
    if name in ("SGD", "Muon"):
        return
    back = getattr(pyro.optim, name)(dict(SETTINGS[name]))
    back.set_state(to_pyro(core))
    back([give(loc)])
    assert steps_of(back, "loc") == steps + 1


def test_an_optimizer_without_a_rule_is_refused() -> None:
    for given in (PYRO.SparseAdam, PYRO.ExponentialLR, pyro.optim.PyroOptim):
        with pytest.raises(
            TypeError, match="an optimizer of torch or Pyro that multiopt has a rule"
        ):
            from_pyro({}, given)


def test_a_rule_that_pyro_does_not_have_is_refused() -> None:
    opt = mo.Optimizer(mo.Lion())
    opt.step({"loc": np.zeros(2)}, {"loc": np.ones(2)})
    with pytest.raises(ValueError, match="'loc' has the rule Lion, which Pyro does not have"):
        to_pyro(opt.state_dict())
