"""Layouts: the library, shape, dtype and device of an array, as plain data.

State belongs to a parameter of one layout; a step compares the layout of each array that comes
under a name with it. A complex parameter is computed as the array of its real and imaginary parts,
and 16-bit parameters are computed in float32, so a layout tells storage from computation.

>>> layout = Layout.of("numpy", (3,), "float16", "cpu")
>>> layout.storage_dtype, layout.compute_dtype
('float16', 'float32')
"""

from collections.abc import Iterable, Mapping
from ctypes import addressof, c_char
from typing import NamedTuple

import numpy as np

__all__ = ["COMPUTE_DTYPE", "PARTS_OF", "Layout", "Words", "address", "as_real", "require_dtype"]

#: The dtypes of parameters, with the dtype in which updates are computed and slots are kept.
COMPUTE_DTYPE: Mapping[str, str] = {
    "bfloat16": "float32",
    "float16": "float32",
    "float32": "float32",
    "float64": "float64",
}

#: Complex dtypes, with the dtype of their real and imaginary parts.
PARTS_OF: Mapping[str, str] = {"complex64": "float32", "complex128": "float64"}


class Layout(NamedTuple):
    """What an array is, apart from its values. Layouts are equal across processes.

    A complex array is stored as the array of its real and imaginary parts, along one more axis at
    the end.

    Attributes:
        library: ``"numpy"``, ``"torch"`` or ``"jax"``, or the module name of an Array API
            namespace.
        storage_shape: The shape, the axis of real and imaginary parts included.
        storage_dtype: The dtype, of the parts if the array is complex: a key of
            ``COMPUTE_DTYPE``.
        device: The device, as the library prints it.
        is_complex: Whether the array is complex.

    >>> layout = Layout.of("numpy", (3,), "complex64", "cpu")
    >>> layout.storage_shape, layout.storage_dtype, layout.shape, layout.dtype
    ((3, 2), 'float32', (3,), 'complex64')
    """

    library: str
    storage_shape: tuple[int, ...]
    storage_dtype: str
    device: str
    is_complex: bool = False

    @classmethod
    def of(cls, library: str, shape: Iterable[int], dtype: str, device: str) -> "Layout":
        """The layout of an array, complex or not, from its own shape and dtype."""
        if dtype in PARTS_OF:
            return cls(library, (*shape, 2), PARTS_OF[dtype], device, is_complex=True)
        return cls(library, tuple(shape), dtype, device)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array itself."""
        return self.storage_shape[:-1] if self.is_complex else self.storage_shape

    @property
    def dtype(self) -> str:
        """The dtype of the array itself."""
        if self.is_complex:
            return next(name for name, part in PARTS_OF.items() if part == self.storage_dtype)
        return self.storage_dtype

    @property
    def compute_dtype(self) -> str:
        """The dtype of updates and of slots."""
        return COMPUTE_DTYPE[self.storage_dtype]

    def with_shape(self, shape: tuple[int, ...]) -> "Layout":
        """The same layout with another storage shape."""
        return self._replace(storage_shape=shape)


def require_dtype(dtype: str, label: str) -> None:
    """Check that a dtype is supported.

    Args:
        dtype: Its name.
        label: What has this dtype, for the message, as in ``parameter 'loc'``.

    Raises:
        TypeError: It is not a supported floating dtype.
    """
    supported = [*COMPUTE_DTYPE, *PARTS_OF]
    if dtype not in supported:
        raise TypeError(
            f"{label} has dtype {dtype}; expected one of {', '.join(sorted(supported))}: convert "
            "it to a floating dtype"
        )


def as_real(array: np.ndarray) -> np.ndarray:
    """View a complex array as its real and imaginary parts, along one more axis."""
    kind = np.dtype(PARTS_OF[array.dtype.name]).newbyteorder(array.dtype.byteorder)
    return array[..., np.newaxis].view(kind)


def address(array: np.ndarray) -> int:
    """The address of the first element of an array."""
    try:
        # ``array.ctypes.data`` takes 1.5 us, this 0.2.
        return addressof(c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # it is empty or read-only
        first: int = array.__array_interface__["data"][0]
        return first


class Words:
    """Int64 numbers in memory that compiled code reads or writes.

    Attributes:
        array: The numbers, as a NumPy array.
        values: The numbers, as a memoryview, to which writing takes 20 ns instead of 50.
        address: The address of the first.
    """

    __slots__ = ("address", "array", "values")

    def __init__(self, count: int) -> None:
        """Allocate numbers, all zero."""
        self.array = np.zeros(count, np.int64)
        self.values, self.address = memoryview(self.array.data), address(self.array)
