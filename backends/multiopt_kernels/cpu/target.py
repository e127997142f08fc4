"""A target of Numba's own for kernels, in which a function is optimized as a part of its kernel.

Numba makes machine code of every function, and optimizes it again within each function that calls
it, directly or not. A kernel is many small functions, and only its own code is ever run. So here a
function is linked into its callers as it was lowered, and LLVM goes over the whole kernel once: the
kernel of Adafactor takes 10 s to compile instead of 27.

This uses Numba's extension API for targets (``numba.core.target_extension``). Functions of users,
whose target is ``cpu``, are compiled as ever.
"""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from numba.core import types
from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.cpu import CPUContext, CPUTargetOptions
from numba.core.descriptors import TargetDescriptor
from numba.core.dispatcher import Dispatcher
from numba.core.registry import cpu_target
from numba.core.runtime.nrt import rtsys
from numba.core.target_extension import (
    CPU,
    dispatcher_registry,
    jit_registry,
    target_override,
    target_registry,
)
from numba.core.typing.context import Context

__all__ = ["Function", "features", "njit"]

NAME = "multiopt kernels"


class KernelTarget(CPU):
    """The processor, as what kernels are compiled for."""


class _Library(JITCodeLibrary):
    """The code of a function, with that of all functions that it calls."""

    def add_linking_library(self, library: Any) -> None:
        """Add the code of a function that this one calls."""
        if isinstance(library, _Library):  # not Numba's runtime, which kernels do not use
            super().add_linking_library(library)

    def finalize(self) -> None:
        """Link, and leave the rest to the kernel."""
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True

    @global_compiler_lock
    def object_code(self) -> bytes:
        """Optimize the code, and return it as an object file."""
        self._ensure_finalized()
        self._optimize_final_module()
        code: bytes = self._codegen._tm.emit_object(self._final_module)
        return code


class _Codegen(JITCPUCodegen):
    _library_class = _Library


class _Context(CPUContext):
    @global_compiler_lock
    def init(self) -> None:
        super().init()
        self._internal_codegen = _Codegen("numba.exec")

    def load_additional_registries(self) -> None:
        # Otherwise the runtime of all Numba would be made by whichever target comes first.
        rtsys.initialize(cpu_target.target_context)
        super().load_additional_registries()

    def get_executable(self, library: Any, fndesc: Any, env: Any) -> Any:
        """What stands for the function in Numba's tables: any builtin that is like no other."""
        return [].append


class _Target(TargetDescriptor):
    options = CPUTargetOptions

    @cached_property
    def typing_context(self) -> Any:
        return Context()

    @cached_property
    def target_context(self) -> Any:
        return _Context(self.typing_context, self._target_name)


class Function(Dispatcher):
    """A function of a kernel. It cannot be called from Python."""

    targetdescr = _Target(NAME)

    def compile(self, signature: Any) -> Any:
        """Compile the function for arguments of some types."""
        with target_override(NAME):
            return super().compile(signature)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Find the function for arguments; that for a literal is the one for any number."""
        return super().get_call_template(tuple(map(types.unliteral, args)), kws)

    def object_code(self) -> tuple[str, bytes]:
        """The symbol and the object file of the function, which was compiled once."""
        compiled: Any
        (compiled,) = self.overloads.values()
        return compiled.fndesc.llvm_func_name, compiled.library.object_code()


def njit(**options: Any) -> Callable[[Any], Function]:
    """Numba's ``njit`` for this target: a decorator with options."""
    return partial(Function, targetoptions={**options, "nopython": True})


def features() -> str:
    """The features of the processor, unless a variable of Numba's says otherwise."""
    found: str = Function.targetdescr.target_context.codegen()._get_host_cpu_features()
    return found


target_registry[NAME] = KernelTarget
dispatcher_registry[KernelTarget] = Function
jit_registry[KernelTarget] = njit
