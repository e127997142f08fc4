"""Nothing is stale: what happens to arrays, names and settings between steps is seen by the next.

Each test steps an optimizer on an engine beside one on the engine "plain", which gets copies.
"""

import copy
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyro
import pytest
import torch

import multiopt as mo
import multiopt.adapters.pyro as drop_in
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule
from tests.exact_sums import exact_norm
from tests.libraries import assert_equal, engine

on_engines = pytest.mark.parametrize("name", ["compiled", "blocks"])
SHAPE = (3, 4)
ADAM = mo.Adam(lr=0.1)


def value(array: Any) -> np.ndarray:
    """What an array holds, as a plain NumPy array of its own."""
    if isinstance(array, torch.Tensor):
        array = array.detach().resolve_neg()
        if array.dtype == torch.bfloat16:
            return array.float().numpy().astype(ml_dtypes.bfloat16)
        array = array.numpy()
    array = np.asarray(array)
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def report(opt: mo.Optimizer) -> str:
    last = opt.last
    shared = sorted(map(repr, last.global_norms.items()))
    return repr((last.new, last.updated, last.skipped, dict(last.norms), shared, last.clipped))


class Pair:
    """An optimizer on an engine, and the reference."""

    def __init__(self, name: str, rule: Any = ADAM, clip: Any = None, **options: Any) -> None:
        self.engine = name
        self.ours, self.plain = (mo.Optimizer(rule, clip, **options) for _ in range(2))

    def step(self, params: Mapping[str, Any], grads: Mapping[str, Any] | None = None) -> Any:
        given = {name: p.grad for name, p in params.items()} if grads is None else grads
        copies = {name: None if g is None else value(g) for name, g in given.items()}
        expected = {name: value(p) for name, p in params.items()}
        with engine("plain"):
            self.plain.step(expected, copies)
        with engine(self.engine):
            after = self.ours.step(params, grads)
        assert list(after) == list(expected)
        for name in expected:
            assert_equal(value(after[name]), expected[name], name)
        self.check()
        return after

    def check(self) -> None:
        assert self.ours.names == self.plain.names
        assert report(self.ours) == report(self.plain)
        for name in self.plain:
            state, slots = self.plain.state(name)
            assert self.ours.state(name).step == state, name
            for slot, array in slots.items():
                assert_equal(value(self.ours.state(name).slots[slot]), array, f"{slot} of {name}")

    def refuses(self, error: type[Exception], match: str, params: Any, grads: Any) -> None:
        kept = [name for name in params if name in "ac"]
        before = {name: value(params[name]) for name in kept}
        with engine(self.engine), pytest.raises(error, match=match):
            self.ours.step(params, grads)
        for name in kept:
            assert_equal(value(params[name]), before[name], name)
        self.check()

    def both(self, change: Callable[[mo.Optimizer], Any]) -> None:
        """Change the two optimizers; one that is returned takes its place."""
        made = [(change(opt), opt) for opt in (self.ours, self.plain)]
        self.ours, self.plain = (x if isinstance(x, mo.Optimizer) else opt for x, opt in made)


def arrays(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.array(rng.standard_normal(shape), np.float32) for name in "abc"}


def tensors(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    return {n: torch.tensor(a, requires_grad=seed == 0) for n, a in arrays(seed, shape).items()}


Make = Callable[..., dict[str, Any]]


def warm(pair: Pair, make: Make = arrays, shape: tuple[int, ...] = SHAPE, own: bool = False) -> Any:
    """Parameters after a few steps, so that nothing is new, and gradients for the next one."""
    params = make(0, shape)
    for seed in (1, 2, 3):
        step(pair, params, make(seed, shape), own)
    return params, make(4, shape)


def step(pair: Pair, params: dict[str, Any], grads: dict[str, Any], own: bool) -> None:
    if own:
        for name, param in params.items():
            param.grad = grads[name]
    pair.step(params, None if own else grads)


# What arrays may become


def strided(x: np.ndarray) -> np.ndarray:
    memory = np.zeros([2 * n for n in x.shape], x.dtype)
    memory[::2, ::2] = x
    return memory[::2, ::2]


def unaligned(x: np.ndarray) -> np.ndarray:
    view = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def there_and_back(x: np.ndarray) -> np.ndarray:
    """The same object, elsewhere in memory."""
    kept = x.copy()
    x.resize((1000,), refcheck=False)
    x.resize(SHAPE, refcheck=False)
    x[...] = kept
    return x


class Sub(np.ndarray):
    def __setitem__(self, key: Any, item: Any) -> None:
        raise AssertionError("a step does not ask a subclass")


class SubTensor(torch.Tensor):
    pass


def data(tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    tensor.data = new
    return tensor


def set_(tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.set_(new)  # type: ignore[call-overload]  # of another tensor, it is missing


SAME: dict[str, Callable[[Any], Any]] = {
    "a copy": np.copy,
    "the same object resized there and back": there_and_back,
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "a view at the same address": lambda x: x[:],
    "in Fortran order": np.asfortranarray,
    "strided": strided,
    "backwards": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "narrowed": lambda x: np.concatenate([x, x])[: len(x)],
    "unaligned": unaligned,
    "of a subclass": lambda x: x.view(Sub),
    "with metadata in its dtype": lambda x: x.astype(np.dtype(x.dtype, metadata={"unit": "m"})),
    "of torch's memory": lambda x: torch.from_numpy(x.copy()).numpy(),
    "read-only, a gradient": read_only,
    "broadcast, a gradient": lambda x: np.broadcast_to(x[0, 0], x.shape),
    "NaN": lambda x: x * np.float32(nan),
}
SAME_TENSORS: dict[str, Callable[[Any], Any]] = {
    "data replaced": lambda t: data(t, t.detach().clone()),
    "data transposed": lambda t: data(t, t.detach().T.contiguous().T),
    "data narrowed": lambda t: data(t, torch.cat([t.detach()] * 2)[:3]),
    "set to other memory": lambda t: set_(t, t.detach().clone()),
    "set to strided memory": lambda t: set_(t, torch.stack([t.detach()] * 2, -1)[..., 1]),
    "an nn.Parameter": lambda t: torch.nn.Parameter(t.detach()),
    "of a subclass of Tensor": lambda t: t.detach().as_subclass(SubTensor),
    "a row of a leaf": lambda t: torch.stack([t.detach()] * 2).requires_grad_()[1],
    "the negative of its memory": lambda t: torch._neg_view(-t.detach()),
    "an imaginary part": lambda t: torch.complex(t.detach(), -t.detach()).conj().imag,
    "expanded, a gradient": lambda t: t.detach()[:1].expand(SHAPE),
    "with a graph, a gradient": lambda t: t.detach().requires_grad_() * 2,
}


@on_engines
@pytest.mark.parametrize("how", [*SAME, *SAME_TENSORS])
def test_an_array_may_become_another(name: str, how: str) -> None:
    make: Make = arrays if how in SAME else tensors
    change, clip = {**SAME, **SAME_TENSORS}[how], mo.Clip(0.5)
    # A contiguous negative beside gradients in .grad is a documented limit.
    for own in (False, True) if make is tensors and "its memory" not in how else (False,):
        pair = Pair(name, clip=clip if own else None)
        params, grads = warm(pair, make, own=own)
        if "a gradient" not in how and not (own and "a row" in how):
            params["b"] = change(params["b"])
        step(pair, params, grads, own)
        for turn in range(2):
            grads = make(5 + turn)
            for n in params if turn else "b":
                grads[n] = change(grads[n])
                grads[n] = grads[n].detach() if own else grads[n]
            step(pair, params, grads, own)
        step(pair, {n: make(9)[n] for n in params}, make(8), own)


@on_engines
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,)], ids=str)
def test_the_memory_of_an_imaginary_part_holds_negatives(name: str, shape: Any) -> None:
    for own in (False, True):
        pair = Pair(name)
        params, grads = warm(pair, tensors, shape, own)
        for _ in range(2):
            grads = dict.fromkeys(params, torch.complex(grads["a"], grads["b"]).conj().imag)
            assert grads["a"].is_neg()
            step(pair, params, grads, own)
            grads = tensors(7, shape)


@on_engines
def test_channels_may_come_last(name: str) -> None:
    def four(seed: int) -> list[torch.Tensor]:
        t = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 3, 4, 5)))
        return [t, t.to(memory_format=torch.channels_last)]

    pair, params = Pair(name, clip=mo.Clip(0.5)), dict(zip("ab", four(0), strict=True))
    for seed in range(4):
        pair.step(params, dict(zip("ab" if seed % 2 else "ba", four(seed), strict=True)))


# What is refused


def in_place(x: np.ndarray, name: str, to: Any) -> np.ndarray:
    setattr(x, name, to)
    return x


def resized(x: np.ndarray) -> np.ndarray:
    x.resize((4, 4), refcheck=False)
    return x


def released(t: torch.Tensor) -> torch.Tensor:
    t = t.detach().clone()
    t.untyped_storage().resize_(0)
    return t


def of_inference_mode(t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return t.clone()


def retained(t: torch.Tensor) -> torch.Tensor:
    t = t.detach().requires_grad_() * 2
    t.retain_grad()
    t.sum().backward()
    return t


def view_of_computed(t: torch.Tensor) -> torch.Tensor:
    computed = t.detach().requires_grad_() * 2
    with torch.no_grad():
        return computed[:]


Wrong = dict[str, tuple[Callable[[Any], Any], type[Exception], str]]
WRONG: Wrong = {
    "reshaped in place": (lambda x: in_place(x, "shape", (4, 3)), ValueError, "'b' has shape"),
    "transposed": (lambda x: x.T, ValueError, "'b' has shape"),
    "resized in place": (resized, ValueError, "'b' has shape"),
    "retyped in place": (lambda x: in_place(x, "dtype", np.dtype("i4")), TypeError, "dtype int32"),
    "of another dtype": (lambda x: x.astype(np.float64), TypeError, "float64"),
    "of 16 bits": (lambda x: x.astype(np.float16), TypeError, "float16"),
    "masked": (np.ma.masked_array, TypeError, "'b' is a masked array"),
    "a list": (np.ndarray.tolist, TypeError, "'b' is a list of"),
    "of torch": (torch.from_numpy, TypeError, "'b' has library"),
    "read-only, a parameter": (read_only, ValueError, "'b' is read-only"),
    "broadcast, a parameter": (
        lambda x: np.lib.stride_tricks.as_strided(x, strides=(4, 0)),
        ValueError,
        "'b' is expanded",
    ),
}
WRONG_TENSORS: Wrong = {
    "data of another dtype": (lambda t: data(t, t.detach().double()), TypeError, "float64"),
    "data of another shape": (lambda t: data(t, t.detach()[:2]), ValueError, "'b' has shape"),
    "data transposed": (lambda t: data(t, t.detach().T), ValueError, "'b' has shape"),
    "storage resized": (lambda t: t.detach().clone().resize_(4, 4), ValueError, "'b' has shape"),
    "sparse": (lambda t: t.detach().to_sparse(), TypeError, "'b' is a sparse"),
    "meta": (lambda t: t.detach().to("meta"), TypeError, "'b' is a Tensor without memory"),
    "released": (released, TypeError, "'b' is a Tensor without memory"),
    "bfloat16": (lambda t: t.detach().bfloat16(), TypeError, "bfloat16"),
    "expanded, a parameter": (lambda t: t.detach()[:1].expand(SHAPE), ValueError, "is expanded"),
    "computed, a parameter": (lambda t: t * 2, ValueError, "'b' is not a leaf"),
    "retained, a parameter": (retained, ValueError, "'b' is not a leaf"),
    "a view of a computed parameter": (view_of_computed, ValueError, "'b' is not a leaf"),
    "a parameter of inference mode": (of_inference_mode, ValueError, "'b' was made in inference"),
}


@on_engines
@pytest.mark.parametrize("clip", [None, mo.Clip(1.0)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("how", [*WRONG, *WRONG_TENSORS])
def test_what_went_wrong_is_refused(name: str, how: str, clip: Any) -> None:
    make: Make = arrays if how in WRONG else tensors
    change, error, match = {**WRONG, **WRONG_TENSORS}[how]
    pair = Pair(name, clip=clip)
    params, grads = warm(pair, make)
    kept = make(5)["b"]
    versions = {n: getattr(p, "_version", 0) for n, p in params.items()}
    pair.refuses(error, match, {**params, "b": change(params["b"])}, grads)
    assert all(getattr(params[n], "_version", 0) == versions[n] for n in "ac")
    params["b"] = kept
    pair.step(params, grads)
    if "a parameter" not in how and "computed" not in how:
        pair.refuses(error, match, params, {**grads, "b": change(make(6)["b"])})
        pair.step(params, make(7))


@on_engines
@pytest.mark.parametrize("before", [(), ("a",), ("a", "z")], ids=len)
def test_a_new_tensor_is_looked_at_beside_names_without_a_gradient(
    name: str, before: tuple[str, ...]
) -> None:
    with engine(name):
        opt, params = mo.Optimizer(mo.SGD()), tensors()
        known = {"a": params["a"], "z": params["c"]}
        for tensor in known.values():
            tensor.grad = torch.ones_like(tensor)
        opt.step(known)
        for each in before:
            known[each].grad = None
        values = params["c"].detach().clone()
        with pytest.raises(ValueError, match="'b' is not a leaf"):
            opt.step({"a": known["a"], "b": retained(params["b"]), "z": known["z"]})
        assert len(opt) == 2
        assert torch.equal(known["z"].detach(), values)


@on_engines
@pytest.mark.parametrize("of", [np.array, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_may_not_become_thirty_two(name: str, of: Any, dtype: str) -> None:
    half = getattr(torch, dtype) if of is torch.tensor else np.dtype(dtype)
    params = {"a": of(np.ones(3, np.float32)), "w": of([1.0] * 3, dtype=half)}
    pair = Pair(name)
    for _ in range(3):
        pair.step(params, {n: 2 * p for n, p in params.items()})
    params["w"] = of(np.ones(3, np.float32))
    pair.refuses(TypeError, f"'w' has dtype float32; expected {dtype}", params, params)


@on_engines
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_tensors_of_a_transformation_are_refused(name: str, transform: str) -> None:
    pair = Pair(name)
    params, grads = warm(pair, tensors, (3,))

    def inside(x: torch.Tensor) -> torch.Tensor:
        for wrong in ({**params, "b": x}, grads), (params, {**grads, "b": x}):
            with engine(name), pytest.raises(TypeError, match="'b' is a Tensor without memory"):
                pair.ours.step(*wrong)
        return x.sum()

    getattr(torch.func, transform)(inside)(torch.ones(2, 3) if transform == "vmap" else params["c"])
    pair.step(params, grads)


# Memory that overlaps

SHARED: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    "one": lambda p: (p["a"], p["a"]),
    "a view": lambda p: (p["a"], p["a"][:]),
    "a part": lambda p: (p["m"][:3], p["m"][2:5]),
    "of two libraries": lambda p: (p["m"][:3], torch.from_numpy(p["m"])[1:4]),
}


@on_engines
@pytest.mark.parametrize("how", SHARED)
def test_two_names_may_not_come_to_share_memory(name: str, how: str) -> None:
    pair = Pair(name)
    params, grads = warm(pair)
    a, b = SHARED[how]({**params, "m": np.ones((6, 4), np.float32)})
    grad = grads["b"] if isinstance(b, np.ndarray) else torch.from_numpy(grads["b"])
    match = "'a' and 'b' share memory"
    pair.refuses(ValueError, match, {**params, "a": a, "b": b}, {**grads, "b": grad})
    pair.step(params, grads)


@pytest.mark.parametrize(
    "kinds", [("blocks", "compiled"), ("compiled", "blocks"), ("plain", "compiled")]
)
def test_names_of_two_engines_may_not_share_memory(kinds: tuple[str, str]) -> None:
    """One was begun before ``MULTIOPT_ENGINE`` was set."""
    rules = {"a": mo.Adam(), "b": mo.Adam(amsgrad=True)}
    memory, opt = np.ones(20, np.float32), mo.Optimizer(rules.__getitem__)
    params, grads = {"a": memory[:10], "b": memory[10:]}, dict.fromkeys("ab", np.ones(10, "f"))
    for name, kind in zip("ab", kinds, strict=True):
        with engine(kind):
            opt.step({name: params[name]}, {name: grads[name]})
    for _ in range(3):
        opt.step(params, grads)
    before = memory.copy()
    with pytest.raises(ValueError, match="'a' and 'b' share memory"):
        opt.step({**params, "b": memory[5:15]}, grads)
    assert_equal(memory, before)
    opt.step(params, grads)


OVERLAPS: dict[str, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "the parameter itself": lambda p, g: {**g, "b": p["b"]},
    "a view of the parameter": lambda p, g: {**g, "b": p["b"][:]},
    "the parameter in another order": lambda p, g: {**g, "b": p["b"].reshape(4, 3).T},
    "a saddle": lambda p, g: {"a": p["b"], "b": -p["a"], "c": g["c"]},
    "each other": lambda p, g: {"a": p["b"], "b": p["a"], "c": g["c"]},
    "in a ring": lambda p, g: {"a": p["b"], "b": p["c"], "c": p["a"]},
    "one for all": lambda p, g: dict.fromkeys(p, g["a"]),
    "a parameter for all": lambda p, g: dict.fromkeys(p, p["b"]),
}


@on_engines
@pytest.mark.parametrize("clip", [None, mo.Clip(0.5, 0.7, 0.1)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("how", OVERLAPS)
def test_gradients_may_overlap_with_parameters(name: str, how: str, clip: Any) -> None:
    for make in (arrays, tensors):
        pair = Pair(name, mo.SGD(lr=0.5, momentum=0.5), clip)
        params, grads = warm(pair, make)
        plain = {n: p.detach() if make is tensors else p for n, p in params.items()}
        for _ in range(3):
            pair.step(params, OVERLAPS[how](plain, grads))
        pair.step(params, grads)


@on_engines
def test_a_gradient_over_parts_of_two_parameters(name: str) -> None:
    pair, memory = Pair(name), np.random.default_rng(0).standard_normal(40)
    params = {n: memory[i : i + 10] for n, i in (("a", 0), ("b", 10), ("c", 20))}
    for shift in (30, 0, 5, 10, 20, 30):
        pair.step(params, dict.fromkeys(params, memory[shift : shift + 10]))
    columns = {"a": memory[:20:2], "b": memory[1:20:2]}
    for _ in range(3):
        pair.step(columns, {"a": columns["b"], "b": columns["a"]})


@on_engines
def test_zero_dimensions_and_zero_elements(name: str) -> None:
    pair, rng = Pair(name, clip=mo.Clip(1.0, 1.0)), np.random.default_rng(0)
    params = {"number": np.ones(()), "empty": np.ones((0, 3)), "e": np.ones(0), "one": np.ones(1)}
    for turn in range(6):
        grads: dict[str, Any] = {
            n: np.array(rng.standard_normal(p.shape)) for n, p in params.items()
        }
        if turn % 2:
            grads["number"] = np.float64(rng.standard_normal())
        pair.step(params, grads)
    pair.step({}, {})
    pair.step(params, {})
    pair.step(params, grads)
    params["one"] = params["e"] = np.ones(0)
    pair.both(lambda opt: opt.forget("one"))
    pair.step({n: p for n, p in params.items() if n != "e"}, {"one": np.ones(0)})
    grads = {"one": np.ones(0), "e": np.ones(0)}
    pair.refuses(ValueError, "'e' and 'one' share memory", params, grads)


@on_engines
def test_no_array_is_held_between_steps(name: str) -> None:
    of_torch = partial(torch.ones, dtype=torch.float64)
    for make in (np.ones, lambda shape: strided(np.ones(shape)), of_torch):
        opt = mo.Optimizer(ADAM, mo.Clip(1.0))
        for _ in range(3):
            param, grad = make(SHAPE), make(SHAPE)
            with engine(name):
                opt.step({"w": param}, {"w": grad})
            held = weakref.ref(param), weakref.ref(grad)
            del param, grad
            assert [ref() is None for ref in held] == [True, True]


# Names, state and settings


def mixed(name: str) -> Rule:
    """Another rule for each of some names."""
    rules: list[Rule] = [
        mo.Adam(lr=0.1),
        mo.Adam(lr=0.01, weight_decay=0.1, amsgrad=True),
        mo.Adam(lr=lambda t: 0.5 / t, maximize=True),
        mo.Adam(lr=0.2, betas=(0.5, lambda t: 1 - 1 / (t + 1)), amsgrad="corrected"),
        mo.AdamW(lr=0.3, amsgrad=True, maximize=True),
        mo.SGD(lr=0.1, momentum=0.9, nesterov=True),
        mo.SGD(lr=lambda t: 1.0 if t % 2 else 0.1),
        mo.ClippedAdam(lr=0.1, lrd=0.9, centered_variance=True),
    ]
    return rules[ord(name[0]) % len(rules)]


CLIPS = [
    None,
    mo.Clip(1.0),
    mo.Clip(0.5, 0.7, 0.3, 0.0),
    mo.Clip(inf, inf, inf),
    mo.Clip(value=0.2),
]
#: What happens between two steps, to an optimizer that knows the names a and b.
EVENTS: list[Callable[[mo.Optimizer, int], Any]] = [
    lambda opt, k: opt.forget("a"),
    lambda opt, k: opt.rename({"a": "b", "b": "a"}),
    lambda opt, k: setattr(opt, "rule", mo.AdamW(lr=1 / (k + 1))),
    lambda opt, k: setattr(opt, "rule", mixed),
    lambda opt, k: setattr(opt, "clip", CLIPS[k % len(CLIPS)]),
    lambda opt, k: setattr(opt, "clip", lambda name: CLIPS[(k + ord(name[0])) % len(CLIPS)]),
    lambda opt, k: opt.load_state_dict(opt.state_dict()),
    lambda opt, k: copy.deepcopy(opt),
    lambda opt, k: copy.copy(opt),
]


@on_engines
@pytest.mark.parametrize("of", [np.array, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("rule", [ADAM, mixed], ids=["one rule", "mixed rules"])
def test_a_long_life_with_all_that_happens(name: str, of: Any, policy: Any, rule: Any) -> None:
    pair, rng = Pair(name, rule, on_nonfinite=policy), np.random.default_rng(0)
    params = {n: of(rng.standard_normal(rng.choice([0, 1, 5, 70, 5000]))) for n in "bcdefgh"}
    params["a"] = of(rng.standard_normal(params["b"].shape))  # they swap their names
    for turn in range(70):
        names = [n for n in params if rng.random() < (1.0, 1.0, 0.6)[turn % 3]]
        if turn % 5 == 0:
            rng.shuffle(names)
        some = {n: params[n] for n in names}
        grads: dict[str, Any] = {}
        for n in names:
            grad = rng.standard_normal(tuple(params[n].shape))
            if rng.random() < 0.04 and grad.size:
                grad[0] = rng.choice([inf, nan])
            grads[n] = None if rng.random() < 0.05 else of(grad)
        if turn % 4 == 1:
            new = f"z{turn}"
            bad = {**some, new: of(np.ones(2))}, {**grads, new: of(np.ones(3))}
            pair.refuses(ValueError, "has shape", *bad)
        if turn % 4 == 2:
            some[f"new {turn}"], grads[f"new {turn}"] = of(np.ones(2)), of(np.ones(2))
        finite = all(g is None or np.isfinite(value(g)).all() for g in grads.values())
        if policy == "raise" and not finite:
            pair.refuses(ValueError, "infinities", some, grads)
        else:
            pair.step(some, grads)
        if turn % 3 == 2 and {"a", "b"} <= {*pair.plain}:
            pair.both(partial(lambda event, k, opt: event(opt, k), EVENTS[turn // 3 % 9], turn))


@on_engines
def test_pickled_between_steps(name: str) -> None:
    pair = Pair(name, clip=mo.Clip(1.0, 2.0))
    params, grads = warm(pair)
    left = pair.ours
    pair.both(lambda opt: pickle.loads(pickle.dumps(opt)))
    before = repr(left.state_dict())
    for _ in range(3):
        pair.step(params, grads)
        pair.step(dict(reversed(params.items())), grads)
    assert repr(left.state_dict()) == before


BAD: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "a new name": lambda p, g: ({**p, "new": np.ones(2)}, {**g, "new": np.ones(3)}),
    "a moved name": lambda p, g: (
        {**p, "b": torch.ones(1).expand(SHAPE)},
        {**g, "b": torch.ones(SHAPE)},
    ),
    "a known name": lambda p, g: (p, {**g, "b": g["b"][:2]}),
    "fewer names": lambda p, g: ({"b": p["b"], "a": p["a"]}, {"b": g["b"][:2], "a": g["a"]}),
    "what is not finite": lambda p, g: ({**p, "new": np.ones(1)}, {**g, "new": np.full(1, inf)}),
}


@on_engines
@pytest.mark.parametrize("how", BAD)
def test_after_a_step_that_failed_all_goes_on(name: str, how: str) -> None:
    pair = Pair(name, on_nonfinite="raise")
    params, grads = warm(pair)
    for _ in range(2):
        pair.refuses(ValueError, "shape|expanded|infinities", *BAD[how](params, grads))
        pair.step(params, grads)
        pair.step({"a": params["a"]}, {"a": grads["a"]})
        pair.step({**params, "late": np.ones(2)}, {**grads, "late": np.ones(2)})


@on_engines
@pytest.mark.parametrize("average", [None, mo.Average(0.5)], ids=["alone", "averaged"])
def test_rows_that_are_alike_may_come_to_differ(name: str, average: Any) -> None:
    pair = Pair(name, mo.Adam(lr=0.1, weight_decay=0.1), average=average)
    params, rng = arrays(), np.random.default_rng(0)

    def check() -> None:
        for _ in range(2):
            pair.step(params, arrays(int(rng.integers(100))))

    check()
    changes: list[dict[str, Any]] = [
        {"lr": 0.2},
        {"names": "b", "lr": 0.3},  # one that is not the first
        {"names": "b", "lr": 0.2},
        {"names": "a", "betas": (0.5, 0.9)},
        {"betas": (0.5, lambda step: 0.75 if step % 2 else 0.5)},
        {"names": "c", "lr": lambda step: 1.0 / step},
        {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.0},
        {"names": ["c"], "weight_decay": 0.5},
    ]
    for change in changes:
        pair.both(partial(lambda change, opt: opt.set_hyperparameters(**change), change))
        check()
    pair.step({"b": params["b"]}, {"b": arrays(5)["b"]})  # another clock
    check()
    pair.both(lambda opt: opt.forget("c"))  # and another shape in its row
    params["c"] = np.ones(5000, np.float32)
    for _ in range(2):
        pair.step(params, {**arrays(6), "c": np.full(5000, 0.5, np.float32)})
    pair.both(lambda opt: opt.forget("c"))
    params["c"] = np.ones(3, np.float32)
    for _ in range(2):
        pair.step(params, {**arrays(7), "c": np.full(3, 0.5, np.float32)})


@on_engines
def test_a_schedule_that_fails_changes_nothing(name: str) -> None:
    rates = {2: -1.0}
    failing = mo.Adam(lr=lambda t: rates.get(t, 0.1))
    pair, params = Pair(name, lambda n: failing if n == "b" else ADAM), arrays()
    for turn in range(4):
        if turn == 1:
            pair.refuses(ValueError, "'b': Adam: lr must be", params, arrays(turn))
            rates.clear()
        pair.step(params, arrays(turn))


# Rules of others


class Numbers(NamedTuple):
    lr: float
    mix: float
    third: float
    zero: float


@dataclass(frozen=True)
class Other(Rule):
    """A rule whose formula is an argument."""

    lr: Hyperparameter = 0.1
    mix: Hyperparameter = 0.9
    weights: tuple[Hyperparameter, ...] = (1.0,)
    mode: str = ""
    formula: Any = None
    slot_count: int = 0

    ranges: ClassVar = {"lr": NONNEGATIVE, "mix": FRACTION, "weights": NONNEGATIVE}

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(f"slot {i}" for i in range(self.slot_count))

    @property
    def update(self) -> Any:
        return self.formula or plainly

    @classmethod
    def scalars(cls, h: Any, step: Any) -> Numbers:
        return Numbers(h.lr * h.weights[-1], h.mix, 1.0 / 3.0, 0.0)


@dataclass(frozen=True)
class Moody(Other):
    """One whose numbers depend on what is no number."""

    @classmethod
    def scalars(cls, h: Any, step: Any) -> Numbers:
        return Numbers(h.lr if h.mode == "fast" else h.mix * h.lr, h.mix, 1.0 / 3.0, 0.0)


def plainly(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    return param - c.lr * grad, slots


def averaging(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    average = c.mix * slots[0] + c.lr * grad
    return param - average, (average, *slots[1:])


def masked(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    down = xp.where(grad > c.zero, param - c.lr, param)
    return xp.where((grad < c.zero) & (param != grad), param + c.lr, down), slots


def closure(factor: float) -> Any:
    def twice(n: int, x: Any) -> Any:
        return x if n == 0 else twice(n - 1, x + x)

    return lambda xp, p, g, s, c: (p - c.lr * factor * twice(2, g), s)


class CallableObject:
    def __call__(self, xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
        return p - c.lr * g, s


FORMULAS: dict[str, Any] = {
    "elementwise": plainly,
    "with where and masks": masked,
    "a lambda": lambda xp, p, g, s, c: (p - c.lr * abs(g), s),
    "with a literal": lambda xp, p, g, s, c: (p - 0.1 * g, s),
    "with an integer": lambda xp, p, g, s, c: (p - 2 * c.lr * g, s),
    "over a sum": lambda xp, p, g, s, c: (p - c.lr * g / xp.sum(abs(g)), s),
    "over a mean": lambda xp, p, g, s, c: (p - c.lr * g / xp.mean(g * g), s),
    "over the sum of a method": lambda xp, p, g, s, c: (p - c.lr * g / (g * g).sum(), s),
    "a closure": closure(0.3),
    "a partial": partial(lambda k, xp, p, g, s, c: (p - c.lr * g, s), 1),
    "a callable object": CallableObject(),
    "with a product of coefficients": lambda xp, p, g, s, c: (p - c.lr * c.mix * c.third * g, s),
    "with a sum of coefficients": lambda xp, p, g, s, c: (p - (c.lr + c.mix + c.third) * g, s),
    "a cube": lambda xp, p, g, s, c: (p - c.lr * g**3, s),
    "a power": lambda xp, p, g, s, c: (p - c.lr * abs(g) ** c.mix, s),
    "an exponential": lambda xp, p, g, s, c: (p - c.lr * xp.exp(g), s),
    "the gradient handed on": lambda xp, p, g, s, c: (g, s),
}


@on_engines
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("how", FORMULAS)
def test_rules_of_others(name: str, dtype: str, how: str) -> None:
    rng = np.random.default_rng(0)
    rules = {n: Other(lr=0.1 * (i + 1), formula=FORMULAS[how]) for i, n in enumerate("abc")}
    pair = Pair(name, rules.get, mo.Clip(value=1.5))
    params = {n: rng.standard_normal(500).astype(dtype) for n in "abc"}
    for turn in range(4):
        some = {n: params[n] for n in "abc"[: 1 + turn]}
        pair.step(some, {n: rng.standard_normal(500).astype(dtype) for n in some})


FIELDS: dict[str, list[Rule]] = {
    "slots": [Other(formula=averaging, slot_count=n) for n in (2, 1, 3)],
    "the length of a tuple": [Other(weights=(0.3, 0.2, 0.1)[:n]) for n in (2, 1, 3)],
    "a word": [Moody(mode=mode) for mode in ("fast", "slow", "fast")],
}


@on_engines
@pytest.mark.parametrize("how", FIELDS)
def test_rules_of_one_class_may_differ_in_any_field(name: str, how: str) -> None:
    rules = dict(zip("abc", FIELDS[how], strict=True))
    warm(Pair(name, rules.get))
    for rule in rules.values():
        warm(Pair(name, rule))


@on_engines
def test_a_schedule_is_asked_for_steps_that_are_taken(name: str) -> None:
    # It may know no others. A formula of its own makes this the first sight of its kind.
    rule = Other(lr={6: 0.5, 7: 0.25}.__getitem__, formula=lambda *a: plainly(*a))
    pair = Pair(name, rule)
    entries = {"w": {"rule": {"name": "Other"}, "step": 5, "slots": {}}}
    state = {"version": 1, "entries": entries, "pending": {}}
    pair.both(lambda opt: opt.load_state_dict(state))
    for _ in range(2):
        pair.step({"w": np.ones(3)}, {"w": np.ones(3)})


# Versions of tensors


@on_engines
@pytest.mark.parametrize("clip", [None, mo.Clip(0.1)], ids=["unclipped", "clipped"])
def test_a_version_moves_once_for_what_is_updated(name: str, clip: Any) -> None:
    pair, params = Pair(name, clip=clip), tensors()
    params |= {"half": torch.ones(3, dtype=torch.bfloat16), "strided": torch.ones(4)[::2]}
    grads = {n: torch.ones(p.shape, dtype=p.dtype) for n, p in params.items()}
    for turn in range(8):
        some = params if turn < 6 else tensors()
        left = {"a", "half"} if turn % 3 == 2 else set()
        before = {n: (p._version, grads[n]._version) for n, p in some.items()}
        pair.step(some, {n: None if n in left else grads[n] for n in some})
        for n, (version, of_grad) in before.items():
            assert some[n]._version == version + (n not in left), n
            assert grads[n]._version == of_grad


@on_engines
def test_autograd_notices_every_step(name: str) -> None:
    pair = Pair(name)
    params, grads = warm(pair, tensors)
    loss = torch.stack([(p * p).sum() for p in params.values()]).sum()
    pair.step(params, grads)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_engines
def test_a_gradient_clipped_in_place_moves_its_version(name: str) -> None:
    pyro.clear_param_store()
    opt = drop_in.Adam({"lr": 0.1}, {"clip_norm": 1.0})
    params = [torch.zeros(3, requires_grad=True) for _ in range(3)]
    for _ in range(4):
        grads = [torch.full((3,), 5.0), torch.full((3,), 0.1), torch.full((6,), 5.0)[::2]]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        before = [p._version for p in params], [g._version for g in grads]
        with engine(name):
            opt(params)
        assert [p._version for p in params] == [v + 1 for v in before[0]]
        moved = [g._version > v for g, v in zip(grads, before[1], strict=True)]
        assert moved == [True, False, True]
        assert all(g.norm() <= 1.0 for g in grads)


# Libraries, threads and processes


@on_engines
def test_parameters_move_between_libraries(name: str) -> None:
    pair, rng = Pair(name, clip=mo.Clip(0.5, 1.0)), np.random.default_rng(0)
    libraries: list[Callable[[Any], Any]] = [np.array, torch.from_numpy, jnp.array]
    now = {**arrays(), "d": np.ones(3), "half": np.ones(3, np.float16)}
    for turn in range(18):
        some = [*now][: None if turn % 3 else 3]
        of = {n: libraries[rng.integers(3) if turn < 12 else 0] for n in some}
        if turn % 3 == 0:
            of["a"] = torch.from_numpy  # in the end it moves there and back, while others stay
        grads = {n: of[n](rng.standard_normal(now[n].shape).astype(now[n].dtype)) for n in some}
        after = pair.step({n: of[n](now[n]) for n in some}, grads)
        now |= {n: value(p) for n, p in after.items()}


def run(seed: int, size: int, threads: int | None = None) -> list[np.ndarray]:
    """What comes of some steps."""
    rng = np.random.default_rng(seed)
    opt = mo.Optimizer(ADAM, mo.Clip(1.0, 2.0, 0.5), threads=threads)
    params = {n: rng.standard_normal(size).astype(np.float32) for n in "abc"}
    for _ in range(4):
        opt.step(params, {n: rng.standard_normal(size).astype(np.float32) for n in params})
    return [*params.values(), np.array([*opt.last.norms.values(), *opt.last.global_norms.values()])]


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_equal(a, b)


@on_engines
def test_several_threads_step_several_optimizers(name: str) -> None:
    with engine("plain"):
        expected = [run(seed, 500) for seed in range(8)]
    found: dict[int, list[np.ndarray]] = {}
    with engine(name):
        workers = [
            threading.Thread(target=lambda k=seed: found.update({k: run(k, 500)}))
            for seed in range(8)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for seed in range(8):
        assert_same(found[seed], expected[seed])


@on_engines
def test_the_number_of_threads_changes_nothing(name: str) -> None:
    with engine("plain"):
        expected = run(0, 100_003)
    for threads in (1, 2):
        with engine(name):
            assert_same(run(0, 100_003, threads), expected)


@on_engines
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_steps_on(name: str, tmp_path: Path) -> None:
    pair, rng = Pair(name, clip=mo.Clip(1.0)), np.random.default_rng(0)
    params: dict[str, Any] = {str(n): np.ones(n, np.float32) for n in (10, 300_001)}
    grads = {n: rng.standard_normal(p.size).astype("f4") for n, p in params.items()}
    for _ in range(2):
        pair.step(params, grads)
    child = os.fork()
    if child == 0:
        try:
            with engine(name):
                pair.ours.step(params, grads)
            np.savez(tmp_path / "child.npz", **params)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    pair.step(params, grads)
    with np.load(tmp_path / "child.npz") as stepped:
        for n in params:
            assert_equal(stepped[n], params[n], n)


# Norms, of which rounding hides the last bits from the parameters

SMALL = [0, 1, 2, 3, 5, 255, 256, 257, 1000, 4095, 4096, 4097, 8191, 8192, 8193, 12_289, 40_000]
HUGE = [32_768, 32_769, 65_535, 126_977, 262_143, 262_145, 300_000]


@on_engines
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [SMALL, HUGE], ids=["small", "huge"])
def test_norms_of_names_that_come_and_go(name: str, dtype: str, sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    grads = {str(n): np.exp(rng.standard_normal(n)).astype(dtype) for n in sizes}
    if sizes is SMALL:
        low, high = (1e-30, 1e30) if dtype == "float32" else (1e-200, 1e200)
        special = [np.full(5000, high), np.full(5000, low), [low, high], [1, -inf], [nan, inf], [0]]
        grads |= {f"x{i}": np.array(x, dtype) for i, x in enumerate(special)}
    tame = {n: g for n, g in grads.items() if np.isfinite(g).all()}
    expected = {n: exact_norm(g).hex() for n, g in grads.items()}
    together = [exact_norm(*(tame[n] for n in sorted(list(tame)[turn:]))) for turn in range(3)]
    for of in (np.array, torch.tensor):
        own, shared = (
            mo.Optimizer(mo.SGD(lr=1.0), mo.Clip(*bounds)) for bounds in ((1,), (None, 1))
        )
        given = {n: of(g) for n, g in grads.items()}
        params = {n: of(np.zeros(g.shape, dtype)) for n, g in grads.items()}
        with engine(name):
            for turn in range(3):
                own.step(params, given)
                assert {n: x.hex() for n, x in own.last.norms.items()} == expected
                some = sorted(list(tame)[turn:])
                shared.step({n: params[n] for n in some}, {n: given[n] for n in some})
                assert [*shared.last.global_norms.values()] == [together[turn]]
