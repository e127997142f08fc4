"""Conversions between 16-bit numbers in memory and the float32 numbers that kernels compute with.

The way to float32 is exact. The way back rounds once, to nearest, ties to even; numbers that are
too large become infinite, and NaN stays NaN.

Processors convert float16 by an instruction, which makes a step of 1e7 elements 1.25 times as fast
as integer arithmetic does. Where there is none, and for bfloat16, whose instruction takes subnormal
numbers for zeros, the conversions are integer arithmetic on the bits, except for two operations in
float32: a product that is exact, and a sum that rounds as needed.

>>> load, store = (function.py_func for function in conversions("float16", False))  # not compiled
>>> hex(store(1.0)), float(load(0x3C00))
('0x3c00', 1.0)
>>> numbers = 0.1, 1 + 2**-11, 1 + 3 * 2**-11, 1e5  # after 1.0 comes 1 + 2**-10
>>> [float(load(store(x))) for x in numbers]
[0.0999755859375, 1.0, 1.001953125, inf]
"""

from typing import Any

import numpy as np

from multiopt_kernels.cpu.toolbox import toolbox

__all__ = ["NARROW", "conversions", "reader"]

#: The dtypes that kernels convert.
NARROW = "float16", "bfloat16"


def reader(dtype: str, storage_dtype: str) -> tuple[Any, Any, int]:
    """How kernels read elements in memory as numbers of the compute dtype.

    Args:
        dtype: The compute dtype.
        storage_dtype: The dtype of the elements in memory.

    Returns:
        A function from an address to a pointer, one from what it points to to a number, and the
        size of an element.
    """
    tools = toolbox()
    if storage_dtype == dtype:
        return tools.at[dtype], tools.inlined(lambda x: x), np.dtype(dtype).itemsize
    return tools.shorts, conversions(storage_dtype)[0], 2


def conversions(dtype: str, by_instruction: bool | None = None) -> tuple[Any, Any]:
    """Numba functions from the bits of a 16-bit number, as uint16, to float32, and back.

    Args:
        dtype: One of ``NARROW``.
        by_instruction: Whether to use the instructions for float16. None asks the processor.
    """
    if dtype == "float16":
        if by_instruction is None:
            by_instruction = toolbox().has_half
        if by_instruction:
            return toolbox().from_half, toolbox().to_half
    u32, u16, f32, njit = np.uint32, np.uint16, np.float32, toolbox().njit
    infinity = u32(0x7F800000)

    def from_bfloat16(bits):  # type: ignore[no-untyped-def]
        return u32(u32(bits) << u32(16)).view(f32)

    def to_bfloat16(x):  # type: ignore[no-untyped-def]
        u = f32(x).view(u32)
        rounded = u32(u + u32(0x7FFF) + ((u >> u32(16)) & u32(1))) >> u32(16)
        return u16(u32(0x7FC0) if u32(u & u32(0x7FFFFFFF)) > infinity else rounded)

    def from_float16(bits):  # type: ignore[no-untyped-def]
        u = u32(bits)
        shifted = u32(u & u32(0x7FFF)) << u32(13)
        # The exponent biases of the two formats differ by 112. A product with a power of two is
        # exact, for a subnormal number too. Infinities and NaN need the largest exponent instead.
        x = f32(u32(shifted).view(f32) * f32(2.0**112)).view(u32)
        x = x | infinity if shifted >= u32(0x0F800000) else x
        return u32(x | ((u & u32(0x8000)) << u32(16))).view(f32)

    def to_float16(x):  # type: ignore[no-untyped-def]
        u = f32(x).view(u32)
        sign, size = u32(u >> u32(16)) & u32(0x8000), u32(u & u32(0x7FFFFFFF))
        odd = (size >> u32(13)) & u32(1)
        rounded = u32(size - u32(0x38000000) + u32(0xFFF) + odd) >> u32(13)
        # If the result will be subnormal, adding 0.5 rounds it to a multiple of 2**-24.
        near = f32(u32(size).view(f32) + f32(0.5))
        subnormal = u32(f32(near).view(u32) - u32(0x3F000000))
        found = subnormal if size < u32(0x38800000) else rounded
        found = u32(0x7C00) if size >= u32(0x47800000) else found
        found = u32(0x7E00) if size > infinity else found
        return u16(found | sign)

    pairs = {"float16": (from_float16, to_float16), "bfloat16": (from_bfloat16, to_bfloat16)}
    load, store = pairs[dtype]
    return njit(load), njit(store)
