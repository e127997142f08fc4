"""Checks of what a step is given: names, parameters and gradients.

They run before anything is changed. Messages name the parameter, what was expected, what came
instead and, where there is one, the remedy.

>>> import numpy as np
>>> from multiopt.layout import Layout
>>> from multiopt.step.checks import checked_gradient
>>> checked_gradient("w", np.ones(3), Layout("numpy", (2,), "float64", "cpu"))
Traceback (most recent call last):
ValueError: gradient of 'w' has shape (3,); expected (2,), that of its parameter: reshape it
"""

from collections.abc import Iterable, Mapping, Sequence
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
    "refuse_nonfinite",
    "refuse_shared",
]

#: With more names than this, comparing names takes longer than looking for a missing gradient.
MANY = 64


def gradients_of(params: Mapping[str, Array], grads: Mapping[str, Array | None]) -> np.ndarray:
    """The gradients in the order of the parameters; None for a parameter without one.

    Raises:
        KeyError: A gradient has no parameter.
        TypeError: A name is not a string.
    """
    found = np.fromiter(map(grads.get, params), object, len(params))
    # If there are as many gradients as parameters, and none is missing, the names are the same.
    # Comparing a thousand names takes 20 us, and looking for None among the gradients 3 us.
    alike = len(grads) == len(found) > MANY
    # In memory, an array of objects holds their identities.
    if alike and id(None) not in np.frombuffer(found.tobytes(), np.uintp):
        return found
    if not grads.keys() <= params.keys():
        _refuse_unknown(grads, params)
    return found


def _refuse_unknown(grads: Mapping[str, Array | None], params: Mapping[str, Array]) -> None:
    """Raise the error of ``gradients_of`` if there is a gradient without a parameter."""
    for name, grad in grads.items():
        check_name("grads", name)
        if grad is not None and name not in params:
            near = ", ".join(map(repr, get_close_matches(name, params))) or "none like it"
            raise KeyError(
                f"gradient of {name!r}: expected the name of one of the {len(params)} parameters "
                f"of this step ({near}): pass its parameter in params"
            )


def as_dict(what: str, arrays: Any) -> dict[str, Any]:
    """Copy a mapping of names to arrays, such as a ``torch.nn.ParameterDict``, into a new dict.

    Raises:
        TypeError: It is not a mapping.
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
    """Refuse a name that is not a string.

    Args:
        what: The argument that contains the name, for the message.
        name: The name.

    Raises:
        TypeError: The name is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} has the name {brief(name)}; expected a string")


def check_layout(name: str, layout: Layout, expected: Layout) -> None:
    """Refuse a parameter whose shape or dtype is not that of its state.

    Args:
        name: The name of the parameter.
        layout: The layout of the parameter.
        expected: The layout of its state.

    Raises:
        TypeError: The dtypes differ.
        ValueError: The shapes differ.
    """
    for what, have, want, error in (
        ("shape", layout.shape, expected.shape, ValueError),
        ("dtype", layout.dtype, expected.dtype, TypeError),
    ):
        if have != want:
            raise error(
                f"parameter {name!r} has {what} {have}; expected {want}, that of its state: forget "
                "the name to start over"
            )


def checked_gradient(name: str, grad: Array, layout: Layout) -> Array:
    """Check that a gradient fits its parameter.

    Args:
        name: The name of the parameter.
        grad: The object passed as its gradient.
        layout: The layout of the parameter.

    Returns:
        The gradient; a NumPy scalar becomes an array.

    Raises:
        TypeError: The gradient is not an array of the parameter's library, dtype and device.
        ValueError: The gradient has another shape than the parameter.
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
    """The memory that the update of a parameter writes, with the addresses of its ends."""

    device: str
    low: int
    high: int
    name: str
    memory: np.ndarray


def check_no_shared_memory(members: Sequence[Member]) -> None:
    """Refuse parameters that share memory, since an update would write it twice.

    Raises:
        ValueError: Two names have the same array, or arrays that overlap.
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
            # The spans of two columns of a matrix overlap, although no element is shared.
            if np.shares_memory(earlier.memory, span.memory):
                refuse_shared(earlier.name, span.name)
        reaching.append(span)


def refuse_nonfinite(names: Iterable[str]) -> NoReturn:
    """Refuse gradients that are not finite.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"the gradient of {', '.join(map(repr, names))} has infinities or NaNs; expected finite "
        "numbers, as on_nonfinite='raise' asks: nothing was changed"
    )


def refuse_shared(first: str, second: str) -> NoReturn:
    """Refuse two names whose arrays share memory.

    Raises:
        ValueError: Always.
    """
    first, second = sorted((first, second))
    raise ValueError(
        f"parameters {first!r} and {second!r} share memory, so a step would update it twice; "
        "expected an array for each name: copy one, or pass it under one name"
    )
