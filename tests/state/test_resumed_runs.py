"""A run that is saved with its parameters, and resumed, goes on as if it had never stopped.

Histories have a bit of everything: numbers, schedules and a Plateau set while the run went on,
names that come late, are left out or skipped, averages, master copies, several libraries.
"""

import io
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import multiopt as mo
from tests.libraries import JAX, NUMPY, TORCH, Library, assert_equal

Linear, Plateau = mo.schedules.Linear, mo.schedules.Plateau

#: The dtype and the shape of each parameter, and the step with which it comes.
PARAMS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "w": (np.float64, (3,), 0),
    "m": (np.float32, (2, 3), 0),
    "half": (np.float16, (5,), 0),
    "short": (ml_dtypes.bfloat16, (4,), 0),
    "z": (np.complex64, (2,), 1),
    "scalar": (np.float32, (), 0),
    "late": (np.float32, (3,), 4),
    "frozen": (np.float64, (2,), 99),
}

#: What may be set while a run goes on. The last changes which slots there are.
VALUES: list[dict[str, Any]] = [
    {"lr": 0.25},
    {"lr": Linear(0.5, 0.0, 8), "eps": 1e-4},
    {"lr": mo.schedules.Join([Linear(0.5, 0.25, 3), mo.schedules.Cosine(0.25, 9)], [3])},
    {"lr": mo.schedules.Shared(Linear(0.5, 0.0, 9))},
    {"betas": (0.5, 0.75)},
    {"betas": (Linear(0.5, 0.9, 4), 0.75)},
    {"weight_decay": 0.125},
    {"lr": "plateau"},
    {"amsgrad": True},
]

LIBRARIES = [NUMPY, TORCH, JAX]


@dataclass
class Run:
    """A run: what it began with, and how it goes on."""

    by_name: bool
    libraries: Mapping[str, Library]
    opt: mo.Optimizer = field(init=False)
    params: dict[str, Any] = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        self.opt = self.optimizer()
        self.params = {name: self.fresh(name, 1.0) for name in PARAMS}

    def fresh(self, name: str, value: float) -> Any:
        dtype, shape, _ = PARAMS[name]
        return self.libraries[name].param(np.full(shape, value, dtype))

    def optimizer(self) -> mo.Optimizer:
        rule = mo.Adam(lr=0.5)
        return mo.Optimizer(
            (lambda name: mo.NAdam(lr=0.5) if name == "m" else rule) if self.by_name else rule,
            clip=mo.Clip(global_norm=2.0),
            on_nonfinite="skip",
            master_weights=True,
            average=lambda name: None if name == "w" else mo.Average(decay=0.5),
        )

    def step(self, odd: str | None) -> None:
        """Take a step; the gradient of one name may be missing or not finite."""
        grads = {}
        for name, (dtype, shape, first) in PARAMS.items():
            if first <= self.done:
                size = int(np.prod(shape, dtype=int))
                numbers = (np.arange(size) % 5 - 1.75 + self.done % 3) / 4
                grads[name] = numbers.reshape(shape).astype(dtype)
        if odd in grads and self.done % 2:
            del grads[odd]
        elif odd in grads:
            grads[odd][...] = np.nan
        made = {name: self.libraries[name].grad(grad) for name, grad in grads.items()}
        self.params = self.opt.step(self.params, made)
        self.done += 1
        for plateau in self.plateaus():
            plateau.observe(1.0)

    def plateaus(self) -> list[Any]:
        """Each Plateau that was set, wherever it is now."""
        names = [*self.opt.names, *self.opt.pending]
        rules = [self.opt._registry.rule, *self.opt._registry.settings.values()]
        found = [x for made in rules if isinstance(made, dict) for x in made.values()]
        return list({id(x): x for x in found if isinstance(x, Plateau) and names}.values())

    def set(self, names: list[str] | None, values: dict[str, Any]) -> None:
        if values == {"lr": "plateau"}:
            values = {"lr": Plateau(0.5, factor=0.5, patience=0)}
        if names is not None:
            names = [name for name in names if name in self.opt.names or name in self.opt.pending]
        if self.by_name and "amsgrad" in values:
            return  # NAdam has none
        self.opt.set_hyperparameters(names, **values)

    def resumed(self, libraries: Mapping[str, Library]) -> "Run":
        """A new one, from a file."""
        file = io.BytesIO()
        self.opt.save(file, params=self.params)
        file.seek(0)
        other = Run(self.by_name, libraries)
        empty = {name: other.fresh(name, 7.0) for name in PARAMS}
        report = other.opt.load(file, params=empty)
        assert report.params is not None
        assert not report.unused
        other.params, other.done = report.params, self.done
        return other


def assert_same(one: Run, other: Run) -> None:
    assert one.opt.steps == other.opt.steps
    assert one.opt.skips == other.opt.skips
    assert {*one.opt.names, *one.opt.pending} == set(other.opt.names)
    assert [x.state() for x in one.plateaus()] == [x.state() for x in other.plateaus()]
    for name in PARAMS:
        mine = one.libraries[name].numpy(one.params[name])
        assert_equal(mine, other.libraries[name].numpy(other.params[name]), name)
    for name in other.opt.names:
        assert one.opt.hyperparameters(name) == other.opt.hyperparameters(name), name
        here, there = one.opt.state(name), other.opt.state(name)
        assert (here.step, here.slots.keys()) == (there.step, there.slots.keys())
        for slot, array in there.slots.items():
            assert_equal(np.asarray(here.slots[slot]), np.asarray(array), f"{slot} of {name}")
        if name != "w" and there.step:
            a, b = one.opt.average(name), other.opt.average(name)
            assert_equal(np.asarray(a), np.asarray(b), name)


NAMES = st.none() | st.lists(st.sampled_from([*PARAMS]), min_size=1, max_size=3, unique=True)
STEPS = st.tuples(st.just("step"), st.none() | st.sampled_from([*PARAMS]))
EVENTS = STEPS | STEPS | st.tuples(st.just("set"), NAMES, st.sampled_from(VALUES))


@settings(deadline=None)
@given(data=st.data())
def test_a_resumed_run_equals_one_that_never_stopped(data: st.DataObject) -> None:
    events = data.draw(st.lists(EVENTS, min_size=2, max_size=12))
    by_name = data.draw(st.booleans())

    def libraries() -> dict[str, Library]:
        return {name: data.draw(st.sampled_from(LIBRARIES)) for name in PARAMS}

    numpy = dict.fromkeys(PARAMS, NUMPY)
    whole, run = Run(by_name, numpy), Run(by_name, libraries())
    # Other slots for a name whose state is pending are an error, so these come before.
    first = max((i + 1 for i, e in enumerate(events) if e[-1] == {"amsgrad": True}), default=0)
    stops = data.draw(st.sets(st.integers(first, len(events)), min_size=1, max_size=3))
    for i, (what, *arguments) in enumerate([*events, ("step", None)]):
        if i in stops:
            run = run.resumed(libraries())
        for each in (run, whole):
            getattr(each, what)(*arguments)
    assert_same(run, whole)


SCRIPT = """
import sys
import numpy as np
import multiopt as mo

opt = mo.Optimizer(mo.Adam(lr=0.5), average=mo.Average())
params = {"w": np.arange(3.0), "late": np.ones(2, np.float32)}
path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if first:
    params = opt.load(path, params={name: np.empty_like(x) for name, x in params.items()}).params
for step in range(first, last):
    if step == 2:
        opt.set_hyperparameters(lr=mo.schedules.Linear(0.5, 0.0, 9))
        opt.set_hyperparameters("w", betas=(0.5, 0.75))
    grads = {name: x / 2 + step for name, x in params.items() if name == "w" or step >= 3}
    params = opt.step(params, grads)
opt.save(path, params=params)
print({name: [float(v).hex() for v in x] for name, x in params.items()})
print({name: opt.hyperparameters(name) for name in opt})
"""


def test_a_run_goes_on_in_a_new_process(tmp_path: Any) -> None:
    def run(path: str, first: int, last: int) -> str:
        arguments = [sys.executable, "-c", SCRIPT, path, str(first), str(last)]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout

    expected = run(str(tmp_path / "whole"), 0, 6)
    for stop in (1, 3, 5):
        path = str(tmp_path / f"stopped {stop}")
        run(path, 0, stop)
        assert run(path, stop, 6) == expected


# Settings


def stepped(rule: Any, *names: str) -> mo.Optimizer:
    opt = mo.Optimizer(rule)
    for _ in range(2):
        opt.step({n: np.ones(2) for n in names}, {n: np.ones(2) for n in names})
    return opt


def test_settings_are_left_out_on_demand_and_reported_either_way() -> None:
    opt = stepped(mo.SGD(lr=0.5), "w", "v")
    opt.set_hyperparameters("w", lr=0.25)
    state = opt.state_dict()
    for settings_too in (True, False):
        other = mo.Optimizer(mo.SGD(lr=0.5))
        report = other.load_state_dict(state, settings=settings_too)
        (difference,) = report.differences["w"].values()
        assert (difference.saved, difference.here) == (0.25, 0.5)
        assert difference.restored is settings_too
        assert "v" not in report.differences
        assert other.hyperparameters("w")["lr"] == (0.25 if settings_too else 0.5)
        assert ("settings" in other.state_dict()) is settings_too


def test_an_assigned_rule_ends_settings() -> None:
    opt = stepped(mo.SGD(lr=0.5), "w")
    opt.set_hyperparameters(lr=0.25)
    opt.rule = mo.SGD(lr=0.125)
    assert "settings" not in opt.state_dict()


def test_what_is_set_for_all_replaces_what_was_set_for_one() -> None:
    opt = stepped(mo.SGD(lr=0.5), "w", "v")
    opt.set_hyperparameters("w", lr=0.25, momentum=0.5)
    opt.set_hyperparameters(lr=0.125)
    saved = opt.state_dict()["settings"]
    assert saved == {"all": {"lr": 0.125}, "names": {"w": {"momentum": 0.5}}, "schedules": []}


def test_settings_go_with_a_name() -> None:
    opt = stepped(mo.SGD(lr=0.5), "w", "v")
    opt.set_hyperparameters(["w", "v"], lr=0.25)
    opt.rename({"w": "u"})
    opt.forget("v")
    assert opt.state_dict()["settings"]["names"] == {"u": {"lr": 0.25}}
    other = mo.Optimizer(mo.SGD(lr=0.5))
    other.load_state_dict(opt.state_dict(), rename={"u": "x"})
    assert other.hyperparameters("x")["lr"] == 0.25


def test_some_names_bring_their_settings_and_no_others() -> None:
    opt = stepped(mo.SGD(lr=0.5), "w", "v")
    opt.set_hyperparameters(lr=0.25)
    opt.set_hyperparameters("v", lr=0.125)
    other = mo.Optimizer(mo.SGD(lr=0.5))
    other.load_state_dict(opt.state_dict(), names=["w"])
    assert other.hyperparameters("w")["lr"] == 0.25
    assert other.rule == mo.SGD(lr=0.5)
    other.step({"new": np.ones(2)}, {"new": np.ones(2)})
    assert other.hyperparameters("new")["lr"] == 0.5


def test_names_to_come_get_what_was_set_for_all() -> None:
    for rule in (mo.SGD(lr=0.5), lambda name: mo.SGD(lr=0.5)):
        opt = stepped(rule, "w")
        opt.set_hyperparameters(lr=0.25)
        other = mo.Optimizer(rule)
        other.load_state_dict(opt.state_dict())
        other.step({"new": np.ones(2)}, {"new": np.ones(2)})
        assert other.hyperparameters("new")["lr"] == other.hyperparameters("w")["lr"] == 0.25


def test_names_seen_here_alone_get_what_was_set_for_all() -> None:
    opt, other = stepped(mo.SGD(lr=0.5), "w"), stepped(mo.SGD(lr=0.5), "w", "x")
    opt.set_hyperparameters(lr=0.25)
    other.load_state_dict(opt.state_dict())
    assert [other.hyperparameters(name)["lr"] for name in "wx"] == [0.25, 0.25]


def test_a_name_whose_state_is_refused_is_left_as_it_was() -> None:
    opt = stepped(mo.SGD(lr=0.5, momentum=0.5), "w", "v")
    other = mo.Optimizer(mo.SGD(lr=0.5, momentum=0.5))
    other.step({"w": np.ones(3), "v": np.ones(2)}, {"w": np.ones(3), "v": np.ones(2)})
    opt.set_hyperparameters(["w", "v"], lr=0.25)
    report = other.load_state_dict(opt.state_dict(), strict=False)
    assert [*report.unused] == ["w"]
    assert [other.hyperparameters(name)["lr"] for name in "wv"] == [0.5, 0.25]
    assert other.state_dict()["settings"]["names"] == {"v": {"lr": 0.25}}


def test_a_shared_plateau_is_one_again() -> None:
    opt, plateau = stepped(mo.SGD(lr=0.5), "w", "v", "x"), Plateau(0.5, factor=0.5, patience=0)
    opt.set_hyperparameters(["w", "v"], lr=plateau)
    for _ in range(3):
        plateau.observe(1.0)
    other = mo.Optimizer(mo.SGD(lr=0.5))
    other.load_state_dict(opt.state_dict())
    params = {n: np.ones(2) for n in "wvx"}
    other.step(params, params)
    one, two = (vars(other._registry.rule_of(name))["lr"] for name in "wv")
    assert one is two
    assert one.state() == plateau.state()


@pytest.mark.parametrize("names", [None, ["w"]])
def test_a_new_plateau_does_not_take_over_what_the_one_before_had_seen(
    names: list[str] | None,
) -> None:
    opt, plateau = stepped(mo.SGD(lr=0.5), "w"), Plateau(0.5, factor=0.5, patience=0)
    opt.set_hyperparameters(names, lr=plateau)
    for _ in range(3):
        plateau.observe(1.0)
    other, new = mo.Optimizer(mo.SGD(lr=0.5)), Plateau(0.5, factor=0.5, patience=0)
    other.load_state_dict(opt.state_dict())
    other.set_hyperparameters(names, lr=new)
    other.step({"w": np.ones(2)}, {"w": np.ones(2)})
    assert new.observed == 0


@pytest.mark.parametrize("seen", [True, False])
def test_settings_may_change_which_slots_there_are(seen: bool) -> None:
    opt = stepped(mo.SGD(lr=0.5), "w")
    opt.set_hyperparameters("w", momentum=0.5)
    opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
    other = stepped(mo.SGD(lr=0.5), "w") if seen else mo.Optimizer(mo.SGD(lr=0.5))
    other.load_state_dict(opt.state_dict())
    for each in (opt, other):
        each.step({"w": np.ones(2)}, {"w": np.ones(2)})
    assert_equal(other.state("w").slots["momentum_buffer"], opt.state("w").slots["momentum_buffer"])
    with pytest.raises(ValueError, match="momentum_buffer"):
        mo.Optimizer(mo.SGD(lr=0.5)).load_state_dict(opt.state_dict(), settings=False)


@pytest.mark.parametrize("names", [None, ["w"]])
@pytest.mark.parametrize("seen", [True, False])
def test_settings_that_do_not_fit_change_nothing(names: list[str] | None, seen: bool) -> None:
    opt = stepped(mo.SGD(lr=0.5), "w")
    opt.set_hyperparameters(names, dampening=0.5)
    other = stepped(mo.Lion(), "w") if seen else mo.Optimizer(mo.SGD(lr=0.5))
    state = opt.state_dict()
    state["settings"]["all" if names is None else "names"] = (
        {"betas": 1.0} if names is None else {"w": {"betas": 1.0}}
    )
    if seen:
        state["entries"]["w"]["slots"] = {"exp_avg": np.ones(2)}
    before = repr(other.state_dict())
    with pytest.raises(ValueError, match=r"the loaded settings do not fit: .*settings=False"):
        other.load_state_dict(state)
    assert repr(other.state_dict()) == before
    report = other.load_state_dict(state, strict=False)
    assert report.unused["w"].startswith("its settings: ")
    assert "settings" not in other.state_dict()


@pytest.mark.parametrize("where", ["rate", "betas", "inside"])
def test_a_callable_is_warned_of_at_save_and_at_load(where: str) -> None:
    class Mine(mo.schedules.Schedule):
        def __call__(self, step: int) -> float:
            return 0.5

    values: dict[str, dict[str, Any]] = {
        "rate": {"lr": lambda step: 0.5},
        "betas": {"betas": (Mine(), 0.5)},
        "inside": {"lr": mo.schedules.Join([Linear(0.5, 0.0, 3), Mine()], [3])},
    }
    ((key, value),) = values[where].items()
    opt = stepped(mo.Adam(lr=0.5), "w")
    opt.set_hyperparameters("w", eps=1e-4)
    opt.set_hyperparameters("w", **{key: value})
    with pytest.warns(
        UserWarning, match=rf"callable of yours \({key} of 'w'\), which is not saved"
    ):
        state = opt.state_dict()
    file = io.BytesIO()
    with pytest.warns(UserWarning, match=rf"\({key} of 'w'\), which is not saved") as caught:
        opt.save(file)
    assert caught[0].filename == __file__
    file.seek(0)
    loads: list[Callable[[mo.Optimizer], object]] = [
        lambda other: other.load_state_dict(state),
        lambda other: other.load(file),
    ]
    for load in loads:
        other = mo.Optimizer(mo.Adam(lr=0.25))
        with pytest.warns(UserWarning, match=rf"\({key} of 'w'\), which is not loaded") as caught:
            load(other)
        assert caught[0].filename == __file__
        found = other.hyperparameters("w")
        assert (found["eps"], found["lr"], found["betas"]) == (1e-4, 0.25, (0.9, 0.999))


def test_names_that_are_not_loaded_are_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    opt = stepped(mo.SGD(lr=0.5), "w", "v")
    opt.set_hyperparameters("w", lr=lambda step: 0.5)
    with pytest.warns(UserWarning, match="which is not saved"):
        state = opt.state_dict()
    recwarn.clear()
    mo.Optimizer(mo.SGD()).load_state_dict(state, names="v")
    mo.Optimizer(mo.SGD()).load_state_dict(state, settings=False)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"lr of 'x'\), which is not loaded"):
        mo.Optimizer(mo.SGD()).load_state_dict(state, rename={"w": "x"})


# Pending names


def test_a_pending_name_can_be_set() -> None:
    opt = mo.Optimizer(mo.Adam(lr=0.5))
    opt.load_state_dict(stepped(mo.Adam(lr=0.5), "w", "v").state_dict())
    opt.set_hyperparameters("w", lr=0.25)
    assert opt.hyperparameters("w")["lr"] == 0.25
    assert opt.hyperparameters("v")["lr"] == 0.5
    opt.step({"w": np.ones(2), "v": np.ones(2)}, {"w": np.ones(2), "v": np.ones(2)})
    assert opt.hyperparameters("w")["lr"] == 0.25
    assert opt.hyperparameters("v")["lr"] == 0.5


def test_a_pending_name_is_not_set_to_what_does_not_fit() -> None:
    opt = mo.Optimizer(mo.Adam(lr=0.5))
    opt.load_state_dict(stepped(mo.Adam(lr=0.5), "w").state_dict())
    for values, error in (
        ({"lr": -1.0}, ValueError),
        ({"momentum": 0.5}, TypeError),
        ({"amsgrad": True}, ValueError),
    ):
        with pytest.raises(error, match="parameter 'w'"):
            opt.set_hyperparameters("w", **values)
        assert "settings" not in opt.state_dict()
    with pytest.raises(KeyError, match="'x'"):
        opt.set_hyperparameters(["w", "x"], lr=0.25)
    assert opt.hyperparameters("w")["lr"] == 0.5
