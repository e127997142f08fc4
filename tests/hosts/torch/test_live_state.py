"""``optimizer.state``: what it shows is live, and what is assigned there counts."""

from collections import defaultdict
from typing import Any

import pytest
import torch

import multiopt as mo
import multiopt.adapters.torch as optim
from tests.hosts.optim_db import CLASSES
from tests.hosts.torch.training import OPTIONS, Pair, give, parameters, same


def adam(steps: int = 2) -> tuple[list[torch.nn.Parameter], optim.Adam]:
    params = parameters("Adam")
    optimizer = optim.Adam(params, lr=0.1)
    for step in range(steps):
        give(params, step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("engine", ["compiled", "blocks", "plain"])
def test_slots_are_those_that_the_next_step_uses(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTIOPT_ENGINE", engine)
    (one, ours), (other, peer) = adam(), adam()
    held = [ours.state[param]["exp_avg"] for param in one]
    before = [slot.clone() for slot in held]
    give(one, 2)
    ours.step()
    if engine == "plain":
        # As on a GPU: a rule that runs as it stands makes new slots.
        held = [ours.state[param]["exp_avg"] for param in one]
    assert not any(map(torch.equal, held, before))
    assert same(held, [ours.state[param]["exp_avg"] for param in one])
    # Written in place, as by an operation of torch.
    for slot in held:
        slot.mul_(0.5)
    give(other, 2)
    peer.step()
    for param in other:
        peer.state[param]["exp_avg"] = peer.state[param]["exp_avg"] / 2
    for params, optimizer in ((one, ours), (other, peer)):
        give(params, 3)
        optimizer.step()
    assert same(one, other)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_assigned_counts_as_in_torch(name: str) -> None:
    pair = Pair(name, OPTIONS[name][-1])
    pair.step(3)
    for params, optimizer in ((pair.mine, pair.ours), (pair.theirs, pair.peer)):
        # One entry, a whole state, that of another parameter, and the clock.
        first = params[0]
        state = optimizer.state[first]
        slot = next(key for key, x in state.items() if isinstance(x, torch.Tensor) and x.ndim)
        state[slot] = state[slot] * 0.5
        optimizer.state[params[1]] = {
            key: x.clone() if isinstance(x, torch.Tensor) else x
            for key, x in optimizer.state[params[1]].items()
        }
        if "step" in pair.peer.state[pair.theirs[0]] and name not in ("ASGD", "NAdam"):
            state["step"] = torch.tensor(7.0)
            assert optimizer.state[first]["step"] == 7
    pair.step(2)
    pair.check()


@pytest.mark.parametrize("first", ["step", "exp_avg"])
def test_entries_may_be_assigned_in_any_order_before_the_first_step(first: str) -> None:
    whole, source = adam(3)
    params = [torch.nn.Parameter(param.detach().clone()) for param in whole]
    other = optim.Adam(params, lr=0.1)
    for param, old in zip(params, whole, strict=True):
        values = dict(source.state[old])
        for key in sorted(values, key=lambda key: key != first):
            other.state[param][key] = values[key]
    for some, optimizer in ((whole, source), (params, other)):
        give(some, 3)
        optimizer.step()
    assert same(whole, params)


@pytest.mark.parametrize(
    ("name", "settings", "slot", "beginning"),
    [
        ("Adagrad", {"initial_accumulator_value": 0.5}, "sum", 0.5),
        ("Rprop", {"lr": 0.25}, "step_size", 0.25),
        ("Adam", {}, "exp_avg", 0.0),
    ],
)
def test_slots_before_the_first_step(
    name: str, settings: dict[str, Any], slot: str, beginning: float
) -> None:
    for assigned in (False, True):
        pair = Pair(name, settings)
        param = pair.mine[0]
        state = pair.ours.state[param]
        assert state["step"] == 0
        assert torch.equal(state[slot], torch.full_like(param, beginning))
        if assigned:
            state[slot] = torch.full_like(param, 3.0)
            assert torch.equal(state[slot], torch.full_like(param, 3.0))
            assert state["step"] == 0
            if name != "Adagrad":
                # torch makes the state of the others at the first step.
                give(pair.theirs, 9)
                peer = getattr(torch.optim, name)(
                    [torch.nn.Parameter(pair.theirs[0].detach().clone())]
                )
                peer.param_groups[0]["params"][0].grad = pair.theirs[0].grad
                peer.step()
                values = {k: torch.zeros_like(v) for k, v in peer.state_dict()["state"][0].items()}
                pair.peer.state[pair.theirs[0]] = values
            pair.peer.state[pair.theirs[0]][slot] = torch.full_like(param, 3.0)
        pair.step(3)
        pair.check()


def test_it_is_a_mapping_of_the_parameters_that_can_have_state() -> None:
    params = parameters("Adam")
    params[2].requires_grad_(False)
    optimizer = optim.Adam(params)
    # Not empty: then torch.distributed.checkpoint would take a step to fill it.
    assert optimizer.state
    assert len(optimizer.state) == 2
    assert [id(param) for param in optimizer.state] == [id(param) for param in params[:2]]
    assert params[0] in optimizer.state
    assert params[2] not in optimizer.state
    assert torch.nn.Parameter(torch.ones(1)) not in optimizer.state
    assert "weight" not in optimizer.state
    assert [id(param) for param, _ in optimizer.state.items()] == list(map(id, params[:2]))
    assert [int(values["step"]) for values in optimizer.state.values()] == [0, 0]
    assert optimizer.state.get(params[0], {})["step"] == 0
    assert list(optimizer.state[params[0]]) == ["step", "exp_avg", "exp_avg_sq"]
    assert len(optimizer.state[params[0]]) == 3
    assert repr(optimizer.state[params[1]]).startswith("{'step': tensor(0.), 'exp_avg': tensor([")
    assert repr(optimizer.state).startswith("{Parameter containing")


def test_a_tensor_of_no_group_has_none() -> None:
    _, optimizer = adam()
    stranger = torch.nn.Parameter(torch.ones(4))
    for use in (
        lambda: optimizer.state[stranger],
        lambda: optimizer.state.__setitem__(stranger, {}),
        lambda: optimizer.state.__delitem__(stranger),
    ):
        with pytest.raises(KeyError, match=r"of shape \(4,\) is in none of the param_groups"):
            use()
    assert optimizer.state.get(stranger) is None


@pytest.mark.parametrize(
    "start_over",
    [
        lambda o, p: o.state.__delitem__(p),
        lambda o, p: o.state.pop(p),
        lambda o, p: o.state[p].clear(),
        lambda o, p: o.state.__setitem__(p, {}),
    ],
    ids=["del", "pop", "clear", "empty"],
)
def test_a_parameter_starts_over(start_over: Any) -> None:
    params, optimizer = adam(3)
    start_over(optimizer, params[0])
    assert [int(optimizer.state[param]["step"]) for param in params] == [0, 3, 3]
    assert not optimizer.state[params[0]]["exp_avg"].any()
    fresh = torch.nn.Parameter(params[0].detach().clone())
    other = optim.Adam([fresh], lr=0.1)
    give(params, 3)
    give([fresh], 3)
    optimizer.step()
    other.step()
    assert torch.equal(params[0], fresh)


@pytest.mark.parametrize("empty", [{}, defaultdict(dict)], ids=["dict", "defaultdict"])
def test_all_of_it_is_replaced(empty: Any) -> None:
    params, optimizer = adam(3)
    optimizer.state = empty
    assert [int(optimizer.state[param]["step"]) for param in params] == [0, 0, 0]
    fresh = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = optim.Adam(fresh, lr=0.1)
    for some, one in ((params, optimizer), (fresh, other)):
        give(some, 0)
        one.step()
    assert same(params, fresh)
    optimizer.state = {
        param: dict(other.state[old]) for param, old in zip(params, fresh, strict=True)
    }
    for some, one in ((params, optimizer), (fresh, other)):
        give(some, 1)
        one.step()
    assert same(params, fresh)


def test_all_of_it_is_cleared() -> None:
    params, optimizer = adam(3)
    for param in params:
        optimizer.state[param] = {}
    assert [int(values["step"]) for values in optimizer.state.values()] == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s: s.__setitem__("exp_avg", torch.ones(2)), mo.CheckpointError, r"shape \(2,\)"),
        (lambda s: s.__setitem__("exp_avg", 3.0), mo.CheckpointError, "expected a tensor"),
        (lambda s: s.__setitem__("step", 1.5), mo.CheckpointError, "whole number"),
        (lambda s: s.__setitem__("step", None), mo.CheckpointError, "whole number"),
        (lambda s: s.__setitem__("momentum", 1.5), KeyError, "the state of '0' has no 'momentum'"),
        (lambda s: s.__delitem__("exp_avg"), TypeError, "the state of '0' needs 'exp_avg'"),
    ],
)
def test_what_does_not_fit_changes_nothing(change: Any, error: type[Exception], words: str) -> None:
    params, optimizer = adam()
    before = {k: x.clone() for k, x in optimizer.state[params[0]].items()}
    with pytest.raises(error, match=words):
        change(optimizer.state[params[0]])
    after = dict(optimizer.state[params[0]])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_state_is_moved_as_trainers_move_it() -> None:
    params, optimizer = adam()
    other, peer = adam()
    # Lightning moves the state of every parameter to a device.
    for param, values in optimizer.state.items():
        optimizer.state[param] = {key: x.to("cpu", copy=True) for key, x in values.items()}
    for some, one in ((params, optimizer), (other, peer)):
        give(some, 2)
        one.step()
    assert same(params, other)


def test_the_clock_is_a_tensor_of_its_own() -> None:
    params, optimizer = adam()
    clock = optimizer.state[params[0]]["step"]
    assert (clock.dtype, clock.shape) == (torch.float32, ())
    give(params, 2)
    optimizer.step()
    assert (int(clock), int(optimizer.state[params[0]]["step"])) == (2, 3)


def test_masters_and_averages_are_shown_and_may_be_assigned() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    sgd = optim.SGD([weight], lr=2.0**-10, master_weights=True, average=mo.Average())
    weight.grad = torch.ones_like(weight)
    sgd.step()
    state = sgd.state[weight]
    assert list(state) == ["step", "master_param", "average", "average_step"]
    assert torch.equal(state["master_param"], torch.full((3,), 1 - 2.0**-10))
    assert torch.equal(sgd.average("0"), state["average"])
    state["average"] = torch.full((3,), 5.0)
    assert torch.equal(sgd.average("0"), torch.full((3,), 5.0))
    # It counts where it rounds to the parameter.
    state["master_param"] = torch.full((3,), 1 + 2.0**-10)
    sgd.step()
    assert torch.equal(sgd.state[weight]["master_param"], torch.ones(3))
