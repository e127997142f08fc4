"""Arrays with gaps, reversed or in mixed orders are walked where they lie: same bits, no copies."""

import subprocess
import sys
import tracemalloc
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import multiopt as mo
from multiopt.step.run import Step
from multiopt_kernels.cpu import boxes as boxes_module
from multiopt_kernels.cpu import group as group_module
from multiopt_kernels.cpu.boxes import AXIS_WORDS, EXTENT, FIRST_AXIS, boxes
from multiopt_kernels.host import HostGroup
from tests.histories import clips, fill
from tests.libraries import NUMPY, assert_equal, engine

#: On both sides of ``chunks.LARGE``, of a block of the kernels, of a square that is transposed in
#: registers, and of a box; with axes of length 1 and without elements.
SHAPES = [(), (1,), (5,), (40,), (1, 1), (3, 4), (1, 6), (17, 9), (2, 1, 3), (3, 1, 1, 2), (0, 3)]
SHAPES += [(2, 3, 4, 2), (20, 18, 19), (70, 130), (9000,), (40, 600), (600, 40), (3000, 3)]
RULES = [mo.Adam(lr=0.1), mo.SGD(lr=0.1, momentum=0.5), mo.SGD(lr=0.1), mo.Adagrad(lr=0.1)]
DTYPES = ["float32", "float64", "float16", "bfloat16"]


@dataclass(frozen=True)
class Strides:
    """A way to lie in memory: the slowest axis first, and by axis the step from one to the next."""

    axes: tuple[int, ...]
    steps: tuple[int, ...]

    def lay(self, x: np.ndarray) -> "Lying":
        """The same numbers in memory of their own, with other numbers around them."""
        # With a step of zero the first element stands for all.
        one: tuple[Any, ...] = tuple(slice(None if step else 1) for step in self.steps)
        x = x[one]
        room = [x.shape[k] * max(abs(self.steps[k]), 1) + 1 for k in self.axes]
        memory = np.full(room, 7, x.dtype)
        between = np.ones(room, bool)
        view, own = (self._part(whole, x.shape) for whole in (memory, between))
        view[...], own[...] = x, False
        return Lying(memory, view, between)

    def _part(self, whole: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The elements of a memory that belong to an array."""
        every: Any = (*(slice(None, None, step or 1) for step in self.steps), ...)
        first: Any = (*map(slice, shape), ...)
        view: np.ndarray = whole.transpose(np.argsort(self.axes))[every][first]
        return view


@dataclass(frozen=True)
class Lying:
    """An array in memory.

    Attributes:
        memory: All of the memory.
        view: The array, with one element along an axis on which all are the same.
        between: Where the memory holds no element.
    """

    memory: np.ndarray
    view: np.ndarray
    between: np.ndarray

    def array(self, library: str, shape: tuple[int, ...]) -> Any:
        """The array in a library."""
        own = zip(self.view.strides, shape, self.view.shape, strict=True)
        strides = [stride if n == m else 0 for stride, n, m in own]
        view = np.lib.stride_tricks.as_strided(self.view, shape, strides)
        if library == "numpy":
            return view
        if view.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(view.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(view)

    def assert_untouched_between(self) -> None:
        assert (self.memory[self.between] == 7).all()


def strides(ndim: int, library: str, least: int) -> st.SearchStrategy[Strides]:
    """Any order of the axes; half of all are dense. torch has no negative strides."""
    steps = [1, 1, 1, 2, 3, *([-1, -2, -3] if library == "numpy" else []), *([0] * (least == 0))]
    drawn = st.tuples(*[st.sampled_from(steps)] * ndim)
    return st.builds(Strides, st.permutations(range(ndim)).map(tuple), st.just((1,) * ndim) | drawn)


def no_copies(many: int = 2**18) -> ExitStack:
    """Where no copies of arrays are lent, and threads are used from ``many`` elements on."""
    stack = ExitStack()
    stack.enter_context(patch.object(HostGroup, "_copied", None))
    stack.enter_context(patch.object(group_module, "MANY", many))
    return stack


def same_step(
    mine: mo.Optimizer,
    plain: mo.Optimizer,
    param: Any,
    expected: np.ndarray,
    given: Any,
    grad: np.ndarray,
) -> None:
    """Take a step on either side, and compare everything."""
    mine.step({"w": param}, {"w": given})
    with engine(NUMPY.engine):
        plain.step({"w": expected}, {"w": grad})
    np.testing.assert_equal(mine.last.norms, plain.last.norms)
    np.testing.assert_equal(mine.last.global_norms, plain.last.global_norms)
    assert mine.last.clipped == plain.last.clipped
    assert mine.last.skipped == plain.last.skipped
    assert_equal(as_numpy(param), expected)
    if "w" in plain.names:
        slots, others = mine.state("w").slots, plain.state("w").slots
        for name, slot in others.items():
            assert_equal(as_numpy(slots[name]), slot, name)


def as_numpy(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        if x.dtype == torch.bfloat16:
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()
    return np.asarray(x)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@given(data=st.data())
def test_a_walk_changes_no_bit(library: str, data: st.DataObject) -> None:
    shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(DTYPES))
    rule, clip = data.draw(st.sampled_from(RULES)), data.draw(clips())
    policy: Any = data.draw(st.sampled_from(["propagate", "skip"]))
    masters, threads = data.draw(st.booleans()), data.draw(st.sampled_from([1, 2]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    mine, plain = (
        mo.Optimizer(rule, clip, master_weights=masters, on_nonfinite=policy, threads=count)
        for count in (threads, 1)
    )
    expected = fill(rng, shape, dtype, "moderate")
    lying = data.draw(strides(len(shape), library, least=1)).lay(expected)
    with no_copies(many=data.draw(st.sampled_from([0, 2**18]))):
        for _ in range(data.draw(st.integers(1, 3))):
            if data.draw(st.booleans()):
                lying = data.draw(strides(len(shape), library, least=1)).lay(expected)
            kind = data.draw(st.sampled_from(["moderate", "special"]))
            way = data.draw(strides(len(shape), library, least=0))
            gradient = way.lay(fill(rng, shape, dtype, kind))
            grad = np.broadcast_to(gradient.view, shape).copy()
            before = gradient.memory.tobytes()
            param, given = lying.array(library, shape), gradient.array(library, shape)
            same_step(mine, plain, param, expected, given, grad)
            lying.assert_untouched_between()
            assert gradient.memory.tobytes() == before


#: A parameter, and a gradient in the same shape: every second element, a corner, backwards, and
#: orders that differ, with two and with three axes.
PAIRS = {
    name: (shape, Strides(*param), Strides(*grad))
    for name, shape, param, grad in (
        ("every second", (9000,), ((0,), (2,)), ((0,), (2,))),
        ("every second both ways", (300, 70), ((0, 1), (2, 2)), ((0, 1), (2, 2))),
        ("backwards", (300, 70), ((0, 1), (-1, -2)), ((0, 1), (2, -1))),
        ("Fortran and C", (133, 700), ((1, 0), (1, 1)), ((0, 1), (1, 1))),
        ("C and Fortran", (1100, 133), ((0, 1), (1, 1)), ((1, 0), (1, 1))),
        ("Fortran with gaps and C", (133, 700), ((1, 0), (3, 2)), ((0, 1), (1, 1))),
        ("channels last and first", (30, 40, 9), ((0, 2, 1), (1, 1, 1)), ((0, 1, 2), (1, 1, 1))),
        ("all axes turned", (30, 19, 90), ((0, 1, 2), (1, 1, 1)), ((2, 1, 0), (1, 1, 1))),
        ("one number for all", (300, 70), ((0, 1), (1, 2)), ((0, 1), (0, 0))),
    )
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pair", PAIRS)
def test_large_arrays_are_walked_by_all_threads(pair: str, threads: int, dtype: str) -> None:
    shape, *ways = PAIRS[pair]
    clip = mo.Clip(global_norm=2.0, value=0.01)
    mine, plain = (mo.Optimizer(mo.Adam(lr=0.1), clip, threads=count) for count in (threads, 1))
    rng = np.random.default_rng(0)
    expected = fill(rng, shape, dtype, "moderate")
    lying = ways[0].lay(expected)
    with no_copies(many=2**10):
        for _ in range(2):
            gradient = ways[1].lay(fill(rng, shape, dtype, "moderate"))
            grad = np.broadcast_to(gradient.view, shape).copy()
            arrays = (x.array("numpy", shape) for x in (lying, gradient))
            param, given = arrays
            same_step(mine, plain, param, expected, given, grad)
    lying.assert_untouched_between()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_clipped_gradients_are_left_where_they_lie(library: str, pair: str, dtype: str) -> None:
    shape, *ways = PAIRS[pair]
    if library == "torch" and min(ways[0].steps + ways[1].steps) < 0:
        pytest.skip("torch has no negative strides")
    rng = np.random.default_rng(0)
    start, grad = (fill(rng, shape, dtype, "moderate") for _ in range(2))
    gradient = ways[1].lay(grad)
    grad = np.broadcast_to(gradient.view, shape).copy()

    def run(param: Any, given: Any) -> list[Any]:
        left: list[Any] = []

        def keep(step: Step) -> None:
            left.extend(clipped for _, _, clipped in step.left_over())

        opt = mo.Optimizer(mo.SGD(lr=0.1), mo.Clip(norm=3.0, value=0.1))
        opt._registry.leave_clipped = True
        arrays = [np.fromiter([array], object, 1) for array in (param, given)]
        opt._registry.step(["w"], arrays[0], arrays[1], keep)
        return left

    repeats = 0 in ways[1].steps
    with patch.object(HostGroup, "_copied", HostGroup._copied if repeats else None):
        left = run(ways[0].lay(start).array(library, shape), gradient.array(library, shape))
    with engine(NUMPY.engine):
        (expected,) = run(start, grad)
    if repeats:
        # Elements share places, so nothing is written there; the caller is given the numbers.
        assert_equal(as_numpy(left[0]), np.asarray(expected))
        assert_equal(as_numpy(gradient.array(library, shape)), grad)
    else:
        assert left == []
        found = as_numpy(gradient.array(library, shape))
        assert_equal(found, np.asarray(expected).astype(found.dtype))
    gradient.assert_untouched_between()


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("pair", ["every second", "every second both ways", "Fortran and C"])
def test_a_walk_needs_no_memory_of_the_size_of_arrays(library: str, pair: str) -> None:
    shape, *ways = PAIRS[pair]
    shape = (1_000_000,) if len(shape) == 1 else (1000, 1000)
    param, grad = (way.lay(np.ones(shape, np.float32)).array(library, shape) for way in ways)
    opt = mo.Optimizer(mo.Adam(), mo.Clip(norm=1.0, value=0.1), on_nonfinite="skip")
    for _ in range(2):
        opt.step({"w": param}, {"w": grad})
    tracemalloc.start()
    try:
        with no_copies():
            opt.step({"w": param}, {"w": grad})
        assert tracemalloc.get_traced_memory()[1] < 4 * 1_000_000 // 16
    finally:
        tracemalloc.stop()


def test_rows_with_and_without_gaps_take_one_step() -> None:
    """They share threads, clips and a clock, in any order; shares begin in any of them."""
    rng = np.random.default_rng(0)
    shapes = {"a": (5,), "b": (70, 80), "c": (9000,), "d": (3, 4), "e": (130, 70), "f": (20_000,)}
    ways = {"b": Strides((1, 0), (1, 1)), "c": Strides((0,), (2,)), "d": Strides((0, 1), (1, 2))}
    start = {name: fill(rng, shape, "float32", "moderate") for name, shape in shapes.items()}
    lying = {name: way.lay(start[name]) for name, way in ways.items()}
    mine, plain = (
        mo.Optimizer(mo.Adam(lr=0.1), mo.Clip(norm=2.0, global_norm=3.0), threads=count)
        for count in (2, 1)
    )
    params = {name: x.copy() for name, x in start.items()}
    params |= {name: x.array("numpy", shapes[name]) for name, x in lying.items()}
    with no_copies(many=0):
        for _ in range(3):
            grads = {
                name: fill(rng, shape, "float32", "moderate") for name, shape in shapes.items()
            }
            names = list(rng.permutation(list(shapes)))
            mine.step({name: params[name] for name in names}, grads)
            with engine(NUMPY.engine):
                plain.step({name: start[name] for name in names}, grads)
            assert mine.last.norms == plain.last.norms
            assert mine.last.global_norms == plain.last.global_norms
    for name, expected in start.items():
        assert_equal(params[name], expected, name)
        assert mine.state(name).step == plain.state(name).step


def test_a_step_that_fails_after_looking_changes_nothing() -> None:
    value = np.arange(12.0).reshape(3, 4)
    lying = Strides((1, 0), (1, 2)).lay(value)
    param = lying.array("numpy", value.shape)
    opt = mo.Optimizer(mo.Adam(), on_nonfinite="raise")
    opt.step({"w": param}, {"w": np.ones((3, 4))})
    before, slots = lying.memory.copy(), opt.state("w").slots
    with pytest.raises(ValueError, match="infinities or NaNs"):
        opt.step({"w": param}, {"w": np.full((3, 4), np.nan)})
    np.testing.assert_array_equal(lying.memory, before)
    for name, slot in opt.state("w").slots.items():
        assert_equal(slot, slots[name])
    plain = mo.Optimizer(mo.Adam(), on_nonfinite="raise")
    with engine(NUMPY.engine):
        plain.step({"w": value}, {"w": np.ones((3, 4))})
        plain.step({"w": value}, {"w": np.ones((3, 4))})
    opt.step({"w": param}, {"w": np.ones((3, 4))})
    assert_equal(param, value)


def test_a_second_loan_in_a_step_leaves_no_address_of_the_first() -> None:
    """The gradient of ``a`` is ``b``, so all is lent again, after slots in Fortran order were."""

    def run(name: str, order: Any) -> list[np.ndarray]:
        rng = np.random.default_rng(0)

        def new() -> np.ndarray:
            return np.array(rng.standard_normal((4, 5)), order=order)

        with engine(name):
            opt, a, b = mo.Optimizer(mo.Adam(lr=0.1)), new(), new()
            opt.step({"a": a, "b": b}, {"a": b, "b": new()})
            for _ in range(3):
                opt.step({"a": a, "b": b}, {"a": new(), "b": new()})
            return [a, b, *opt.state("a").slots.values()]

    for mine, expected in zip(run("compiled", "F"), run(NUMPY.engine, "C"), strict=True):
        assert_equal(mine, expected)


@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    itemsize=st.sampled_from([2, 4, 8]),
)
@example([3162, 3162], None, 4)
def test_boxes_fit_into_their_buffers(sizes: list[int], order: Any, itemsize: int) -> None:
    axes = list(range(len(sizes)))
    if order is None:
        axes.reverse()
    else:
        order.shuffle(axes)
    places = {k: place for place, k in enumerate(axes)}
    grads = [int(np.prod([sizes[j] for j in axes[places[k] + 1 :]])) for k in range(len(sizes))]
    params = [2 * int(np.prod(sizes[k + 1 :])) for k in range(len(sizes))]
    plan = boxes(tuple(sizes), tuple(params), tuple(grads), itemsize)
    extents = plan[FIRST_AXIS:].reshape(-1, AXIS_WORDS)[:, EXTENT]
    assert extents.min() >= 1
    assert extents.prod() * itemsize <= boxes_module.ROOM


#: An array at either end of a page between two that cannot be read. As a gradient it cannot be
#: written.
AT_THE_EDGE = """
import ctypes, mmap, sys
import numpy as np
import multiopt as mo

page, libc = mmap.PAGESIZE, ctypes.CDLL(None)
memory = mmap.mmap(-1, 3 * page)
whole = np.frombuffer(memory, np.uint8)
def protect(number, protection):
    start = ctypes.c_void_p(whole.ctypes.data + number * page)
    assert libc.mprotect(start, ctypes.c_size_t(page), protection) == 0

nothing, to_read, to_write = 0, 1, 3
protect(0, nothing)
protect(2, nothing)
for dtype in ("float16", "float32", "float64"):
    middle = whole[page : 2 * page].view(dtype)
    for n in (1, 15, 16, 17, 31, 32, 33, 64, 200):
        first, last = middle[: 2 * n - 1], middle[-(2 * n - 1) :]
        for param in (first[::2], first[::-2], last[::2], last[::-2]):
            param[...] = 1
            opt = mo.Optimizer(mo.SGD(lr=1.0), mo.Clip(norm=1e9), on_nonfinite="raise")
            opt.step({"w": param}, {"w": np.ones(n, dtype)})
            assert (param == 0).all()
            protect(1, to_read)
            opt.step({"w": np.ones(n, dtype)}, {"w": param})
            protect(1, to_write)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect of Linux")
def test_nothing_is_read_beyond_the_last_element() -> None:
    """Every second element is taken in lines of memory, with the elements in between."""
    subprocess.run([sys.executable, "-c", AT_THE_EDGE], check=True)
