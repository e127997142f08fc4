"""Where kernels come from: the cache on disk, or the compiler.

Each kernel is loaded once per process. Its key in the cache covers everything it is made from: the
text printed from traces, the dtypes, and the source of the modules that build kernels. So an edited
rule, or an edited module, never runs an old kernel.
"""

import inspect
import sys
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType

from multiopt.rules.sums import LIMB, RANGES
from multiopt_kernels.cpu import (
    boxes,
    look,
    matrices,
    narrow,
    norms,
    numbers,
    rows,
    shares,
    sums,
    toolbox,
    update,
    walk,
    whole,
)
from multiopt_kernels.cpu.object_cache import ObjectCode, cached, linked
from multiopt_kernels.cpu.team import Kernel

__all__ = ["look_kernel", "norm_kernels", "update_kernel", "walk_kernel", "whole_kernel"]


def look_kernel(name: str) -> Kernel | None:
    """Return a kernel of ``look``: ``"look_numpy"``, ``"look_torch"`` or ``"overlap"``.

    None if this Python lays out its objects in another way than the kernels expect. Python then
    examines all arrays, with equal results.
    """
    return _look_kernels().get(name)


@cache
def _look_kernels() -> dict[str, Kernel]:
    usual = sys.implementation.name == "cpython" and sys.maxsize == 2**63 - 1
    if not usual or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return {}
    return _loaded("look", [], look.compile_look, look)


@cache
def update_kernel(label: str, text: str, dtype: str, storage_dtype: str) -> Kernel:
    """Return the kernel that updates parameters by rules of one kind.

    Args:
        label: The beginning of the name of its file, for people.
        text: The text from ``update_source``.
        dtype: The compute dtype.
        storage_dtype: The dtype of parameters and gradients.
    """
    make = partial(update.compile_update, text, dtype, storage_dtype)
    return _loaded(f"{label}-{storage_dtype}", [text, dtype, storage_dtype], make, update)["update"]


@cache
def whole_kernel(label: str, text: str, count: int, dtype: str, storage_dtype: str) -> Kernel:
    """Return the kernel that updates parameters by rules that treat each as a whole.

    Args:
        label: The beginning of the name of its file, for people.
        text: The text from ``whole_source``.
        count: The number of sums in it.
        dtype: The compute dtype.
        storage_dtype: The dtype of parameters and gradients.
    """
    make = partial(whole.compile_whole, text, count, dtype, storage_dtype)
    identity = [*_made_of_passes(), text, str(count), dtype, storage_dtype]
    return _loaded(f"{label}-{storage_dtype}", identity, make, whole)["update"]


@cache
def norm_kernels(dtype: str, storage_dtype: str) -> dict[str, Kernel]:
    """Return the kernels ``squares``, ``norms``, ``measure`` and ``finite``, by name.

    Args:
        dtype: The compute dtype.
        storage_dtype: The dtype of the gradients.
    """
    text = norms.norms_source()
    make = partial(norms.compile_norms, text, dtype, storage_dtype)
    identity = [*_made_of_sums(), text, dtype, storage_dtype]
    return _loaded(f"norms-{storage_dtype}", identity, make, norms)


@cache
def walk_kernel(itemsize: int, slot_itemsize: int) -> Kernel:
    """Return the kernel that walks through arrays and runs another kernel.

    Args:
        itemsize: The size of an element of a parameter or gradient.
        slot_itemsize: The size of an element of a slot.
    """
    sizes = itemsize, slot_itemsize
    identity = [inspect.getsource(boxes), *map(str, sizes)]
    return _loaded("walk", identity, partial(walk.compile_walk, *sizes), walk)["walk"]


def _made_of_sums() -> list[str]:
    """What kernels with exact sums are made of besides."""
    return [inspect.getsource(sums), str((LIMB, RANGES))]


def _made_of_passes() -> list[str]:
    """What kernels with passes are made of besides."""
    return [*_made_of_sums(), *map(inspect.getsource, (matrices, numbers, update))]


def _loaded(
    label: str, identity: Sequence[str], make: Callable[[], ObjectCode], module: ModuleType
) -> dict[str, Kernel]:
    """Load kernels from the disk, or compile them with ``make``, which is defined in ``module``."""
    sources = [inspect.getsource(part).encode() for part in (toolbox, rows, narrow, shares, module)]
    # Read without an import, which would be one of Numba too.
    sources.append(Path(__file__).with_name("target.py").read_bytes())
    addresses = linked(cached(label, [*sources, *identity], make))
    return {name: Kernel(address) for name, address in addresses.items()}
