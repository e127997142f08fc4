"""A tape computes what the update itself computes on whole arrays, in their place."""

import threading
import tracemalloc
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import multiopt as mo
from multiopt.rules.arithmetic import clamp, maximum
from multiopt.rules.rule import Coefficients
from multiopt_kernels.blocks import tape as tape_module
from multiopt_kernels.blocks.tape import Tape
from multiopt_kernels.operations import Kind
from multiopt_kernels.trace import trace_update
from tests.cases import CASES
from tests.engines.programs import programs
from tests.histories import elementwise_rules, fill
from tests.libraries import assert_equal

DTYPES = ["float32", "float64"]
KINDS = ["moderate", "wide", "special"]
#: Elements of a block here, so that sizes of a few hundred have several.
BLOCK = 64
SIZES = [0, 1, 2, 3, 17, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 7]


C = Coefficients(a=0.25, b=3.0, on=True)


def made(update: Any, c: Any, slots: int, dtype: str) -> Tape:
    """The tape of an update with the switches that ``c`` has."""
    kinds = {name: x if isinstance(x, bool) else Kind.NUMBER for name, x in vars(c).items()}
    return Tape(trace_update(update, slots, kinds), slots, dtype)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Overflow and NaN are meant here."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape_module, "BLOCK_BYTES", BLOCK * 4)


def arrays(seed: int, count: int, size: int, dtype: str, kind: str) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [fill(rng, (size,), dtype, kind) for _ in range(count)]


def check(
    tape: Tape, update: Any, param: Any, grad: Any, slots: Any, scalars: Any, run: Any = None
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """One step both ways, from equal arrays; what came of it."""
    new_param, new_slots = update(np, param, grad, slots, scalars)
    mine, my_slots = param.copy(), tuple(slot.copy() for slot in slots)
    my_grad = grad.copy()
    my_grad.flags.writeable = False
    tape.run(mine, my_grad, my_slots, scalars if run is None else run)
    assert_equal(mine, new_param, "param")
    for k, (slot, new) in enumerate(zip(my_slots, new_slots, strict=True)):
        assert_equal(slot, new, f"slot {k}")
    assert_equal(my_grad, grad, "grad")
    return mine, my_slots


def check_update(update: Any, slot_count: int, scalars: Any = C) -> None:
    """An update on numbers of all kinds, of both dtypes, of sizes around a block."""
    for dtype in DTYPES:
        tape = made(update, scalars, slot_count, dtype)
        for seed, size in enumerate(SIZES):
            for kind in KINDS:
                param, grad, *slots = arrays(seed, 2 + slot_count, size, dtype, kind)
                check(tape, update, param, grad, tuple(slots), scalars)


# The rules

#: By setting of the switches, which may change from step to step.
Tapes: TypeAlias = dict[tuple[bool, ...], Tape]


def switches(c: Any) -> tuple[bool, ...]:
    return tuple(x for x in c if isinstance(x, bool))


def tape_of(tapes: Tapes, rule: mo.Rule, c: Any, dtype: str) -> Tape:
    if switches(c) not in tapes:
        tapes[switches(c)] = made(rule.update, c, len(rule.slots), dtype)
    return tapes[switches(c)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rule_is_traced_and_equal(case: Any, dtype: str) -> None:
    rule = case.rule
    tapes: Tapes = {}
    for kind in KINDS:
        param, *grads = arrays(0, 7, 5 * BLOCK + 7, dtype, kind)
        slots = tuple(np.zeros_like(param) for _ in rule.slots)
        for step, grad in enumerate(grads, 1):
            c = rule.coefficients(step, dtype)
            tape = tape_of(tapes, rule, c, dtype)
            param, slots = check(tape, rule.update, param, grad, slots, c)


@given(
    elementwise_rules(),
    st.sampled_from(DTYPES),
    st.sampled_from(KINDS),
    st.sampled_from([*SIZES, 4 * BLOCK, 1000]),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
    st.sampled_from([3, BLOCK, 1 << 17]),
)
def test_a_drawn_rule_is_equal(
    rule: mo.Rule, dtype: str, kind: str, size: int, steps: int, seed: int, block: int
) -> None:
    param, *grads = arrays(seed, 1 + steps, size, dtype, kind)
    slots = tuple(np.zeros_like(param) for _ in rule.slots)
    tapes: Tapes = {}
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(tape_module, "BLOCK_BYTES", block * param.itemsize)
        for step, grad in enumerate(grads, 1):
            c = rule.coefficients(step, dtype)
            tape = tape_of(tapes, rule, c, dtype)
            param, slots = check(tape, rule.update, param, grad, slots, c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [mo.Adam(weight_decay=0.1), mo.ClippedAdam(), mo.SGD()], ids=repr)
def test_several_blocks_of_the_real_size(rule: mo.Rule, dtype: str) -> None:
    block = tape_module.BLOCK_BYTES // np.dtype(dtype).itemsize
    c = rule.coefficients(3, dtype)
    tape = made(rule.update, c, len(rule.slots), dtype)
    for size in (block - 1, block, block + 1, 3 * block + 5):
        param, grad, *slots = arrays(1, 2 + len(rule.slots), size, dtype, "special")
        check(tape, rule.update, param, grad, tuple(slots), c)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_coefficient_for_each_element(case: Any, dtype: str) -> None:
    """Parameters side by side, each with the numbers of its own step: as if each ran alone."""
    rule, sizes = case.rule, [1, 3, BLOCK, 40, 2 * BLOCK + 1]
    # Steps between which no rule turns a switch: each pattern of switches has a tape of its own.
    numbers = [rule.coefficients(step, dtype) for step in range(20, 20 + len(sizes))]
    spread = [
        column[0]
        if isinstance(column[0], bool) or len(set(column)) == 1
        else np.repeat(np.array(column, dtype), sizes)
        for column in zip(*numbers, strict=True)
    ]
    tape = made(rule.update, numbers[0], len(rule.slots), dtype)
    for kind in KINDS:
        whole = arrays(2, 2 + len(rule.slots), sum(sizes), dtype, kind)
        parts = [np.split(x, np.cumsum(sizes)[:-1]) for x in whole]
        alone = [
            rule.update(np, param, grad, tuple(slots), c)
            for c, param, grad, *slots in zip(numbers, *parts, strict=True)
        ]
        param, grad, *slots = whole
        tape.run(param, grad, tuple(slots), spread)
        assert_equal(param, np.concatenate([new for new, _ in alone]))
        for k, slot in enumerate(slots):
            assert_equal(slot, np.concatenate([new[k] for _, new in alone]))


# Updates that no rule has yet. Each is one that a wrong order of writes, a wrong place or a wrong
# dtype would change.


def absolute(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return abs(p) - c.a * xp.abs(g), (maximum(xp, s[0], abs(g)),)


def clipped(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return p - clamp(xp, g, c.a), (clamp(xp, s[0] + g, c.b),)


def sign(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    zero = g - g
    return p - xp.where(g > zero, c.a, xp.where(g < zero, -c.a, g)), (xp.where(s[0] == g, g, s[0]),)


def numbers_chosen(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return p * xp.where(g > c.a, c.a, p), (xp.where(p >= g, 0.5, s[0]),)


def chosen_in_place(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    """The first choice, the second and the mask's input all live where the result may go."""
    return xp.where(p > g, p, g), (xp.where(s[0] <= p, g, s[0]),)


def chosen_backwards(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return xp.where(s[0] != s[0], p, s[0]), (xp.where(p < g, s[0], p),)


def same_choice(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return xp.where(p < g, p, p), (xp.where(s[0] < g, s[0], s[0]),)


def masks(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    inside = (g > -c.b) & (g < c.b)
    outside = ~inside | (p == g)
    either = xp.where(inside, outside, p < g)
    return xp.where(outside, p, p - g), (xp.where(inside, xp.where(either, s[0], g), p),)


def rare_mask(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    """The place of the mask is the one that is free when masks are chosen by it."""
    rare, below, above = p == g, p < g, p > g
    chosen = xp.where(rare, below, above)
    return xp.where(chosen, p, -p), (xp.where(above, s[0], g),)


def mask_read_again(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    mask = g > p
    first = xp.where(mask, p, g)
    second = xp.where(mask, g, s[0])
    return first * second, (xp.where(mask, second, first),)


def literals(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return p - 0.1 * g, (xp.where(s[0] < -0.25, 0, 2 * s[0] + (1 - g)),)


def handed_on(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return p, s


def grad_kept(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return p - c.a * s[0], (g,)


def param_kept(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return g, (p,)


def swapped(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return p + g, (s[1], s[0])


def rotated(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return s[0], (s[1], p)


def rotated_back(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return s[1], (p, s[0] - g)


def one_for_all(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    new = p - g * s[0]
    return new, (new, new)


def old_for_all(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    return s[0], (s[0] + g, s[0])


def history(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    """Each slot takes over from the one before it."""
    return p - s[1] * g, (p * c.a, s[0])


def crossed(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    """Results come early for homes that are read late."""
    x, y, z = p * g, s[0] - p, s[1] + s[0]
    return y * s[1], (z - p, x + s[0] * g)


def forgotten(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    """Slots that are never read, and values that nobody reads."""
    _ = p * g
    __ = p > g
    a, b, d = g + p, g - p, g * g
    return a * b * d, (a - d, b + d)


def many_at_once(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    values = [p * g, p + g, p - g, s[0] * g, s[1] * p, s[1] - g, g - p]
    total = values[0]
    for value in reversed(values):
        total = total * c.a + value
    return total, (values[2] / values[3], xp.sqrt(values[6]))


def twice_negative(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
    bound = -(-c.b)  # noqa: B002 -- the point
    return p * -c.a + (-bound) * g, (s[0] - bound,)


PROBES = [
    (absolute, 1),
    (clipped, 1),
    (sign, 1),
    (numbers_chosen, 1),
    (chosen_in_place, 1),
    (chosen_backwards, 1),
    (same_choice, 1),
    (masks, 1),
    (rare_mask, 1),
    (mask_read_again, 1),
    (literals, 1),
    (handed_on, 0),
    (handed_on, 2),
    (grad_kept, 1),
    (param_kept, 1),
    (swapped, 2),
    (rotated, 2),
    (rotated_back, 2),
    (one_for_all, 2),
    (old_for_all, 2),
    (history, 2),
    (crossed, 2),
    (forgotten, 2),
    (many_at_once, 2),
    (twice_negative, 1),
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("update", "slots"), PROBES)
def test_other_updates_are_equal(update: Any, slots: int) -> None:
    check_update(update, slots)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("update", "slots"), PROBES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_updates_are_equal_with_a_coefficient_for_each_element(
    update: Any, slots: int, dtype: str
) -> None:
    tape = made(update, C, slots, dtype)
    for kind in KINDS:
        param, grad, a, b, *rest = arrays(4, 4 + slots, 5 * BLOCK + 7, dtype, kind)
        check(tape, update, param, grad, tuple(rest), Coefficients(a=a, b=b, on=True))
        check(tape, update, param, grad, tuple(rest), Coefficients(a=a, b=0.5, on=True))


@given(programs(), st.sampled_from(DTYPES), st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
def test_a_random_update_is_equal(
    program: tuple[Callable[..., Any], int], dtype: str, kind: str, seed: int
) -> None:
    update, slot_count = program
    tape = made(update, C, slot_count, dtype)
    param, grad, *slots = arrays(seed, 2 + slot_count, 100, dtype, kind)
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(tape_module, "BLOCK_BYTES", 40 * param.itemsize)
        check(tape, update, param, grad, tuple(slots), C)


def test_a_switch_is_the_one_of_the_trace() -> None:
    def update(xp: Any, p: Any, g: Any, s: Any, c: Any) -> Any:
        return (p - g if c.on else p + g), s

    for on in (True, False):
        check_update(update, 0, Coefficients(a=0.25, b=3.0, on=on))
    param, grad = np.ones(2), np.ones(2)
    made(update, C, 0, "float64").run(param, grad, (), [1.0, 1.0, False])
    assert param.tolist() == [0.0, 0.0]


# Memory and threads


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_no_temporary_as_large_as_the_array(case: Any) -> None:
    rule = case.rule
    c = rule.coefficients(1, "float32")
    tape = made(rule.update, c, len(rule.slots), "float32")
    param, grad, *slots = arrays(0, 2 + len(rule.slots), 1_000_000, "float32", "moderate")
    tracemalloc.start()
    try:
        tape.run(param, grad, tuple(slots), c)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * tape_module.BLOCK_BYTES < param.nbytes / 4


def test_a_rule_computes_in_place_without_moves() -> None:
    """Results go where they belong as they are computed, and two blocks of scratch suffice."""
    rule = mo.Adam(weight_decay=0.1)
    tape = made(rule.update, rule.coefficients(1), 2, "float32")
    assert len(tape._scratch) <= 2
    assert tape_module._copy not in [function for function, _ in tape._program]


def test_threads_share_a_tape() -> None:
    rule = mo.ClippedAdam(clip_norm=0.5)
    c = rule.coefficients(1, "float32")
    tape = made(rule.update, c, 2, "float32")
    whole = [arrays(seed, 4, 300_000, "float32", "special") for seed in range(4)]
    wanted = [rule.update(np, p, g, tuple(s), c) for p, g, *s in whole]

    def run(param: np.ndarray, grad: np.ndarray, *slots: np.ndarray) -> None:
        with np.errstate(all="ignore"):
            tape.run(param, grad, slots, tuple(c))

    threads = [threading.Thread(target=run, args=each) for each in whole]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (param, _, *slots), (new_param, new_slots) in zip(whole, wanted, strict=True):
        assert_equal(param, new_param)
        for slot, new_slot in zip(slots, new_slots, strict=True):
            assert_equal(slot, new_slot)
