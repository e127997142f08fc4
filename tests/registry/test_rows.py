"""Rows that come, change, go and are taken again: each name is as if it were alone.

Every step has other names; between steps numbers change, names are forgotten, renamed and moved to
other libraries. What each name should be says an optimizer that it has for itself, on NumPy and the
rule as it stands: there is no other row that it could take for its own.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import multiopt as mo
from multiopt import registry as registries
from multiopt.arrays import Part
from multiopt.engine import Group
from multiopt.first_sight import move
from multiopt.registry import Registry
from multiopt_kernels.host import HostGroup
from tests.libraries import JAX, NUMPY, STRICT, TORCH, Library, assert_equal, engine

NAMES = tuple("abcdefghijkl")
SHAPES = [(), (1,), (3,), (3,), (3,), (2, 2), (0,), (5000,)]
DTYPES = ["float32", "float32", "float64", "float16", "bfloat16"]
LIBRARIES = [NUMPY, NUMPY, NUMPY, TORCH, TORCH, JAX, STRICT]


# A saved state does not have ``falling``; the rules that names are made with do.
pytestmark = pytest.mark.filterwarnings("ignore:set_hyperparameters was given a callable")


def falling(step: int) -> float:
    return 0.3 / step


#: Two kinds that have groups of their own, and one that no compiled engine takes.
RULES = [mo.Adam(lr=0.1), mo.Adam(lr=falling), mo.SGD(lr=0.1, momentum=0.5), mo.LAMB(lr=0.1)]
KINDS: dict[str, list[Any]] = {
    "shape": SHAPES,
    "dtype": DTYPES,
    "library": LIBRARIES,
    "rule": RULES,
}
CLIPS = [None, None, mo.Clip(norm=1.0), mo.Clip(value=0.3)]
STEPS = 60

RATES: list[Any] = [0.5, 0.05, 0.2, 0.0, falling, mo.schedules.Linear(0.5, 0.1, steps=5)]


@dataclass
class Alone:
    """What a name should be: an optimizer that knows no other, and an array of NumPy."""

    opt: mo.Optimizer
    param: np.ndarray

    def step(self, grad: np.ndarray) -> None:
        with engine("plain"):
            self.opt.step({"alone": self.param}, {"alone": grad})

    def change(self, rule: mo.Rule) -> None:
        with engine("plain"):
            self.opt.rule = rule


@dataclass
class Lives:
    """An optimizer whose names come and go, and what each of them should be."""

    rng: np.random.Generator
    opt: mo.Optimizer = field(init=False)
    expected: dict[str, Alone] = field(default_factory=dict)
    rules: dict[str, mo.Rule] = field(default_factory=dict)
    clips: dict[str, mo.Clip | None] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, Library] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy: Any = self.one(["propagate", "skip"])
        # Most rows of some lives are alike, and could be taken for each other.
        self.kinds: dict[str, list[Any]] = {
            what: things if self.rng.random() < 0.5 else [self.one(things)]
            for what, things in KINDS.items()
        }
        self.opt = self.new()

    def new(self) -> mo.Optimizer:
        # Callables are asked at first sight.
        return mo.Optimizer(self.rules.__getitem__, self.clips.get, on_nonfinite=self.policy)

    def one(self, things: Any) -> Any:
        return things[self.rng.integers(len(things))]

    def some(self, names: Any, most: int = 3) -> list[str]:
        names = list(names)
        count = min(len(names), int(self.rng.integers(1, most + 1)))
        return [names[k] for k in self.rng.permutation(len(names))[:count]]

    # What happens between steps

    def appear(self, name: str) -> None:
        library, dtype = self.one(self.kinds["library"]), self.one(self.kinds["dtype"])
        dtype = dtype if dtype in library.dtypes else "float32"
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        start = np.asarray(self.rng.standard_normal(self.one(self.kinds["shape"])), kind)
        rule, clip = self.one(self.kinds["rule"]), self.one(CLIPS)
        self.rules[name], self.clips[name] = rule, clip
        alone = mo.Optimizer(rule, clip, on_nonfinite=self.policy)
        self.expected[name] = Alone(alone, start.copy())
        self.params[name], self.libraries[name] = library.param(start), library

    def known(self) -> tuple[dict[str, Any], ...]:
        return self.expected, self.rules, self.clips, self.params, self.libraries

    def forget(self, name: str) -> None:
        if name in self.opt or name in self.opt.pending:
            self.opt.forget(name)
        for known in self.known():
            known.pop(name)

    def come(self) -> None:
        for name in self.some(NAMES):
            if name not in self.params:
                self.appear(name)

    def go(self) -> None:
        for name in self.some(self.params):
            self.forget(name)

    def come_again(self) -> None:
        """With another shape, dtype and rule perhaps, in a row that somebody had."""
        for name in self.some(self.params):
            self.forget(name)
            self.appear(name)

    def rename(self) -> None:
        held = [name for name in self.params if name in self.opt or name in self.opt.pending]
        old = self.some(held) if held else []
        free = [name for name in NAMES if name not in self.params]
        new = [*old[1:], *old[:1]] if len(free) < len(old) or self.rng.random() < 0.5 else free
        names = dict(zip(old, new, strict=False))
        self.opt.rename(names)
        for known in self.known():
            moved = {new: known.pop(old) for old, new in names.items()}
            known |= moved

    def move(self) -> None:
        for name in self.some(self.params):
            library, value = self.one(LIBRARIES), self.expected[name].param
            if value.dtype.name in library.dtypes:
                self.params[name], self.libraries[name] = library.param(value), library

    def change_numbers(self) -> None:
        seen = [name for name in self.params if name in self.opt]
        names, lr = self.some(seen, 6) if seen else [], self.one(RATES)
        names = seen if self.rng.random() < 0.5 else names
        self.opt.set_hyperparameters(names, lr=lr)
        for name in names:
            self.rules[name] = replace(self.rules[name], lr=lr)  # type: ignore[call-arg]
            self.expected[name].change(self.rules[name])

    def change_rules(self) -> None:
        """Some of them to another kind, so that their rows go to another group."""
        for name in self.some(self.params):
            # State that waits is for the rule that it had.
            if name not in self.opt.pending:
                self.rules[name] = self.one(RULES)
        self.opt.rule = self.rules.__getitem__
        for name, alone in self.expected.items():
            alone.change(self.rules[name])

    def change_clips(self) -> None:
        for name in self.some(self.params):
            self.clips[name] = self.one(CLIPS)
        self.opt.clip = self.clips.get
        for name, alone in self.expected.items():
            alone.opt.clip = self.clips[name]

    def be_copied(self) -> None:
        self.opt = copy.deepcopy(self.opt)

    def restart(self) -> None:
        """All state waits for its name."""
        state, self.opt = self.opt.state_dict(), self.new()
        self.opt.load_state_dict(state)

    def load(self) -> None:
        """The state of now, in the place of what is held."""
        self.opt.load_state_dict(self.opt.state_dict())

    # Steps

    def step(self) -> None:
        grads, given = {}, {}
        for name in self.names:
            value = self.expected[name].param
            grad = np.asarray(self.rng.standard_normal(value.shape), value.dtype)
            if self.policy == "skip" and self.rng.random() < 0.05:
                grad = np.asarray(grad * np.nan, value.dtype)
            if self.rng.random() < 0.9:
                grads[name], given[name] = grad, self.libraries[name].grad(grad)
        self.params |= self.opt.step({name: self.params[name] for name in self.names}, given)
        for name, grad in grads.items():
            self.expected[name].step(grad)

    def check(self) -> None:
        for name, alone in self.expected.items():
            numpy = self.libraries[name].numpy
            assert_equal(numpy(self.params[name]), alone.param, name)
            known = name in self.opt or name in self.opt.pending
            assert known == ("alone" in alone.opt), name
            if name not in self.opt:
                continue
            state, expected = self.opt.state(name), alone.opt.state("alone")
            assert state.step == expected.step, name
            assert state.slots.keys() == expected.slots.keys(), name
            for slot, array in expected.slots.items():
                found = state.slots[slot]
                found = found if isinstance(found, np.ndarray) else self.numpy_of(name)(found)
                assert_equal(found, array, f"{slot} of {name}")

    def numpy_of(self, name: str) -> Callable[[Any], np.ndarray]:
        # One that has moved and not stepped since has its slots where it was.
        return lambda found: next(
            library.numpy(found)
            for library in LIBRARIES
            if type(found) is type(library.param(np.ones(1)))
        )


CHANGES = [
    *(Lives.come, Lives.come, Lives.go, Lives.come_again, Lives.rename),
    *(Lives.move, Lives.move),
    *(Lives.change_numbers, Lives.change_numbers, Lives.change_rules, Lives.change_clips),
    *(Lives.be_copied, Lives.restart, Lives.load),
]


def live(seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    lives = Lives(rng)
    with engine(name):
        for _ in range(STEPS):
            for _ in range(rng.integers(3)):
                lives.one(CHANGES)(lives)
            same = [name for name in lives.names if name in lives.params]
            if rng.random() < 0.6 or not same:
                # Another list of names; else the last one again, without those that are gone.
                same = lives.some(lives.params, len(NAMES)) if lives.params else []
            lives.names = same
            lives.step()
            lives.check()


@pytest.mark.parametrize("name", ["compiled", "blocks", "plain"])
@pytest.mark.parametrize("seed", range(10))
def test_every_name_is_as_if_it_were_alone(seed: int, name: str) -> None:
    live(seed, name)


# Faults that this must notice


def rows_of_another_name(patch: pytest.MonkeyPatch) -> None:
    """Two names of one shape change places."""
    find = Registry.find

    def swapped(self: Registry, names: list[str]) -> Any:
        rows = find(self, names)
        for group, found, *_ in rows.parts:
            for k in range(1, len(found)):
                if group.shapes[found[k]] == group.shapes[found[0]]:
                    found[0], found[k] = found[k], found[0]
                    break
        return rows

    patch.setattr(Registry, "find", swapped)


def stale_numbers(patch: pytest.MonkeyPatch) -> None:
    """All numbers but that of the first row stay as they were."""
    change = Group.change_numbers
    patch.setattr(
        Group,
        "change_numbers",
        lambda self, rows, rule, names: change(self, rows[:1], rule, names),
    )


def stale_plain_numbers(patch: pytest.MonkeyPatch) -> None:
    """The same, where no rule is made."""
    write = Group.write_numbers
    patch.setattr(
        Group, "write_numbers", lambda self, rows, numbers: write(self, rows[:1], numbers)
    )


def stale_schedules(patch: pytest.MonkeyPatch) -> None:
    """A row that has moved has the numbers of an earlier step."""

    def moved(known: Registry, rows: Any, to: Any, fresh: dict[int, int]) -> Any:
        found = move(known, rows, to, fresh)
        for place in to:
            group, row = known.at(fresh[place])
            group.set_rules(np.array([row]), group.rule_at(row))
        return found

    patch.setattr(registries, "move", moved)


def clocks_counted_twice(patch: pytest.MonkeyPatch) -> None:
    """Where a step has one row of a group."""
    run = HostGroup.run

    def counted(self: HostGroup, part: Part) -> None:
        run(self, part)
        if len(part.rows) == 1:
            self.steps[part.rows] += 1

    patch.setattr(HostGroup, "run", counted)


def freed_rows_written(patch: pytest.MonkeyPatch) -> None:
    """The rows of the last list of names are used although one of them is gone."""
    forget = Registry.forget

    def forgotten(self: Registry, names: Any) -> None:
        last = self.last
        forget(self, names)
        self.last = last

    patch.setattr(Registry, "forget", forgotten)


def rows_taken_twice(patch: pytest.MonkeyPatch) -> None:
    """A row that is let go is still the row of its name."""
    rename = Registry.rename

    def renamed(self: Registry, names: Any) -> None:
        codes = list(self._codes.items())
        rename(self, names)
        if codes and codes[0][0] in names:
            self._garbage.append(codes[0][1])

    patch.setattr(Registry, "rename", renamed)


def slots_of_who_was_here(patch: pytest.MonkeyPatch) -> None:
    """A row that is taken again has the clock that it had."""
    add = HostGroup.add

    def added(self: HostGroup, shapes: Any, slots: Any = None) -> np.ndarray:
        before = self.steps.copy()
        rows = add(self, shapes, slots)
        old = rows[rows < len(before)]
        self.steps[old] = before[old]
        return rows

    patch.setattr(HostGroup, "add", added)


FAULTS = [
    *(rows_of_another_name, stale_numbers, stale_plain_numbers, stale_schedules),
    *(clocks_counted_twice, freed_rows_written, rows_taken_twice, slots_of_who_was_here),
]


@pytest.mark.parametrize("name", ["compiled", "blocks"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_noticed(
    fault: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)

    def lives() -> None:
        for seed in range(10):
            live(seed, name)

    with pytest.raises((AssertionError, KeyError, ValueError)):
        lives()
