"""What needs a process of its own: imports, the first step, the peak of memory, another engine."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

__all__ = ["alone", "checkpoint_peaks", "first_step", "import_times", "output", "peak"]

T = TypeVar("T")

IMPORT = "from time import perf_counter as now; t = now(); import {}; print(now() - t)"

FIRST_STEP = """
from time import perf_counter as now
import numpy as np
import multiopt as mo
opt = mo.Optimizer(mo.Adam())
params, grads = ({"w": np.ones(10, np.float32)} for _ in range(2))
t = now()
opt.step(params, grads)
print(now() - t)
"""

PEAK = "from multiopt.bench.memory import peak; print(peak({!r}, {}, {}))"

CHECKPOINT_PEAKS = "from multiopt.bench.files import peaks; print(*peaks({!r}, {}))"


def output(arguments: list[str], env: Mapping[str, str] | None = None) -> str:
    """What a new Python with these arguments prints.

    Args:
        arguments: Those after ``python``.
        env: Environment variables beside those of this process.
    """
    # It imports what this process would.
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **path, **(env or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def alone(function: Callable[[], T]) -> T:
    """What a function returns in a process of its own.

    What ran before leaves its mark on memory: after other comparisons 1000 tensors step up to a
    fifth slower.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


def import_times(turns: int) -> tuple[float, float]:
    """Seconds that ``import multiopt`` and ``import numpy`` take, medians of processes in turn."""
    times = [
        [float(output(["-c", IMPORT.format(module)])) for module in ("multiopt", "numpy")]
        for _ in range(turns)
    ]
    ours, numpy = zip(*times, strict=True)
    return median(ours), median(numpy)


def first_step(turns: int) -> tuple[float, float]:
    """Seconds of a process's first step: with nothing in the cache on disk, and with its kernel."""
    times = []
    for _ in range(turns):
        with TemporaryDirectory() as folder:
            env = {"MULTIOPT_CACHE_DIR": str(Path(folder) / "cache")}
            times.append([float(output(["-c", FIRST_STEP], env)) for _ in range(2)])
    cold, cached = zip(*times, strict=True)
    return median(cold), median(cached)


def peak(library: str, elements: int, threads: int) -> float:
    """``memory.peak`` in a process of its own."""
    return float(output(["-c", PEAK.format(library, elements, threads)]))


def checkpoint_peaks(library: str, elements: int) -> tuple[float, float]:
    """``files.peaks`` in a process of its own."""
    saving, loading = output(["-c", CHECKPOINT_PEAKS.format(library, elements)]).split()
    return float(saving), float(loading)
