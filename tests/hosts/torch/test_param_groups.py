"""``param_groups`` is what counts: numbers, switches and tensors that are changed there by hand."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import multiopt as mo
import multiopt.adapters.torch as optim
from tests.hosts.optim_db import CLASSES
from tests.hosts.torch.training import OPTIONS, Pair, give, parameters, same


def grouped(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.05}]


#: Every number of every class, and another value of it.
NUMBERS: dict[str, dict[str, Any]] = {
    # torch's uses the others one step late (spec/rules/asgd.md).
    "ASGD": {"weight_decay": 0.2},
    "Adadelta": {"lr": 0.3, "rho": 0.7, "eps": 1e-4, "weight_decay": 0.2},
    "Adafactor": {"lr": 0.3, "beta2_decay": -0.5, "eps": (1e-10, 5.0), "d": 2.0},
    "Adagrad": {"lr": 0.3, "lr_decay": 0.2, "eps": 1e-4, "weight_decay": 0.2},
    "Adam": {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.2},
    "AdamW": {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.2},
    "Adamax": {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.2},
    "Muon": {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.5},
    "NAdam": {"lr": 0.3, "eps": 1e-4, "weight_decay": 0.2},
    "RAdam": {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.2},
    "RMSprop": {"lr": 0.3, "alpha": 0.5, "eps": 1e-4, "weight_decay": 0.2, "momentum": 0.5},
    "Rprop": {"etas": (0.4, 1.5), "step_sizes": (0.05, 0.06)},
    "SGD": {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.2, "dampening": 0.25},
}
CHANGES = [
    pytest.param(name, key, value, id=f"{name}.{key}")
    for name, values in NUMBERS.items()
    for key, value in values.items()
]


@pytest.mark.parametrize(("name", "key", "value"), CHANGES)
def test_a_number_that_is_changed_counts_from_the_next_step_on(
    name: str, key: str, value: Any
) -> None:
    pair = Pair(name, OPTIONS[name][-1], grouped)
    unchanged = Pair(name, OPTIONS[name][-1], grouped)
    for step in range(6):
        if step == 3:
            for optimizer in (pair.ours, pair.peer):
                # As users do, lists among them.
                given = list(value) if isinstance(value, tuple) else value
                optimizer.param_groups[-1][key] = given
        pair.step()
        unchanged.step()
    pair.check()
    assert not same(pair.mine[1:], unchanged.mine[1:])
    assert torch.equal(pair.mine[0], unchanged.mine[0])


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("Adam", "maximize", True),
        ("Adam", "decoupled_weight_decay", True),
        ("SGD", "maximize", True),
        ("SGD", "nesterov", True),
        ("NAdam", "decoupled_weight_decay", False),
        ("RMSprop", "maximize", True),
        ("Muon", "nesterov", True),
        ("Adadelta", "maximize", False),
    ],
)
def test_a_switch_that_is_changed_counts_and_state_stays(name: str, key: str, value: Any) -> None:
    settings = {**OPTIONS[name][-1], "weight_decay": 0.1}
    if name == "SGD":
        settings["dampening"] = 0.0
    pair = Pair(name, settings, grouped)
    pair.step(3)
    for number in (0, 1):
        for optimizer in (pair.ours, pair.peer):
            optimizer.param_groups[number][key] = value
        pair.step(2)
    pair.check()
    assert int(pair.ours.state[pair.mine[0]]["step"]) == 7


def test_a_switch_that_needs_another_slot_starts_it() -> None:
    params = parameters("Adam")
    adam = optim.Adam(grouped(params), lr=0.1)
    for step in range(2):
        give(params, step)
        adam.step()
    adam.param_groups[0]["amsgrad"] = True
    give(params, 2)
    adam.step()
    # torch raises a KeyError. The maximum is that of what comes from here on.
    state = adam.state[params[0]]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])
    assert state["step"] == 3


def test_groups_differ_in_switches_from_the_beginning() -> None:
    def mixed(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[:1], "amsgrad": True, "weight_decay": 0.1},
            {"params": params[1:2], "maximize": True, "betas": (0.5, 0.9)},
            {"params": params[2:], "lr": 0.2},
        ]

    pair = Pair("AdamW", {"lr": 0.1}, mixed)
    pair.step(5)
    pair.check()


@pytest.mark.parametrize(
    "value", [0.25, 1, np.float64(0.25), np.float32(0.25), np.array(0.25), torch.tensor(0.25)]
)
def test_a_rate_may_be_any_number(value: Any) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    sgd = optim.SGD([weight], lr=0.5)
    weight.grad = torch.ones(1)
    sgd.step()
    sgd.param_groups[0]["lr"] = value
    sgd.step()
    assert weight.item() == -0.5 - float(value)
    sgd.step()
    assert weight.item() == -0.5 - 2 * float(value)
    assert sgd.param_groups[0]["lr"] is value


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_a_rate_is_changed_in_place(make: Callable[[float], Any]) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    sgd = optim.SGD([weight], lr=0.5)
    sgd.param_groups[0]["lr"] = rate = make(0.5)
    weight.grad = torch.ones(1)
    sgd.step()
    rate *= 0.5
    sgd.step()
    assert weight.item() == -0.75


BAD = [
    ("lr", -1.0, "Adam: lr must be"),
    ("lr", float("nan"), "Adam: lr must be"),
    ("lr", "fast", "Adam: lr must be"),
    ("lr", None, "Adam: lr must be"),
    ("lr", [0.1, 0.2], "Adam: lr must be"),
    ("betas", (0.9, 1.0), "Adam: betas must be"),
    ("betas", (0.9,), "Adam: betas must be"),
    ("eps", -1e-8, "Adam: eps must be"),
    ("amsgrad", 3, "Adam: amsgrad must be"),
    ("maximize", "yes", "Adam: maximize must be"),
]


@pytest.mark.parametrize("fresh", [True, False], ids=["at first", "later"])
@pytest.mark.parametrize(("key", "value", "words"), BAD)
def test_a_value_out_of_range_is_an_error_that_names_the_group(
    key: str, value: Any, words: str, fresh: bool
) -> None:
    params = parameters("Adam")
    adam = optim.Adam(grouped(params), lr=0.1)
    give(params, 0)
    if not fresh:
        adam.step()
    before = [param.detach().clone() for param in params]
    adam.param_groups[0]["lr"] = 0.2
    good = adam.param_groups[1][key]
    adam.param_groups[1][key] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"param_groups\[1\]: {words}"):
            adam.step()
        assert same(before, params)
    # Once it is mended, everything that was changed counts.
    adam.param_groups[1][key] = good
    adam.step()
    other = parameters("Adam")
    peer = optim.Adam(grouped(other), lr=0.1)
    give(other, 0)
    if not fresh:
        peer.step()
    peer.param_groups[0]["lr"] = 0.2
    peer.step()
    assert same(params, other)


def test_a_missing_setting_is_a_key_error_as_in_torch() -> None:
    pair = Pair("Adam", {})
    pair.step()
    for optimizer in (pair.ours, pair.peer):
        del optimizer.param_groups[0]["eps"]
        with pytest.raises(KeyError, match="eps"):
            optimizer.step()


def test_a_tensor_in_the_place_of_another_has_its_state() -> None:
    params, other = parameters("Adam"), parameters("Adam")
    adam, peer = optim.Adam(params, lr=0.1), optim.Adam(other, lr=0.1)
    for step in range(4):
        if step == 2:
            params[1] = torch.nn.Parameter(params[1].detach().clone())
            adam.param_groups[0]["params"][1] = params[1]
        for some, optimizer in ((params, adam), (other, peer)):
            give(some, step)
            optimizer.step()
    assert same(params, other)
    assert int(adam.state[params[1]]["step"]) == 4


def test_a_tensor_of_another_shape_in_the_place_of_another() -> None:
    params = parameters("Adam")
    adam = optim.Adam(params, lr=0.1)
    give(params, 0)
    adam.step()
    params[1] = torch.nn.Parameter(torch.ones(7, dtype=torch.float64))
    adam.param_groups[0]["params"][1] = params[1]
    give(params, 1)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"'1' has shape \(7,\); expected \(5,\)"):
        adam.step()
    assert same(before, params)
    del adam.state[params[1]]
    adam.step()
    assert [int(adam.state[param]["step"]) for param in params] == [2, 1, 2]


def test_groups_that_are_appended_removed_and_exchanged() -> None:
    pair = Pair("Adam", {"lr": 0.1}, lambda params: params[:1])
    pair.step(2)
    for optimizer, params in ((pair.ours, pair.mine), (pair.peer, pair.theirs)):
        group = {**optimizer.param_groups[0], "params": params[1:2], "lr": 0.3}
        optimizer.param_groups.append(group)
    pair.step(2)
    pair.check()
    for optimizer, params in ((pair.ours, pair.mine), (pair.peer, pair.theirs)):
        optimizer.param_groups[1]["params"].append(params[2])
    pair.step(2)
    pair.check()
    for optimizer in (pair.ours, pair.peer):
        optimizer.param_groups.reverse()
    pair.step(2)
    pair.check()
    for optimizer in (pair.ours, pair.peer):
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups[1:]]
        optimizer.param_groups[0]["lr"] = 0.7
    pair.step(2)
    pair.check()
    assert [int(pair.ours.state[p]["step"]) for p in pair.ours.state] == [10]


def test_a_tensor_that_changes_its_group_has_the_numbers_of_the_other() -> None:
    pair = Pair("SGD", {"lr": 0.1, "momentum": 0.9}, grouped)
    pair.step(2)
    for optimizer in (pair.ours, pair.peer):
        moved = optimizer.param_groups[1]["params"].pop()
        optimizer.param_groups[0]["params"].append(moved)
    pair.step(2)
    pair.check()


def test_a_tensor_that_is_listed_twice_is_an_error() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        sgd = optim.SGD([weight, weight], lr=1.0)
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match="a tensor is in param_groups twice"):
        sgd.step()
    assert weight.tolist() == [0.0, 0.0]
    sgd.param_groups[0]["params"].pop()
    sgd.step()
    assert weight.tolist() == [-1.0, -1.0]


def test_a_group_may_be_empty() -> None:
    pair = Pair("Adam", {}, lambda params: [{"params": []}, {"params": params}])
    pair.step(2)
    pair.check()
    pair.ours.load_state_dict(copy.deepcopy(pair.ours.state_dict()))
    pair.step(2)
    pair.check()


@pytest.mark.parametrize("name", CLASSES)
def test_changes_are_written_into_rows_that_there_are_at_the_same_bits_as_new_ones(
    name: str,
) -> None:
    """A rate that is changed step by step, and an optimizer that is made anew for each."""
    params, other = parameters(name), parameters(name)
    settings = {**OPTIONS[name][-1]}
    ours = getattr(optim, name)(params, **settings)
    state: dict[str, Any] | None = None
    for step, rate in enumerate((0.1, 0.05, 0.025, 0.2)):
        for group in ours.param_groups:
            group["lr"] = rate
        anew = getattr(optim, name)(other, **{**settings, "lr": rate})
        if state is not None:
            state["param_groups"][0]["lr"] = rate
            anew.load_state_dict(state)
        give(params, step)
        give(other, step)
        ours.step()
        anew.step()
        state = copy.deepcopy(anew.state_dict())
    assert same(params, other)


def test_settings_of_a_clip_and_of_an_average_are_by_name() -> None:
    model = torch.nn.Linear(3, 2)
    sgd = optim.SGD(
        model.named_parameters(),
        lr=1.0,
        clip=lambda name: mo.Clip(norm=1.0) if name == "weight" else None,
        average=lambda name: mo.Average() if name == "bias" else None,
    )
    model(torch.ones(3)).sum().mul(100.0).backward()
    sgd.step()
    assert list(sgd.last.norms) == ["weight"]
    assert torch.equal(sgd.average("bias"), model.bias)
    with pytest.raises(KeyError, match="weight"):
        sgd.average("weight")


def test_a_tensor_that_is_added_by_hand_to_a_group_with_names() -> None:
    pair = Pair("Adam", {"lr": 0.1}, lambda params: list(zip("ab", params, strict=False)))
    pair.step(2)
    for optimizer, params in ((pair.ours, pair.mine), (pair.peer, pair.theirs)):
        optimizer.param_groups[0]["params"].append(params[2])
    pair.step(2)
    pair.check()
    assert pair.ours.last.updated == ("a", "b", "2")
    # Not every tensor has a name, so they are found by position.
    other = optim.Adam(parameters("Adam"))
    other.load_state_dict(pair.ours.state_dict())
    assert [int(values["step"]) for values in other.state.values()] == [4, 4, 2]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), -0.0, 0])
def test_a_rate_of_the_only_group_is_checked_too(value: float) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    sgd = optim.SGD([weight], lr=0.5)
    weight.grad = torch.ones(1)
    sgd.step()
    sgd.param_groups[0]["lr"] = value
    if value == 0:
        sgd.step()
    else:
        with pytest.raises(ValueError, match=r"param_groups\[0\]: SGD: lr must be"):
            sgd.step()
    assert weight.item() == 0.5
