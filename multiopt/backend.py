"""How an array finds its backend, and what a backend does for the registry.

A backend knows one array library: how to inspect an array, where to compute with it, how to write
the result back. The base class serves any Array API library with the rule as it stands; the
packages under ``backends/`` refine it for one library each.
"""

import ctypes
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from numbers import Integral, Number
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import array_api_compat
import numpy as np

from multiopt.errors import brief
from multiopt.interruption import fails_again
from multiopt.rules import Adam
from multiopt.rules.arithmetic import clamp, sum_of_squares
from multiopt.rules.rule import Rule, Update

__all__ = [
    "COMPUTE_DTYPE",
    "Array",
    "Backend",
    "Batch",
    "Layout",
    "Limits",
    "Member",
    "Now",
    "Result",
    "Scaling",
    "Task",
    "backend_of",
    "by_backend",
    "identities",
    "named",
    "objects",
]

#: An array of any library.
Array: TypeAlias = Any

#: What a library answers.
Answer = TypeVar("Answer")

#: The dtypes of parameters, and the dtype in which each one is computed and keeps its slots.
COMPUTE_DTYPE: Mapping[str, str] = {
    "bfloat16": "float32",
    "float16": "float32",
    "float32": "float32",
    "float64": "float64",
}

#: Complex dtypes, and that of their two parts, in which each is computed.
PARTS_OF: Mapping[str, str] = {"complex64": "float32", "complex128": "float64"}

#: The libraries with a package of their own. A library that nothing has imported is never asked.
PACKAGES: Mapping[str, str] = {
    "numpy": "multiopt_numpy",
    "torch": "multiopt_torch",
    "jax": "multiopt_jax",
}

#: What DLPack calls the host.
CPU = 1

#: The namespace in which array-api-compat has Dask.
DASK = "array_api_compat.dask.array"


class Layout(NamedTuple):
    """What is known of a parameter without holding it: plain data, equal across processes.

    A complex array counts as the array of its real and imaginary parts, which stand side by side
    along one more axis.

    Attributes:
        library: A key of ``PACKAGES``, or the module name of another Array API namespace.
        shape: As in NumPy.
        dtype: A key of ``COMPUTE_DTYPE``.
        device: As the library writes it.
        is_complex: Whether it is complex.
    """

    library: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    is_complex: bool = False

    @classmethod
    def of(cls, library: str, shape: Iterable[int], dtype: str, device: str) -> "Layout":
        """That of an array, complex or not."""
        if dtype in PARTS_OF:
            return cls(library, (*shape, 2), PARTS_OF[dtype], device, is_complex=True)
        return cls(library, tuple(shape), dtype, device)

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape that the array itself has."""
        return self.shape[:-1] if self.is_complex else self.shape

    @property
    def own_dtype(self) -> str:
        """The dtype that the array itself has."""
        if self.is_complex:
            return next(name for name, part in PARTS_OF.items() if part == self.dtype)
        return self.dtype

    @property
    def compute_dtype(self) -> str:
        """The dtype of the computation and of the slots."""
        return COMPUTE_DTYPE[self.dtype]


@dataclass(slots=True)
class Task:
    """One parameter's share of a step, as the registry hands it to a backend.

    Attributes:
        name: The parameter's name.
        backend: Where it runs.
        param: Its array, or the parts of a complex one, which only ``Backend.write`` may change.
        grad: Its gradient, which nothing may change.
        layout: The parameter's layout.
        slots: The slots in the order of the rule, in the form in which the backend keeps them.
        update: The rule's formula.
        elementwise: ``Rule.elementwise``.
        master: The float32 array that a 16-bit parameter was rounded from, if that is kept.
        scalars: The numbers of the step, rounded to the compute dtype.
        scales: Clip coefficients, rounded to the compute dtype, applied one after the other.
        bound: Bound of each element of the scaled gradient, rounded likewise, or None.
    """

    name: str
    backend: "Backend"
    param: Array
    grad: Array
    layout: Layout
    slots: tuple[Array, ...]
    update: Update
    elementwise: bool
    master: Array | None
    scalars: Any
    scales: list[float] = field(default_factory=list)
    bound: float | None = None


class Result(NamedTuple):
    """What a backend computed for one task; nothing is written yet.

    Attributes:
        param: The new parameter as ``write`` takes it.
        slots: The new slots, in the form in which the backend keeps them.
        grad: The clipped gradient, in the namespace of the computation.
        master: What the new parameter is rounded from, if the task has a master copy.
        limited: Whether the bound changed an element: anything with a truth value, such as a 0-d
            array that is still on its device.
    """

    param: Array
    slots: tuple[Array, ...]
    grad: Array
    master: Array | None
    limited: Any


class Member(NamedTuple):
    """What a batch knows of one of its parameters, for as long as the batch is in use.

    Attributes:
        rule: Its rule.
        layout: Its layout.
        slots: Its slots as NumPy arrays over their memory, which the batch updates; None where
            they are lent anew for each step.
    """

    rule: Rule
    layout: Layout
    slots: tuple[np.ndarray, ...] | None


class Now(NamedTuple):
    """A rule with the numbers that its schedules give at a step.

    Attributes:
        rule: The rule, without schedules.
        where: The positions that have it.
    """

    rule: Rule
    where: np.ndarray


class Batch(ABC):
    """Parameters that one engine updates together, in place, in the memory of the host.

    A batch knows rules and slots. What the parameters and gradients are it reads at every step,
    since they may have been replaced, moved or reshaped in between. Positions count its members.
    """

    @abstractmethod
    def look(self, params: np.ndarray, grads: np.ndarray, leaves: bool) -> np.ndarray:
        """Take the arrays of a step as they are now; nothing is changed yet.

        Args:
            params: The parameters, an array of objects.
            grads: The gradients, likewise; None for none.
            leaves: Whether ``Backend.gradients`` gave them, for these parameters.

        Returns:
            The positions whose arrays are not what the engine takes as they are. Those must be
            looked at in Python, and be lent or left out.
        """

    def homes(self) -> Sequence[tuple[Array, ...]]:
        """Arrays that are the slots of the members from now on; none where they stay."""
        return ()

    def ready(
        self,
        params: np.ndarray,
        grads: np.ndarray,
        leaves: bool,
        steps: np.ndarray,
        now: Sequence[Now],
        limits: "Limits | None",
        writes_grads: bool,
    ) -> bool:
        """Look, and if nothing is out of the ordinary, make all that ``advance`` needs.

        Args:
            params: The parameters, as for ``look``.
            grads: The gradients, likewise.
            leaves: As for ``look``.
            steps: As for ``prepare``.
            now: As for ``prepare``.
            limits: How to clip; None for no clipping.
            writes_grads: Whether clipped gradients are to be written over the gradients.

        Returns:
            Whether ``advance`` may follow; else the step is to be taken in its single parts.
        """
        return False

    def advance(
        self,
        steps: np.ndarray,
        limits: "Limits | None",
        leave_clipped: bool,
        threads: int | None,
    ) -> np.ndarray:
        """Clip and update everything, and count the step, at once: no signal comes between.

        Args:
            steps: As for ``ready``; each is 1 more afterwards.
            limits: As for ``ready``.
            leave_clipped: As for ``prepare``.
            threads: As for ``prepare``.

        Returns:
            As ``clipped``.
        """
        raise NotImplementedError

    def clipped(self) -> np.ndarray:
        """By position, whether the last ``advance`` clipped the gradient; it is overwritten."""
        raise NotImplementedError

    @abstractmethod
    def lend(
        self, position: int, param: np.ndarray, grad: np.ndarray, slots: tuple[np.ndarray, ...]
    ) -> None:
        """Take C-contiguous arrays in the compute dtype for a position, this step only."""

    @abstractmethod
    def slots_of(self, position: int) -> tuple[np.ndarray, ...] | None:
        """The slots of a member, as it was given."""

    @abstractmethod
    def is_apart(self, writes_grads: bool) -> bool:
        """Whether it is known that no parameter overlaps with another or with a gradient.

        Args:
            writes_grads: Whether no gradient may overlap with another one either.
        """

    @abstractmethod
    def spans(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the parameters and where the gradients of these positions are.

        Returns:
            For either an array of two rows: where each begins, and where it ends.
        """

    @abstractmethod
    def finite(self, index: np.ndarray, threads: int | None) -> np.ndarray:
        """For each of these positions whether its gradient has no infinity and no NaN."""

    @abstractmethod
    def sums_of_squares(
        self, index: np.ndarray, own: np.ndarray, factor: float, threads: int | None
    ) -> np.ndarray:
        """For each of these positions the sum of squares of its gradient.

        Args:
            index: Positions.
            own: By position, what the gradient is multiplied by first, in the compute dtype.
            factor: What it is multiplied by next, in float64.
            threads: The largest number of threads, or None.
        """

    @abstractmethod
    def prepare(
        self,
        index: np.ndarray,
        steps: np.ndarray,
        now: Sequence[Now],
        scaling: "Scaling | None",
        leave_clipped: bool,
        threads: int | None,
    ) -> None:
        """Make all that may fail of a step of these positions, the memory that it needs included.

        Args:
            index: Positions.
            steps: By position, the steps taken before this one.
            now: The rules at this step of those positions whose rule has schedules.
            scaling: By position, how gradients are clipped; None if none is.
            leave_clipped: Whether to write clipped gradients over the gradients.
            threads: The largest number of threads, or None.
        """

    @abstractmethod
    def run(self) -> np.ndarray:
        """Clip and update what was prepared. Nothing fails any more, and no array is made.

        A signal may come between; who calls it keeps them off.

        Returns:
            By position, whether the gradient was clipped.
        """


class Scaling(NamedTuple):
    """How the gradients of a step are clipped: float64 arrays with a number for each parameter.

    Attributes:
        own: Coefficients of norms.
        shared: Coefficients of global norms.
        bound: Bounds of elements, infinite for none.
    """

    own: np.ndarray
    shared: np.ndarray
    bound: np.ndarray

    def scales(self) -> np.ndarray:
        """Whether a norm clips the gradient."""
        scales: np.ndarray = (self.own != 1) | (self.shared != 1)
        return scales

    def at(self, where: np.ndarray) -> "Scaling":
        """Those of some parameters."""
        return Scaling(self.own[where], self.shared[where], self.bound[where])


class Limits(NamedTuple):
    """What gradients are held to, by position, for an engine that measures them itself.

    Attributes:
        norm_bounds: Bounds of their norms, NaN for none.
        eps: Added to a norm before it divides.
        norms: Filled by the engine: the norms.
        scaling: ``own`` is filled by the engine, ``shared`` is 1.
    """

    norm_bounds: np.ndarray
    eps: np.ndarray
    norms: np.ndarray
    scaling: Scaling


class Backend:
    """The rule as it stands on any Array API library; new arrays come back.

    Args:
        library: The name by which ``named`` finds it: the module name of the namespace.
    """

    #: Whether ``write`` changes the parameter. If not, a new array takes its place, and a batch is
    #: lent copies of everything.
    in_place: ClassVar[bool] = False

    def __init__(self, library: str) -> None:
        """Serve the namespace of this name."""
        self.library = library
        #: The dtypes, devices and kinds of which it is known that they can do what is needed.
        self._tried: set[tuple[str, str, bool]] = set()

    # What an array is

    def layout(self, array: Array, label: str) -> Layout:
        """Inspect an array.

        Args:
            array: An array of this library.
            label: What the array is, for messages, as in ``parameter 'loc'``.

        Raises:
            TypeError: It is an array that no rule can work with.
        """
        what = f"{label} is a {type(array).__name__} of {self.library}"
        dtype, shape, device = answer(f"{what}, which does not say what it is", _facts, array)
        require_dtype(dtype, label)
        layout = Layout.of(self.library, shape, dtype, device)
        kind = layout.dtype, device, layout.is_complex
        if kind not in self._tried:
            answer(f"{what}, which cannot do what a step and a checkpoint need", self._try, layout)
            self._tried.add(kind)
        return layout

    def _try(self, layout: Layout) -> None:
        """Take a step of two numbers on their way to the library and back."""
        xp, layout = self.namespace(layout), layout._replace(shape=(2,))
        numbers = np.array([0.5, 2.0], layout.compute_dtype)
        slot = self.from_host(numbers, layout)
        back = self.to_host(slot)
        if back.dtype != numbers.dtype or back.tolist() != numbers.tolist():
            raise TypeError(f"{brief(numbers)} comes back as {brief(back)}")
        param = xp.astype(slot, getattr(xp, layout.dtype))
        rule = Adam(amsgrad=True)
        task = Task(
            *("", self, param, param, layout, (slot,) * len(rule.slots), rule.update, True, None),
            *(rule.coefficients(1, layout.compute_dtype), [0.5], 1.0),
        )
        bool(self._finite(task))
        result = self._run(task)
        if layout.is_complex:
            self.parts(self.whole(result.param))
        self.to_host(result.slots[0])

    def bare(self, array: Array) -> Array:
        """The array over the same memory, without what a class of the user's makes of it."""
        return array

    def parts(self, array: Array) -> Array:
        """The real and imaginary parts of a complex array along one more axis.

        Where arrays can be written, it is a view.
        """
        xp = import_module(self.library)
        return xp.stack([xp.real(array), xp.imag(array)], axis=-1)

    def whole(self, parts: Array) -> Array:
        """The complex array of such parts."""
        host = np.ascontiguousarray(self.to_host(parts))
        complex_ = next(name for name, part in PARTS_OF.items() if part == host.dtype.name)
        xp, device = import_module(self.library), array_api_compat.device(parts)
        return xp.asarray(host.view(complex_)[..., 0], device=device)

    def check_surroundings(self, label: str) -> None:
        """Refuse a step where this library has no values to compute with.

        Raises:
            TypeError: A transformation of the library is at work.
        """

    def check_writable(self, param: Array, label: str) -> None:
        """Refuse a parameter that cannot be updated.

        Raises:
            ValueError: The array cannot be written, or has fewer places than elements.
        """

    def memory(self, param: Array) -> np.ndarray | None:
        """A NumPy array over the addresses that an update writes; None if it writes none."""
        return None

    def gradient(self, param: Array, label: str) -> Array | None:
        """The gradient that an array carries itself, as torch's do.

        Raises:
            TypeError: Arrays of this library carry none.
        """
        raise TypeError(
            f"{label} is a {self.library} array, which carries no gradient; "
            "pass the gradients as the second argument: step(params, grads)"
        )

    def takes_gradients(self, param: Array) -> bool:
        """Whether a backward may leave a gradient with the array."""
        return False

    # A step

    def namespace(self, layout: Layout) -> Any:
        """The Array API namespace that computes for a layout."""
        return import_module(self.library)

    def opened(self, array: Array, layout: Layout) -> Array:
        """An array ready for the computation: in its namespace, in the compute dtype."""
        xp = self.namespace(layout)
        return xp.astype(array, getattr(xp, layout.compute_dtype), copy=False)

    def resumed(self, task: Task) -> Array:
        """The parameter ready for the computation: its master copy, where that rounds to it.

        Where it does not, the parameter was changed by somebody else, or there was no step yet.
        """
        param = self.opened(task.param, task.layout)
        if task.master is None:
            return param
        master = self.opened(task.master, task.layout)
        rounded = self.opened(self.rounded(task.master, task), task.layout)
        return self.namespace(task.layout).where(rounded == param, master, param)

    def rounded(self, master: Array, task: Task) -> Array:
        """A master copy rounded to the dtype of its parameter."""
        return self.namespace(task.layout).astype(master, task.param.dtype)

    def closed(self, computed: Array, param: Array) -> Array:
        """A computed array in the form in which slots are kept."""
        return computed

    def sums_of_squares(self, tasks: Sequence[Task], factor: float) -> list[float]:
        """For each task the sum of squares of its gradient, scaled so far, times ``factor``.

        Raises:
            TypeError: The device has no float64.
        """
        return [
            answer(
                f"the norm of the gradient of {task.name!r} is a float64, which {self.library} "
                f"does not compute on the device {task.layout.device}",
                lambda task=task: float(self._sum_of_squares(task, factor)),
            )
            for task in tasks
        ]

    def _sum_of_squares(self, task: Task, factor: float) -> Array:
        xp = self.namespace(task.layout)
        grad = xp.astype(self._scaled(task), xp.float64, copy=False)
        return sum_of_squares(xp, grad if factor == 1 else factor * grad)

    def finite(self, tasks: Sequence[Task]) -> list[bool]:
        """For each task whether its gradient, as it came in, has no infinity and no NaN."""
        return [bool(self._finite(task)) for task in tasks]

    def _finite(self, task: Task) -> Array:
        xp = self.namespace(task.layout)
        return xp.all(xp.isfinite(self.opened(task.grad, task.layout)))

    def _scaled(self, task: Task) -> Array:
        grad = self.opened(task.grad, task.layout)
        for scale in task.scales:
            if scale != 1:
                grad = scale * grad
        return grad

    def kind(self, rule: Rule, layout: Layout) -> Hashable | None:
        """What parameters must have in common to be in one batch; None if there are no batches."""
        return None

    def batch(self, kind: Hashable, members: Sequence[Member]) -> Batch:
        """A batch of parameters of one kind."""
        raise NotImplementedError

    def gradients(self, params: np.ndarray) -> np.ndarray | None:
        """The gradients that arrays carry themselves, all at once; None if they must be asked."""
        return None

    def memory_of(self, array: Array) -> np.ndarray | None:
        """A NumPy array over the memory of a CPU array, read-only if that must not change."""
        return None

    def touch(self, arrays: np.ndarray) -> None:
        """Let a library know that the memory of its arrays is about to be written."""

    def run(self, tasks: Sequence[Task]) -> list[Result]:
        """Clip, then update, all parameters of a step on this backend; write nothing."""
        return [self._run(task) for task in tasks]

    def _run(self, task: Task) -> Result:
        xp = self.namespace(task.layout)
        grad, limited = self._scaled(task), False
        if task.bound is not None:
            limited = xp.any(xp.abs(grad) > task.bound)
            grad = clamp(xp, grad, task.bound)
        param = self.resumed(task)
        if not task.elementwise:
            # A matrix product depends on strides, which ``asarray`` keeps.
            param, grad = (_in_rows(xp, x) for x in (param, grad))
        slots = tuple(self.opened(slot, task.layout) for slot in task.slots)
        try:
            new_param, new_slots = task.update(xp, param, grad, slots, task.scalars)
        except Exception as error:
            error.add_note(f"while the rule updated parameter {task.name!r}")
            raise
        _check_update(task, param, new_param, new_slots)
        # A rule may hand on what it was given as a slot; what the caller lent is not ours to keep.
        kept = [
            xp.asarray(slot, copy=True) if _is_part(slot, (param, grad, *slots)) else slot
            for slot in (*new_slots, *([] if task.master is None else [new_param]))
        ]
        closed = [self.closed(slot, task.param) for slot in kept]
        master = None if task.master is None else closed.pop()
        return Result(self.ready(task, new_param), tuple(closed), grad, master, limited)

    def ready(self, task: Task, computed: Array) -> Array:
        """The computed parameter as ``write`` takes it: all of its writing that may fail.

        Where parameters are written in place it has the memory of ``computed``, and follows it.
        """
        xp = self.namespace(task.layout)
        return xp.astype(computed, getattr(xp, task.layout.dtype), copy=False)

    def all_ready(self, tasks: Sequence[Task], computed: Sequence[Array]) -> list[Array]:
        """``ready`` for many."""
        return [self.ready(task, array) for task, array in zip(tasks, computed, strict=True)]

    def write(self, task: Task, ready: Array) -> None:
        """Turn the caller's parameter into the computed one, where that is done in place."""
        raise NotImplementedError

    # Slots outside a step

    def zeros(self, layout: Layout) -> Array:
        """A new slot."""
        return self.from_host(np.zeros(layout.shape, layout.compute_dtype), layout)

    def to_host(self, array: Array) -> np.ndarray:
        """A slot as a NumPy array of its own."""
        if hasattr(array, "__dlpack__"):
            # Older libraries cannot be asked to bring it, and need not where it is there.
            is_there = array.__dlpack_device__()[0] == CPU
            array = np.from_dlpack(array, device=None if is_there else "cpu")
        return np.array(array)

    def from_host(self, array: np.ndarray, layout: Layout) -> Array:
        """A NumPy array, which nobody else writes any more, as a slot for a layout."""
        xp = import_module(self.library)
        devices = xp.__array_namespace_info__().devices()
        device = next((d for d in devices if str(d) == layout.device), None)
        return xp.asarray(array, device=device)

    def shown(self, array: Array, layout: Layout) -> Array:
        """A slot as a user gets it: a copy in the parameter's library."""
        return import_module(self.library).asarray(array, copy=True)

    def copied(self, array: np.ndarray) -> Array:
        """A NumPy array as a user gets it: a copy in this library, where it puts new arrays."""
        return import_module(self.library).asarray(array, copy=True)


class DaskBackend(Backend):
    """Dask arrays, computed at every step.

    Left as they come, they would be plans of all steps so far: 40 steps of 120 numbers took 27 s.
    """

    def run(self, tasks: Sequence[Task]) -> list[Result]:
        """See ``Backend``."""
        results = super().run(tasks)
        plans = [(result.param, result.slots, result.master) for result in results]
        (computed,) = import_module("dask").persist(plans)
        return [
            result._replace(param=param, slots=slots, master=master)
            for result, (param, slots, master) in zip(results, computed, strict=True)
        ]


def objects(things: Iterable[Any]) -> np.ndarray:
    """A one-dimensional array of objects, whatever they are."""
    things = list(things)
    return np.fromiter(things, object, len(things))


def identities(objects: np.ndarray) -> bytes:
    """What ``id`` gives for each of the objects: they are the memory of an array of objects."""
    return ctypes.string_at(objects.ctypes.data, objects.nbytes)


def by_backend(tasks: Iterable[Task]) -> list[tuple[Backend, list[Task]]]:
    """The tasks of each backend, in their order."""
    groups: dict[Backend, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.backend, []).append(task)
    return list(groups.items())


def answer(fault: str, ask: Callable[..., Answer], *arguments: Any) -> Answer:
    """What a library answers.

    Args:
        fault: What its error means.
        ask: What asks it.
        *arguments: What that takes.

    Raises:
        TypeError: It raises an error of its own.
    """
    try:
        return ask(*arguments)
    except MemoryError:
        raise
    except Exception as error:  # of any kind: libraries have their own
        if not fails_again(ask, *arguments):
            raise
        raise TypeError(
            f"{fault}: {brief(error)}; expected an array of NumPy, PyTorch, JAX or another library "
            "with the whole Array API: convert it"
        ) from error


def _facts(array: Array) -> tuple[str, tuple[int, ...], str]:
    """The dtype, the shape and the device of an array."""
    shape = tuple(array.shape)
    if not all(isinstance(n, Integral) for n in shape):
        raise TypeError(f"its shape {brief(shape)} is not known yet")
    device = str(array_api_compat.device(array))
    return str(array.dtype).rpartition(".")[2], tuple(map(int, shape)), device


def require_dtype(dtype: str, label: str) -> None:
    """Refuse a dtype that no rule can work with.

    Raises:
        TypeError: It is no floating dtype.
    """
    known = [*COMPUTE_DTYPE, *PARTS_OF]
    if dtype not in known:
        raise TypeError(
            f"{label} has dtype {dtype}; expected one of {', '.join(sorted(known))}: convert it to "
            "a floating dtype"
        )


def _check_update(task: Task, param: Array, new_param: Array, new_slots: Any) -> None:
    """Refuse what is no update of a parameter.

    Raises:
        TypeError: The rule broke its contract.
    """
    if not isinstance(new_slots, tuple) or len(new_slots) != len(task.slots):
        raise TypeError(
            f"the rule of parameter {task.name!r} returned {brief(new_slots)} as slots; expected a "
            f"tuple of {len(task.slots)}, as many as it has"
        )
    for old, new in zip((param, *task.slots), (new_param, *new_slots), strict=True):
        if new.dtype != param.dtype or new.shape != old.shape:
            raise TypeError(
                f"the rule of parameter {task.name!r} returned an array of shape "
                f"{tuple(new.shape)} and dtype {new.dtype}; expected {tuple(old.shape)} and "
                f"{param.dtype}: an update has no literals and keeps shapes"
            )


def _in_rows(xp: Any, array: Array) -> Array:
    """A copy in row-major order."""
    return xp.reshape(xp.reshape(array, (-1,), copy=True), array.shape)


def _is_part(array: Array, lent: tuple[Array, ...]) -> bool:
    """Whether an array is one of others, or, in NumPy, may be a view of one."""
    if isinstance(array, np.ndarray):
        return any(np.may_share_memory(array, other) for other in lent)
    return any(array is other for other in lent)


@cache
def named(library: str) -> Backend:
    """The backend of a library, by the name that a ``Layout`` has."""
    if library in PACKAGES:
        backend: Backend = import_module(PACKAGES[library]).BACKEND
        return backend
    return DaskBackend(library) if library == DASK else Backend(library)


def backend_of(array: Any, label: str) -> Backend:
    """The backend of an array.

    Args:
        array: Any object.
        label: What it is, for messages, as in ``parameter 'loc'``.

    Raises:
        TypeError: It is no array.

    >>> backend_of(np.zeros(2), "parameter 'loc'").library
    'numpy'
    """
    backend = _backend_by_type.get(type(array))
    if backend is None:
        backend = _backend_by_type[type(array)] = _find_backend(array, label)
    return backend


_backend_by_type: dict[type, Backend] = {}


def _find_backend(array: Any, label: str) -> Backend:
    if isinstance(array, np.ndarray):
        return named("numpy")
    if isinstance(array, Number | np.generic | list | tuple | Mapping):
        raise TypeError(f"{label} is {_no_array(array)}")
    what = f"{label} is a {type(array).__name__}"
    library = answer(f"{what} of no library", _library, array)
    if library is None:
        raise TypeError(
            f"{what}; expected an array of NumPy, PyTorch, JAX or another Array API library"
        )
    return named(library)


def _library(array: Any) -> str | None:
    """The name by which ``named`` finds the backend of an array; None if it is none."""
    if "torch" in sys.modules and array_api_compat.is_torch_array(array):
        return "torch"
    if "jax" in sys.modules and array_api_compat.is_jax_array(array):
        return "jax"
    if not array_api_compat.is_array_api_obj(array):
        return None
    name: str = array_api_compat.array_namespace(array).__name__
    if name in PACKAGES:
        raise TypeError(f"it names {name}, but is none of its arrays")
    return name


def _no_array(given: Any) -> str:
    """What was given instead of an array, and what to do."""
    kind = type(given).__name__
    if isinstance(given, Mapping):
        return (
            f"a {kind} of {len(given)}; expected an array, for names are flat: flatten it, as in "
            "{'layer.w': ..., 'layer.b': ...}"
        )
    if not isinstance(given, list | tuple):
        return f"{brief(given)}, a {kind}; expected an array: use np.asarray"
    if all(isinstance(part, Number) for part in given):
        return f"a {kind} of {len(given)}; expected an array: use np.asarray"
    return (
        f"a {kind} of {len(given)}; expected an array: make it one, or give each part a name of "
        "its own, as in {'layer.0': ..., 'layer.1': ...}"
    )
