"""JAX arrays; new ones come back.

Arrays on the CPU are computed by NumPy through a view of their memory: XLA flushes subnormals there
and may contract a product and a sum. Arrays on other devices run the rule as it stands, and
equality to the last bit is not claimed for them.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from multiopt.backend import Array, Backend, Batch, Layout, Member, Task, require_dtype
from multiopt.rules import Rule
from multiopt_numpy import engines

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
        dtype = str(array.dtype)
        require_dtype(dtype, label)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise TypeError(
                f"{label} has dtype float64, of which JAX makes no arrays now: set jax_enable_x64"
            )
        devices = sorted(f"{device.platform}:{device.id}" for device in array.devices())
        return Layout("jax", array.shape, dtype, ",".join(devices))

    def namespace(self, layout: Layout) -> Any:
        """NumPy for the CPU, ``jax.numpy`` for other devices."""
        return np if _on_cpu(layout) else jax.numpy

    def opened(self, array: Array, layout: Layout) -> Array:
        """A NumPy view of a CPU array; float32 if it has 16 bits."""
        return self.namespace(layout).asarray(array).astype(layout.compute_dtype, copy=False)

    def closed(self, computed: Array, param: Array) -> Array:
        """The computed array as a JAX array where the parameter is."""
        with _beside(param):
            return jax.device_put(computed, param.sharding if param.committed else None)

    def ready(self, task: Task, computed: Array) -> Array:
        """A new array of the parameter's dtype, where the parameter is."""
        return self.closed(computed.astype(task.param.dtype), task.param)

    def check_writable(self, param: Array, label: str) -> None:
        """Refuse a step while JAX traces, when new arrays are tracers without values."""
        if isinstance(jax.device_put(np.zeros(())), jax.core.Tracer):
            raise TypeError(
                f"{label}: a step was taken inside a JAX transformation, where new arrays are "
                "tracers without values; call the pure rule.update there"
            )

    def kind(self, rule: Rule, layout: Layout) -> Hashable | None:
        """See ``Backend``."""
        return engines.kind(rule, layout) if _on_cpu(layout) else None

    def batch(self, kind: Hashable, members: Sequence[Member]) -> Batch:
        """See ``Backend``; all arrays are lent, for none can be written."""
        return engines.batch(kind, members, lambda: None)

    def to_host(self, array: Array) -> np.ndarray:
        """A copy in NumPy."""
        return np.array(array)

    def from_host(self, array: np.ndarray, layout: Layout) -> Array:
        """A copy on the device of the layout."""
        platform, _, index = layout.device.partition(",")[0].partition(":")
        device = next(d for d in jax.devices(platform) if d.id == int(index))
        with jax.default_device(device):
            return jax.device_put(np.array(array))

    def copied(self, array: Array) -> Array:
        """A copy, so that neither goes when the other is donated."""
        with _beside(array):
            return array.copy()


def _beside(array: Array) -> Any:
    """Keep what is made of an uncommitted array on its device, whatever the default is."""
    return jax.default_device(next(iter(array.devices())))


def _on_cpu(layout: Layout) -> bool:
    return layout.device.startswith("cpu")
