"""Signals in the middle of a call of the drop-in: it is whole or undone."""

import signal
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
import torch._dynamo  # or else a look at state imports it, after which a call takes other opcodes

import multiopt.adapters.pyro as optim
from multiopt.registry import Registry
from tests.faults.signals import handling, hit_once, opcodes, points
from tests.hosts.pyro.tensors import param

Call = Callable[[], None]


def started(scheduled: bool = False) -> tuple[Any, list[torch.Tensor], Call]:
    """An optimizer that has stepped twice, its tensors, and its next call."""
    pyro.clear_param_store()
    args: dict[str, Any] = {"lr": 0.5, "momentum": 0.5}
    if scheduled:
        step = {"optimizer": torch.optim.SGD, "optim_args": args, "step_size": 1}
        opt: Any = optim.StepLR(step)
    else:
        opt = optim.SGD(args)
    tensors = [param("a", size=2), param("b", size=3)]

    def call() -> None:
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        opt(tensors)

    call()
    call()
    return opt, tensors, call


def seen(opt: Any, tensors: list[torch.Tensor]) -> Any:
    state = {
        name: (one["param_groups"], {k: v.tolist() for k, v in one["state"][0].items()})
        for name, one in opt.get_state().items()
    }
    return [tensor.tolist() for tensor in tensors], state


@pytest.mark.usefixtures("steps_alike")
def test_ctrl_c_in_the_middle_of_a_call_leaves_a_whole_step() -> None:
    opt, tensors, call = started()
    before = seen(opt, tensors)
    total = opcodes(call)
    after = seen(opt, tensors)
    outcomes = set()
    for k in points(total, 60):
        opt, tensors, call = started()
        with pytest.raises(KeyboardInterrupt):
            opcodes(call, k)
        steps = opt._core.steps
        assert (seen(opt, tensors), steps) in ((before, 2), (after, 3)), k
        outcomes.add(steps)
    assert outcomes == {2, 3}


def test_a_handler_that_looks_does_not_forget_what_is_being_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opt, tensors, call = started()
    put = Registry.put

    def entered(known: Registry, entries: Any) -> None:
        put(known, entries)
        assert set(opt.get_state()) == {"a", "b"}

    monkeypatch.setattr(Registry, "put", entered)
    tensors.append(param("c", size=1))
    call()
    assert set(opt.get_state()) == {"a", "b", "c"}
    assert tensors[2].tolist() == [-0.5]


CHANGES: dict[str, Callable[[Any, list[torch.Tensor]], object]] = {
    "call": lambda opt, tensors: opt(tensors),
    "delete": lambda opt, tensors: opt.optim_objs.__delitem__(tensors[0]),
    "clear": lambda opt, tensors: opt.optim_objs.clear(),
    "set_state": lambda opt, tensors: opt.set_state(opt.get_state()),
    "load_state_dict": lambda opt, tensors: one(opt, tensors).load_state_dict(
        one(opt, tensors).state_dict()
    ),
    "lr": lambda opt, tensors: one(opt, tensors).param_groups[0].__setitem__("lr", 0.25),
}


def one(opt: Any, tensors: list[torch.Tensor]) -> Any:
    return opt.optim_objs[tensors[0]]


@pytest.mark.parametrize("change", CHANGES)
def test_a_handler_may_not_change_anything_in_the_middle_of_a_call(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, tensors, call = started()
    before = seen(opt, tensors)
    with handling({signal.SIGTERM: lambda *_: CHANGES[change](opt, tensors)}):
        hit_once(monkeypatch, "prepare")
        with pytest.raises(RuntimeError, match="has not ended"):
            call()
    assert seen(opt, tensors) == before
    assert opt.optim_objs.keys() == set(tensors)
    call()
    assert opt._core.steps == 3
    CHANGES[change](opt, tensors)


def test_a_scheduler_does_not_step_in_the_middle_of_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opt, tensors, call = started(scheduled=True)

    def rate() -> list[float]:
        rates: list[float] = opt.optim_objs[tensors[0]].get_last_lr()
        return rates

    with handling({signal.SIGTERM: lambda *_: opt.step()}):
        hit_once(monkeypatch, "prepare")
        with pytest.raises(RuntimeError, match=r"a scheduler's step: .* has not ended"):
            call()
    assert rate() == [0.5]
    opt.step()
    assert rate() == pytest.approx([0.05])


def test_an_interrupt_of_a_load_leaves_all_or_nothing() -> None:
    opt, tensors, _ = started()
    saved = opt.get_state()
    fresh = {
        name: {**state, "state": {0: {"momentum_buffer": 9 * state["state"][0]["momentum_buffer"]}}}
        for name, state in saved.items()
    }

    def load() -> None:
        opt.set_state(fresh)
        opt.optim_objs[tensors[0]], opt.optim_objs[tensors[1]]

    before = seen(opt, tensors)
    total = opcodes(load)
    after = seen(opt, tensors)
    assert after != before
    for k in points(total, 60):
        opt, tensors, _ = started()
        with pytest.raises(KeyboardInterrupt):
            opcodes(load, k)
        load()
        assert seen(opt, tensors) == after, k


def test_a_handler_that_looks_takes_no_loaded_state(monkeypatch: pytest.MonkeyPatch) -> None:
    opt, tensors, call = started()
    opt.set_state({"b": opt.get_state()["b"]})
    with handling({signal.SIGTERM: lambda *_: opt.optim_objs[tensors[1]]}):
        hit_once(monkeypatch, "prepare")
        tensors[0].grad = torch.ones(2)
        opt(tensors[:1])
    assert set(opt._state_waiting_to_be_consumed) == {"b"}
    call()
    assert "momentum_buffer" in opt.optim_objs[tensors[0]].state_dict()["state"][0]
    assert not opt._state_waiting_to_be_consumed


@pytest.mark.parametrize("scheduled", [False, True])
def test_loaded_state_mends_what_a_handler_has_torn(
    scheduled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: Any) -> None:
        raise TimeoutError("the time is up")

    opt, tensors, call = started(scheduled)
    before, state = seen_values(tensors), opt.get_state()
    call()
    expected = seen_values(tensors), opt.get_state()
    opt, tensors, call = started(scheduled)
    with handling({signal.SIGTERM: give_up}):
        hit_once(monkeypatch)
        with pytest.raises(TimeoutError):
            call()
    for refused in (call, opt.get_state):
        with pytest.raises(RuntimeError, match="the time is up"):
            refused()
    # Parameters of before, and the state that belongs to them.
    with torch.no_grad():
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(torch.tensor(values))
    opt.set_state(state)
    call()
    assert (seen_values(tensors), str(opt.get_state())) == (expected[0], str(expected[1]))


def seen_values(tensors: list[torch.Tensor]) -> list[Any]:
    return [tensor.tolist() for tensor in tensors]
