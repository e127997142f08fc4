"""Ctrl-C waits while an optimizer writes; what another handler raises there is not hidden."""

import gc
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import multiopt as mo
from multiopt.guard import Guard
from tests.faults.signals import handling, hit_once, opcodes


def interrupting(guard: Guard) -> None:
    with guard:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_waits_and_comes_once() -> None:
    came: list[int] = []
    guard = Guard()
    with handling({signal.SIGINT: lambda number, _: came.append(number)}):
        with guard:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert came == []
        assert came == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT] * 2
    with pytest.raises(KeyboardInterrupt):
        interrupting(guard)
    with guard:
        pass
    assert guard.torn is None


def test_other_handlers_run_at_once() -> None:
    came: list[int] = []
    with handling({signal.SIGTERM: lambda number, _: came.append(number)}), Guard():
        signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM]


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    with handling({signal.SIGINT: signal.SIG_IGN}), Guard():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)


def test_other_threads_leave_the_handler_alone() -> None:
    found: list[Any] = []

    def look() -> None:
        with Guard():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_ctrl_c_on_the_way_in_or_out_leaves_the_handler_and_the_work_whole() -> None:
    guard, done, ends = Guard(), list[str](), set()
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with guard:
            done.append("begun")
            done.append("done")

    for k in range(1, opcodes(work) + 1):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            opcodes(work, k)
        assert signal.getsignal(signal.SIGINT) == before, k
        assert guard.torn is None
        ends.add(tuple(done))
    assert ends == {(), ("begun", "done")}


@pytest.mark.parametrize("again", [False, True])
def test_what_a_handler_raises_on_the_way_in_or_out_leaves_ctrl_c_alive(again: bool) -> None:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    def work() -> None:
        guard.check("work")
        with guard:
            pass

    guard, before = Guard(), signal.getsignal(signal.SIGINT)
    with handling({signal.SIGTERM: give_up}):
        for k in range(1, opcodes(work) + 1):
            guard = Guard()
            with pytest.raises(TimeoutError):
                opcodes(work, k, signal.SIGTERM)
            guard.torn = None
            if again:
                # What cleans up may write too.
                with guard:
                    pass
            work()
            assert signal.getsignal(signal.SIGINT) == before, k


def test_a_guard_leaves_nothing_to_collect() -> None:
    guard = Guard()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                interrupting(guard)
        with guard:
            pass
        gc.collect()
        for _ in range(3):
            with guard:
                pass
        assert gc.collect() == 0
    finally:
        gc.enable()


# What is torn


def torn(monkeypatch: pytest.MonkeyPatch) -> tuple[mo.Optimizer, dict[str, Any], dict[str, Any]]:
    """An optimizer that a handler has torn, its parameters, and the state of before."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the time is up")

    opt = mo.Optimizer(mo.Adam(lr=0.5))
    params, grads = {"a": np.ones(2), "b": np.ones(3)}, {"a": np.ones(2), "b": np.ones(3)}
    opt.step(params, grads)
    state = opt.state_dict()
    with handling({signal.SIGTERM: give_up}):
        hit_once(monkeypatch)
        with pytest.raises(TimeoutError) as caught:
            opt.step(params, grads)
    assert caught.value.__notes__ == [
        "multiopt: the step was writing when this was raised; load an earlier state"
    ]
    return opt, params, state


REFUSED: dict[str, Callable[[mo.Optimizer], object]] = {
    "step": lambda opt: opt.step({"a": np.ones(2)}, {"a": np.ones(2)}),
    "forget": lambda opt: opt.forget("a"),
    "rename": lambda opt: opt.rename({"a": "c"}),
    "set_hyperparameters": lambda opt: opt.set_hyperparameters(lr=0.1),
    "rule": lambda opt: setattr(opt, "rule", mo.SGD()),
    "clip": lambda opt: setattr(opt, "clip", None),
    "state": lambda opt: opt.state("a"),
    "average": lambda opt: opt.average("a"),
    "state_dict": lambda opt: opt.state_dict(),
    "save": lambda opt: opt.save("nowhere"),
    "copy": lambda opt: opt.__copy__(),
}


@pytest.mark.parametrize("method", REFUSED)
def test_what_is_torn_says_so(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, _, _ = torn(monkeypatch)
    with pytest.raises(
        RuntimeError, match=rf"^{method}: TimeoutError\('the time is up'\) was raised"
    ):
        REFUSED[method](opt)


def test_a_load_of_everything_mends_what_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, params, state = torn(monkeypatch)
    with pytest.raises(RuntimeError, match="load of some names"):
        opt.load_state_dict(state, names="a")
    assert opt.names == ("a", "b")
    opt.load_state_dict(state)
    assert opt.state("a").step == opt.state("b").step == 1
    opt.step(params, {"a": np.ones(2)})
    opt.save(tmp_path / "state")
    other, _, _ = torn(monkeypatch)
    other.load(tmp_path / "state")
    assert other.state("a").step == 2
