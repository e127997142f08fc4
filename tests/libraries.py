"""The array libraries that every test of behaviour runs on: facts about them, in one table."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import array_api_strict
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch


@dataclass(frozen=True)
class Library:
    """How tests make arrays of a library and read them back.

    Attributes:
        id: Its name among the tests.
        param: From a NumPy array to a parameter that shares nothing with it, strides kept if the
            library has strides.
        grad: From a NumPy array to a gradient.
        numpy: Back to NumPy.
        in_place: Whether a step writes the arrays that it was given.
        dtypes: The dtypes it has.
        engine: What updates parameters on the CPU: ``"compiled"``, ``"blocks"`` or ``"plain"``, the
            rule as it stands, which is the reference.
        needs_cuda: Whether it needs a GPU.
    """

    id: str
    param: Callable[[np.ndarray], Any]
    grad: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]
    in_place: bool
    dtypes: tuple[str, ...]
    engine: str = "compiled"
    needs_cuda: bool = False


def missing(library: Library) -> str | None:
    """Why a library cannot be tested on this machine, if so."""
    if library.needs_cuda and not torch.cuda.is_available():
        return "no CUDA device on this machine"
    return None


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Let new batches run on an engine."""
    before = os.environ.get("MULTIOPT_ENGINE", "compiled")
    os.environ["MULTIOPT_ENGINE"] = name
    yield
    os.environ["MULTIOPT_ENGINE"] = before


def like(array: np.ndarray) -> np.ndarray:
    """A copy with the strides of the original: gaps, orders and repeated elements."""
    if array.size == 0 or array.flags.c_contiguous:
        return array.copy()
    low, high = np.lib.array_utils.byte_bounds(array)
    memory = np.zeros(high - low, np.uint8)
    offset = array.__array_interface__["data"][0] - low
    copy = np.ndarray(array.shape, array.dtype, memory, offset, array.strides)
    copy[...] = array
    return copy


def read_only(array: np.ndarray) -> np.ndarray:
    copy = like(array)
    copy.flags.writeable = False
    return copy


def tensor(array: np.ndarray, device: str = "cpu") -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).to(device, torch.bfloat16)
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(like(array)).to(device)


def leaf(array: np.ndarray, device: str = "cpu") -> torch.Tensor:
    return tensor(array, device).requires_grad_()


def from_tensor(x: torch.Tensor) -> np.ndarray:
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.to(torch.float32).numpy().astype(ml_dtypes.bfloat16)
    return x.numpy()


WIDE = ("float32", "float64")
ALL = ("float16", "bfloat16", *WIDE)

NUMPY = Library("numpy", like, like, np.asarray, True, ALL, engine="plain")
TORCH = Library("torch", leaf, tensor, from_tensor, True, ALL)
JAX = Library("jax", jnp.array, jnp.array, np.asarray, False, ALL)
STRICT = Library(
    "strict",
    lambda a: array_api_strict.asarray(a.copy()),
    lambda a: array_api_strict.asarray(a.copy()),
    np.from_dlpack,
    False,
    WIDE,
)
LIBRARIES = [
    NUMPY,
    replace(NUMPY, id="numpy-compiled", engine="compiled"),
    replace(NUMPY, id="numpy-blocks", engine="blocks"),
    Library("numpy-read-only-gradients", like, read_only, np.asarray, True, ALL),
    STRICT,
    TORCH,
    replace(TORCH, id="torch-blocks", engine="blocks"),
    Library(
        "torch-cuda",
        lambda a: leaf(a, "cuda"),
        lambda a: tensor(a, "cuda"),
        from_tensor,
        True,
        ALL,
        needs_cuda=True,
    ),
    JAX,
]


def assert_equal(actual: Any, expected: Any, what: str = "") -> None:
    """Equality of the promise: same shape and dtype, ``==``, NaN equal to NaN."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    assert same.all(), f"{what}: {actual[~same]} != {expected[~same]}"
