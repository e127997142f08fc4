"""Kernels written by hand, their calls, and processes that know nothing of ours."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from multiopt_kernels.cpu.object_cache import ObjectCode


def compiled(name: str, body: Callable[[ir.IRBuilder, ir.Function], Any]) -> ObjectCode:
    """A kernel, of the prototype that numba gives it, without the second that numba takes."""
    integer, module = ir.IntType(64), ir.Module()
    kernel = ir.Function(module, ir.FunctionType(ir.IntType(32), [integer] * 3), name)
    body(ir.IRBuilder(kernel.append_basic_block()), kernel)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    return ObjectCode({name: name}, (machine.emit_object(llvm.parse_assembly(str(module))),))


def call(address: int) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


def run(code: str) -> str:
    """What a fresh process prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()
