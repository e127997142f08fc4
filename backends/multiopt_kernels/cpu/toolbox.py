"""The tools that kernels are built with: Numba's compiler, and access to memory at an address.

A kernel takes addresses instead of arrays, and touches nothing of Python. Numba is imported when
the first kernel is built, so a process that finds all its kernels in the cache never imports it.
"""

import math
from functools import cache
from platform import machine
from types import ModuleType
from typing import Any

import numpy as np

from multiopt_kernels.cpu.object_cache import ObjectCode

__all__ = ["TAKEN", "TURNED", "compiled", "object_code", "toolbox"]

#: The elements of a line of a square that is transposed in registers.
TURNED = 8

#: How many elements are taken at once where every second one is.
TAKEN = 16


@cache
def toolbox() -> Any:
    """Return the tools, as a namespace.

    ``njit`` compiles a function, and ``inlined`` one that is inlined where it is called. ``words``,
    ``doubles``, ``halves``, ``bytes`` and ``shorts`` turn an address into a pointer to int64,
    float64, int32, uint8 and uint16; ``at`` has such functions for float32 and float64 by name.
    ``from_half`` and ``to_half`` convert float16, where ``has_half`` says that the processor can.
    ``call`` and ``run`` call a C function and a kernel. ``turn`` has functions that transpose a
    square of ``TURNED`` elements, by the size of an element.
    """
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    from multiopt_kernels.cpu import target

    # With this error model a division by zero gives infinity. Numba contracts operations, such as a
    # product and a sum, only if it is asked to.
    options = {
        "error_model": "numpy",
        "no_cpython_wrapper": True,
        "no_cfunc_wrapper": True,
        "_nrt": False,
    }
    njit, inlined = target.njit(**options), target.njit(**options, inline="always")

    def pointer(kind: Any) -> Any:
        @intrinsic
        def at(context: Any, address: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

            return types.CPointer(kind)(types.int64), generate  # type: ignore[no-untyped-call]

        return at

    @intrinsic
    def call(context: Any, function: Any, first: Any, second: Any) -> Any:
        """Call the C function ``int f(void *, void *)`` at an address."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)] * 2)
            pointer = builder.inttoptr(arguments[0], kind.as_pointer())
            return builder.sext(builder.call(pointer, arguments[1:]), ir.IntType(64))

        return types.int64(types.int64, types.int64, types.int64), generate

    @intrinsic
    def run(context: Any, kernel: Any, arguments: Any) -> Any:
        """Run the kernel at an address (``team``). Nobody reads its result."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            integer = ir.IntType(64)
            kind = ir.FunctionType(
                ir.IntType(32), [integer.as_pointer(), integer.as_pointer(), integer]
            )
            with builder.goto_entry_block():
                result = builder.alloca(integer)
            pointer = builder.inttoptr(arguments[0], kind.as_pointer())
            builder.call(pointer, [result, integer.as_pointer()(None), arguments[1]])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    def reserve(size: int) -> Any:
        @intrinsic
        def at(context: Any) -> Any:
            """The address of some bytes on the stack, until the calling function returns."""

            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                with builder.goto_entry_block():
                    room = builder.alloca(ir.ArrayType(ir.IntType(8), size))
                    room.align = 64
                return builder.ptrtoint(room, ir.IntType(64))

            return types.int64(), generate

        return at

    def every_second(itemsize: int, back: bool) -> Any:
        @intrinsic
        def gather(context: Any, source: Any, target: Any) -> Any:
            """Copy the first ``TAKEN`` of every second element, going up or going down.

            The elements in between are read too. LLVM makes gathers of a loop that does the same,
            which took five times as long.
            """

            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                integer, places = ir.IntType(64), range(TAKEN)
                line = ir.VectorType(ir.IntType(8 * itemsize), TAKEN)

                def at(first: Any, elements: int) -> Any:
                    place = builder.add(first, integer(elements * itemsize))
                    return builder.inttoptr(place, line.as_pointer())

                source, target = arguments
                lowest = 1 - 2 * TAKEN if back else 0
                which = [2 * TAKEN - 1 - 2 * k if back else 2 * k for k in places]
                both = [builder.load(at(source, lowest + k), align=itemsize) for k in (0, TAKEN)]
                mask = ir.Constant(ir.VectorType(ir.IntType(32), TAKEN), which)
                picked = builder.shuffle_vector(*both, mask)
                builder.store(picked, at(target, 0), align=itemsize)
                return context.get_dummy_value()

            return types.void(types.int64, types.int64), generate

        return gather

    def turn(itemsize: int) -> Any:
        @intrinsic
        def square(context: Any, source: Any, step: Any, target: Any, pitch: Any) -> Any:
            """Transpose a square: its lines are ``step`` bytes apart, those written ``pitch``."""

            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                integer, places = ir.IntType(64), range(TURNED)
                line = ir.VectorType(ir.IntType(8 * itemsize), TURNED)

                def at(first: Any, step: Any, k: int) -> Any:
                    place = builder.add(first, builder.mul(step, integer(k)))
                    return builder.inttoptr(place, line.as_pointer())

                def picked(a: Any, b: Any, which: list[int]) -> Any:
                    mask = ir.Constant(ir.VectorType(ir.IntType(32), TURNED), which)
                    return builder.shuffle_vector(a, b, mask)

                source, step, target, pitch = arguments
                lines = [builder.load(at(source, step, k), align=itemsize) for k in places]
                half = TURNED // 2
                while half:
                    # Within squares of twice this size, the upper right quarter and the lower left
                    # one change places.
                    for k in (k for k in places if not k & half):
                        a, b = lines[k], lines[k + half]
                        upper = [j if not j & half else j - half + TURNED for j in places]
                        lower = [j + half if not j & half else j + TURNED for j in places]
                        lines[k], lines[k + half] = picked(a, b, upper), picked(a, b, lower)
                    half //= 2
                for k in places:
                    builder.store(lines[k], at(target, pitch, k), align=itemsize)
                return context.get_dummy_value()

            return types.void(*[types.int64] * 4), generate

        return square

    @intrinsic
    def prefetch(context: Any, address: Any) -> Any:
        """Prefetch a cache line. A wrong address does no harm."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            byte = ir.IntType(8).as_pointer()
            number = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
            function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
            hints = [number(0), number(3), number(1)]
            builder.call(function, [builder.inttoptr(arguments[0], byte), *hints])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    @intrinsic
    def from_half(context: Any, bits: Any) -> Any:
        """The float32 number with the value of a float16 number."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            half = builder.bitcast(arguments[0], ir.HalfType())
            return builder.fpext(half, ir.FloatType())

        return types.float32(types.uint16), generate

    @intrinsic
    def to_half(context: Any, x: Any) -> Any:
        """The bits of a float32 number, rounded to float16."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            half = builder.fptrunc(arguments[0], ir.HalfType())
            return builder.bitcast(half, ir.IntType(16))

        return types.uint16(types.float32), generate

    # Those of the processor, unless a variable of Numba's says otherwise.
    features = set(target.features().split(","))
    tools = ModuleType("tools")
    tools.__dict__.update(
        njit=njit,
        inlined=inlined,
        call=call,
        run=run,
        reserve=reserve,
        every_second={
            (size, back): every_second(size, back) for size in (2, 4, 8) for back in (False, True)
        },
        turn={size: turn(size) for size in (2, 4, 8)},
        prefetch=prefetch,
        has_half=machine() in ("arm64", "aarch64") or {"+avx", "+f16c"} <= features,
        from_half=from_half,
        to_half=to_half,
        types=types,
        words=pointer(types.int64),
        doubles=pointer(types.float64),
        halves=pointer(types.int32),
        bytes=pointer(types.uint8),
        shorts=pointer(types.uint16),
        at={name: pointer(getattr(types, name)) for name in ("float32", "float64")},
    )
    return tools


def compiled(text: str, **known: Any) -> dict[str, Any]:
    """Define the functions of a text that ``source`` printed, for other compiled functions to call.

    Args:
        text: The text.
        known: The names that it uses, in addition to ``njit``, ``inlined``, ``sqrt``, ``inf`` and
            ``nan``.

    Returns:
        Everything that the text defines or uses, by name.
    """
    tools = toolbox()
    names = {**known, "sqrt": np.sqrt, "inf": math.inf, "nan": math.nan}
    names |= {"njit": tools.njit, "inlined": tools.inlined}
    exec(text, names)
    return names


def object_code(**kernels: Any) -> ObjectCode:
    """Compile functions that take the address of their arguments, by name."""
    symbols, objects = {}, []
    for name, kernel in kernels.items():
        kernel.compile((toolbox().types.int64,))
        symbols[name], code = kernel.object_code()
        objects.append(code)
    return ObjectCode(symbols, tuple(objects))
