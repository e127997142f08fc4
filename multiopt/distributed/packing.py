"""Named arrays as flat vectors, which travel in a few large pieces instead of many small ones.

Arrays of one library, one dtype and one type of device share a vector; a complex array is its real
and imaginary parts.

>>> import numpy as np
>>> from multiopt.layout import Layout
>>> layouts = {"a": Layout.of("numpy", (2, 2), "float32", "cpu")}
>>> layouts["b"] = Layout.of("numpy", (), "float32", "cpu")
>>> [vector] = vectors_of(layouts, multiple=4)
>>> vector.size, vector.length
(5, 8)
>>> flat = vector.packed({"a": np.ones((2, 2), "float32")}, torch.device("cpu"))
>>> flat.tolist()
[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
>>> vector.unpacked(flat)["a"].tolist()
[[1.0, 1.0], [1.0, 1.0]]
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch

from multiopt.arrays import Array
from multiopt.layout import Layout

__all__ = ["BUCKET", "Vector", "kind_of_device", "vectors_of"]

#: How many bytes are exchanged at once: few enough for a processor's cache.
BUCKET = 2**22


def kind_of_device(layout: Layout) -> str:
    """The type of the device of an array, such as ``"cuda"``: ranks may have it on others."""
    return layout.device.partition(":")[0]


def vectors_of(layouts: Mapping[str, Layout], multiple: int) -> list["Vector"]:
    """The vectors of some arrays.

    Args:
        layouts: The layouts of the arrays, in the same order on every rank.
        multiple: What the lengths of the vectors are multiples of.
    """
    alike: dict[tuple[str, str, str], dict[str, Layout]] = {}
    for name, layout in layouts.items():
        key = layout.library, layout.dtype, kind_of_device(layout)
        alike.setdefault(key, {})[name] = layout
    return [
        (_OfNumPy if key[0] == "numpy" else _OfTorch)(*key[1:], mine, multiple)
        for key, mine in alike.items()
    ]


class Vector(ABC):
    """Some arrays of one kind, one after the other, and zeros up to a length.

    Args:
        dtype: Their dtype.
        kind: The type of their device.
        layouts: Their layouts.
        multiple: What the length is a multiple of.

    Attributes:
        dtype: The dtype of the vector: of complex arrays that of their parts.
        kind: The type of the device of the arrays.
        size: How many numbers the arrays have.
        length: How many numbers the vector has.
    """

    def __init__(self, dtype: str, kind: str, layouts: Mapping[str, Layout], multiple: int) -> None:
        """Find the places of the arrays."""
        first = next(iter(layouts.values()))
        self.dtype: torch.dtype = getattr(torch, first.storage_dtype)
        self.kind, self._is_complex = kind, first.is_complex
        self._dtype, self._device = dtype, first.device
        self._shapes = {name: layout.shape for name, layout in layouts.items()}
        self._sizes = {name: prod(shape) for name, shape in self._shapes.items()}
        self.size = sum(self._sizes.values()) * (1 + self._is_complex)
        self.length = -(-self.size // multiple) * multiple
        # A multiple too.
        self._bucket = max(BUCKET // self.dtype.itemsize // multiple, 1) * multiple

    def buckets(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Parts of a vector that are exchanged one after the other; the first is the largest."""
        for first in range(0, self.length, self._bucket):
            yield flat[first : first + self._bucket]

    @abstractmethod
    def packed(self, arrays: Mapping[str, Array | None], device: torch.device) -> torch.Tensor:
        """A new vector; it has zeros in the place of arrays that are missing or None."""

    @abstractmethod
    def unpacked(self, flat: torch.Tensor) -> dict[str, Array]:
        """The arrays in a vector; they share its memory if they are on its device."""


class _OfNumPy(Vector):
    def packed(self, arrays: Mapping[str, Array | None], device: torch.device) -> torch.Tensor:
        flat = torch.empty(self.length, dtype=self.dtype)
        host, zero = self._as_numpy(flat), np.zeros((), self._own_dtype())
        pieces = [
            np.broadcast_to(zero, size) if (array := arrays.get(name)) is None else array
            for name, size in self._sizes.items()
        ]
        # Of any strides and byte order.
        np.concatenate(pieces, axis=None, out=host)
        flat[self.size :] = 0.0
        return flat.to(device)

    def unpacked(self, flat: torch.Tensor) -> dict[str, Array]:
        host, ends = self._as_numpy(flat.cpu()), accumulate(self._sizes.values())
        named = zip(self._shapes.items(), self._sizes.values(), ends, strict=True)
        return {name: host[end - size : end].reshape(shape) for (name, shape), size, end in named}

    def _as_numpy(self, flat: torch.Tensor) -> np.ndarray:
        """A view of the numbers of the arrays, in their own dtype."""
        numbers = flat[: self.size]
        if self.dtype == torch.bfloat16:
            numbers = numbers.view(torch.int16)
        return numbers.numpy().view(self._own_dtype())

    def _own_dtype(self) -> Any:
        # NumPy has it once this is loaded.
        return import_module("ml_dtypes").bfloat16 if self._dtype == "bfloat16" else self._dtype


class _OfTorch(Vector):
    def packed(self, arrays: Mapping[str, Array | None], device: torch.device) -> torch.Tensor:
        zero = torch.zeros(1, dtype=getattr(torch, self._dtype), device=self._device)
        # As for steps, the class of a tensor has no say.
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            pieces = [
                zero.expand(size) if (array := arrays.get(name)) is None else array.reshape(-1)
                for name, size in self._sizes.items()
            ]
            # Of any strides, conjugates included.
            pieces.append(zero.expand((self.length - self.size) // (1 + self._is_complex)))
            flat = torch.cat(pieces)
            flat = (torch.view_as_real(flat).reshape(-1) if self._is_complex else flat).to(device)
            # A complex zero is two numbers, so that one may be missing.
            missing = self.length - len(flat)
            return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat

    def unpacked(self, flat: torch.Tensor) -> dict[str, Array]:
        numbers = flat[: self.size].to(self._device)
        if self._is_complex:
            numbers = torch.view_as_complex(numbers.view(-1, 2))
        pieces = torch.split(numbers, list(self._sizes.values()))
        named = zip(self._shapes.items(), pieces, strict=True)
        return {name: piece.view(shape) for (name, shape), piece in named}
