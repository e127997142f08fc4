"""Compiled kernels of rules that treat a parameter as a whole: passes around exact sums."""

import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import multiopt as mo
from multiopt.backend import backend_named
from multiopt.layout import Layout
from multiopt.rules.means import means
from multiopt.rules.sums import norm
from multiopt_kernels.cpu.shares import SHARED
from multiopt_kernels.extents import Extent, Form, forms_of, plain_form
from multiopt_kernels.operations import Kind, NotTraceable
from multiopt_kernels.passes import cut
from multiopt_kernels.trace import trace_update
from tests.libraries import assert_equal, engine

#: On both sides of what is summed at once, and of what several threads share.
SHAPES = [(), (0,), (1,), (10,), (1023,), (1024,), (1025,), (70, 80), (9000,)]
DIVIDED = [*SHAPES, (SHARED - 1,), (SHARED,), (300_001,), (200, 1000), (5,)]


def run(
    name: str,
    rule: mo.Rule | Callable[[str], mo.Rule],
    start: dict[str, Any],
    grads: list[dict[str, Any]],
    **options: Any,
) -> tuple[dict[str, Any], list[tuple[str, ...]], mo.Optimizer]:
    params = {key: np.array(x) for key, x in start.items()}
    with engine(name):
        opt, clipped = mo.Optimizer(rule, **options), []
        for some in grads:
            opt.step(params, {key: np.array(g) for key, g in some.items()})
            clipped.append(opt.last.clipped)
    return params, clipped, opt


def compare(
    rule: mo.Rule | Callable[[str], mo.Rule],
    start: dict[str, Any],
    grads: list[dict[str, Any]],
    **options: Any,
) -> None:
    """Compiled, and as the rule stands."""
    params, clipped, opt = run("compiled", rule, start, grads, **options)
    expected, expected_clipped, reference = run("plain", rule, start, grads, **options)
    assert clipped == expected_clipped
    for name, param in params.items():
        assert_equal(param, expected[name], name)
        for slot, array in reference.state(name).slots.items():
            assert_equal(opt.state(name).slots[slot], array, f"{name} {slot}")


def everything(opt: mo.Optimizer, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters, and their slots by name."""
    slots = {f"{key} {slot}": x for key in params for slot, x in opt.state(key).slots.items()}
    return params | slots


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


#: Numbers without and with one dimension, and matrices on both sides of what is summed at once and
#: of the width of a strip of columns; stacks of matrices; and what has no elements.
MATRICES = [(1, 1), (1, 7), (7, 1), (30, 40), (40, 300), (1500, 30), (30, 1500), (2100, 70)]
EMPTY = [(0,), (0, 5), (5, 0), (0, 2, 3), (2, 0, 3), (2, 3, 0)]
STACKS = [(2, 3, 4), (3, 2, 40, 5), (2, 1100, 9), (50, 3, 3), (1, 1, 1, 1)]
OF_ALL_SORTS = [(), (1,), (10,), (1025,), (9000,), *MATRICES, *EMPTY, *STACKS]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("clip", [None, mo.Clip(norm=3.0, value=0.02), mo.Clip(global_norm=1.0)])
def test_adafactor_is_the_rule_as_it_stands(dtype: str, threads: int, clip: mo.Clip | None) -> None:
    shapes = [*OF_ALL_SORTS, *([(600, 500), (SHARED,), (300_001,)] if threads > 1 else [])]
    start, grads = drawn(0, shapes, dtype), [drawn(k, shapes, dtype) for k in range(3)]
    for decay in (0.0, 0.1):
        rule = mo.Adafactor(lr=0.1, weight_decay=decay, maximize=decay > 0)
        compare(rule, start, grads, clip=clip, threads=threads, master_weights=decay == 0)


@pytest.mark.parametrize("masters", [False, True])
def test_adafactor_on_bfloat16_is_the_rule_as_it_stands(masters: bool) -> None:
    shapes = [(), (10,), (1025,), (30, 40), (2, 3, 4), (1500, 3)]
    start = {key: torch.tensor(x) for key, x in drawn(0, shapes, "float32").items()}
    results = []
    for name in ("compiled", "plain"):
        params = {key: x.to(torch.bfloat16) for key, x in start.items()}
        with engine(name):
            opt = mo.Optimizer(mo.Adafactor(lr=0.1), master_weights=masters)
            for seed in range(3):
                grads = drawn(seed, shapes, "float32")
                opt.step(params, {k: torch.tensor(x).to(torch.bfloat16) for k, x in grads.items()})
        results.append(everything(opt, params))
    for key, array in results[0].items():
        assert_equal(array, results[1][key], key)


@pytest.mark.parametrize(
    "rule",
    [
        mo.Adafactor(eps=(1e-3, 0.0), d=2.0),
        mo.Adafactor(eps=(0.0, 1e-3), d=float("inf"), beta2_decay=0.0),
        mo.Adafactor(lr=mo.schedules.Cosine(0.1, 10), beta2_decay=lambda step: -0.5 - 0.1 * step),
        mo.Adafactor(eps=(lambda step: 0.1 / step, 1e-3), weight_decay=lambda step: step % 2),
    ],
    ids=["eps", "extremes", "schedules", "switches"],
)
def test_hyperparameters_of_adafactor(rule: mo.Rule) -> None:
    shapes = [(), (10,), (30, 40), (2, 3, 4)]
    compare(rule, drawn(0, shapes, "float32"), [drawn(k, shapes, "float32") for k in range(4)])


def test_adafactor_with_an_average() -> None:
    shapes = [(), (10,), (30, 40), (2, 3, 4), (5, 0)]
    start, grads = drawn(0, shapes, "float32"), [drawn(k, shapes, "float32") for k in range(4)]
    compare(mo.Adafactor(), start, grads, average=mo.Average(0.5, start=2))


def spread(rng: np.random.Generator, shape: tuple[int, ...], powers: tuple[int, int]) -> Any:
    """Numbers of which any two may be any powers of ten apart."""
    return rng.standard_normal(shape) * 10.0 ** rng.integers(*powers, shape)


@pytest.mark.parametrize(
    ("dtype", "powers"), [("float32", (-46, 38)), ("float64", (-320, 300)), ("float64", (-20, 5))]
)
def test_columns_and_rows_of_numbers_far_apart(dtype: str, powers: tuple[int, int]) -> None:
    rng, shapes = np.random.default_rng(0), [(70, 90), (1500, 70), (70, 1500), (3, 20, 10), (50,)]
    start = drawn(0, shapes, dtype)
    with np.errstate(over="ignore"):
        wide = [
            {key: spread(rng, x.shape, powers).astype(dtype) for key, x in start.items()}
            for _ in range(2)
        ]
    # Of some columns, of some rows, and of a few elements in each.
    for grads in wide:
        for key, grad in grads.items():
            plain = rng.standard_normal(grad.shape).astype(dtype)
            chosen = rng.random(grad.shape[-1]) < 0.5
            if key == "1":
                chosen = chosen & (rng.random(grad.shape) < 0.01)
            if key == "2":
                chosen = rng.random((grad.shape[0], 1)) < 0.5
            grads[key] = np.where(chosen, grad, plain).astype(dtype)
            grads[key][..., rng.random(grad.shape[-1]) < 0.2] = 0.0
    compare(mo.Adafactor(), start, wide)
    compare(mo.Adafactor(eps=(1e-30, 1e-3)), start, wide)


def test_sums_of_equal_numbers_and_ties() -> None:
    # Sums that lie half way between two numbers, or just beyond.
    rng, shapes = np.random.default_rng(0), [(3, 64), (64, 3), (2049, 3)]
    for exponent in (-12, -13, -26, -27):
        grads = {
            str(k): np.where(rng.random(shape) < 0.5, 1.0, 2.0**exponent).astype("float32")
            for k, shape in enumerate(shapes)
        }
        compare(mo.Adafactor(), drawn(0, shapes, "float32"), [grads])


@pytest.mark.parametrize("smallest", [0.0, 2.0**-40, 2.0**-51, 2.0**-60, 2.0**-500])
def test_a_tie_that_the_smallest_number_breaks(smallest: float) -> None:
    # 1 + 2^-53 lies half way. 2^-102 is the largest square that two pieces do not hold.
    numbers = np.array([1.0, 2.0**-27, 2.0**-27, smallest])
    wide = np.tile(numbers, (3, 1))
    tall = np.zeros((2048, 3))
    tall[[0, 5, 1500, 2047]] = wide.T
    grads = {"wide": wide, "tall": tall, "narrow": wide.T.copy()}
    compare(mo.Adafactor(), {key: np.ones_like(x) for key, x in grads.items()}, [grads])
    _, _, opt = run("compiled", mo.Adafactor(), dict(grads), [grads])
    expected = 1.0 if smallest == 0.0 else 1.0 + 2.0**-52
    assert (opt.state("wide").slots["row_var"] == expected / 4).all()
    assert (opt.state("tall").slots["col_var"] == expected / 2048).all()


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan, 0.0, 3e38])
@pytest.mark.parametrize("shape", [(7,), (7, 9), (1030, 5), (5, 1030), (2, 6, 7)])
def test_special_numbers_in_some_rows_and_columns(special: float, shape: tuple[int, ...]) -> None:
    start, grads = drawn(0, [shape], "float32"), drawn(1, [shape], "float32")
    grads["0"][..., 2] = special
    grads["0"].reshape(-1)[-1] = special
    compare(mo.Adafactor(eps=(1e-3, 1e-3)), start, [grads, drawn(2, [shape], "float32")])
    start["0"][..., 1] = special
    compare(mo.Adafactor(), start, [drawn(2, [shape], "float32")])


def test_state_of_adafactor_goes_from_one_engine_to_the_other() -> None:
    shapes = [(), (10,), (30, 40), (2, 3, 4), (5, 0), (1500, 3)]
    start, grads = drawn(0, shapes, "float32"), [drawn(k, shapes, "float32") for k in range(4)]
    expected, _, reference = run("plain", mo.Adafactor(), start, grads)
    for first, second in (("plain", "compiled"), ("compiled", "plain"), ("compiled", "compiled")):
        params, _, before = run(first, mo.Adafactor(), start, grads[:2])
        with engine(second):
            opt = mo.Optimizer(mo.Adafactor())
            opt.load_state_dict(before.state_dict())
            for some in grads[2:]:
                opt.step(params, some)
        for name, param in params.items():
            assert_equal(param, expected[name], name)
            slots = opt.state(name).slots
            assert slots.keys() == reference.state(name).slots.keys()
            for slot, array in reference.state(name).slots.items():
                assert_equal(slots[slot], array, f"{name} {slot}")


def test_slots_of_what_has_no_elements_change_too() -> None:
    shapes = [(5, 0), (0, 5), (2, 3, 0), (2, 0, 3), (0,)]
    start, grads = drawn(0, shapes, "float32"), drawn(1, shapes, "float32")
    results = []
    for name in ("compiled", "plain"):
        params = {key: x.copy() for key, x in start.items()}
        with engine(name):
            opt = mo.Optimizer(mo.Adafactor())
            opt.step(params, grads)
            state = opt.state_dict()
            for entry in state["entries"].values():
                entry["slots"] = {slot: x + np.float32(1) for slot, x in entry["slots"].items()}
            opt.load_state_dict(state)
            opt.step(params, grads)
        results.append(everything(opt, params))
    assert 0.0 < results[0]["0 row_var"][0, 0] < 1.0
    for key, array in results[0].items():
        assert_equal(array, results[1][key], key)


def test_every_name_has_its_own_numbers() -> None:
    rates = {"0": 0.1, "1": 0.2, "2": 0.1, "3": 0.3}
    shapes = [(10,), (30, 40), (2, 3, 4), (5,)]
    start, grads = drawn(0, shapes, "float32"), [drawn(k, shapes, "float32") for k in range(2)]
    compare(lambda name: mo.Adafactor(lr=rates[name], d=1.0 + rates[name]), start, grads)


@pytest.mark.parametrize("rule", [mo.LAMB(), mo.Adafactor()], ids=repr)
def test_a_step_needs_next_to_no_memory(rule: mo.Rule) -> None:
    for threads in (1, 2):
        with engine("compiled"):
            opt = mo.Optimizer(rule, threads=threads)
            params, grads = {"w": np.ones((1200, 1000))}, {"w": np.ones((1200, 1000))}
            for _ in range(2):
                opt.step(params, grads)
            tracemalloc.start()
            opt.step(params, grads)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        # A copy of the parameter would be 9.6 MB.
        assert peak < 4e6, threads


def test_names_of_adafactor_come_and_go() -> None:
    shapes = [(10,), (30, 40), (2, 3, 4), (70, 80)]
    start, grads = drawn(0, shapes, "float32"), drawn(1, shapes, "float32")
    results = []
    for name in ("compiled", "plain"):
        params = {key: x.copy() for key, x in start.items()}
        with engine(name):
            opt = mo.Optimizer(mo.Adafactor())
            opt.step(params, grads)
            opt.forget("1")
            opt.step({key: params[key] for key in "02"}, {key: grads[key] for key in "02"})
            opt.step(params, grads)
        results.append(
            params | {f"{k} {s}": x for k in params for s, x in opt.state(k).slots.items()}
        )
    for key, array in results[0].items():
        assert_equal(array, results[1][key], key)


def test_arrays_of_adafactor_with_gaps_and_in_other_orders() -> None:
    rng = np.random.default_rng(0)
    results = []
    big, big_grad = rng.standard_normal((2, 60, 50)), rng.standard_normal((2, 60, 50))
    for name in ("compiled", "plain"):
        x, g = big.copy(), big_grad.copy()
        params = {"gaps": x[0, ::2, ::3], "fortran": np.asfortranarray(x[1]), "flat": x[0, 1, ::3]}
        grads = {"gaps": g[0, ::2, ::3], "fortran": np.asfortranarray(g[1]), "flat": g[0, 1, ::3]}
        with engine(name):
            opt = mo.Optimizer(mo.Adafactor())
            for _ in range(2):
                opt.step(params, grads)
        results.append(
            params | {f"{k} {s}": y for k in params for s, y in opt.state(k).slots.items()}
        )
    for key, array in results[0].items():
        assert_equal(array, results[1][key], key)


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

    def mean_of_one(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        return param - unit(xp, grad, means(xp, xp.asarray(grad, dtype=xp.float64))), slots

    def mixed(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        return param - grad / norm(xp, grad), slots

    for update, message in (
        (forgotten, "after it has changed"),
        (single, "not an array"),
        (mean_of_one, "means"),
        (mixed, "float64 and the compute dtype"),
    ):
        with pytest.raises(NotTraceable, match=message):
            passes(update)


#: A slot with a number for each row, and one with a number for each column.
FACTORED = Form(("rows", "columns"), (Extent.ROWS, Extent.COLUMNS), "float32")


def along(xp: Any, x: Any, axis: int) -> Any:
    """The means along one of the last two axes, which is kept."""
    x = xp.asarray(x, dtype=xp.float64)
    found = means(xp, x if axis == -1 else xp.matrix_transpose(x))
    return xp.expand_dims(found, axis=axis)


def factored_passes(formula: Any) -> list[Any]:
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        param, rows, columns = formula(xp, param, grad, *slots)
        return param, (rows, columns)

    return cut(trace_update(update, 2, {}, FACTORED), FACTORED.extents)


def test_means_of_rows_and_columns_change_slots_at_the_end_of_a_pass() -> None:
    def formula(xp: Any, param: Any, grad: Any, rows: Any, columns: Any) -> Any:
        rows = rows + xp.asarray(along(xp, grad, -1), dtype=param.dtype)
        columns = columns + xp.asarray(along(xp, grad, -2), dtype=param.dtype)
        total = xp.asarray(along(xp, rows, -2), dtype=param.dtype)
        return param - grad * rows * columns / total, rows, columns

    first, second = factored_passes(formula)
    assert (first.writes, first.sums, first.totals) == ({}, (), ())
    assert (first.rows.writes.keys(), first.columns.writes.keys()) == ({2}, {3})
    assert (second.rows, second.columns, second.writes.keys()) == (None, None, {0})
    assert [operation.function for operation, _ in second.totals] == ["column_means"]


def test_what_cannot_be_computed_with_means_is_not_traceable() -> None:
    def narrow(xp: Any, param: Any, x: Any) -> Any:
        return xp.asarray(x, dtype=param.dtype)

    def gone(xp: Any, param: Any, grad: Any, rows: Any, columns: Any) -> Any:
        mean = narrow(xp, param, along(xp, grad, -1))
        return param - grad * mean, rows, columns

    def twice(xp: Any, param: Any, grad: Any, rows: Any, columns: Any) -> Any:
        both = along(xp, grad, -1) + along(xp, param, -1)
        return param - grad, rows + narrow(xp, param, both), columns

    def late(xp: Any, param: Any, grad: Any, rows: Any, columns: Any) -> Any:
        length = narrow(xp, param, norm(xp, grad) * along(xp, grad, -1))
        return param - grad, rows + length, columns

    def by_itself(xp: Any, param: Any, grad: Any, rows: Any, columns: Any) -> Any:
        return param - grad, rows + rows, columns

    def changing(xp: Any, param: Any, grad: Any, rows: Any, columns: Any) -> Any:
        mean = narrow(xp, param, along(xp, grad * rows, -2))
        return param - grad, rows + narrow(xp, param, along(xp, grad, -1)), columns + mean

    def crossed(xp: Any, param: Any, grad: Any, rows: Any, columns: Any) -> Any:
        return param - xp.matrix_transpose(grad), rows, columns

    def misplaced(xp: Any, param: Any, grad: Any, rows: Any, columns: Any) -> Any:
        return param - grad, columns, rows

    for formula, message in (
        (gone, "no slot holds"),
        (twice, "more than one mean"),
        (late, "needs a norm"),
        (by_itself, "otherwise than after"),
        (changing, "changes in the same pass"),
        (crossed, "combines arrays"),
        (misplaced, "not its shape"),
    ):
        with pytest.raises(NotTraceable, match=message):
            factored_passes(formula)


def test_rules_with_slots_of_other_shapes_have_no_form() -> None:
    def shapes(form: Any) -> Any:
        return lambda self, shape: {"exp_avg": shape, "exp_avg_sq": form(shape)}

    def refusing(self: Any, shape: tuple[int, ...]) -> Any:
        raise ValueError("no shape at all")

    for function in (shapes(lambda shape: shape[:1]), shapes(lambda shape: ()), refusing):
        own: Any = type("Own", (mo.LAMB,), {"slot_shapes": function})
        with pytest.raises(NotTraceable, match=r"shapes|no shape"):
            forms_of(own(), "float32")
