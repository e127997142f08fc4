"""Compiled kernels of rules that treat a parameter as a whole: passes around exact sums."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import multiopt as mo
from multiopt.backend import backend_named
from multiopt.layout import Layout
from multiopt.rules.sums import norm
from multiopt_kernels.cpu.whole_group import SHARED
from multiopt_kernels.extents import plain_form
from multiopt_kernels.operations import Kind, NotTraceable
from multiopt_kernels.passes import cut
from multiopt_kernels.trace import trace_update
from tests.libraries import assert_equal, engine

#: On both sides of what is summed at once, and of what several threads share.
SHAPES = [(), (0,), (1,), (10,), (1023,), (1024,), (1025,), (70, 80), (9000,)]
DIVIDED = [*SHAPES, (SHARED - 1,), (SHARED,), (300_001,), (200, 1000), (5,)]


def run(
    name: str, rule: mo.Rule, start: dict[str, Any], grads: list[dict[str, Any]], **options: Any
) -> tuple[dict[str, Any], list[tuple[str, ...]], mo.Optimizer]:
    params = {key: np.array(x) for key, x in start.items()}
    with engine(name):
        opt, clipped = mo.Optimizer(rule, **options), []
        for some in grads:
            opt.step(params, {key: np.array(g) for key, g in some.items()})
            clipped.append(opt.last.clipped)
    return params, clipped, opt


def compare(
    rule: mo.Rule, start: dict[str, Any], grads: list[dict[str, Any]], **options: Any
) -> None:
    """Compiled, and as the rule stands."""
    params, clipped, opt = run("compiled", rule, start, grads, **options)
    expected, expected_clipped, reference = run("plain", rule, start, grads, **options)
    assert clipped == expected_clipped
    for name, param in params.items():
        assert_equal(param, expected[name], name)
        for slot, array in reference.state(name).slots.items():
            assert_equal(opt.state(name).slots[slot], array, f"{name} {slot}")


def drawn(seed: int, shapes: Sequence[tuple[int, ...]], dtype: str, scale: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    return {
        f"{k}": np.asarray(scale * rng.standard_normal(s)).astype(dtype)
        for k, s in enumerate(shapes)
    }


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, mo.Clip(norm=3.0, value=0.02), mo.Clip(global_norm=1.0)])
def test_lamb_is_the_rule_as_it_stands(dtype: str, threads: int, clip: mo.Clip | None) -> None:
    shapes = SHAPES if threads == 1 else DIVIDED
    start, grads = drawn(0, shapes, dtype), [drawn(k, shapes, dtype) for k in range(3)]
    for decay in (0.0, 0.1):
        rule = mo.LAMB(lr=0.1, weight_decay=decay)
        compare(rule, start, grads, clip=clip, threads=threads, master_weights=decay == 0)


def test_extremes() -> None:
    shapes = [(4,), (2000,)]
    for dtype, scales in (("float32", (1e-44, 1e30)), ("float64", (5e-324, 1e200, 1e-200))):
        for scale in scales:
            for grad_scale in (scale, 1.0, 0.0):
                start = drawn(0, shapes, dtype, scale)
                compare(mo.LAMB(), start, [drawn(k, shapes, dtype, grad_scale) for k in (1, 2)])
    start = drawn(0, shapes, "float32")
    for special in (np.inf, -np.inf, np.nan, 0.0):
        grads = drawn(1, shapes, "float32")
        for grad in grads.values():
            grad[1] = special
        compare(mo.LAMB(), start, [grads, drawn(2, shapes, "float32")])
        compare(mo.LAMB(), {k: special + x for k, x in start.items()}, [grads])


def test_numbers_that_vary() -> None:
    # A decay that is on at some steps: the trace has both updates, and chooses.
    rule = mo.LAMB(
        lr=mo.schedules.Cosine(0.1, 10), weight_decay=lambda step: 0.1 if step % 2 else 0.0
    )
    shapes = [(10,)] * 5 + [(2000,)]
    compare(rule, drawn(0, shapes, "float32"), [drawn(k, shapes, "float32") for k in range(4)])


def test_which_rules_are_compiled() -> None:
    # A user's own rule is promised arrays in row-major order, which a trace has not.
    own: Any = type("Own", (mo.LAMB,), {})
    layout = Layout("numpy", (), "float32", "cpu")
    with engine("compiled"):
        names = [
            type(backend_named("numpy").group(rule, layout)).__name__
            for rule in (mo.LAMB(), own(), mo.Adafactor(), mo.Muon())
        ]
    assert names == ["WholeGroup", "ReferenceGroup", "WholeGroup", "ReferenceGroup"]


def unit(xp: Any, x: Any, length: Any) -> Any:
    return xp.asarray(xp.asarray(x, dtype=xp.float64) / length, dtype=x.dtype)


def passes(update: Any) -> list[Any]:
    form = plain_form(1, "float32")
    return cut(trace_update(update, 1, {"lr": Kind.NUMBER}, form), form.extents)


def test_norms_of_what_depends_on_norms_take_one_pass_each() -> None:
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        grad = unit(xp, grad, norm(xp, grad))
        (average,) = slots
        average = c.lr * average + grad
        return param - c.lr * unit(xp, average, norm(xp, average)), (average,)

    first, second, third = passes(update)
    assert (first.writes, second.writes.keys(), third.writes.keys()) == ({}, {2}, {0})
    assert [len(one.sums) for one in (first, second, third)] == [1, 1, 0]
    assert 1 not in third.reads.values()  # the gradient is in the slot by then


def test_what_cannot_be_cut_is_not_traceable() -> None:
    def forgotten(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        (old,) = slots
        return param - c.lr * unit(xp, old, norm(xp, grad)), (c.lr * grad,)

    def single(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        length = xp.asarray(norm(xp, grad), dtype=grad.dtype)
        return unit(xp, param, norm(xp, length)), slots

    def mixed(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        return param - grad / norm(xp, grad), slots

    for update, message in (
        (forgotten, "after it has changed"),
        (single, "not an array"),
        (mixed, "float64 and the compute dtype"),
    ):
        with pytest.raises(NotTraceable, match=message):
            passes(update)
