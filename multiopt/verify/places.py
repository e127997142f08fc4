"""The libraries whose arrays are checked, and the devices that they are on."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from multiopt.backend import Backend, backend_for
from multiopt.bench.machine import ENGINE
from multiopt.layout import Layout

__all__ = ["NUMPY", "Place", "engine", "engines", "places"]


class Place(NamedTuple):
    """Arrays of a library on a device.

    Attributes:
        name: What the table calls them.
        make: From a NumPy array to one of theirs.
        backend: Their backend.
        device: As their layouts say it.
    """

    name: str
    make: Callable[[np.ndarray], Any]
    backend: Backend
    device: str

    def has(self, dtype: str) -> bool:
        """Whether arrays keep a dtype: JAX makes float32 of float64 unless it is told not to."""
        try:
            made = self.make(np.zeros(2, dtype))
        except TypeError:  # as the standard's own library says of float16
            return False
        return str(made.dtype).rpartition(".")[2] == dtype

    def namespace(self, dtype: str) -> Any:
        """Where multiopt has rules computed for such arrays, unless an engine does."""
        return self.backend.namespace(Layout(self.backend.library, (2,), dtype, self.device))

    def on_host(self, x: Any) -> np.ndarray:
        """An array of theirs, or one of NumPy, in NumPy."""
        return x if isinstance(x, np.ndarray) else np.asarray(self.backend.to_host(x))


def places(more: Sequence[str] = ()) -> list[Place]:
    """The libraries that are installed, on each kind of device.

    Args:
        more: Modules of other Array API libraries.
    """
    found = [NUMPY]
    if find_spec("torch"):
        torch = import_module("torch")
        found.append(_place("torch", torch.tensor))
        if torch.cuda.is_available():
            found.append(_place("torch CUDA", lambda x: torch.tensor(x, device="cuda")))
    if find_spec("jax"):
        jax = import_module("jax")
        found.append(_place("JAX", lambda x: jax.device_put(x, jax.devices("cpu")[0])))
    for name in more:
        library = import_module(name)
        found.append(_place(name, partial(library.asarray, copy=True)))
    return found


def _place(name: str, make: Callable[[np.ndarray], Any]) -> Place:
    sample = make(np.zeros(2, np.float32))
    backend = backend_for(sample, f"an array of {name}")
    return Place(name, make, backend, backend.layout(sample, name).device)


def engines(place: Place) -> list[str]:
    """The engines that update arrays of a library, besides the rule as it stands."""
    if place.name not in ("NumPy", "torch", "JAX"):
        return ["plain"]
    compiled = ["compiled"] if find_spec("numba") and find_spec("llvmlite") else []
    return [*compiled, "blocks"] if place.name == "NumPy" else compiled or ["blocks"]


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Let new groups run on an engine."""
    before = os.environ.get(ENGINE)
    os.environ[ENGINE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENGINE]
        else:
            os.environ[ENGINE] = before


NUMPY = _place("NumPy", np.array)
