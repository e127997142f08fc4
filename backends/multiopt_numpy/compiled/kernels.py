"""Kernels, from the disk or compiled now."""

import inspect
import sys
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import ModuleType

from multiopt.rules import Rule
from multiopt_numpy.compiled import look, norms, rows, toolbox, update
from multiopt_numpy.compiled.identity import norms_identity, update_identity
from multiopt_numpy.compiled.object_cache import ObjectCode, cached, linked
from multiopt_numpy.compiled.team import Kernel
from multiopt_numpy.forms import NotCompilable

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


def update_kernel(rule: Rule, dtype: str, given: bool) -> Kernel:
    """The step of rules that have the class, the formula and the switches of this one.

    Args:
        rule: The rule.
        dtype: That of the computation.
        given: Whether the kernel gets coefficients and computes none.

    Raises:
        NotCompilable: There is none.
    """
    label = f"{type(rule).__name__}-{dtype}"
    try:
        identity = [str(given), *update_identity(rule, dtype)]
    except Exception as error:
        raise NotCompilable(f"{label}: its code cannot be told apart: {error}") from error
    make = partial(update.compile_update, rule, dtype, given)
    return _loaded(label, identity, make, update)["update"]


@cache
def norm_kernels(dtype: str) -> dict[str, Kernel]:
    """``squares``, ``totals``, ``measure`` and ``finite`` for a dtype."""
    return _loaded(
        f"norms-{dtype}", norms_identity(dtype), lambda: norms.compile_norms(dtype), norms
    )


def _loaded(
    label: str, identity: Sequence[str], make: Callable[[], ObjectCode], module: ModuleType
) -> dict[str, Kernel]:
    """Kernels by name, from the disk or compiled now by a function of a module."""
    sources = [inspect.getsource(part).encode() for part in (toolbox, rows, module)]
    addresses = linked(cached(label, [*sources, *identity], make))
    return {name: Kernel(address) for name, address in addresses.items()}
