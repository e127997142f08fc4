"""The orthonormal cosine transform of the last axis, by real FFTs: ``spec/rules/dct_adam.md``."""

from functools import cache
from itertools import count
from math import pi
from typing import Any

import numpy as np
from array_api_compat import device

__all__ = ["dct", "idct", "next_fast_len"]


@cache
def next_fast_len(size: int) -> int:
    """The smallest size, not below this one, whose prime factors are 2, 3 and 5; 0 for 0.

    >>> [next_fast_len(size) for size in (0, 1, 7, 31)]
    [0, 1, 8, 32]
    """
    return next(n for n in count(size) if n == 0 or 30 ** n.bit_length() % n == 0)


def dct(xp: Any, x: Any) -> Any:
    """The cosine transform of type II, scaled to be orthonormal.

    >>> dct(np, np.ones(4)).round(4).tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    if 0 in x.shape:
        return x
    ends_meet = xp.concat([x[..., ::2], xp.flip(x[..., 1::2], axis=-1)], axis=-1)
    return _reflection(xp, _hartley(xp, ends_meet))


def idct(xp: Any, x: Any) -> Any:
    """The inverse of ``dct``: its parts in the opposite order, since each is its own inverse.

    >>> idct(np, np.array([2.0, 0.0, 0.0, 0.0])).round(4).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    if 0 in x.shape:
        return x
    ends_meet = _hartley(xp, _reflection(xp, x))
    pairs = xp.stack([ends_meet, xp.flip(ends_meet, axis=-1)], axis=-1)
    return xp.reshape(pairs, (*x.shape[:-1], -1))[..., : x.shape[-1]]


def _hartley(xp: Any, x: Any) -> Any:
    """The real part of the orthonormal Fourier transform less the imaginary part."""
    half = xp.fft.rfft(x, norm="ortho")
    real, imag = xp.real(half), xp.imag(half)
    # The upper half has the conjugates of the lower one, from the other end.
    upper = (real + imag)[..., 1 : (x.shape[-1] + 1) // 2]
    return xp.concat([real - imag, xp.flip(upper, axis=-1)], axis=-1)


def _reflection(xp: Any, x: Any) -> Any:
    """Each pair of elements k and n - k turned and mirrored."""
    # In as many dimensions, for JAX can be told to broadcast no others.
    shape = (*(1,) * (x.ndim - 1), x.shape[-1])
    rows = (row.reshape(shape) for row in _directions(x.shape[-1]))
    cos, sin = (xp.asarray(row, dtype=x.dtype, device=device(x)) for row in rows)
    other = xp.concat([x[..., :1], xp.flip(x[..., 1:], axis=-1)], axis=-1)
    return cos * x + sin * other


@cache
def _directions(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of a quarter of pi, and k quarters of a turn by n; (1, 0) for k = 0."""
    angles = pi / 4 + np.arange(n) * (pi / 2 / n)
    cos, sin = np.cos(angles), np.sin(angles)
    cos[0], sin[0] = 1.0, 0.0
    return cos, sin
