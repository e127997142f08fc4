"""Every row of some work runs exactly once, whoever runs it and whatever happens meanwhile."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from llvmlite import ir

from multiopt_kernels.cpu import team
from multiopt_kernels.cpu.object_cache import linked
from multiopt_kernels.cpu.team import Kernel, thread_count
from tests.engines.machine_code import compiled, run

INTEGER = ir.IntType(64)
#: What the kernels read and write in their block, by position.
VALUE, RUNS, STATUS, SPINS = range(4)
#: Spins for some seconds, in which any thread gets its turn; waited out only where a test fails.
LONG = 2_000_000_000


def cell(build: ir.IRBuilder, block: ir.Value, position: int) -> ir.Value:
    return build.gep(build.inttoptr(block, INTEGER.as_pointer()), [INTEGER(position)])


@cache
def counting() -> Kernel:
    """Counts its runs in the block, SPINS times over; the result is VALUE, the status STATUS."""

    def body(build: ir.IRBuilder, kernel: ir.Function) -> None:
        result, _, block = kernel.args
        value, runs, status, spins = (cell(build, block, i) for i in range(4))
        build.store(build.load(value), build.inttoptr(result, INTEGER.as_pointer()))
        again, done = kernel.append_basic_block(), kernel.append_basic_block()
        build.branch(again)
        build.position_at_end(again)
        build.store(build.add(build.load(runs), INTEGER(1)), runs)
        left = build.sub(build.load(spins), INTEGER(1))
        build.store(left, spins)
        build.cbranch(build.icmp_signed(">", left, INTEGER(0)), again, done)
        build.position_at_end(done)
        build.ret(build.trunc(build.load(status), ir.IntType(32)))

    return Kernel(linked(compiled("counting", body))["counting"])


@cache
def meeting() -> Kernel:
    """Counts in the cell at address VALUE and waits, SPINS times, for another to come; did it?"""

    def body(build: ir.IRBuilder, kernel: ir.Function) -> None:
        result, _, block = kernel.args
        spins = cell(build, block, SPINS)
        there = build.inttoptr(build.load(cell(build, block, VALUE)), INTEGER.as_pointer())
        build.atomic_rmw("add", there, INTEGER(1), "seq_cst")
        again, done = kernel.append_basic_block(), kernel.append_basic_block()
        build.branch(again)
        build.position_at_end(again)
        left = build.sub(build.load(spins), INTEGER(1))
        build.store(left, spins)
        came = build.icmp_signed(">=", build.load_atomic(there, "seq_cst", 8), INTEGER(2))
        build.cbranch(build.or_(came, build.icmp_signed("<=", left, INTEGER(0))), done, again)
        build.position_at_end(done)
        build.store(build.zext(came, INTEGER), build.inttoptr(result, INTEGER.as_pointer()))
        build.ret(ir.IntType(32)(0))

    return Kernel(linked(compiled("meeting", body))["meeting"])


def rows(n: int, spins: int = 1) -> np.ndarray:
    blocks = np.zeros((n, 4), np.int64)
    blocks[:, VALUE] = np.arange(n) * 3
    blocks[:, SPINS] = spins
    return blocks


def waiting(n: int, place: np.ndarray, spins: int) -> np.ndarray:
    """Rows for ``meeting``."""
    blocks = rows(n, spins)
    blocks[:, VALUE] = place.ctypes.data
    return blocks


def meets(threads: int) -> bool:
    """Whether two rows run at the same time."""
    place = np.zeros(1, np.int64)
    return bool(meeting().shared(waiting(2, place, LONG if threads > 1 else 1000), threads).all())


def alone(kernel: Kernel, block: np.ndarray) -> int:
    result = np.zeros(1, np.int64)
    kernel.alone(block.ctypes.data, result.ctypes.data)
    return int(result[0])


def pool_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("multiopt")]


@pytest.fixture(params=["torch", "pool"])
def threads_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose threads do the work; other tests loaded PyTorch, so it is hidden where need be."""
    if request.param == "pool":
        monkeypatch.setattr(team, "_openmp", lambda: None)
    elif team._openmp() is None:
        pytest.skip("PyTorch's OpenMP was not found on this system")
    return str(request.param)


# Alone.


def test_alone_runs_once_and_leaves_the_result() -> None:
    block = np.array([7, 0, 0, 1], np.int64)
    assert alone(counting(), block) == 7
    assert block.tolist() == [7, 1, 0, 0]
    block[VALUE] = -(2**62)
    assert alone(counting(), block) == -(2**62)


def test_alone_holds_the_lock_of_the_interpreter_and_shared_does_not() -> None:
    def met_in_python(spins: int, run_row: Callable[[np.ndarray], Any]) -> bool:
        """Whether a Python thread could come to where a kernel waits."""
        place = np.zeros(1, np.int64)
        over = threading.Event()

        def come() -> None:
            while not place[0] and not over.is_set():
                pass
            place[0] = 2

        other = threading.Thread(target=come)
        other.start()
        try:
            return bool(run_row(waiting(1, place, spins)))
        finally:
            over.set()
            other.join()

    assert not met_in_python(10_000_000, lambda row: alone(meeting(), row[0]))
    assert met_in_python(LONG, lambda row: meeting().shared(row, 1).item())


def test_an_error_that_the_kernel_raises_in_python_passes() -> None:
    raising = ctypes.cast(ctypes.pythonapi.PyErr_NoMemory, ctypes.c_void_p).value
    assert raising
    with pytest.raises(MemoryError):
        Kernel(raising).alone(0)


# Shared.


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 100_000])
def test_every_row_runs_exactly_once(threads_of: str, n: int, threads: int) -> None:
    blocks = rows(n)
    for i in range(5):
        blocks[:, SPINS] = 1
        results = counting().shared(blocks, threads)
        assert results.dtype == np.int64
        assert np.array_equal(results, blocks[:, VALUE])
        assert (blocks[:, RUNS] == i + 1).all()


def test_two_threads_run_at_the_same_time(threads_of: str) -> None:
    assert meets(2)
    assert not meets(1)


def test_many_python_threads_at_once(threads_of: str) -> None:
    def one(n: int) -> bool:
        blocks = rows(n, spins=1000)
        results = counting().shared(blocks, 2)
        return bool((blocks[:, RUNS] == 1000).all() and (results == blocks[:, VALUE]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(200)))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failed_row_is_an_error_after_all_rows(threads_of: str, threads: int) -> None:
    blocks = rows(50)
    blocks[20, STATUS] = -1
    with pytest.raises(RuntimeError, match="status -1; expected 0"):
        counting().shared(blocks, threads)
    assert (blocks[:, RUNS] == 1).all()
    with pytest.raises(RuntimeError, match="status -1; expected 0"):
        counting().alone(blocks[20].ctypes.data)


@pytest.mark.parametrize(
    "blocks", [rows(4).astype(np.float64), rows(4)[0], rows(8)[::2], rows(4).T, rows(4)[:, :2]]
)
def test_other_blocks_are_refused(blocks: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected contiguous rows of int64"):
        counting().shared(blocks, 2)


def test_the_pool_works_until_pytorch_lends_its_threads() -> None:
    code = """
from tests.engines.test_team import *
assert "torch" not in sys.modules
assert meets(2) and pool_threads() == ["multiopt_0"]
import torch
if sys.platform == "linux":
    team._pool = None
    assert meets(2)
"""
    assert run(code) == ""


# What may happen meanwhile.


def test_a_pool_that_refuses_leaves_the_work_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(team, "_openmp", lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(ThreadPoolExecutor, "submit", refuse)
        blocks = rows(10)
        counting().shared(blocks, 2)
        assert (blocks[:, RUNS] == 1).all()
    assert meets(2)


def test_work_at_the_end_of_the_process() -> None:
    code = """
import atexit
from tests.engines.test_team import *
def last():
    blocks = rows(10)
    counting().shared(blocks, 2)
    print((blocks[:, RUNS] == 1).all(), meets(1))
atexit.register(last)
assert meets(2)
"""
    assert run(code) == "True False"


def test_an_interrupt_waits_for_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    interrupts = [KeyboardInterrupt()]
    real = team._help

    def helped(work: np.ndarray) -> None:
        if threading.current_thread() is threading.main_thread():
            assert begun.wait(10)
            raise interrupts.pop()
        begun.set()
        time.sleep(0.1)
        real(work)

    monkeypatch.setattr(team, "_openmp", lambda: None)
    blocks = rows(10)
    with monkeypatch.context() as patched:
        patched.setattr(team, "_help", helped)
        with pytest.raises(KeyboardInterrupt):
            counting().shared(blocks, 2)
    assert (blocks[:, RUNS] == 1).all()
    assert meets(2)


@pytest.mark.parametrize("before", ["import torch; torch.ones(10**6) + 1", ""])
def test_a_forked_child_finishes(before: str) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    code = f"""
import signal, warnings
{before}
from tests.engines.test_team import *
warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: a fork beside threads
assert meets(2)
child = os.fork()
if not child:
    signal.alarm(5)
    blocks = rows(10)
    counting().shared(blocks, 2)
    fine = (blocks[:, RUNS] == 1).all() and meets(2) and meets(2) and not meets(1)
    fine = fine and pool_threads() == ["multiopt_0"]
    grandchild = os.fork()
    if not grandchild:
        signal.alarm(5)
        os._exit(0 if meets(2) else 1)
    assert fine and os.waitpid(grandchild, 0)[1] == 0
    sys.exit(0)  # as after a normal end: whoever still waits for a thread would hang
assert os.waitpid(child, 0)[1] == 0
assert meets(2)
"""
    assert run(code) == ""


@pytest.mark.parametrize("parent_too", [False, True])
def test_pytorch_runs_in_a_forked_child(parent_too: bool) -> None:
    """PyTorch's workers, on which steps of NumPy arrays run, stay behind when a process forks."""
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    code = f"""
import os, signal, warnings
import numpy as np, torch
import multiopt as mo
warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: a fork beside threads
torch.set_num_threads(2)
opt, w = mo.Optimizer(mo.SGD(lr=1.0)), np.zeros(1_000_000, np.float32)
for turn in range(3):
    opt.step({{"w": w}}, {{"w": np.ones_like(w)}})
    child = os.fork()
    if not child:
        signal.alarm(20)
        assert torch.ones(1_000_000).add_(1).sum() == 2_000_000
        opt.step({{"w": w}}, {{"w": np.ones_like(w)}})
        os._exit(0 if (w == -2.0 - turn).all() else 1)
    assert os.waitpid(child, 0)[1] == 0, turn
    if {parent_too}:
        torch.ones(1_000_000).add_(1)
"""
    assert run(code) == ""


# How many.


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A PyTorch that uses 5 threads."""
    torch = SimpleNamespace(get_num_threads=lambda: 5)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delenv("MULTIOPT_NUM_THREADS", raising=False)
    return torch


def test_as_many_threads_as_pytorch(torch: SimpleNamespace) -> None:
    assert thread_count(None) == 5
    torch.get_num_threads = lambda: 4
    assert thread_count(None) == 4


def test_without_pytorch_as_many_as_processors(
    torch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 8}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    del torch.get_num_threads  # half imported
    assert thread_count(None) == 3
    monkeypatch.delitem(sys.modules, "torch")
    assert thread_count(None) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert thread_count(None) == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert thread_count(None) == 6


@pytest.mark.parametrize(
    ("limit", "variable", "count"),
    [(None, "3", 3), (None, "9", 5), (2, "3", 2), (4, "3", 3), (4, None, 4), (9, None, 5)],
)
def test_the_least_of_the_bounds_counts(
    torch: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    limit: int | None,
    variable: str | None,
    count: int,
) -> None:
    if variable is not None:
        monkeypatch.setenv("MULTIOPT_NUM_THREADS", variable)
    assert thread_count(limit) == count


def test_one_thread_there_always_is(torch: SimpleNamespace) -> None:
    assert thread_count(0) == 1


@pytest.mark.parametrize("variable", ["0", "-1", "", "two", "1.5", "²"])
def test_another_value_of_the_variable_is_refused(
    torch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("MULTIOPT_NUM_THREADS", variable)
    with pytest.raises(ValueError, match=f"MULTIOPT_NUM_THREADS is '{variable}'; expected an"):
        thread_count(None)
