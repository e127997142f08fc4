"""What users keep in a checkpoint beside the state: ``spec/checkpoint.md``, "Metadata".

JSON has no NaN and no infinity. In their places it has null, and beside it stands where they are:

>>> described({"loss": float("nan"), "bounds": [0, float("inf")]})
({'loss': None, 'bounds': [0, None]}, {'loss': 'nan', 'bounds': {'1': 'inf'}})
>>> restored(*described({"loss": float("nan"), "bounds": [0, float("inf")]}))
{'loss': nan, 'bounds': [0, inf]}
"""

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np

__all__ = ["DEEPEST", "PAIR", "check_nesting", "described", "restored"]

#: How deep a description of a rule, or metadata, may be nested.
DEEPEST = 64

#: Two surrogates that JSON takes for one character. Alone, each comes back as it is.
PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")

#: What JSON has no number for.
NONFINITE = ("nan", "inf", "-inf")

EXPECTED = (
    "expected None, True, False, a number (NumPy's too), a string, or a list or a mapping with "
    "strings as keys of these"
)


def described(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata as JSON has it.

    Args:
        metadata: What JSON can hold, numbers that are not finite, and NumPy's numbers, which become
            Python's.

    Returns:
        The metadata with None for each number that is not finite; and by key, or index in a list,
        what those are, nested like the metadata.

    Raises:
        TypeError: It is no mapping.
        ValueError: Something in it would not come back as it is.
    """
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping; got {metadata!r}")
    plain, nonfinite = _described(metadata, "metadata", 0)
    return plain, nonfinite or {}


def _described(value: Any, where: str, depth: int) -> tuple[Any, Any]:
    """A value as JSON has it, and what of it is not finite.

    Args:
        value: The value.
        where: Its place, as Python would have it.
        depth: In how many others it is.
    """
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 and value.dtype.kind in KINDS:
        value = value.item()
    if isinstance(value, float):
        return (value, None) if isfinite(value) else (None, repr(float(value)))
    if isinstance(value, str) and PAIR.search(value):
        raise _refusal(f"{where} has two surrogates that JSON takes for one character")
    if value is None or isinstance(value, str) or (isinstance(value, int) and _is_short(value)):
        return value, None
    if isinstance(value, list):
        keys, parts = [str(i) for i in range(len(value))], value
    elif isinstance(value, Mapping):
        keys, parts = list(value), list(value.values())
    else:
        raise _refusal(f"{where} is {_kind(value)}; {EXPECTED}{_remedy(value)}")
    if depth == DEEPEST:
        raise _refusal(f"it is nested more than {DEEPEST} deep")
    plain, nonfinite = [], {}
    for key, part in zip(keys, parts, strict=True):
        if not isinstance(key, str):
            raise _refusal(f"{where} has the key {key!r}; expected strings as keys")
        if PAIR.search(key):
            raise _refusal(
                f"{where} has the key {key!r}, with two surrogates that JSON takes for one "
                "character"
            )
        place = f"{where}[{key}]" if isinstance(value, list) else f"{where}[{key!r}]"
        plain_part, mark = _described(part, place, depth + 1)
        plain.append(plain_part)
        if mark is not None:
            nonfinite[key] = mark
    result = plain if isinstance(value, list) else dict(zip(keys, plain, strict=True))
    return result, nonfinite or None


#: Of NumPy's dtypes, those whose numbers Python has: no dates, no bytes.
KINDS = "biufU"


def _is_short(value: int) -> bool:
    """Whether Python reads a number that it writes: it refuses some thousand digits."""
    try:
        return value.bit_length() < 2000 or bool(repr(value))
    except ValueError:
        return False


def _kind(value: Any) -> str:
    if isinstance(value, int):
        return f"a number of {value.bit_length()} bits"
    name = type(value).__name__
    shape = f" of shape {value.shape}" if isinstance(value, np.ndarray) else ""
    return f"a {name}{shape}"


def _remedy(value: Any) -> str:
    """What to do about a value that is near to one that may be kept."""
    if isinstance(value, tuple | set | frozenset):
        return ": make it a list"
    if hasattr(value, "tolist") and not isinstance(value, np.generic):
        return ": call its tolist()"
    return ""


def _refusal(why: str) -> ValueError:
    return ValueError(f"metadata must be what JSON can hold; {why}")


def restored(metadata: dict[str, Any], nonfinite: Any) -> dict[str, Any]:
    """Metadata from what ``described`` gave, which it changes.

    Raises:
        ValueError: The two do not fit.
    """
    check_nesting(metadata)
    check_nesting(nonfinite)
    _restore(metadata, nonfinite)
    return metadata


def _restore(value: Any, nonfinite: Any) -> None:
    if not isinstance(nonfinite, dict):
        raise ValueError(
            f"expected a mapping or one of {NONFINITE} in 'nonfinite'; got {nonfinite!r}"
        )
    for key, mark in nonfinite.items():
        place: Any = key
        if isinstance(value, list) and re.fullmatch("[0-9]{1,15}", key):
            place = int(key)
        places = range(len(value)) if isinstance(value, list) else value
        if not isinstance(value, list | dict) or place not in places:
            raise ValueError(f"'nonfinite' has {key!r}, a place that the metadata does not have")
        if mark not in NONFINITE:
            _restore(value[place], mark)
        elif value[place] is None:
            value[place] = float(mark)
        else:
            raise ValueError(f"'nonfinite' has {mark!r} for {value[place]!r}; expected null there")


def check_nesting(value: Any) -> None:
    """Refuse plain data that is nested too deep for the functions that go through it.

    Raises:
        ValueError: It is.
    """
    level = [value]
    for _ in range(DEEPEST):
        inside = [
            part.values() if isinstance(part, dict) else part
            for part in level
            if isinstance(part, dict | list)
        ]
        if not inside:
            return
        level = [part for parts in inside for part in parts]
    raise ValueError(f"a description is nested more than {DEEPEST} deep")
