"""How kernels are called: once in the calling thread, or in shares on several threads.

A kernel is a compiled function ``int f(int64 *result, void *, int64 arguments)``. It takes the
address of a block of int64 arguments, touches nothing of Python and returns 0. This is Numba's
calling convention for a function from int64 to int64 that raises nothing.

The threads are PyTorch's own where they can be used, and otherwise a pool. Each takes one share
after the other, in compiled code and without the GIL, until none is left.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, Protocol

import numpy as np

from multiopt_kernels.cpu.object_cache import ObjectCode, linked

__all__ = ["Kernel", "Runnable", "Shares", "thread_count"]

#: The environment variable that limits the threads of a process, for users who cannot reach the
#: argument ``threads``.
VARIABLE = "MULTIOPT_NUM_THREADS"

#: What threads share, in the order in which ``_share`` reads it: the number of the next argument
#: block, the status of a kernel that failed, the number of blocks, the address of the kernel, the
#: address of the first block, the distance of two blocks in bytes, and the address of the results.
WORK = ("next", "status", "count", "kernel", "first", "stride", "results")

#: The argument of OpenMP 5.0 with which the library releases all its resources, threads included.
OMP_PAUSE_HARD = 2

#: The process that imported this module. Only this one uses OpenMP, because libgomp hangs in the
#: forked child of a process that has used it: the child inherits a list of threads, but no threads.
_FIRST_PROCESS = os.getpid()


def thread_count(limit: int | None) -> int:
    """Return how many threads large work may use.

    These are as many as PyTorch uses if it is loaded, and otherwise as many as the processors that
    the process may run on.

    Args:
        limit: The largest number of threads; None for no limit.

    Returns:
        A number between 1 and the limit, which ``MULTIOPT_NUM_THREADS`` may lower.

    Raises:
        ValueError: The variable is not an integer >= 1.
    """
    if get_num_threads := _torch("get_num_threads"):
        count: int = get_num_threads()
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    if limit is not None:
        count = min(count, limit)
    if (bound := os.environ.get(VARIABLE)) is not None:
        if not bound.isdecimal() or int(bound) < 1:
            raise ValueError(f"{VARIABLE} is {bound!r}; expected an integer of at least 1")
        count = min(count, int(bound))
    return max(count, 1)


#: Memory for results that nobody reads.
_nobodys = ctypes.c_int64()
_NOWHERE = ctypes.addressof(_nobodys)


class Kernel:
    """A compiled function that can be called.

    Attributes:
        address: The address of its code.
    """

    def __init__(self, address: int) -> None:
        """Make a compiled function callable.

        Args:
            address: The address of its code, which must stay valid.
        """
        self.address = address
        # With PYFUNCTYPE, the call keeps the GIL. Releasing it would take no time, but getting it
        # back from a busy Python thread takes a switch interval: 5 ms for a kernel of some 30 us.
        kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        self._call = kind(address)

    def alone(self, arguments: int, result: int = _NOWHERE) -> None:
        """Run the kernel once in this thread, holding the GIL: for work of microseconds.

        Args:
            arguments: The address of its argument block, which the caller keeps alive.
            result: The address of an int64 that receives the result; by default nobody reads it.
        """
        if status := self._call(result, None, arguments):
            raise _failure(status)

    def shared(self, blocks: np.ndarray, threads: int) -> np.ndarray:
        """Run the kernel for many argument blocks, on several threads without the GIL.

        This is for work of milliseconds. A thread that is done with a block takes the next one that
        no thread has taken. This returns, or raises, when no thread runs the kernel any more.

        Args:
            blocks: The argument blocks, as the rows of a contiguous array; they are independent.
            threads: The largest number of threads.

        Returns:
            The result for each block.
        """
        return self.shares(blocks, threads).run()

    def shares(self, blocks: np.ndarray, threads: int) -> "Shares":
        """Prepare a call of ``shared``: everything that can fail before the kernel runs is done."""
        return Shares(self.address, blocks, threads)


class Runnable(Protocol):
    """Work that is divided and only has to be run."""

    def run(self) -> Any:
        """Do it."""


class Shares:
    """Argument blocks for which a kernel is to be run by some threads, as often as asked for.

    Args:
        kernel: The address of the kernel.
        blocks: The argument blocks, as ``Kernel.shared`` takes them. This object keeps them alive.
        threads: The largest number of threads.
    """

    def __init__(self, kernel: int, blocks: np.ndarray, threads: int) -> None:
        """Do everything that can fail before the kernel is run."""
        if blocks.dtype != np.int64 or blocks.ndim != 2 or not blocks.flags.c_contiguous:
            raise ValueError(
                f"blocks are {blocks.dtype} of shape {blocks.shape} and strides {blocks.strides}; "
                "expected contiguous rows of int64"
            )
        count, stride = len(blocks), blocks.strides[0]
        self._blocks, self._results = blocks, np.empty(count, np.int64)
        first, result = blocks.ctypes.data, self._results.ctypes.data
        # In the order of WORK.
        self._work = np.array([0, 0, count, kernel, first, stride, result], np.int64)
        self._threads = min(threads, count)
        self._share = _share()

    def run(self) -> np.ndarray:
        """Run the kernel for every block, and return the results, which the next run overwrites."""
        self._work[: WORK.index("count")] = 0
        if self._threads <= 1:
            self._share(self._work.ctypes.data)
        # Asked for each time, because a forked child that runs this again has no such threads.
        elif (parallel := _openmp()) is not None:
            parallel(self._share, self._work.ctypes.data, self._threads, 0)
        else:
            _with_helpers(self._work, self._threads - 1)
        if status := self._work[WORK.index("status")]:
            raise _failure(status)
        return self._results


def _failure(status: int) -> RuntimeError:
    """Make an error for the status of a kernel. Kernels raise nothing, so this is a bug of ours."""
    return RuntimeError(f"a compiled kernel returned status {status}; expected 0")


def _torch(name: str) -> Any:
    """An attribute of the module torch; None if it is not loaded, or not loaded completely."""
    return getattr(sys.modules.get("torch"), name, None)


def _openmp() -> Callable[..., None] | None:
    """Return a function that runs another on PyTorch's threads; None if there is none.

    PyTorch's OpenMP workers spin for milliseconds after each of its own operations. Other threads
    would get only half of a processor while they do.
    """
    if _torch("get_num_threads") is None or os.getpid() != _FIRST_PROCESS:
        return None
    return _gomp_parallel()


@cache
def _gomp_parallel() -> Callable[..., None] | None:
    """The function behind ``#pragma omp parallel``, from the OpenMP library that PyTorch uses."""
    if sys.platform != "linux":
        return None  # no other system was tried
    try:
        # The names are looked up in the libraries that PyTorch is linked with. NOLOAD makes sure
        # that no other library is loaded.
        library = ctypes.CDLL(_torch("_C").__file__, os.RTLD_NOLOAD)
        parallel, pause = library.GOMP_parallel, library.omp_pause_resource_all
    except (OSError, AttributeError):
        return None
    # A forked child inherits the list of this thread's workers, but no workers, and PyTorch would
    # wait for them there forever. So they are released before a fork; they come back when needed.
    os.register_at_fork(before=lambda: pause(OMP_PAUSE_HARD))
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


def _with_helpers(work: np.ndarray, helpers: int) -> None:
    """Share work between this thread and some threads of the pool."""
    pool = _pool(os.getpid())
    try:
        started = [pool.submit(_help, work) for _ in range(helpers)]
        _help(work)
        for helper in started:
            # A thread that has not begun by now would find nothing left to do.
            if not helper.cancel():
                helper.result()
    except BaseException as error:
        # Ctrl-C may end the step, but only when no thread writes to its memory any more.
        _pool.cache_clear()
        pool.shutdown()
        # Work that was begun is completed by this thread. A RuntimeError or MemoryError means that
        # the process is ending, or cannot have more threads or memory, and is no error of the step.
        _share()(work.ctypes.data)
        if not isinstance(error, RuntimeError | MemoryError):
            raise


def _help(work: np.ndarray) -> None:
    """Take argument blocks until none is left."""
    _share()(work.ctypes.data)


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The pool of a process. Its threads start when needed; a forked child needs its own."""
    return ThreadPoolExecutor(os.cpu_count(), "multiopt")


@cache
def _share() -> Callable[[int], None]:
    """Compile the function with which a thread takes argument blocks until none is left.

    There is no Python between two blocks, so no thread waits for the GIL there. In C::

        void share(int64 *work) {
            while ((row = atomic_add(&work->next, 1)) < work->count) {
                status = work->kernel(
                    work->results + 8 * row, NULL, work->first + work->stride * row);
                if (status) work->status = status;
            }
        }
    """
    from llvmlite import binding, ir

    integer, status = ir.IntType(64), ir.IntType(32)
    module = ir.Module()
    share = ir.Function(module, ir.FunctionType(ir.VoidType(), [integer]), "share")
    entry, take, run, failed, done = map(
        share.append_basic_block, ("entry", "take", "run", "failed", "done")
    )
    build = ir.IRBuilder(entry)
    at = build.inttoptr(share.args[0], integer.as_pointer())
    place = {name: build.gep(at, [integer(i)]) for i, name in enumerate(WORK)}
    count, kernel, first, stride, results = (build.load(place[name]) for name in WORK[2:])
    signature = ir.FunctionType(status, [integer] * 3)
    kernel = build.inttoptr(kernel, signature.as_pointer())
    build.branch(take)

    build.position_at_end(take)
    row = build.atomic_rmw("add", place["next"], integer(1), "monotonic")
    build.cbranch(build.icmp_signed("<", row, count), run, done)

    build.position_at_end(run)
    result = build.add(results, build.mul(row, integer(8)))
    arguments = build.add(first, build.mul(row, stride))
    returned = build.call(kernel, [result, integer(0), arguments])
    build.cbranch(build.icmp_signed("!=", returned, status(0)), failed, take)

    build.position_at_end(failed)
    build.store(build.sext(returned, integer), place["status"])
    build.branch(take)

    build.position_at_end(done)
    build.ret_void()

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    module.triple = target.triple
    compiled = target.create_target_machine().emit_object(binding.parse_assembly(str(module)))
    address = linked(ObjectCode({"share": "share"}, (compiled,)))["share"]
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)
