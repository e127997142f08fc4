"""Schedules against those of optax and torch; their clocks, their state, and changes mid-run."""

import copy
import functools
import json
import math
import pickle
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optax
import pyro
import pytest
import torch
from safetensors import safe_open
from torch.optim import lr_scheduler

import multiopt as mo
import multiopt.adapters.pyro as drop_in
from multiopt import schedules
from multiopt.rules.rule import NONNEGATIVE, number
from multiopt.schedules import (
    Constant,
    Cosine,
    CosineWarmRestarts,
    Exponential,
    InverseTime,
    Join,
    Linear,
    MultiStep,
    OneCycle,
    Plateau,
    Polynomial,
    Schedule,
    Shared,
    StepDecay,
)
from multiopt.schedules.description import described, observers
from multiopt.state.file import listed
from tests.hosts.pyro.tensors import param
from tests.libraries import LIBRARIES, NUMPY, TORCH, Library, assert_equal, engine
from tests.state.sealed import parts, sealed

LOCAL = [library for library in LIBRARIES if not library.needs_cuda]
ENGINES = ["compiled", "blocks", "plain"]


def ones(n: int = 3) -> np.ndarray:
    return np.ones(n)


def torchs(make: Callable[[Any], Any], lr: float) -> Callable[[int], list[float]]:
    """The rates of a scheduler of torch over some steps."""

    def rates(steps: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        scheduler, found = make(optimizer), []
        for step in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if step + 1 < steps:
                scheduler.step()
        return found

    return rates


def optaxs(schedule: Callable[[Any], Any]) -> Callable[[int], list[float]]:
    return lambda steps: [float(schedule(np.float64(t))) for t in range(steps)]


#: A schedule, its peer, and over how many steps they agree.
PEERS: dict[str, tuple[Schedule, Callable[[int], list[float]], int]] = {
    "constant": (Constant(0.3), optaxs(optax.constant_schedule(0.3)), 50),
    "exponential": (
        Exponential(0.3, 0.97),
        torchs(lambda o: lr_scheduler.ExponentialLR(o, 0.97), 0.3),
        300,
    ),
    "exponential in 10 steps": (
        Exponential(0.3, 0.7, steps=10),
        optaxs(optax.exponential_decay(0.3, 10, 0.7)),
        300,
    ),
    "step": (StepDecay(0.3, 7, 0.9), torchs(lambda o: lr_scheduler.StepLR(o, 7, 0.9), 0.3), 300),
    "step of optax": (
        StepDecay(0.3, 7, 0.9),
        optaxs(optax.exponential_decay(0.3, 7, 0.9, staircase=True)),
        300,
    ),
    "multistep": (
        MultiStep(0.3, [1, 30, 80, 80], 0.5),
        torchs(lambda o: lr_scheduler.MultiStepLR(o, [1, 30, 80, 80], 0.5), 0.3),
        200,
    ),
    "multistep of optax": (
        MultiStep(0.3, [30, 80], 0.5),
        optaxs(optax.piecewise_constant_schedule(0.3, {30: 0.5, 80: 0.5})),
        200,
    ),
    "polynomial": (
        Polynomial(0.3, 0.01, 100, power=2.5),
        optaxs(optax.polynomial_schedule(0.3, 0.01, 2.5, 100)),
        200,
    ),
    "polynomial of torch": (
        Polynomial(0.3, 0.0, 100, power=0.9),
        torchs(lambda o: lr_scheduler.PolynomialLR(o, 100, 0.9), 0.3),
        200,
    ),
    "linear": (Linear(0.01, 0.3, 100), optaxs(optax.linear_schedule(0.01, 0.3, 100)), 200),
    "linear of torch": (
        Linear(0.1, 0.3, 100),
        torchs(lambda o: lr_scheduler.LinearLR(o, 1 / 3, 1.0, 100), 0.3),
        200,
    ),
    "cosine": (
        Cosine(0.3, 100, final=0.03),
        optaxs(optax.cosine_decay_schedule(0.3, 100, alpha=0.1)),
        200,
    ),
    "cosine of torch": (
        Cosine(0.3, 100, final=0.03),
        torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, 100, 0.03), 0.3),
        101,
    ),
    "restarts": (
        CosineWarmRestarts(0.3, 10, final=0.03),
        torchs(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10, 1, 0.03), 0.3),
        200,
    ),
    "longer restarts": (
        CosineWarmRestarts(0.3, 7, 3),
        torchs(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7, 3), 0.3),
        400,
    ),
    "one cycle": (
        OneCycle(0.3, 200),
        torchs(lambda o: lr_scheduler.OneCycleLR(o, 0.3, 200, cycle_momentum=False), 0.3),
        200,
    ),
    "one cycle in lines": (
        OneCycle(0.3, 157, 0.41, "linear", 10.0, 100.0),
        torchs(
            lambda o: lr_scheduler.OneCycleLR(
                *(o, 0.3, 157),
                pct_start=0.41,
                anneal_strategy="linear",
                div_factor=10.0,
                final_div_factor=100.0,
                cycle_momentum=False,
            ),
            0.3,
        ),
        157,
    ),
    "one cycle in three phases": (
        OneCycle(0.3, 157, 0.2, three_phase=True),
        torchs(
            lambda o: lr_scheduler.OneCycleLR(
                o, 0.3, 157, pct_start=0.2, three_phase=True, cycle_momentum=False
            ),
            0.3,
        ),
        157,
    ),
    "join": (
        Join([Linear(0.0, 0.3, 20), Cosine(0.3, 100), Constant(0.05)], [20, 120]),
        optaxs(
            optax.join_schedules(
                [
                    optax.linear_schedule(0.0, 0.3, 20),
                    optax.cosine_decay_schedule(0.3, 100),
                    optax.constant_schedule(0.05),
                ],
                [20, 120],
            )
        ),
        200,
    ),
    "join of torch": (
        Join([Constant(0.03), Exponential(0.3, 0.9)], [20]),
        torchs(
            lambda o: lr_scheduler.SequentialLR(
                o,
                [
                    lr_scheduler.ConstantLR(o, 0.1, 100),
                    lr_scheduler.ExponentialLR(o, 0.9),
                ],
                [20],
            ),
            0.3,
        ),
        20,
    ),
}


@pytest.mark.parametrize("what", PEERS)
def test_the_values_are_those_of_peers(what: str) -> None:
    schedule, peer, steps = PEERS[what]
    ours = [schedule(step) for step in range(1, steps + 1)]
    np.testing.assert_allclose(ours, peer(steps), rtol=1e-11, atol=1e-14)
    assert set(map(type, ours)) == {float}


@pytest.mark.parametrize("power", [0.6, 1.0])
def test_inverse_time_is_its_formula(power: float) -> None:
    schedule = InverseTime(0.3, steps=20, power=power)
    expected = 0.3 / (1 + np.arange(300) / 20) ** power
    np.testing.assert_allclose([schedule(t) for t in range(1, 301)], expected, rtol=1e-13)


def test_schedules_hold_their_ends_exactly() -> None:
    for schedule in (
        Linear(0.1, 0.7, 30),
        Polynomial(0.1, 0.7, 30, 3.0),
        Cosine(0.1, 30, final=0.7),
        Join([Linear(0.1, 0.3, 3), Linear(0.3, 0.7, 27)], [3]),
    ):
        assert (schedule(1), schedule(31), schedule(10**9)) == (0.1, 0.7, 0.7)
    assert OneCycle(0.5, 10, div_factor=2.0, final_div_factor=5.0)(10**9) == 0.05
    # Where torch divides by zero: the way up is no step long.
    assert OneCycle(0.5, 10, pct_start=0.1)(1) == 0.5


def examples() -> list[Schedule]:
    inner = Join([Linear(0.0, 0.1, 5), Shared(Cosine(0.1, 9)).schedule], boundaries=(5,))
    return [*(schedule for schedule, _, _ in PEERS.values()), InverseTime(1.0), Shared(inner)]


@pytest.mark.parametrize("schedule", examples(), ids=repr)
def test_a_schedule_is_a_value(schedule: Schedule) -> None:
    again = eval(repr(schedule), vars(schedules))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert copy.deepcopy(schedule) == schedule
    with pytest.raises(AttributeError):
        schedule.initial = 1.0  # type: ignore[attr-defined]
    json.dumps(described(schedule), allow_nan=False)
    assert mo.Adam(lr=schedule) == mo.Adam(lr=again)


def test_every_schedule_is_public_and_tested() -> None:
    every: list[Any] = [Schedule, *Schedule.__subclasses__()]
    kinds = {c.__name__ for c in every if c.__module__.startswith(f"{schedules.__name__}.")}
    assert kinds == set(schedules.__all__)
    assert {type(s).__name__ for s in examples()} == kinds - {"Schedule", "Plateau"}


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a word": (lambda: Constant("0.1"), "Constant: value must be a finite number; got '0.1'"),  # type: ignore[arg-type]
    "a switch": (lambda: Constant(True), "value must be a finite number"),
    "beyond float64": (lambda: Constant(10**400), "value must be a finite number; got 1000"),
    "nan": (lambda: Exponential(math.nan, 0.9), "initial must be a finite"),
    "negative gamma": (lambda: Exponential(0.1, -0.9), "gamma must be a finite number >= 0"),
    "no steps": (lambda: Exponential(0.1, 0.9, 0), "steps must be a finite number > 0"),
    "half a step": (lambda: Linear(0.0, 1.0, 2.5), "Linear: steps must be an integer >= 1"),  # type: ignore[arg-type]
    "zero steps": (lambda: Cosine(0.1, 0), "steps must be an integer >= 1; got 0"),
    "step size": (lambda: StepDecay(0.1, True), "step_size must be an integer >= 1"),
    "milestones": (lambda: MultiStep(0.1, [3, 2]), "milestones must be integers >= 0 in asc"),
    "a milestone": (lambda: MultiStep(0.1, [1.5]), "milestones must be integers >= 0 in asc"),  # type: ignore[list-item]
    "power": (lambda: Polynomial(0.1, 0.0, 9, 0.0), "power must be a finite number > 0"),
    "period": (lambda: CosineWarmRestarts(0.1, 5, 0), "multiplier must be an integer >= 1"),
    "anneal": (lambda: OneCycle(0.1, 5, anneal="sine"), "anneal must be 'cos' or 'linear'"),  # type: ignore[arg-type]
    "phases": (lambda: OneCycle(0.1, 5, 0.6, three_phase=True), "pct_start must be at most 0.5"),
    "three": (lambda: OneCycle(0.1, 5, three_phase=1), "three_phase must be True or False"),  # type: ignore[arg-type]
    "no schedules": (lambda: Join([], []), "schedules must be one or more schedules"),
    "a number": (lambda: Join([0.1, Constant(0.1)], [3]), "schedules must be one or more"),  # type: ignore[list-item]
    "boundaries": (lambda: Join([Constant(0.1)], [3]), "boundaries must be 0 integers"),
    "boundary": (lambda: Join([Constant(0.1)] * 3, [3, 3]), "boundaries must be 2 integers"),
    "shared parts": (lambda: Join([Shared(Constant(0.1))], []), "Shared goes around"),
    "shared twice": (lambda: Shared(Shared(Constant(0.1))), "schedule must be a schedule"),
    "no schedule": (lambda: Shared(0.1), "schedule must be a schedule; got 0.1"),  # type: ignore[arg-type]
    "factor": (lambda: Plateau(0.1, 1.0), "factor must be a number >= 0 and < 1"),
    "patience": (lambda: Plateau(0.1, patience=-1), "patience must be an integer >= 0"),
    "mode": (lambda: Plateau(0.1, mode="low"), "mode must be 'min' or 'max'"),  # type: ignore[arg-type]
    "threshold mode": (lambda: Plateau(0.1, threshold_mode="x"), "threshold_mode must be 'rel'"),  # type: ignore[arg-type]
    "smoothing": (lambda: Plateau(0.1, smoothing=1.0), "smoothing must be a number >= 0 and < 1"),
    "minimum": (lambda: Plateau(0.1, minimum=0.2), "minimum must be at most 0.1; got 0.2"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what: str) -> None:
    make, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        make()


# Clocks


def grads_of(library: Library, names: str, step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {name: library.grad(rng.standard_normal(5)) for name in names}


#: Which names have a gradient at each step.
TURNS = ["a", "ab", "b", "", "abc", "ac", "bc", "abc", "abc"]


@pytest.mark.parametrize("library", LOCAL, ids=lambda library: library.id)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_a_schedule_gives_the_numbers_of_rules_written_out(library: Library, shared: bool) -> None:
    lr: Schedule = Join([Linear(0.1, 1.0, 2), Exponential(0.9, 0.5)], [3])
    scheduled = mo.Optimizer(
        mo.Adam(lr=Shared(lr) if shared else lr, betas=(Linear(0.5, 0.9, 4), 0.9))
    )
    beta = Linear(0.5, 0.9, 4)
    clocks, taken = dict.fromkeys("abc", 0), 0
    written = mo.Optimizer(mo.Adam())
    first, second = ({n: library.param(np.zeros(5)) for n in "abc"} for _ in range(2))
    with engine(library.engine):
        for turn, names in enumerate(TURNS):
            grads = grads_of(library, names, turn)
            first = scheduled.step(first, grads)
            taken += bool(names)
            for name in names:
                clocks[name] += 1
            rules = {
                n: mo.Adam(lr=lr(taken if shared else t), betas=(beta(t), 0.9))
                for n, t in clocks.items()
                if t
            }
            written.rule = lambda name, rules=rules: rules[name]
            second = written.step(second, grads)
            assert scheduled.steps == taken
            for name in "abc":
                assert_equal(library.numpy(first[name]), library.numpy(second[name]), name)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", ["propagate", "raise", "skip"])
@pytest.mark.parametrize("make", [NUMPY, TORCH], ids=lambda library: library.id)
def test_each_rule_is_asked_once_a_step(name: str, how: str, make: Library) -> None:
    asked: list[int] = []

    def lr(step: int) -> float:
        asked.append(step)
        return 0.1 / step

    opt = mo.Optimizer(lambda name: mo.Adam(lr=lr), on_nonfinite=how)  # type: ignore[arg-type]
    params = {n: make.param(ones()) for n in "abcd"}
    with engine(name):
        for step in range(1, 5):
            opt.step(params, {n: make.grad(ones()) for n in params})
            assert asked == [step]
            asked.clear()
        # Not for a name that takes no part.
        for step in (5, 6):
            opt.step(params, {"a": make.grad(ones())})
            assert asked == [step]
            asked.clear()
        opt.step(params, {n: make.grad(ones()) for n in params})
        assert asked == [7, 5]


@pytest.mark.parametrize("name", ENGINES)
def test_equal_rules_are_asked_together_and_others_not(name: str) -> None:
    rules = {n: mo.SGD(lr=Linear(0.0, 1.0 + (n > "b"), 4)) for n in "abcd"}
    opt, params = mo.Optimizer(rules.get), {n: np.zeros(2) for n in "abcd"}  # type: ignore[arg-type]
    with engine(name):
        for _ in range(4):
            opt.step(params, {n: np.ones(2) for n in params})
    assert {n: w[0] for n, w in params.items()} == {"a": -1.5, "b": -1.5, "c": -3.0, "d": -3.0}


@dataclass(frozen=True)
class HostOnly(mo.Rule):
    """A rule whose coefficients only the host computes, with a switch that a schedule turns."""

    lr: Any = number(0.1, NONNEGATIVE)

    slots: ClassVar = ()
    update: ClassVar = property(lambda self: shrinking)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> Any:
        return dict(lr=h.lr**1.5, shrinks=h.lr > 0.3)


def shrinking(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    return (param - c.lr * param if c.shrinks else param) - c.lr * grad, slots


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("both", [False, True], ids=["one dtype", "two dtypes"])
def test_schedules_of_coefficients_that_only_the_host_computes(name: str, both: bool) -> None:
    lr = Exponential(0.9, 0.7)
    opt = mo.Optimizer(HostOnly(lr=lr))
    params = {n: ones(4).astype("float32" if both and n > "b" else "float64") for n in "abcd"}
    expected = {n: w.copy() for n, w in params.items()}
    clocks = dict.fromkeys("abcd", 0)
    with engine(name):
        for names in ("ab", "abd", "abcd", "abcd", "cd", "abcd"):
            opt.step(params, {n: ones(4).astype(params[n].dtype) for n in names})
            for n in names:
                clocks[n] += 1
                w, rule = expected[n], HostOnly(lr=lr(clocks[n]))
                c = rule.coefficients(clocks[n], w.dtype.name)
                expected[n], _ = rule.update(np, w, np.ones_like(w), (), c)
            for n in "abcd":
                assert_equal(params[n], expected[n], n)


def test_a_schedule_that_cannot_be_looked_up() -> None:
    @dataclass
    class Mutable:
        number: float

        def __call__(self, step: int) -> float:
            return self.number

    lr = {"a": Mutable(1.0), "b": Mutable(1.0)}
    opt = mo.Optimizer(lambda n: mo.SGD(lr=lr[n]))
    params: dict[str, Any] = {n: np.zeros(1) for n in "ab"}
    opt.step(params, {n: np.ones(1) for n in params})
    lr["b"].number = 2.0
    opt.step(params, {n: np.ones(1) for n in params})
    assert (params["a"], params["b"]) == (-2.0, -3.0)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", ["propagate", "skip"])
def test_a_schedule_that_changes_the_arrays(name: str, how: str) -> None:
    """A clear error or the right result, and never a write to memory that is gone."""
    param, other = np.zeros(1000), np.zeros(1000)

    def lr(step: int) -> float:
        if step == 3:
            param.resize(2_000_000, refcheck=False)
        return 1.0

    opt = mo.Optimizer(mo.SGD(lr=lr), on_nonfinite=how)  # type: ignore[arg-type]
    grads = {"w": np.ones(1000), "v": np.ones(1000)}
    with engine(name):
        for _ in range(2):
            opt.step({"w": param, "v": other}, grads)
        with pytest.raises(ValueError, match=r"shape|changed the arrays"):
            opt.step({"w": param, "v": other}, grads)
    assert opt.steps == 2
    assert other.tolist() == [-2.0] * 1000


@pytest.mark.parametrize("name", ENGINES)
def test_a_schedule_that_writes_a_gradient_is_seen_or_not(name: str) -> None:
    w, grad = np.zeros(3), np.ones(3)

    def lr(step: int) -> float:
        grad[:] = 2.0
        return 1.0

    opt = mo.Optimizer(mo.SGD(lr=lr))
    with engine(name):
        opt.step({"w": w}, {"w": grad})
    assert w.tolist() in ([-1.0] * 3, [-2.0] * 3)


@pytest.mark.parametrize("name", ENGINES)
def test_errors_of_numpy_in_a_schedule_are_not_ours(name: str) -> None:
    opt = mo.Optimizer(mo.SGD(lr=lambda step: np.float64(1e-300) * 1e-300 + step))
    w = np.zeros(2)
    with engine(name), np.errstate(all="raise"):
        for _ in range(3):
            opt.step({"w": w}, {"w": np.ones(2)})
    assert w.tolist() == [-6.0, -6.0]


def test_the_optimizer_counts_steps_that_update_anything() -> None:
    opt, nan = mo.Optimizer(mo.SGD(), on_nonfinite="skip"), np.full(3, np.nan)
    params = {"a": ones(), "b": ones()}
    for grads in ({}, {"a": None}, {"a": nan}, {"a": nan, "b": nan}):
        opt.step(params, grads)
    assert opt.steps == 0
    with pytest.raises(ValueError, match="shape"):
        opt.step(params, {"a": ones(2)})
    assert opt.steps == 0
    opt.step(params, {"a": ones(), "b": nan})
    opt.step(params, {"b": ones()})
    assert (opt.steps, opt.state("a").step, opt.state("b").step) == (2, 1, 1)
    assert copy.copy(opt).steps == pickle.loads(pickle.dumps(opt)).steps == 2
    opt.forget("a")
    assert opt.steps == 2


@pytest.mark.parametrize("by_file", [False, True])
def test_the_count_of_the_optimizer_is_saved(tmp_path: Path, by_file: bool) -> None:
    rule = mo.SGD(lr=Shared(InverseTime(1.0)))
    whole, parts = (np.zeros(2) for _ in range(2))
    opt = mo.Optimizer(rule)
    for _ in range(6):
        opt.step({"w": whole}, {"w": np.ones(2)})
    opt = mo.Optimizer(rule)
    opt.step({"v": np.zeros(2)}, {"v": np.ones(2)})
    opt.step({"v": np.zeros(2), "w": np.zeros(2)}, {"v": np.ones(2), "w": np.ones(2)})
    opt.forget("v")
    resumed = mo.Optimizer(rule)
    if by_file:
        opt.save(tmp_path / "run")
        resumed.load(tmp_path / "run")
    else:
        resumed.load_state_dict(opt.state_dict())
    assert resumed.steps == 2
    resumed.step({"w": parts}, {"w": np.ones(2)})
    assert parts.tolist() == [-1 / 3] * 2
    assert resumed.state_dict()["steps"] == 3


def test_state_without_a_count_has_the_largest_clock() -> None:
    opt = mo.Optimizer(mo.SGD())
    for names in ("a", "ab", "ab"):
        opt.step({n: ones() for n in names}, {n: ones() for n in names})
    old = {key: value for key, value in opt.state_dict().items() if key != "steps"}
    resumed = mo.Optimizer(mo.SGD())
    resumed.load_state_dict(old)
    assert resumed.steps == 3
    for bad in (-1, 1.5, True, "3", None):
        with pytest.raises(ValueError, match=r"an int from 0 to 2\^53 under 'steps'"):
            resumed.load_state_dict({**old, "steps": bad})


def test_without_an_optimizer_a_shared_schedule_gets_the_step() -> None:
    rule = mo.SGD(lr=Shared(Linear(0.0, 1.0, 10)))
    assert rule.at(3).lr == rule.at(1, 3).lr == 0.2
    several: Any = rule.coefficients(np.arange(1, 4))
    assert several.lr.tolist() == [0.0, 0.1, 0.2]


# Plateaus


def cuts_of_torch(losses: np.ndarray, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    if "minimum" in options:
        options["min_lr"] = options.pop("minimum")
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, **options, eps=0.0)
    rates = []
    for loss in losses:
        scheduler.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("cooldown", [0, 3])
def test_a_plateau_makes_the_cuts_of_torch(mode: Any, threshold_mode: Any, cooldown: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        options = {
            "mode": mode,
            "threshold_mode": threshold_mode,
            "cooldown": cooldown,
            "factor": rng.choice([0.1, 0.5, 0.9]).item(),
            "patience": int(rng.integers(0, 8)),
            "threshold": rng.choice([0.0, 1e-4, 0.1]).item(),
        }
        options["minimum"] = rng.choice([0.0, 0.01]).item()
        trend = np.exp(-np.arange(300) / 60) * (1 if mode == "min" else -1) + 2
        losses = trend + rng.uniform(0, 0.3, 300)
        losses[rng.random(300) < 0.05] = rng.choice([np.nan, np.inf if mode == "min" else -np.inf])
        if threshold_mode == "abs":
            losses -= 3
        plateau, rates = Plateau(0.8, **options), []
        for loss in losses:
            plateau.observe(loss)
            rates.append(plateau(1))
        assert rates == cuts_of_torch(losses, **options)
        assert len(set(rates)) > 2


def test_a_loss_below_zero_must_improve_too() -> None:
    losses = np.full(10, -100.0)
    plateau = Plateau(0.8, 0.5, patience=2)
    for loss in losses:
        plateau.observe(loss)
    assert plateau(1) == 0.1
    assert set(cuts_of_torch(losses, factor=0.5, patience=2)) == {0.8}
    for k in range(100):
        plateau.observe(-200.0 * 1.001**k)
    assert plateau(1) == 0.1
    upwards = Plateau(0.8, 0.5, patience=2, mode="max")
    for k in range(100):
        upwards.observe(-200.0 / 1.001**k)
    assert upwards(1) == 0.8


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_a_loss_that_is_not_finite_is_no_improvement_and_leaves_no_trace(
    loss: float, smoothing: float
) -> None:
    plateau = Plateau(0.8, 0.5, patience=2, smoothing=smoothing)
    other = Plateau(0.8, 0.5, patience=2, smoothing=smoothing)
    plateau.observe(loss)
    for good in (3.0, 2.0, 1.0):
        plateau.observe(good)
        other.observe(good)
    assert plateau.state() | {"observed": 3} == other.state()
    for _ in range(3):
        plateau.observe(loss)
    assert plateau(1) == 0.4


def test_the_first_loss_is_the_best_whatever_the_threshold() -> None:
    plateau = Plateau(0.8, 0.5, patience=0, threshold=2.0)
    plateau.observe(1.0)
    assert plateau(1) == 0.8


def test_smoothing_sees_through_noise() -> None:
    rng = np.random.default_rng(0)
    losses = 400 - np.arange(200) + 30 * rng.standard_normal(200)
    raw, smooth = Plateau(1.0, patience=20), Plateau(1.0, patience=20, smoothing=0.95)
    average, weights = 0.0, 0.0
    for loss in losses:
        raw.observe(torch.tensor(loss))
        smooth.observe(loss)
        average, weights = 0.95 * average + 0.05 * loss, 0.95 * weights + 0.05
        seen = smooth.state()
        assert seen["average"] / (1 - 0.95 ** seen["finite"]) == pytest.approx(average / weights)
    assert (raw(1) < 1.0, smooth(1)) == (True, 1.0)


def test_a_plateau_is_itself_and_its_call_makes_another() -> None:
    plateau = Plateau(0.5, patience=3, smoothing=0.5)
    assert repr(plateau) == (
        "Plateau(initial=0.5, factor=0.1, patience=3, threshold=0.0001, threshold_mode='rel', "
        "mode='min', cooldown=0, smoothing=0.5, minimum=0.0)"
    )
    assert repr(eval(repr(plateau), vars(schedules))) == repr(plateau)
    assert plateau != Plateau(0.5, patience=3, smoothing=0.5)
    assert hash(mo.Adam(lr=plateau)) == hash(mo.Adam(lr=plateau))
    plateau.observe(1.0)
    for again in (pickle.loads(pickle.dumps(plateau)), copy.deepcopy(plateau)):
        assert again.state() == plateau.state()
        again.observe(0.5)
        assert again.state() != plateau.state()


def wavy(rng: np.random.Generator, steps: int) -> list[float]:
    return (5 + rng.standard_normal(steps)).tolist()


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize("as_callable", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 13])
def test_a_plateau_goes_on_where_it_was_saved(
    tmp_path: Path, by_file: bool, as_callable: bool, joined: bool, stop: int
) -> None:
    losses = wavy(np.random.default_rng(1), 40)

    def made() -> tuple[mo.Optimizer, Plateau]:
        plateau = Plateau(0.8, 0.5, patience=2, cooldown=1, smoothing=0.5)
        lr: Schedule = Join([Linear(0.0, 0.8, 5), plateau], [5]) if joined else plateau
        rule = mo.SGD(lr=lr, momentum=0.5)
        return mo.Optimizer((lambda name: rule) if as_callable else rule), plateau

    def stepped(opt: mo.Optimizer, plateau: Plateau, params: Any, some: list[float]) -> None:
        for loss in some:
            opt.step(params, {name: np.ones(2) for name in params})
            plateau.observe(loss)

    opt, plateau = made()
    whole = {"a": np.zeros(2), "b": np.zeros(2)}
    stepped(opt, plateau, whole, losses)
    assert plateau(1) < 0.4

    opt, plateau = made()
    params = {"a": np.zeros(2), "b": np.zeros(2)}
    stepped(opt, plateau, params, losses[:stop])
    resumed, again = made()
    if by_file:
        opt.save(tmp_path / "run")
        resumed.load(tmp_path / "run")
    else:
        resumed.load_state_dict(opt.state_dict())
    stepped(resumed, again, params, losses[stop:])
    assert {n: w.tolist() for n, w in params.items()} == {n: w.tolist() for n, w in whole.items()}
    # Loading goes back, too.
    if stop:
        resumed.load_state_dict(opt.state_dict())
        assert again.state() == plateau.state()


def test_a_late_name_does_not_set_a_plateau_back() -> None:
    def made() -> tuple[mo.Optimizer, Plateau]:
        plateau = Plateau(0.8, 0.5, patience=0)
        return mo.Optimizer(lambda name: mo.SGD(lr=plateau)), plateau

    opt, plateau = made()
    opt.step({"a": ones(), "late": ones()}, {"a": ones(), "late": ones()})
    plateau.observe(1.0)
    resumed, again = made()
    resumed.load_state_dict(opt.state_dict())
    resumed.step({"a": ones()}, {"a": ones()})
    again.observe(1.0)
    resumed.step({"late": ones()}, {"late": ones()})
    assert again(1) == 0.4


# Saved descriptions


def test_schedules_and_their_place_are_saved(tmp_path: Path) -> None:
    def mine(step: int) -> float:
        return 0.5

    rule = mo.Adam(
        lr=Shared(Join([Linear(0.0, 1.0, 4), mine], [4])),
        betas=(0.9, Constant(0.99)),
        eps=mine,
        weight_decay=Plateau(0.25),
    )
    opt = mo.Optimizer(rule)
    for _ in range(2):
        opt.step({"w": ones()}, {"w": ones()})
    opt.save(tmp_path / "run")
    with safe_open(tmp_path / "run", "numpy") as file:
        document = json.loads(file.metadata()["multiopt"])
    assert document["steps"] == 2
    (table,) = document["entries"]
    words = document["rules"][table["rule"]]
    numbers = {k: words[k] for k in ("lr", "betas", "eps", "weight_decay")}
    assert numbers == {"lr": 0.25, "betas": [0.9, 0.99], "eps": 0.5, "weight_decay": 0.25}
    assert words["schedules"]["lr"] == {
        "name": "Shared",
        "schedule": {
            "name": "Join",
            "schedules": [{"name": "Linear", "initial": 0.0, "final": 1.0, "steps": 4}, None],
            "boundaries": [4],
        },
    }
    assert words["schedules"]["betas"] == [0.9, {"name": "Constant", "value": 0.99}]
    seen = {"value": 0.25, "best": "inf", "bad": 0, "waiting": 0, "average": 0.0}
    seen |= {"finite": 0, "observed": 0}
    # What it has seen is state, and stands apart.
    assert "state" not in words["schedules"]["weight_decay"]
    assert document["plateaus"] == {str(table["rule"]): {"weight_decay=Plateau": seen}}
    assert opt.state_dict()["entries"]["w"]["plateaus"] == {"weight_decay=Plateau": seen}
    assert sorted(words["schedules"]) == ["betas", "lr", "weight_decay"]
    # The rule of the constructor wins.
    other = mo.Optimizer(mo.Adam(lr=0.5))
    other.load(tmp_path / "run")
    other.step({"w": ones()}, {"w": ones()})
    assert other.hyperparameters("w")["lr"] == 0.5
    assert "schedules" not in other.state_dict()["entries"]["w"]["rule"]


#: An integer beyond float64.
HUGE = 10**400
#: What counts no losses.
ODD_COUNTS = ["inf", -1, 0.5, 2**53 + 1, HUGE, True, None]


class Level(Enum):
    LOW = 0.5


@dataclass(frozen=True)
class Odd(Schedule):
    """A schedule with a field of some kind."""

    part: Any

    def __call__(self, step: int) -> float:
        return 0.5


class Undeclared(Schedule):
    """A schedule that is no dataclass."""

    def __call__(self, step: int) -> float:
        return 0.5


@dataclass(frozen=True)
class OddRule(mo.SGD):
    """A rule with a field of some kind."""

    part: Any = None


PARTS = [
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    ([np.float32(0.5), np.int64(2), np.bool_(True)], [0.5, 2, True]),
    ({"a": (1, np.inf), "b": {"c": np.nan}}, {"a": [1, "inf"], "b": {"c": "nan"}}),
    (-np.inf, "-inf"),
    (np.array([np.inf, 1.0], np.float16), ["inf", 1.0]),
    (np.str_("word"), "word"),
    ({1: 2}, None),
    ({1, 2}, None),
    (1j, None),
    (b"bytes", None),
    (Level.LOW, None),
    (torch.ones(2), None),
    (np.datetime64("2020-01-01"), None),
    ([print, object()], [None, None]),
    ([Constant(0.5)], [{"name": "Constant", "value": 0.5}]),
]


@pytest.mark.parametrize(("part", "words"), PARTS, ids=lambda part: str(part)[:20])
@pytest.mark.parametrize("of_rule", [False, True])
def test_state_is_saved_whatever_the_fields_are(
    tmp_path: Path, part: Any, words: Any, of_rule: bool
) -> None:
    rule = OddRule(lr=0.5, part=part) if of_rule else mo.SGD(lr=Shared(Odd(part)))
    opt = mo.Optimizer(rule)
    opt.step({"w": ones()}, {"w": ones()})
    opt.save(tmp_path / "run")
    other = mo.Optimizer(mo.SGD())
    for load in (
        lambda: other.load(tmp_path / "run"),
        lambda: other.load_state_dict(opt.state_dict()),
    ):
        load()
        description = other.state_dict()["pending"]["w"]["rule"]
        if of_rule:
            words = [None] if isinstance(part, list) and isinstance(part[0], Schedule) else words
            assert description["part"] == words
        else:
            inner = description["schedules"]["lr"]["schedule"]
            assert inner == {"name": "Odd", "part": words}


def test_a_schedule_that_is_no_dataclass_is_its_name(tmp_path: Path) -> None:
    opt = mo.Optimizer(mo.SGD(lr=Undeclared()))
    opt.step({"w": ones()}, {"w": ones()})
    opt.save(tmp_path / "run")
    words = opt.state_dict()["entries"]["w"]["rule"]
    for rule in (words, listed(tmp_path / "run").saved["entries"]["w"].form.rule.settings):
        assert rule["schedules"]["lr"] == {"name": "Undeclared"}
    mo.Optimizer(mo.SGD(lr=Undeclared())).load(tmp_path / "run")


def test_a_plateau_of_somebody_else_does_not_keep_a_file_from_loading(tmp_path: Path) -> None:
    theirs = type("Plateau", (Undeclared,), {})()
    opt = mo.Optimizer(mo.Adam(lr=theirs, eps=Constant(0.5)))
    opt.step({"w": ones()}, {"w": ones()})
    opt.save(tmp_path / "run")
    other = mo.Optimizer(mo.Adam(lr=theirs))
    other.load(tmp_path / "run")
    schedules = other.state_dict()["pending"]["w"]["rule"]["schedules"]
    assert schedules == {"lr": {"name": "Plateau"}, "eps": {"name": "Constant", "value": 0.5}}


# A Plateau inside of a callable


GLOBAL: Any = None


class Held:
    """A callable object, of which only some attributes are used."""

    def __init__(self, plateau: Plateau) -> None:
        self.plateau, self.unused = plateau, Plateau(0.1)
        self.parts = {"lr": [plateau]}

    def __call__(self, step: int) -> float:
        return self.plateau(step)

    def at(self, step: int) -> float:
        return self._inner(step)

    def _inner(self, step: int) -> float:
        return self.parts["lr"][0](step)

    @property
    def now(self) -> Plateau:
        return self.plateau

    def by_property(self, step: int) -> float:
        return self.now(step)

    def as_told(self, step: int) -> float:
        return float(getattr(self, "plateau")(step))  # noqa: B009


class Slotted:
    __slots__ = ("empty", "plateau")

    def __init__(self, plateau: Plateau) -> None:
        self.plateau = plateau

    def __call__(self, step: int) -> float:
        return self.plateau(step)


class InClass:
    plateau: ClassVar[Any] = None

    @classmethod
    def at(cls, step: int) -> float:
        return float(cls.plateau(step))


class NoDataclass(Schedule):
    def __init__(self, plateau: Plateau) -> None:
        self.plateau = plateau

    def __call__(self, step: int) -> float:
        return self.plateau(step)


class TwoPlateaus(Plateau):
    """Its own state is saved, not that of the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "other", Plateau(0.1))

    def __call__(self, step: int) -> float:
        other: Plateau = self.other  # type: ignore[attr-defined]
        return other(step) * super().__call__(step)


class OddState(Plateau):
    def state(self) -> dict[str, Any]:
        return {"of": "somebody"}


def of_default(plateau: Plateau) -> Any:
    def lr(step: int, plateau: Plateau = plateau) -> float:
        return plateau(step)

    return lr


def of_keyword(plateau: Plateau) -> Any:
    def lr(step: int, *, plateau: Plateau = plateau) -> float:
        return plateau(step)

    return lr


def of_global(plateau: Plateau) -> Any:
    global GLOBAL
    GLOBAL = plateau
    return lambda step: GLOBAL(step)


def of_module(plateau: Plateau) -> Any:
    global GLOBAL
    GLOBAL = plateau
    module = sys.modules[__name__]
    return lambda step: module.GLOBAL(step)


def of_class(plateau: Plateau) -> Any:
    InClass.plateau = plateau
    return InClass.at


def of_wrapper(plateau: Plateau) -> Any:
    return functools.lru_cache(lambda step: plateau(step))


def of_decorator(plateau: Plateau) -> Any:
    @functools.wraps(plateau.__call__)
    def lr(*args: Any) -> Any:
        return lr.__wrapped__(*args)

    return lr


def of_functions(plateau: Plateau) -> Any:
    def inner(step: int) -> float:
        return plateau(step)

    return lambda step: min(inner(step), 0.5)


REACHING: dict[str, Callable[[Plateau], Any]] = {
    "closure": lambda plateau: lambda step: min(1.0, step / 10) * plateau(step),
    "function in a function": of_functions,
    "list in a closure": lambda plateau: lambda step, parts=[1, [plateau]]: parts[1][0](step),
    "dict": lambda plateau: {"lr": plateau}.__getitem__("lr").__call__,
    "default": of_default,
    "keyword": of_keyword,
    "global": of_global,
    "module": of_module,
    "class": of_class,
    "bound method": lambda plateau: plateau.__call__,
    "partial": lambda plateau: functools.partial(lambda p, step: p(step), plateau),
    "partial by keyword": lambda plateau: functools.partial(lambda s, p: p(s), p=plateau),
    "partial of an object": lambda p: functools.partial(lambda h, step: h.plateau(step), Held(p)),
    "callable object": Held,
    "method": lambda plateau: Held(plateau).at,
    "property": lambda plateau: Held(plateau).by_property,
    "getattr": lambda plateau: Held(plateau).as_told,
    "object in a closure": lambda p: (lambda held: lambda step: held.plateau(step))(Held(p)),
    "slots": Slotted,
    "wrapper": of_wrapper,
    "decorator": of_decorator,
    "schedule of a callable": lambda plateau: Join([lambda step: plateau(step), Constant(1)], [9]),
    "shared": lambda plateau: Shared(lambda step: plateau(step)),
    "schedule that is no dataclass": NoDataclass,
    "field that is a dict": lambda plateau: Odd({"lr": plateau}),
    "more than the fields": lambda plateau: TwoPlateaus(0.1),
    "a state of somebody": lambda plateau: OddState(0.1),
}


def given(values: Any) -> mo.Optimizer:
    opt = mo.Optimizer(mo.Adam(**values))
    opt.step({"w": ones(), "v": ones()}, {"w": ones(), "v": ones()})
    return opt


def warned(act: Callable[[], object], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        act()
    (only,) = caught
    assert only.filename == __file__


@pytest.mark.parametrize("way", REACHING)
def test_a_plateau_inside_of_a_callable_is_warned_of(tmp_path: Path, way: str) -> None:
    opt = given({"lr": REACHING[way](Plateau(0.1))})
    message = "Plateau inside, in the schedule of lr of parameters 'w', 'v'"
    warned(lambda: opt.save(tmp_path / "run"), message)
    warned(opt.state_dict, message)
    for load in (
        lambda opt: opt.load(tmp_path / "run"),
        lambda opt: opt.load_state_dict(given({}).state_dict()),
    ):
        fresh = mo.Optimizer(mo.Adam(lr=REACHING[way](Plateau(0.1))))
        warned(functools.partial(load, fresh), message)
        assert fresh.pending == ("w", "v")
        warned(functools.partial(load, opt), message)


class Trainer:
    """Somebody with a Plateau for something else."""

    def __init__(self) -> None:
        self.plateau, self.rate = Plateau(0.1), 0.5

    def lr(self, step: int) -> float:
        return self.rate / step

    def other(self, step: int) -> float:
        return self.plateau(step)


@dataclass(frozen=True)
class WarmUp(Schedule):
    schedule: Schedule

    def __call__(self, step: int) -> float:
        return self.schedule(step) / step


QUIET: dict[str, Callable[[Plateau], Any]] = {
    "a Plateau": lambda plateau: {"lr": plateau},
    "parts": lambda plateau: {"lr": Shared(Join([plateau, Constant(0.1)], [9]))},
    "a pair": lambda plateau: {"betas": (plateau, 0.999)},
    "a field": lambda plateau: {"lr": WarmUp(plateau)},
    "a field of a field": lambda plateau: {"lr": WarmUp(Join([plateau, WarmUp(plateau)], [9]))},
    "a plain function": lambda plateau: {"lr": lambda step: 1.0 / step},
    "NumPy": lambda plateau: {"lr": np.vectorize(lambda step: np.cos(step) ** 2)},
    "optax": lambda plateau: {"lr": optax.cosine_decay_schedule(0.1, 10)},
    "a Plateau for something else": lambda plateau: {"lr": Trainer().lr},
    "an object that answers for itself": lambda plateau: {"lr": answering()},
    "one that is saved elsewhere": lambda p: {"lr": Join([p, lambda step: p(step)], [9])},
}


def answering() -> Any:
    class Answering:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError("it was asked")

    held, gone = Answering(), weakref.proxy(Trainer())
    return lambda step: (held, gone) and 0.1 / step


@pytest.mark.parametrize("way", QUIET)
def test_callables_without_a_plateau_are_nobody_s_affair(tmp_path: Path, way: str) -> None:
    """Warnings are errors here."""
    values = QUIET[way](Plateau(0.1))
    opt = given(values)
    opt.save(tmp_path / "run")
    opt.state_dict()
    mo.Optimizer(mo.Adam(**values)).load(tmp_path / "run")
    opt.load(tmp_path / "run")


def test_a_plateau_in_a_pair_and_in_an_average_is_warned_of(tmp_path: Path) -> None:
    plateau = Plateau(0.5)

    def decay(step: int) -> float:
        return plateau(step)

    opt = given({"betas": (decay, 0.9), "eps": decay})
    warned(opt.state_dict, "schedule of betas of parameters 'w', 'v'; eps of parameters 'w', 'v'. ")
    message = "schedule of decay of parameter 'w'. "
    for average in (mo.Average(decay=decay), lambda name: mo.Average(decay=decay)):
        opt = mo.Optimizer(mo.SGD(), average=average)
        opt.step({"w": ones()}, {"w": ones()})
        warned(functools.partial(opt.save, tmp_path / "run"), message)
        fresh = mo.Optimizer(mo.SGD(), average=average)
        warned(functools.partial(fresh.load, tmp_path / "run"), message)


def test_only_names_that_have_such_a_callable_are_warned_of(tmp_path: Path) -> None:
    held = Held(Plateau(0.1))
    opt = mo.Optimizer(lambda name: mo.SGD(lr=held.at if name == "w" else 0.1))
    opt.step({"w": ones(), "v": ones()}, {"w": ones(), "v": ones()})
    warned(lambda: opt.save(tmp_path / "run"), "schedule of lr of parameter 'w'. ")
    warned(lambda: opt.load(tmp_path / "run"), "schedule of lr of parameter 'w'. ")
    opt.load(tmp_path / "run", names="v")
    # Which rule a name will have is not known yet.
    fresh = mo.Optimizer(lambda name: mo.SGD(lr=held.at if name == "w" else 0.1))
    assert fresh.load(tmp_path / "run").pending == ("w", "v")


def test_a_warning_that_is_an_error_changes_nothing(tmp_path: Path) -> None:
    opt = given({"lr": Held(Plateau(0.1))})
    with pytest.raises(UserWarning, match="Plateau inside"):
        opt.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    fresh = mo.Optimizer(mo.Adam(lr=Held(Plateau(0.1))))
    with pytest.raises(UserWarning, match="Plateau inside"):
        fresh.load_state_dict(given({}).state_dict())
    assert (fresh.pending, fresh.steps) == ((), 0)


def test_a_search_for_a_plateau_has_an_end() -> None:
    def chain(rest: Any) -> Any:
        return lambda step: rest and 1.0 / step

    lr = chain(None)
    for _ in range(100_000):
        lr = chain(lr)
    loop: list[Any] = [*range(10**6)]
    loop.append(loop)
    begin = time.perf_counter()
    given({"lr": lr, "eps": chain(loop)}).state_dict()
    assert time.perf_counter() - begin < 10
    # Deep objects must not be torn down by recursion.
    while lr.__closure__ is not None and lr.__closure__[0].cell_contents is not None:
        cell = lr.__closure__[0]
        lr, cell.cell_contents = cell.cell_contents, None


def test_the_drop_in_warns_of_a_plateau_inside_of_a_callable(tmp_path: Path) -> None:
    pyro.clear_param_store()
    loc = param("loc")
    opt = drop_in.Adam({"lr": Held(Plateau(0.1))})
    loc.grad = torch.ones(2)
    opt([loc])
    warned(lambda: opt.save(tmp_path / "run"), "schedule of lr of parameter 'loc'. ")
    warned(
        lambda: drop_in.Adam({"lr": Held(Plateau(0.1))}).load(tmp_path / "run"),
        "schedule of lr of parameter 'loc'. ",
    )
    drop_in.Adam({"lr": 0.1}).load(tmp_path / "run")


class Mine(Plateau):
    """A subclass: its state goes along too."""


@pytest.mark.parametrize("within", [lambda x: x, Shared, lambda x: Odd([x])])
@pytest.mark.parametrize("kind", [Plateau, Mine])
def test_a_plateau_is_saved_wherever_it_is(
    tmp_path: Path, kind: type[Plateau], within: Any
) -> None:
    here, there = kind(0.5), kind(0.5)
    opt = mo.Optimizer(mo.SGD(lr=within(here)))
    opt.step({"w": ones()}, {"w": ones()})
    here.observe(1.0)
    opt.save(tmp_path / "run")
    mo.Optimizer(mo.SGD(lr=within(there))).load(tmp_path / "run")
    assert there.state() == here.state()


@pytest.mark.parametrize("kind", [Plateau, Mine])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("value", "inf"),
        ("value", -1.0),
        ("value", HUGE),
        ("value", None),
        ("value", True),
        ("best", HUGE),
        ("best", "nan"),
        ("average", "inf"),
        ("average", -HUGE),
        *((count, bad) for count in ("bad", "waiting", "finite", "observed") for bad in ODD_COUNTS),
    ],
    ids=lambda x: "huge" if x in (HUGE, -HUGE) else str(x),
)
def test_a_state_that_no_plateau_has_is_refused_and_changes_nothing(
    tmp_path: Path, kind: type[Plateau], key: str, value: Any
) -> None:
    plateau = kind(0.5, smoothing=0.5)
    opt = mo.Optimizer(mo.SGD(lr=Shared(plateau)))
    opt.step({"w": ones()}, {"w": ones()})
    plateau.observe(1.0)
    before, state, place = plateau.state(), opt.state_dict(), f"lr=Shared.schedule={kind.__name__}"
    opt.save(tmp_path / "run")
    first, data = parts((tmp_path / "run").read_bytes())
    header = json.loads(first)
    document = json.loads(header["__metadata__"]["multiopt"])
    document["plateaus"]["0"][place][key] = value
    (tmp_path / "run").write_bytes(sealed(document, header, data))
    state["entries"]["w"]["plateaus"][place][key] = value
    # Up to version 2 it stood inside of the description.
    entry = opt.state_dict()["entries"]["w"]
    entry["rule"]["schedules"]["lr"]["schedule"]["state"] = entry.pop("plateaus")[place]
    old = {"version": 2, "entries": {"w": entry}, "pending": {}}
    opt.load_state_dict(old)
    entry["rule"]["schedules"]["lr"]["schedule"]["state"][key] = value
    for load in (
        lambda: opt.load_state_dict(state),
        lambda: opt.load_state_dict(old),
        lambda: opt.load(tmp_path / "run"),
    ):
        with pytest.raises(mo.CheckpointError, match="'w': expected the state of a Plateau; got"):
            load()
    assert plateau.state() == before
    assert opt.step({"w": ones()}, {"w": ones()})["w"].tolist() == [0.5] * 3


@pytest.mark.parametrize(
    "words",
    [
        3,
        {"lr": {"name": "Plateau"}},
        {"lr": {"name": "Plateau", "state": {"value": 0.1}}},
        {"lr": [None, {"name": "Plateau", "state": {**Plateau(0.1).state(), "bad": "many"}}]},
    ],
)
def test_a_description_of_no_use_changes_nothing(words: Any) -> None:
    plateau = Plateau(0.1)
    opt = mo.Optimizer(mo.SGD(lr=plateau))
    opt.step({"w": ones()}, {"w": ones()})
    state = opt.state_dict()
    plateau.observe(1.0)
    before = plateau.state()
    state["entries"]["w"]["rule"]["schedules"] = words
    with pytest.raises(ValueError, match=r"'w'.*(mapping under 'schedules'|state of a Plateau)"):
        opt.load_state_dict({**state, "version": 2})
    assert plateau.state() == before


@pytest.mark.parametrize("observed", [3, {"lr=Plateau": 3}, {"lr=Plateau": {"value": 0.1}}, [1]])
def test_what_no_plateau_has_seen_changes_nothing(observed: Any) -> None:
    plateau = Plateau(0.1)
    opt = mo.Optimizer(mo.SGD(lr=plateau))
    opt.step({"w": ones()}, {"w": ones()})
    state = opt.state_dict()
    state["entries"]["w"]["plateaus"] = observed
    plateau.observe(1.0)
    before = plateau.state()
    with pytest.raises(mo.CheckpointError, match="'w': expected the state of a Plateau; got"):
        opt.load_state_dict(state)
    assert plateau.state() == before


def test_a_plateau_in_another_place_takes_over_nothing() -> None:
    saved = mo.Optimizer(mo.SGD(lr=Join([Constant(0.1), Plateau(0.1)], [9])))
    saved.step({"w": ones()}, {"w": ones()})
    for lr in (Join([Plateau(0.1), Constant(0.1)], [9]), Shared(Plateau(0.1)), Mine(0.1)):
        opt = mo.Optimizer(mo.SGD(lr=lr))
        before = repr([plateau.state() for _, plateau in observers(lr, "lr")])
        opt.load_state_dict(saved.state_dict())
        assert repr([plateau.state() for _, plateau in observers(lr, "lr")]) == before


# Hyperparameters mid-run


def test_hyperparameters_are_those_of_the_next_step() -> None:
    opt = mo.Optimizer(mo.Adam(lr=Linear(0.0, 1.0, 4), weight_decay=Shared(Linear(0.0, 1.0, 4))))
    for names in ("a", "a", "ab"):
        opt.step({n: ones() for n in names}, {n: ones() for n in names})
    assert opt.hyperparameters("a") == {
        "lr": 0.75,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.75,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": False,
    }
    assert opt.hyperparameters("b")["lr"] == 0.25
    assert opt.hyperparameters("b")["weight_decay"] == 0.75
    with pytest.raises(KeyError, match="no state for parameter 'c': it was never stepped"):
        opt.hyperparameters("c")
    opt = mo.Optimizer(mo.SGD(lr={1: 0.5}.__getitem__))
    opt.step({"w": ones()}, {"w": ones()})
    with pytest.raises(ValueError, match="parameter 'w': SGD: the schedule of lr gave no number"):
        opt.hyperparameters("w")


@pytest.mark.parametrize("library", LOCAL, ids=lambda library: library.id)
@pytest.mark.parametrize("value", [0.5, Exponential(0.5, 0.5)], ids=["number", "schedule"])
def test_a_changed_hyperparameter_keeps_slots_and_clocks(library: Library, value: Any) -> None:
    with engine(library.engine):
        ours, theirs = mo.Optimizer(mo.Adam(lr=0.1)), mo.Optimizer(mo.Adam(lr=0.1))
        first, second = ({n: library.param(ones(5)) for n in "ab"} for _ in range(2))
        for turn in range(6):
            grads = grads_of(library, "ab", turn)
            first, second = ours.step(first, grads), theirs.step(second, grads)
            if turn == 2:
                ours.set_hyperparameters(lr=value, eps=0.01)
                theirs.rule = mo.Adam(lr=value, eps=0.01)
        assert ours.state("a").step == 6
        for name in "ab":
            assert_equal(library.numpy(first[name]), library.numpy(second[name]))


def test_hyperparameters_of_some_names() -> None:
    opt = mo.Optimizer(mo.SGD(lr=0.1))
    params = {n: np.zeros(1) for n in "abc"}
    opt.step(params, {n: np.zeros(1) for n in params})
    opt.set_hyperparameters("a", lr=1.0)
    opt.set_hyperparameters(iter(["b", "c"]), lr=2.0)
    opt.set_hyperparameters(["c"], lr=Constant(3.0))
    params["d"] = np.zeros(1)
    opt.step(params, {n: np.ones(1) for n in params})
    assert [params[n].item() for n in "abcd"] == [-1.0, -2.0, -3.0, -0.1]
    assert opt.rule == mo.SGD(lr=0.1)


class ByName:
    """A rule for each name."""

    def __call__(self, name: str) -> mo.Rule:
        return mo.Adam(lr=0.1) if name == "adam" else mo.SGD(lr=0.2, momentum=0.5)


@pytest.mark.parametrize("rule", [mo.SGD(lr=0.1), ByName()], ids=["rule", "callable"])
def test_a_change_for_all_holds_for_names_still_to_come(rule: Any) -> None:
    opt = mo.Optimizer(rule)
    opt.step({"a": np.zeros(1)}, {"a": np.ones(1)})
    opt.set_hyperparameters(lr=2.0)
    opt.set_hyperparameters(weight_decay=0.25)
    opt.set_hyperparameters(lr=4.0)
    for each in (opt, copy.copy(opt), pickle.loads(pickle.dumps(opt))):
        each.step({"late": np.zeros(1), "later": ones(1)}, {"late": ones(1), "later": ones(1)})
        for name in ("a", "late", "later"):
            given = each.hyperparameters(name)
            assert (given["lr"], given["weight_decay"]) == (4.0, 0.25)
    # A name forgotten and seen again, too; a new rule is a new rule.
    opt.forget("a")
    opt.step({"a": np.zeros(1)}, {"a": np.ones(1)})
    assert opt.hyperparameters("a")["lr"] == 4.0
    opt.rule = ByName()
    opt.step({"b": np.zeros(1)}, {"b": np.ones(1)})
    assert opt.hyperparameters("a")["lr"] == opt.hyperparameters("b")["lr"] == 0.2


def test_names_of_one_kind_of_rule_go_on_sharing_a_group() -> None:
    rules = {True: mo.SGD(lr=0.1), False: mo.Adam(lr=0.1)}
    opt = mo.Optimizer(lambda name: rules[name < "c"])
    opt.step({n: ones() for n in "abcd"}, {n: ones() for n in "abcd"})
    opt.set_hyperparameters(lr=0.5)
    opt.step({n: ones() for n in "efgh"}, {n: ones() for n in "efgh"})
    groups = {name: opt._registry.row_of(name)[0] for name in opt}
    assert groups["a"] is groups["b"]
    assert groups["c"] is groups["d"]
    assert groups["c"] is groups["e"] is groups["f"] is groups["h"]
    assert groups["a"] is not groups["c"]


def test_a_change_of_the_slots_is_that_of_a_rule() -> None:
    ours, theirs = mo.Optimizer(mo.SGD(lr=0.1)), mo.Optimizer(mo.SGD(lr=0.1))
    for opt in (ours, theirs):
        opt.step({"w": ones()}, {"w": ones()})
    ours.set_hyperparameters(momentum=0.9)
    theirs.rule = mo.SGD(lr=0.1, momentum=0.9)
    assert ours.state("w").step == theirs.state("w").step == 0
    assert list(ours.state("w").slots) == ["momentum_buffer"]


@pytest.mark.parametrize(
    ("names", "values", "error", "message"),
    [
        (None, {"lr": -1.0}, ValueError, "parameter 'sgd': SGD: lr must be a finite number >= 0"),
        (None, {"momentum": 0.5}, TypeError, "parameter 'adam': Adam has no hyperparameter mom"),
        (["sgd", "new"], {"lr": 1.0}, KeyError, "no state for parameter 'new'"),
        (["sgd", "adam"], {"betas": 1.0}, TypeError, "'sgd': SGD has no hyperparameter betas; it"),
        ("sgd", {"nesterov": 1}, ValueError, "parameter 'sgd': SGD: nesterov must be True or F"),
    ],
)
def test_a_change_is_whole_or_not_at_all(
    names: Any, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    opt = mo.Optimizer(ByName())
    params = {n: ones() for n in ("sgd", "adam")}
    opt.step(params, {n: ones() for n in params})
    before = {n: opt.hyperparameters(n) for n in opt}, opt.rule
    with pytest.raises(error, match=message):
        opt.set_hyperparameters(names, **values)
    assert ({n: opt.hyperparameters(n) for n in opt}, opt.rule) == before
    opt.set_hyperparameters(None)
    assert {n: opt.hyperparameters(n) for n in opt} == before[0]


def test_before_the_first_name_and_for_one_to_which_it_does_not_apply() -> None:
    opt = mo.Optimizer(mo.SGD(lr=0.1))
    opt.set_hyperparameters(lr=0.5)
    assert opt.rule == mo.SGD(lr=0.5)
    with pytest.raises(ValueError, match="SGD: lr must be"):
        opt.set_hyperparameters(lr=-1.0)
    with pytest.raises(TypeError, match="SGD has no hyperparameter eps"):
        opt.set_hyperparameters(eps=1.0)
    opt = mo.Optimizer(ByName())
    opt.set_hyperparameters(momentum=0.25)
    opt.step({"sgd": ones()}, {"sgd": ones()})
    with pytest.raises(TypeError, match="parameter 'adam': Adam has no hyperparameter momentum"):
        opt.step({"adam": ones()}, {"adam": ones()})


def test_changing_a_thousand_names_takes_milliseconds() -> None:
    opt = mo.Optimizer(mo.Adam())
    params = {f"p{i}": np.ones(10, np.float32) for i in range(1000)}
    opt.step(params, params)
    best = math.inf
    for turn in range(10):
        begun = time.perf_counter()
        opt.set_hyperparameters(lr=1.0 / (turn + 1))
        best = min(best, time.perf_counter() - begun)
    assert best < 0.05


# The drop-in


def test_the_drop_in_counts_and_saves_schedules_too(tmp_path: Path) -> None:
    def made() -> tuple[Any, Plateau]:
        plateau = Plateau(0.5, 0.5, patience=0)
        lr = Shared(Join([Constant(1.0), plateau], [3]))
        return drop_in.SGD({"lr": lr}), plateau

    def stepped(optimizer: Any, times: int) -> None:
        for _ in range(times):
            loc.grad = torch.ones(2)
            optimizer({loc})

    pyro.clear_param_store()
    pyro.param("loc", torch.zeros(2))
    loc = pyro.get_param_store()._params["loc"]
    opt, plateau = made()
    other = torch.zeros(2, requires_grad=True)
    other.grad = torch.ones(2)
    opt({other})
    del other
    stepped(opt, 2)
    for _ in range(2):
        plateau.observe(1.0)
    opt.save(tmp_path / "run")
    copied = copy.deepcopy(opt)
    stepped(opt, 1)
    assert loc.tolist() == [-2.25, -2.25]
    again, restored = made()
    again.load(tmp_path / "run")
    assert restored.state() == plateau.state()
    stepped(again, 1)
    assert loc.tolist() == [-2.5, -2.5]
    stepped(copied, 1)
    assert loc.tolist() == [-2.75, -2.75]
