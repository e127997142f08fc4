"""The orthonormal discrete cosine transform along the last axis, and its inverse.

Both are made of a reordering, a Hartley transform by a real FFT, and a reflection of pairs of
coefficients. ``spec/rules/dct_adam.md`` gives the formulas.
"""

from functools import cache
from itertools import count
from math import pi
from typing import Any

import numpy as np
from array_api_compat import device

__all__ = ["dct", "idct", "next_fast_len"]


@cache
def next_fast_len(size: int) -> int:
    """The smallest size, at least ``size``, with no prime factors other than 2, 3 and 5; 0 for 0.

    >>> [next_fast_len(size) for size in (0, 1, 7, 31)]
    [0, 1, 8, 32]
    """
    return next(n for n in count(size) if n == 0 or 30 ** n.bit_length() % n == 0)


def dct(xp: Any, x: Any) -> Any:
    """The cosine transform of type II (DCT-II), scaled to be orthonormal.

    >>> dct(np, np.ones(4)).round(4).tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    if 0 in x.shape:
        return x
    ends_meet = xp.concat([x[..., ::2], xp.flip(x[..., 1::2], axis=-1)], axis=-1)
    return _reflection(xp, _hartley(xp, ends_meet))


def idct(xp: Any, x: Any) -> Any:
    """The inverse of ``dct``, in reverse order; both transforms are their own inverses.

    >>> idct(np, np.array([2.0, 0.0, 0.0, 0.0])).round(4).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    if 0 in x.shape:
        return x
    ends_meet = _hartley(xp, _reflection(xp, x))
    pairs = xp.stack([ends_meet, xp.flip(ends_meet, axis=-1)], axis=-1)
    return xp.reshape(pairs, (*x.shape[:-1], -1))[..., : x.shape[-1]]


def _hartley(xp: Any, x: Any) -> Any:
    """The real part of the orthonormal Fourier transform minus its imaginary part."""
    half = xp.fft.rfft(x, norm="ortho")
    real, imag = xp.real(half), xp.imag(half)
    # The upper half is the conjugate of the lower half in reverse order.
    upper = (real + imag)[..., 1 : (x.shape[-1] + 1) // 2]
    return xp.concat([real - imag, xp.flip(upper, axis=-1)], axis=-1)


def _reflection(xp: Any, x: Any) -> Any:
    """Rotate and mirror each pair of elements ``k`` and ``n - k``."""
    # The same number of dimensions, because JAX can be set to refuse broadcasting of ranks.
    shape = (*(1,) * (x.ndim - 1), x.shape[-1])
    rows = (row.reshape(shape) for row in _directions(x.shape[-1]))
    cos, sin = (xp.asarray(row, dtype=x.dtype, device=device(x)) for row in rows)
    other = xp.concat([x[..., :1], xp.flip(x[..., 1:], axis=-1)], axis=-1)
    return cos * x + sin * other


@cache
def _directions(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of ``pi / 4 + k * pi / (2 * n)`` for each ``k``; (1, 0) for k = 0."""
    angles = pi / 4 + np.arange(n) * (pi / 2 / n)
    cos, sin = np.cos(angles), np.sin(angles)
    cos[0], sin[0] = 1.0, 0.0
    return cos, sin
