"""What is checked: operations, every rule on every engine, and files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from multiopt import rules as registered
from multiopt.bench.machine import ENGINE
from multiopt.optimizer import Optimizer
from multiopt.step.clip import Clip
from multiopt.verify.equality import same
from multiopt.verify.operations import FORMATS, OPERATIONS, cases, differ, nearest_bits, wrong
from multiopt.verify.places import NUMPY, Place, engine, engines

__all__ = ["Check", "checks"]

#: How many cases of each operation.
COUNT = 10_000

#: The rules whose results are equal everywhere.
EQUAL = [name for name in registered.__all__ if name not in ("Rule", "Muon")]

SUBNORMAL = (
    "This process takes subnormal numbers for zeros: somebody has set the flags of the processor, "
    "by torch.set_flush_denormal(True), or by loading a library that was built with -ffast-math. "
    "Find it by importing one library after the other, and undo it, as by "
    "torch.set_flush_denormal(False)."
)


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        what: What was checked.
        where: On what.
        cases: How many times.
        off: How many of them were wrong, by what they are.
        counts: Whether multiopt relies on it here.
        remedy: What to do if something was wrong.
        note: What else to say.
    """

    what: str
    where: str
    cases: int
    off: dict[str, int] = field(default_factory=dict)
    counts: bool = True
    remedy: str = ""
    note: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether multiopt cannot keep a promise here."""
        return bool(self.off) and self.counts


def checks(there: Sequence[Place]) -> list[tuple[str, Callable[[], Iterator[Check]]]]:
    """All checks, each with what the progress bar says."""
    todo: list[tuple[str, Callable[[], Iterator[Check]]]] = []
    expected: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for place in there:
        todo.append((f"operations of {place.name}", partial(_operations, place)))
    for place in there:
        for name in engines(place):
            title = f"rules on {place.name}, {name}"
            todo.append((title, partial(_rules, place, name, expected)))
    todo += [(f"files of {place.name}", partial(_files, place)) for place in there]
    return todo


def _operations(place: Place) -> Iterator[Check]:
    """Perform operations where multiopt has the rules of a library computed, and in it."""
    for dtype in ("float32", "float64"):
        if not place.has(dtype):
            continue
        xp = place.namespace(dtype)
        if xp is np and place.name != "NumPy":
            if place.name == "torch":
                yield _performed(place, import_module("torch"), dtype, counts=False)
            continue
        yield _performed(place, xp, dtype, counts=True)


def _performed(place: Place, xp: Any, dtype: str, counts: bool) -> Check:
    x, y = cases(dtype, COUNT)
    given = [place.make(x), place.make(y)]
    off: dict[str, int] = {}
    with np.errstate(all="ignore"):
        for operation in OPERATIONS.values():
            result = operation.perform(xp, *given[: operation.inputs])
            which = wrong(operation, [x, y], place.on_host(result))
            if which.any():
                off[operation.name] = int(which.sum())
        for target in ("float32", "float64", "float16"):
            if target == dtype or not hasattr(xp, target):
                continue
            result = place.on_host(_converted(xp, given[0], getattr(xp, target)))
            which = differ(
                result.view(FORMATS[target].bits), nearest_bits(x, target), FORMATS[target]
            )
            if which.any():
                off[f"to {target}"] = int(which.sum())
    total = COUNT * (len(OPERATIONS) + 2)
    where = f"{place.name}, {dtype}"
    if not counts:
        note = "torch's own operations on the CPU are not used: NumPy computes for its tensors."
        return Check("operations", where, total, off, counts=False, note=note)
    return Check("operations", where, total, off, remedy=_remedy(place, dtype, off))


def _remedy(place: Place, dtype: str, off: dict[str, int]) -> str:
    # Half of the smallest number that is not subnormal, and whether that is zero.
    half = place.make(np.array([np.finfo(dtype).tiny / 2], dtype))
    if bool(place.on_host(half * 1.0 == 0.0)[0]):
        return SUBNORMAL
    return (
        f"The library {place.name} does not round as IEEE 754 says, so rules that use "
        f"{', '.join(off)} give other bits on it than on NumPy. Try another version; or have its "
        "backend compute on the host (docs/backends.md: namespace)."
    )


def _converted(xp: Any, x: Any, dtype: Any) -> Any:
    return xp.astype(x, dtype) if hasattr(xp, "astype") else x.to(dtype)


def _rules(
    place: Place, engine_name: str, expected: dict[tuple[str, str], dict[str, np.ndarray]]
) -> Iterator[Check]:
    """Hold rules on an engine to the rules as they stand on NumPy, which are run when needed."""
    off: dict[str, int] = {}
    # Conversions from 16 bits are the same for all rules: one shows them, and the others would
    # double the time in which kernels are compiled.
    kinds = [
        (name, dtype)
        for name in EQUAL
        for dtype in ("float16", "float32", "float64")
        if place.has(dtype) and (dtype != "float16" or name == "Adam")
    ]
    for name, dtype in kinds:
        if (name, dtype) not in expected:
            with engine("plain"):
                expected[name, dtype] = _run(NUMPY, name, dtype)
        with engine(engine_name):
            found = _run(place, name, dtype)
        pairs = zip(found.values(), expected[name, dtype].values(), strict=True)
        if not all(same(a, b) for a, b in pairs):
            off[name] = off.get(name, 0) + 1
    remedy = (
        f"The engine {engine_name!r} gives other bits than the rules as they stand: set "
        f"{ENGINE}={'blocks' if engine_name == 'compiled' else 'plain'}, and please report it."
    )
    if engine_name == "plain":
        remedy = f"Rules give other bits on {place.name} than on NumPy: see its operations."
    where = f"{place.name}, {engine_name}" if engine_name != "plain" else place.name
    yield Check("rules", where, len(kinds), off, remedy=remedy)


def _run(place: Place, name: str, dtype: str) -> dict[str, np.ndarray]:
    """Some steps of a rule: its parameters and slots in NumPy."""
    rng = np.random.default_rng(0)
    rule = getattr(registered, name)()
    start = {"w": rng.standard_normal((5, 7)), "b": rng.standard_normal(1030)}
    params = {n: place.make(x.astype(dtype)) for n, x in start.items()}
    opt = Optimizer(rule, Clip(norm=20.0, value=2.0))
    for step in range(4):
        # Over many powers of two, down to subnormal numbers.
        scale = 10.0 ** (-9.0 * step)
        grads = {
            n: place.make((scale * rng.standard_normal(x.shape)).astype(dtype))
            for n, x in start.items()
        }
        params = opt.step(params, grads)
    found = {n: place.on_host(x) for n, x in params.items()}
    for n in params:
        slots = opt.state(n).slots
        found |= {f"{n} {slot}": place.on_host(x) for slot, x in slots.items()}
    return found


def _files(place: Place) -> Iterator[Check]:
    """Save on a library, and load into NumPy."""
    off = {}
    rng = np.random.default_rng(1)
    params = {"w": place.make(rng.standard_normal((20, 30)).astype(np.float32))}
    opt = Optimizer(registered.Adam())
    params = opt.step(params, {"w": place.make(np.ones((20, 30), np.float32))})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.safetensors"
        opt.save(path, params=params)
        loaded = Optimizer(registered.Adam())
        report = loaded.load(path, params={"w": np.zeros((20, 30), np.float32)})
        if report.params is None or not same(report.params["w"], place.on_host(params["w"])):
            off["parameters"] = 1
        slots = opt.state("w").slots
        for name, slot in loaded.state("w").slots.items():
            if not same(np.asarray(slot), place.on_host(slots[name])):
                off[name] = 1
    remedy = "What is read is not what was written: check the disk of the temporary folder."
    yield Check("a file", place.name, 3, off, remedy=remedy)
