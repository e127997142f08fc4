"""Signals at every point of what the library does, and what handles them."""

import contextlib
import dis
import gc
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import pytest
import torch

import multiopt as mo
import multiopt_numpy
from multiopt_kernels.cpu.group import CompiledGroup

#: Where interrupts come: the library, and what stands between its functions.
OURS = (
    str(Path(mo.__file__).parent),
    str(Path(multiopt_numpy.__file__).parent.parent / "multiopt_"),
    str(Path(torch.__file__).parent / "_dynamo"),
    contextlib.__file__,
)

#: Opcodes that only return, before which no handler runs.
RETURNS = {number for name, number in dis.opmap.items() if name.startswith("RETURN")}


def opcodes(
    action: Callable[[], object], hit: float = float("inf"), number: int = signal.SIGINT
) -> int:
    """Run an action, a signal before the opcode of that place; how many there were until then."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] not in RETURNS:
            count += 1
            if count == hit:
                sys.settrace(None)
                signal.raise_signal(number)
        return trace

    before = sys.gettrace()
    # A collection runs finalizers, in which an interrupt gets lost.
    gc.disable()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def points(total: int, few: int) -> list[int]:
    """Where it fails: everywhere in a thorough run, else at some points, the most at the end."""
    if hypothesis.settings().max_examples >= 1000:
        return list(range(1, total + 1))
    return sorted({total - (total - 1) * i**3 // few**3 for i in range(few + 1)})


@contextlib.contextmanager
def handling(handlers: dict[int, Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hit_once(monkeypatch: pytest.MonkeyPatch, method: str = "run") -> None:
    """Let SIGTERM come right before the next call of a method of a compiled group, once."""
    real = getattr(CompiledGroup, method)

    def hit(self: CompiledGroup, *arguments: Any) -> Any:
        monkeypatch.setattr(CompiledGroup, method, real)
        signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(CompiledGroup, method, hit)
