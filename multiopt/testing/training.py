"""Trains a prototype, and compares the gradients of its port at every step."""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from multiopt.arrays import Array
from multiopt.backend import backend_for
from multiopt.errors import brief
from multiopt.optimizer import Optimizer
from multiopt.rules import Rule
from multiopt.step.clip import Clip
from multiopt.testing.case import Case
from multiopt.testing.causes import cause_of
from multiopt.testing.departure import Departure
from multiopt.verify.equality import same

__all__ = ["assert_same_training", "compare_training"]

#: From the parameters and the step, counted from 1, to the gradients by name.
Gradients = Callable[[dict[str, Array], int], Mapping[str, Array]]

#: By dtype: how far a gradient may be off, relative to the largest element that it ever had, and
#: relative to the largest element of any gradient. Sums of a thousand numbers differ by less in two
#: libraries, a wrong formula by more. The second is some units in the last place: where large terms
#: cancel, a gradient that is zero in one library is not in another.
TOLERANCES = {
    "float64": (1e-9, 2.0**-48),
    "float32": (1e-4, 2.0**-19),
    "float16": (2e-2, 2.0**-6),
    "bfloat16": (1e-1, 2.0**-3),
}


def assert_same_training(*arguments: Any, **options: Any) -> None:
    """Raise an ``AssertionError`` that says where a port departs from its prototype.

    Args:
        *arguments: Those of ``compare_training``.
        **options: Likewise.

    Raises:
        AssertionError: They depart.
    """
    __tracebackhide__ = True  # pytest shows the test, not this line
    departure = compare_training(*arguments, **options)
    if departure is not None:
        raise AssertionError(str(departure))


def compare_training(
    reference: Gradients,
    port: Gradients,
    params: Mapping[str, Array],
    *,
    to_port: Callable[[Array], Array],
    rule: Rule | Callable[[str], Rule],
    clip: Clip | Callable[[str], Clip | None] | None = None,
    steps: int = 20,
    rtol: float | None = None,
) -> Departure | None:
    """Train a prototype, and find the first step at which its port computes something else.

    At every step both are given the parameters of the prototype, so that a mistake shows in the
    step and the parameter where it is made, not in all that follow from it. Then multiopt updates
    the prototype's parameters with the prototype's gradients, and the port's likewise, which must
    give equal bits.

    Args:
        reference: The prototype. ``reference(params, step)`` gives the gradients by name; steps are
            counted from 1. Whatever is random in it, such as the batch, must depend on the step
            alone. It may leave out parameters that it does not use in a step.
        port: The port. ``port(params, step)`` gives the same gradients for the same step.
        params: The parameters of the prototype as training begins. They are not changed.
        to_port: Turns an array of the prototype into one of the port, as ``torch.tensor``.
        rule: As for ``Optimizer``.
        clip: As for ``Optimizer``.
        steps: How many steps to train, >= 1.
        rtol: How far an element of a gradient may be off, relative to the largest element that the
            gradient of this parameter had so far. The default depends on the dtype: 1e-9 for
            float64, 1e-4 for float32, 0.02 for float16 and 0.1 for bfloat16.

    Returns:
        What departs first; None if nothing does.

    Raises:
        ValueError: An argument is out of range, there are no parameters, or ``to_port`` or the
            prototype changes what it is given.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be an integer >= 1; got {brief(steps)}")
    if rtol is not None and not (isinstance(rtol, Real) and 0 <= rtol < 1):
        raise ValueError(f"rtol must be a number from 0 to below 1, or None; got {brief(rtol)}")
    if not params:
        raise ValueError("there are no parameters to train; expected at least one in params")
    return _Comparison(reference, port, to_port, rtol).run(
        dict(params), [Optimizer(rule, clip, in_place=False) for _ in range(2)], steps
    )


class _Comparison:
    """A prototype and a port, and what was seen of them."""

    def __init__(
        self,
        reference: Gradients,
        port: Gradients,
        to_port: Callable[[Array], Array],
        rtol: float | None,
    ) -> None:
        self._reference, self._port, self._to_port, self._rtol = reference, port, to_port, rtol
        #: The parameters of the prototype before each step, and its gradients, in NumPy.
        self._params: list[dict[str, Array]] = []
        self._grads: list[dict[str, np.ndarray]] = []
        #: The largest element that the gradient of each parameter had.
        self._largest: dict[str, float] = {}
        #: The dtypes of the gradients of this step, which NumPy need not have.
        self._expected_dtypes: dict[str, str] = {}
        self._found_dtypes: dict[str, str] = {}

    def run(
        self, params: dict[str, Array], optimizers: list[Optimizer], steps: int
    ) -> Departure | None:
        """Train."""
        ours, its = optimizers
        for step in range(1, steps + 1):
            self._params.append(params)
            before = {name: _on_host(x, f"parameter {name!r}") for name, x in params.items()}
            ported = {name: self._to_port(_copy(x, name)) for name, x in params.items()}
            departure = self._dtypes(step, params, ported)
            if departure is not None:
                return departure
            grads = self._call(self._reference, "prototype", params, step)
            self._unchanged(before, params)
            expected = {name: _on_host(g, f"gradient of {name!r}") for name, g in grads.items()}
            self._expected_dtypes = {name: _dtype(g) for name, g in grads.items()}
            found = self._call(self._port, "port", dict(ported), step)
            departure = self._shared(step, before, params, expected, grads, found)
            departure = departure or self._compared(step, expected, found, ported)
            if departure is not None:
                return departure
            some = {name: params[name] for name in grads}
            updated = ours.step(some, grads)
            its_updated = its.step(
                *(
                    {name: _detached(self._to_port(_copy(x, name))) for name, x in arrays.items()}
                    for arrays in (some, grads)
                )
            )
            departure = self._updated(step, updated, its_updated)
            if departure is not None:
                return departure
            self._grads.append(expected)
            params = params | updated
        return None

    def _call(
        self, gradients: Gradients, who: str, params: dict[str, Array], step: int
    ) -> dict[str, Array]:
        """The gradients of one side, without those that are None."""
        try:
            given = gradients(dict(params), step)
        except Exception as error:
            error.add_note(f"raised by the {who} at step {step}")
            raise
        if not isinstance(given, Mapping):
            raise ValueError(
                f"the {who} gave {brief(given)} at step {step}; expected gradients by name"
            )
        unknown = [name for name in given if name not in params]
        if unknown:
            raise ValueError(
                f"the {who} gives a gradient of {unknown[0]!r} at step {step}, which is none of "
                f"the parameters {brief(list(params))}: add it to params"
            )
        # A mean over all elements is one of NumPy's numbers, not an array.
        return {
            name: np.asarray(g) if isinstance(g, np.generic) else g
            for name in params
            if (g := given.get(name)) is not None
        }

    def _unchanged(self, before: dict[str, np.ndarray], params: dict[str, Array]) -> None:
        for name, x in before.items():
            if not same(x, _on_host(params[name], f"parameter {name!r}")):
                raise ValueError(
                    f"the prototype changed parameter {name!r}, which must stay as it is: have it "
                    "work on a copy"
                )

    def _dtypes(
        self, step: int, params: dict[str, Array], ported: dict[str, Array]
    ) -> Departure | None:
        """Whether parameters lose precision on their way to the port."""
        for name, x in params.items():
            ours, its = _dtype(x), _dtype(ported[name])
            if self._rtol is None and ours != its:
                advice = (
                    f"to_port makes {its} of {ours}. JAX does unless jax_enable_x64 is set; if the "
                    "port is meant to have another precision, pass rtol="
                )
                return Departure(step, name, "dtype", None, ours, its, "precision", advice)
        return None

    def _shared(
        self,
        step: int,
        before: dict[str, np.ndarray],
        params: dict[str, Array],
        expected: dict[str, np.ndarray],
        grads: dict[str, Array],
        found: dict[str, Array],
    ) -> Departure | None:
        """Whether the port works in memory of the prototype: whatever it computes is equal then."""
        for name in before:
            given, its = grads.get(name), found.get(name)
            shares = given is not None and its is not None and _share(given, its)
            changed = not same(before[name], _on_host(params[name], name)) or (
                name in grads and not same(expected[name], _on_host(grads[name], name))
            )
            if changed or shares:
                advice = (
                    "the port writes where the prototype reads, or gives its gradient back, so the "
                    "two cannot differ. Copy arrays on their way to the port: torch.tensor(x) "
                    "copies, torch.from_numpy(x) does not."
                )
                return Departure(
                    step, name, "memory", None, "of its own", "the same", "shared memory", advice
                )
        return None

    def _compared(
        self,
        step: int,
        expected: dict[str, np.ndarray],
        found: dict[str, Array],
        ported: dict[str, Array],
    ) -> Departure | None:
        """Compare all gradients of a step."""
        its = {name: _on_host(g, f"gradient of {name!r}") for name, g in found.items()}
        self._found_dtypes = {name: _dtype(g) for name, g in found.items()}
        for name, g in expected.items():
            finite = np.abs(_real(g)[np.isfinite(_real(g))])
            self._largest[name] = max(self._largest.get(name, 0.0), finite.max(initial=0.0))
        departing = [name for name in ported if self._departs(name, expected, its)]
        if not departing:
            return None
        name, *others = departing
        a, b = expected.get(name), its.get(name)
        if a is None or b is None:
            sides = ("none", "one") if a is None else ("one", "none")
            advice = (
                "only one side uses this parameter in this step. Detached, frozen, or a name that "
                "is spelled differently?"
            )
            return Departure(
                step, name, "missing", None, *sides, "no gradient", advice, tuple(others)
            )
        case = Case(
            step=step,
            name=name,
            expected={n: _real(expected[n]) for n in expected if n in its},
            found={n: _real(its[n]) for n in expected if n in its},
            params={n: _real(_on_host(x, n)) for n, x in self._params[-1].items()},
            earlier=[{n: _real(g) for n, g in grads.items()} for grads in self._grads],
            again=self._again,
            tolerance=self._tolerances(name)[0],
            dtype=self._found_dtypes[name],
        )
        cause, advice = cause_of(case)
        if a.shape != b.shape:
            return Departure(
                *(step, name, "shape", None, a.shape, b.shape, cause, advice, tuple(others))
            )
        index = _worst(a, b)
        return Departure(
            *(step, name, "gradient", index, a[index].item(), b[index].item()),
            *(cause, advice, tuple(others)),
        )

    def _departs(
        self, name: str, expected: dict[str, np.ndarray], found: dict[str, np.ndarray]
    ) -> bool:
        if (name in expected) != (name in found):
            return True
        if name not in expected:
            return False
        a, b = expected[name], found[name]
        if a.shape != b.shape:
            return True
        x, y = _real(a), _real(b)
        is_same = (x == y) | (np.isnan(x) & np.isnan(y))
        with np.errstate(all="ignore"):
            tolerance, noise = self._tolerances(name)
            bound = tolerance * self._largest[name] + noise * max(self._largest.values())
            return not (is_same | (np.abs(x - y) <= bound)).all()

    def _tolerances(self, name: str) -> tuple[float, float]:
        """Those of the coarser dtype."""
        dtypes = self._expected_dtypes[name], self._found_dtypes[name]
        tolerance, noise = max(TOLERANCES[_real_dtype(dtype)] for dtype in dtypes)
        return tolerance if self._rtol is None else float(self._rtol), noise

    def _again(self, back: int, step: int) -> dict[str, np.ndarray] | None:
        """The gradients of the prototype at its parameters of some steps ago, or None."""
        try:
            grads = self._reference(dict(self._params[-1 - back]), step)
            return {name: _real(_on_host(g, name)) for name, g in grads.items() if g is not None}
        except Exception:  # of any kind: there need not be such a step
            return None

    def _updated(
        self, step: int, ours: Mapping[str, Array], its: Mapping[str, Array]
    ) -> Departure | None:
        """Compare the parameters that multiopt has updated on both sides: to the last bit."""
        for name, x in ours.items():
            a, b = _on_host(x, name), _on_host(its[name], name)
            if _dtype(x) == _dtype(its[name]) and not same(a, b):
                advice = (
                    "both were given the same gradient, so the port's library does not compute as "
                    "IEEE 754 says, or to_port rounds"
                )
                index = _worst(a, b)
                return Departure(
                    step, name, "update", index, a[index].item(), b[index].item(), "update", advice
                )
        return None


def _on_host(x: Array, label: str) -> np.ndarray:
    """An array of any library as a new NumPy array; bfloat16, which NumPy lacks, as float32."""
    backend = backend_for(x, label)
    if _dtype(x) == "bfloat16":
        x = backend.to_compute(x, backend.layout(x, label))
    return np.array(backend.to_host(x))


def _copy(x: Array, name: str) -> Array:
    return backend_for(x, f"{name!r}").duplicate(_detached(x))


def _detached(x: Array) -> Array:
    """A tensor without its history; other arrays have none."""
    return x.detach() if hasattr(x, "detach") else x


def _share(x: Array, y: Array) -> bool:
    """Whether two arrays are in the same memory, as far as the host can see."""
    a, b = (backend_for(z, "a gradient").memory(_detached(z)) for z in (x, y))
    return a is not None and b is not None and np.may_share_memory(a, b)


def _dtype(x: Array) -> str:
    return str(x.dtype).rpartition(".")[2]


def _real_dtype(dtype: str) -> str:
    return {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)


def _real(x: np.ndarray) -> np.ndarray:
    """In float64; complex numbers as two along a new last axis."""
    if np.iscomplexobj(x):
        x = np.stack([x.real, x.imag], axis=-1)
    return x.astype(np.float64)


def _worst(a: np.ndarray, b: np.ndarray) -> tuple[int, ...]:
    """Where two arrays differ most."""
    with np.errstate(all="ignore"):
        off = np.abs(a.astype(np.complex128) - b.astype(np.complex128))
        off = np.where(np.isnan(off), np.where(np.isnan(a) & np.isnan(b), 0.0, np.inf), off)
    return tuple(map(int, np.unravel_index(np.argmax(off), a.shape)))
