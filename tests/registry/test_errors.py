"""Bad input: each message names the parameter, what was expected, what came and the remedy, and
nothing has changed afterwards."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import multiopt as mo
from multiopt_jax import backend as jax_backend
from tests.libraries import LIBRARIES, NUMPY, Library, assert_equal


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(3)


def rare(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A tensor of a kind that torch warns of: it is new, or will go."""
    with warnings.catch_warnings(action="ignore"):
        return make()


def nested() -> torch.Tensor:
    return rare(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]))


def inside(transform: Any) -> torch.Tensor:
    """What a function gets in the place of a tensor."""
    found: list[torch.Tensor] = []
    transform(lambda x: (found.append(x), x.sum())[1])(torch.ones(3))
    return found[0]


def inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


def deleted() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


def released() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


class Disguised:
    """What only says that it is NumPy's."""

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return np


class Mute:
    """What does not even say that it is no array."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


NAN = np.array([1.0, np.nan, 1.0], np.float32)

# What comes beside the good parameter "good", the error, and what its message says.
BAD_STEPS: dict[str, tuple[Callable[[], tuple[Any, Any]], type[Exception], str]] = {
    "shape": (
        lambda: (ones(3), ones(4)),
        ValueError,
        r"gradient of 'bad' has shape \(4,\); expected \(3,\), that of its parameter: reshape it",
    ),
    "dtype": (
        lambda: (ones(3), ones(3, dtype=np.float64)),
        TypeError,
        "gradient of 'bad' has dtype float64; expected float32, that of its parameter: convert it",
    ),
    "library": (
        lambda: (torch.ones(3), ones(3)),
        TypeError,
        "gradient of 'bad' has library numpy; expected torch, that of its parameter: convert it",
    ),
    "device": (
        lambda: (
            array_api_strict.ones(3, dtype=array_api_strict.float32),
            array_api_strict.ones(
                3, dtype=array_api_strict.float32, device=array_api_strict.Device("device1")
            ),
        ),
        TypeError,
        "gradient of 'bad' has device .*device1.*; expected .*CPU.*: move it",
    ),
    "read-only": (
        lambda: (frozen(ones(3)), ones(3)),
        ValueError,
        "parameter 'bad' is read-only; expected an array to update in place: copy it",
    ),
    "expanded tensor": (
        lambda: (torch.ones(1).expand(3), torch.ones(3)),
        ValueError,
        r"parameter 'bad' is expanded \(a stride of 0\).*: copy it",
    ),
    "broadcast array": (
        lambda: (np.lib.stride_tricks.as_strided(ones(1), (3,), (0,)), ones(3)),
        ValueError,
        r"parameter 'bad' is expanded \(a stride of 0\).*: copy it",
    ),
    "overlapping windows": (
        lambda: (np.lib.stride_tricks.sliding_window_view(ones(4), 2, writeable=True), ones(3, 2)),
        ValueError,
        "parameter 'bad' is made of overlapping windows: several elements share one place",
    ),
    "overlapping windows of torch": (
        lambda: (torch.ones(4).as_strided((3, 2), (1, 1)), torch.ones(3, 2)),
        ValueError,
        "parameter 'bad' is made of overlapping windows",
    ),
    "computed tensor": (
        lambda: (torch.ones(3, requires_grad=True) * 2, torch.ones(3)),
        ValueError,
        "parameter 'bad' is not a leaf but computed from other tensors, .*; expected a leaf: pass",
    ),
    "uninitialized tensor": (
        lambda: (torch.nn.UninitializedParameter(), torch.ones(3)),
        TypeError,
        "parameter 'bad' is an uninitialized parameter: run its module once",
    ),
    "jagged tensor": (
        lambda: (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), torch.ones(3)),
        TypeError,
        "parameter 'bad' is a jagged tensor; expected a dense one: use .values()",
    ),
    "nested tensor": (
        lambda: (nested(), torch.ones(3)),
        TypeError,
        "parameter 'bad' is a nested tensor; expected a dense one: use .values()",
    ),
    "nested gradient": (
        lambda: (torch.ones(3), nested()),
        TypeError,
        "gradient of 'bad' is a nested tensor; expected a dense one: use .values()",
    ),
    "quantized": (
        lambda: (
            rare(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)),
            torch.ones(3),
        ),
        TypeError,
        "parameter 'bad' has dtype quint8; expected one of",
    ),
    "half a complex number": (
        lambda: (rare(lambda: torch.ones(3, dtype=torch.complex32)), torch.ones(3)),
        TypeError,
        "parameter 'bad' has dtype complex32; expected one of",
    ),
    "compressed gradient": (
        lambda: (torch.ones(3, 3), rare(torch.ones(3, 3).to_sparse_csr)),
        TypeError,
        "gradient of 'bad' is a sparse_csr tensor; expected a dense one: use .to_dense",
    ),
    "gradient of another engine": (
        lambda: (torch.ones(3), torch.ones(3).to_mkldnn()),
        TypeError,
        "gradient of 'bad' is a _mkldnn tensor; expected a dense one: use .to_dense",
    ),
    "fake gradient": (
        lambda: (torch.ones(3), fake()),
        TypeError,
        "gradient of 'bad' is a FakeTensor without memory of its own",
    ),
    "functorch's parameter": (
        lambda: (inside(torch.func.functionalize), torch.ones(3)),
        TypeError,
        "parameter 'bad' is a Tensor without memory of its own",
    ),
    "functorch's gradient": (
        lambda: (torch.ones(3), inside(torch.func.functionalize)),
        TypeError,
        "gradient of 'bad' is a Tensor without memory of its own",
    ),
    "a part of functorch's gradient": (
        lambda: (torch.ones(2), inside(torch.func.functionalize)[1:]),
        TypeError,
        "gradient of 'bad' is a Tensor without memory of its own",
    ),
    "zero without memory": (
        lambda: (torch.ones(3), torch._efficientzerotensor((3,))),
        TypeError,
        "gradient of 'bad' is a Tensor without memory of its own",
    ),
    "float8": (
        lambda: (torch.ones(3).to(torch.float8_e4m3fn), torch.ones(3)),
        TypeError,
        "parameter 'bad' has dtype float8_e4m3fn; expected one of",
    ),
    "NumPy scalar gradient of a tensor": (
        lambda: (torch.ones(()), np.float32(1.0)),
        TypeError,
        r"gradient of 'bad' is np\.float32\(1.0\), a float32; expected an array: use np.asarray",
    ),
    "Python scalar": (lambda: (1.0, 1.0), TypeError, "parameter 'bad' is 1.0, a float; .*asarray"),
    "NumPy scalar": (
        lambda: (np.float32(1.0), np.float32(1.0)),
        TypeError,
        r"parameter 'bad' is np.float32\(1.0\), a float32; expected an array: use np.asarray",
    ),
    "list": (
        lambda: ([1.0] * 5000, ones(1)),
        TypeError,
        "^parameter 'bad' is a list of 5000; expected an array: use np.asarray$",
    ),
    "list of arrays": (
        lambda: ([ones(50, 50), torch.ones(50, 50)], ones(1)),
        TypeError,
        "^parameter 'bad' is a list of 2; expected an array: .* as in {'layer.0': ..., 'layer.1'",
    ),
    "ragged list": (
        lambda: ([[0.0] * 1000, [0.0]], ones(1)),
        TypeError,
        "^parameter 'bad' is a list of 2; expected an array: make it one, or give each part a ",
    ),
    "tuple as a gradient": (
        lambda: (ones(2), (1.0, 2.0)),
        TypeError,
        "^gradient of 'bad' is a tuple of 2; expected an array: use np.asarray$",
    ),
    "dict": (
        lambda: ({"w": ones(50, 50), "b": ones(50)}, {"w": ones(50, 50), "b": ones(50)}),
        TypeError,
        "^parameter 'bad' is a dict of 2; expected an array, .*: flatten it, as in {'layer.w': ",
    ),
    "dict as a gradient": (
        lambda: (ones(2), OrderedDict(w=ones(2))),
        TypeError,
        "^gradient of 'bad' is a OrderedDict of 1; expected an array, for names are flat: flatten",
    ),
    "large integer": (
        lambda: (10**5000, ones(1)),
        TypeError,
        "^parameter 'bad' is <int>, a int; expected an array: use np.asarray$",
    ),
    "a library that only looks like NumPy": (
        lambda: (Disguised(), ones(1)),
        TypeError,
        "^parameter 'bad' is a Disguised of no library: .*it names numpy, but is none of its arr",
    ),
    "an object that says nothing": (
        lambda: (Mute(), ones(1)),
        TypeError,
        "^parameter 'bad' is a Mute of no library: RuntimeError",
    ),
    "a proxy that says yes to everything": (
        lambda: (torch.fx.Proxy(torch.fx.Graph().placeholder("x")), torch.ones(3)),
        TypeError,
        "^parameter 'bad' is a Proxy of no library: ",
    ),
    "no array": (
        lambda: (object(), ones(3)),
        TypeError,
        "parameter 'bad' is a object; expected an array of NumPy, PyTorch, JAX or",
    ),
    "scalar gradient": (
        lambda: (ones(3), 1.0),
        TypeError,
        "gradient of 'bad' is 1.0, a float; expected an array: use np.asarray",
    ),
    "integers": (
        lambda: (ones(3, dtype=np.int64), ones(3, dtype=np.int64)),
        TypeError,
        "parameter 'bad' has dtype int64; expected one of bfloat16, complex128, complex64, float16",
    ),
    "integers of torch": (
        lambda: (torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.int32)),
        TypeError,
        "parameter 'bad' has dtype int32; expected",
    ),
    "integers of JAX": (
        lambda: (jnp.ones(3, jnp.int32), jnp.ones(3, jnp.int32)),
        TypeError,
        "parameter 'bad' has dtype int32; expected",
    ),
    "objects": (
        lambda: (np.array([1.0, None]), ones(2)),
        TypeError,
        "parameter 'bad' has dtype object; expected",
    ),
    "long double": (
        lambda: (ones(3, dtype=np.longdouble), ones(3, dtype=np.longdouble)),
        TypeError,
        "parameter 'bad' has dtype float128; expected",
    ),
    "masked": (
        lambda: (np.ma.masked_array(ones(3), mask=[False, True, False]), ones(3)),
        TypeError,
        "parameter 'bad' is a masked array, whose mask no rule knows: fill it first",
    ),
    "sparse parameter": (
        lambda: (torch.ones(3).to_sparse(), torch.ones(3)),
        TypeError,
        "parameter 'bad' is a sparse_coo tensor; expected a dense one: use .to_dense",
    ),
    "sparse gradient": (
        lambda: (torch.ones(3), torch.ones(3).to_sparse()),
        TypeError,
        "gradient of 'bad' is a sparse_coo tensor; expected a dense one: use .to_dense",
    ),
    "fake tensor": (
        lambda: (fake(), torch.ones(3)),
        TypeError,
        "parameter 'bad' is a FakeTensor without memory of its own.*call the pure rule.update",
    ),
    "meta tensor": (
        lambda: (torch.ones(3, device="meta"), torch.ones(3, device="meta")),
        TypeError,
        "parameter 'bad' is a Tensor without memory of its own.*call the pure rule.update",
    ),
    "released tensor": (
        lambda: (released(), torch.ones(3)),
        TypeError,
        "parameter 'bad' is a Tensor without memory of its own",
    ),
    "inference tensor": (
        lambda: (inference_tensor(), torch.ones(3)),
        ValueError,
        "parameter 'bad' was made in inference mode; expected .*: clone it outside, or step inside",
    ),
    "deleted JAX array": (
        lambda: (deleted(), jnp.ones(3)),
        TypeError,
        r"parameter 'bad' is a deleted JAX array \(donated\?\); expected a live one",
    ),
}


def snapshot(opt: mo.Optimizer) -> Any:
    return copy.deepcopy(opt.state_dict()), opt.names, opt.pending, repr(opt), opt.last


def assert_unchanged(opt: mo.Optimizer, before: Any) -> None:
    assert repr(snapshot(opt)) == repr(before)


@pytest.mark.parametrize("case", BAD_STEPS, ids=str)
def test_a_bad_step_says_why_and_changes_nothing(case: str) -> None:
    make, error, message = BAD_STEPS[case]
    opt = mo.Optimizer(mo.Adam(lr=0.1), clip=mo.Clip(global_norm=1.0))
    params = opt.step({"good": ones(3)}, {"good": ones(3)})
    before, good = snapshot(opt), params["good"].copy()
    bad, grad = make()
    with pytest.raises(error, match=message):
        opt.step(
            {"new": ones(2), **params, "bad": bad}, {"new": ones(2), "good": good, "bad": grad}
        )
    assert_unchanged(opt, before)
    assert_equal(params["good"], good)
    if isinstance(bad, np.ndarray):
        assert_equal(bad, make()[0])


def test_a_gradient_without_a_parameter() -> None:
    opt = mo.Optimizer(mo.Adam())
    message = (
        r"gradient of 'loca': expected .* of the 2 parameters of this step \('loc'\): pass its"
    )
    with pytest.raises(KeyError, match=message):
        opt.step({"loc": ones(3), "zz": ones(3)}, {"loca": ones(3)})
    assert len(opt) == 0


def test_no_mapping_and_no_names() -> None:
    opt = mo.Optimizer(mo.Adam())
    with pytest.raises(TypeError, match="params is a ndarray; expected a mapping of names"):
        opt.step(ones(3), ones(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="grads is a list; expected a mapping of names"):
        opt.step({"a": ones(3)}, [ones(3)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="params has the name 1; expected a string"):
        opt.step({1: ones(3)}, {1: ones(3)})  # type: ignore[dict-item]


def test_no_gradients_for_a_library_without(library: Library) -> None:
    if library.id.startswith("torch"):
        pytest.skip("torch's arrays carry gradients")
    with pytest.raises(
        TypeError, match=r"array, which carries no gradient; pass .* step\(params, gr"
    ):
        mo.Optimizer(mo.Adam()).step({"a": library.param(ones(3))})


def test_a_tensor_that_is_no_leaf() -> None:
    loc = torch.ones(3, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"parameter 'a' is not a leaf tensor, so it has no \.grad"
    ):
        mo.Optimizer(mo.Adam()).step({"a": loc * 2})


SHARING: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "one array": lambda w: (w, w),
    "a view": lambda w: (w, w[:]),
    "a reversed part": lambda w: (w[:4], w[2:]),
    "a row and a column": lambda w: (w.reshape(3, 2)[0], w.reshape(3, 2)[:, 0]),
}


@pytest.mark.parametrize("case", SHARING, ids=str)
@pytest.mark.parametrize("make", [lambda: ones(6), lambda: torch.ones(6)], ids=["numpy", "torch"])
def test_memory_under_two_names(case: str, make: Callable[[], Any]) -> None:
    a, b = SHARING[case](make())
    opt = mo.Optimizer(mo.Adam())
    with pytest.raises(
        ValueError, match=r"parameters 'a' and 'b' share memory, .*: copy one, or pa"
    ):
        opt.step({"b": b, "a": a}, {"a": 2 * a, "b": 2 * b})
    assert len(opt) == 0
    assert (a == 1).all()
    assert (b == 1).all()


@pytest.mark.parametrize("shape", [(3,), (), (0,)], ids=str)
def test_one_array_under_two_names(library: Library, shape: Any) -> None:
    w, opt = library.param(ones(*shape)), mo.Optimizer(mo.SGD(lr=0.25), average=mo.Average())
    grads = {name: library.grad(np.full(shape, n, np.float32)) for n, name in enumerate("ba", 1)}
    if library.in_place:
        with pytest.raises(ValueError, match="parameters 'a' and 'b' share memory"):
            opt.step({"b": w, "a": w}, grads)
        assert len(opt) == 0
        return
    # No step writes it.
    params = {"b": w, "a": w}
    for _ in range(2):
        params = opt.step(params, grads)
    for n, name in enumerate("ba", 1):
        assert_equal(library.numpy(params[name]), np.full(shape, 1 - n / 2, np.float32))
        assert opt.state(name).step == 2
    assert_equal(library.numpy(w), ones(*shape))
    # One again, it is two afterwards.
    params = opt.step({"b": w, "a": w}, grads)
    assert_equal(library.numpy(params["a"]), np.full(shape, 0.5, np.float32))


@pytest.mark.parametrize("make", [jnp.asarray, array_api_strict.asarray], ids=["jax", "strict"])
def test_one_complex_array_under_two_names_beside_one_that_is_written(make: Any) -> None:
    z, w = make(np.ones(2, np.complex64)), np.ones(2, np.float32)
    grads = {"a": z, "b": make(np.full(2, 1j, np.complex64)), "w": ones(2)}
    params = mo.Optimizer(mo.SGD(lr=1.0)).step({"a": z, "b": z, "w": w}, grads)
    assert [complex(x) for x in params["a"]] == [0, 0]
    assert [complex(x) for x in params["b"]] == [1 - 1j] * 2
    assert params["w"] is w
    assert w.tolist() == [0, 0]


def test_strides_that_interleave_without_sharing_are_fine() -> None:
    memory = np.zeros(8)
    w = np.lib.stride_tricks.as_strided(memory, (2, 3), (3 * 8, 2 * 8))
    mo.Optimizer(mo.SGD(lr=1.0)).step({"w": w}, {"w": np.arange(1.0, 7.0).reshape(2, 3)})
    assert (-memory).tolist() == [1.0, 0.0, 2.0, 4.0, 3.0, 5.0, 0.0, 6.0]


def test_columns_of_one_matrix_are_two_parameters() -> None:
    w = ones(3, 2)
    opt = mo.Optimizer(mo.SGD(lr=1.0))
    opt.step({"a": w[:, 0], "b": w[:, 1]}, {"a": ones(3), "b": 2 * ones(3)})
    assert w.tolist() == [[0.0, -1.0]] * 3


def test_numpy_memory_seen_by_torch_is_shared_too() -> None:
    w = ones(3)
    with pytest.raises(ValueError, match="share memory"):
        mo.Optimizer(mo.Adam()).step(
            {"a": w, "b": torch.from_numpy(w)}, {"a": ones(3), "b": torch.ones(3)}
        )


def test_a_numpy_scalar_is_a_gradient_without_dimensions() -> None:
    w = np.ones((), np.float32)
    mo.Optimizer(mo.SGD(lr=1.0)).step({"w": w}, {"w": np.float32(0.25)})
    assert w == 0.75


def test_shape_and_dtype_of_a_name_stay(library: Library) -> None:
    opt = mo.Optimizer(mo.Adam())
    opt.step({"w": library.param(ones(3))}, {"w": library.grad(ones(3))})
    before = snapshot(opt)
    with pytest.raises(
        ValueError, match=r"parameter 'w' has shape \(4,\); expected \(3,\).*forget"
    ):
        opt.step({"w": library.param(ones(4))}, {"w": library.grad(ones(4))})
    double = ones(3, dtype=np.float64)
    with pytest.raises(
        TypeError, match=r"parameter 'w' has dtype float64; expected float32.*forget"
    ):
        opt.step({"w": library.param(double)}, {"w": library.grad(double)})
    assert_unchanged(opt, before)
    opt.forget("w")
    opt.step({"w": library.param(ones(4))}, {"w": library.grad(ones(4))})
    assert opt.state("w").step == 1


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap], ids=["jit", "grad", "vmap"])
def test_a_tracer_points_to_the_pure_update(transform: Any) -> None:
    opt = mo.Optimizer(mo.Adam())

    def body(x: Any) -> Any:
        return opt.step({"w": x}, {"w": x})["w"].sum()

    with pytest.raises(
        TypeError, match=r"parameter 'w' is a JAX tracer.*call the pure rule.update"
    ):
        transform(body)(jnp.ones((2, 2)))
    assert len(opt) == 0

    rule = mo.Adam(lr=0.5)
    zeros, scalars = jnp.zeros(2), rule.coefficients(1)
    update = jax.jit(lambda p, g: rule.update(jnp, p, g, (zeros, zeros), scalars)[0])
    np.testing.assert_allclose(update(jnp.ones(2), jnp.ones(2)), 0.5)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_a_functorch_tensor_points_to_the_pure_update(transform: Any) -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        return mo.Optimizer(mo.Adam()).step({"w": x}, {"w": x})["w"].sum()

    with pytest.raises(TypeError, match="parameter 'w' is a Tensor without memory of its own"):
        transform(body)(torch.ones(2, 2))


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a device which this machine need not have."""

    device = torch.device("cuda", 1)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize("seen", [False, True])
def test_a_step_is_not_captured_into_a_graph(
    kind: str, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, w = mo.Optimizer(mo.SGD(lr=0.5)), torch.ones(2)
    if seen:
        opt.step({"w": w, "v": w.clone()}, {"w": w.clone(), "v": w.clone()})
    before = w.clone()
    monkeypatch.setattr(getattr(torch, kind), "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(OnDevice, "device", torch.device(kind, 1))
    captured = torch.ones(2).as_subclass(OnDevice)
    with pytest.raises(
        TypeError,
        match=f"^parameter 'v' is on {kind}:1 while a graph is captured .* and step outside$",
    ):
        opt.step({"w": w, "v": captured}, {"w": w.clone(), "v": captured})
    assert torch.equal(w, before)
    assert opt.names == (("w", "v") if seen else ())


def test_nobody_asks_for_graphs_where_all_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    opt = mo.Optimizer(mo.SGD(lr=0.5))
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        w = torch.ones(2, dtype=dtype)
        opt.step({str(dtype): w}, {str(dtype): w.clone()})


@pytest.mark.parametrize("seen", [False, True])
def test_a_step_among_fake_tensors_points_to_the_pure_update(seen: bool) -> None:
    # The tensors are real, but what is made of them inside is not: a copy of what stands apart.
    opt, w = mo.Optimizer(mo.SGD(lr=0.5)), torch.ones(4)[::2]
    if seen:
        opt.step({"w": w}, {"w": torch.zeros_like(w)})
    grad = torch.ones_like(w)
    with (
        FakeTensorMode(),
        pytest.raises(
            TypeError,
            match=r"parameter 'w': .* inside torch's FakeTensorMode.*call the pure rule\.upd",
        ),
    ):
        opt.step({"w": w}, {"w": grad})
    assert w.tolist() == [1.0, 1.0]
    assert opt.step({"w": w}, {"w": grad})["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("policy", ["propagate", "raise"])
@pytest.mark.parametrize("clip", [None, mo.Clip(norm=9.0), mo.Clip(value=9.0)])
def test_a_step_among_tracers_points_to_the_pure_update(
    on_cpu: bool, policy: Any, clip: mo.Clip | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The arrays are concrete, but what is made of them inside is not.
    monkeypatch.setattr(jax_backend, "_on_cpu", lambda layout: on_cpu)
    opt, w = mo.Optimizer(mo.SGD(), clip, on_nonfinite=policy), jnp.ones(2)
    with pytest.raises(
        TypeError, match=r"inside a JAX transformation.*; call the pure rule\.update"
    ):
        jax.jit(lambda x: opt.step({"w": w}, {"w": w})["w"] + x)(1.0)
    assert len(opt) == 0
    assert opt.step({"w": w}, {"w": w})["w"].tolist() == [0.999, 0.999]
    with pytest.raises(TypeError, match="inside a JAX transformation"):
        jax.jit(lambda x: opt.step({"w": w}, {"w": w})["w"] + x)(1.0)
    assert opt.state("w").step == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_pure_update_gives_the_numbers_of_a_step(dtype: str) -> None:
    rng = np.random.default_rng(0)
    w, grad = rng.standard_normal((2, 100)).astype(dtype)
    for rule in (mo.Adam(lr=0.1), mo.SGD(lr=0.1), mo.ClippedAdam(lr=0.1, lrd=0.9)):
        slots = tuple(np.zeros_like(w) for _ in rule.slots)
        pure, _ = rule.update(np, w, grad, slots, rule.coefficients(1, dtype))
        assert_equal(pure, mo.Optimizer(rule).step({"w": w.copy()}, {"w": grad})["w"])


def test_jax_float64_while_x64_is_off() -> None:
    array = jnp.ones(3, "float64")
    with (
        jax.enable_x64(False),
        pytest.raises(TypeError, match="float64, of which JAX makes no arr"),
    ):
        mo.Optimizer(mo.Adam()).step({"w": array}, {"w": array})


@pytest.mark.parametrize("what", ["rule", "clip", "schedule"])
def test_a_callable_that_gives_nonsense(what: str) -> None:
    kinds: dict[str, tuple[Callable[[], mo.Optimizer], type[Exception], str]] = {
        "rule": (
            lambda: mo.Optimizer(lambda name: mo.Adam() if name == "good" else None),  # type: ignore[arg-type,return-value]
            TypeError,
            "the rule callable gave None for parameter 'bad'; expected a Rule",
        ),
        "clip": (
            lambda: mo.Optimizer(mo.Adam(), lambda name: None if name == "good" else 1.0),  # type: ignore[arg-type,return-value]
            TypeError,
            "the clip callable gave 1.0 for parameter 'bad'; expected a Clip",
        ),
        "schedule": (
            lambda: mo.Optimizer(
                lambda name: mo.Adam() if name == "good" else mo.Adam(lr=lambda step: -step)
            ),
            ValueError,
            r"parameter 'bad': Adam: lr must be a finite number >= 0.*; got -1.0 at step 1",
        ),
    }
    make, error, message = kinds[what]
    opt = make()
    params = opt.step({"good": ones(3)}, {"good": ones(3)})
    before, good = snapshot(opt), params["good"].copy()
    with pytest.raises(error, match=message):
        opt.step({**params, "bad": ones(2)}, {"good": ones(3), "bad": ones(2)})
    assert_unchanged(opt, before)
    assert_equal(params["good"], good)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (True, "True"),
        (np.True_, "True"),
        (torch.tensor(True), "True"),
        ("fast", "'fast'"),
        ("0.1", "'0.1'"),
        (np.array("0.1"), "'0.1'"),
        (b"0.1", "b'0.1'"),
        (-1, "-1.0"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
    ids=repr,
)
def test_a_schedule_that_gives_another_kind_or_a_number_out_of_range(given: Any, said: str) -> None:
    opt = mo.Optimizer(mo.SGD(lr=lambda step: given))
    with pytest.raises(
        ValueError,
        match=f"^parameter 'w': SGD: lr must be a finite number >= 0, .*; got {said} at step 1$",
    ):
        opt.step({"w": ones(1)}, {"w": ones(1)})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "None"),
        (1j, "1j"),
        (np.complex64(1), r"np.complex64\(1\+0j\)"),
        (np.array(1j), r"array\(0.\+1.j\)"),
        (jnp.asarray(1j), r"Array\(0.\+1.j, .*\)"),
        (ones(3), r"array\(\[1., 1., 1.\], dtype=float32\)"),
        (torch.ones(50, 50), r"tensor\(\[\[1., .{0,100}\)"),
        ([0.1] * 1000, r"\[0.1, 0.1, .{0,50}\]"),
        ({"lr": 0.1}, "{'lr': 0.1}"),
        (10**5000, "<int>"),
        (len, "<built-in function len>"),
    ],
    ids=lambda x: str(x)[:20] if not isinstance(x, int) else "int",
)
def test_a_schedule_without_a_number(given: Any, said: str) -> None:
    opt = mo.Optimizer(mo.SGD(lr=lambda step: given))
    with pytest.raises(
        ValueError,
        match=f"^parameter 'w': SGD: the schedule of lr gave no number at step 1: got {said}$",
    ):
        opt.step({"w": ones(1)}, {"w": ones(1)})


@pytest.mark.parametrize(
    "given",
    [np.float32(0.5), np.array(0.5), np.array([0.5]), torch.tensor(0.5), jnp.asarray(0.5)],
    ids=repr,
)
def test_a_schedule_may_give_an_array_of_one(given: Any) -> None:
    assert mo.SGD(lr=lambda step: given).at(1).lr == 0.5


def test_a_schedule_that_raises() -> None:
    opt = mo.Optimizer(mo.SGD(lr=lambda step: 1 / 0))
    with pytest.raises(
        ValueError, match="SGD: the schedule of lr gave no number at step 1: division by zero"
    ):
        opt.step({"w": ones(1)}, {"w": ones(1)})


def test_nonfinite_gradients_raise_by_name(library: Library) -> None:
    opt = mo.Optimizer(mo.Adam(), on_nonfinite="raise")
    params = {name: library.param(ones(3)) for name in "abc"}
    params = opt.step(params, {name: library.grad(ones(3)) for name in "abc"})
    before, old = snapshot(opt), {n: library.numpy(p).copy() for n, p in params.items()}
    grads = {"a": library.grad(NAN), "b": library.grad(ones(3)), "c": library.grad(NAN)}
    with pytest.raises(
        ValueError, match="the gradient of 'a', 'c' has infinities or NaNs; expected"
    ):
        opt.step(params, grads)
    assert_unchanged(opt, before)
    for name, param in params.items():
        assert_equal(library.numpy(param), old[name])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mo.Optimizer("adam"), TypeError, "rule must be a rule or a callable"),  # type: ignore[arg-type]
        (lambda: mo.Optimizer(mo.Adam), TypeError, "rule must be a rule .*; got <class .*Adam'>"),  # type: ignore[arg-type]
        (lambda: mo.Optimizer(mo.Adam(), mo.Clip), TypeError, "clip must be a Clip, a callable"),  # type: ignore[arg-type]
        (lambda: mo.Optimizer(mo.Adam(), clip=1.0), TypeError, "clip must be a Clip, a callable"),  # type: ignore[arg-type]
        (
            lambda: mo.Optimizer(mo.Adam(), on_nonfinite="stop"),  # type: ignore[arg-type]
            ValueError,
            "on_nonfinite must be 'propagate', 'raise' or 'skip'; got 'stop'",
        ),
        (lambda: mo.Adam(lr=-1), ValueError, "Adam: lr must be a finite number >= 0, or a sch"),
        (lambda: mo.Adam(lr=float("nan")), ValueError, "Adam: lr must be a finite number >= 0"),
        (lambda: mo.Adam(lr=float("inf")), ValueError, "Adam: lr must be a finite number >= 0"),
        (lambda: mo.Adam(lr=10**400), ValueError, "Adam: lr must be .*; got 1000"),
        (lambda: mo.Adam(lr="fast"), ValueError, "Adam: lr must be .*; got 'fast'"),  # type: ignore[arg-type]
        (lambda: mo.Adam(lr=True), ValueError, "Adam: lr must be .*; got True"),
        (lambda: mo.Adam(betas=(0.9, 1.0)), ValueError, "betas must be a number >= 0 and < 1"),
        (lambda: mo.Adam(betas=0.9), ValueError, "betas must be a pair of numbers; got 0.9"),  # type: ignore[arg-type]
        (lambda: mo.Adam(betas=(0.9,)), ValueError, "betas must be a pair of numbers"),  # type: ignore[arg-type]
        (lambda: mo.Adam(amsgrad="yes"), ValueError, "amsgrad must be False, True or 'corrected'"),  # type: ignore[arg-type]
        (lambda: mo.Adam(maximize=1), ValueError, "Adam: maximize must be True or False; got 1"),  # type: ignore[arg-type]
        (lambda: mo.AdamW(eps=-1e-8), ValueError, "AdamW: eps must be a finite number >= 0"),
        (lambda: mo.SGD(nesterov=True), ValueError, "SGD: nesterov needs a momentum and no damp"),
        (lambda: mo.Adadelta(rho=1.1), ValueError, "Adadelta: rho must be a number >= 0 and <= 1"),
        (lambda: mo.Rprop(step_sizes=1.0), ValueError, "Rprop: step_sizes must be a pair of num"),  # type: ignore[arg-type]
        (lambda: mo.Rprop(etas=(0.5, 1.0)), ValueError, "Rprop: etas must be below and above 1"),
        (lambda: mo.Rprop(etas=(1.0, 1.2)), ValueError, "Rprop: etas must be below and above 1"),
        (
            lambda: mo.SGD(momentum=0.9, dampening=0.1, nesterov=True),
            ValueError,
            "SGD: nesterov needs a momentum and no dampening; got momentum=0.9, dampening=0.1",
        ),
        (lambda: mo.SGD(dampening=float("inf")), ValueError, "SGD: dampening must be a finite n"),
        (lambda: mo.ClippedAdam(clip_norm=-1), ValueError, "ClippedAdam: clip_norm must be a num"),
        (lambda: mo.Clip(norm=-1), ValueError, "Clip: norm must be a number >= 0; got -1"),
        (lambda: mo.Clip(global_norm=float("nan")), ValueError, "Clip: global_norm must be a n"),
        (lambda: mo.Clip(value="1"), ValueError, "Clip: value must be a number >= 0; got '1'"),  # type: ignore[arg-type]
        (lambda: mo.Clip(value=1, eps=float("inf")), ValueError, "Clip: eps must be .*; got inf"),
        (lambda: mo.Clip(norm=1, eps=None), ValueError, "Clip: eps must be .*; got None"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_errors_of_names() -> None:
    opt = mo.Optimizer(mo.Adam())
    opt.step({"a": ones(1), "b": ones(1)}, {"a": ones(1), "b": ones(1)})
    before = snapshot(opt)
    with pytest.raises(KeyError, match="no state for parameter 'c': it was never stepped"):
        opt.state("c")
    with pytest.raises(KeyError, match="cannot forget parameter 'c': it is neither seen nor pend"):
        opt.forget("c")
    with pytest.raises(KeyError, match="cannot rename parameter 'c': it is neither seen nor pend"):
        opt.rename({"a": "d", "c": "e"})
    with pytest.raises(TypeError, match="cannot rename parameter 'a' to 1: expected a string"):
        opt.rename({"a": 1})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="cannot rename: two parameters would be called 'b'"):
        opt.rename({"a": "b"})
    with pytest.raises(TypeError, match="rule must be a rule or a callable name -> rule; got None"):
        opt.rule = None  # type: ignore[assignment]
    assert_unchanged(opt, before)


@pytest.mark.parametrize(
    "update",
    [
        lambda xp, p, g, slots, c: (p - np.float64(0.1) * g, slots),
        lambda xp, p, g, slots, c: (p[:2], slots),
        lambda xp, p, g, slots, c: (p, (p,)),
        lambda xp, p, g, slots, c: (p.__isub__(g), slots),
    ],
    ids=["dtype", "shape", "slots", "in place"],
)
def test_a_rule_that_breaks_its_contract_changes_nothing(update: Any) -> None:
    class Broken(mo.SGD):
        pass

    Broken.update = property(lambda self: update)  # type: ignore[assignment,method-assign]
    w = ones(3)
    with pytest.raises((TypeError, ValueError)) as caught:
        mo.Optimizer(Broken()).step({"w": w}, {"w": ones(3)})
    assert "parameter 'w'" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert_equal(w, ones(3))


@pytest.mark.parametrize("what", ["divide", "over", "under", "invalid"])
def test_numpy_error_settings_cannot_tear_a_step(what: str) -> None:
    grads = {"w": np.array([0.0, np.inf, 1e-30, 1e30, np.nan], np.float32)}
    results = []
    for setting in ("raise", "ignore"):
        with np.errstate(**{what: setting}):  # type: ignore[arg-type]
            w, opt = ones(5), mo.Optimizer(mo.Adam(eps=0.0), clip=mo.Clip(norm=1.0))
            for _ in range(3):
                opt.step({"w": w}, grads)
            results.append(w)
    one, other = results
    assert_equal(one, other)


def test_table_covers_every_library() -> None:
    assert {library.id.split("-")[0] for library in LIBRARIES} == {
        "numpy",
        "strict",
        "torch",
        "jax",
    }
    assert NUMPY in LIBRARIES
