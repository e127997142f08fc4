"""The limit that the memory sets to a step, and the memory that a step needs for itself."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from multiopt.bench.paired import Run, Side
from multiopt.bench.work import Work
from tests.benchmarks.ours import on_numpy, on_torch

__all__ = ["can_measure_peak", "high_water", "peak", "stream"]

#: Linux forgets a process's peak when "5" is written to one of these and shows it in the other.
FORGET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def stream() -> Side:
    """The reads and writes of a step of Adam with next to no arithmetic: a yardstick.

    Three passes in place, ``p += g``, ``m = -m`` and ``v = -v``: they read four arrays and write
    three, each element once, as a step does. Several threads take a part of the arrays each.
    """

    def begin(work: Work, threads: int) -> Run:
        (shape,) = work.shapes
        # Ones, for memory that was never written to is not there yet.
        p, g, m, v = (np.ones(shape, np.float32) for _ in range(4))
        cuts = [shape[0] * i // threads for i in range(threads + 1)]
        pool = ThreadPoolExecutor(threads)

        def passes(begin: int, end: int) -> None:
            np.add(p[begin:end], g[begin:end], out=p[begin:end])
            np.negative(m[begin:end], out=m[begin:end])
            np.negative(v[begin:end], out=v[begin:end])

        def step() -> None:
            if threads == 1:
                passes(0, shape[0])
            else:
                list(pool.map(passes, cuts[:-1], cuts[1:]))

        return Run(step, lambda: {"p": p})

    return Side("stream", begin)


def can_measure_peak() -> bool:
    """Whether this system tells the peak of a single step: Linux does."""
    return FORGET.exists()


def peak(library: str, elements: int, threads: int) -> float:
    """MiB that a step of one array needs beside parameter, gradient and slots, at most.

    To be called in a process of its own, for memory that was freed before would be used first.

    Args:
        library: ``"NumPy"`` or ``"torch"``.
        elements: The size of the array.
        threads: How many threads the step may use.
    """
    side = on_torch() if library == "torch" else on_numpy()
    run = side.begin(Work("", ((elements,),)), threads)
    # These load the kernels and make the slots.
    run.step()
    run.step()
    return high_water(run.step)


def high_water(act: Callable[[], object]) -> float:
    """MiB by which a call exceeds the memory that the process had before, at most."""
    FORGET.write_text("5")
    before = _kib("VmRSS")
    act()
    return (_kib("VmHWM") - before) / 1024


def _kib(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
