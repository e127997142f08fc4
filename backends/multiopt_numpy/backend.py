"""NumPy arrays, computed by the rule as it stands and updated in place: the reference."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from multiopt.backend import Array, Backend
from multiopt.engine import Group
from multiopt.layout import Layout, as_real, require_dtype
from multiopt.rules import Rule
from multiopt_kernels import engines
from multiopt_kernels.cpu.kernels import look_kernel
from multiopt_kernels.cpu.look import Look

__all__ = ["NumpyBackend"]


@cache
def _dtype_name(dtype: np.dtype) -> str:
    """The name, which NumPy takes 2 microseconds to spell."""
    return dtype.name


class NumpyBackend(Backend):
    """NumPy arrays."""

    in_place = True

    def layout(self, array: Array, label: str) -> Layout:
        """Inspect an array; see ``Backend``."""
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{label} is a masked array, whose mask no rule knows: fill it first")
        dtype = _dtype_name(array.dtype)
        require_dtype(dtype, label)
        return Layout.of("numpy", array.shape, dtype, "cpu")

    def as_real(self, array: Array, layout: Layout) -> Array:
        """The array, or a view."""
        return as_real(np.asarray(array)) if layout.is_complex else array

    def as_complex(self, parts: Array) -> Array:
        """A view."""
        kind = np.result_type(parts, np.complex64).newbyteorder(parts.dtype.byteorder)
        return np.ascontiguousarray(parts).view(kind)[..., 0]

    def check_writable(self, param: Array, label: str) -> None:
        """Refuse read-only and broadcast parameters."""
        if not param.flags.writeable:
            raise ValueError(f"{label} is read-only; expected an array to update in place: copy it")
        check_places(param.shape, param.strides, param.itemsize, label)

    def memory(self, array: Array) -> np.ndarray | None:
        """The array."""
        return np.asarray(array)

    def namespace(self, layout: Layout) -> Any:
        """NumPy itself."""
        return np

    def to_compute(self, array: Array, layout: Layout) -> Array:
        """The array, subclasses stripped, for reading; a float32 copy if it has 16 bits."""
        return read_only(np.asarray(array).astype(layout.compute_dtype, copy=False))

    def write(self, param: Array, values: Array) -> None:
        """Copy the values into the parameter."""
        np.copyto(np.asarray(param), values, casting="unsafe")

    def duplicate(self, param: Array) -> Array:
        """A copy without gaps, of the same class."""
        return np.array(param, subok=True)

    def group(self, rule: Rule, layout: Layout, has_masters: bool = False) -> Group:
        """Make a group of an engine of the CPU."""
        return engines.group(self, layout, rule, has_masters, _look, numpy_arrays=True)

    def to_host(self, array: Array) -> np.ndarray:
        """A copy."""
        return np.array(array)

    def export(self, array: Array, layout: Layout | None = None) -> Array:
        """A copy."""
        return np.array(array)


@cache
def _look() -> Look | None:
    """How compiled code looks at NumPy arrays; None if their structure is not the one it reads."""
    kernel = look_kernel("look_numpy")
    return None if kernel is None else Look(kernel, _facts)


def _facts(dtype: str) -> Sequence[int] | None:
    """What compiled code knows arrays of a dtype by."""
    try:
        return id(np.ndarray), id(np.dtype(dtype))
    except TypeError:
        return None  # NumPy knows of bfloat16 only once ml_dtypes is loaded


def read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written: a rule that updates in place fails instead of doing harm."""
    view = array.view()
    view.flags.writeable = False
    return view


def check_places(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, label: str
) -> None:
    """Refuse a parameter of which several elements stand in one place.

    Args:
        shape: Its shape.
        strides: Its strides, in the unit of ``itemsize``.
        itemsize: The size of an element.
        label: What it is, for messages.

    Raises:
        ValueError: They do, as in an expanded array or in overlapping windows.
    """
    if 0 in shape:
        return
    axes = sorted((abs(stride), n) for n, stride in zip(shape, strides, strict=True) if n > 1)
    reach = 0
    for stride, n in axes:
        if stride < reach + itemsize and (stride == 0 or _overlap(axes, itemsize)):
            how = "expanded (a stride of 0)" if stride == 0 else "made of overlapping windows"
            raise ValueError(
                f"{label} is {how}: several elements share one place in memory; expected an array "
                "with a place for each: copy it"
            )
        reach += stride * (n - 1)


def _overlap(axes: list[tuple[int, int]], itemsize: int) -> bool:
    """Whether two elements overlap, by looking at all of them."""
    places = np.zeros(1, np.int64)
    for stride, n in axes:
        places = np.add.outer(places, stride * np.arange(n)).ravel()
    return bool((np.diff(np.sort(places)) < itemsize).any())
