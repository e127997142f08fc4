"""Named arrays as flat vectors, which travel in a few large pieces instead of many small ones.

Arrays of one dtype and one type of device share a vector; NumPy's are the CPU's, and a complex
array is its real and imaginary parts.

>>> import numpy as np
>>> from multiopt.layout import Layout
>>> layouts = {"a": Layout.of("numpy", (2, 2), "float32", "cpu")}
>>> layouts["b"] = Layout.of("numpy", (), "float32", "cpu")
>>> packing = Packing(layouts)
>>> [vector] = packing.vectors(multiple=4)
>>> vector.size, vector.length
(5, 8)
>>> flat = vector.packed({"a": np.ones((2, 2), "float32")}, torch.device("cpu"))
>>> flat.tolist()
[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
>>> vector.unpacked(flat)["a"].tolist()
[[1.0, 1.0], [1.0, 1.0]]
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from math import prod
from typing import Any

import numpy as np
import torch

from multiopt.arrays import Array
from multiopt.backend import backend_named
from multiopt.layout import Layout

__all__ = ["Packing", "Vector", "kind_of_device"]

#: How many bytes are exchanged at once.
BUCKET = 2**25


def kind_of_device(layout: Layout) -> str:
    """The type of the device of an array, such as ``"cuda"``: ranks may have it on others."""
    return layout.device.partition(":")[0]


class Packing:
    """Where the numbers of named arrays are.

    Args:
        layouts: The layouts of the arrays, in the same order on every rank.
    """

    def __init__(self, layouts: Mapping[str, Layout]) -> None:
        """Sort the arrays into vectors."""
        self._alike: dict[tuple[str, str, bool], dict[str, Layout]] = {}
        for name, layout in layouts.items():
            # Of complex arrays alone, so that each begins at an even place.
            key = layout.storage_dtype, kind_of_device(layout), layout.is_complex
            self._alike.setdefault(key, {})[name] = layout

    def vectors(self, multiple: int) -> Iterator["Vector"]:
        """The vectors.

        Args:
            multiple: What their lengths are multiples of.
        """
        for (dtype, kind, _), layouts in self._alike.items():
            yield Vector(dtype, kind, layouts, multiple)


class Vector:
    """Some arrays of one kind, one after the other, and zeros up to a length.

    Args:
        dtype: Their dtype; of complex ones that of the parts.
        kind: The type of their device.
        layouts: Their layouts.
        multiple: What the length is a multiple of.

    Attributes:
        size: How many numbers they have.
        length: How many numbers the vector has.
    """

    def __init__(self, dtype: str, kind: str, layouts: Mapping[str, Layout], multiple: int) -> None:
        """Add up the sizes of the arrays."""
        self.dtype, self.kind, self._layouts = getattr(torch, dtype), kind, layouts
        self._sizes = {name: prod(layout.storage_shape) for name, layout in layouts.items()}
        self.size = sum(self._sizes.values())
        self.length = -(-self.size // multiple) * multiple
        #: How many numbers are exchanged at once, a multiple too.
        self._bucket = max(BUCKET // self.dtype.itemsize // multiple, 1) * multiple

    def buckets(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Parts of a vector that are exchanged one after the other."""
        for first in range(0, self.length, self._bucket):
            yield flat[first : first + self._bucket]

    def packed(self, arrays: Mapping[str, Array | None], device: torch.device) -> torch.Tensor:
        """A new vector; it has zeros in the place of arrays that are missing or None."""
        pieces = []
        for name, size in self._sizes.items():
            array = arrays.get(name)
            if array is None:
                pieces.append(torch.zeros(1, dtype=self.dtype, device=device).expand(size))
            else:
                pieces.append(_flat(array, self._layouts[name]).to(device))
        rest = self.length - self.size
        pieces.append(torch.zeros(rest, dtype=self.dtype, device=device))
        return torch.cat(pieces)

    def empty(self, device: torch.device) -> torch.Tensor:
        """A new vector whose numbers are not set."""
        return torch.empty(self.length, dtype=self.dtype, device=device)

    def unpacked(self, flat: torch.Tensor) -> dict[str, Array]:
        """The arrays in a vector; they share its memory if they are on its device."""
        pieces = torch.split(flat[: self.size], list(self._sizes.values()))
        named = zip(self._layouts.items(), pieces, strict=True)
        return {name: _shaped(piece, layout) for (name, layout), piece in named}


def _flat(array: Array, layout: Layout) -> torch.Tensor:
    """The numbers of an array in row-major order, without a copy if they lie so in memory."""
    if layout.library == "torch":
        # A view may say that its memory holds the conjugates or the negatives.
        tensor = array.detach().resolve_conj().resolve_neg()
        return (torch.view_as_real(tensor) if layout.is_complex else tensor).reshape(-1)
    array = np.asarray(array, order="C")
    array = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
    array = backend_named("numpy").as_real(array, layout).reshape(-1)
    if layout.storage_dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _shaped(piece: torch.Tensor, layout: Layout) -> Array:
    """The array of a layout that has the numbers of a piece of a vector."""
    tensor = piece.view(layout.storage_shape)
    if layout.library == "torch":
        tensor = tensor.to(layout.device)
        return torch.view_as_complex(tensor) if layout.is_complex else tensor
    if layout.storage_dtype == "bfloat16":
        return tensor.cpu().view(torch.int16).numpy().view(_bfloat16())
    array = tensor.cpu().numpy()
    return array.view(layout.dtype)[..., 0] if layout.is_complex else array


@cache
def _bfloat16() -> Any:
    """The dtype that NumPy has once ``ml_dtypes`` is loaded."""
    return import_module("ml_dtypes").bfloat16
