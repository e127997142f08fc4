"""PyTorch tensors, updated in place.

CPU tensors are computed by NumPy through a view of their memory: ``torch.sqrt`` is not correctly
rounded there (pytorch#31250), NumPy's is. CUDA tensors run the rule as it stands, on their device.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import wraps
from operator import attrgetter
from typing import Any, TypeVar

import array_api_compat.torch
import numpy as np
import torch
from torch.nn.parameter import is_lazy

from multiopt.arrays import Member
from multiopt.backend import Array, Backend, backend_for
from multiopt.engine import Group
from multiopt.errors import brief
from multiopt.layout import Layout, require_dtype
from multiopt.rules import Rule
from multiopt_kernels import engines
from multiopt_kernels.cpu.kernels import look_kernel
from multiopt_kernels.cpu.look import Look
from multiopt_numpy.backend import check_places, read_only

__all__ = ["TorchBackend"]

Answer = TypeVar("Answer")

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float64")}
_READABLE = (*_DTYPES.values(), torch.float16, torch.bfloat16)

#: The types of tensors that are not subclasses with a ``__torch_function__`` of their own.
PLAIN = torch.Tensor, torch.nn.Parameter

#: The mode in which what is made of tensors has no values.
FAKE = torch._C._TorchDispatchModeKey.FAKE


# A dict: torch's compiler warns of functools.cache.
_DTYPE_NAMES: dict[torch.dtype, str] = {}


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype not in _DTYPE_NAMES:
        _DTYPE_NAMES[dtype] = str(dtype).removeprefix("torch.")
    return _DTYPE_NAMES[dtype]


def _on_cpu(layout: Layout) -> bool:
    return layout.device == "cpu"


def _undisturbed(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """A method of a tensor in which its class has no say, if it is a user's.

    A step knows the memory of a tensor only. What ``__torch_function__`` refuses or changes is not
    to come between.
    """

    @wraps(method)
    def undisturbed(self: Any, array: Array, *rest: Any) -> Answer:
        if type(array) in PLAIN:
            return method(self, array, *rest)
        with torch._C.DisableTorchFunctionSubclass():
            return method(self, array, *rest)

    return undisturbed


class TorchBackend(Backend):
    """PyTorch tensors on the CPU and on CUDA devices."""

    in_place = True

    # What an array is

    @_undisturbed
    def layout(self, array: Array, label: str) -> Layout:
        """Inspect a tensor; see ``Backend``."""
        if is_lazy(array):
            raise TypeError(f"{label} is an uninitialized parameter: run its module once")
        if array.is_nested or array.layout != torch.strided:
            kind = str(array.layout).removeprefix("torch.").replace("strided", "nested")
            remedy = ".values(), all of its numbers" if array.is_nested else ".to_dense()"
            raise TypeError(f"{label} is a {kind} tensor; expected a dense one: use {remedy}")
        dtype = _dtype_name(array.dtype)
        require_dtype(dtype, label)
        if not _has_memory(array):
            raise TypeError(
                f"{label} is a {type(array).__name__} without memory of its own (a fake, meta, "
                "traced, distributed or released tensor); inside a transformation call the pure "
                "rule.update"
            )
        if torch._C._get_dispatch_mode(FAKE) is not None:
            raise TypeError(
                f"{label}: a step was taken inside torch's FakeTensorMode, where new tensors have "
                "no values; step outside of it, or call the pure rule.update there"
            )
        device = str(array.device)
        if device != "cpu" and _is_captured(array.device):
            raise TypeError(
                f"{label} is on {device} while a graph is captured there, which would repeat this "
                "step with the numbers of now: capture forward and backward, and step outside"
            )
        return Layout.of("torch", array.shape, dtype, device)

    @_undisturbed
    def as_real(self, array: Array, layout: Layout) -> Array:
        """The tensor, or a view; one that holds the conjugates stays whole until it is opened."""
        tensor = array if type(array) in PLAIN else array.detach()
        if not layout.is_complex:
            return tensor
        tensor = tensor.detach()
        return tensor if tensor.is_conj() else torch.view_as_real(tensor)

    def as_complex(self, parts: Array) -> Array:
        """A view."""
        return torch.view_as_complex(parts.contiguous())

    @_undisturbed
    def check_writable(self, param: Array, label: str) -> None:
        """Refuse expanded tensors, and inference tensors outside of inference mode."""
        check_places(tuple(param.shape), param.stride(), 1, label)
        source = param if param._base is None else param._base
        if source.grad_fn is not None:
            raise ValueError(
                f"{label} is not a leaf but computed from other tensors, so an update of it would "
                "be lost; expected a leaf: pass the tensor it was computed from"
            )
        if param.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{label} was made in inference mode; expected a tensor that may be updated in "
                "place: clone it outside, or step inside torch.inference_mode()"
            )

    def memory(self, array: Array) -> np.ndarray | None:
        """The tensor as NumPy has it, bfloat16 as int16.

        For other dtypes and devices its addresses, which are not read.
        """
        if array.device.type == "cpu" and array.dtype in _READABLE and not array.is_neg():
            tensor = array.detach()
            if tensor.dtype == torch.bfloat16:
                tensor = tensor.view(torch.int16)
            memory: np.ndarray = tensor.numpy()
            return memory
        return np.asarray(_Footprint(array))

    def gradients(
        self, params: np.ndarray, names: Sequence[str], new: Sequence[int], needed: bool
    ) -> np.ndarray:
        """The ``.grad`` of tensors."""
        try:
            usual = not new or all(map(_IS_LEAF, params[new]))
            grads = np.fromiter(map(_GRAD, params), object, len(params)) if usual else None
        except Exception:
            grads = None
        if grads is None:
            # Some are not tensors, or not leaves, which torch warns about: ask each by itself.
            grads = np.fromiter(map(self._gradient, params, names), object, len(params))
        if needed and grads[0] is None and not any(grad is not None for grad in grads):
            with torch._C.DisableTorchFunctionSubclass():
                if not any(param.requires_grad for param in params):
                    raise TypeError(
                        f"no parameter requires a gradient or has one ({brief(list(names))}), so a "
                        "step would do nothing: pass leaves, as in dict(module.named_parameters()),"
                        " for the tensors of a state_dict() are detached from them, or pass the "
                        "gradients as the second argument"
                    )
        return grads

    @_undisturbed
    def _gradient(self, param: Array, name: str) -> Array | None:
        """Return the ``.grad`` of what may not be a tensor.

        Raises:
            TypeError: It is none.
            ValueError: It is not a leaf, so that autograd keeps no gradient for it.
        """
        label = f"parameter {name!r}"
        backend = backend_for(param, label)
        if backend is not self:
            backend.gradients(np.fromiter([param], object, 1), [name], [0], needed=False)
        if not (param.is_leaf or param.retains_grad):
            raise ValueError(
                f"{label} is not a leaf tensor, so it has no .grad; expected a leaf: pass the "
                "tensor it was computed from"
            )
        grad: Array | None = param.grad
        return grad

    # A step

    def namespace(self, layout: Layout) -> Any:
        """NumPy for the CPU, torch for other devices."""
        return np if _on_cpu(layout) else array_api_compat.torch

    def to_compute(self, array: Array, layout: Layout) -> Array:
        """A NumPy view of a CPU tensor, or the detached tensor; float32 if it has 16 bits."""
        tensor = _resolved(array)
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        tensor = tensor.to(_DTYPES[layout.compute_dtype])
        return read_only(tensor.numpy()) if _on_cpu(layout) else tensor

    def to_slots(self, arrays: Sequence[Array], layout: Layout) -> list[Array]:
        """Tensors over the memory of NumPy arrays, or copies on the device of the layout."""
        return [
            x if isinstance(x, torch.Tensor) else _from_numpy(x).to(layout.device) for x in arrays
        ]

    def to_params(self, members: Sequence[Member], arrays: Sequence[Array]) -> list[Array]:
        """Tensors."""
        return [
            self.to_slots([array], member.layout)[0].to(getattr(torch, member.layout.storage_dtype))
            for member, array in zip(members, arrays, strict=True)
        ]

    def write(self, param: Array, values: Array) -> None:
        """Copy the values into the tensor; its version counter moves."""
        # The memory of a complex tensor that did not come as parts does not hold its values.
        with torch.no_grad():
            param.copy_(self.as_complex(values) if param.is_complex() else values)

    @_undisturbed
    def duplicate(self, param: Array) -> Array:
        """A leaf that requires a gradient if the tensor does; a ``Parameter`` if it is one."""
        with torch.no_grad():
            copy = param.detach().clone()
        if isinstance(param, torch.nn.Parameter):
            return torch.nn.Parameter(copy, param.requires_grad)
        return copy.requires_grad_(param.requires_grad)

    def group(self, rule: Rule, layout: Layout, has_masters: bool = False) -> Group:
        """Make a group of an engine of the CPU; of the reference engine on other devices."""
        if not _on_cpu(layout):
            return super().group(rule, layout, has_masters)
        return engines.group(self, layout, rule, has_masters, _look)

    def touch(self, arrays: np.ndarray) -> None:
        """Move the version counters, by which autograd knows that a tensor was written."""
        _increment_version(arrays)

    # Slots outside a step

    def to_host(self, array: Array) -> np.ndarray:
        """A copy on the CPU."""
        if isinstance(array, torch.Tensor):
            array = _resolved(array).cpu().numpy()
        return np.array(array)

    def export(self, array: Array, layout: Layout | None = None) -> Array:
        """A clone; of a NumPy array a tensor on the CPU."""
        return (array if isinstance(array, torch.Tensor) else _from_numpy(array)).clone()


#: By their addresses, the types of tensors that compiled code looks at.
KINDS = tuple(map(id, PLAIN))


_GRAD, _IS_LEAF, _BASE = attrgetter("grad"), attrgetter("is_leaf"), attrgetter("_base")
_IS_NEGATIVE = torch.Tensor.is_neg


def _look() -> Look | None:
    """How compiled code looks at tensors; None where torch has no DLPack table of C functions."""
    if not _LOOK:
        _LOOK.append(_found_look())
    return _LOOK[0]


_LOOK: list[Look | None] = []


def _found_look() -> Look | None:
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = pointer(capsule, b"dlpack_exchange_api")
    # struct DLPackExchangeAPI of DLPack 1.3: version (two 32-bit numbers), a pointer to an older
    # table, then functions; ``dltensor_from_py_object_no_sync`` is the fourth of them.
    if ctypes.c_uint32.from_address(table).value != 1:
        return None
    call = ctypes.c_uint64.from_address(table + 40).value
    # DLDataType: kDLFloat or kDLBfloat, the bits, one lane.
    codes = {"float16": 2 | 16 << 8, "float32": 2 | 32 << 8, "float64": 2 | 64 << 8}
    codes["bfloat16"] = 4 | 16 << 8
    kernel = look_kernel("look_torch")
    facts = {name: (*KINDS, code | 1 << 16, call) for name, code in codes.items()}
    return None if kernel is None else Look(kernel, facts.get, _are_plain)


def _increment_version(tensors: np.ndarray) -> None:
    torch.autograd.graph.increment_version(tensors.tolist())


def _are_plain(params: np.ndarray, grads: np.ndarray, own_grads: bool) -> bool:
    """Whether tensors may be updated, and their memory holds their values, as far as is not known.

    DLPack gives the memory of a tensor with the negative bit, such as ``x.conj().imag``, which
    holds the negatives. Strides reveal such views, except for those without dimensions.
    """
    if any(map(_IS_NEGATIVE, (*params, *grads))):
        return False
    if own_grads:
        return True
    if not all(map(_IS_LEAF, params)):
        return False
    if any(map(torch.Tensor.is_inference, params)) or torch.is_inference_mode_enabled():
        return False
    return all(base is None or base.grad_fn is None for base in map(_BASE, params))


def _resolved(tensor: torch.Tensor) -> torch.Tensor:
    """The values in memory; a view may say that they are the conjugates or negatives of it."""
    return tensor.detach().resolve_conj().resolve_neg()


def _from_numpy(array: Any) -> torch.Tensor:
    array = np.asarray(array)
    # A rule that leaves the parameter alone hands on what it may only read.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _is_captured(device: torch.device) -> bool:
    """Whether the current stream of a device is captured into a graph, as CUDA's can be."""
    module = getattr(torch, device.type, None)
    is_capturing = getattr(module, "is_current_stream_capturing", None)
    return is_capturing is not None and bool(is_capturing())


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is plain strided memory, not a stand-in for something else."""
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return False
    if tensor.device.type == "meta":
        return False
    try:
        # Not that of the tensor: functorch's give an offset from nowhere.
        address = tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return address != 0 or tensor.numel() == 0


class _Footprint:
    """The addresses of a tensor for ``np.shares_memory``, which reads none of them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()),
            "data": (tensor.data_ptr(), True),
        }
