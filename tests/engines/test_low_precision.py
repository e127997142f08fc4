"""16-bit parameters: with master copies they keep moving, whatever the step."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import multiopt as mo
from multiopt.layout import address
from multiopt_kernels.cpu.narrow import conversions
from multiopt_kernels.cpu.object_cache import linked
from multiopt_kernels.cpu.team import Kernel
from multiopt_kernels.cpu.toolbox import object_code, toolbox
from tests.cases import CASES
from tests.libraries import NUMPY, Library, assert_equal, engine

RULES = {case.rule_class: case.rule_class for case in CASES}
DTYPES = ["float16", "bfloat16"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"master_weights": True},
    {"clip": mo.Clip(value=0.75)},
    {"clip": mo.Clip(norm=3.0)},
    {"clip": mo.Clip(global_norm=3.0), "master_weights": True},
]


def array(x: Any, dtype: str) -> np.ndarray:
    return np.asarray(x, np.float32).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_weight_moves_by_small_steps(dtype: str) -> None:
    # The spacing of bfloat16 at 256 is 2, that of float16 0.25; a step is 1e-3.
    w = {"w": array([256.0], dtype)}
    still = {"w": w["w"].copy()}
    opt, without = mo.Optimizer(mo.Adam(lr=1e-3), master_weights=True), mo.Optimizer(mo.Adam())
    for _ in range(3000):
        opt.step(w, {"w": array([1.0], dtype)})
        without.step(still, {"w": array([1.0], dtype)})
    assert still["w"].item() == 256.0
    master = opt.state("w").slots["master_param"]
    assert master.item() == pytest.approx(253.0, rel=1e-3)
    assert w["w"] == master.astype(dtype)
    assert w["w"].item() < 256.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_master_is_the_parameter_of_a_float32_run(rule: type[mo.Rule], dtype: str) -> None:
    start = array(np.linspace(-2, 2, 11), dtype)
    full, half = {"w": start.astype(np.float32)}, {"w": start.copy()}
    opt, low = mo.Optimizer(rule()), mo.Optimizer(rule(), master_weights=True)
    for step in range(20):
        grad = array(np.sin(np.arange(11.0) + step), dtype)
        opt.step(full, {"w": grad.astype(np.float32)})
        low.step(half, {"w": grad})
        state = low.state("w").slots
        assert_equal(state["master_param"], full["w"])
        assert_equal(half["w"], full["w"].astype(dtype))
        for slot, values in opt.state("w").slots.items():
            assert_equal(state[slot], values, slot)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_on_every_library(library: Library, dtype: str) -> None:
    if dtype not in library.dtypes:
        pytest.skip(f"{library.id} has no {dtype}")
    results = []
    for lib in (NUMPY, library):
        params = {"w": lib.param(array(np.linspace(-300, 300, 40), dtype).reshape(5, 8))}
        opt = mo.Optimizer(mo.Adam(lr=0.03), clip=mo.Clip(norm=1.0), master_weights=True)
        with engine(lib.engine):
            for step in range(10):
                grad = array(np.cos(np.arange(40.0) * step), dtype).reshape(5, 8)
                params = opt.step(params, {"w": lib.grad(grad)})
        slots = {k: lib.numpy(x) for k, x in opt.state("w").slots.items()}
        results.append((lib.numpy(params["w"]), slots))
    (w, slots), (w_there, slots_there) = results
    assert_equal(w, w_there)
    assert slots.keys() == slots_there.keys() == {"exp_avg", "exp_avg_sq", "master_param"}
    for name, values in slots.items():
        assert_equal(values, slots_there[name], name)


def test_a_parameter_that_was_set_is_taken_as_it_is() -> None:
    w = {"w": array([256.0, 1.0], "bfloat16")}
    opt = mo.Optimizer(mo.SGD(lr=1e-3), master_weights=True)
    for _ in range(3):
        opt.step(w, {"w": array([1.0, 1.0], "bfloat16")})
    w["w"][0] = 8.0
    opt.step(w, {"w": array([1.0, 0.0], "bfloat16")})
    master = opt.state("w").slots["master_param"]
    assert master.tolist() == pytest.approx([8.0 - 1e-3, 1.0 - 3e-3], rel=1e-6)


def test_masters_are_saved_and_go_on(tmp_path: Path) -> None:
    w = {"w": array([256.0], "bfloat16")}
    grads = {"w": array([1.0], "bfloat16")}
    opt = mo.Optimizer(mo.SGD(lr=0.3), master_weights=True)
    opt.step(w, grads)
    opt.save(tmp_path / "file")
    resumed = mo.Optimizer(mo.SGD(lr=0.3), master_weights=True)
    resumed.load(tmp_path / "file")
    assert resumed.pending == ("w",)
    resumed.load(tmp_path / "file")
    resumed.step(
        {"w": torch.tensor([256.0], dtype=torch.bfloat16)}, {"w": torch.ones(1).bfloat16()}
    )
    assert resumed.state("w").slots["master_param"].tolist() == pytest.approx([256 - 0.6])


def test_state_without_masters_begins_to_have_them() -> None:
    w, grads = {"w": array([2.0], "float16")}, {"w": array([1.0], "float16")}
    old = mo.Optimizer(mo.SGD(lr=0.3, momentum=0.5))
    old.step(w, grads)
    new = mo.Optimizer(mo.SGD(lr=0.3, momentum=0.5), master_weights=True)
    new.load_state_dict(old.state_dict())
    expected = w["w"].astype(np.float32) - np.float32(0.3) * np.float32(1.5)
    new.step(w, grads)
    assert_equal(new.state("w").slots["master_param"], expected)


def test_masters_without_the_option_are_refused() -> None:
    w, grads = {"w": array([2.0], "float16")}, {"w": array([1.0], "float16")}
    old, new = mo.Optimizer(mo.SGD(), master_weights=True), mo.Optimizer(mo.SGD())
    old.step(w, grads)
    new.load_state_dict(old.state_dict())
    with pytest.raises(ValueError, match=r"slot 'master_param'.*master_weights=True"):
        new.step(w, grads)
    assert new.pending == ("w",)


def test_wider_parameters_have_no_masters() -> None:
    opt = mo.Optimizer(mo.SGD(), master_weights=True)
    opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
    assert opt.state("w").slots == {}
    assert ml_dtypes.bfloat16 is not None


# 16 bits in the kernels


def every(dtype: str) -> np.ndarray:
    """All values of a 16-bit dtype, NaN and infinities among them."""
    return np.arange(2**16, dtype=np.uint16).view(np.dtype(dtype))


def steps_of(
    name: str, start: np.ndarray, grads: list[np.ndarray], **options: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A parameter and its slots after some steps with an engine."""
    params = {"w": start.copy()}
    with engine(name), np.errstate(all="ignore"):
        opt = mo.Optimizer(mo.SGD(lr=0.5, momentum=0.5), threads=2, **options)
        for grad in grads:
            opt.step(params, {"w": grad})
        return params["w"], opt.state("w").slots


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_of_parameter_and_gradient(dtype: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    some = array(rng.standard_normal(2**16), dtype)
    shuffled = rng.permutation(every(dtype))
    for start, grads in ((every(dtype), [some, some]), (some, [every(dtype), shuffled])):
        (w, slots), (expected, others) = (
            steps_of(name, start, grads, **options) for name in ("compiled", "plain")
        )
        assert_equal(w, expected)
        for name, values in others.items():
            assert_equal(slots[name], values, name)


def near_roundings(dtype: str) -> np.ndarray:
    """What is right between two neighbours of a 16-bit dtype, and next to that, as float32."""
    wide = every(dtype).astype(np.float32).view(np.uint32)
    tie = np.uint32(0x8000 if dtype == "bfloat16" else 0x1000)
    offsets = np.array([0, 1, tie - 1, tie, tie + 1, 2 * tie - 1], np.uint32)
    between = (wide[:, None] + offsets).ravel().view(np.float32)
    # Halves of the least float16, too: what is subnormal there is not in float32.
    return np.concatenate([between, np.arange(0, 4096, 0.5, dtype=np.float32) * 2.0**-25])


@pytest.mark.parametrize(
    ("dtype", "by_instruction"), [("bfloat16", None), ("float16", True), ("float16", False)]
)
def test_conversions_are_those_of_numpy(dtype: str, by_instruction: bool | None) -> None:
    if by_instruction and not toolbox().has_half:
        pytest.skip("the processor does not convert float16")
    tools, (load, store) = toolbox(), conversions(dtype, by_instruction)
    words, shorts, floats = tools.words, tools.shorts, tools.at["float32"]

    def widen(arguments_at):  # type: ignore[no-untyped-def]
        a = words(arguments_at)
        bits, out = shorts(a[0]), floats(a[1])
        for i in range(a[2]):
            out[i] = load(bits[i])
        return 0

    def narrow(arguments_at):  # type: ignore[no-untyped-def]
        a = words(arguments_at)
        numbers, out = floats(a[0]), shorts(a[1])
        for i in range(a[2]):
            out[i] = store(numbers[i])
        return 0

    addresses = linked(object_code(widen=tools.njit(widen), narrow=tools.njit(narrow)))

    def run(name: str, given: np.ndarray, out: np.ndarray) -> None:
        arguments = np.array([address(given), address(out), given.size])
        Kernel(addresses[name]).alone(address(arguments))

    with np.errstate(all="ignore"):
        wide, expected = np.empty(2**16, np.float32), every(dtype).astype(np.float32)
        run("widen", every(dtype).view(np.uint16), wide)
        assert_equal(wide, expected)
        assert (np.signbit(wide) == np.signbit(expected)).all()
        numbers = near_roundings(dtype)
        rounded, expected = np.empty(numbers.size, np.uint16), numbers.astype(dtype)
        run("narrow", numbers, rounded)
        assert_equal(rounded.view(dtype), expected)
        is_number = ~np.isnan(numbers)
        assert (rounded == expected.view(np.uint16))[is_number].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rounding(dtype: str) -> None:
    # Twice what is to be rounded is halved by the step.
    target = near_roundings(dtype)
    with np.errstate(all="ignore"):
        start = np.float32(2.0) * target
        is_exact = np.isfinite(start) & (start * np.float32(0.5) == target)
        start, target = start[is_exact], target[is_exact]
        rounded, expected = start.astype(dtype), target.astype(dtype)
    params = {"w": rounded.copy()}
    rule = mo.SGD(lr=0.5, weight_decay=1.0)
    opt = mo.Optimizer(rule, master_weights=True)
    opt.step(params, {"w": np.zeros_like(params["w"])})
    state = opt.state_dict()
    state["entries"]["w"]["slots"]["master_param"] = start
    opt.load_state_dict(state)
    params["w"][...] = rounded
    opt.step(params, {"w": np.zeros_like(params["w"])})
    assert_equal(params["w"], expected)
    assert_equal(opt.state("w").slots["master_param"], target)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_lent_of_what_is_not_aligned(dtype: str, masters: bool) -> None:
    results = []
    rng = np.random.default_rng(1)
    draws = [{n: array(rng.standard_normal(6), dtype) for n in "abc"} for _ in range(6)]
    for name in ("compiled", "plain"):
        opt = mo.Optimizer(mo.Adam(lr=0.1), master_weights=masters, clip=mo.Clip(norm=0.5))
        params = {n: array(np.linspace(-1, 1, 6), dtype) for n in "abc"}
        with engine(name):
            for step, grads in enumerate(draws):
                # One of them begins at an odd address now and then, in the row that it has had.
                held = np.zeros(13, np.uint8)[1:].view(np.dtype(dtype))
                held[:] = params["b"]
                params["b"] = held if step % 2 else held.copy()
                opt.step(params, grads if step % 3 else grads | {"c": grads["c"][::-1]})
        results.append(({n: opt.state(n).slots for n in params}, params))
    for n in "abc":
        assert_equal(results[0][1][n], results[1][1][n], n)
        for slot, values in results[1][0][n].items():
            assert_equal(results[0][0][n][slot], values, slot)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_found(dtype: str) -> None:
    for value in every(dtype)[::97]:
        opt = mo.Optimizer(mo.SGD(), on_nonfinite="skip")
        opt.step({"w": array(np.zeros(3), dtype)}, {"w": np.array([0, value, 1], dtype)})
        assert (opt.last.skipped == ()) == bool(np.isfinite(float(value)))
