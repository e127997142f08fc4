"""Ctrl-C and want of memory at every point of a step: each name is as before or as after it."""

import contextlib
import dis
import gc
import signal
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import array_api_strict
import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import multiopt as mo
import multiopt_numpy
from multiopt import interruption
from multiopt.interruption import uninterrupted
from multiopt.step import Step
from multiopt_numpy.compiled import team
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

    def last(self, updated: frozenset[str], averaged: frozenset[str], whole: bool) -> Any:
        """The state after all steps, if the one that was hit did this and no more."""
        key = updated, averaged, whole
        if key not in self._known:
            self._known[key] = self._last(*key)
        return self._known[key]

    def _last(self, updated: frozenset[str], averaged: frozenset[str], whole: bool) -> Any:
        life = self.world.start()
        if whole and updated == frozenset(self.updated):
            life.step(HIT, life.grads(HIT))
        elif updated:
            grads = life.grads(HIT)
            life.step(HIT, {name: grads[name] for name in updated})
        if life.opt._averages is not None and averaged != updated:
            # Averages that were left behind.
            other = self.world.start()
            if averaged:
                grads = other.grads(HIT)
                other.step(HIT, {name: grads[name] for name in averaged})
            life.opt._averages = other.opt._averages
            for name in life.params:
                life.opt._average_of(name)
        life.finish()
        return life.state()


def check(reference: Reference, life: Life, error: BaseException | None) -> tuple[str, ...]:
    """Make sure that each name is as before or as after; the names that are as after."""
    now, before, after = life.state(), reference.before, reference.after
    updated, averaged = [], []
    for name in life.params:
        if now["main"][name] != before["main"][name]:
            assert now["main"][name] == after["main"][name], name
            updated.append(name)
        if now["averages"][name] != before["averages"][name]:
            assert now["averages"][name] == after["averages"][name], name
            averaged.append(name)
    assert set(averaged) <= set(updated)
    if error is not None:
        in_place = [name for name in reference.updated if life.world.in_place(name)]
        assert updated in ([], in_place)
    # What is told is true.
    is_whole = life.opt.steps > reference.steps or life.opt.skips != reference.skips
    assert life.opt.steps == reference.steps + bool(updated)
    assert life.opt.skips == (reference.skips_after if is_whole else reference.skips)
    if is_whole:
        assert life.opt.last.updated == tuple(updated)
        assert set(life.opt.last.clipped) <= set(updated)
    if error is not None:
        notes = getattr(error, "__notes__", [])
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
    expected = reference.last(frozenset(updated), frozenset(averaged), whole)
    assert life.state() == expected
    return tuple(updated)


def note_of(updated: list[str]) -> str:
    if not updated:
        return "multiopt: the step was whole; it updated nothing"
    shown = ", ".join(map(repr, updated[:5]))
    more = f" and {len(updated) - 5} more" if len(updated) > 5 else ""
    return f"multiopt: the step was whole; it updated {shown}{more}"


# Signals


#: Where interrupts come: the library, and what stands between its functions.
OURS = (
    str(Path(mo.__file__).parent),
    str(Path(multiopt_numpy.__file__).parent.parent / "multiopt_"),
    str(Path(torch.__file__).parent / "_dynamo"),
    contextlib.__file__,
)

#: Opcodes that only return, before which no handler runs.
RETURNS = {number for name, number in dis.opmap.items() if name.startswith("RETURN")}


def opcodes(action: Callable[[], object], hit: float = float("inf")) -> int:
    """Run an action, Ctrl-C before the opcode of this number; how many there were until then."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] not in RETURNS:
            count += 1
            if count == hit:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    # A collection runs finalizers, in which an interrupt gets lost.
    gc.disable()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def points(total: int, few: int) -> list[int]:
    """Where to interrupt: everywhere in a thorough run, else at some points, the most at the end."""
    if hypothesis.settings().max_examples >= 1000:
        return list(range(1, total + 1))
    return sorted({total - (total - 1) * i**3 // few**3 for i in range(few + 1)})


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.id)
def test_an_interrupt_leaves_each_name_as_before_or_as_after(world: World) -> None:
    seen = set()
    reference = Reference(world)
    with engine(world.engine):
        life = world.start()
        grads = life.grads(HIT)
        total = opcodes(lambda: life.step(HIT, grads))
        for k in points(total, 30):
            life = world.start()
            grads = life.grads(HIT)
            try:
                reached = opcodes(lambda life=life, grads=grads: life.step(HIT, grads), k)
            except KeyboardInterrupt as error:
                seen.add(check(reference, life, error))
            else:
                # It takes a few opcodes more or less from time to time.
                assert reached < k, f"the interrupt at {k} of {total} got lost"
                check(reference, life, None)
    in_place = tuple(name for name in reference.updated if world.in_place(name))
    assert seen == {(), in_place}
