"""Holds a backend to what multiopt promises of every array library."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from multiopt.backend import Backend, backend_for
from multiopt.errors import brief
from multiopt.optimizer import Optimizer
from multiopt.rules import LAMB, SGD, Adam, Rule
from multiopt.step.clip import Clip
from multiopt.verify.equality import same, unequal
from multiopt.verify.places import engine

__all__ = ["check_backend"]

#: Vectors come first: a library need not have anything else.
SHAPES = ((1,), (3,), (5,), (), (0,), (2, 3), (2, 1, 4), (1030,))

DTYPES = ("float64", "float32", "float16")

RULES = (SGD(lr=0.5), SGD(lr=0.5, momentum=0.9), Adam(lr=0.1), LAMB(lr=0.1))

STEPS = 3


def check_backend(backend: Backend) -> None:
    """Hold a backend to what multiopt promises; the first promise that fails is named.

    - Its arrays are found by their type, and it says what they are: shape, dtype and library.
    - Numbers come to the host and go back as they are, special ones too, as copies.
    - Memory that it shows is the array's own.
    - Rules give the bits of NumPy, in parameters and slots, clipped or not. A step writes where the
      backend says so, and nowhere else: gradients stay, and everything with ``in_place=False``.
    - A step that is refused changes nothing, and its error names the parameter.
    - A run that is saved and resumed goes on as if it had not been.

    Args:
        backend: The backend. Arrays are made by its ``export``. Shapes and dtypes that the library
            does not have are left out; vectors of float64 or float32 it must have.

    Raises:
        AssertionError: A promise does not hold. The message says which, and shows the smallest
            example that was found.
        TypeError: ``backend`` is not a backend.

    >>> from multiopt.backend import backend_named
    >>> check_backend(backend_named("numpy"))
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"backend must be a Backend; got {brief(backend)}")
    check = _BackendCheck(backend)
    for promise in (
        check.finds_its_arrays,
        check.brings_numbers_back,
        check.shows_memory_of_its_own,
        check.gives_the_bits_of_numpy,
        check.leaves_arrays_alone_if_asked,
        check.changes_nothing_if_it_refuses,
        check.can_be_resumed,
    ):
        promise()


class _BackendCheck:
    """The promises, one a method."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._kinds = [
            (shape, dtype) for shape in SHAPES for dtype in DTYPES if self._has(shape, dtype)
        ]
        if not self._kinds:
            raise self._broken(
                "export makes no array of a float64 or float32 vector, or layout refuses it"
            )

    def _has(self, shape: tuple[int, ...], dtype: str) -> bool:
        """Whether the library has arrays of a shape and a dtype."""
        try:
            array = self._backend.export(np.zeros(shape, dtype))
            if isinstance(array, np.ndarray) and self._backend.library != "numpy":
                return False  # as of JAX, which has float64 only if it is told to
            self._backend.layout(array, "an array")
        except (TypeError, ValueError):
            return False
        host = self._host(array)
        return host.shape == shape and host.dtype == dtype

    def _examples(self, special: bool = False) -> Iterator[np.ndarray]:
        for shape, dtype in self._kinds:
            rng = np.random.default_rng(0)
            x = np.asarray(rng.standard_normal(shape)).astype(dtype)
            if special:
                tiny = np.finfo(dtype).smallest_subnormal
                values = np.array([np.nan, np.inf, -np.inf, 0.0, tiny, -tiny], dtype)
                x = np.where(rng.random(shape) < 0.5, rng.choice(values, shape), x)
            yield np.asarray(x, dtype)

    def _host(self, array: Any) -> np.ndarray:
        return np.asarray(self._backend.to_host(array))

    def finds_its_arrays(self) -> None:
        """Arrays are found, and are what they are."""
        for x in self._examples():
            array = self._backend.export(x)
            try:
                found = backend_for(array, "an array")
            except TypeError as error:
                raise self._broken(f"no backend is found for its arrays: {error}") from error
            if type(found) is not type(self._backend):
                raise self._broken(
                    f"its arrays are given to {type(found).__name__}: add the library to "
                    "multiopt.backend.PACKAGES"
                )
            layout = self._backend.layout(array, "an array")
            if layout.library != self._backend.library:
                raise self._broken(
                    f"layout says that an array is of {layout.library!r}; expected "
                    f"{self._backend.library!r}"
                )
            if (layout.storage_shape, layout.storage_dtype) != (x.shape, x.dtype.name):
                raise self._broken(
                    f"layout says {layout.storage_dtype} of shape {layout.storage_shape}", x
                )

    def brings_numbers_back(self) -> None:
        """To the host and back, as copies."""
        for x in self._examples(special=True):
            array = self._backend.export(x.copy())
            self._equal("to_host does not give what export was given", x, self._host(array), x)
            host = self._host(array)
            if host.size:
                host = np.array(host) if not host.flags.writeable else host
                host[...] = 7
                self._equal("to_host gives memory of the array itself", x, self._host(array), x)
            given = x.copy()
            array = self._backend.export(given)
            given[...] = 7
            self._equal("export keeps memory that it was given", x, self._host(array), x)

    def shows_memory_of_its_own(self) -> None:
        """What is written to the memory is in the array."""
        for x in self._examples():
            array = self._backend.export(x)
            memory = self._backend.memory(array)
            if memory is None or not memory.size or memory.dtype != x.dtype:
                continue
            if memory.flags.writeable:
                memory[...] = 7
                seven = np.full_like(x, 7)
                self._equal("memory gives a copy", x, self._host(array), seven)

    def gives_the_bits_of_numpy(self) -> None:
        """Rules, on what computes here and as they stand."""
        for name in ("compiled", "plain"):
            for clip in (None, Clip(norm=0.5, value=0.4)):
                for rule in RULES:
                    for x in self._examples():
                        with engine(name):
                            self._steps(rule, clip, x)

    def _steps(self, rule: Rule, clip: Clip | None, x: np.ndarray) -> None:
        export, what = self._backend.export, f"{brief(rule)}{'' if clip is None else ', clipped'}"
        opt, numpys = Optimizer(rule, clip), Optimizer(rule, clip)
        start = export(x)
        params, expected = {"w": start}, {"w": x.copy()}
        for step in range(STEPS):
            grad = (x * 10.0**-step).astype(x.dtype)
            given, before = export(grad), self._host(params["w"])
            old = params["w"]
            params = opt.step(params, {"w": given})
            numpys.step(expected, {"w": grad.copy()})
            self._equal(f"a step of {what}", x, self._host(params["w"]), expected["w"])
            self._equal("a step changes its gradient", x, self._host(given), grad)
            if self._backend.in_place and params["w"] is not old:
                raise self._broken("a step returns another array, though it writes in place", x)
            if not self._backend.in_place:
                self._equal("a step changes an array in place", x, self._host(old), before)
            slots, wanted = opt.state("w").slots, numpys.state("w").slots
            for slot, values in wanted.items():
                if type(slots[slot]) is not type(start):
                    raise self._broken(
                        f"the slot {slot} is shown as a {type(slots[slot]).__name__}; expected a "
                        f"{type(start).__name__}",
                        x,
                    )
                self._equal(f"{slot} of {what}", x, self._host(slots[slot]), values)

    def leaves_arrays_alone_if_asked(self) -> None:
        """With ``in_place=False``."""
        for x in self._examples():
            start = self._backend.export(x)
            opt = Optimizer(Adam(lr=0.1), in_place=False)
            expected = {"w": x.copy()}
            Optimizer(Adam(lr=0.1)).step(expected, {"w": x.copy()})
            found = opt.step({"w": start}, {"w": self._backend.export(x)})
            self._equal("in_place=False changes a parameter", x, self._host(start), x)
            self._equal("in_place=False", x, self._host(found["w"]), expected["w"])

    def changes_nothing_if_it_refuses(self) -> None:
        """A gradient of another shape."""
        x = next(self._examples())
        export, opt = self._backend.export, Optimizer(SGD(lr=0.5))
        params = {"v": export(x), "w": export(x)}
        grads = {"v": export(x), "w": export(np.concatenate([x, x]))}
        try:
            opt.step(params, grads)
        except ValueError as error:
            if "'w'" not in str(error):
                raise self._broken(f"the error does not name the parameter: {error}") from error
        else:
            raise self._broken("a gradient of another shape is taken", x)
        for array in params.values():
            self._equal("a step that is refused changes a parameter", x, self._host(array), x)

    def can_be_resumed(self) -> None:
        """Saved, and loaded."""
        for x in self._examples():
            export = self._backend.export
            through, before, after = (Optimizer(Adam(lr=0.1)) for _ in range(3))
            one, other = {"w": export(x)}, {"w": export(x)}
            for _ in range(STEPS):
                one = through.step(one, {"w": export(x)})
                other = before.step(other, {"w": export(x)})
            with TemporaryDirectory() as folder:
                before.save(Path(folder) / "run.safetensors")
                after.load(Path(folder) / "run.safetensors")
            for _ in range(STEPS):
                one = through.step(one, {"w": export(x)})
                other = after.step(other, {"w": export(x)})
            found, expected = self._host(other["w"]), self._host(one["w"])
            self._equal("a run that is saved and resumed goes on otherwise", x, found, expected)

    def _equal(self, promise: str, x: np.ndarray, found: np.ndarray, expected: np.ndarray) -> None:
        if found.dtype != expected.dtype or found.shape != expected.shape:
            kinds = (f"{a.dtype.name} of shape {a.shape}" for a in (found, expected))
            raise self._broken("{}: {}; expected {}".format(promise, *kinds), x)
        if not same(found, expected):
            where = unequal(found, expected)
            index = tuple(map(int, np.argwhere(where)[0]))
            raise self._broken(
                f"{promise}: {found[index]!r} at {list(index)}; expected {expected[index]!r}", x
            )

    def _broken(self, promise: str, x: np.ndarray | None = None) -> AssertionError:
        """The error, with the example."""
        lines = [f"{type(self._backend).__name__}: {promise}"]
        if x is not None:
            lines.append(f"array {x.dtype.name} of shape {x.shape}: {brief(x.tolist())}")
        return AssertionError("\n".join(lines))
