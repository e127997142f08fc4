"""However arrays lie in memory, a step is the same; if they are dense, it needs no copies."""

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import multiopt as mo
from multiopt.step.run import Step
from multiopt_kernels.host import HostGroup
from tests.histories import clips, fill
from tests.libraries import LIBRARIES, NUMPY, TORCH, Library, assert_equal, engine

COMPILED = next(library for library in LIBRARIES if library.id == "numpy-compiled")
ON_CPU = [library for library in LIBRARIES if library.in_place and not library.needs_cuda]
on_libraries = pytest.mark.parametrize("library", ON_CPU, ids=lambda library: library.id)
on_compiled = pytest.mark.parametrize("library", [COMPILED, TORCH], ids=lambda library: library.id)

#: On both sides of ``chunks.LARGE`` and of a block of the kernels, and with axes of length 1.
SHAPES = [(5,), (1, 1), (3, 4), (1, 6), (2, 1, 3), (3, 1, 1, 2), (2, 3, 4, 2), (70, 65), (0, 3)]
RULES = [mo.Adam(lr=0.1), mo.SGD(lr=0.1, momentum=0.5), mo.SGD(lr=0.1), mo.Adagrad(lr=0.1)]


@dataclass(frozen=True)
class Strides:
    """A way to lie in memory: the slowest axis first, and by axis the step from one to the next."""

    axes: tuple[int, ...]
    steps: tuple[int, ...]

    def lay(self, x: np.ndarray) -> np.ndarray:
        """The same numbers in memory of their own."""
        memory = np.zeros([x.shape[k] * abs(self.steps[k]) for k in self.axes], x.dtype)
        view = memory.transpose(np.argsort(self.axes))
        every: tuple[Any, ...] = tuple(slice(None, None, step) for step in self.steps)
        view = view[..., *every]
        view[...] = x
        return view


def strides(ndim: int) -> st.SearchStrategy[Strides]:
    """Any order of the axes; half of all are dense."""
    dense = st.just((1,) * ndim)
    steps = st.tuples(*[st.sampled_from([1, 1, 2, 3, -1, -2])] * ndim)
    return st.builds(Strides, st.permutations(range(ndim)).map(tuple), dense | steps)


@on_libraries
@given(data=st.data())
def test_a_step_does_not_depend_on_strides(library: Library, data: st.DataObject) -> None:
    shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(library.dtypes))
    rule, clip = data.draw(st.sampled_from(RULES)), data.draw(clips())
    average, masters = data.draw(st.sampled_from([None, mo.Average()])), data.draw(st.booleans())
    policy: Any = data.draw(st.sampled_from(["propagate", "skip"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    mine, plain = (
        mo.Optimizer(rule, clip, average=average, master_weights=masters, on_nonfinite=policy)
        for _ in range(2)
    )
    value = fill(rng, shape, dtype, "moderate")
    expected = {"a": value.copy(), "b": value.copy()}
    params = {name: library.param(value) for name in expected}
    for _ in range(data.draw(st.integers(1, 5))):
        grads, given = {}, {}
        for name in expected:
            kind = data.draw(st.sampled_from(["moderate", "special"]))
            grads[name] = fill(rng, shape, dtype, kind)
            how, other = data.draw(st.tuples(strides(len(shape)), strides(len(shape))))
            # The parameter stays as it is, or lies as its gradient does, or in another way.
            stays, alike = data.draw(st.tuples(st.booleans(), st.booleans()))
            if not stays:
                params[name] = library.param(how.lay(library.numpy(params[name])))
            given[name] = library.grad((how if alike else other).lay(grads[name]))
        mine.step(params, given)
        with engine(NUMPY.engine):
            plain.step(expected, grads)
        assert_equal_norms(mine.last, plain.last)
    for name, value in expected.items():
        assert_equal(library.numpy(params[name]), value, name)
        if name in plain.names:
            assert_same_state(mine, plain, name, library)
            if average is not None:
                assert_equal(library.numpy(mine.average(name)), plain.average(name), name)


def assert_equal_norms(mine: mo.Report, plain: mo.Report) -> None:
    np.testing.assert_equal(mine.norms, plain.norms)
    np.testing.assert_equal(mine.global_norms, plain.global_norms)
    assert mine.clipped == plain.clipped


def assert_same_state(mine: mo.Optimizer, plain: mo.Optimizer, name: str, library: Library) -> None:
    slots, expected = mine.state(name).slots, plain.state(name).slots
    assert slots.keys() == expected.keys()
    for slot, array in expected.items():
        assert_equal(library.numpy(slots[slot]), array, f"{slot} of {name}")


DENSE = {
    "fortran": Strides((1, 0), (1, 1)),
    "permuted": Strides((1, 3, 0, 2), (1, 1, 1, 1)),
    "channels last": Strides((0, 2, 3, 1), (1, 1, 1, 1)),
    "one channel, last": Strides((0, 2, 3, 1), (1, 1, 1, 1)),
}
DENSE_SHAPES = {
    "fortran": (90, 70),
    "permuted": (3, 4, 5, 6),
    "channels last": (20, 30, 4, 5),
    "one channel, last": (20, 1, 4, 5),
}


@on_compiled
@pytest.mark.parametrize("order", DENSE)
@pytest.mark.parametrize("masters", [False, True], ids=["plain", "masters"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_dense_arrays_are_lent_at_first_sight_only(
    library: Library, order: str, masters: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, lay = np.random.default_rng(0), DENSE[order].lay
    value = fill(rng, DENSE_SHAPES[order], dtype, "moderate")
    clip = mo.Clip(norm=1.0, value=0.01)
    mine, plain = (mo.Optimizer(mo.Adam(lr=0.1), clip, master_weights=masters) for _ in range(2))
    param, expected = library.param(lay(value)), value.copy()
    for step in range(3):
        grad = fill(rng, value.shape, dtype, "moderate")
        if step == 1:
            monkeypatch.setattr(HostGroup, "lend", None)
        mine.step({"w": param}, {"w": library.grad(lay(grad))})
        with engine(NUMPY.engine):
            plain.step({"w": expected}, {"w": grad})
    assert_equal(library.numpy(param), expected)
    assert_same_state(mine, plain, "w", library)


@on_libraries
@pytest.mark.parametrize("size", [5, 20])
def test_an_order_may_change(library: Library, size: int) -> None:
    rng, everywhere = np.random.default_rng(0), list(permutations(range(3)))
    mine, plain = (mo.Optimizer(mo.Adam(lr=0.1), mo.Clip(norm=1.0)) for _ in range(2))
    expected = rng.standard_normal((size,) * 3)
    param = library.param(expected)
    for axes in everywhere:
        param = library.param(Strides(axes, (1, 1, 1)).lay(library.numpy(param)))
        for other in (axes, axes, *everywhere):
            grad = rng.standard_normal(expected.shape)
            mine.step({"w": param}, {"w": library.grad(Strides(other, (1, 1, 1)).lay(grad))})
            with engine(NUMPY.engine):
                plain.step({"w": expected}, {"w": grad})
            assert_equal(library.numpy(param), expected, f"parameter {axes}, gradient {other}")
    assert_same_state(mine, plain, "w", library)


def test_the_gradients_of_a_module_whose_channels_come_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 6, 1), torch.nn.Conv2d(6, 5, 3)
    )
    for param in module.parameters():
        if param.ndim == 4:
            param.data = param.data.to(memory_format=torch.channels_last)
    opt = mo.Optimizer(mo.Adam())
    for step in range(3):
        images = torch.randn(2, 1, 8, 8).to(memory_format=torch.channels_last)
        module(images).square().mean().backward()
        if step == 1:
            monkeypatch.setattr(HostGroup, "lend", None)
        opt.step(dict(module.named_parameters()))
    slot = opt.state("0.weight").slots["exp_avg"]
    assert isinstance(slot, torch.Tensor)
    assert slot.shape == (4, 1, 3, 3)


@on_libraries
def test_state_is_in_logical_order(library: Library, tmp_path: Path) -> None:
    """State of a parameter in Fortran order is saved, loaded, read and moved as any other."""
    rng = np.random.default_rng(0)
    values = {"small": (3, 4), "large": (80, 70), "half": (5, 6)}
    start = {
        name: np.asarray(rng.standard_normal(shape), "float16" if name == "half" else "float32")
        for name, shape in values.items()
    }
    lay = DENSE["fortran"].lay

    def run(library: Library, lay: Callable[[np.ndarray], np.ndarray], path: Path) -> Any:
        rng, opts = np.random.default_rng(1), []
        params = {name: library.param(lay(value)) for name, value in start.items()}

        def steps(opt: mo.Optimizer) -> mo.Optimizer:
            for _ in range(3):
                grads = {
                    name: library.grad(lay(np.asarray(rng.standard_normal(x.shape), x.dtype)))
                    for name, x in start.items()
                }
                opt.step(params, grads)
            opts.append(opt)
            return opt

        def new() -> mo.Optimizer:
            return mo.Optimizer(mo.Adam(), average=mo.Average(), master_weights=True)

        steps(new()).save(path)
        resumed = new()
        resumed.load(path)
        steps(resumed)
        moved = new()
        moved.load_state_dict(resumed.state_dict())
        return [*opts, steps(moved)], params

    mine, params = run(library, lay, tmp_path / "mine")
    with engine(NUMPY.engine):
        plain, expected = run(NUMPY, lambda x: x, tmp_path / "plain")
    assert (tmp_path / "mine").read_bytes()[-(80 * 70 * 4) :] == (tmp_path / "plain").read_bytes()[
        -(80 * 70 * 4) :
    ]
    for a, b in zip(mine, plain, strict=True):
        for name in start:
            assert_same_state(a, b, name, library)
            assert_equal(library.numpy(a.average(name)), b.average(name), name)
    for name, value in expected.items():
        assert_equal(library.numpy(params[name]), value, name)


@on_compiled
def test_a_parameter_that_moves_keeps_its_state(library: Library) -> None:
    rng, value = np.random.default_rng(0), np.random.default_rng(1).standard_normal((70, 80))
    mine, plain = mo.Optimizer(mo.Adam()), mo.Optimizer(mo.Adam())
    other = TORCH if library is COMPILED else COMPILED
    param, expected = library.param(DENSE["fortran"].lay(value)), value.copy()
    for where in (library, library, other, other):
        if where is other:
            param = other.param(np.asfortranarray(library.numpy(param)))
            library, other = other, library
        grad = rng.standard_normal(value.shape)
        mine.step({"w": param}, {"w": library.grad(np.asfortranarray(grad))})
        with engine(NUMPY.engine):
            plain.step({"w": expected}, {"w": grad})
    assert_equal(library.numpy(param), expected)
    assert_same_state(mine, plain, "w", library)


@on_libraries
def test_clipped_gradients_are_left_in_any_order(library: Library) -> None:
    rng = np.random.default_rng(0)
    value, grad = rng.standard_normal((2, 70, 65))
    scaled = np.clip(grad * (3.0 / (np.linalg.norm(grad) + 1e-6)), -0.1, 0.1)

    def fill_in(step: Step) -> None:
        for _, member, clipped in step.left_over():
            member.grad[...] = library.param(np.asarray(clipped))

    for lay in (DENSE["fortran"].lay, np.array, Strides((0, 1), (1, 2)).lay):
        opt = mo.Optimizer(mo.SGD(lr=0.1), mo.Clip(norm=3.0, value=0.1))
        opt._registry.leave_clipped = True
        param, given = library.param(DENSE["fortran"].lay(value)), library.param(lay(grad))
        given = given.detach() if isinstance(given, torch.Tensor) else given
        arrays = [np.fromiter([array], object, 1) for array in (param, given)]
        for _ in range(2):
            given[...] = library.grad(grad)
            opt._registry.step(["w"], arrays[0], arrays[1], fill_in)
            np.testing.assert_allclose(library.numpy(given), scaled, rtol=1e-12)


@on_compiled
def test_a_step_of_dense_arrays_needs_no_memory_of_their_size(library: Library) -> None:
    value = np.ones((1000, 500), np.float32, order="F")
    param, grad = library.param(value), library.grad(value)
    opt = mo.Optimizer(mo.Adam(), mo.Clip(norm=1.0))
    for _ in range(2):
        opt.step({"w": param}, {"w": grad})
    tracemalloc.start()
    try:
        opt.step({"w": param}, {"w": grad})
        assert tracemalloc.get_traced_memory()[1] < value.nbytes // 8
    finally:
        tracemalloc.stop()


@on_libraries
@pytest.mark.parametrize("interleaved", ["parameters", "a parameter and its gradient"])
def test_views_that_interleave(library: Library, interleaved: str) -> None:
    memory = library.param(np.arange(40.0).reshape(4, 10))
    if isinstance(memory, torch.Tensor):
        memory = memory.detach()
    a, b = memory[:, ::2], memory[:, 1::2]
    before = library.numpy(b).copy()
    opt = mo.Optimizer(mo.SGD(lr=1.0))
    for _ in range(2):
        if interleaved == "parameters":
            opt.step({"a": a, "b": b}, dict.fromkeys("ab", library.grad(np.ones((4, 5)))))
        else:
            opt.step({"a": a}, {"a": b})
    expected = before - 2 if interleaved == "parameters" else before
    assert_equal(library.numpy(b), expected)
    start = np.arange(40.0).reshape(4, 10)[:, ::2]
    step = np.ones((4, 5)) if interleaved == "parameters" else before
    assert_equal(library.numpy(a), start - step - step)
