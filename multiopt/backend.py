"""How an array finds its backend, and what a backend does for the registry.

A backend knows one array library: how to inspect an array, where to compute with it, how to write
the result back. The base class serves any Array API library with the rule as it stands; the
packages under ``backends/`` refine it for one library each.
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

#: The libraries with a package of their own. A library that nothing has imported is never asked.
PACKAGES: Mapping[str, str] = {
    "numpy": "multiopt_numpy",
    "torch": "multiopt_torch",
    "jax": "multiopt_jax",
}

#: What DLPack calls the host.
CPU = 1

#: The namespace in which array-api-compat has Dask.
DASK = "array_api_compat.dask.array"


class Backend:
    """The rule as it stands on any Array API library; new arrays come back.

    Args:
        library: The name by which ``backend_named`` finds it: the module name of the namespace.
    """

    #: Whether ``write`` changes the parameter. If not, a new array takes its place, and a batch is
    #: lent copies of everything.
    in_place: ClassVar[bool] = False

    def __init__(self, library: str) -> None:
        """Serve the namespace of this name."""
        self.library = library
        #: The dtypes, devices and kinds of which it is known that they can do what is needed.
        self._tried: set[tuple[str, str, bool]] = set()

    # What an array is

    def layout(self, array: Array, label: str) -> Layout:
        """Inspect an array.

        Args:
            array: An array of this library.
            label: What the array is, for messages, as in ``parameter 'loc'``.

        Raises:
            TypeError: It is an array that no rule can work with.
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
        """Take a step of two numbers on their way to the library and back."""
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
        """An array of real numbers over the same memory, without what a user's class makes of it.

        A complex array becomes its real and imaginary parts along one more axis. Where arrays can
        be written, that is a view.
        """
        if not layout.is_complex:
            return array
        xp = import_module(self.library)
        return xp.stack([xp.real(array), xp.imag(array)], axis=-1)

    def as_complex(self, parts: Array) -> Array:
        """The complex array of its parts."""
        host = np.ascontiguousarray(self.to_host(parts))
        complex_ = next(name for name, part in PARTS_OF.items() if part == host.dtype.name)
        xp, device = import_module(self.library), array_api_compat.device(parts)
        return xp.asarray(host.view(complex_)[..., 0], device=device)

    def check_writable(self, param: Array, label: str) -> None:
        """Refuse a parameter that cannot be updated.

        Raises:
            ValueError: The array cannot be written, or has fewer places than elements.
        """

    def memory(self, array: Array) -> np.ndarray | None:
        """A NumPy array over the memory of an array, by which the engines of the CPU work on it.

        Read-only if it must not be written; of another dtype, such as ``V4``, if its addresses are
        known and nothing else; None if not even these are.
        """
        return None

    def gradients(
        self, params: np.ndarray, names: Sequence[str], new: Sequence[int], needed: bool
    ) -> np.ndarray:
        """The gradients that arrays carry themselves, as torch's do; None for those without one.

        Args:
            params: The arrays, the first of which is of this library.
            names: The names of the parameters.
            new: The places of those that are seen for the first time.
            needed: Whether one is to have a gradient, or to get one in a backward.

        Raises:
            TypeError: An array carries none; or none has one, nor will have one.
            ValueError: A library keeps none for an array.
        """
        raise TypeError(
            f"parameter {names[0]!r} is a {self.library} array, which carries no gradient; "
            "pass the gradients as the second argument: step(params, grads)"
        )

    # A step

    def namespace(self, layout: Layout) -> Any:
        """The Array API namespace that computes for a layout."""
        return import_module(self.library)

    def to_compute(self, array: Array, layout: Layout) -> Array:
        """An array ready for the computation: in its namespace, in the compute dtype."""
        xp = self.namespace(layout)
        return xp.astype(array, getattr(xp, layout.compute_dtype), copy=False)

    def to_slots(self, arrays: Sequence[Array], layout: Layout) -> list[Array]:
        """Arrays as slots are kept, and as ``write`` takes them.

        Args:
            arrays: Some of NumPy, or of the namespace, which nobody else writes any more.
            layout: The layout of their parameters, whatever the shape.
        """
        xp = self.namespace(layout)
        if xp is np or not any(isinstance(array, np.ndarray) for array in arrays):
            return list(arrays)
        devices = xp.__array_namespace_info__().devices()
        device = next((d for d in devices if str(d) == layout.device), None)
        return [xp.asarray(array, device=device) for array in arrays]

    def to_params(self, members: Sequence[Member], arrays: Sequence[Array]) -> list[Array]:
        """Computed arrays in the dtypes of their parameters.

        They take the places of those where these are not written.
        """
        xps = [self.namespace(member.layout) for member in members]
        return [
            xp.astype(array, member.param.dtype, copy=False)
            for xp, member, array in zip(xps, members, arrays, strict=True)
        ]

    def write(self, param: Array, values: Array) -> None:
        """Turn a parameter into computed values, where that is done in place. It does not fail."""
        raise NotImplementedError

    def duplicate(self, param: Array) -> Array:
        """A copy of a parameter that a step may write; itself where no step writes arrays.

        Whatever is wrong with the parameter is wrong with the copy: it is looked at afterwards.
        """
        return param

    def group(self, rule: Rule, layout: Layout, has_masters: bool = False) -> Group:
        """A group for parameters of this kind of rule and of this layout, whatever their shapes."""
        return ReferenceGroup(self, layout, rule, has_masters)

    def touch(self, arrays: np.ndarray) -> None:
        """Let a library know that the memory of its arrays is about to be written."""

    # Slots outside a step

    def to_host(self, array: Array) -> np.ndarray:
        """An array as one of NumPy, a copy."""
        if hasattr(array, "__dlpack__"):
            # Older libraries cannot be asked to bring it, and need not where it is there.
            is_there = array.__dlpack_device__()[0] == CPU
            array = np.from_dlpack(array, device=None if is_there else "cpu")
        return np.array(array)

    def export(self, array: Array, layout: Layout | None = None) -> Array:
        """A copy for the user, as an array of this library.

        Args:
            array: A slot, or any array of NumPy.
            layout: That of the parameter; None if it is not known. Then the array goes where the
                library puts new ones.
        """
        return import_module(self.library).asarray(array, copy=True)


class DaskBackend(Backend):
    """Dask arrays, computed at every step.

    Left as they come, they would be plans of all steps so far: 40 steps of 120 numbers took 27 s.
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
    """A NumPy array, which nobody else writes any more, as a slot for a layout."""
    (slot,) = backend_named(layout.library).to_slots([array], layout)
    return slot


def zeros(layout: Layout) -> Array:
    """A new slot."""
    return slot_of(np.zeros(layout.storage_shape, layout.compute_dtype), layout)


def backend_for(array: Any, label: str) -> Backend:
    """The backend of an array.

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
    """The name by which ``backend_named`` finds the backend of an array; None if it is none."""
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
    """What was given instead of an array, and what to do."""
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
