"""NumPy arrays, computed by the rule as it stands and updated in place: the reference."""

from typing import Any

import numpy as np

from multiopt.backend import Array, Backend, Layout, Task, require_dtype

__all__ = ["NumpyBackend"]


class NumpyBackend(Backend):
    """NumPy arrays."""

    def layout(self, array: Array, label: str) -> Layout:
        """Inspect an array; see ``Backend``."""
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{label} is a masked array, whose mask no rule knows: fill it first")
        require_dtype(array.dtype.name, label)
        return Layout("numpy", array.shape, array.dtype.name, "cpu")

    def check_writable(self, param: Array, label: str) -> None:
        """Refuse read-only and broadcast parameters."""
        if not param.flags.writeable:
            raise ValueError(f"{label} is read-only; expected an array to update in place: copy it")
        check_no_broadcast(param.shape, param.strides, label)

    def memory(self, param: Array) -> np.ndarray | None:
        """The parameter itself."""
        return np.asarray(param)

    def namespace(self, layout: Layout) -> Any:
        """NumPy itself."""
        return np

    def opened(self, array: Array, layout: Layout) -> Array:
        """The array itself, subclasses stripped, or its float32 copy if it has 16 bits."""
        return np.asarray(array).astype(layout.compute_dtype, copy=False)

    def closed(self, computed: Array, param: Array) -> Array:
        """The array itself; a 0-d result that NumPy made a scalar is an array again."""
        return np.asarray(computed)

    def write(self, task: Task, computed: Array) -> Array:
        """Copy the values into the parameter, rounded to its dtype."""
        np.copyto(task.param, computed, casting="same_kind")
        return task.param

    def to_host(self, array: Array) -> np.ndarray:
        """A copy."""
        return np.array(array)

    def from_host(self, array: np.ndarray, layout: Layout) -> Array:
        """A copy."""
        return np.array(array)

    def copied(self, array: Array) -> Array:
        """A copy."""
        return np.array(array)


def check_no_broadcast(shape: tuple[int, ...], strides: tuple[int, ...], label: str) -> None:
    """Refuse a parameter of which several elements stand in one place.

    Raises:
        ValueError: A stride is 0 along more than one element.
    """
    repeated = any(stride == 0 and n > 1 for n, stride in zip(shape, strides, strict=True))
    if repeated and 0 not in shape:
        raise ValueError(
            f"{label} is expanded (a stride of 0): several elements share one place in memory; "
            "expected an array with a place for each: copy it"
        )
