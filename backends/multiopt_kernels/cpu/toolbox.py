"""What kernels are made with: Numba, reading memory at an address."""

import math
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np

from multiopt_kernels.cpu.object_cache import ObjectCode

__all__ = ["compiled", "object_code", "toolbox"]


@cache
def toolbox() -> Any:
    """What kernels are made with: compiling, and reading memory at an address."""
    import numba
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    def njit(function: Any, inline: str = "never") -> Any:
        # The error model lets a division by zero be an infinity. Contraction is off in Numba
        # unless it is asked for.
        return numba.njit(  # type: ignore[call-overload]
            function,
            error_model="numpy",
            no_cpython_wrapper=True,
            no_cfunc_wrapper=True,
            _nrt=False,
            inline=inline,
        )

    def pointer(kind: Any) -> Any:
        @intrinsic
        def at(context: Any, address: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

            return types.CPointer(kind)(types.int64), generate  # type: ignore[no-untyped-call]

        return at

    @intrinsic
    def call(context: Any, function: Any, first: Any, second: Any) -> Any:
        """Call ``int f(void *, void *)`` at an address."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)] * 2)
            pointer = builder.inttoptr(arguments[0], kind.as_pointer())
            return builder.sext(builder.call(pointer, arguments[1:]), ir.IntType(64))

        return types.int64(types.int64, types.int64, types.int64), generate

    @intrinsic
    def prefetch(context: Any, address: Any) -> Any:
        """Ask for a cache line; a wrong address does no harm."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            byte = ir.IntType(8).as_pointer()
            number = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
            function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
            hints = [number(0), number(3), number(1)]
            builder.call(function, [builder.inttoptr(arguments[0], byte), *hints])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    tools = ModuleType("tools")
    tools.__dict__.update(
        njit=njit,
        inlined=partial(njit, inline="always"),
        call=call,
        prefetch=prefetch,
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
    """The functions of a text of ``source``, to be called by others that are compiled.

    Args:
        text: The text.
        known: What it refers to by name, beside ``njit``, ``inlined`` (the same, in the place of
            each call), ``sqrt``, ``inf`` and ``nan``.
    """
    tools = toolbox()
    names = {**known, "sqrt": np.sqrt, "inf": math.inf, "nan": math.nan}
    names |= {"njit": tools.njit, "inlined": tools.inlined}
    exec(text, names)
    return names


def object_code(**kernels: Any) -> ObjectCode:
    """The machine code of functions that take the address of their arguments, by name."""
    symbols, objects = {}, []
    int64 = toolbox().types.int64
    for name, kernel in kernels.items():
        kernel.compile((int64,))
        (compiled,) = kernel.overloads.values()
        symbols[name] = compiled.fndesc.llvm_func_name
        objects.append(compiled.library._get_compiled_object())
    return ObjectCode(symbols, tuple(objects))
