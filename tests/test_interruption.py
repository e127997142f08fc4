"""Signals wait in ``uninterrupted``, and the handlers and the system are as before after it."""

import faulthandler
import gc
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from multiopt.interruption import uninterrupted
from tests.signals import handling, opcodes


def raising(*numbers: int) -> None:
    with uninterrupted():
        for number in numbers:
            signal.raise_signal(number)


def test_handlers_run_once_each_when_the_work_is_whole() -> None:
    came: list[int] = []

    def come(number: int, frame: FrameType | None) -> None:
        came.append(number)

    with handling({signal.SIGINT: come, signal.SIGTERM: come}):
        with uninterrupted():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
            assert came == []
        assert came == [signal.SIGINT, signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]


def test_every_handler_runs_whatever_another_raises() -> None:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    with handling({signal.SIGTERM: give_up}):
        with pytest.raises(TimeoutError) as caught:
            raising(signal.SIGINT, signal.SIGTERM)
        assert isinstance(caught.value.__context__, KeyboardInterrupt)


def test_a_context_in_a_context_hands_on_what_came() -> None:
    reached = []

    def work() -> None:
        with uninterrupted():
            raising(signal.SIGINT)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached


def test_signals_without_a_handler_in_python_are_left_alone() -> None:
    with handling({signal.SIGTERM: signal.SIG_IGN}), uninterrupted():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.skipif(not hasattr(faulthandler, "register"), reason="this system has no such thing")
def test_what_the_system_has_for_a_signal_stays(tmp_path: Path) -> None:
    with (tmp_path / "dump").open("w+") as file, handling({signal.SIGUSR1: lambda *_: None}):
        faulthandler.register(signal.SIGUSR1, file, chain=True)
        try:
            with uninterrupted():
                pass
            signal.raise_signal(signal.SIGUSR1)
            assert "test_what_the_system_has" in (tmp_path / "dump").read_text()
        finally:
            faulthandler.unregister(signal.SIGUSR1)


def test_what_a_handler_does_to_handlers_stays() -> None:
    """A second Ctrl-C that is to end a process, for one."""

    def only_once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        came.append(number)

    def work() -> None:
        with uninterrupted():
            pass

    came: list[int] = []
    with handling({signal.SIGINT: only_once, signal.SIGTERM: only_once}):
        for number in (signal.SIGINT, signal.SIGTERM):
            for k in range(1, opcodes(work) + 1):
                signal.signal(signal.SIGINT, only_once)
                opcodes(work, k, number)
                assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN, (number, k)
                assert came.pop() == number


def test_a_second_signal_before_places_are_given_back_leaves_ctrl_c_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    def hit(self: uninterrupted) -> None:
        signal.raise_signal(signal.SIGABRT)

    def work() -> None:
        with uninterrupted():
            pass

    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGABRT
    ends = set()
    with handling(dict.fromkeys(numbers, stop)):
        total = opcodes(work)
        monkeypatch.setattr(uninterrupted, "_restore", hit)
        for k in range(1, total + 1):
            with pytest.raises(TimeoutError):
                opcodes(work, k, signal.SIGTERM)
            ends.add(signal.getsignal(signal.SIGINT) is stop)
            for number in numbers:
                with pytest.raises(TimeoutError):
                    signal.raise_signal(number)
                signal.signal(number, stop)
    assert ends == {False, True}


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_context_leaves_nothing_to_collect(handler: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        with handling({signal.SIGINT: handler}):
            raising()
            gc.collect()
            for _ in range(3):
                raising()
            assert gc.collect() == 0
    finally:
        gc.enable()


def test_other_threads_leave_the_handlers_alone() -> None:
    found: list[Any] = []

    def look() -> None:
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGABRT])
def test_a_signal_on_the_way_in_or_out_leaves_the_handlers_and_the_work_whole(number: int) -> None:
    """Of several handlers, one may have its place again when its signal comes."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    ends = set()
    with handling({signal.SIGTERM: give_up, signal.SIGABRT: give_up}):
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGABRT
        before = [signal.getsignal(number) for number in numbers]

        def work() -> None:
            with uninterrupted():
                done.append("begun")
                done.append("done")

        done: list[str] = []
        for k in range(1, opcodes(work) + 1):
            done.clear()
            with pytest.raises((KeyboardInterrupt, TimeoutError)):
                opcodes(work, k, number)
            assert [signal.getsignal(number) for number in numbers] == before
            ends.add(tuple(done))
    assert ends == {(), ("begun", "done")}
