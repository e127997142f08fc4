"""Which engine updates parameters on the CPU: compiled kernels, NumPy blocks, or the rule itself.

A rule gets the fastest engine that can run it. Compiled kernels need Numba and a trace of the
update, blocks need only a trace, and the reference engine runs all other rules. The results are
equal to the last bit, so users need not choose; ``MULTIOPT_ENGINE`` can turn engines off.

Here no kernels are compiled, as if Numba were missing. Muon multiplies matrices, so only the
reference engine can run it:

>>> from unittest.mock import patch
>>> from multiopt.backend import backend_named
>>> from multiopt.layout import Layout
>>> from multiopt.rules import SGD, Muon
>>> numpy, layout = backend_named("numpy"), Layout("numpy", (), "float32", "cpu")
>>> with patch.dict(os.environ, {VARIABLE: "blocks"}):
...     for rule in (SGD(), Muon()):
...         print(type(group(numpy, layout, rule, has_masters=False)).__name__)
BlockedGroup
ReferenceGroup
"""

import os
import warnings
from collections.abc import Callable, Hashable
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from multiopt.engine import Group
from multiopt.kinds import formulas, kind_of
from multiopt.reference import ReferenceGroup
from multiopt.rules import Rule
from multiopt_kernels.blocks.group import BlockedGroup
from multiopt_kernels.blocks.tape import Tapes, tapes
from multiopt_kernels.cpu.group import CompiledGroup
from multiopt_kernels.cpu.kernels import update_kernel, whole_kernel
from multiopt_kernels.cpu.look import Look
from multiopt_kernels.cpu.team import Kernel
from multiopt_kernels.cpu.update import update_source
from multiopt_kernels.cpu.whole import Whole, whole_source
from multiopt_kernels.cpu.whole_group import WholeGroup
from multiopt_kernels.extents import forms_of
from multiopt_kernels.forms import coefficient_kinds, traced_scalars
from multiopt_kernels.operations import NotTraceable

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout

__all__ = ["group"]

#: The environment variable that chooses an engine: "compiled" (the default), "blocks" or "plain".
VARIABLE = "MULTIOPT_ENGINE"


class _Compiled(NamedTuple):
    """The kernel of a rule, whether the host computes its coefficients, and its passes if any."""

    kernel: Kernel
    host_coefficients: bool
    whole: Whole | None = None


class _Blocks(NamedTuple):
    """The tapes of a rule, and whether its coefficients can be computed for arrays of steps."""

    tapes: Tapes
    vectorized: bool


#: The engines that were made, by kind of rule and dtypes; None where only the reference engine can
#: run a rule.
_engines: dict[Hashable, _Compiled | _Blocks | None] = {}


def group(
    backend: "Backend",
    layout: "Layout",
    rule: Rule,
    has_masters: bool,
    look: Callable[[], Look | None] | None = None,
    *,
    numpy_arrays: bool = False,
) -> Group:
    """Create a group for parameters of this layout, of any shape, and of this kind of rule.

    Args:
        backend: The backend of their library.
        layout: Their layout; its shape does not matter.
        rule: A rule of their kind.
        has_masters: Whether they have master copies.
        look: Returns how compiled code looks at the arrays of their library, or None if it cannot
            in this process. None if it never can.
        numpy_arrays: Whether their library is NumPy, whose arrays blocks can use as they are.
    """
    dtype = layout.compute_dtype
    engine = _engine_of(rule, dtype, dtype if look is None else layout.storage_dtype, has_masters)
    if isinstance(engine, _Compiled):
        found, storage_dtype = None if look is None else look(), layout.storage_dtype
        if found is None or found.facts(storage_dtype) is None:
            # All arrays are lent as copies, and those of 16-bit parameters in the compute dtype.
            found, storage_dtype = None, dtype
            engine = _engine_of(rule, dtype, storage_dtype, has_masters)
        assert isinstance(engine, _Compiled)
        kernel, on_host, whole = engine
        arguments = backend, layout, rule, has_masters, kernel, on_host, storage_dtype, found
        return CompiledGroup(*arguments) if whole is None else WholeGroup(*arguments, whole=whole)
    if isinstance(engine, _Blocks):
        itself = numpy_arrays and layout.storage_dtype == dtype
        return BlockedGroup(backend, layout, rule, has_masters, *engine, itself)
    return ReferenceGroup(backend, layout, rule, has_masters)


def _engine_of(
    rule: Rule, dtype: str, storage_dtype: str, has_masters: bool
) -> _Compiled | _Blocks | None:
    """Return the engine of rules of this kind; None if only the reference engine can run them.

    Args:
        rule: The rule.
        dtype: The compute dtype.
        storage_dtype: The dtype of parameters and gradients.
        has_masters: Whether 16-bit parameters have master copies.

    Raises:
        ValueError: ``MULTIOPT_ENGINE`` is not the name of an engine.
    """
    kind, asked = kind_of(rule), os.environ.get(VARIABLE, "compiled")
    if asked not in ("compiled", "blocks", "plain"):
        raise ValueError(f"{VARIABLE} is {asked!r}; expected compiled, blocks or plain")
    if (
        kind is None
        or asked == "plain"
        or not (rule.elementwise or _is_compiled_whole(rule, asked))
    ):
        return None
    narrow = storage_dtype != dtype
    key: tuple[Hashable, ...] = asked, kind, dtype, storage_dtype, narrow and has_masters
    if key not in _engines or not _is_ours(rule):
        # A user's formula, or something that it uses, may have been edited since the last time.
        try:
            _engines[key] = _engine(asked, rule, dtype, storage_dtype, narrow and has_masters)
        except NotTraceable:
            _engines[key] = None  # not an error: the reference engine runs the rule
    return _engines[key]


def _engine(
    asked: str, rule: Rule, dtype: str, storage_dtype: str, masters: bool
) -> _Compiled | _Blocks | None:
    """Make the engine of a rule from its current source; the arguments are as in ``_engine_of``.

    Raises:
        NotTraceable: The update has no trace.
    """
    scalars, slots = traced_scalars(rule), len(rule.slots)
    kinds = coefficient_kinds(rule, scalars)
    arguments = kinds, scalars, storage_dtype != dtype, masters
    name = "-".join(type(part).__name__ for part in formulas(rule))
    dtypes, on_host = (dtype, storage_dtype), scalars is None
    if not rule.elementwise:
        whole = whole_source(rule.update, slots, forms_of(rule, dtype), *arguments)
        return _compiled(
            lambda: _Compiled(whole_kernel(name, whole.text, whole.sums, *dtypes), on_host, whole)
        )
    text = update_source(rule.update, slots, *arguments)
    compiled = None
    if asked == "compiled":
        compiled = _compiled(lambda: _Compiled(update_kernel(name, text, *dtypes), on_host))
    return compiled or _Blocks(tapes(rule.update, slots, kinds, dtype), scalars is not None)


def _is_compiled_whole(rule: Rule, asked: str) -> bool:
    """Whether a rule that treats a parameter as a whole may run in a kernel.

    A user's own rule of this sort runs as it stands: it is promised arrays in row-major order.
    """
    return asked == "compiled" and _is_ours(rule)


def _is_ours(rule: Rule) -> bool:
    """Whether all formulas of a rule are those of this package."""
    return all(type(part).__module__.startswith("multiopt.") for part in formulas(rule))


def _compiled(make: Callable[[], _Compiled]) -> _Compiled | None:
    """Compile a kernel; None if Numba is missing, or is there but cannot be imported.

    The latter gives a warning, because steps are slower without a compiler.
    """
    if not (find_spec("numba") and find_spec("llvmlite")):
        return None
    try:
        return make()
    except ImportError as error:
        warnings.warn(
            f"Numba is installed but cannot be imported ({error}); steps are slower without it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
