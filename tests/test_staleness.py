"""Nothing is stale: what happens to arrays, names and settings between steps is seen by the next.

Each test steps an optimizer on an engine beside one on the engine "plain", which gets copies.
"""

import contextlib
import copy
import os
import pickle
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
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
from multiopt.rules.arithmetic import GROW, SHRINK, sum_of_squares, tree_sum
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule
from tests.libraries import assert_equal, engine

ENGINES = ["compiled", "blocks"]
SHAPE = (3, 4)
MOVES = mo.Adam(lr=0.1)


def value(array: Any) -> np.ndarray:
    """What an array holds, as a plain NumPy array of its own."""
    if isinstance(array, torch.Tensor):
        array = array.detach().resolve_neg()
        if array.dtype == torch.bfloat16:
            return array.float().numpy().astype(ml_dtypes.bfloat16)
        return np.array(array.numpy(), order="C")
    array = np.asarray(array)
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def report(opt: mo.Optimizer) -> str:
    last = opt.last
    parts = last.new, last.updated, last.skipped, dict(last.norms), last.clipped
    return repr((*parts, [norm for _, norm in sorted(last.global_norms.items(), key=repr)]))


class Pair:
    """An optimizer on an engine, and the reference."""

    def __init__(self, engine_name: str, rule: Any = MOVES, clip: Any = None, **options: Any):
        self.engine = engine_name
        self.ours = mo.Optimizer(rule, clip, **options)
        self.plain = mo.Optimizer(rule, clip, **options)

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
        assert self.ours.pending == self.plain.pending
        assert report(self.ours) == report(self.plain)
        for name in self.plain:
            state, slots = self.plain.state(name)
            assert self.ours.state(name).step == state, name
            for slot, array in slots.items():
                assert_equal(value(self.ours.state(name).slots[slot]), array, f"{slot} of {name}")

    def refuses(self, error: type[Exception], match: str, params: Any, grads: Any) -> None:
        before = {name: value(p) for name, p in params.items() if intact(p)}
        with engine(self.engine), pytest.raises(error, match=match):
            self.ours.step(params, grads)
        for name, array in before.items():
            assert_equal(value(params[name]), array, name)
        self.check()

    def both(self, change: Callable[[mo.Optimizer], Any]) -> None:
        """Change the two optimizers; what is returned takes their place."""
        self.ours = change(self.ours) or self.ours
        self.plain = change(self.plain) or self.plain


def intact(array: Any) -> bool:
    return isinstance(array, np.ndarray) or (
        isinstance(array, torch.Tensor)
        and array.layout == torch.strided
        and array.numel() == 0
        or array.untyped_storage().nbytes() > 0
    )


def arrays(seed: int = 0, shape: tuple[int, ...] = SHAPE, names: str = "abc") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.array(rng.standard_normal(shape), np.float32) for name in names}


def tensors(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    return {n: torch.from_numpy(a).requires_grad_() for n, a in arrays(seed, shape).items()}


def warm(pair: Pair, params: dict[str, Any], own: bool = False) -> dict[str, Any]:
    """A few steps, until nothing is new; gradients for the next one."""
    torch_too = isinstance(params["a"], torch.Tensor)
    for seed in range(1, 5):
        grads = arrays(seed, tuple(params["a"].shape))
        if torch_too:
            grads = {name: torch.from_numpy(grad) for name, grad in grads.items()}
        if own:
            for name, param in params.items():
                param.grad = grads[name]
        if seed < 4:
            pair.step(params, None if own else grads)
    return grads


# What may become of NumPy arrays


def strided(x: np.ndarray) -> np.ndarray:
    memory = np.zeros([2 * n for n in x.shape], x.dtype)
    memory[::2, ::2] = x
    return memory[::2, ::2]


def unaligned(x: np.ndarray) -> np.ndarray:
    memory = np.zeros(x.nbytes + 1, np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def mapped(x: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryFile() as file:
        memory = np.memmap(file, x.dtype, "w+", shape=x.shape)
    memory[...] = x
    return memory


class Sub(np.ndarray):
    """A subclass with an opinion of its own."""

    def __setitem__(self, key: Any, item: Any) -> None:
        raise AssertionError("a step does not ask a subclass")


def resized(x: np.ndarray) -> np.ndarray:
    """The same object, elsewhere in memory."""
    kept = x.copy()
    x.resize((1000,), refcheck=False)
    x.resize(SHAPE, refcheck=False)
    x[...] = kept
    return x


SAME = {
    "a copy": np.copy,
    "the same object resized there and back": resized,
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "a view at the same address": lambda x: x[:],
    "in Fortran order": np.asfortranarray,
    "transposed twice": lambda x: np.ascontiguousarray(x.T).T,
    "strided": strided,
    "backwards": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "narrowed": lambda x: np.concatenate([x, x])[: len(x)],
    "unaligned": unaligned,
    "a memmap": mapped,
    "of a subclass": lambda x: x.view(Sub),
    "with metadata in its dtype": lambda x: x.astype(np.dtype(x.dtype, metadata={"unit": "m"})),
    "of torch's memory": lambda x: torch.from_numpy(x.copy()).numpy(),
}
SAME_GRADS = {
    **SAME,
    "read-only": read_only,
    "broadcast": lambda x: np.broadcast_to(x[0, 0], x.shape),
    "sliding": lambda x: np.lib.stride_tricks.sliding_window_view(x.ravel()[:6], 4),
    "of NaN": lambda x: x * np.float32(nan),
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", SAME_GRADS)
def test_an_array_may_become_another(name: str, how: str) -> None:
    pair, params = Pair(name), arrays()
    grads = warm(pair, params)
    if how in SAME:
        params["b"] = SAME[how](params["b"])
    pair.step(params, grads)
    pair.step(params, {**grads, "b": SAME_GRADS[how](grads["b"])})
    pair.step(params, {n: SAME_GRADS[how](g) for n, g in grads.items()})
    pair.step({n: value(p) for n, p in params.items()}, grads)


def reshaped(x: np.ndarray) -> np.ndarray:
    x.shape = (4, 3)
    return x


def retyped(x: np.ndarray) -> np.ndarray:
    x.dtype = np.dtype("int32")
    return x


def grown(x: np.ndarray) -> np.ndarray:
    x.resize((4, 4), refcheck=False)
    return x


#: To be done to a parameter or a gradient itself, which is then refused.
WRONG: dict[str, tuple[Callable[[np.ndarray], Any], type[Exception], str]] = {
    "reshaped in place": (reshaped, ValueError, "'b' has shape"),
    "transposed": (lambda x: x.T, ValueError, "'b' has shape"),
    "resized in place": (grown, ValueError, "'b' has shape"),
    "retyped in place": (retyped, TypeError, "'b' has dtype int32"),
    "of another dtype": (lambda x: x.astype(np.float64), TypeError, "'b' has dtype float64"),
    "of 16 bits": (lambda x: x.astype(np.float16), TypeError, "'b' has dtype float16"),
    "masked": (np.ma.masked_array, TypeError, "'b' is a masked array"),
    "a list": (np.ndarray.tolist, TypeError, "'b' is .* a list"),
    "of torch": (torch.from_numpy, TypeError, "'b' has library"),
}
WRONG_PARAMS = {
    **WRONG,
    "read-only": (read_only, ValueError, "'b' is read-only"),
    "broadcast": (
        lambda x: np.lib.stride_tricks.as_strided(x, strides=(4, 0)),
        ValueError,
        "'b' is expanded",
    ),
    "one with another": (None, ValueError, "'a' and 'b' share memory"),
    "over part of another": (None, ValueError, "'a' and 'b' share memory"),
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", WRONG_PARAMS)
def test_a_parameter_that_went_wrong_is_refused(name: str, how: str) -> None:
    pair, params = Pair(name, clip=mo.Clip(norm=1.0)), arrays()
    grads = warm(pair, params)
    change, error, match = WRONG_PARAMS[how]
    kept = params["b"].copy()
    if how == "one with another":
        params["b"] = params["a"]
    elif how == "over part of another":
        memory = np.concatenate([params["a"], params["b"]])
        params["a"], params["b"] = memory[:3], memory[2:5]
    else:
        assert change is not None
        params["b"] = change(params["b"])
    pair.refuses(error, match, params, grads)
    pair.step({**params, "b": kept}, grads)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", WRONG)
def test_a_gradient_that_went_wrong_is_refused(name: str, how: str) -> None:
    pair, params = Pair(name, clip=mo.Clip(norm=1.0)), arrays()
    grads = warm(pair, params)
    change, error, match = WRONG[how]
    kept = grads["b"].copy()
    pair.refuses(error, match, params, {**grads, "b": change(grads["b"])})
    pair.step(params, {**grads, "b": kept})


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("make", [value, torch.from_numpy], ids=["numpy", "torch"])
def test_sixteen_bits_may_not_become_thirty_two(name: str, dtype: Any, make: Any) -> None:
    pair, params = Pair(name), {"a": np.ones(3, np.float32), "w": np.ones(3, dtype)}
    if make is not value:
        half = torch.float16 if dtype is np.float16 else torch.bfloat16
        params = {"a": torch.ones(3), "w": torch.ones(3, dtype=half)}
    for _ in range(3):
        params = pair.step(params, params)
    params["w"] = make(np.ones(3, np.float32))
    pair.refuses(TypeError, "'w' has dtype float32; expected .*float16", params, params)


# Gradients in the memory of parameters


OVERLAPS: dict[str, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "the parameter itself": lambda p, g: {**g, "b": p["b"]},
    "a view of the parameter": lambda p, g: {**g, "b": p["b"][:]},
    "the parameter backwards": lambda p, g: {**g, "b": p["b"].reshape(-1)[::-1].reshape(SHAPE)},
    "each other": lambda p, g: {"a": p["b"], "b": p["a"], "c": g["c"]},
    "in a ring": lambda p, g: {"a": p["b"], "b": p["c"], "c": p["a"]},
    "one for all": lambda p, g: dict.fromkeys(p, g["a"]),
    "a parameter for all": lambda p, g: dict.fromkeys(p, p["b"]),
}


@pytest.mark.parametrize("clip", [None, mo.Clip(0.5, 0.7, 0.1)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", OVERLAPS)
def test_gradients_may_overlap_with_parameters(name: str, how: str, clip: Any) -> None:
    for params in (arrays(), {n: t.detach() for n, t in tensors().items()}):
        if how == "the parameter backwards" and isinstance(params["b"], torch.Tensor):
            continue  # torch has no negative strides
        pair = Pair(name, mo.SGD(lr=0.5, momentum=0.5), clip)
        grads = warm(pair, params)
        for _ in range(3):
            pair.step(params, OVERLAPS[how](params, grads))
        pair.step(params, grads)


@pytest.mark.parametrize("name", ENGINES)
def test_a_gradient_over_parts_of_two_parameters(name: str) -> None:
    pair, memory = Pair(name), np.random.default_rng(0).standard_normal(40)
    params = {"a": memory[:10], "b": memory[10:20], "c": memory[20:30]}
    for shift in (0, 5, 10, 20, 30):
        pair.step(params, {n: memory[shift : shift + 10] for n in params})
    columns = {"a": memory[:20:2], "b": memory[1:20:2]}
    for _ in range(3):
        pair.step(columns, {"a": columns["b"], "b": columns["a"]})


@pytest.mark.parametrize("name", ENGINES)
def test_zero_dimensions_and_zero_elements(name: str) -> None:
    pair, rng = Pair(name, clip=mo.Clip(1.0, 1.0)), np.random.default_rng(0)
    params = {"number": np.ones(()), "empty": np.ones((0, 3)), "one": np.ones(1)}
    for step in range(6):
        grads = {n: np.array(rng.standard_normal(p.shape)) for n, p in params.items()}
        if step % 2:
            grads["number"] = np.float64(rng.standard_normal())
        pair.step(params, grads)
    pair.step({}, {})
    pair.step(params, {})
    pair.step(params, grads)
    empty = np.ones((0, 3))
    pair.step({"empty": empty, "e": np.ones((0, 3))}, {"empty": empty, "e": empty})
    both = {"empty": empty, "e": empty}
    pair.refuses(ValueError, "'e' and 'empty' share memory", both, both)


# Names, state and settings


class Fault(Exception):
    """What a schedule raises."""


def life(pair: Pair, seed: int, make: Callable[[np.ndarray], Any]) -> Iterator[None]:
    """Names, orders, gradients and settings at random; now and then a step that fails."""
    rng = np.random.default_rng(seed)
    sizes = {name: int(rng.choice([0, 1, 5, 70, 5000])) for name in "abcdefgh"}
    params = {name: make(rng.standard_normal(n)) for name, n in sizes.items()}
    clips = [
        None,
        mo.Clip(1.0),
        mo.Clip(0.5, 0.7, 0.3, 0.0),
        mo.Clip(inf, inf, inf),
        mo.Clip(value=0.2),
    ]
    for _ in range(60):
        mood = rng.random()
        names = [name for name in params if mood < 0.4 or rng.random() < 0.6]
        if mood < 0.7:
            rng.shuffle(names)
        grads: dict[str, Any] = {}
        for name in names:
            grad = rng.standard_normal(tuple(params[name].shape))
            if rng.random() < 0.05 and grad.size:
                grad[0] = rng.choice([inf, nan])
            grads[name] = None if rng.random() < 0.1 else make(grad)
        some = {name: params[name] for name in names}
        if rng.random() < 0.15:
            new = f"new {rng.integers(10**9)}"
            bad = {**some, new: make(np.ones(2))}, {**grads, new: make(np.ones(3))}
            with engine(pair.engine), pytest.raises(ValueError, match=r"has shape|infinities"):
                pair.ours.step(*bad)
            pair.check()
        try:
            params.update(pair.step(some, grads))
        except ValueError as error:
            assert "infinities" in str(error)  # of the reference, which had its turn first
            pair.refuses(ValueError, "infinities", some, grads)
        event = rng.integers(30)
        one, two = rng.choice([*sizes], 2, replace=False)
        if event == 0 and one in pair.plain:
            pair.both(lambda opt, one=one: opt.forget(one))
        elif event == 1 and one in pair.plain and two in pair.plain:
            pair.both(lambda opt, one=one, two=two: opt.rename({one: two, two: one}))
            params[one], params[two] = params[two], params[one]
        elif event == 2:
            lr = float(rng.random())
            pair.both(lambda opt, lr=lr: setattr(opt, "rule", mo.AdamW(lr=lr)))
        elif event == 3:
            pair.both(lambda opt: setattr(opt, "rule", mixed_rule))
        elif event in (4, 5):
            clip = clips[rng.integers(len(clips))]
            pair.both(lambda opt, clip=clip: setattr(opt, "clip", clip))
        elif event == 6:
            pair.both(lambda opt: setattr(opt, "clip", lambda n: clips[ord(n[0]) % len(clips)]))
        elif event == 7:
            saved = pair.plain.state_dict()
            pair.both(lambda opt, saved=saved: opt.load_state_dict(saved))
        elif event == 8:
            pair.both(copy.deepcopy)
        elif event == 9:
            pair.both(lambda opt: opt.state_dict() and None)
        elif event == 10:
            params[one] = make(value(params[one]))
        yield


def mixed_rule(name: str) -> Rule:
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


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("name", ENGINES)
def test_a_long_life_with_all_that_happens(name: str, policy: Any, make: Any) -> None:
    for seed, rule in enumerate([MOVES, mixed_rule]):
        for _ in life(Pair(name, rule, on_nonfinite=policy), seed, make):
            pass


@pytest.mark.parametrize("name", ENGINES)
def test_pickled_and_copied_between_steps(name: str) -> None:
    pair, params = Pair(name, clip=mo.Clip(1.0, 2.0)), arrays()
    grads = warm(pair, params)
    for change in (copy.copy, copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))):
        left = pair.ours
        pair.both(change)
        pair.step(params, grads)
        pair.step(dict(reversed(params.items())), grads)
        state = repr(left.state_dict())
        pair.step(params, grads)
        assert repr(left.state_dict()) == state


BAD: dict[str, Callable[[dict[str, Any], dict[str, Any]], tuple[Any, Any]]] = {
    "a new name": lambda p, g: ({**p, "new": np.ones(2)}, {**g, "new": np.ones(3)}),
    "a new name first": lambda p, g: ({"new": np.ones(2), **p}, {"new": np.ones(3), **g}),
    "a moved name": lambda p, g: (
        {**p, "b": torch.ones(1).expand(SHAPE)},
        {**g, "b": torch.ones(SHAPE)},
    ),
    "a known name": lambda p, g: (p, {**g, "b": g["b"][:2]}),
    "fewer names": lambda p, g: ({"b": p["b"], "a": p["a"]}, {"a": g["a"], "b": g["b"][:2]}),
    "no finite gradient": lambda p, g: ({**p, "new": np.ones(1)}, {**g, "new": np.full(1, inf)}),
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", BAD)
def test_after_a_step_that_failed_all_goes_on(name: str, how: str) -> None:
    pair, params = Pair(name, on_nonfinite="raise"), arrays()
    grads = warm(pair, params)
    for _ in range(2):
        pair.refuses(ValueError, "shape|expanded|infinities", *BAD[how](params, grads))
        pair.step(params, grads)
        pair.step(
            {"a": params["a"]}, grads | {"b": None, "c": None} if False else {"a": grads["a"]}
        )
        pair.step({**params, "late": np.ones(2)}, {**grads, "late": np.ones(2)})


@pytest.mark.parametrize("name", ENGINES)
def test_a_schedule_that_fails_changes_nothing(name: str) -> None:
    rates = {2: -1.0}
    slow = mo.Adam(lr=lambda t: rates.get(t, 0.1))
    pair, params = Pair(name, lambda n: slow if n == "b" else MOVES), arrays()
    grads = arrays(1)
    for _ in range(4):
        if rates and "b" in pair.plain:
            pair.refuses(ValueError, "'b': Adam: lr must be", params, grads)
            rates.clear()
        pair.step(params, grads)


@pytest.mark.parametrize("name", ENGINES)
def test_a_schedule_is_asked_for_steps_that_are_taken(name: str) -> None:
    asked = []

    def rate(step: int) -> float:
        asked.append(step)
        return {6: 0.5, 7: 0.25}[step]

    pair = Pair(name, Scaled(lr=rate))
    state = {"rule": {"name": "Scaled"}, "step": 5, "slots": {}}
    pair.both(
        lambda opt: opt.load_state_dict({"version": 1, "entries": {"w": state}, "pending": {}})
    )
    params = {"w": np.ones(3)}
    for _ in range(2):
        pair.step(params, {"w": np.ones(3)})
    assert set(asked) == {6, 7}


@pytest.mark.parametrize("name", ENGINES)
def test_no_array_is_held_between_steps(name: str) -> None:
    pair = Pair(name, clip=mo.Clip(1.0))
    for change in (np.copy, np.copy, strided, np.copy, torch.from_numpy, torch.clone):
        params = {"w": change(arrays()["a"])} if change is not torch.clone else params
        grads = (
            {"w": change(params["w"])} if change is not torch.from_numpy else {"w": params["w"] * 2}
        )
        pair.step(params, grads)
    for make in (np.ones, torch.ones):
        for _ in range(2):
            params, grads = {"w": make(SHAPE)}, {"w": make(SHAPE)}
            opt = mo.Optimizer(MOVES)
            with engine(name):
                opt.step(params, grads)
            held = weakref.ref(params["w"]), weakref.ref(grads["w"])
            del params, grads
            assert [ref() for ref in held] == [None, None]


# Rules of others


class Numbers(NamedTuple):
    lr: float
    mix: float
    third: float
    zero: float


@dataclass(frozen=True)
class Scaled(Rule):
    """A rule whose formula is an argument."""

    lr: Hyperparameter = 0.1
    mix: Hyperparameter = 0.9
    formula: Any = None
    slot_count: int = 0

    ranges: ClassVar = {"lr": NONNEGATIVE, "mix": FRACTION}

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(f"slot {i}" for i in range(self.slot_count))

    @property
    def update(self) -> Any:
        return self.formula or plainly

    @classmethod
    def scalars(cls, h: Any, step: Any) -> Numbers:
        return Numbers(h.lr, h.mix, 1.0 / 3.0, 0.0)


def plainly(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    return param - c.lr * grad, slots


def averaging(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """As many slots as there are: the first one is an average."""
    average = c.mix * slots[0] + c.lr * grad
    return param - average, (average, *slots[1:])


def signed(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    down = xp.where(grad > c.zero, param - c.lr, param)
    return xp.where((grad < c.zero) & (param != grad), param + c.lr, down), slots


def closure(factor: float) -> Any:
    return lambda xp, p, g, slots, c: (p - c.lr * factor * g, slots)


def recursive() -> Any:
    def twice(n: int, x: Any) -> Any:
        return x if n == 0 else twice(n - 1, x + x)

    return lambda xp, p, g, slots, c: (p - c.lr * twice(2, g), slots)


class Callable_:
    def __call__(self, xp: Any, p: Any, g: Any, slots: Any, c: Any) -> Any:
        return p - c.lr * g, slots


FORMULAS: dict[str, Any] = {
    "elementwise": plainly,
    "with where and masks": signed,
    "a lambda": lambda xp, p, g, s, c: (p - c.lr * abs(g), s),
    "with a literal": lambda xp, p, g, s, c: (p - 0.1 * g, s),
    "with an integer": lambda xp, p, g, s, c: (p - 2 * c.lr * g, s),
    "over a sum": lambda xp, p, g, s, c: (p - c.lr * g / xp.sum(abs(g)), s),
    "over a mean": lambda xp, p, g, s, c: (p - c.lr * g / xp.mean(g * g), s),
    "a method": lambda xp, p, g, s, c: (p - c.lr * g / (g * g).sum(), s),
    "a closure": closure(0.3),
    "a recursive closure": recursive(),
    "a partial": partial(lambda k, xp, p, g, s, c: (p - c.lr * g, s), 1),
    "a callable object": Callable_(),
    "a product of coefficients": lambda xp, p, g, s, c: (p - c.lr * c.mix * c.third * g, s),
    "a sum of coefficients": lambda xp, p, g, s, c: (p - (c.lr + c.mix + c.third) * g, s),
    "a cube": lambda xp, p, g, s, c: (p - c.lr * g**3, s),
    "a power": lambda xp, p, g, s, c: (p - c.lr * abs(g) ** c.mix, s),
    "an exponential": lambda xp, p, g, s, c: (p - c.lr * xp.exp(g), s),
    "the gradient handed on": lambda xp, p, g, s, c: (g, s),
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("how", FORMULAS)
def test_rules_of_others(name: str, dtype: str, how: str) -> None:
    rng = np.random.default_rng(0)
    rules = {n: Scaled(lr=0.1 * (i + 1), formula=FORMULAS[how]) for i, n in enumerate("abc")}
    pair = Pair(name, rules.get, mo.Clip(value=1.5))
    params = {n: rng.standard_normal(500).astype(dtype) for n in "abc"}
    for step in range(4):
        some = {n: params[n] for n in "abc"[: 1 + step]}
        pair.step(some, {n: rng.standard_normal(500).astype(dtype) for n in some})


@pytest.mark.parametrize("name", ENGINES)
def test_the_number_of_slots_may_be_a_field(name: str) -> None:
    pair, params = (
        Pair(name, lambda n: Scaled(formula=averaging, slot_count=" abc".index(n))),
        arrays(),
    )
    for seed in range(3):
        pair.step(params, arrays(seed))
    for count in (2, 1, 3):
        pair = Pair(name, Scaled(formula=averaging, slot_count=count))
        warm(pair, arrays())


# torch


def data(tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    tensor.data = new
    return tensor


def set_(tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.set_(new)


def there_and_back(tensor: torch.Tensor) -> torch.Tensor:
    kept = tensor.detach().clone()
    with torch.no_grad():
        return tensor.requires_grad_(False).resize_(1000).resize_(SHAPE).copy_(kept)


class Own(torch.Tensor):
    """A subclass."""


SAME_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "its data replaced": lambda t: data(t, t.detach().clone()),
    "its data transposed": lambda t: data(t, t.detach().T.contiguous().T),
    "its data narrowed": lambda t: data(t, torch.cat([t.detach(), t.detach()])[:3]),
    "set to other memory": lambda t: set_(t, t.detach().clone()),
    "set to strided memory": lambda t: set_(t, torch.stack([t.detach()] * 2, -1)[..., 1]),
    "resized there and back": there_and_back,
    "a parameter": lambda t: torch.nn.Parameter(t.detach()),
    "of a subclass": lambda t: t.detach().as_subclass(Own),
    "detached": torch.Tensor.detach,
    "a view of a leaf": lambda t: torch.stack([t.detach()] * 2).requires_grad_()[1],
    "the negative of its memory": lambda t: torch._neg_view(-t.detach()),
    "the negative of strided memory": lambda t: torch.complex(t.detach(), -t.detach()).conj().imag,
}
SAME_TENSOR_GRADS = {
    **SAME_TENSORS,
    "expanded": lambda t: t.detach()[:1].expand(SHAPE),
    "with a graph": lambda t: t.detach().requires_grad_() * 2,
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", SAME_TENSOR_GRADS)
def test_a_tensor_may_become_another(name: str, how: str) -> None:
    for own in (False, True):
        pair, params = Pair(name), tensors()
        grads = warm(pair, params, own)
        if how in SAME_TENSORS and not (own and how == "a view of a leaf"):
            params["b"] = SAME_TENSORS[how](params["b"])
        grads["b"] = SAME_TENSOR_GRADS[how](grads["b"].clone())
        if own and "negative of its memory" in how:
            grads["b"] = grads["b"].resolve_neg()  # a documented limit
        for _ in range(2):
            if own:
                for n in params:
                    params[n].grad = grads[n].detach()
            pair.step(params, None if own else grads)
        grads = {
            n: SAME_TENSOR_GRADS[how](g.detach().resolve_neg().clone()) for n, g in grads.items()
        }
        pair.step(params, grads)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,)], ids=str)
def test_the_imaginary_part_of_a_conjugate(name: str, shape: tuple[int, ...]) -> None:
    # Its memory holds the negatives.
    for own in (False, True):
        pair, params = Pair(name), tensors(shape=shape)
        warm(pair, params, own)
        for seed in range(2):
            z = torch.complex(*(torch.from_numpy(x) for x in arrays(seed, shape, "ab").values()))
            grads = dict.fromkeys(params, z.conj().imag)
            assert grads["a"].is_neg()
            if own:
                for n in params:
                    params[n].grad = grads[n]
            pair.step(params, None if own else grads)


def four(seed: int) -> dict[str, torch.Tensor]:
    shape = 2, 3, 4, 5
    t = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))
    return {"first": t, "last": t.to(memory_format=torch.channels_last)}


@pytest.mark.parametrize("name", ENGINES)
def test_channels_may_come_last(name: str) -> None:
    pair, params = Pair(name, clip=mo.Clip(0.5)), four(0)
    for seed in range(3):
        pair.step(params, four(seed))
        pair.step(params, dict(zip(params, reversed(four(seed).values()), strict=True)))


def inference(t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return t.clone()


def released(t: torch.Tensor) -> torch.Tensor:
    t = t.detach().clone()
    t.untyped_storage().resize_(0)
    return t


def retained(t: torch.Tensor) -> torch.Tensor:
    t = t.detach().requires_grad_() * 2
    t.retain_grad()
    t.sum().backward()
    return t


def view_of_computed(t: torch.Tensor) -> torch.Tensor:
    computed = t.detach().requires_grad_() * 2
    with torch.no_grad():
        return computed[:]


WRONG_TENSORS: dict[str, tuple[Callable[[torch.Tensor], Any], type[Exception], str]] = {
    "data of another dtype": (lambda t: data(t, t.detach().double()), TypeError, "dtype float"),
    "data of another shape": (lambda t: data(t, t.detach()[:2]), ValueError, "'b' has shape"),
    "transposed": (lambda t: data(t, t.detach().T), ValueError, "'b' has shape"),
    "resized": (lambda t: t.detach().resize_(4, 4), ValueError, "'b' has shape"),
    "sparse": (lambda t: t.detach().to_sparse(), TypeError, "'b' is a sparse"),
    "meta": (lambda t: t.detach().to("meta"), TypeError, "'b' is a Tensor without memory"),
    "released": (released, TypeError, "'b' is a Tensor without memory"),
    "bfloat16": (lambda t: t.detach().bfloat16(), TypeError, "dtype bfloat16|expected bfloat16"),
}
WRONG_PARAM_TENSORS = {
    **WRONG_TENSORS,
    "expanded": (lambda t: t.detach()[:1].expand(SHAPE), ValueError, "'b' is expanded"),
    "computed": (lambda t: t * 2, ValueError, "'b' is no leaf"),
    "computed, its gradient retained": (retained, ValueError, "'b' is no leaf"),
    "a view of something computed": (view_of_computed, ValueError, "'b' is no leaf"),
    "of inference mode": (inference, ValueError, "'b' was made in inference mode"),
    "over another's memory": (None, ValueError, "'a' and 'b' share memory"),
    "seen by NumPy": (None, ValueError, "'a' and 'b' share memory"),
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", WRONG_PARAM_TENSORS)
def test_a_tensor_that_went_wrong_is_refused(name: str, how: str) -> None:
    pair, params = Pair(name), tensors()
    grads = warm(pair, params)
    change, error, match = WRONG_PARAM_TENSORS[how]
    kept = params["b"].detach().clone()
    if change is not None:
        wrong, grad = change(params["b"]), grads["b"]
    elif how == "seen by NumPy":
        wrong, grad = params["a"].detach().numpy(), grads["b"].numpy()
    else:
        wrong, grad = params["a"].detach()[:], grads["b"]
    versions = {n: params[n]._version for n in "ac"}
    pair.refuses(error, match, {**params, "b": wrong}, {**grads, "b": grad})
    assert versions == {n: params[n]._version for n in "ac"}
    pair.step({**params, "b": kept}, grads)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", WRONG_TENSORS)
def test_a_gradient_tensor_that_went_wrong_is_refused(name: str, how: str) -> None:
    pair, params = Pair(name), tensors()
    grads = warm(pair, params)
    change, error, match = WRONG_TENSORS[how]
    pair.refuses(error, match, params, {**grads, "b": change(grads["b"].clone())})
    pair.step(params, grads)


@pytest.mark.parametrize("name", ENGINES)
def test_a_non_leaf_with_a_gradient_of_its_own_is_refused(name: str) -> None:
    pair, params = Pair(name), tensors()
    warm(pair, params, own=True)
    pair.refuses(ValueError, "'b' is no leaf", {**params, "b": retained(params["b"])}, None)


@pytest.mark.parametrize("name", ENGINES)
def test_gradients_of_their_own_come_and_go(name: str) -> None:
    pair, params = Pair(name), tensors()
    for seed in range(12):
        grads = arrays(seed)
        for i, n in enumerate(params):
            params[n].grad = torch.from_numpy(grads[n]) if (seed >> i) % 2 else None
        pair.step(params)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_tensors_of_a_transformation_are_refused(name: str, transform: str) -> None:
    pair, params = Pair(name), tensors(shape=(3,))
    grads = warm(pair, params)

    def inside(x: torch.Tensor) -> torch.Tensor:
        with engine(name):
            for wrong in ({**params, "b": x}, grads), (params, {**grads, "b": x}):
                with pytest.raises(TypeError, match="'b' is a Tensor without memory"):
                    pair.ours.step(*wrong)
        return x.sum()

    getattr(torch.func, transform)(inside)(
        torch.ones(3) if transform == "grad" else torch.ones(2, 3)
    )
    pair.check()
    pair.step(params, grads)


@pytest.mark.parametrize("clip", [None, mo.Clip(0.1)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", ENGINES)
def test_a_version_moves_once_for_what_is_updated(name: str, clip: Any) -> None:
    pair, params = Pair(name, clip=clip), tensors()
    params["half"] = torch.ones(3, dtype=torch.bfloat16)
    params["strided"] = torch.ones(4)[::2]
    grads = {n: torch.ones(p.shape, dtype=p.dtype) for n, p in params.items()}
    for step in range(6):
        before = {n: (p._version, grads[n]._version) for n, p in params.items()}
        left = {"a", "half"} if step % 3 == 2 else set()
        pair.step(params, {n: None if n in left else g for n, g in grads.items()})
        for n, (version, of_grad) in before.items():
            assert params[n]._version == version + (n not in left), n
            assert grads[n]._version == of_grad


@pytest.mark.parametrize("name", ENGINES)
def test_autograd_notices_every_step(name: str) -> None:
    pair, params = Pair(name), tensors()
    grads = warm(pair, params)
    loss = sum((p * p).sum() for p in params.values())
    pair.step(params, grads)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ENGINES)
def test_a_gradient_clipped_in_place_moves_its_version(name: str) -> None:
    pyro.clear_param_store()
    with engine(name):
        opt = drop_in.Adam({"lr": 0.1}, {"clip_norm": 1.0})
        params = [torch.zeros(3, requires_grad=True) for _ in range(3)]
        for step in range(4):
            params[0].grad, params[1].grad = torch.full((3,), 5.0), torch.full((3,), 0.1)
            params[2].grad = torch.full((1,), 5.0).expand(3) if step == 2 else torch.full((3,), 5.0)
            grads = [p.grad for p in params]
            versions = [p._version for p in params], [g._version for g in grads]
            opt(params)
            assert [p._version - v for p, v in zip(params, versions[0], strict=True)] == [1] * 3
            moved = [g._version > v for g, v in zip(grads, versions[1], strict=True)]
            assert moved == [True, False, step != 2]
            assert all(p.grad.norm() <= 1.0 for p in params)


# Libraries in one step


@pytest.mark.parametrize("name", ENGINES)
def test_parameters_move_between_libraries(name: str) -> None:
    pair, rng = Pair(name, clip=mo.Clip(0.5, 1.0)), np.random.default_rng(0)
    libraries = [np.array, torch.from_numpy, jnp.array]
    now = {**arrays(), "d": np.ones(3), "h": np.ones(3, np.float16)}
    for _ in range(12):
        of = {n: libraries[rng.integers(3)] for n in now}
        grads = {n: of[n](rng.standard_normal(p.shape).astype(p.dtype)) for n, p in now.items()}
        after = pair.step({n: of[n](value(p)) for n, p in now.items()}, grads)
        now = {n: value(p) for n, p in after.items()}


# Threads and processes


def run(seed: int, name: str, size: int = 300, threads: int | None = None) -> list[np.ndarray]:
    """Steps with all that kernels do, and what comes of them."""
    rng = np.random.default_rng(seed)
    opt = mo.Optimizer(mo.Adam(lr=0.1), mo.Clip(1.0, 2.0, 0.5), threads=threads)
    params = {n: rng.standard_normal(size).astype(np.float32) for n in "abc"}
    with contextlib.nullcontext() if threading.active_count() > 1 else engine(name):
        for _ in range(4):
            grads = {n: rng.standard_normal(size).astype(np.float32) for n in params}
            opt.step(params, grads)
    return [*params.values(), np.array([*opt.last.norms.values()])]


@pytest.mark.parametrize("name", ENGINES)
def test_several_threads_step_several_optimizers(name: str) -> None:
    seeds = range(8)
    expected = [run(seed, "plain") for seed in seeds]
    found: dict[int, list[np.ndarray]] = {}
    with engine(name):
        workers = [
            threading.Thread(target=lambda seed=seed: found.update({seed: run(seed, name)}))
            for seed in seeds
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for seed in seeds:
        for ours, theirs in zip(found[seed], expected[seed], strict=True):
            assert_equal(ours, theirs)


@pytest.mark.parametrize("name", ENGINES)
def test_the_number_of_threads_changes_nothing(name: str) -> None:
    expected = run(0, "plain", 100_003)
    for threads in (1, 2):
        for ours, theirs in zip(run(0, name, 100_003, threads), expected, strict=True):
            assert_equal(ours, theirs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("name", ENGINES)
def test_a_forked_child_steps_on(name: str, tmp_path: Path) -> None:
    sizes = {"small": 10, "large": 300_001}
    pair = Pair(name, clip=mo.Clip(1.0))
    params = {n: np.ones(size, np.float32) for n, size in sizes.items()}
    grads = {
        n: np.random.default_rng(0).standard_normal(p.size).astype("f4") for n, p in params.items()
    }
    for _ in range(2):
        pair.step(params, grads)
    before = {n: p.copy() for n, p in params.items()}
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
            assert not (before[n] == params[n]).all()


# Norms, of which rounding hides the last bits from the parameters


def norm(*grads: np.ndarray) -> float:
    """The norm of ``spec/clipping.md``."""

    def total(factor: float) -> float:
        return float(tree_sum(np, np.array([sum_of_squares(np, factor * g) for g in wide])))

    wide = [g.astype(np.float64) for g in grads]
    with np.errstate(all="ignore"):
        once = total(1.0)
        factor = (GROW if once < 2.0**-900 else 1.0) if once < 2.0**1000 else SHRINK
        return float(np.sqrt(total(factor)) / factor)


SMALL = [0, 1, 2, 3, 5, 255, 256, 257, 1000, 4095, 4096, 4097, 8191, 8192, 8193, 12_289, 40_000]
HUGE = [32_768, 32_769, 65_535, 126_977, 262_143, 262_145, 300_000]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("sizes", [SMALL, HUGE], ids=["small", "huge"])
def test_norms_are_sums_over_the_tree(name: str, dtype: str, sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    grads = {f"{n:06}": np.exp(rng.standard_normal(n)).astype(dtype) for n in sizes}
    if sizes is SMALL:
        low, high = (1e-30, 1e30) if dtype == "float32" else (1e-200, 1e200)
        extremes = {
            **{"huge": np.full(5000, high), "tiny": np.full(5000, low), "apart": [low, high]},
            **{"infinite": [1.0, -inf], "nan": [nan, inf], "zero": np.zeros(5)},
        }
        grads |= {n: np.array(x, dtype) for n, x in extremes.items()}
    expected = {n: norm(g).hex() for n, g in grads.items()}
    tame = {n: g for n, g in grads.items() if np.isfinite(g).all()}
    for make in (np.array, torch.tensor) if name == "compiled" else (np.array,):
        own = mo.Optimizer(mo.SGD(lr=1.0), mo.Clip(1.0))
        shared = mo.Optimizer(mo.SGD(lr=1.0), mo.Clip(global_norm=1.0))
        params = {n: make(0 * g) for n, g in grads.items()}
        with engine(name):
            for _ in range(3):
                own.step(params, {n: make(g) for n, g in grads.items()})
                assert {n: x.hex() for n, x in own.last.norms.items()} == expected
                for some in (tame, dict([*tame.items()][1::2])):
                    shared.step({n: params[n] for n in some}, {n: make(g) for n, g in some.items()})
                    ordered = [some[n] for n in sorted(some)]
                    assert [*shared.last.global_norms.values()] == [norm(*ordered)]
