"""``check_rule``: every rule of ours passes; faulty ones fail by the promise that they break."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import multiopt as mo
from multiopt import rules as registered
from multiopt.testing import check_rule

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"

OURS = [name for name in registered.__all__ if name not in ("Rule", "Muon")]


@pytest.mark.parametrize("name", OURS)
def test_every_rule_of_ours_passes(name: str) -> None:
    rule = getattr(mo, name)()
    path = VECTORS / f"{type(rule).__module__.rpartition('.')[2]}.json"
    check_rule(rule, vectors=path if path.exists() else None)


def test_another_formula_fails_by_its_vectors() -> None:
    class EpsInsideTheRoot(mo.Adam):
        @property
        def update(self) -> Any:
            def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
                exp_avg, exp_avg_sq = slots
                exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * grad
                exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * (grad * grad)
                root = xp.sqrt(c.root_scale * c.root_scale * exp_avg_sq + c.eps)
                return param - c.step_size * (exp_avg / root), (exp_avg, exp_avg_sq)

            return update

    check_rule(EpsInsideTheRoot())
    with pytest.raises(AssertionError, match="param after step 1 of the case 'defaults'"):
        check_rule(EpsInsideTheRoot(), vectors=VECTORS / "adam.json")


def test_one_that_multiplies_matrices_passes_within_a_tolerance() -> None:
    check_rule(mo.Muon(), rtol=1e-3)


@pytest.mark.parametrize(
    "rule",
    [
        mo.SGD(lr=lambda step: 0.1 / step, momentum=0.9, nesterov=True, weight_decay=0.1),
        mo.Adam(amsgrad=True, maximize=True),
        mo.RMSprop(centered=True, momentum=0.5),
    ],
    ids=repr,
)
def test_options_pass(rule: mo.Rule) -> None:
    check_rule(rule)


@dataclass(frozen=True)
class Plain(mo.Rule):
    """A rule that is right; each of those below has one fault."""

    lr: float = 0.1

    slots: ClassVar = ("average",)
    elementwise: ClassVar[bool] = True

    @staticmethod
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        (average,) = slots
        average = c.keep * average + grad
        return param - c.lr * average, (average,)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr, "keep": 0.5}


calls = 0


class WritesASlot(Plain):
    @staticmethod
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        average = slots[0]
        average *= c.keep
        average += grad
        return param - c.lr * average, (average,)


class Counts(Plain):
    @staticmethod
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        global calls
        calls += 1
        return param - float(calls) * grad, slots


class LosesASlot(Plain):
    @staticmethod
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        return param - c.lr * grad, ()


class Widens(Plain):
    @staticmethod
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        return param - c.lr * grad, (np.asarray(grad, dtype=np.float64),)


class ChangesAShape(Plain):
    @staticmethod
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        return param - c.lr * grad, (slots[0].reshape(-1),)


class Sums(Plain):
    @staticmethod
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        return param - c.lr * (grad - xp.sum(grad)), slots


class Positions(Plain):
    @staticmethod
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        return param - c.lr * grad[::-1] if grad.ndim else param - c.lr * grad, slots


class LooksAtItsArrays(Plain):
    """Arrays of NumPy get another step than what an engine puts in their place."""

    @staticmethod
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        average = c.keep * slots[0] + grad
        if not isinstance(param, np.ndarray):
            average = average + grad
        return param - c.lr * average, (average,)


class OneClock(Plain):
    """Its coefficients depend on how often anybody asked."""

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        global calls
        calls += 1
        return {"lr": h.lr / calls, "keep": 0.5}


class Cancels(Plain):
    """Its sum loses all digits of a small gradient."""

    @staticmethod
    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        return param - c.lr * ((grad + 1e6) - 1e6), slots


class Refuses(Plain):
    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        raise ValueError("never")


FAULTS = [
    (WritesASlot, "its update writes to an array that it was given"),
    (Counts, "its update gives another result for the same arguments"),
    (LosesASlot, "its update returns 0 slots; expected 1: average"),
    (Widens, "its update makes average float64 of shape .*; expected float32 of shape"),
    (
        ChangesAShape,
        r"its update makes average float32 of shape \(1,\); expected float32 of shape \(\)",
    ),
    (Sums, "element 0 depends on others"),
    (Positions, "element 0 depends on others"),
    (LooksAtItsArrays, "the parameter differs on NumPy with the engine 'compiled'"),
    (OneClock, "another result for the same arguments|is not updated as if it were alone"),
    (Cancels, "float32 is off by more than 9 units in the last place"),
    (Refuses, "refuses all shapes that were tried"),
]


@pytest.mark.parametrize(("rule", "message"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_faulty_rule_fails_by_its_promise(rule: type[mo.Rule], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_rule(rule())


def test_a_rule_without_faults_passes() -> None:
    check_rule(Plain())


def test_the_example_is_small() -> None:
    with pytest.raises(AssertionError) as caught:
        check_rule(Sums())
    first, param, grad, where = str(caught.value).splitlines()
    assert first.startswith("Sums(lr=0.1): element 0 depends on others")
    # An array of one element is its own sum, so two are the fewest.
    assert param.startswith("parameter float32 of shape (2,)")
    assert grad.startswith("gradient float32 of shape (2,)")
    assert where.startswith("at [0]: ")


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(TypeError, match="rule must be a Rule; got 'Adam'"):
        check_rule("Adam")  # type: ignore[arg-type]
