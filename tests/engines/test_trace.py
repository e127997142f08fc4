"""Traces: what they hold, what they refuse, and that their printed text computes what rules do."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import array_api_compat.torch
import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import multiopt as mo
from multiopt.kinds import number_fields, other_fields
from multiopt.rules.arithmetic import (
    by_squaring,
    clip_coefficient,
    one_minus_power,
    power,
)
from multiopt.rules.rule import Coefficients, switch
from multiopt_kernels import engines
from multiopt_kernels.cpu import kernels
from multiopt_kernels.cpu.rows import FIRST_SLOT
from multiopt_kernels.cpu.source import Source
from multiopt_kernels.cpu.update import update_source
from multiopt_kernels.forms import coefficient_kinds, traced_scalars
from multiopt_kernels.operations import Kind, NotTraceable
from multiopt_kernels.trace import trace_function, trace_scalars, trace_update
from tests.cases import CASES, Case
from tests.engines.programs import programs
from tests.histories import elementwise_rules, fill
from tests.libraries import Library, assert_equal, engine

DTYPES = ["float32", "float64"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Overflow and NaN are meant here."""
    with np.errstate(all="ignore"):
        yield


def row_of(param: np.ndarray, grad: np.ndarray, slots: list[np.ndarray]) -> list[Any]:
    """A row of the table, arrays in the place of addresses; the text reads no other column."""
    return [param, grad, *[None] * (FIRST_SLOT - 2), *slots]


def run_as_python(text: str, dtype: str) -> dict[str, Any]:
    """The functions of a text, called as Python calls them, element by element."""
    known: dict[str, Any] = {
        "at": lambda array: array,
        "dtype": np.dtype(dtype).type,
        "inf": math.inf,
        "nan": math.nan,
        **dict.fromkeys(("njit", "inlined"), lambda function: function),
        "sqrt": np.sqrt,
    }
    exec(text, known)
    return known


class Printed:
    """The printed text of a rule."""

    def __init__(self, rule: mo.Rule, dtype: str, given: bool) -> None:
        scalars = None if given else traced_scalars(rule)
        kinds = coefficient_kinds(rule, scalars)
        text = update_source(rule.update, len(rule.slots), kinds, scalars)
        self.functions = run_as_python(text, dtype)
        self.given = given or scalars is None
        self.dtype = dtype

    def coefficients(self, rule: mo.Rule, step: int) -> tuple[Any, ...]:
        """The coefficients of a step."""
        if self.given:
            numbers = list(rule.coefficients(step, self.dtype))
        else:
            values = ((getattr(rule, name), place) for name, place in number_fields(rule))
            numbers = [value if place is None else value[place] for value, place in values]
        found: tuple[Any, ...] = self.functions["coefficients"](numbers, np.int64(step))
        return found

    def update(
        self,
        c: tuple[Any, ...],
        param: np.ndarray,
        grad: np.ndarray,
        slots: list[np.ndarray],
        own: float = 1.0,
        shared: float = 1.0,
        bound: float = math.inf,
        writes: bool = False,
    ) -> int:
        """Update arrays in place."""
        row = row_of(param, grad, slots)
        kind = np.dtype(self.dtype).type
        numbers = kind(own), kind(shared), kind(bound)
        passed: int = self.functions["update"](row, 0, 0, param.size, c, *numbers, writes, ())
        return passed


# The rules


@pytest.mark.parametrize("given", [False, True], ids=["", "coefficients of the host"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_text_of_every_rule_computes_what_the_rule_does(
    case: Case, dtype: str, given: bool
) -> None:
    rule = case.rule
    printed = Printed(rule, dtype, given)
    rng = np.random.default_rng(0)
    for kind in ("moderate", "wide", "special"):
        param = fill(rng, (40,), dtype, kind)
        slots = [np.zeros_like(param) for _ in rule.slots]
        for step in (1, 2, 3, 7):
            grad = fill(rng, (40,), dtype, kind)
            c = rule.coefficients(step, dtype)
            new, new_slots = rule.update(np, param, grad, tuple(slots), c)
            printed.update(printed.coefficients(rule, step), param, grad, slots)
            assert_equal(param, np.asarray(new), "param")
            for slot, expected in zip(slots, new_slots, strict=True):
                assert_equal(slot, np.asarray(expected), "slot")


@given(elementwise_rules(), st.sampled_from(DTYPES), st.integers(1, 2**31))
def test_the_text_of_coefficients_gives_those_of_the_host(
    rule: mo.Rule, dtype: str, step: int
) -> None:
    rule = rule.at(step)
    found = Printed(rule, dtype, given=False).coefficients(rule, step)
    for (name, wanted), x in zip(vars(rule.coefficients(step, dtype)).items(), found, strict=True):
        assert x == wanted or (x != x and wanted != wanted), name


@given(st.data(), st.sampled_from(DTYPES), st.booleans())
def test_the_text_clips_gradients_first(data: st.DataObject, dtype: str, writes: bool) -> None:
    rule = data.draw(elementwise_rules()).at(1)
    printed = Printed(rule, dtype, given=True)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    param, grad, *slots = (fill(rng, (30,), dtype, "special") for _ in range(2 + len(rule.slots)))
    own, shared = (data.draw(st.sampled_from([1.0, 0.5, 0.0, math.nan])) for _ in range(2))
    bound = data.draw(st.sampled_from([0.0, 0.25, math.inf]))
    c = rule.coefficients(1, dtype)
    kind = np.dtype(dtype).type
    scaled = grad * kind(own) * kind(shared)
    inside = np.where(scaled > bound, kind(bound), np.where(scaled < -bound, kind(-bound), scaled))
    new, _ = rule.update(np, param, inside, tuple(slots), c)
    given = grad.copy()
    passed = printed.update(
        printed.coefficients(rule, 1), param, grad, slots, own, shared, bound, writes
    )
    assert_equal(param, np.asarray(new))
    assert_equal(grad, inside if writes else given)
    assert bool(passed) == bool((abs(scaled) > bound).any())


@pytest.mark.parametrize("dtype", DTYPES)
@given(program=programs(), seed=st.integers(0, 2**32 - 1))
def test_the_text_of_a_random_update_is_equal(
    dtype: str, program: tuple[Callable[..., Any], int], seed: int
) -> None:
    update, slots = program
    kinds = {"a": Kind.NUMBER, "b": Kind.NUMBER}
    functions = run_as_python(update_source(update, slots, kinds, None), dtype)
    rng = np.random.default_rng(seed)
    param, grad, *kept = (fill(rng, (30,), dtype, "special") for _ in range(2 + slots))
    new, new_slots = update(np, param, grad, tuple(kept), Coefficients(a=0.25, b=3.0))
    one = np.dtype(dtype).type(1)
    row = row_of(param, grad, kept)
    c = functions["coefficients"]([0.25, 3.0], 1)
    new, new_slots = np.array(new), [np.array(slot) for slot in new_slots]
    functions["update"](row, 0, 0, 30, c, one, one, math.inf, False, ())
    assert_equal(param, new)
    for slot, expected in zip(kept, new_slots, strict=True):
        assert_equal(slot, expected)


def test_the_text_of_what_norms_scale_by_is_equal() -> None:
    names = list(inspect.signature(clip_coefficient).parameters)[1:]
    text = Source().function(trace_function(clip_coefficient, names))
    printed = run_as_python(text, "float64")["clip_coefficient"]
    extremes = [0.0, 5e-324, 1e-300, 1e-6, 0.5, 1.0, 1e300, 2.0**1000, math.inf, math.nan]
    for x in np.array(np.meshgrid(*[extremes] * len(names))).reshape(len(names), -1).T:
        expected, got = clip_coefficient(np, *x), printed(*x)
        assert got == expected or (got != got and expected != expected), x


# Switches


@dataclass(frozen=True)
class Steps(mo.SGD):
    """A rule with more switches than it uses, some of which numbers turn."""

    turned: bool = switch()

    slots: ClassVar = ("last",)
    update: ClassVar = property(lambda self: turning)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> Any:
        return dict(
            lr=h.lr,
            decays=h.weight_decay > 0,
            late=step >= 3,
            turned=h.turned,
            both=(h.weight_decay > 0) & (step >= 3),
            weight_decay=h.weight_decay,
        )


def turning(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    (last,) = slots
    if c.decays:
        grad = grad + c.weight_decay * (last if c.late else param)
    if c.both and not c.turned:
        grad = -grad
    return param - c.lr * grad if c.late else param - grad * grad / (last + grad), (grad,)


@pytest.mark.parametrize("name", ["compiled", "blocks"])
@pytest.mark.parametrize("turned", [True, False])
def test_switches_that_numbers_turn(name: str, turned: bool) -> None:
    def run(name: str) -> np.ndarray:
        opt = mo.Optimizer(
            lambda key: Steps(lr=0.1, weight_decay=0.5 if key == "a" else 0.0, turned=turned)
        )
        params = {key: np.linspace(1, 2, 9, dtype="f4") for key in "ab"}
        with engine(name):
            for step in range(6):
                if step == 4:
                    opt.set_hyperparameters(weight_decay=0.25)
                opt.step(params, {key: np.sin(x) for key, x in params.items()})
        return np.concatenate(list(params.values()))

    assert_equal(run(name), run("plain"))


def test_a_switch_that_a_number_turns_needs_no_other_kernel() -> None:
    opt, w = mo.Optimizer(mo.Adam()), {"w": np.ones(3, np.float32)}
    opt.step(w, {"w": np.ones(3, np.float32)})
    made = kernels.update_kernel.cache_info().currsize, len(engines._engines)
    opt.set_hyperparameters(weight_decay=0.1)
    opt.step(w, {"w": np.ones(3, np.float32)})
    assert (kernels.update_kernel.cache_info().currsize, len(engines._engines)) == made


def test_nine_switches_are_refused() -> None:
    kinds = {f"s{k}": Kind.BOOL for k in range(9)}
    with pytest.raises(NotTraceable, match="9 switches"):
        trace_update(lambda xp, p, g, s, c: (p, s), 0, kinds)


# What a trace holds


def test_nothing_is_done_twice_or_for_nothing() -> None:
    def update(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
        _ = p / g
        return (p * g + c.a) - (p * g + c.a), s

    trace = trace_update(update, 0, {"a": Kind.NUMBER})
    assert [o.function for o in trace.operations] == ["multiply", "add", "subtract"]


def test_literals_that_are_equal_and_not_the_same_are_told_apart() -> None:
    def update(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
        return p * 0.0 + g * -0.0 + 1 * p + 1.0 * g, s

    assert [repr(x) for _, x in trace_update(update, 0, {}).literals] == ["0.0", "-0.0", "1", "1.0"]
    # The sign of a zero is not promised, but what comes of it here is.
    kernel_of = [
        update_source(lambda xp, p, g, s, c, zero=zero: (p / (g * zero), s), 0, {}, None)
        for zero in (0.0, -0.0)
    ]
    assert kernel_of[0] != kernel_of[1]


# Literals


def literal_places(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    (last,) = slots
    near = xp.where(abs(grad) < 0.3, 0.1 * grad, grad * 3)
    near = xp.where(near >= 1.7, 1.7, xp.where(near == 0, 1e-3, near))
    far = (0.7 + near) + (near - 1e-7) + (1 - near) + (near + 2.5)
    far = xp.where(far != far, -0.0, xp.where(far <= -1e38, -float("inf"), far))
    return param - c.lr * (far - 0.3 * last), (xp.where(last > 1e-45, near, last + 0.1),)


class Literals(mo.SGD):
    """A rule with literals wherever one may stand."""

    slots = ("last",)
    update = property(lambda self: literal_places)


def typed_places(param: Any, grad: Any, last: Any, lr: float) -> tuple[Any, Any]:
    """The same with every literal made a number of the dtype by hand."""
    k = param.dtype.type
    where = np.where
    near = where(abs(grad) < k(0.3), k(0.1) * grad, grad * k(3))
    near = where(near >= k(1.7), k(1.7), where(near == k(0), k(1e-3), near))
    far = (k(0.7) + near) + (near - k(1e-7)) + (k(1) - near) + (near + k(2.5))
    far = where(far != far, k(-0.0), where(far <= k(-1e38), k(-np.inf), far))
    return (
        param - k(lr) * (far - k(0.3) * last),
        where(last > k(1e-45), near, last + k(0.1)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_literals_are_of_the_working_dtype_on_every_library(library: Library, dtype: str) -> None:
    if dtype not in library.dtypes:
        pytest.skip(f"{library.id} has no {dtype}")
    rng = np.random.default_rng(0)
    start = fill(rng, (300,), dtype, "moderate")
    param, wanted, last = library.param(start), start, np.zeros_like(start)
    opt = mo.Optimizer(Literals(lr=0.1))
    for kind in ("moderate", "special", "wide", "special"):
        grad = fill(rng, (300,), dtype, kind)
        wanted, last = typed_places(wanted, grad, last, 0.1)
        param = opt.step({"w": param}, {"w": library.grad(grad)})["w"]
        assert_equal(library.numpy(param), wanted)
        assert_equal(library.numpy(opt.state("w").slots["last"]), last)


def test_a_rule_with_literals_has_a_kernel() -> None:
    kinds = {"lr": Kind.NUMBER}
    assert "dtype(0.1)" in update_source(literal_places, 1, kinds, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("xp", [array_api_compat.torch, jnp, array_api_strict], ids=str)
def test_an_array_gives_a_literal_its_dtype_in_every_library(xp: Any, dtype: str) -> None:
    # Why literals are allowed in these places: the libraries themselves, without an engine.
    rng = np.random.default_rng(1)
    host = fill(rng, (200,), dtype, "moderate")
    x, kind = xp.asarray(host), np.dtype(dtype).type
    for literal in (0.1, -3.7e-5, 1e30, 2, 0):
        k = kind(literal)
        pairs = [
            (x + literal, host + k),
            (literal + x, k + host),
            (x - literal, host - k),
            (literal - x, k - host),
            (x * literal, host * k),
            (literal * x, k * host),
            *((x < literal, host < k), (x <= literal, host <= k), (x == literal, host == k)),
            *((x > literal, host > k), (x >= literal, host >= k), (x != literal, host != k)),
            (xp.where(x > 0, literal, x), np.where(host > 0, k, host)),
            (xp.where(x > 0, x, literal), np.where(host > 0, host, k)),
        ]
        for got, wanted in pairs:
            assert_equal(np.asarray(got), wanted)


# What is refused

#: What an update does, and a word of the message that says so.
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "truth of an array": (lambda xp, p, g, c: p if g > p else g, "asks for the value"),
    "truth of a coefficient": (lambda xp, p, g, c: p if c.a else g, "asks for the value"),
    "comparison of coefficients": (lambda xp, p, g, c: p if c.a < c.b else g, "less"),
    "equality of coefficients": (lambda xp, p, g, c: p if c.a == c.b else g, "equal"),
    "inequality of coefficients": (lambda xp, p, g, c: p if c.a != 0 else g, "not_equal"),
    "a coefficient among others": (lambda xp, p, g, c: p if c.a in (1.0, 2.0) else g, "equal"),
    "product of coefficients": (lambda xp, p, g, c: p * (c.a * c.b), "multiply"),
    "coefficient and literal": (lambda xp, p, g, c: p * (1 - c.a), "subtract"),
    "root of a coefficient": (lambda xp, p, g, c: p * xp.sqrt(c.a), "sqrt"),
    "size of a coefficient": (lambda xp, p, g, c: p * abs(c.a), "abs"),
    "float of a coefficient": (lambda xp, p, g, c: p * float(c.a), "asks for the value"),
    "coefficient as an array": (lambda xp, p, g, c: p * xp.asarray(c.a), "asks for the value"),
    "array of an array": (lambda xp, p, g, c: xp.asarray(p) * g, "asks for the value"),
    "sum of an array of an array": (lambda xp, p, g, c: xp.sum(xp.asarray([p])) * g, "value"),
    "shape": (lambda xp, p, g, c: p * len(p.shape), "shape"),
    "dtype": (lambda xp, p, g, c: p * xp.finfo(p.dtype).eps, "dtype"),
    "element": (lambda xp, p, g, c: p * g[0], "subscriptable"),
    "length": (lambda xp, p, g, c: p * len(g), "len"),
    "loop": (lambda xp, p, g, c: p * max(g), "iterable"),
    "method": (lambda xp, p, g, c: p - g.mean(), "mean"),
    "sum": (lambda xp, p, g, c: p - xp.sum(g), "numpy.sum"),
    "any": (lambda xp, p, g, c: xp.where(xp.any(g > p), p, g), "numpy.any"),
    "reduction": (lambda xp, p, g, c: p - np.add.reduce(g), r"numpy.add \(reduce"),
    "accumulation": (lambda xp, p, g, c: np.add.accumulate(g), r"numpy.add \(accumulate"),
    "outer": (lambda xp, p, g, c: np.multiply.outer(p, g), r"numpy.multiply \(outer"),
    "matmul": (lambda xp, p, g, c: p * (g @ g), "numpy.matmul"),
    "power": (lambda xp, p, g, c: p - g**2, "numpy.power"),
    "remainder": (lambda xp, p, g, c: p - g % 2, "numpy.remainder"),
    "exp": (lambda xp, p, g, c: p - xp.exp(g), "numpy.exp"),
    "square": (lambda xp, p, g, c: p - xp.square(g), "numpy.square"),
    "maximum": (lambda xp, p, g, c: xp.maximum(p, g), "numpy.maximum"),
    "clip": (lambda xp, p, g, c: xp.clip(g, -1.0, 1.0), "numpy.clip"),
    "clip of a mask": (lambda xp, p, g, c: xp.clip(p > g, p, g), "numpy.clip"),
    "zeros_like": (lambda xp, p, g, c: xp.zeros_like(p), "numpy.zeros_like"),
    "out": (lambda xp, p, g, c: np.add(p, g, out=p), r"numpy.add .*out="),
    "in place": (lambda xp, p, g, c: p.__iadd__(g), r"numpy.add .*out="),
    "where of a ufunc": (lambda xp, p, g, c: np.add(p, g, where=g > p), "numpy.add .*where="),
    "dtype of a ufunc": (lambda xp, p, g, c: np.add(p, g, dtype="f8"), "numpy.add .*dtype="),
    "where of one": (lambda xp, p, g, c: xp.where(g > p)[0] + p, "numpy.where"),
    "where of numbers": (lambda xp, p, g, c: xp.where(g, p, g), "where with a condition"),
    "where of a switch": (lambda xp, p, g, c: xp.where(c.on, p, g), "True"),
    "two literals chosen": (lambda xp, p, g, c: p * xp.where(p > g, 1.0, 0.0), "where .*rule 4"),
    "two integers chosen": (lambda xp, p, g, c: p * xp.where(p > g, 1, 0), "where .*rule 4"),
    "two coefficients chosen": (lambda xp, p, g, c: p * xp.where(p > g, c.a, c.b), "where"),
    "one of each chosen": (lambda xp, p, g, c: p * xp.where(p > g, c.a, -0.5), "where"),
    "a mask or a number": (lambda xp, p, g, c: xp.where(p > g, p > g, 0.5), "where"),
    "divided by a literal": (lambda xp, p, g, c: p / 2.0, "divide with a number"),
    "a literal divided": (lambda xp, p, g, c: 1 / p, "divide with a number"),
    "divided by a coefficient": (lambda xp, p, g, c: p / c.a, "divide with a number"),
    "a negative coefficient divided": (lambda xp, p, g, c: -c.a / p, "divide with a number"),
    "array literal": (lambda xp, p, g, c: p * np.ones(1, np.float32), "ndarray"),
    "0-d literal": (lambda xp, p, g, c: p * np.array(0.5, np.float32), "ndarray"),
    "a literal of NumPy": (lambda xp, p, g, c: np.float64(0.5) * p, "np.float64"),
    "a float32 literal": (lambda xp, p, g, c: p + np.float32(0.5), "np.float32"),
    "an integer of NumPy": (lambda xp, p, g, c: p + np.int64(2), "np.int64"),
    "a large integer": (lambda xp, p, g, c: p * 10**9, "integer 1000000000"),
    "beyond float32": (lambda xp, p, g, c: p * 1e300, "1e[+]300, which is beyond float32"),
    "a bool": (lambda xp, p, g, c: p * True, "True"),
    "other literal": (lambda xp, p, g, c: p == "a", "'a'"),
    "None": (lambda xp, p, g, c: xp.where(p == None, p, g), "None"),  # noqa: E711
    "complex": (lambda xp, p, g, c: 1j * p, "1j"),
    "mask returned": (lambda xp, p, g, c: p > g, "returns"),
    "coefficient returned": (lambda xp, p, g, c: c.a, "returns"),
    "literal returned": (lambda xp, p, g, c: 0.0, "returns"),
    "nothing returned": (lambda xp, p, g, c: None, "returns"),
    "error": (lambda xp, p, g, c: 1 / 0, "division by zero"),
    "no name": (lambda xp, p, g, c: p * c.missing, "missing"),
    "masks subtracted": (lambda xp, p, g, c: p * ((p > g) - (p < g)), "subtract"),
    "a mask multiplied": (lambda xp, p, g, c: (p > g) * p, "multiply of what a comparison"),
    "root of a mask": (lambda xp, p, g, c: xp.sqrt(p > g) * p, "sqrt"),
    "masks compared": (lambda xp, p, g, c: xp.where((p > g) == (p < g), p, g), "equal"),
    "numbers combined": (lambda xp, p, g, c: xp.where(p & g, p, g), "logical_and"),
    "a power of coefficients": (lambda xp, p, g, c: power(p, 3), "by_squaring"),
}
KINDS: dict[str, bool | Kind] = {"a": Kind.NUMBER, "b": Kind.NUMBER, "on": True}


@pytest.mark.parametrize("name", REFUSED)
def test_an_update_is_refused_by_name(name: str) -> None:
    refused, words = REFUSED[name]

    def as_param(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
        return refused(xp, p, g, c), s

    def as_slot(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
        return p, (refused(xp, p, g, c),)

    for update in (as_param, as_slot):
        with pytest.raises(NotTraceable, match=f"^the update .*{words}"):
            trace_update(update, 1, KINDS)


@pytest.mark.parametrize(
    "result",
    [
        lambda p, g, s: (p, ()),
        lambda p, g, s: (p, []),
        lambda p, g, s: (p, None),
        lambda p, g, s: (p, "x"),
        lambda p, g, s: (p, list(s)),
        lambda p, g, s: (p, (*s, g)),
        lambda p, g, s: (p, (g > p,)),
        lambda p, g, s: p,
        lambda p, g, s: [p, s],
    ],
)
def test_results_of_another_form_are_refused(result: Any) -> None:
    with pytest.raises(NotTraceable, match=r"^the update returns"):
        trace_update(lambda xp, p, g, s, c: result(p, g, s), 1, {})


@pytest.mark.parametrize("name", ["divided by a literal", "two literals chosen", "a large integer"])
def test_what_is_refused_runs_as_it_stands(name: str) -> None:
    refused = REFUSED[name][0]

    class Own(mo.SGD):
        update = property(lambda self: lambda xp, p, g, s, c: (p - c.lr * refused(xp, g, p, c), s))

    w = {"w": np.linspace(-1, 1, 50)}
    expected = w["w"].copy()
    for _ in range(2):
        expected = expected - 0.5 * refused(np, np.sin(expected), expected, None)
    opt = mo.Optimizer(Own(lr=0.5))
    for _ in range(2):
        opt.step(w, {"w": np.sin(w["w"])})
    assert_equal(w["w"], expected)


# Coefficients


def traced(scalars: Callable[..., Any]) -> Any:
    return trace_scalars(
        lambda h, step: {"x": scalars(h, step)},
        [("lr", None), ("betas", 0), ("betas", 1)],
        {"maximize": True, "form": "long"},
    )


def branch(h: Any, step: Any) -> Any:
    return h.lr if step < 3 else 0.0


NOT_UNIFORM: dict[str, tuple[Callable[..., Any], str]] = {
    "**": (lambda h, step: h.lr**step, "numpy.power"),
    "2 **": (lambda h, step: 2.0**step, "numpy.power"),
    "**=": (lambda h, step: h.lr.__ipow__(2), "numpy.power"),
    "math": (lambda h, step: math.sqrt(h.lr), "value"),
    "math of the step": (lambda h, step: math.exp(step), "value"),
    "pow": (lambda h, step: pow(h.lr, 2), "numpy.power"),
    "np.exp": (lambda h, step: np.exp(h.lr), "numpy.exp"),
    "branch": (branch, "value"),
    "and": (lambda h, step: h.lr > 0 and step > 1, "value"),
    "not": (lambda h, step: not h.lr > 0, "value"),
    "min": (lambda h, step: min(h.lr, 1.0), "value"),
    "round": (lambda h, step: round(h.lr), "__round__"),
    "int": (lambda h, step: int(step), "value"),
    "//": (lambda h, step: step // 10, "numpy.floor_divide"),
    "%": (lambda h, step: step % 10, "numpy.remainder"),
    "step * step": (lambda h, step: step * step, "multiply of integers"),
    "2 * step": (lambda h, step: 2 * step, "multiply of integers"),
    "float32": (lambda h, step: h.lr * np.float32(0.1), "np.float32"),
    "an array": (lambda h, step: h.lr * np.ones(2), "ndarray"),
    "a word": (lambda h, step: h.form, "'long'"),
    "a mask counted": (lambda h, step: (step > 3) * h.lr, "multiply of what a comparison"),
    "a power of a mask": (lambda h, step: power(step > 3, 2), "by_squaring"),
    "no such number": (lambda h, step: h.eps, "eps"),
    "a loop beside its arguments": (
        lambda h, step: by_squaring(
            step, (1.0,), (h.lr,), lambda r, s: (r * h.lr,), lambda s: (s * s,)
        ),
        "not among its arguments",
    ),
    "a loop that loses a number": (
        lambda h, step: by_squaring(
            step, (1.0, 1.0), (h.lr,), lambda r, t, s: (r,), lambda s: (s,)
        ),
        "returns",
    ),
}


@pytest.mark.parametrize("name", NOT_UNIFORM)
def test_coefficients_that_only_the_host_can_compute(name: str) -> None:
    scalars, words = NOT_UNIFORM[name]
    with pytest.raises(NotTraceable, match=f"^the function scalars .*{words}"):
        traced(scalars)


UNIFORM: dict[str, Callable[..., Any]] = {
    "literals": lambda h, step: 2 * h.lr + 0.5 / h.betas[0] - h.betas[1] / 3,
    "literals chosen": lambda h, step: np.where(step == 1, 1.0, 0.5) * np.where(step > 3, 1, 0),
    "integers": lambda h, step: (step - 1 + 3) / (step + 1) - abs(2 - step) / 7,
    "root of an integer": lambda h, step: 1.0 / np.sqrt(step),
    "-": lambda h, step: -(-h.lr) + -step,  # noqa: B002 -- the point
    "the step": lambda h, step: step,
    "a literal": lambda h, step: 0.1,
    "NumPy's own": lambda h, step: np.float64(0.1) * h.lr,
    "an integer literal": lambda h, step: 3,
    "a switch": lambda h, step: h.maximize,
    "a comparison": lambda h, step: (h.lr > 0.05) | (step >= 2) & ~(h.betas[0] == 0.5),
    "a switch and a number": lambda h, step: h.maximize and h.lr != 0,
    "a switch & a number": lambda h, step: h.maximize & (h.lr != 0),
    "a switch chooses": lambda h, step: np.where(h.maximize, h.lr, -h.lr) + np.sqrt(h.lr),
    "an infinity": lambda h, step: np.where(h.lr > 0, math.inf, -math.inf) * h.lr,
    "a power": lambda h, step: power(h.betas[0], step) + power(0.5, 3) + power(step, 3),
    "a power of a float": lambda h, step: one_minus_power(
        h.betas[1], np.where(step < 3, 1.0, step - 3 + 1.0)
    ),
    "a loop in a loop": lambda h, step: by_squaring(
        step,
        (0.0, 1),
        (h.lr,),
        lambda r, t, s: (r + power(s, 2), t + 2.0),
        lambda s: (power(s, 2),),
    ),
    "numbers that change places": lambda h, step: by_squaring(
        step, (0.0, 1.0), (h.lr, 0.5), lambda r, t, s, u: (t, r), lambda s, u: (u, s)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UNIFORM)
def test_coefficients_are_the_same_numbers_everywhere(name: str, dtype: str) -> None:
    scalars = UNIFORM[name]

    class Own(mo.Adam):
        update = property(lambda self: lambda xp, p, g, s, c: (p, s))

        @classmethod
        def scalars(cls, h: Any, step: Any) -> Any:
            return {"x": scalars(h, step)}

    printed = None
    for rule in (Own(lr=0.1, betas=(0.5, 0.9)), Own(lr=0.07, betas=(0.999, 0.0))):
        object.__setattr__(rule, "maximize", True)
        printed = printed or Printed(rule, dtype, given=False)
        assert not printed.given
        steps = np.array([*range(1, 20), 1000, 2**31 + 1])
        several: Any = rule.coefficients(steps)
        columns = np.broadcast_to(several.x, steps.shape)
        for step, column in zip(steps.tolist(), columns, strict=True):
            (x,) = printed.coefficients(rule, step)
            alone: Any = rule.coefficients(step, dtype)
            assert x == alone.x
            assert np.dtype(dtype).type(column) == x or isinstance(x, bool | np.bool_)


def test_options_are_in_the_trace_and_numbers_are_not() -> None:
    def text(rule: mo.Rule) -> Any:
        return trace_scalars(type(rule).scalars, number_fields(rule), other_fields(rule))

    assert text(mo.Adam()) == text(mo.Adam(lr=0.5, betas=(0.1, 0.2), weight_decay=1.0))
    assert text(mo.Adam()) != text(mo.Adam(maximize=True))


# Rules that are edited while a program runs

SCALE = 2.0


def direction(grad: Any) -> Any:
    return SCALE * grad


def directed(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    return param - c.lr * direction(grad), slots


class Edited(mo.SGD):
    """A rule that uses a function and, in it, a number of its module."""

    update = property(lambda self: directed)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> Any:
        return {"lr": RATE * h.lr}


RATE = 1.0


@pytest.mark.parametrize("name", ["compiled", "blocks"])
@pytest.mark.parametrize(
    ("what", "now"),
    [
        ("SCALE", 3.0),
        ("direction", lambda grad: -grad),
        ("direction", lambda grad: grad / 4.0),
        ("RATE", 0.5),
    ],
)
def test_an_edited_rule_is_a_new_one_for_the_next_optimizer(
    name: str, what: str, now: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = Edited(lr=1.0)

    def step(opt: mo.Optimizer, key: str) -> float:
        with engine(name):
            return float(opt.step({key: np.zeros(1)}, {key: np.ones(1)})[key][0])

    opt = mo.Optimizer(rule)
    assert step(opt, "a") == -2.0
    monkeypatch.setitem(globals(), what, now)
    expected = -RATE * direction(np.ones(1))[0]
    if what != "RATE":
        # One that has begun goes on with the formula that it began with, for names that come too.
        assert step(opt, "b") == -2.0
    assert step(mo.Optimizer(rule), "a") == expected
    assert step(mo.Optimizer(Edited(lr=1.0)), "a") == expected
    monkeypatch.undo()
    assert step(mo.Optimizer(rule), "a") == -2.0
