"""Which engine updates parameters on the CPU: compiled kernels, or else blocks in NumPy."""

import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple

from multiopt.backend import Batch, Layout, Member
from multiopt.rules import Rule
from multiopt_numpy.blocks import BlockedBatch
from multiopt_numpy.compiled.batch import CompiledBatch, Look
from multiopt_numpy.compiled.kernels import update_kernel
from multiopt_numpy.compiled.team import Kernel
from multiopt_numpy.forms import (
    NotCompilable,
    are_uniform,
    number_fields,
    other_fields,
    sample_scalars,
)
from multiopt_numpy.tape import NotTraceable, Tape

__all__ = ["batch", "kind"]

#: The environment variable that asks for an engine: "compiled" (the default), "blocks" or "plain".
VARIABLE = "MULTIOPT_ENGINE"


class _Compiled(NamedTuple):
    """The kernel of a rule, and whether it gets its coefficients from the host."""

    kernel: Kernel
    given: bool


#: By kind of rule and dtype: its compiled kernel, the word that blocks can run it, or None.
_engines: dict[Hashable, _Compiled | str | None] = {}


def kind(rule: Rule, layout: Layout) -> Hashable | None:
    """What rules must have in common to share a batch; None if only the rule itself can run."""
    if not rule.elementwise:
        return None
    wanted = os.environ.get(VARIABLE, "compiled")
    choices = tuple(other_fields(rule).items())
    form = rule.update, rule.slots, tuple(number_fields(rule)), choices
    key = wanted, type(rule), *form, layout.dtype
    try:
        known = key in _engines
    except TypeError:
        return None  # a choice that cannot be looked up, such as a list
    if not known:
        _engines[key] = _engine(wanted, rule, layout.compute_dtype)
    return None if _engines[key] is None else key


def batch(
    kind: Hashable,
    members: Sequence[Member],
    look: Callable[[], Look | None],
    *,
    numpy_arrays: bool = False,
) -> Batch:
    """A batch of parameters of one kind.

    Args:
        kind: What ``kind`` gave for them.
        members: The parameters.
        look: How compiled code looks at the arrays of their library, if it can.
        numpy_arrays: Whether their library is NumPy, which blocks need not be lent.
    """
    engine = _engines[kind]
    layout = members[0].layout
    # 16-bit arrays are computed in float32: copies of them are lent.
    directly = layout.dtype == layout.compute_dtype
    if isinstance(engine, _Compiled):
        return CompiledBatch(*engine, look() if directly else None, members)
    return BlockedBatch(members, numpy_arrays and directly)


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
