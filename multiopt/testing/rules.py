"""Holds a rule to what multiopt promises of every rule."""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from multiopt.errors import brief
from multiopt.optimizer import Optimizer
from multiopt.rules import Rule
from multiopt.step.clip import Clip
from multiopt.testing.vectors import departure_from
from multiopt.verify.equality import same, unequal
from multiopt.verify.places import NUMPY, Place, engine, engines, places

__all__ = ["check_rule"]

#: From small to large, so that the first example that fails is a small one.
SHAPES = ((), (1,), (2,), (2, 2), (3, 2), (5,), (1030,))

#: So large that several threads share an array.
LARGE = ((300_001,), (600, 520))

#: The standard deviations of gradients, from plain to hard; NaN for one with special values in it.
SCALES = (1.0, 1e3, 1e-30, np.nan)
SPECIAL = (0.0, -0.0, np.inf, -np.inf, np.nan)

DTYPES = ("float32", "float64")

STEPS = 3

#: As many units in the last place may a float32 parameter be off, and one more for each step.
ULPS = 8


def check_rule(
    rule: Rule, *, rtol: float | None = None, vectors: str | PathLike[str] | None = None
) -> None:
    """Hold a rule to what multiopt promises of every rule; the first promise that fails is named.

    - The update is pure: it leaves its arguments alone, and gives the same again for the same.
    - It returns a parameter and as many slots as the rule names, of the shapes that the rule says,
      in the dtype that it was given.
    - An elementwise rule treats each element as if it were alone, and its rounding errors stay
      small: some units in the last place of the largest number that there was.
    - Results are equal, to the last bit, on all libraries that are installed and on all engines,
      whether gradients are clipped or not, and on however many threads.
    - A name that appears late is updated as if it were alone.
    - A run that is saved and resumed goes on as if it had not been.

    Args:
        rule: The rule. Shapes that it refuses are left out.
        rtol: For rules that cannot be equal to the last bit, such as one that multiplies matrices:
            how far results may be off, relative to the largest element. None asks for equal bits.
        vectors: A file of steps that the class of the rule must reproduce to the last bit, in the
            format of ``spec/vectors``. This alone shows that a formula is the one that is meant.

    Raises:
        AssertionError: A promise does not hold. The message says which, and shows the smallest
            example that was found.
        TypeError: ``rule`` is not a rule.

    >>> import multiopt as mo
    >>> check_rule(mo.SGD(lr=0.1, momentum=0.9))
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a Rule; got {brief(rule)}")
    check = _RuleCheck(rule, rtol)
    for promise in (
        check.is_pure,
        check.keeps_shapes_and_dtypes,
        check.is_elementwise,
        check.is_accurate,
        check.is_equal_everywhere,
        check.treats_late_names_as_if_alone,
        check.can_be_resumed,
    ):
        promise()
    if vectors is not None:
        # As it stands: to compile a rule for every case would take minutes.
        with engine("plain"):
            departure = departure_from(vectors, type(rule))
        if departure is not None:
            raise AssertionError(f"{brief(rule)}: {departure}")


class _RuleCheck:
    """The promises, one a method."""

    def __init__(self, rule: Rule, rtol: float | None) -> None:
        self._rule, self._rtol = rule, rtol
        self._shapes = [shape for shape in SHAPES if self._takes(shape)]
        if not self._shapes:
            raise AssertionError(f"{brief(rule)} refuses all shapes that were tried: {SHAPES}")

    def _takes(self, shape: tuple[int, ...]) -> bool:
        try:
            self._rule.slot_shapes(shape)
        except ValueError:
            return False
        return True

    def _examples(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Parameters and gradients, simple ones first."""
        for scale in SCALES:
            for shape in self._shapes:
                for dtype in DTYPES:
                    rng = np.random.default_rng(0)
                    param, grad = (np.asarray(rng.standard_normal(shape)) for _ in range(2))
                    if np.isnan(scale):
                        is_special = rng.random(shape) < 0.3
                        grad = np.where(is_special, rng.choice(SPECIAL, shape), grad)
                    else:
                        grad = np.asarray(scale * grad)
                    yield param.astype(dtype), grad.astype(dtype)

    def _fresh(self, param: np.ndarray) -> tuple[np.ndarray, ...]:
        shapes = self._rule.slot_shapes(param.shape)
        return tuple(np.zeros(shape, param.dtype) for shape in shapes.values())

    def _update(
        self, param: np.ndarray, grad: np.ndarray, slots: tuple[np.ndarray, ...], step: int
    ) -> tuple[Any, Any]:
        c = self._rule.coefficients(step, param.dtype.name)
        with np.errstate(all="ignore"):
            new, made = self._rule.update(np, param, grad, slots, c)
        return new, made

    def _after_a_step(self, param: np.ndarray, grad: np.ndarray) -> tuple[np.ndarray, ...]:
        """Slots that are not zeros."""
        _, slots = self._update(param, np.ones_like(grad), self._fresh(param), 1)
        return tuple(np.asarray(slot) for slot in slots)

    def is_pure(self) -> None:
        """The same arguments give the same results, and are not changed."""
        for param, grad in self._examples():
            given = [param, grad, *self._fresh(param)]
            for array in given:
                array.flags.writeable = False
            results = []
            for _ in range(2):
                try:
                    new, slots = self._update(given[0], given[1], tuple(given[2:]), 1)
                except ValueError as error:
                    if "read-only" not in str(error):
                        raise
                    raise self._broken(
                        "its update writes to an array that it was given", param, grad
                    ) from error
                results.append([np.asarray(x) for x in (new, *slots)])
            for a, b in zip(*results, strict=True):
                if not same(a, b):
                    raise self._broken(
                        "its update gives another result for the same arguments: nothing but the "
                        "arguments may count",
                        *(param, grad, a, b),
                    )

    def keeps_shapes_and_dtypes(self) -> None:
        """Parameter and slots come back as they were, and as many as there were."""
        for param, grad in self._examples():
            shapes = self._rule.slot_shapes(param.shape)
            new, slots = self._update(param, grad, self._fresh(param), 1)
            if len(slots) != len(shapes):
                raise self._broken(
                    f"its update returns {len(slots)} slots; expected {len(shapes)}: "
                    f"{', '.join(shapes) or 'none'}",
                    *(param, grad),
                )
            expected = {"the parameter": param.shape, **shapes}
            for (name, shape), array in zip(expected.items(), (new, *slots), strict=True):
                have = np.asarray(array).dtype.name, np.shape(array)
                if have != (param.dtype.name, shape):
                    raise self._broken(
                        f"its update makes {name} {have[0]} of shape {have[1]}; expected "
                        f"{param.dtype.name} of shape {shape}",
                        *(param, grad),
                    )

    def is_elementwise(self) -> None:
        """Each element is treated as if it were alone."""
        if not self._rule.elementwise:
            return
        for param, grad in self._examples():
            slots = self._after_a_step(param, grad)
            new, _ = self._update(param, grad, slots, 2)
            for k in range(min(param.size, 50)):
                own = tuple(slot.reshape(-1)[k : k + 1] for slot in slots)
                alone, _ = self._update(
                    param.reshape(-1)[k : k + 1], grad.reshape(-1)[k : k + 1], own, 2
                )
                if not same(np.asarray(alone), np.asarray(new).reshape(-1)[k : k + 1]):
                    raise self._broken(
                        f"element {k} depends on others: a rule whose update sums, sorts or looks "
                        "at positions must say elementwise = False",
                        *(param, grad, np.asarray(new).reshape(-1)[k : k + 1], np.asarray(alone)),
                    )

    def is_accurate(self) -> None:
        """Rounding errors stay small: float32 is held to the same steps in float64."""
        if not self._rule.elementwise:
            return
        for param, grad in self._examples():
            if param.dtype != np.float32 or not np.isfinite(grad).all():
                continue
            low, high = param, param.astype(np.float64)
            slots, wide = self._fresh(low), self._fresh(high)
            largest = np.abs(high)
            for step in range(1, STEPS + 1):
                c = self._rule.coefficients(step, "float32")
                with np.errstate(all="ignore"):
                    low, slots = self._rule.update(np, low, grad, slots, c)
                    high, wide = self._rule.update(np, high, grad.astype(np.float64), wide, c)
                    largest = np.maximum(largest, np.abs(high))
                    off = np.abs(np.asarray(low, np.float64) - high)
                    bound = (step + ULPS) * np.spacing(largest.astype(np.float32))
                if not (off <= bound).all():
                    raise self._broken(
                        f"after {step} steps float32 is off by more than {step + ULPS} units in "
                        "the last place: are numbers subtracted that are nearly equal?",
                        *(param, grad, np.asarray(low), np.asarray(high, np.float32)),
                    )

    def is_equal_everywhere(self) -> None:
        """All libraries and engines give the same bits, clipped or not, on several threads too."""
        others = [(place, name) for place in places() for name in (*engines(place), "plain")]
        for clip, param, grad in self._clipped_examples():
            expected = self._run(NUMPY, "plain", clip, param, grad)
            for place, name in others:
                if not place.has(param.dtype.name):
                    continue
                found = self._run(place, name, clip, param, grad)
                for key, array in expected.items():
                    if not self._near(found[key], array):
                        raise self._broken(
                            f"{key} differs on {place.name} with the engine {name!r}"
                            f"{'' if clip is None else ', clipped'}: see the rules of "
                            "spec/arithmetic.md, or pass rtol= if it cannot be equal",
                            *(param, grad, found[key], array),
                        )

    def _clipped_examples(self) -> Iterator[tuple[Clip | None, np.ndarray, np.ndarray]]:
        """The examples, then clipped, then some that threads share."""
        clips = None, Clip(norm=0.9, value=0.6)
        for clip in clips:
            for param, grad in self._examples():
                yield clip, param, grad
        for shape in LARGE:
            if self._takes(shape):
                rng = np.random.default_rng(1)
                param, grad = (rng.standard_normal(shape, np.float32) for _ in range(2))
                for clip in clips:
                    yield clip, param, grad

    def _run(
        self, place: Place, name: str, clip: Clip | None, param: np.ndarray, grad: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The parameter and slots after some steps."""
        with engine(name):
            opt, params = Optimizer(self._rule, clip), {"w": place.make(param.copy())}
            for _ in range(STEPS):
                params = opt.step(params, {"w": place.make(grad.copy())})
            slots = opt.state("w").slots
        arrays = {"the parameter": params["w"], **slots}
        return {key: place.on_host(x) for key, x in arrays.items()}

    def treats_late_names_as_if_alone(self) -> None:
        """A name has a clock of its own."""
        for param, grad in self._examples():
            both, alone = Optimizer(self._rule), Optimizer(self._rule)
            early, late, its = ({"w": param.copy()} for _ in range(3))
            early["early"] = early.pop("w")
            for step in range(2 * STEPS):
                params, grads = dict(early), {"early": grad}
                if step >= STEPS:
                    params |= late
                    grads["w"] = grad
                    alone.step(its, {"w": grad})
                both.step(params, grads)
            if not same(late["w"], its["w"]):
                raise self._broken(
                    "a name that appears late is not updated as if it were alone",
                    *(param, grad, late["w"], its["w"]),
                )

    def can_be_resumed(self) -> None:
        """A run that is saved goes on as if it had not been."""
        param, grad = next(self._examples())
        with TemporaryDirectory() as folder:
            path = Path(folder) / "run.safetensors"
            through, before, after = (Optimizer(self._rule) for _ in range(3))
            one, other = {"w": param.copy()}, {"w": param.copy()}
            for _ in range(STEPS):
                through.step(one, {"w": grad})
                before.step(other, {"w": grad})
            before.save(path)
            after.load(path)
            for _ in range(STEPS):
                through.step(one, {"w": grad})
                after.step(other, {"w": grad})
        if not same(one["w"], other["w"]):
            raise self._broken(
                "a run that is saved and resumed goes on otherwise",
                *(param, grad, other["w"], one["w"]),
            )

    def _near(self, a: np.ndarray, b: np.ndarray) -> bool:
        if self._rtol is None:
            return same(a, b)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return True
        return bool((np.abs(a - b) <= self._rtol * np.abs(b).max(initial=0.0)).all())

    def _broken(
        self,
        promise: str,
        param: np.ndarray,
        grad: np.ndarray,
        found: np.ndarray | None = None,
        expected: np.ndarray | None = None,
    ) -> AssertionError:
        """The error, with the example."""
        lines = [f"{brief(self._rule)}: {promise}", f"parameter {_shown(param)}"]
        lines.append(f"gradient {_shown(grad)}")
        if found is not None and expected is not None:
            where = unequal(found, expected)
            index = tuple(map(int, np.argwhere(where)[0])) if found.shape == expected.shape else ()
            lines.append(f"at {list(index)}: {found[index]!r}; expected {expected[index]!r}")
        return AssertionError("\n".join(lines))


def _shown(x: np.ndarray) -> str:
    return f"{x.dtype.name} of shape {x.shape}: {brief(x.tolist())}"
