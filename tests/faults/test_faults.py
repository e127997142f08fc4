"""Ctrl-C and want of memory at every point of a step: each name is as before or as after it."""

import contextlib
import copy
import io
import signal
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import multiopt as mo
from multiopt import reference
from multiopt.adapters import pyro as pyro_optim
from multiopt.backend import Backend, backend_named
from multiopt.step.run import Step
from multiopt_kernels.blocks.tape import Tape
from multiopt_kernels.cpu import group, team
from tests.faults.signals import handling, hit_once, opcodes, points
from tests.libraries import engine

#: How an array of each library is made from NumPy's, and as which dtype.
MAKE: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": np.array,
    "half": lambda x: x.astype(np.float16),
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "complex": lambda x: x + 1j * x[::-1],
    "torch": lambda x: torch.from_numpy(x.copy()),
    "bfloat16": lambda x: torch.from_numpy(x.copy()).to(torch.bfloat16),
    "jax": jnp.array,
    "jax-half": lambda x: jnp.array(x.astype(ml_dtypes.bfloat16)),
    "jax-complex": lambda x: jnp.array(x + 1j * x[::-1]),
    "strict": lambda x: array_api_strict.asarray(x.copy()),
}

#: Those whose arrays are written in place.
IN_PLACE = {"numpy", "half", "strided", "complex", "torch", "bfloat16"}

#: The step that a fault hits.
HIT = 2

#: Steps in all.
STEPS = 5


@dataclass(frozen=True)
class World:
    """Parameters, an optimizer, and what happens in the step that a fault hits.

    Attributes:
        id: Its name among the tests.
        make: The optimizer.
        kinds: By name, a key of ``MAKE`` and the number of elements.
        engine: What updates parameters on the CPU.
        late: Names that come in the step that is hit.
        moved: Names whose arrays are of another kind from that step on.
        bad: Names whose gradients are not finite in that step.
        own: Whether the gradients are the parameters' own.
        pending: Whether the state of the late names waits for them.
        averages: Whether averages are kept.
        shared: Whether names depend on each other.
    """

    id: str
    make: Callable[[], mo.Optimizer]
    kinds: dict[str, tuple[str, int]]
    engine: str = "compiled"
    late: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    own: bool = False
    pending: bool = False
    averages: bool = False
    shared: bool = False

    def numbers(self, name: str, step: int) -> np.ndarray:
        rng = np.random.default_rng([step + 1, *name.encode()])
        return rng.standard_normal(self.kinds[name][1])

    def array(self, name: str, step: int) -> Any:
        x = self.numbers(name, step)
        if name in self.bad and step == HIT:
            x[0] = np.nan
        return self._made(name, x, step)

    def _made(self, name: str, x: np.ndarray, step: int) -> Any:
        kind = "torch" if name in self.moved and step >= HIT else self.kinds[name][0]
        return MAKE[kind](x)

    def in_place(self, name: str) -> bool:
        return self.kinds[name][0] in IN_PLACE or name in self.moved

    def names(self, step: int) -> list[str]:
        return [name for name in self.kinds if step >= HIT or name not in self.late]

    def grads(self, step: int) -> dict[str, Any]:
        return {name: self.array(name, step) for name in self.names(step)}

    def start(self) -> "Life":
        life = Life(self, self.make(), {})
        if self.pending:
            donor = mo.Optimizer(mo.Adam())
            params = {name: self.array(name, -1) for name in self.late}
            donor.step(params, {name: self.array(name, 0) for name in self.late})
            life.opt.load_state_dict(donor.state_dict())
        for step in range(HIT):
            life.step(step, life.grads(step))
        life.enter(HIT)
        return life


@dataclass
class Life:
    """An optimizer with its parameters on the way."""

    world: World
    opt: mo.Optimizer
    params: dict[str, Any]

    def enter(self, step: int) -> None:
        world = self.world
        for name in world.names(step):
            if name not in self.params:
                self.params[name] = world.array(name, -1)
            elif name in world.moved and step == HIT:
                self.params[name] = world._made(name, on_host(self.params[name]), step)

    def grads(self, step: int) -> dict[str, Any]:
        self.enter(step)
        return self.world.grads(step)

    def step(self, step: int, grads: dict[str, Any]) -> None:
        if self.world.own:
            for name, param in self.params.items():
                param.grad = grads.get(name)
            self.params = self.opt.step(self.params)
        else:
            self.params = self.opt.step(self.params, grads)

    def finish(self) -> None:
        for step in range(HIT + 1, STEPS):
            self.step(step, self.grads(step))

    def state(self) -> dict[str, Any]:
        """Of each name: its parameter, clock, slots, pending state; and its average."""
        stored = self.opt.state_dict()
        main, averages = {}, {}
        for name, param in self.params.items():
            entry = stored["entries"].get(name)
            main[name] = bits(param), plain(entry), name in self.opt.pending
            averages[name] = plain(stored.get("averages", {}).get(name))
        return {"main": main, "averages": averages}


def on_host(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.detach()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy().copy()
    return np.from_dlpack(x) if type(x).__module__.startswith("array_api") else np.array(x)


def bits(x: Any) -> bytes:
    return on_host(x).tobytes()


def plain(entry: Any) -> Any:
    if entry is None:
        return None
    return entry["step"], {slot: bits(array) for slot, array in entry["slots"].items()}


SMALL = {"a": ("numpy", 3), "b": ("numpy", 1), "c": ("numpy", 4)}
MIXED = {
    "numpy": ("numpy", 5),
    "half": ("half", 3),
    "strided": ("strided", 4),
    "torch": ("torch", 6),
    "bfloat16": ("bfloat16", 2),
    "jax": ("jax", 3),
    "jax-half": ("jax-half", 3),
    "strict": ("strict", 3),
}
COMPLEX = {"complex": ("complex", 4), "jax-complex": ("jax-complex", 4), "torch": ("torch", 3)}
LARGE = {"a": ("numpy", 5000), "b": ("numpy", 3), "c": ("strided", 5000)}


def adam(**options: Any) -> Callable[[], mo.Optimizer]:
    return lambda: mo.Optimizer(mo.Adam(lr=0.1, amsgrad=True), **options)


def scheduled() -> mo.Optimizer:
    return mo.Optimizer(mo.Adam(lr=lambda step: 0.1 / step), mo.Clip(norm=1.0))


WORLDS = [
    World("fast", adam(), SMALL),
    World("fast-clipped", adam(clip=mo.Clip(norm=1.0)), SMALL),
    World("fast-scheduled", scheduled, SMALL),
    World("fast-given", lambda: mo.Optimizer(mo.NAdam()), SMALL),
    World("fast-averages", adam(average=mo.Average()), SMALL, averages=True),
    World("fast-torch", adam(), {n: ("torch", k) for n, (_, k) in SMALL.items()}, own=True),
    World("skip", adam(on_nonfinite="skip", max_consecutive_skips=2), SMALL, bad=("b",)),
    World("shared", adam(clip=mo.Clip(global_norm=1.0)), SMALL, shared=True),
    World("blocks", adam(), SMALL, engine="blocks"),
    World("blocks-large", adam(clip=mo.Clip(value=0.5)), LARGE, engine="blocks"),
    World("plain", adam(clip=mo.Clip(norm=1.0)), SMALL, engine="plain"),
    World("whole", lambda: mo.Optimizer(mo.LAMB(lr=0.1)), {**SMALL, "d": ("jax", 3)}),
    *[
        World(
            f"mixed-{engine}",
            adam(master_weights=True, average=mo.Average()),
            MIXED,
            engine=engine,
            averages=True,
        )
        for engine in ("compiled", "blocks", "plain")
    ],
    World("complex", adam(), COMPLEX),
    *[
        World(
            f"late-{engine}",
            adam(master_weights=True, average=mo.Average()),
            {**SMALL, **MIXED},
            engine=engine,
            late=tuple(MIXED),
            averages=True,
        )
        for engine in ("compiled", "blocks", "plain")
    ],
    World(
        "pending",
        lambda: mo.Optimizer(mo.Adam()),
        {**SMALL, **MIXED},
        late=("jax", "numpy"),
        pending=True,
    ),
    World("moved", adam(), {**SMALL, "d": ("jax", 3)}, moved=("b", "d")),
    World("moved-blocks", adam(), {**SMALL, "d": ("jax", 3)}, engine="blocks", moved=("b", "d")),
]


class Reference:
    """What the same steps give when nothing disturbs them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._known: dict[Any, Any] = {}
        with engine(world.engine):
            life = world.start()
            self.before, self.steps = life.state(), life.opt.steps
            self.skips = life.opt.skips
            life.step(HIT, life.grads(HIT))
            self.after = life.state()
            self.updated, self.skips_after = life.opt.last.updated, life.opt.skips

    def last(self, updated: frozenset[str], whole: bool, lost: bool) -> Any:
        """The state after all steps, if the one that was hit did this and no more.

        With ``lost`` its new arrays, of libraries that cannot write, did not reach the caller.
        """
        key = updated, whole, lost
        if key not in self._known:
            self._known[key] = self._last(*key)
        return self._known[key]

    def _last(self, updated: frozenset[str], whole: bool, lost: bool) -> Any:
        life = self.world.start()
        given = dict(life.params)
        if whole and updated == frozenset(self.updated):
            life.step(HIT, life.grads(HIT))
        elif updated:
            grads = life.grads(HIT)
            life.step(HIT, {name: grads[name] for name in updated})
        if lost:
            life.params = given
        life.finish()
        return life.state()


def check(reference: Reference, life: Life, error: BaseException | None) -> tuple[str, ...]:
    """Make sure that each name is as before or as after; the names that are as after."""
    now, before, after = life.state(), reference.before, reference.after
    updated, averaged, lost = [], [], False
    for name in life.params:
        if now["main"][name] != before["main"][name]:
            expected = after["main"][name]
            if error is not None and not life.world.in_place(name):
                expected, lost = (before["main"][name][0], *expected[1:]), True
            assert now["main"][name] == expected, name
            updated.append(name)
        if now["averages"][name] != before["averages"][name]:
            assert now["averages"][name] == after["averages"][name], name
            averaged.append(name)
    assert averaged == (updated if life.world.averages else [])
    assert updated in ([], list(reference.updated))
    # What is told is true.
    is_whole = life.opt.steps > reference.steps or life.opt.skips != reference.skips
    assert life.opt.steps == reference.steps + bool(updated)
    assert life.opt.skips == (reference.skips_after if is_whole else reference.skips)
    if is_whole:
        assert life.opt.last.updated == tuple(updated)
        assert set(life.opt.last.clipped) <= set(updated)
    if error is not None:
        notes = [note for note in getattr(error, "__notes__", []) if note.startswith("multiopt")]
        if is_whole:
            assert notes == [note_of(updated)]
        else:
            assert notes in (["multiopt: nothing was changed by this step"], [])
            assert life.opt.last.updated == tuple(life.world.names(HIT - 1))
    # It goes on as if nothing had been.
    if error is None:
        life.params = {name: life.params[name] for name in life.world.names(HIT)}
    whole = is_whole and set(updated) == set(reference.updated)
    life.finish()
    expected = reference.last(frozenset(updated), whole, lost)
    assert life.state() == expected
    return tuple(updated)


def note_of(updated: list[str]) -> str:
    if not updated:
        return "multiopt: the step was whole; it updated nothing"
    shown = ", ".join(map(repr, updated[:5]))
    more = f" and {len(updated) - 5} more" if len(updated) > 5 else ""
    return f"multiopt: the step was whole; it updated {shown}{more}"


# Signals


@pytest.mark.usefixtures("steps_alike")
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.id)
def test_an_interrupt_leaves_each_name_as_before_or_as_after(world: World) -> None:
    interrupts_at(world, 12)


def interrupts_at(world: World, few: int) -> None:
    seen = set()
    reference = Reference(world)
    with engine(world.engine):
        life = world.start()
        grads = life.grads(HIT)
        total = opcodes(lambda: life.step(HIT, grads))
        for k in points(total, few):
            life = world.start()
            grads = life.grads(HIT)
            try:
                reached = opcodes(partial(life.step, HIT, grads), k)
            except KeyboardInterrupt as error:
                seen.add(check(reference, life, error))
            else:
                # Whether a thread has begun in time decides on a few opcodes at the end.
                assert reached < k, f"the interrupt at {k} of {total} got lost"
                check(reference, life, None)
    assert seen == {(), reference.updated}


@pytest.mark.usefixtures("steps_alike")
@pytest.mark.parametrize("name", ["fast", "skip", "blocks", "plain", "pending", "moved"])
def test_what_another_handler_raises_leaves_a_whole_state_or_one_that_a_load_mends(
    name: str,
) -> None:
    (world,) = (world for world in WORLDS if world.id == name)
    reference, torn, ctrl_c = Reference(world), 0, signal.getsignal(signal.SIGINT)

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    with engine(world.engine), handling({signal.SIGTERM: give_up}):
        life = world.start()
        grads = life.grads(HIT)
        total = opcodes(lambda: life.step(HIT, grads))
        life.finish()
        expected = life.state()
        for k in points(total, 30):
            life = world.start()
            grads, before = life.grads(HIT), life.opt.state_dict()
            error: BaseException | None = None
            try:
                # A library that looks whether it can do something may catch what is raised there.
                opcodes(partial(life.step, HIT, grads), k, signal.SIGTERM)
            except (TimeoutError, TypeError) as caught:
                error = caught
            if life.opt._guard.torn is None:
                check(reference, life, error)
            else:
                torn += 1
                life.opt.load_state_dict(before)
                life.params = world.start().params
                life.step(HIT, life.grads(HIT))
                life.finish()
                assert life.state() == expected, k
            assert signal.getsignal(signal.SIGINT) == ctrl_c, k
    assert torn


@pytest.mark.usefixtures("steps_alike")
@pytest.mark.parametrize("threads", ["pytorch", "pool"])
def test_an_interrupt_of_threads_leaves_a_whole_step(
    threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "thread_count", lambda limit: 2)
    if threads == "pool":
        monkeypatch.setattr(team, "_openmp", lambda: None)
    elif team._openmp() is None:
        pytest.skip("PyTorch's OpenMP was not found on this system")
    kinds = {"a": ("numpy", group.MANY + 1), "b": ("torch", group.MANY + 1)}
    interrupts_at(World("threads", lambda: mo.Optimizer(mo.SGD()), kinds), 6)
    interrupts_at(World("threads", lambda: mo.Optimizer(mo.SGD()), {"a": kinds["a"]}), 40)


#: What changes an optimizer.
CHANGES: dict[str, Callable[[mo.Optimizer], object]] = {
    "step": lambda opt: opt.step({"new": np.ones(2)}, {"new": np.ones(2)}),
    "forget": lambda opt: opt.forget("a"),
    "rename": lambda opt: opt.rename({"a": "d"}),
    "set_hyperparameters": lambda opt: opt.set_hyperparameters(lr=0.5),
    "rule": lambda opt: setattr(opt, "rule", mo.SGD()),
    "clip": lambda opt: setattr(opt, "clip", mo.Clip(value=1.0)),
    "load_state_dict": lambda opt: opt.load_state_dict(mo.Optimizer(mo.Adam()).state_dict()),
    "load": lambda opt: opt.load("nowhere"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["fast", "skip"])
def test_a_handler_may_not_change_anything_in_the_middle_of_a_step(
    name: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written its error changes nothing."""
    (world,) = (world for world in WORLDS if world.id == name)
    reference = Reference(world)
    life = world.start()
    grads = life.grads(HIT)

    def do(number: int, frame: FrameType | None) -> None:
        CHANGES[change](life.opt)

    with handling({signal.SIGTERM: do}):
        hit_once(monkeypatch, "prepare")
        with pytest.raises(RuntimeError, match=f"{change}: a step.* has not ended") as caught:
            life.step(HIT, grads)
    check(reference, life, caught.value)


@pytest.mark.usefixtures("steps_alike")
@pytest.mark.parametrize("name", ["fast", "skip", "mixed-plain"])
def test_a_handler_may_set_a_flag_at_any_moment_of_a_step(name: str) -> None:
    (world,) = (world for world in WORLDS if world.id == name)
    reference, flags = Reference(world), []
    with (
        engine(world.engine),
        handling({signal.SIGTERM: lambda *_: flags.append(True)}),
    ):
        life = world.start()
        grads = life.grads(HIT)
        total = opcodes(lambda: life.step(HIT, grads))
        for k in points(total, 10):
            life = world.start()
            grads = life.grads(HIT)
            opcodes(partial(life.step, HIT, grads), k, signal.SIGTERM)
            assert flags.pop()
            check(reference, life, None)


def test_nothing_is_changed_by_what_a_change_calls() -> None:
    def rule(name: str) -> mo.Rule:
        opt.forget("b")
        return mo.SGD()

    opt = mo.Optimizer(mo.Adam())
    params = {"a": np.ones(2), "b": np.ones(2)}
    opt.step(params, {"a": np.ones(2), "b": np.ones(2)})
    with pytest.raises(RuntimeError, match="forget"):
        opt.rule = rule
    assert opt.names == ("a", "b")
    assert isinstance(opt.rule, mo.Adam)
    opt.forget("b")

    def lr(step: int) -> float:
        opt.rename({"a": "c"})
        return 0.1

    opt.set_hyperparameters(lr=lr)
    with pytest.raises(ValueError, match="rename"):
        opt.step({"a": params["a"]}, {"a": np.ones(2)})
    assert opt.state("a").step == 1


def test_a_copy_that_a_schedule_makes_is_free() -> None:
    copies = []

    def lr(step: int) -> float:
        copies.append(copy.deepcopy(opt))
        return 0.1

    opt = mo.Optimizer(mo.SGD(lr=lr))
    params = opt.step({"a": np.ones(2)}, {"a": np.ones(2)})
    (other,) = copies[-1:]
    other.rule = mo.SGD()
    other.step(params, {"a": np.ones(2)})
    assert opt.steps == other.steps == 1


def grown() -> mo.Optimizer:
    """An optimizer with entries, pending ones, skips and averages."""
    opt = mo.Optimizer(mo.Adam(), on_nonfinite="skip", average=mo.Average())
    grads = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}
    opt.step({name: np.ones(2) for name in grads}, grads)
    opt.step({"a": np.ones(2)}, {"a": np.array([1.0, np.nan])})
    opt.load_state_dict(opt.state_dict(), names=["a", "b"], rename={"a": "d", "b": "e"})
    return opt


def shown(opt: mo.Optimizer) -> Any:
    stored = opt.state_dict()
    parts = ("entries", "pending", "averages", "pending_averages")
    plainly = {part: {n: plain(entry) for n, entry in stored[part].items()} for part in parts}
    rules = {name: repr(opt.hyperparameters(name)) for name in (*opt, *opt.pending)}
    return plainly, rules, opt.skips, repr(opt), opt.steps, stored.get("settings")


ALTERATIONS: dict[str, Callable[[mo.Optimizer], object]] = {
    "forget": lambda opt: opt.forget("a"),
    "forget-pending": lambda opt: opt.forget("d"),
    "rename": lambda opt: opt.rename({"a": "b", "b": "a", "d": "f"}),
    "set_hyperparameters": lambda opt: opt.set_hyperparameters(lr=0.5),
    "set-pending": lambda opt: opt.set_hyperparameters(["d", "a"], lr=0.5),
    "rule": lambda opt: setattr(opt, "rule", mo.AdamW(lr=0.5)),
    "clip": lambda opt: setattr(opt, "clip", mo.Clip(value=0.1)),
    "load-settings": lambda opt: opt.load_state_dict({**LOADED, "settings": SETTINGS}),
    "load": lambda opt: opt.load_state_dict(LOADED, names=["a", "b", "z"], rename={"z": "d"}),
}


#: Of these names "b" is seen, and "z" is not.
SETTINGS: dict[str, Any] = {
    "all": {"lr": 0.25},
    "names": {"z": {"betas": [0.5, 0.75]}, "b": {"lr": {"schedule": 0}}},
    "schedules": [{"name": "Linear", "initial": 0.5, "final": 0.25, "steps": 4}],
}


def loaded() -> dict[str, Any]:
    opt = mo.Optimizer(mo.Adam(), average=mo.Average())
    params = {name: np.ones(2) for name in "abz"}
    for _ in range(3):
        opt.step(params, {name: np.full(2, 0.5) for name in params})
    opt.forget("a")
    opt.step({"a": np.ones(2)}, {"a": np.ones(2)})
    return opt.state_dict()


LOADED: dict[str, Any] = loaded()


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_interrupt_of_a_change_leaves_all_or_nothing(alteration: str) -> None:
    def go_on(opt: mo.Optimizer) -> Any:
        params = {name: np.full(2, 2.0) for name in "abcd"}
        opt.step(params, {name: np.full(2, 0.5) for name in params})
        opt.step(params, {name: np.full(2, -0.5) for name in params})
        return {name: bits(param) for name, param in params.items()}, shown(opt)

    def alter(opt: mo.Optimizer) -> mo.Optimizer:
        ALTERATIONS[alteration](opt)
        return opt

    before, after = shown(grown()), shown(alter(grown()))
    later = {False: go_on(grown()), True: go_on(alter(grown()))}
    assert before != after
    calm, seen = grown(), set()
    for k in points(opcodes(lambda: alter(calm)), 40):
        opt = grown()
        with pytest.raises(KeyboardInterrupt):
            opcodes(partial(alter, opt), k)
        now = shown(opt)
        assert now in (before, after), k
        seen.add(now == after)
        assert go_on(opt) == later[now == after]
    assert seen == {False, True}


def test_an_interrupt_of_a_load_leaves_parameters_and_state_of_one_moment() -> None:
    names = ("a", "b", "c", "d")
    file, run = io.BytesIO(), mo.Optimizer(mo.Adam(), average=mo.Average())
    run.load_state_dict(LOADED)
    run.set_hyperparameters(lr=0.25)
    run.save(file, params={name: np.full(2, 7.0) for name in names})

    def load(opt: mo.Optimizer, params: dict[str, np.ndarray]) -> None:
        opt.load(io.BytesIO(file.getvalue()), params=params)

    def fresh() -> dict[str, np.ndarray]:
        return {name: np.zeros(2) for name in names}

    load(grown(), fresh())  # what only the first load of a process does is done
    calm, seen = grown(), set()
    before = shown(calm)
    total = opcodes(partial(load, calm, fresh()))
    after = shown(calm)
    for k in points(total, 60):
        opt, params = grown(), fresh()
        with pytest.raises(KeyboardInterrupt):
            opcodes(partial(load, opt, params), k)
        now = shown(opt)
        assert now in (before, after), k
        assert all((x == (7.0 if now == after else 0.0)).all() for x in params.values()), k
        seen.add(now == after)
    assert False in seen


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
@pytest.mark.parametrize("name", ["fast", "blocks-large", "mixed-compiled", "plain"])
def test_a_timer_at_any_time_leaves_each_name_as_before_or_as_after(name: str) -> None:
    (world,) = (world for world in WORLDS if world.id == name)
    reference = Reference(world)
    delays = np.random.default_rng(0).uniform(0, 1, len(points(1000, 20)))

    def late(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    with engine(world.engine), handling({signal.SIGALRM: late}):
        begun = time.perf_counter()
        life = world.start()
        life.finish()
        whole = (time.perf_counter() - begun) / STEPS
        for delay in delays.tolist():
            life, error = world.start(), None
            grads = life.grads(HIT)
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, max(delay * whole, 1e-6))
                    life.step(HIT, grads)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt as caught:
                error = caught
            # Without a note it came outside of the step.
            if error is None or hasattr(error, "__notes__"):
                check(reference, life, error)


# Memory


class Scarce:
    """Calls that make arrays, of which one fails."""

    def __init__(self, fails: float = float("inf")) -> None:
        self.calls, self._fails, self._stack = 0, fails, contextlib.ExitStack()

    def __enter__(self) -> "Scarce":
        patch = pytest.MonkeyPatch()
        self._stack.callback(patch.undo)
        for module, names in MAKING:
            for name in names:
                patch.setattr(module, name, self._counting(getattr(module, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self._fails:
                raise MemoryError
            return real(*args, **kwargs)

        return made


MAKING: list[tuple[Any, list[str]]] = [
    (
        np,
        [
            "empty",
            "zeros",
            "ones",
            "full",
            "array",
            "concatenate",
            "repeat",
            "arange",
            "flatnonzero",
            "fromiter",
        ],
    ),
    (jax, ["device_put"]),
    (jax.lax, ["complex"]),
    (torch, ["zeros", "from_numpy"]),
    (torch.Tensor, ["contiguous", "to", "clone"]),
    (Tape, ["room"]),
    (type(backend_named("numpy")), ["to_compute"]),
    (type(backend_named("torch")), ["to_compute", "to_slots", "to_params"]),
    (type(backend_named("jax")), ["to_compute", "to_slots", "to_params", "as_complex"]),
    (Backend, ["to_slots", "to_params"]),
    (reference, ["updated", "resumed"]),
]


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.id)
def test_want_of_memory_leaves_everything_as_before(world: World) -> None:
    reference = Reference(world)
    failed = 0
    with engine(world.engine):
        life = world.start()
        grads = life.grads(HIT)
        with Scarce() as scarce:
            life.step(HIT, grads)
        for fails in points(scarce.calls, 8):
            life, error = world.start(), None
            grads = life.grads(HIT)
            try:
                with Scarce(fails):
                    life.step(HIT, grads)
            except MemoryError as caught:
                error, failed = caught, failed + 1
            updated = check(reference, life, error)
            assert error is None or not updated
    assert failed


@pytest.mark.parametrize("clip", [None, mo.Clip(value=0.1), mo.Clip(norm=1.0)])
@pytest.mark.parametrize("engine_", ["compiled", "blocks", "plain"])
def test_what_changes_things_makes_no_large_array(
    engine_: str, clip: mo.Clip | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, peaks, real = 100_000, [], Step.run

    def run(step: Step) -> None:
        tracemalloc.start()
        try:
            real(step)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    kinds = {kind: (kind, size) for kind in MAKE}
    world = World("large", adam(clip=clip, master_weights=True), kinds, engine_)
    monkeypatch.setattr(Step, "run", run)
    with engine(engine_):
        life = world.start()
        life.step(HIT, life.grads(HIT))
    assert len(peaks) == HIT + 1
    # A parameter has 200 kB or more. What NumPy takes to convert dtypes is below 100 kB.
    assert max(peaks) < 100_000, peaks


# The drop-in


@pytest.mark.usefixtures("steps_alike")
def test_an_interrupt_of_the_drop_in_leaves_a_note_and_a_whole_step() -> None:
    outcomes = set()

    def start() -> tuple[Any, list[torch.Tensor]]:
        params = [torch.ones(n, requires_grad=True) for n in (2, 3)]
        optim = pyro_optim.Adam({"lr": 0.1}, {"clip_norm": 0.5})
        for _ in range(3):
            for param in params:
                param.grad = torch.ones(param.shape)
            if _ < 2:
                optim(params)
        return optim, params

    optim, params = start()
    before = [bits(param) for param in params]
    total = opcodes(lambda: optim(params))
    after = [bits(param) for param in params]
    for k in points(total, 20):
        optim, params = start()
        with pytest.raises(KeyboardInterrupt) as caught:
            opcodes(partial(optim, params), k)
        now = [bits(param) for param in params]
        assert now in (before, after)
        for note in getattr(caught.value, "__notes__", []):
            assert ("nothing was changed" in note) == (now == before)
            outcomes.add(now == before)
    assert outcomes == {True, False}
