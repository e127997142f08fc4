"""JAX arrays; new ones come back.

Arrays on the CPU are computed by NumPy through a view of their memory: XLA flushes subnormals there
and may contract a product and a sum. Arrays on other devices run the rule as it stands, and
equality to the last bit is not claimed for them.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np

from multiopt.arrays import Member
from multiopt.backend import Array, Backend
from multiopt.engine import Group
from multiopt.layout import Layout, require_dtype
from multiopt.rules import Rule
from multiopt_kernels import engines

__all__ = ["JaxBackend"]


class JaxBackend(Backend):
    """JAX arrays."""

    def layout(self, array: Array, label: str) -> Layout:
        """Inspect an array; see ``Backend``."""
        if isinstance(array, jax.core.Tracer):
            raise TypeError(
                f"{label} is a JAX tracer, which has no values yet; inside a transformation call "
                "the pure rule.update"
            )
        if array.is_deleted():
            raise TypeError(f"{label} is a deleted JAX array (donated?); expected a live one")
        dtype = _dtype_name(array.dtype)
        require_dtype(dtype, label)
        if dtype in ("float64", "complex128") and jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise TypeError(
                f"{label} has dtype {dtype}, of which JAX makes no arrays now: set jax_enable_x64"
            )
        return Layout.of("jax", array.shape, dtype, _device(array.sharding))

    def as_real(self, array: Array, layout: Layout) -> Array:
        """The array, or a new one."""
        if not layout.is_complex:
            return array
        return jax.numpy.stack([array.real, array.imag], axis=-1)

    def as_complex(self, parts: Array) -> Array:
        """A new array."""
        return jax.lax.complex(parts[..., 0], parts[..., 1])

    def namespace(self, layout: Layout) -> Any:
        """NumPy for the CPU, ``jax.numpy`` for other devices."""
        return np if _on_cpu(layout) else jax.numpy

    def to_compute(self, array: Array, layout: Layout) -> Array:
        """A NumPy view of a CPU array; float32 if it has 16 bits."""
        return self.namespace(layout).asarray(array).astype(layout.compute_dtype, copy=False)

    def to_slots(self, arrays: Sequence[Array], layout: Layout) -> list[Array]:
        """The arrays, or copies on the device of the layout.

        Slots of CPU arrays are NumPy arrays, for JAX takes 20 us to make one of its own.
        """
        return [array if _on_cpu(layout) else _put(array, layout) for array in arrays]

    def to_params(self, members: Sequence[Member], arrays: Sequence[Array]) -> list[Array]:
        """New arrays where the parameters are, put there all at once."""
        made: dict[int, Array] = {}
        places: dict[tuple[bool, Any], list[int]] = {}
        for i, member in enumerate(members):
            places.setdefault((member.param.committed, member.param.sharding), []).append(i)
        for (committed, sharding), indices in places.items():
            some = [arrays[i].astype(members[i].param.dtype, copy=False) for i in indices]
            # An uncommitted array stays on its device, whatever the default is.
            with jax.default_device(next(iter(sharding.device_set))):
                put = jax.device_put(some, sharding if committed else None)
            made.update(zip(indices, put, strict=True))
            _check_values(put[0], f"parameter {members[indices[0]].name!r}")
        return [made[i] for i in range(len(members))]

    def memory(self, array: Array) -> np.ndarray | None:
        """A view, which must not be written."""
        return np.asarray(array) if array.dtype.name in ("float32", "float64") else None

    def group(self, rule: Rule, layout: Layout, has_masters: bool = False) -> Group:
        """Make a group that lends copies of all arrays, since none can be written."""
        if not _on_cpu(layout):
            return super().group(rule, layout, has_masters)
        return engines.group(self, layout, rule, has_masters)

    # Slots outside a step

    def to_host(self, array: Array) -> np.ndarray:
        """A copy in NumPy."""
        _check_values(array, "an array")
        return np.array(array)

    def export(self, array: Array, layout: Layout | None = None) -> Array:
        """A JAX array, on the first of the parameter's devices.

        A NumPy array where JAX makes none of its dtype now.
        """
        if layout is not None:
            return _put(np.array(array), layout)
        is_known = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
        return (jax.numpy if is_known else np).array(array)


def _check_values(array: Array, label: str) -> None:
    """Refuse what was made while JAX traces, and has no values.

    Raises:
        TypeError: It is a tracer.
    """
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{label}: a step was taken inside a JAX transformation, where new arrays are tracers "
            "without values; call the pure rule.update there"
        )


def _put(array: np.ndarray, layout: Layout) -> Array:
    platform, _, index = layout.device.partition(",")[0].partition(":")
    device = next(d for d in jax.devices(platform) if d.id == int(index))
    with jax.default_device(device):
        return jax.device_put(array)


@cache
def _dtype_name(dtype: np.dtype) -> str:
    return dtype.name


@cache
def _device(sharding: Any) -> str:
    return ",".join(sorted(f"{device.platform}:{device.id}" for device in sharding.device_set))


def _on_cpu(layout: Layout) -> bool:
    return layout.device.startswith("cpu")
