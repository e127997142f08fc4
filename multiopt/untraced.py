"""What PyTorch's compiler must leave as it is: traced, a step would be rounded differently."""

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["untraced"]

Function: TypeAlias = Callable[..., Any]

# A dict: torch's compiler warns of functools.cache.
_UNTRACED: dict[Function, Function] = {}


def untraced(function: Function) -> Function:
    """The function, out of the compiler's reach if the compiler is loaded."""
    if "torch._dynamo" not in sys.modules:
        return function
    if function not in _UNTRACED:
        _UNTRACED[function] = sys.modules["torch"].compiler.disable(function)
    return _UNTRACED[function]
