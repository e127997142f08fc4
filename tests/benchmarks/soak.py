"""A long run: ``python tests/benchmarks/soak.py`` looks whether memory grows. Minutes, not for CI.

Noisy gradients of a quadratic, a checkpoint every 1000 steps, and names that come, are renamed and
are forgotten, none of them ever again. It prints what it holds a hundred times and ends with status
1 if that grew in the second half: the first one has the caches of NumPy, Numba and the allocator.
"""

import argparse
import gc
import os
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from time import perf_counter

import numpy as np

import multiopt as mo

#: Names at any time, and the size of each.
NAMES, SIZE = 20, 10
#: Steps between two checkpoints, and between two changes of the names.
CHECKPOINT, CHANGE = 1000, 50
#: Bytes that the second half may add, by a straight line through what was seen: Python's objects,
#: whose tables grow in leaps, and the process, whose allocator may keep some pages more. One entry
#: that is not let go in every 1000 steps of 1e6 adds ten times as much.
TRACED, RESIDENT = 50_000, 2 * 2**20
SAMPLES = 100

STATM = Path("/proc/self/statm")


def resident() -> int:
    """The memory of this process in bytes; 0 where the system does not tell."""
    if not STATM.exists():
        return 0
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Run:
    """An optimizer, its parameters and the file of its checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path, self.rng, self.numbers = path, np.random.default_rng(0), count()
        self.params: dict[str, np.ndarray] = {}
        # Callables are asked for each name, and no answer may be kept longer than the name.
        self.opt = mo.Optimizer(
            lambda name: mo.Adam(lr=1e-3), mo.Clip(norm=10.0), average=lambda name: mo.Average(0.9)
        )
        self.seconds, self.saves = 0.0, 0
        while len(self.params) < NAMES:
            self.come()

    def come(self) -> None:
        self.params[f"site {next(self.numbers)}"] = self.rng.standard_normal(SIZE)

    def change(self) -> None:
        """One name is forgotten, one comes, one is called otherwise."""
        gone, old = self.rng.choice(list(self.params), 2, replace=False).tolist()
        del self.params[gone]
        self.opt.forget(gone)
        self.come()
        new = f"site {next(self.numbers)}"
        self.params[new] = self.params.pop(old)
        self.opt.rename({old: new})

    def step(self) -> None:
        noise = self.rng.standard_normal((len(self.params), SIZE))
        self.opt.step(
            self.params, {n: w + z for (n, w), z in zip(self.params.items(), noise, strict=True)}
        )

    def checkpoint(self, number: int) -> None:
        """Save, and every other time go back to the file."""
        begin = perf_counter()
        self.opt.save(self.path)
        self.seconds += perf_counter() - begin
        self.saves += 1
        if number % 2:
            self.opt.load(self.path)


def samples(run: Run, steps: int) -> Iterator[tuple[int, int, int]]:
    """Step; now and then the number of the step, Python's objects and the process in bytes."""
    every = max(1, steps // SAMPLES)
    for step in range(1, steps + 1):
        run.step()
        if step % CHANGE == 0:
            run.change()
        if step % CHECKPOINT == 0:
            run.checkpoint(step // CHECKPOINT)
        if step % every == 0:
            gc.collect()
            yield step, tracemalloc.get_traced_memory()[0], resident()


def growth(seen: list[tuple[int, int, int]]) -> tuple[float, float]:
    """Bytes that the second half added, by least squares: Python's objects and the process."""
    steps, *held = np.array(seen[len(seen) // 2 :], float).T
    span = steps[-1] - steps[0]
    traced, process = (np.polyfit(steps, bytes_, 1)[0] * span for bytes_ in held)
    return float(traced), float(process)


def main() -> int:
    parser = argparse.ArgumentParser(description="Look whether memory grows in a long run.")
    parser.add_argument("--steps", type=int, default=1_000_000, help="default 1000000")
    parser.add_argument("--directory", type=Path, help="where the file is; a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        tracemalloc.start()
        run, seen, begin = Run(Path(folder) / "run.safetensors"), [], perf_counter()
        for sample in samples(run, arguments.steps):
            seen.append(sample)
            step, now, held = sample
            print(
                f"{step:>9} steps  {perf_counter() - begin:6.0f} s  "
                f"{now / 1024:9.1f} KiB traced  {held / 2**20:8.2f} MiB resident",
                flush=True,
            )
        left = [file.name for file in Path(folder).iterdir()]
    more_traced, more_resident = growth(seen)
    print(
        f"A save took {run.seconds / max(1, run.saves) * 1e3:.2f} ms, its flushes included. "
        f"The second half added {more_traced:.0f} bytes traced (at most {TRACED}) "
        f"and {more_resident:.0f} resident (at most {RESIDENT}); files: {', '.join(left)}."
    )
    return int(more_traced > TRACED or more_resident > RESIDENT)


if __name__ == "__main__":
    sys.exit(main())
