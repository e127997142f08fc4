"""Kernels, from the disk or compiled now."""

import inspect
import sys
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import ModuleType

from multiopt.rules.arithmetic import BLOCK, fold
from multiopt_kernels.cpu import look, narrow, norms, rows, toolbox, update
from multiopt_kernels.cpu.object_cache import ObjectCode, cached, linked
from multiopt_kernels.cpu.team import Kernel

__all__ = ["look_kernel", "norm_kernels", "update_kernel"]


@cache
def look_kernel(name: str) -> Kernel | None:
    """How to look at the arrays of a library, ``"look_numpy"`` or ``"look_torch"``; ``"overlap"``.

    None where objects are laid out in other ways than this code reads them. All arrays are then
    looked at in Python, with equal results.
    """
    usual = sys.implementation.name == "cpython" and sys.maxsize == 2**63 - 1
    if not usual or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    return _loaded("look", [], look.compile_look, look)[name]


@cache
def update_kernel(label: str, text: str, dtype: str, storage_dtype: str) -> Kernel:
    """The step of rules.

    Args:
        label: Begins the name of its file, for people.
        text: What ``update_source`` gave.
        dtype: That of the computation.
        storage_dtype: The dtype of parameters and gradients.
    """
    make = partial(update.compile_update, text, dtype, storage_dtype)
    return _loaded(f"{label}-{storage_dtype}", [text, dtype, storage_dtype], make, update)["update"]


@cache
def norm_kernels(dtype: str, storage_dtype: str) -> dict[str, Kernel]:
    """``squares``, ``sums``, ``totals``, ``measure`` and ``finite``.

    Args:
        dtype: That of the computation.
        storage_dtype: The dtype of the gradients.
    """
    text = norms.norms_source()
    make = partial(norms.compile_norms, text, dtype, storage_dtype)
    identity = [text, inspect.getsource(fold), dtype, storage_dtype]
    return _loaded(f"norms-{storage_dtype}", identity, make, norms)


def _loaded(
    label: str, identity: Sequence[str], make: Callable[[], ObjectCode], module: ModuleType
) -> dict[str, Kernel]:
    """Kernels by name, from the disk or compiled now by a function of a module."""
    sources = [inspect.getsource(part).encode() for part in (toolbox, rows, narrow, module)]
    addresses = linked(cached(label, [*sources, str(BLOCK), *identity], make))
    return {name: Kernel(address) for name, address in addresses.items()}
