"""Parameters in a checkpoint: of any library to any, in place, all or nothing with the state."""

import io
import re
from pathlib import Path
from typing import Any

import array_api_strict
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import multiopt as mo
from tests.libraries import LIBRARIES, NUMPY, Library, assert_equal, missing

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


def numbers(dtype: str) -> np.ndarray:
    """Numbers that tell bits apart: a subnormal, infinities, NaN, zeros of both signs."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    real = np.dtype(kind.type(0).real.dtype) if kind.kind == "c" else kind
    tiny = ml_dtypes.finfo(real).smallest_subnormal
    values = np.array([1.5, -0.0, 0.0, float("inf"), float("-inf"), float("nan"), 1 / 3], real)
    values = np.concatenate([values, np.array([tiny], real)])
    if kind.kind != "c":
        return values
    made = np.empty(len(values), kind)
    made.real, made.imag = values, values[::-1]
    return made


def saved(params: Any, opt: mo.Optimizer | None = None) -> io.BytesIO:
    file = io.BytesIO()
    (opt or mo.Optimizer(mo.SGD())).save(file, params=params)
    file.seek(0)
    return file


def has(library: Library, dtype: str) -> bool:
    real = {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)
    return missing(library) is None and real in library.dtypes


def bits(array: np.ndarray) -> list[str]:
    """The bits of all numbers; all NaNs are one."""
    wide = array.reshape(-1).astype(np.complex128).view(np.float64)
    return [float(x).hex() for x in wide]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one", LIBRARIES, ids=lambda library: library.id)
def test_parameters_go_from_any_library_to_any(one: Library, dtype: str) -> None:
    if not has(one, dtype):
        pytest.skip("this library does not have it")
    values = numbers(dtype)
    params = {"w": one.param(values), "scalar": one.param(values[:1].reshape(()))}
    params |= {
        "none": one.param(values[:0].reshape(0, 3)),
        "large": one.param(np.tile(values, 900)),
    }
    file = saved(params)
    for other in LIBRARIES:
        if not has(other, dtype):
            continue
        file.seek(0)
        shapes = {name: one.numpy(param).shape for name, param in params.items()}
        given = {name: other.param(np.zeros(shape, values.dtype)) for name, shape in shapes.items()}
        loaded = mo.Optimizer(mo.SGD()).load(file, params=given).params
        assert loaded is not None
        assert [*loaded] == [*given]
        for name, param in params.items():
            mine = other.numpy(loaded[name])
            assert mine.dtype == values.dtype
            assert mine.shape == shapes[name]
            assert bits(mine) == bits(one.numpy(param)), (other.id, name)
            assert (loaded[name] is given[name]) is other.in_place


def test_a_file_has_their_bits_where_other_programs_read_them(tmp_path: Path) -> None:
    params = {"a": np.arange(4, dtype=np.float16), "b": np.arange(4.0, 8.0).astype(np.float16)}
    mo.Optimizer(mo.SGD()).save(tmp_path / "run", params=params)
    found = load_file(tmp_path / "run")
    assert found["0"].dtype == np.float16
    assert found["0"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_strides_and_byte_orders_are_the_arrays_own_affair() -> None:
    source = np.arange(24.0).reshape(4, 6)
    params = {
        "fortran": np.asfortranarray(source),
        "columns": source[:, ::2],
        "backwards": source[::-1],
        "swapped": source.astype(">f8"),
        "complex": (source + 1j * source)[:, ::2],
    }
    given = {name: np.zeros_like(x) for name, x in params.items()}
    memory = np.zeros((4, 12))
    given["columns"] = memory[:, ::4]
    loaded = mo.Optimizer(mo.SGD()).load(saved(params), params=given).params
    assert loaded is not None
    for name, param in params.items():
        assert loaded[name] is given[name]
        assert np.array_equal(loaded[name], param)
    assert not memory[:, 1::4].any()


def test_torch_parameters_stay_what_they_are_and_are_known_to_be_written() -> None:
    module = torch.nn.Linear(3, 2)
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    file = saved(dict(module.named_parameters()))
    other = torch.nn.Linear(3, 2)
    params = dict(other.named_parameters())
    loss = other(torch.ones(3)).sum()
    versions = {name: p._version for name, p in params.items()}
    report = mo.Optimizer(mo.SGD()).load(file, params=params)
    assert report.params is not None
    for name, param in other.named_parameters():
        assert report.params[name] is param
        assert param.requires_grad
        assert param.is_leaf
        assert torch.equal(param, expected[name])
        assert param._version > versions[name]
    assert loss.requires_grad


def test_conjugates_are_loaded_as_what_they_show() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    loaded = mo.Optimizer(mo.SGD()).load(
        saved({"z": value.conj()}), params={"z": torch.zeros(2, dtype=torch.complex64)}
    )
    assert loaded.params is not None
    assert torch.equal(loaded.params["z"], value.conj())


def test_without_in_place_nothing_given_is_written() -> None:
    module = torch.nn.Linear(2, 1)
    params = {"n": np.ones(2), "t": module.weight, "j": jnp.ones(2)}
    given: dict[str, Any] = {"n": np.zeros(2), "t": torch.nn.Linear(2, 1).weight, "j": jnp.zeros(2)}
    given["n"].flags.writeable = False
    before = given["t"].detach().clone()
    opt = mo.Optimizer(mo.SGD(), in_place=False)
    loaded = opt.load(saved(params), params=given).params
    assert loaded is not None
    assert torch.equal(given["t"], before)
    assert loaded["t"] is not given["t"]
    assert torch.equal(loaded["t"], module.weight)
    assert isinstance(loaded["t"], torch.nn.Parameter)
    assert not given["n"].any()
    assert loaded["n"].tolist() == [1.0, 1.0]


def test_names_without_state_are_saved_too() -> None:
    opt = mo.Optimizer(mo.Adam())
    params = opt.step({"w": np.ones(2), "frozen": np.full(2, 3.0)}, {"w": np.ones(2)})
    other, given = mo.Optimizer(mo.Adam()), {"w": np.zeros(2), "frozen": np.zeros(2)}
    report = other.load(saved(params, opt), params=given)
    assert report.pending == ("w",)
    assert given["frozen"].tolist() == [3.0, 3.0]


def test_renaming_and_choosing_apply_to_parameters() -> None:
    opt = mo.Optimizer(mo.Adam())
    params = {"module.w": np.ones(2), "module.b": np.full(1, 2.0), "module.frozen": np.ones(3)}
    params = opt.step(params, {n: np.ones_like(params[n]) for n in ("module.w", "module.b")})
    file = saved(params, opt)
    given = {"w": np.zeros(2), "b": np.zeros(1), "frozen": np.zeros(3)}
    other = mo.Optimizer(mo.Adam())
    report = other.load(file, params=given, rename=lambda name: name.removeprefix("module."))
    assert report.pending == ("w", "b")
    assert_equal(given["w"], params["module.w"])
    assert given["frozen"].tolist() == [1, 1, 1]
    file.seek(0)
    given = {"w": np.zeros(2), "b": np.zeros(1)}
    report = other.load(
        file,
        params=given,
        names=["module.w", "module.frozen"],
        rename={"module.w": "w", "module.frozen": "b"},
        strict=False,
    )
    assert_equal(given["w"], params["module.w"])
    assert not given["b"].any()
    assert "shape (3,)" in report.unused["module.frozen"]


def test_some_names_fill_some_of_the_arrays() -> None:
    file = saved({"w": np.ones(2), "v": np.ones(2)})
    given = {"w": np.zeros(2), "v": np.zeros(2), "x": np.zeros(2)}
    report = mo.Optimizer(mo.SGD()).load(file, params=given, names="w")
    assert (given["w"].tolist(), given["v"].tolist()) == ([1, 1], [0, 0])
    assert report.unused == {"v": "it was not asked for"}
    assert report.missing == ("x",)


def test_names_on_one_side_only_are_listed() -> None:
    opt = mo.Optimizer(mo.SGD())
    params = opt.step({"w": np.ones(2), "v": np.ones(2)}, {"w": np.ones(2)})
    file, given = saved(params, opt), {"w": np.zeros(2), "x": np.zeros(2)}
    other = mo.Optimizer(mo.SGD())
    with pytest.raises(
        mo.CheckpointError, match=r"only the file has 'v', and only params has 'x'\. rename="
    ):
        other.load(file, params=given)
    assert not other.pending
    assert not given["w"].any()
    file.seek(0)
    report = other.load(file, params=given, strict=False)
    assert report.unused == {"v": "its parameter: it is not in params"}
    assert report.missing == ("x",)
    assert report.params is not None
    assert [*report.params] == ["w", "x"]
    assert given["w"].tolist() == params["w"].tolist()


def test_names_that_differ_by_a_prefix_are_matched_by_what_the_error_says() -> None:
    file = saved({"w": np.ones(2), "b": np.ones(1)})
    given = {"module.w": np.zeros(2), "module.b": np.zeros(1)}
    with pytest.raises(mo.CheckpointError) as caught:
        mo.Optimizer(mo.SGD()).load(file, params=given)
    (source,) = re.findall(r"rename=(.*) would match, names=", str(caught.value))
    file.seek(0)
    mo.Optimizer(mo.SGD()).load(file, params=given, rename=eval(source))
    assert given["module.w"].tolist() == [1, 1]


def test_a_file_without_parameters_is_an_error_where_they_are_asked_for() -> None:
    file, given = io.BytesIO(), {"w": np.zeros(2)}
    mo.Optimizer(mo.SGD()).save(file)
    file.seek(0)
    with pytest.raises(
        mo.CheckpointError, match=r"there are no parameters in it: save it with par"
    ):
        mo.Optimizer(mo.SGD()).load(file, params=given)
    file.seek(0)
    assert mo.Optimizer(mo.SGD()).load(file, params=given, strict=False).missing == ("w",)
    # None were saved, which is another thing.
    assert mo.Optimizer(mo.SGD()).load(saved({}), params={}).params == {}
    assert mo.Optimizer(mo.SGD()).load(saved({"w": np.ones(2)})).params is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (np.zeros(3), mo.CheckpointError, r"'w' has shape \(2,\); expected \(3,\)"),
        (np.zeros((2, 1)), mo.CheckpointError, r"'w' has shape \(2,\); expected \(2, 1\)"),
        (np.zeros(2, np.float32), mo.CheckpointError, r"dtype float64; expected float32.*cast=Tr"),
        (np.zeros(2, complex), mo.CheckpointError, r"dtype float64; expected complex128.*params$"),
        (np.zeros(2, int), TypeError, "parameter 'w' has dtype int64"),
        ([0.0, 0.0], TypeError, "parameter 'w' is a list of 2; expected an array"),
        (np.broadcast_to(0.0, (2,)), mo.CheckpointError, "'w' is read-only"),
        (torch.zeros(1, dtype=torch.float64).expand(2), mo.CheckpointError, "'w' is expanded"),
    ],
)
def test_what_does_not_fit_changes_nothing(given: Any, error: Any, message: str) -> None:
    opt = mo.Optimizer(mo.SGD())
    params = opt.step({"v": np.ones(2), "w": np.ones(2)}, {"v": np.ones(2), "w": np.ones(2)})
    other, v = mo.Optimizer(mo.SGD()), np.zeros(2)
    with pytest.raises(error, match=message):
        other.load(saved(params, opt), params={"v": v, "w": given})
    assert not other.pending
    assert not v.any()


def test_arrays_that_share_memory_are_refused() -> None:
    memory = np.zeros(3)
    with pytest.raises(mo.CheckpointError, match="parameters 'v' and 'w' share memory"):
        mo.Optimizer(mo.SGD()).load(
            saved({"v": np.ones(2), "w": np.ones(2)}), params={"v": memory[:2], "w": memory[1:]}
        )
    assert not memory.any()


def test_state_that_does_not_fit_leaves_parameters_alone() -> None:
    opt = mo.Optimizer(mo.Adam())
    params = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
    other, given = mo.Optimizer(mo.SGD(momentum=0.5)), {"w": np.zeros(2)}
    with pytest.raises(mo.CheckpointError, match="momentum_buffer"):
        other.load(saved(params, opt), params=given)
    assert not given["w"].any()


def test_cast_converts_them() -> None:
    values = np.array([1 / 3, 1e300, 1e-300])
    given = {"w": torch.zeros(3, dtype=torch.bfloat16)}
    mo.Optimizer(mo.SGD()).load(saved({"w": values}), params=given, cast=True)
    with np.errstate(over="ignore"):
        expected = torch.tensor(values.astype(np.float32)).to(torch.bfloat16)
    assert torch.equal(given["w"], expected)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([np.ones(2)], TypeError, "params is a list; expected a mapping"),
        ({1: np.ones(2)}, TypeError, "params has the name 1; expected a string"),
        ({"w": [1.0]}, TypeError, "parameter 'w' is a list of 1"),
        ({"w": np.ones(2, int)}, TypeError, "parameter 'w' has dtype int64"),
        ({"w": np.ones(3)}, ValueError, r"parameter 'w' has shape \(3,\); expected \(2,\)"),
        ({"w": np.ones(2, np.float32)}, TypeError, "parameter 'w' has dtype float32; expected fl"),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_file(
    tmp_path: Path, params: Any, error: Any, message: str
) -> None:
    opt, path = mo.Optimizer(mo.SGD()), tmp_path / "run"
    here = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
    opt.save(path, params=here)
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        opt.save(path, params=params)
    assert path.read_bytes() == before


def test_a_damaged_parameter_is_named() -> None:
    opt = mo.Optimizer(mo.Adam())
    params = opt.step({"v": np.ones(5), "w": np.full(5, 7.0)}, {"v": np.ones(5), "w": np.ones(5)})
    raw = bytearray(saved(params, opt).getvalue())
    at = raw.index(params["w"].tobytes())
    raw[at + 3] ^= 1
    given = {"v": np.zeros(5), "w": np.zeros(5)}
    with pytest.raises(mo.CheckpointError, match="the parameter 'w', it is damaged: the checksum"):
        mo.Optimizer(mo.Adam()).load(io.BytesIO(raw), params=given)
    assert not given["v"].any()
    report = mo.Optimizer(mo.Adam()).load(io.BytesIO(raw), params=given, strict=False)
    assert report.unused == {"w": "its parameter: it is damaged: the checksum differs"}
    assert report.pending == ("v", "w")
    assert_equal(given["v"], params["v"])
    assert not given["w"].any()
    # Where no parameters are asked for, they are not read.
    assert mo.Optimizer(mo.Adam()).load(io.BytesIO(raw)).pending == ("v", "w")


def test_another_library_of_the_standard_is_given_new_arrays() -> None:
    given = {"w": array_api_strict.zeros(2, dtype=array_api_strict.float64)}
    loaded = mo.Optimizer(mo.SGD()).load(saved({"w": np.array([1.0, 2.0])}), params=given).params
    assert loaded is not None
    assert type(loaded["w"]) is type(given["w"])
    assert_equal(NUMPY.numpy(np.from_dlpack(loaded["w"])), np.array([1.0, 2.0]))
