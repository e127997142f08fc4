"""Checkpoints beside safetensors: the time of a save and of a load, and the memory they need."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from unittest.mock import patch
from weakref import finalize

import numpy as np
from safetensors.numpy import load_file, save_file

import multiopt as mo
from multiopt.bench.paired import Run, Side
from multiopt.bench.sides import ADAM
from multiopt.bench.work import Arrays, Work
from tests.benchmarks.memory import high_water
from tests.benchmarks.peers import tensors

__all__ = ["load", "peaks", "safetensors_load", "safetensors_save", "save"]

#: A file system in memory, where there is one: a disk takes longer than either side.
IN_MEMORY = Path("/dev/shm")


@contextmanager
def unflushed() -> Iterator[None]:
    """Without the flushes to the disk, which safetensors leaves out."""
    with patch.object(os, "fsync"):
        yield


class File:
    """A path in a folder that is there as long as somebody has this."""

    def __init__(self) -> None:
        """Make the folder, not the file."""
        self._folder = mkdtemp(dir=IN_MEMORY if IN_MEMORY.is_dir() else None)
        finalize(self, rmtree, self._folder)

    def __fspath__(self) -> str:
        """The path."""
        return f"{self._folder}/run.safetensors"


def stepped(library: str, work: Work) -> mo.Optimizer:
    """An optimizer of Adam that has taken a step."""
    opt = mo.Optimizer(ADAM)
    if library == "torch":
        opt.step(tensors(work))
    else:
        opt.step(*work.arrays())
    return opt


def slots(opt: mo.Optimizer) -> Arrays:
    """All slots of an optimizer as NumPy arrays, by name and slot."""
    file = mo.Optimizer(ADAM)
    file.load_state_dict(opt.state_dict())
    pending = file.state_dict()["pending"]
    return {
        f"{name}.{slot}": np.asarray(array)
        for name, entry in pending.items()
        for slot, array in entry["slots"].items()
    }


def save(library: str) -> Side:
    """``Optimizer.save``.

    Args:
        library: ``"NumPy"`` or ``"torch"``.
    """

    def begin(work: Work, threads: int) -> Run:
        opt, path = stepped(library, work), File()

        def step() -> None:
            with unflushed():
                opt.save(path)

        def values() -> Arrays:
            its = mo.Optimizer(ADAM)
            its.load(path)
            return slots(its)

        return Run(step, values)

    return Side(f"save, {library}", begin, ("torch",) if library == "torch" else ())


def load(library: str) -> Side:
    """``Optimizer.load``, of state that replaces what is there.

    Args:
        library: ``"NumPy"`` or ``"torch"``.
    """

    def begin(work: Work, threads: int) -> Run:
        opt, path = stepped(library, work), File()
        opt.save(path)
        return Run(partial(opt.load, path), partial(slots, opt))

    return Side(f"load, {library}", begin, ("torch",) if library == "torch" else ())


def safetensors_save() -> Side:
    """``safetensors.numpy.save_file`` of the same arrays."""

    def begin(work: Work, threads: int) -> Run:
        arrays, path = slots(stepped("NumPy", work)), File()
        return Run(partial(save_file, arrays, path), partial(load_file, path))

    return Side("safetensors save_file", begin)


def safetensors_load() -> Side:
    """``safetensors.numpy.load_file`` of the same arrays."""

    def begin(work: Work, threads: int) -> Run:
        loaded, path = slots(stepped("NumPy", work)), File()
        save_file(loaded, path)

        def step() -> None:
            nonlocal loaded
            loaded = load_file(path)

        return Run(step, lambda: loaded)

    return Side("safetensors load_file", begin)


def peaks(library: str, elements: int) -> tuple[float, float]:
    """MiB that a save needs beside the state, and a load beside the arrays it makes, at most.

    To be called in a process of its own, as ``memory.peak``.

    Args:
        library: ``"NumPy"`` or ``"torch"``.
        elements: The size of the parameter; Adam has two slots of as many.
    """
    opt, path = stepped(library, Work("", ((elements,),))), File()
    saving: Callable[[], object] = partial(opt.save, path)
    loading = partial(opt.load, path)
    # They import, and the first load replaces memory of the first step.
    saving()
    loading()
    return high_water(saving), high_water(loading) - 2 * 4 * elements / 2**20
