"""What comes into a step: names, arrays and gradients, checked before any use."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn

import numpy as np

from multiopt.arrays import Array, Member
from multiopt.backend import backend_for
from multiopt.errors import brief
from multiopt.layout import Layout

__all__ = [
    "as_dict",
    "check_layout",
    "check_name",
    "check_no_shared_memory",
    "checked_gradient",
    "gradients_of",
    "refuse_shared",
]

#: How many names take longer to compare than to be counted.
MANY = 64


def gradients_of(params: Mapping[str, Array], grads: Mapping[str, Array | None]) -> np.ndarray:
    """The gradients of some parameters, in their order; None for a name without one.

    Raises:
        KeyError: A gradient has no parameter.
        TypeError: A name is not a string.
    """
    found = np.fromiter(map(grads.get, params), object, len(params))
    # As many as there are, and none missing: they have the same names. To compare a thousand takes
    # 20 us, to look for None among them 3.
    alike = len(grads) == len(found) > MANY
    # What an array of objects has in memory are their identities.
    if alike and id(None) not in np.frombuffer(found.tobytes(), np.uintp):
        return found
    if not grads.keys() <= params.keys():
        _refuse_unknown(grads, params)
    return found


def _refuse_unknown(grads: Mapping[str, Array | None], params: Mapping[str, Array]) -> None:
    """Refuse a gradient without a parameter, if there is one; see ``gradients_of``."""
    for name, grad in grads.items():
        check_name("grads", name)
        if grad is not None and name not in params:
            near = ", ".join(map(repr, get_close_matches(name, params))) or "none like it"
            raise KeyError(
                f"gradient of {name!r}: expected the name of one of the {len(params)} parameters "
                f"of this step ({near}): pass its parameter in params"
            )


def as_dict(what: str, arrays: Any) -> dict[str, Any]:
    """A mapping from names, such as a dict or a ``torch.nn.ParameterDict``, as a dict of its own.

    Raises:
        TypeError: It is none.
    """
    if type(arrays) is dict:
        return arrays.copy()
    if not hasattr(arrays, "keys"):
        raise TypeError(
            f"{what} is a {type(arrays).__name__}; expected a mapping of names to arrays: pass a "
            "dict"
        )
    return dict(arrays.items())


def check_name(what: str, name: Any) -> None:
    """Refuse what is not a name.

    Args:
        what: Where it stands, for the message.
        name: It.

    Raises:
        TypeError: It is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} has the name {brief(name)}; expected a string")


def check_layout(name: str, layout: Layout, expected: Layout) -> None:
    """Refuse a parameter of another shape or dtype than its state has.

    Args:
        name: Its name.
        layout: Its layout.
        expected: That of its state.

    Raises:
        TypeError: The dtype is another one.
        ValueError: The shape is.
    """
    for what, have, want, error in (
        ("shape", layout.shape, expected.shape, ValueError),
        ("dtype", layout.dtype, expected.dtype, TypeError),
    ):
        if have != want:
            raise error(
                f"parameter {name!r} has {what} {have}; expected {want}, that of its state: forget "
                "the name to start anew"
            )


def checked_gradient(name: str, grad: Array, layout: Layout) -> Array:
    """A gradient as an array that fits its parameter.

    Args:
        name: The parameter's name.
        grad: What came as its gradient.
        layout: The parameter's layout.

    Raises:
        TypeError: It is not an array of the parameter's library, dtype and device.
        ValueError: It has another shape.
    """
    label = f"gradient of {name!r}"
    if isinstance(grad, np.generic) and layout.library == "numpy":
        grad = np.asarray(grad)
    came = backend_for(grad, label).layout(grad, label)
    for what, have, want, remedy, error in (
        ("library", came.library, layout.library, "convert it", TypeError),
        ("shape", came.shape, layout.shape, "reshape it", ValueError),
        ("dtype", came.dtype, layout.dtype, "convert it", TypeError),
        ("device", came.device, layout.device, "move it", TypeError),
    ):
        if have != want:
            raise error(
                f"{label} has {what} {have}; expected {want}, that of its parameter: {remedy}"
            )
    return grad


class _Span(NamedTuple):
    """The addresses that the update of a parameter writes."""

    device: str
    low: int
    high: int
    name: str
    memory: np.ndarray


def check_no_shared_memory(members: Sequence[Member]) -> None:
    """Refuse two parameters that an update would write to one place.

    Raises:
        ValueError: Two names have one array, or arrays that overlap.
    """
    seen: dict[int, str] = {}
    spans = []
    for member in members:
        memory = member.backend.memory(member.param) if member.backend.in_place else None
        if memory is None:
            continue
        first = seen.setdefault(id(member.param), member.name)
        if first != member.name:
            refuse_shared(first, member.name)
        if memory.size:
            bounds = np.lib.array_utils.byte_bounds(memory)
            spans.append(_Span(member.layout.device, *bounds, member.name, memory))
    reaching: list[_Span] = []
    for span in sorted(spans, key=lambda span: span[:3]):
        reaching = [s for s in reaching if s.device == span.device and s.high > span.low]
        for earlier in reaching:
            # Columns of one matrix reach into each other without sharing an element.
            if np.shares_memory(earlier.memory, span.memory):
                refuse_shared(earlier.name, span.name)
        reaching.append(span)


def refuse_shared(first: str, second: str) -> NoReturn:
    """Refuse two names for one array.

    Raises:
        ValueError: In any case.
    """
    first, second = sorted((first, second))
    raise ValueError(
        f"parameters {first!r} and {second!r} share memory, so a step would update it twice; "
        "expected an array for each name: copy one, or pass it under one name"
    )
