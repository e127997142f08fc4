"""Array API libraries without a package of their own: what works, and what is refused at once."""

from collections.abc import Callable
from typing import Any

import array_api_compat
import array_api_strict
import numpy as np
import pytest

import multiopt as mo
from multiopt.backend import CPU, Backend, backend_named
from tests.cases import WHOLE, Case
from tests.libraries import assert_equal

Array = type(array_api_strict.asarray(0.0))


@pytest.fixture(autouse=True)
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library be one that nobody has tried yet."""
    monkeypatch.setattr(backend_named("array_api_strict"), "_tried", set())


def strict(array: Any, device: str = "CPU_DEVICE") -> Any:
    return array_api_strict.asarray(array, device=array_api_strict.Device(device))


def fail(error: Exception) -> Callable[..., Any]:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    return raises


#: What a library may lack, and what the message says of it.
LACKS: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], str]] = {
    # ndonnx
    "a way to the host": (
        lambda patch: patch.setattr(Array, "__dlpack__", fail(BufferError("no export"))),
        "which cannot do what a step and a checkpoint need: BufferError",
    ),
    # pydata sparse
    "any way to the host": (
        lambda patch: (
            patch.delattr(Array, "__dlpack__"),
            patch.setattr(Array, "__array__", fail(RuntimeError("not dense")), raising=False),
        ),
        "which cannot do what a step and a checkpoint need: RuntimeError",
    ),
    "a way that says what the array is": (
        lambda patch: (
            patch.delattr(Array, "__dlpack__"),
            patch.setattr(
                Array, "__array__", lambda *_, **__: np.array(None, object), raising=False
            ),
        ),
        "which cannot do what a step and a checkpoint need: TypeError",
    ),
    # mlx
    "a device": (
        lambda patch: patch.delattr(Array, "device"),
        "which does not say what it is: AttributeError",
    ),
    # a lazy array
    "a shape": (
        lambda patch: patch.setattr(Array, "shape", (float("nan"),)),
        r"which does not say what it is: TypeError\('its shape \(nan,\) is not known yet'\)",
    ),
    "an operation": (
        lambda patch: patch.delattr(array_api_strict, "where"),
        "which cannot do what a step and a checkpoint need: AttributeError",
    ),
    "one that a check of gradients needs": (
        lambda patch: patch.delattr(array_api_strict, "stack"),
        "which cannot do what a step and a checkpoint need: AttributeError",
    ),
    "arguments of one": (
        lambda patch: patch.setattr(array_api_strict, "astype", lambda array, dtype: array),
        "which cannot do what a step and a checkpoint need: TypeError",
    ),
}


@pytest.mark.parametrize("lack", LACKS)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("which", ["parameter", "gradient"])
def test_what_a_library_lacks_is_said_at_first_sight(
    lack: str, dtype: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = LACKS[lack]
    good, odd = np.ones(2, np.float32), strict(np.ones(2, dtype))
    opt = mo.Optimizer(mo.SGD(lr=1.0), on_nonfinite="raise")
    params = {"good": good, "odd": odd if which == "parameter" else np.ones(2, dtype)}
    label = "parameter 'odd'" if which == "parameter" else "gradient of 'odd'"
    change(monkeypatch)
    with pytest.raises(
        TypeError, match=f"^{label} is a Array of array_api_strict, {message}.*conv"
    ):
        opt.step(params, {"good": good.copy(), "odd": odd})
    assert len(opt) == 0
    assert good.tolist() == [1.0, 1.0]


def test_a_library_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    attempt = Backend._try
    monkeypatch.setattr(
        Backend, "_try", lambda self, layout: (tried.append(layout.dtype), attempt(self, layout))
    )
    params = {"a": strict(np.ones(2)), "b": strict(np.ones(3)), "c": strict(np.ones(2, "f4"))}
    for _ in range(3):
        params = mo.Optimizer(mo.Adam()).step(params, params)
    assert tried == ["float64", "float32"]


def test_no_memory_is_no_fault_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_api_strict, "where", fail(MemoryError()))
    w = strict(np.ones(2))
    with pytest.raises(MemoryError):
        mo.Optimizer(mo.Adam()).step({"w": w}, {"w": w})


def test_ctrl_c_is_no_fault_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    stops, sqrt = iter([KeyboardInterrupt()]), array_api_strict.sqrt

    def interrupted(array: Any) -> Any:
        for stop in stops:
            raise stop
        return sqrt(array)

    monkeypatch.setattr(array_api_strict, "sqrt", interrupted)
    w, opt = strict(np.ones(2)), mo.Optimizer(mo.Adam(lr=0.5))
    with pytest.raises(KeyboardInterrupt):
        opt.step({"w": w}, {"w": w})
    assert len(opt) == 0
    params = opt.step({"w": w}, {"w": w})
    np.testing.assert_allclose(np.from_dlpack(params["w"]), 0.5, rtol=1e-6)


def test_a_device_without_float64_has_no_norms() -> None:
    w, opt = strict(np.ones(2, "f4"), "no_float64"), mo.Optimizer(mo.SGD(lr=0.5))
    params = opt.step({"w": w}, {"w": w})
    opt.clip = mo.Clip(norm=1.0)
    with pytest.raises(
        TypeError,
        match=r"the norm of the gradient of 'w' is a float64, which array_api_strict does not "
        r"compute on the device .*no_float64",
    ):
        opt.step(params, {"w": w})
    opt.clip = mo.Clip(value=0.5)
    assert np.from_dlpack(opt.step(params, {"w": w})["w"]).tolist() == [0.25, 0.25]
    assert opt.state("w").step == 2


def test_state_comes_from_another_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    export, asked = Array.__dlpack__, []

    def brought(self: Any, **how: Any) -> Any:
        asked.append(how.pop("dl_device"))
        return export(self, **how)

    monkeypatch.setattr(Array, "__dlpack_device__", lambda self: (2, 0))
    monkeypatch.setattr(Array, "__dlpack__", brought)
    w, opt = strict(np.ones(2)), mo.Optimizer(mo.Adam())
    opt.step({"w": w}, {"w": w})
    opt.save(tmp_path / "run")
    assert set(asked) == {(CPU, 0)}


# Dask's arrays have no attribute ``device``, and no way to the host but ``np.asarray``.


@pytest.mark.parametrize(
    "case", [Case(mo.Adam, {"lr": 0.1, "amsgrad": True}), *WHOLE], ids=lambda c: c.id
)
def test_dask_equals_numpy(case: Case, tmp_path: Any) -> None:
    da = pytest.importorskip("dask.array", reason="Dask is not installed")
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((3, 40)), rng.standard_normal((3, 3, 40))
    clip = mo.Clip(norm=5.0, global_norm=2.0, value=0.5)
    ours, numpys = mo.Optimizer(case.rule, clip), mo.Optimizer(case.rule, clip)
    params, expected = {"w": da.from_array(start, chunks=2)}, {"w": start.copy()}
    for grad in grads:
        params = ours.step(params, {"w": da.from_array(grad, chunks=2)})
        numpys.step(expected, {"w": grad})
        # Not a plan of all steps so far.
        assert len(dict(params["w"].__dask_graph__())) <= params["w"].npartitions
    assert_equal(params["w"].compute(), expected["w"])
    ours.save(tmp_path / "run")
    resumed = mo.Optimizer(case.rule, clip)
    resumed.load(tmp_path / "run")
    resumed.step({"w": expected["w"].copy()}, {"w": grads[0]})
    for name, slot in numpys.state("w").slots.items():
        assert array_api_compat.is_dask_array(ours.state("w").slots[name])
        assert_equal(ours.state("w").slots[name].compute(), slot)
