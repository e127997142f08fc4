"""What is known of an array without holding it: its library, shape, dtype and device."""

from collections.abc import Iterable, Mapping
from ctypes import addressof, c_char
from typing import NamedTuple

import numpy as np

__all__ = ["COMPUTE_DTYPE", "PARTS_OF", "Layout", "Words", "address", "as_real", "require_dtype"]

#: The dtypes of parameters, and the dtype in which each one is computed and keeps its slots.
COMPUTE_DTYPE: Mapping[str, str] = {
    "bfloat16": "float32",
    "float16": "float32",
    "float32": "float32",
    "float64": "float64",
}

#: Complex dtypes, and that of their two parts, in which each is computed.
PARTS_OF: Mapping[str, str] = {"complex64": "float32", "complex128": "float64"}


class Layout(NamedTuple):
    """The form of a parameter: plain data, equal across processes.

    A complex array counts as the array of its real and imaginary parts, which stand side by side
    along one more axis.

    Attributes:
        library: Its library: a package of ours, or the module name of an Array API namespace.
        storage_shape: As in NumPy, the axis of the parts included.
        storage_dtype: A key of ``COMPUTE_DTYPE``, that of the parts.
        device: As the library writes it.
        is_complex: Whether it is complex.

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
        """That of an array, complex or not."""
        if dtype in PARTS_OF:
            return cls(library, (*shape, 2), PARTS_OF[dtype], device, is_complex=True)
        return cls(library, tuple(shape), dtype, device)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the array itself has."""
        return self.storage_shape[:-1] if self.is_complex else self.storage_shape

    @property
    def dtype(self) -> str:
        """The dtype that the array itself has."""
        if self.is_complex:
            return next(name for name, part in PARTS_OF.items() if part == self.storage_dtype)
        return self.storage_dtype

    @property
    def compute_dtype(self) -> str:
        """The dtype of the computation and of the slots."""
        return COMPUTE_DTYPE[self.storage_dtype]

    def with_shape(self, shape: tuple[int, ...]) -> "Layout":
        """That of an array of the same kind with another shape, parts included."""
        return self._replace(storage_shape=shape)


def require_dtype(dtype: str, label: str) -> None:
    """Refuse a dtype that no rule can work with.

    Args:
        dtype: Its name.
        label: What has it, for the message, as in ``parameter 'loc'``.

    Raises:
        TypeError: It is not a floating dtype.
    """
    known = [*COMPUTE_DTYPE, *PARTS_OF]
    if dtype not in known:
        raise TypeError(
            f"{label} has dtype {dtype}; expected one of {', '.join(sorted(known))}: convert it to "
            "a floating dtype"
        )


def as_real(array: np.ndarray) -> np.ndarray:
    """A view of a complex array: its real and imaginary parts along one more axis."""
    kind = np.dtype(PARTS_OF[array.dtype.name]).newbyteorder(array.dtype.byteorder)
    return array[..., np.newaxis].view(kind)


def address(array: np.ndarray) -> int:
    """Where the first element of an array is."""
    try:
        # ``array.ctypes.data`` takes 1.5 us, this 0.2.
        return addressof(c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # it is empty, or not to be written
        place: int = array.__array_interface__["data"][0]
        return place


class Words:
    """Int64 numbers that compiled code reads or writes.

    Attributes:
        array: They.
        values: The same; to write one takes 20 ns, and 50 in the array.
        address: Where they are.
    """

    __slots__ = ("address", "array", "values")

    def __init__(self, count: int) -> None:
        """All are zero."""
        self.array = np.zeros(count, np.int64)
        self.values, self.address = memoryview(self.array.data), address(self.array)
