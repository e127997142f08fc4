"""Running a kernel: alone and at once, or on several threads.

A kernel is a compiled function ``int f(int64 *result, void *, int64 arguments)`` that takes the
address of a block of int64 arguments, touches nothing of Python, and returns 0: the calling
convention of numba for a function from int64 to int64 that raises nothing.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np

from multiopt_kernels.cpu.object_cache import ObjectCode, linked

__all__ = ["Kernel", "thread_count"]

#: How many threads a process may use at most, for whoever cannot reach the argument.
VARIABLE = "MULTIOPT_NUM_THREADS"

#: What threads share, in the order in which ``_share`` reads it: the next row that nobody took,
#: the status of a row that failed, how many rows there are, the kernel, and where the first row
#: is, how many bytes lie between two, and where the results go.
WORK = ("next", "status", "count", "kernel", "first", "stride", "results")

#: Of OpenMP 5.0: all that the library holds is given back, threads included.
OMP_PAUSE_HARD = 2

#: The process that imported this module, which may use OpenMP. libgomp hangs in a forked child of
#: a process that used it: the child inherits a list of threads, but no thread.
_FIRST_PROCESS = os.getpid()


def thread_count(limit: int | None) -> int:
    """How many threads large work may use.

    They are as many as PyTorch uses, if it is loaded, else as many as the process may run on.

    Args:
        limit: At most so many; no limit if None.

    Returns:
        At least 1, and at most what the environment variable ``MULTIOPT_NUM_THREADS`` says.

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


#: A place for results that nobody reads.
_nobodys = ctypes.c_int64()
_NOWHERE = ctypes.addressof(_nobodys)


class Kernel:
    """A compiled function that can be called."""

    def __init__(self, address: int) -> None:
        """Make it callable.

        Args:
            address: Where it is; the code must stay there.
        """
        self._address = address
        # PYFUNCTYPE holds the GIL. Letting it go takes no time, but getting it back beside a busy
        # Python thread takes a switch interval: 5 ms for a kernel of some 30 us.
        kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        self._call = kind(address)

    def alone(self, arguments: int, result: int = _NOWHERE) -> None:
        """Run it once, here, holding the GIL: for work of microseconds.

        Args:
            arguments: The address of its argument block, which the caller keeps alive.
            result: The address where its result goes, an int64; by default nobody reads it.
        """
        if status := self._call(result, None, arguments):
            raise _failure(status)

    def shared(self, blocks: np.ndarray, threads: int) -> np.ndarray:
        """Run it once for each row, on several threads, the GIL let go: for work of milliseconds.

        A thread that is done with a row takes the next one that nobody took. This returns, or
        raises, when no thread runs the kernel any more.

        Args:
            blocks: An argument block in each row, contiguous; the rows are independent.
            threads: At most so many.

        Returns:
            The result of each row.
        """
        return self.shares(blocks, threads).run()

    def shares(self, blocks: np.ndarray, threads: int) -> "Shares":
        """What ``shared`` is to do: all of it that may fail is done."""
        return Shares(self._address, blocks, threads)


class Shares:
    """Rows for a kernel that wait to be run, once, by some threads.

    Args:
        kernel: The address of the kernel.
        blocks: The blocks that ``Kernel.shared`` takes; they live as long as this object.
        threads: At most so many.
    """

    def __init__(self, kernel: int, blocks: np.ndarray, threads: int) -> None:
        """Make all that running takes."""
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
        self._parallel = _openmp() if self._threads > 1 else None

    def run(self) -> np.ndarray:
        """Run every row; return the result of each."""
        if self._threads <= 1:
            self._share(self._work.ctypes.data)
        elif self._parallel is not None:
            self._parallel(self._share, self._work.ctypes.data, self._threads, 0)
        else:
            _with_helpers(self._work, self._threads - 1)
        if status := self._work[WORK.index("status")]:
            raise _failure(status)
        return self._results


def _failure(status: int) -> RuntimeError:
    """A kernel raises nothing, so this is a fault of ours."""
    return RuntimeError(f"a compiled kernel returned status {status}; expected 0")


def _torch(name: str) -> Any:
    """An attribute of PyTorch; None if PyTorch is not loaded, or not yet as far as that."""
    return getattr(sys.modules.get("torch"), name, None)


def _openmp() -> Callable[..., None] | None:
    """How to run a function on the threads of PyTorch; None if there is no way.

    PyTorch's OpenMP workers spin for milliseconds after each of its own operations. Threads of
    ours would get half a processor beside them.
    """
    if _torch("get_num_threads") is None or os.getpid() != _FIRST_PROCESS:
        return None
    return _gomp_parallel()


@cache
def _gomp_parallel() -> Callable[..., None] | None:
    """The function behind ``#pragma omp parallel``, of that OpenMP library that PyTorch uses."""
    if sys.platform != "linux":
        return None  # no other system was tried
    try:
        # The linker looks the names up in what PyTorch was linked with; NOLOAD loads nothing new.
        library = ctypes.CDLL(_torch("_C").__file__, os.RTLD_NOLOAD)
        parallel, pause = library.GOMP_parallel, library.omp_pause_resource_all
    except (OSError, AttributeError):
        return None
    # A child that is forked inherits the list of this thread's workers, but no worker, and PyTorch
    # would wait for them there for good. OpenMP 5.0 lets them go; they come back when needed.
    os.register_at_fork(before=lambda: pause(OMP_PAUSE_HARD))
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


def _with_helpers(work: np.ndarray, helpers: int) -> None:
    """Share work between this thread and some of the pool."""
    pool = _pool(os.getpid())
    try:
        started = [pool.submit(_help, work) for _ in range(helpers)]
        _help(work)
        for helper in started:
            # A thread that has not begun by now would find nothing to do.
            if not helper.cancel():
                helper.result()
    except BaseException as error:
        # Ctrl-C may end the step, but not before all threads let go of the memory they write.
        _pool.cache_clear()
        pool.shutdown()
        # What was begun is ended. The process ends, or may not have more threads or memory: then
        # this one does the rest.
        _share()(work.ctypes.data)
        if not isinstance(error, RuntimeError | MemoryError):
            raise


def _help(work: np.ndarray) -> None:
    """Take rows until none is left."""
    _share()(work.ctypes.data)


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process: a forked child has none of its parent's. They start when needed."""
    return ThreadPoolExecutor(os.cpu_count(), "multiopt")


@cache
def _share() -> Callable[[int], None]:
    """A compiled function that takes rows of some work until none is left.

    With no Python between the rows, no thread waits for the GIL there. In C::

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
