"""The user's own data in a checkpoint; ``spec/checkpoint.md`` defines it under "Metadata".

JSON has no NaN and no infinity. They are written as null, and a second description says where they
were:

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

#: How deeply a description of a rule, or metadata, may be nested.
DEEPEST = 64

#: Two surrogates that JSON would read back as one character. A single one is unchanged by JSON.
PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")

#: The numbers that JSON does not have.
NONFINITE = ("nan", "inf", "-inf")

EXPECTED = (
    "expected None, True, False, a number (NumPy's too), a string, or a list or a mapping with "
    "strings as keys of these"
)


def described(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert metadata to what JSON can hold.

    Args:
        metadata: The metadata. It may also hold numbers that are not finite, and NumPy's numbers,
            which become Python's.

    Returns:
        The metadata with None for each number that is not finite; and those numbers by key or by
        index in a list, nested like the metadata.

    Raises:
        TypeError: The metadata is not a mapping.
        ValueError: A value would not come back unchanged.
    """
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping; got {metadata!r}")
    plain, nonfinite = _described(metadata, "metadata", 0)
    return plain, nonfinite or {}


def _described(value: Any, where: str, depth: int) -> tuple[Any, Any]:
    """Convert one value to what JSON can hold, and collect its numbers that are not finite.

    Args:
        value: The value.
        where: A Python expression for its place in the metadata.
        depth: How many lists and mappings it is nested in.
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


#: The kinds of NumPy dtypes whose values are also Python's: no dates, no bytes.
KINDS = "biufU"


def _is_short(value: int) -> bool:
    """Whether Python can write an int and read it back: it refuses a few thousand digits."""
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
    """How to convert a value that is almost one that can be kept."""
    if isinstance(value, tuple | set | frozenset):
        return ": make it a list"
    if hasattr(value, "tolist") and not isinstance(value, np.generic):
        return ": call its tolist()"
    return ""


def _refusal(why: str) -> ValueError:
    return ValueError(f"metadata must be what JSON can hold; {why}")


def restored(metadata: dict[str, Any], nonfinite: Any) -> dict[str, Any]:
    """Restore metadata, in place, from the two values that ``described`` returned.

    Raises:
        ValueError: The two do not belong together.
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
    """Raise an error for plain data that is nested too deeply for recursive functions.

    Raises:
        ValueError: It is nested too deeply.
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
