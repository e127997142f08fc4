"""Which engine updates parameters on the CPU: compiled kernels, or else blocks in NumPy."""

import os
import warnings
from collections.abc import Callable, Hashable
from contextlib import suppress
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from multiopt.engine import Group, kind_of
from multiopt.reference import ReferenceGroup
from multiopt.rules import Rule
from multiopt_numpy.blocks import BlockedGroup
from multiopt_numpy.compiled.group import CompiledGroup, Look
from multiopt_numpy.compiled.kernels import update_kernel
from multiopt_numpy.compiled.team import Kernel
from multiopt_numpy.forms import NotCompilable, are_uniform, sample_scalars
from multiopt_numpy.tape import NotTraceable, Tape

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout

__all__ = ["group", "wanted"]

#: The environment variable that asks for an engine: "compiled" (the default), "blocks" or "plain".
VARIABLE = "MULTIOPT_ENGINE"


class _Compiled(NamedTuple):
    """The kernel of a rule, and whether it gets its coefficients from the host."""

    kernel: Kernel
    given: bool


#: By kind of rule and dtype: its compiled kernel, the word that blocks can run it, or None.
_engines: dict[Hashable, _Compiled | str | None] = {}


def wanted() -> str:
    """The engine that is asked for."""
    return os.environ.get(VARIABLE, "compiled")


def group(
    backend: "Backend",
    layout: "Layout",
    rule: Rule,
    has_masters: bool,
    look: Callable[[], Look | None],
    *,
    numpy_arrays: bool = False,
) -> Group:
    """A group for parameters of this kind of rule and of this layout, whatever their shapes.

    Args:
        backend: That of their library.
        layout: The layout.
        rule: The rule.
        has_masters: Whether they have master copies.
        look: How compiled code looks at the arrays of their library, if it can.
        numpy_arrays: Whether their library is NumPy, which blocks need not be lent.
    """
    engine = _engine_of(rule, layout.compute_dtype)
    # 16-bit arrays are computed in float32: copies of them are lent.
    directly = layout.dtype == layout.compute_dtype
    if isinstance(engine, _Compiled):
        found = look() if directly else None
        return CompiledGroup(backend, layout, rule, has_masters, *engine, found)
    if engine == "blocks":
        return BlockedGroup(backend, layout, rule, has_masters, numpy_arrays and directly)
    return ReferenceGroup(backend, layout, rule, has_masters)


def _engine_of(rule: Rule, dtype: str) -> _Compiled | str | None:
    kind = kind_of(rule)
    if not rule.elementwise or kind is None:
        return None
    key = wanted(), kind, dtype
    if key not in _engines:
        _engines[key] = _engine(wanted(), rule, dtype)
    return _engines[key]


def _engine(wanted: str, rule: Rule, dtype: str) -> _Compiled | str | None:
    if wanted not in ("compiled", "blocks", "plain"):
        raise ValueError(f"{VARIABLE} is {wanted!r}; expected compiled, blocks or plain")
    if wanted == "plain":
        return None
    sample = sample_scalars(rule, dtype)
    switches = [isinstance(x, bool) for x in sample]
    try:
        # With every switch on and off, for it may change from step to step.
        for values in product(
            *([False, True] if switch else [x] for switch, x in zip(switches, sample, strict=True))
        ):
            Tape(rule.update, sample._make(values), len(rule.slots), dtype)
    except NotTraceable:
        return None  # as it may be: the rule then runs as it stands
    if wanted == "compiled" and find_spec("numba") and find_spec("llvmlite"):
        try:
            return _compiled(rule, dtype)
        except NotCompilable:
            pass  # as it may be: the rule then runs in blocks
        except ImportError as error:
            warnings.warn(
                f"Numba is installed but cannot be imported ({error}); steps are slower without it",
                RuntimeWarning,
                stacklevel=2,
            )
    return "blocks"


def _compiled(rule: Rule, dtype: str) -> _Compiled:
    """The kernel of a rule.

    Raises:
        NotCompilable: There is none.
    """
    if are_uniform(rule):
        with suppress(NotCompilable):
            return _Compiled(update_kernel(rule, dtype, given=False), given=False)
    return _Compiled(update_kernel(rule, dtype, given=True), given=True)
