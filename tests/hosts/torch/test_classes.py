"""The classes of torch.optim: signatures, every configuration of torch's database, its errors."""

import warnings
from inspect import Parameter, signature
from typing import Any

import pytest
import torch

import multiopt as mo
import multiopt.adapters.torch as optim
from multiopt.adapters.torch.arguments import Settings
from tests.hosts.optim_db import CLASSES, WITHOUT_RULE, Invalid, invalid, valid
from tests.hosts.torch.training import Pair, give, parameters, same

#: Traces a step of an optimizer by exchanging its state; a step here runs outside of torch.
NOT_OFFERED = {"swap_in_optimizer_params_and_state"}


def test_every_name_of_torch_optim_is_here() -> None:
    assert set(torch.optim.__all__) - NOT_OFFERED == set(optim.__all__)
    for name in optim.__all__:
        own = name in (*CLASSES, "Optimizer")
        assert (getattr(optim, name) is not getattr(torch.optim, name)) == own


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_those_of_torch(name: str) -> None:
    ours = dict(signature(getattr(optim, name).__init__).parameters)
    theirs = signature(getattr(torch.optim, name).__init__).parameters
    settings = ours.pop("settings")
    assert settings.kind is Parameter.VAR_KEYWORD
    shown = [(p.name, p.kind, p.default) for p in ours.values()]
    assert shown == [(p.name, p.kind, p.default) for p in theirs.values()]


@pytest.mark.parametrize("name", CLASSES)
def test_instances_are_optimizers_of_torch_with_its_groups(name: str) -> None:
    pair = Pair(name, {})
    assert isinstance(pair.ours, torch.optim.Optimizer)
    assert pair.ours.defaults == pair.peer.defaults
    groups = zip(pair.ours.param_groups, pair.peer.param_groups, strict=True)
    for ours, theirs in groups:
        assert list(ours) == list(theirs)
        assert {**ours, "params": 0} == {**theirs, "params": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_steps_of_every_valid_configuration(name: str, dtype: torch.dtype) -> None:
    for description, settings in valid(name, in_all_ways=True):
        pair = Pair(name, settings, dtype=dtype)
        start = [param.detach().clone() for param in pair.mine]
        pair.step(6)
        pair.check(f"{name}: {description}")
        assert not any(map(torch.equal, pair.mine, start)), description


def the_error(make: Any, one: Invalid) -> Exception:
    """What a class raises for invalid arguments; warnings count as errors, as in torch's tests."""
    params = one.params
    if params is None:
        params = [torch.nn.Parameter(torch.ones(1, 1))]
    elif isinstance(params, list) and params and isinstance(params[0], dict):
        # Groups are filled with defaults.
        params = [dict(group) for group in params]

    def attempt() -> None:
        optimizer = make(params, **one.settings)
        if one.in_step:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.ones_like(param)
            optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, TypeError, RuntimeError, UserWarning)) as caught:
            attempt()
    return caught.value


@pytest.mark.parametrize("name", CLASSES)
def test_errors_are_those_of_torch(name: str) -> None:
    for one in invalid(name):
        ours = the_error(getattr(optim, name), one)
        theirs = the_error(getattr(torch.optim, name), one)
        assert type(theirs).__name__ == one.error, one.description
        assert (type(ours), str(ours)) == (type(theirs), str(theirs)), one.description


def test_torchs_database_has_as_many_errors_as_ever() -> None:
    assert sum(len(invalid(name)) for name in CLASSES) >= 108


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Adam", {"lr": 0.125, "betas": (0.5, 0.75)}),
        ("AdamW", {"lr": 0.125, "betas": (0.5, 0.75)}),
        ("Adadelta", {"lr": 0.125}),
        ("SGD", {"lr": 0.125, "weight_decay": 0.5}),
        ("Rprop", {"lr": 0.125}),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_hyperparameters_may_be_tensors(
    name: str, plain: dict[str, Any], shape: tuple[int, ...]
) -> None:
    def tensor(value: Any) -> Any:
        return tuple(map(tensor, value)) if isinstance(value, tuple) else torch.full(shape, value)

    one, other = parameters(name), parameters(name)
    tensors = {key: tensor(value) for key, value in plain.items()}
    ours, same_in_numbers = (
        getattr(optim, name)(one, **tensors),
        getattr(optim, name)(other, **plain),
    )
    for step in range(4):
        if step == 2:
            # A scheduler fills the tensor, and the group has the same object still.
            ours.param_groups[0]["lr"].fill_(0.25)
            same_in_numbers.param_groups[0]["lr"] = 0.25
        give(one, step)
        give(other, step)
        ours.step()
        same_in_numbers.step()
    assert same(one, other)
    assert ours.param_groups[0]["lr"] is tensors["lr"]
    assert ours.state_dict()["param_groups"][0]["lr"] is tensors["lr"]


def test_every_setting_of_the_core_is_taken() -> None:
    own = set(signature(mo.Optimizer.__init__).parameters) - {"self", "rule"}
    assert set(Settings.__annotations__) >= own - {"in_place", "leave_clipped"}
    weight = torch.nn.Parameter(torch.ones(2))
    sgd = optim.SGD([weight], lr=1.0, clip=mo.Clip(norm=1.0), on_nonfinite="skip", threads=1)
    weight.grad = torch.tensor([3.0, 4.0])
    sgd.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.4, 0.2]))
    assert sgd.last.norms == {"0": 5.0}


@pytest.mark.parametrize("name", CLASSES)
def test_settings_that_there_are_not_are_refused_as_by_any_function(name: str) -> None:
    params = parameters(name)
    with pytest.raises(TypeError, match=f"{name} got an unexpected keyword argument 'clipp'"):
        getattr(optim, name)(params, clipp=mo.Clip(norm=1.0))
    with pytest.raises(ValueError, match="on_nonfinite"):
        getattr(optim, name)(params, on_nonfinite="ignore")


def test_a_rule_is_a_rule() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    for other in (torch.optim.Adam, mo.Adam, lambda name: mo.Adam(), 0.1, {"lr": 0.1}):
        with pytest.raises(TypeError, match=r"rule must be a rule, such as multiopt.Adam\(\); got"):
            optim.Optimizer([weight], other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rule", [mo.Lion(), mo.LAMB(), mo.AdaBelief(), mo.Adam(amsgrad="corrected"), mo.SGD(lr=0.5)]
)
def test_any_rule_steps_as_in_the_core(rule: mo.Rule) -> None:
    one, other = parameters("Adam"), parameters("Adam")
    ours, core = optim.Optimizer(one, rule), mo.Optimizer(rule)
    for step in range(4):
        give(one, step)
        give(other, step)
        ours.step()
        core.step({str(number): param for number, param in enumerate(other)})
    assert same(one, other)


def test_a_rule_may_have_schedules() -> None:
    schedule = mo.schedules.Linear(1.0, 0.0, 10)
    one, other = parameters("SGD"), parameters("SGD")
    ours, core = optim.Optimizer(one, mo.SGD(lr=schedule)), mo.Optimizer(mo.SGD(lr=schedule))
    for step in range(4):
        give(one, step)
        give(other, step)
        ours.step()
        core.step(dict(zip("abc", other, strict=True)))
    assert same(one, other)
    # A number in the place of the schedule.
    ours.param_groups[0]["lr"] = 0.5
    core.set_hyperparameters(lr=0.5)
    give(one, 9)
    give(other, 9)
    ours.step()
    core.step(dict(zip("abc", other, strict=True)))
    assert same(one, other)


def test_the_classes_without_a_rule_are_said_to_be_torchs() -> None:
    for name in WITHOUT_RULE:
        assert getattr(optim, name) is getattr(torch.optim, name)
