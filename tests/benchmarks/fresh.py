"""What needs a process of its own: imports, the first step, the peak of memory, another engine."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

__all__ = ["alone", "checkpoint_peaks", "first_step", "import_times", "peak"]

T = TypeVar("T")

# What a library prints is no result.
ALONE = """
import os, pickle
with os.fdopen(os.dup(1), "wb") as out:
    os.dup2(2, 1)
    pickle.dump(pickle.loads({!r})(), out)
"""

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

PEAK = "from tests.benchmarks.memory import peak; print(peak({!r}, {}, {}))"

CHECKPOINT_PEAKS = "from tests.benchmarks.files import peaks; print(*peaks({!r}, {}))"


def alone(function: Callable[[], T], env: Mapping[str, str] | None = None) -> T:
    """What a function returns in a process of its own.

    What ran before leaves its mark on memory: after other comparisons 1000 tensors step up to a
    fifth slower.

    Args:
        function: Can be pickled, and so can what it returns.
        env: Environment variables beside those of this process.
    """
    result: T = pickle.loads(_output(ALONE.format(pickle.dumps(function)), env))
    return result


def _output(code: str, env: Mapping[str, str] | None = None) -> bytes:
    """What a new Python prints that runs some code."""
    # It imports what this process would.
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        # If Ctrl-C ends this process before it has written the code, that one has nothing to do.
        [sys.executable, "-"],
        input=code.encode(),
        env={**os.environ, **path, **(env or {})},
        stdout=subprocess.PIPE,
        check=True,
        # Ctrl-C comes to this process, which ends that one; it would print a traceback of its own.
        start_new_session=True,
    )
    return done.stdout


def import_times(turns: int) -> tuple[float, float]:
    """Seconds that ``import multiopt`` and ``import numpy`` take, medians of processes in turn."""
    times = [
        [float(_output(IMPORT.format(module))) for module in ("multiopt", "numpy")]
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
            times.append([float(_output(FIRST_STEP, env)) for _ in range(2)])
    cold, cached = zip(*times, strict=True)
    return median(cold), median(cached)


def peak(library: str, elements: int, threads: int) -> float:
    """``memory.peak`` in a process of its own."""
    return float(_output(PEAK.format(library, elements, threads)))


def checkpoint_peaks(library: str, elements: int) -> tuple[float, float]:
    """``files.peaks`` in a process of its own."""
    saving, loading = _output(CHECKPOINT_PEAKS.format(library, elements)).split()
    return float(saving), float(loading)
