"""``check_backend``: our backends pass; faulty ones fail by the promise that they break."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from multiopt import backend
from multiopt.backend import backend_named
from multiopt.testing import check_backend

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library and the backend that the page shows."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[0]
    module = ModuleType("vectors")
    monkeypatch.setitem(sys.modules, "vectors", module)
    monkeypatch.setattr(backend, "PACKAGES", {**backend.PACKAGES, "vectors": "vectors"})
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    forget()
    yield module
    forget()


def forget() -> None:
    backend.backend_named.cache_clear()
    backend._backend_by_type.clear()


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "array_api_strict"])
def test_our_backends_pass(library: str) -> None:
    check_backend(backend_named(library))


def test_the_backend_of_the_page_passes(vectors: Any) -> None:
    check_backend(vectors.BACKEND)


def keeps_nothing(self: Any, param: Any, values: Any) -> None:
    """A write to a copy."""
    np.array(param)[...] = values


def in_float32(self: Any, array: Any, layout: Any) -> Any:
    return np.asarray(array).astype(np.float32).astype(layout.compute_dtype)


def as_float64(self: Any, array: Any, label: str) -> Any:
    from multiopt.layout import Layout

    return Layout.of("vectors", np.asarray(array).shape, "float64", "cpu")


def other_library(self: Any, array: Any, label: str) -> Any:
    from multiopt.layout import Layout

    memory = np.asarray(array)
    return Layout.of("numpy", memory.shape, memory.dtype.name, "cpu")


def a_view(self: Any, array: Any) -> Any:
    return np.frombuffer(array.numbers, array.numbers.typecode)


def a_copy(self: Any, array: Any) -> Any:
    return np.array(np.asarray(array))


def without_subnormals(self: Any, array: Any, layout: Any = None) -> Any:
    x = np.where(np.abs(array) < np.finfo(array.dtype).tiny, 0.0, array)
    return sys.modules["vectors"].Vector(x.tolist(), array.dtype.char)


def as_it_is(self: Any, array: Any, layout: Any = None) -> Any:
    return array


def itself(self: Any, param: Any) -> Any:
    return param


def refused(self: Any, array: Any, layout: Any = None) -> Any:
    raise TypeError("no arrays today")


FAULTS: list[tuple[str, Callable[..., Any], str]] = [
    ("to_compute", in_float32, "a step of SGD"),
    ("layout", as_float64, r"layout says float64 of shape \(1,\)\narray float32"),
    ("layout", other_library, "layout says that an array is of 'numpy'; expected 'vectors'"),
    ("to_host", a_view, "to_host gives memory of the array itself"),
    ("memory", a_copy, "memory gives a copy"),
    ("export", without_subnormals, "to_host does not give what export was given"),
    ("export", as_it_is, "export makes no array"),
    ("export", refused, "export makes no array"),
    ("duplicate", itself, "in_place=False changes a parameter"),
]


@pytest.mark.parametrize(
    ("method", "fault", "message"), FAULTS, ids=[f"{m}: {f.__name__}" for m, f, _ in FAULTS]
)
def test_a_faulty_backend_fails_by_its_promise(
    vectors: Any, method: str, fault: Callable[..., Any], message: str
) -> None:
    setattr(vectors.VectorBackend, method, fault)
    with pytest.raises(AssertionError, match=message):
        check_backend(vectors.BACKEND)


def test_a_write_that_is_lost(vectors: Any) -> None:
    # A library whose memory nobody shows: ``write`` is asked to change arrays.
    vectors.VectorBackend.memory = lambda self, array: None
    check_backend(vectors.BACKEND)
    vectors.VectorBackend.write = keeps_nothing
    with pytest.raises(AssertionError, match=r"VectorBackend: a step of SGD(?s:.)*array float64"):
        check_backend(vectors.BACKEND)


def test_a_library_that_nobody_knows(vectors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {name: package for name, package in backend.PACKAGES.items() if name != "vectors"}
    monkeypatch.setattr(backend, "PACKAGES", table)
    with pytest.raises(AssertionError, match="add the library to"):
        check_backend(vectors.BACKEND)


def test_what_is_no_backend_is_refused() -> None:
    with pytest.raises(TypeError, match="backend must be a Backend; got 'torch'"):
        check_backend("torch")  # type: ignore[arg-type]
