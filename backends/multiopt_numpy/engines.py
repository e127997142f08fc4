"""Which engine updates parameters on the CPU: compiled kernels, or else blocks in NumPy."""

import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from multiopt.backend import Batch, Layout, Member
from multiopt.rules import Rule
from multiopt_numpy.blocks import BlockedBatch
from multiopt_numpy.compiled.batch import CompiledBatch, Look
from multiopt_numpy.compiled.kernels import update_kernel
from multiopt_numpy.compiled.team import Kernel
from multiopt_numpy.compiled.update import update_source
from multiopt_numpy.forms import coefficient_kinds, number_fields, other_fields, traced_scalars
from multiopt_numpy.tape import Tapes, tapes
from multiopt_numpy.trace import NotTraceable

__all__ = ["batch", "kind"]

#: The environment variable that asks for an engine: "compiled" (the default), "blocks" or "plain".
VARIABLE = "MULTIOPT_ENGINE"


class _Compiled(NamedTuple):
    """The kernel of a rule, and whether it gets its coefficients from the host."""

    kernel: Kernel
    given: bool


class _Blocks(NamedTuple):
    """The tapes of a rule, and whether its coefficients can be computed for arrays of steps."""

    tapes: Tapes
    vectorized: bool


#: What runs rules of a kind.
_engines: dict[Hashable, _Compiled | _Blocks] = {}

#: The kinds of multiopt's own rules, by what decides them.
_kinds: dict[Hashable, Hashable | None] = {}


def kind(rule: Rule, layout: Layout) -> Hashable | None:
    """What rules must have in common to share a batch; None if only the rule itself can run.

    The formula of somebody's rule may have been edited since the last time, or a function or a
    constant that it uses: it is traced anew. Those of multiopt are traced once.
    """
    if not rule.elementwise:
        return None
    wanted = os.environ.get(VARIABLE, "compiled")
    if wanted not in ("compiled", "blocks", "plain"):
        raise ValueError(f"{VARIABLE} is {wanted!r}; expected compiled, blocks or plain")
    choices = tuple(other_fields(rule).items())
    key = wanted, type(rule), rule.slots, tuple(number_fields(rule)), choices, layout.dtype
    try:
        hash(key)
    except TypeError:
        return None  # a choice that cannot be looked up, such as a list
    if not type(rule).__module__.startswith("multiopt."):
        return _kind(key, rule, layout.compute_dtype)
    mine = *key, rule.update
    if mine not in _kinds:
        _kinds[mine] = _kind(key, rule, layout.compute_dtype)
    return _kinds[mine]


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
    return BlockedBatch(*engine, members, numpy_arrays and directly)


def _kind(key: tuple[Hashable, ...], rule: Rule, dtype: str) -> Hashable | None:
    """A kind with its engine, made now or known.

    Args:
        key: What rules have in common, beside what they compute.
        rule: One of them.
        dtype: That of the computation.
    """
    if key[0] == "plain":
        return None
    scalars, slots = traced_scalars(rule), len(rule.slots)
    try:
        kinds = coefficient_kinds(rule, scalars)
        text = update_source(rule.update, slots, kinds, scalars)
        found = *key, text
        if found not in _engines:
            name = f"{type(rule).__name__}-{dtype}"
            compiled = (
                _compiled(name, text, dtype, scalars is None) if key[0] == "compiled" else None
            )
            _engines[found] = compiled or _Blocks(
                tapes(rule.update, slots, kinds, dtype), scalars is not None
            )
    except NotTraceable:
        return None  # as it may be: the rule then runs as it stands
    return found


def _compiled(name: str, text: str, dtype: str, given: bool) -> _Compiled | None:
    """The kernel of a text; None if there is no compiler."""
    if not (find_spec("numba") and find_spec("llvmlite")):
        return None
    try:
        return _Compiled(update_kernel(name, text, dtype), given)
    except ImportError as error:
        warnings.warn(
            f"Numba is installed but cannot be imported ({error}); steps are slower without it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
