"""What saving and loading need in memory, and what names that are gone leave there.

``python -m tests.benchmarks`` measures the memory of the process, on larger arrays.
"""

import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import multiopt as mo
from multiopt.registry import Registry
from multiopt.table import Table
from tests.libraries import JAX, NUMPY, STRICT, TORCH, Library

LIBRARIES = pytest.mark.parametrize("library", [NUMPY, TORCH, JAX, STRICT], ids=lambda one: one.id)
#: Four names of two slots each, of 4 MiB; the buffer of a file that is written, and what is no
#: array: descriptions and messages.
NAMES = ("a", "b", "c", "d")
SLOT, SLOTS, BUFFER, REST = 2**22, 8, 2**20, 2**17


def stepped(library: Library) -> mo.Optimizer:
    opt, ones = mo.Optimizer(mo.Adam()), np.ones(SLOT // 4, np.float32)
    opt.step({n: library.param(ones) for n in NAMES}, {n: library.grad(ones) for n in NAMES})
    return opt


def peak(act: Callable[[], object]) -> int:
    """Bytes beyond those that were there before, at most, of what Python and NumPy allocate."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@LIBRARIES
def test_a_save_copies_one_slot_at_a_time_at_most(tmp_path: Path, library: Library) -> None:
    opt = stepped(library)
    opt.save(tmp_path / "run")  # what is imported then
    # array-api-strict shows nobody its memory.
    copied = SLOT if library is STRICT else 0
    assert peak(lambda: opt.save(tmp_path / "run")) <= copied + BUFFER + REST


@LIBRARIES
def test_a_load_needs_nothing_beside_the_arrays_it_makes(tmp_path: Path, library: Library) -> None:
    opt, path = stepped(library), tmp_path / "run"
    opt.save(path)
    opt.load(path)
    assert SLOTS * SLOT <= peak(lambda: opt.load(path)) <= SLOTS * SLOT + REST
    assert opt.state("a").step == 1


def test_a_load_of_names_not_seen_needs_nothing_beside_the_arrays(tmp_path: Path) -> None:
    path = tmp_path / "run"
    stepped(NUMPY).save(path)
    mo.Optimizer(mo.Adam()).load(path)
    opt = mo.Optimizer(mo.Adam())
    assert SLOTS * SLOT <= peak(lambda: opt.load(path)) <= SLOTS * SLOT + REST
    assert opt.pending == NAMES


def test_names_that_are_not_wanted_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "run"
    stepped(NUMPY).save(path)
    opt = mo.Optimizer(mo.Adam())
    assert 2 * SLOT <= peak(lambda: opt.load(path, names="b")) <= 2 * SLOT + REST


def test_taking_up_pending_state_needs_no_second_copy(tmp_path: Path) -> None:
    path = tmp_path / "run"
    stepped(NUMPY).save(path)
    opt, ones = mo.Optimizer(mo.Adam()), np.ones(SLOT // 4, np.float32)
    opt.load(path)
    params = {name: ones.copy() for name in NAMES}
    assert peak(lambda: opt.step(params, dict.fromkeys(NAMES, ones))) <= SLOT + REST


def some(name: str) -> mo.Average:
    return mo.Average(0.9)


def held_by(opt: mo.Optimizer) -> str:
    """All that an optimizer holds in this process, what it remembers of its last step included."""
    slots = {*Registry.__slots__, *Table.__slots__} - {"__weakref__"}
    return repr([getattr(opt._registry, slot) for slot in sorted(slots)])


@pytest.mark.parametrize("average", [None, mo.Average(), some], ids=str)
@pytest.mark.parametrize("pending", [False, True])
def test_names_that_are_forgotten_or_renamed_leave_nothing(
    tmp_path: Path, average: mo.Average | None, pending: bool
) -> None:
    opt = mo.Optimizer(mo.Adam(), average=average)
    params = {name: np.ones(2) for name in ("forgotten", "renamed", "stays")}
    opt.step(params, {name: np.ones(2) for name in params})
    if pending:
        opt.save(tmp_path / "run")
        opt = mo.Optimizer(mo.Adam(), average=average)
        opt.load(tmp_path / "run")
    opt.forget("forgotten")
    opt.rename({"renamed": "new"})
    # What the last step did is still known after it.
    opt.step({"stays": np.ones(2)}, {"stays": np.ones(2)})
    opt.save(tmp_path / "run")
    for name in (b"forgotten", b"renamed"):
        assert name not in (tmp_path / "run").read_bytes()
        assert name not in pickle.dumps(opt)
        assert name.decode() not in held_by(opt)
