"""Backends: what multiopt asks of an array library.

A backend knows one library: how to inspect an array, where to compute with it, how to write a
result back. ``Backend`` itself serves every library that conforms to the Array API; the packages
under ``backends/`` refine it for NumPy, PyTorch and JAX, and are imported only when one of their
arrays appears.

>>> import numpy as np
>>> backend = backend_for(np.zeros(2), "parameter 'w'")
>>> backend.layout(np.zeros(2, "float32"), "parameter 'w'").shape, backend.in_place
((2,), True)
"""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from numbers import Integral, Number
from typing import Any, ClassVar

import array_api_compat
import numpy as np

from multiopt.arrays import Array, Member
from multiopt.engine import Group
from multiopt.errors import answer, brief
from multiopt.layout import PARTS_OF, Layout, require_dtype
from multiopt.reference import ReferenceGroup, fetched, is_finite, updated
from multiopt.rules import Adam, Rule

__all__ = ["Array", "Backend", "backend_for", "backend_named", "slot_of", "zeros"]

#: The libraries with a package of their own. multiopt imports no library that is not yet imported.
PACKAGES: Mapping[str, str] = {
    "numpy": "multiopt_numpy",
    "torch": "multiopt_torch",
    "jax": "multiopt_jax",
}

#: The device type of the host in DLPack.
CPU = 1

#: The name of array-api-compat's namespace for Dask.
DASK = "array_api_compat.dask.array"


class Backend:
    """Any Array API library, with the reference engine and without writing to its arrays.

    Args:
        library: Its name for ``backend_named``: the module name of its namespace.
    """

    #: Whether ``write`` updates parameters in place. If not, a step computes on copies and returns
    #: new arrays.
    in_place: ClassVar[bool] = False

    def __init__(self, library: str) -> None:
        """Create the backend of a library."""
        self.library = library
        #: The dtype, device and complexity of layouts for which ``_try`` has succeeded.
        self._tried: set[tuple[str, str, bool]] = set()

    # What an array is

    def layout(self, array: Array, label: str) -> Layout:
        """Inspect an array.

        Args:
            array: An array of this library.
            label: What the array is, for messages, as in ``parameter 'loc'``.

        Raises:
            TypeError: The array cannot be used: its dtype is not supported, or the library cannot
                do what a step or a checkpoint needs.
        """
        what = f"{label} is a {type(array).__name__} of {self.library}"
        dtype, shape, device = answer(f"{what}, which does not say what it is", _facts, array)
        require_dtype(dtype, label)
        layout = Layout.of(self.library, shape, dtype, device)
        kind = layout.storage_dtype, device, layout.is_complex
        if kind not in self._tried:
            answer(f"{what}, which cannot do what a step and a checkpoint need", self._try, layout)
            self._tried.add(kind)
        return layout

    def _try(self, layout: Layout) -> None:
        """Take a step with two numbers, and bring them back to the host."""
        xp, layout = self.namespace(layout), layout._replace(storage_shape=(2,))
        numbers = np.array([0.5, 2.0], layout.compute_dtype)
        (slot,) = self.to_slots([numbers], layout)
        back = self.to_host(slot)
        if back.dtype != numbers.dtype or back.tolist() != numbers.tolist():
            raise TypeError(f"{brief(numbers)} comes back as {brief(back)}")
        param = xp.astype(slot, getattr(xp, layout.storage_dtype))
        rule = Adam(amsgrad=True)
        member = Member("", 0, 0, self, param, param, layout, (slot,) * len(rule.slots))
        member.rule, member.scalars = rule, rule.coefficients(1, layout.compute_dtype)
        member.scales, member.bound = [0.5], 1.0
        fetched(self, layout, [is_finite(member)])
        param, *slots = self.to_slots(updated(member).arrays, layout)
        (param,) = self.to_params([member], [param])
        if layout.is_complex:
            self.as_real(self.as_complex(param), layout)
        self.to_host(slots[0])

    def as_real(self, array: Array, layout: Layout) -> Array:
        """Convert an array to one of real numbers, of the library's own class.

        A complex array becomes its real and imaginary parts along one more axis; other arrays keep
        their shape. The result shares memory with the array wherever arrays can be written.
        """
        if not layout.is_complex:
            return array
        xp = import_module(self.library)
        return xp.stack([xp.real(array), xp.imag(array)], axis=-1)

    def as_complex(self, parts: Array) -> Array:
        """Join the real and imaginary parts of a complex array: the inverse of ``as_real``."""
        host = np.ascontiguousarray(self.to_host(parts))
        complex_ = next(name for name, part in PARTS_OF.items() if part == host.dtype.name)
        xp, device = import_module(self.library), array_api_compat.device(parts)
        return xp.asarray(host.view(complex_)[..., 0], device=device)

    def check_writable(self, param: Array, label: str) -> None:
        """Check that a parameter can be updated in place.

        Raises:
            ValueError: The array is read-only, or some of its elements share memory.
        """

    def memory(self, array: Array) -> np.ndarray | None:
        """A NumPy array that shares memory with an array, for the engines of the CPU.

        It is read-only if the array must not be written. Its dtype is int16 for a bfloat16 that
        NumPy does not have, and a void type such as ``V4`` if only addresses are known. None if the
        memory cannot be reached from the host.
        """
        return None

    def gradients(
        self, params: np.ndarray, names: Sequence[str], new: Sequence[int], needed: bool
    ) -> np.ndarray:
        """Read the gradients that arrays carry, as torch's ``.grad``.

        Args:
            params: The parameters, as an array of objects; the first is of this library.
            names: Their names.
            new: The places of names that are seen for the first time.
            needed: Whether it is an error if no parameter has a gradient or can get one.

        Returns:
            The gradients, as an array of objects; None for a parameter without one.

        Raises:
            TypeError: An array cannot carry a gradient, or gradients are needed and there are none.
            ValueError: The library does not keep the gradient of an array.
        """
        raise TypeError(
            f"parameter {names[0]!r} is a {self.library} array, which carries no gradient; "
            "pass the gradients as the second argument: step(params, grads)"
        )

    # A step

    def namespace(self, layout: Layout) -> Any:
        """The Array API namespace in which updates of a layout are computed."""
        return import_module(self.library)

    def to_compute(self, array: Array, layout: Layout) -> Array:
        """Convert an array to the namespace and the dtype of the computation."""
        xp = self.namespace(layout)
        return xp.astype(array, getattr(xp, layout.compute_dtype), copy=False)

    def to_slots(self, arrays: Sequence[Array], layout: Layout) -> list[Array]:
        """Convert computed arrays to the form in which slots are kept and ``write`` takes values.

        Args:
            arrays: NumPy arrays, or arrays of the namespace, which nobody else writes to.
            layout: The layout of their parameters; its shape does not matter.
        """
        xp = self.namespace(layout)
        if xp is np or not any(isinstance(array, np.ndarray) for array in arrays):
            return list(arrays)
        devices = xp.__array_namespace_info__().devices()
        device = next((d for d in devices if str(d) == layout.device), None)
        return [xp.asarray(array, device=device) for array in arrays]

    def to_params(self, members: Sequence[Member], arrays: Sequence[Array]) -> list[Array]:
        """Round computed arrays to the dtypes of their parameters."""
        xps = [self.namespace(member.layout) for member in members]
        return [
            xp.astype(array, member.param.dtype, copy=False)
            for xp, member, array in zip(xps, members, arrays, strict=True)
        ]

    def write(self, param: Array, values: Array) -> None:
        """Write computed values into a parameter, if the library can. This cannot fail."""
        raise NotImplementedError

    def duplicate(self, param: Array) -> Array:
        """Copy a parameter, so that a step may write to the copy; itself if steps never write.

        The copy must keep everything that makes a parameter unusable: it is checked afterwards.
        """
        return param

    def group(self, rule: Rule, layout: Layout, has_masters: bool = False) -> Group:
        """Create a group for parameters of this layout, of any shape, and of this kind of rule."""
        return ReferenceGroup(self, layout, rule, has_masters)

    def touch(self, arrays: np.ndarray) -> None:
        """Tell the library that the memory of some of its arrays is about to be written."""

    # Slots outside a step

    def to_host(self, array: Array) -> np.ndarray:
        """Copy an array into a NumPy array."""
        if hasattr(array, "__dlpack__"):
            # Older libraries do not know the argument ``device``, which the host does not need.
            is_on_host = array.__dlpack_device__()[0] == CPU
            array = np.from_dlpack(array, device=None if is_on_host else "cpu")
        return np.array(array)

    def export(self, array: Array, layout: Layout | None = None) -> Array:
        """Copy a slot for the user, as an array of this library.

        Args:
            array: A slot, or a NumPy array.
            layout: The layout of its parameter; None if it is not known, and then the library
                chooses the device.
        """
        return import_module(self.library).asarray(array, copy=True)


class DaskBackend(Backend):
    """Dask, whose arrays are computed at every step.

    Otherwise each array would be a graph of all steps so far: 40 steps of 120 numbers took 27 s.
    """

    def to_slots(self, arrays: Sequence[Array], layout: Layout) -> list[Array]:
        """Convert, and compute at once."""
        return list(import_module("dask").persist(*super().to_slots(arrays, layout)))


def _facts(array: Array) -> tuple[str, tuple[int, ...], str]:
    """The dtype, the shape and the device of an array."""
    shape = tuple(array.shape)
    if not all(isinstance(n, Integral) for n in shape):
        raise TypeError(f"its shape {brief(shape)} is not known yet")
    device = str(array_api_compat.device(array))
    return str(array.dtype).rpartition(".")[2], tuple(map(int, shape)), device


@cache
def backend_named(library: str) -> Backend:
    """The backend of a library, by the name that a ``Layout`` has."""
    if library in PACKAGES:
        backend: Backend = import_module(PACKAGES[library]).BACKEND
        return backend
    return DaskBackend(library) if library == DASK else Backend(library)


def slot_of(array: np.ndarray, layout: Layout) -> Array:
    """Convert a NumPy array to a slot for a layout. Nobody else may write to the array."""
    (slot,) = backend_named(layout.library).to_slots([array], layout)
    return slot


def zeros(layout: Layout) -> Array:
    """Create a slot of zeros."""
    return slot_of(np.zeros(layout.storage_shape, layout.compute_dtype), layout)


def backend_for(array: Any, label: str) -> Backend:
    """Find the backend of an array.

    Args:
        array: Any object.
        label: What it is, for messages, as in ``parameter 'loc'``.

    Raises:
        TypeError: It is not an array.

    >>> backend_for(np.zeros(2), "parameter 'loc'").library
    'numpy'
    """
    backend = _backend_by_type.get(type(array))
    if backend is None:
        backend = _backend_by_type[type(array)] = _find_backend(array, label)
    return backend


_backend_by_type: dict[type, Backend] = {}


def _find_backend(array: Any, label: str) -> Backend:
    if isinstance(array, np.ndarray):
        return backend_named("numpy")
    if isinstance(array, Number | np.generic | list | tuple | Mapping):
        raise TypeError(f"{label} is {_no_array(array)}")
    what = f"{label} is a {type(array).__name__}"
    library = answer(f"{what} of no library", _library, array)
    if library is None:
        raise TypeError(
            f"{what}; expected an array of NumPy, PyTorch, JAX or another Array API library"
        )
    return backend_named(library)


def _library(array: Any) -> str | None:
    """The library of an array, as ``backend_named`` takes it; None for other objects."""
    if "torch" in sys.modules and array_api_compat.is_torch_array(array):
        return "torch"
    if "jax" in sys.modules and array_api_compat.is_jax_array(array):
        return "jax"
    if not array_api_compat.is_array_api_obj(array):
        return None
    name: str = array_api_compat.array_namespace(array).__name__
    if name in ("numpy", "torch", "jax"):
        raise TypeError(f"it names {name}, but is none of its arrays")
    return name


def _no_array(given: Any) -> str:
    """Describe what was given instead of an array, and the remedy."""
    kind = type(given).__name__
    if isinstance(given, Mapping):
        return (
            f"a {kind} of {len(given)}; expected an array, for names are flat: flatten it, as in "
            "{'layer.w': ..., 'layer.b': ...}"
        )
    if not isinstance(given, list | tuple):
        return f"{brief(given)}, a {kind}; expected an array: use np.asarray"
    if all(isinstance(part, Number) for part in given):
        return f"a {kind} of {len(given)}; expected an array: use np.asarray"
    return (
        f"a {kind} of {len(given)}; expected an array: make it one, or give each part a name of "
        "its own, as in {'layer.0': ..., 'layer.1': ...}"
    )
