"""A rule's update as a tape of NumPy operations, run in blocks that stay in the processor's cache.

``update(np, ...)`` on a large array writes a temporary as large as the array for each operation
and fetches it back from memory for the next. Here the update runs once on stand-ins that write
down what is done with them. The tape then runs block by block, each operation into memory that is
there already. The operations and their order are the same, and each of them treats every element
alike, so the numbers are the same.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NoReturn

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

__all__ = ["NotTraceable", "Tape"]

#: Bytes of one array in a block. Longer blocks leave the second-level cache, shorter ones pay more
#: for the calls.
BLOCK_BYTES = 1 << 17

#: What gives an element the same bits wherever it stands in an array: IEEE 754 fixes the results.
#: A vectorized ``exp`` need not, and ``x ** 2`` is not the operation that NumPy makes of it.
EXACT = {
    *(np.add, np.subtract, np.multiply, np.divide, np.sqrt, np.negative, np.absolute),
    *(np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal),
    *(np.logical_and, np.logical_or, np.logical_not, np.bitwise_and, np.bitwise_or, np.invert),
}


class NotTraceable(Exception):  # noqa: N818 -- an answer, to which the caller has another way
    """The update does what no tape repeats with the same numbers."""


class _StandIn:
    """What an update gets in place of an array or a number. It has no value to decide by."""

    def __init__(self, recorder: "_Recorder", sample: Any) -> None:
        self.recorder = recorder
        self.index = len(recorder.samples)
        recorder.samples.append(sample)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotTraceable("the update asks for the value of an array or of a coefficient")

    __bool__ = __array__ = _refuse


class _Number(_StandIn):
    """A coefficient. It meets arrays only; with another it would be rounded as the run has it."""

    def __neg__(self) -> "_Number":
        number = _Number(self.recorder, 1.0)
        self.recorder.negations.append((self.index, number.index))
        return number

    def __eq__(self, other: object) -> Any:
        # Python would compare identities once both sides have declined.
        return NotImplemented if isinstance(other, _Array) else self._refuse()


class _Array(NDArrayOperatorsMixin, _StandIn):
    """An array of the working dtype, or of booleans."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if ufunc not in EXACT or method != "__call__" or options:
            raise NotTraceable(f"the update uses numpy.{ufunc.__name__} ({method}, {options})")
        return self.recorder.record(ufunc, inputs)

    def __array_function__(self, function: Any, types: Any, inputs: Any, _: Any) -> Any:
        if function is not np.where:
            raise NotTraceable(f"the update uses numpy.{function.__name__}")
        if not (isinstance(inputs[0], _Array) and inputs[0].dtype_is(bool)):
            raise NotTraceable("the update uses numpy.where with a condition that is no comparison")
        return self.recorder.record(_select, inputs)

    def dtype_is(self, dtype: Any) -> bool:
        return bool(self.recorder.samples[self.index].dtype == dtype)


class _Recorder:
    """What an update does. Values have numbers: the inputs first, then others as they appear.

    Attributes:
        samples: For each value an empty array of its dtype, or a Python number: NumPy itself says
            what dtype comes of an operation.
        operations: What is done: function, numbers of the inputs, number of the result.
        negations: The coefficients that are the negative of another: source, result.
        literals: The literals of the update, by their numbers.
        results: The numbers of the new parameter and the new slots.
    """

    def __init__(self, update: Any, scalars: Any, slot_count: int, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.samples: list[Any] = []
        self.operations: list[tuple[Callable[..., Any], list[int], int]] = []
        self.negations: list[tuple[int, int]] = []
        self.literals: dict[int, Any] = {}
        param, grad, *slots = (_Array(self, np.empty(0, dtype)) for _ in range(2 + slot_count))
        # A switch is itself; its number keeps the place.
        pairs = [(x, _Number(self, 1.0)) for x in scalars]
        c = scalars._make(x if isinstance(x, bool | np.bool_) else n for x, n in pairs)
        try:
            new_param, new_slots = update(np, param, grad, tuple(slots), c)
        except NotTraceable:
            raise
        except Exception as error:
            raise NotTraceable(f"the update fails on stand-ins for arrays: {error}") from error
        if not isinstance(new_slots, tuple) or len(new_slots) != slot_count:
            raise NotTraceable(f"the update returns {new_slots!r} as {slot_count} slots")
        for result in (new_param, *new_slots):
            if not (isinstance(result, _Array) and result.dtype_is(dtype)):
                raise NotTraceable(f"the update returns {result!r}, which is no array of {dtype}")
        self.results = [result.index for result in (new_param, *new_slots)]

    def record(self, function: Callable[..., Any], inputs: Sequence[Any]) -> _Array:
        """Write an operation down and return what stands for its result."""
        numbers = [self._number(value) for value in inputs]
        plain = np.where if function is _select else function
        sample = plain(*(self.samples[number] for number in numbers))
        if sample.dtype not in (self.dtype, bool):
            raise NotTraceable(f"the update computes in {sample.dtype}, not in {self.dtype}")
        result = _Array(self, sample)
        self.operations.append((function, numbers, result.index))
        return result

    def _number(self, value: Any) -> int:
        if isinstance(value, _StandIn):
            return value.index
        if not isinstance(value, int | float | np.number):
            raise NotTraceable(f"the update computes with {value!r}")
        literal = _Number(self, value).index
        self.literals[literal] = value
        return literal


class Tape:
    """An update for a number of slots, a setting of the switches and a dtype.

    Every value has a register, a place in a list that is made for each block: first the block's
    part of each array, then coefficients, literals and scratch memory. A register is free once
    its value has been read for the last time; the next result may go there, over an input of its
    own operation too. The parameter and each slot are registers and at the same time the home of
    one result. It is computed right there if its home is free by then; if not, it is computed
    elsewhere and moved home at the end of the block.

    Args:
        update: The rule's formula.
        scalars: The named tuple of coefficients at any step. Switches (bools) stay as they are
            here, numbers do not matter.
        slot_count: How many slots there are.
        dtype: ``"float32"`` or ``"float64"``.

    Raises:
        NotTraceable: The update does what no tape repeats with the same numbers.
    """

    def __init__(self, update: Any, scalars: Any, slot_count: int, dtype: str) -> None:
        """Trace the update and give every value its register."""
        self._dtype = np.dtype(dtype)
        self._scratch: list[np.dtype] = []
        self._program: list[tuple[Callable[..., Any], itemgetter[Any]]] = []
        trace = _Recorder(update, scalars, slot_count, self._dtype)
        computed = {value for _, _, value in trace.operations}
        fixed = [value for value in range(len(trace.samples)) if value not in computed]
        register = {value: k for k, value in enumerate(fixed)}
        self._negations = [(register[x], register[y]) for x, y in trace.negations]
        # After the inputs: literals, and None to be replaced by a negative.
        self._literals = [trace.literals.get(v) for v in fixed[2 + slot_count + len(scalars) :]]

        last = {v: step for step, (_, inputs, _) in enumerate(trace.operations) for v in inputs}
        last |= dict.fromkeys(trace.results, len(trace.operations))
        homes = [0, *range(2, 2 + slot_count)]
        # All registers that may be written. The gradient belongs to the caller.
        dtypes = dict.fromkeys(homes, self._dtype)
        free: list[int] = []

        # Where ``_select`` makes a mask as wide as the results, by their width.
        masks: dict[int, int] = {}

        def scratch(kind: np.dtype) -> int:
            self._scratch.append(kind)
            new = len(fixed) + len(self._scratch) - 1
            dtypes[new] = kind
            return new

        for step, (function, inputs, value) in enumerate(trace.operations):
            sources = [register[v] for v in inputs]
            dying = dict.fromkeys(register[v] for v in inputs if last[v] == step)
            free += [k for k in dying if k in dtypes]
            # ``_select`` reads its mask and its first choice when it has begun to write.
            barred = sources[:2] if function is _select else []
            kind = trace.samples[value].dtype
            fit = [k for k in free if dtypes[k] == kind and k not in barred]
            own = [k for k, v in zip(homes, trace.results, strict=True) if v == value and k in fit]
            target = own[0] if own else fit[-1] if fit else scratch(kind)
            register[value] = target
            free = [k for k in free if k != target]
            places = [*sources, target]
            if function is _select:
                width = kind.itemsize
                if width not in masks:
                    self._scratch.append(np.dtype(f"i{width}"))
                    masks[width] = len(fixed) + len(self._scratch) - 1
                places.append(masks[width])
            self._program.append((function, itemgetter(*places)))

        ends = zip(homes, (register[v] for v in trace.results), strict=True)
        moves = {end: source for end, source in ends if end != source}
        for end, source in moves.items():
            # What another move will overwrite is brought to safety first.
            if source in moves:
                moves[end] = scratch(self._dtype)
                self._program.append((_copy, itemgetter(source, moves[end])))
        self._program += [(_copy, itemgetter(source, end)) for end, source in moves.items()]

    def run(
        self,
        param: np.ndarray,
        grad: np.ndarray,
        slots: Sequence[np.ndarray],
        scalars: Sequence[float | np.ndarray],
        room: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Update a parameter and its slots in place.

        Several threads may run one tape: its scratch memory belongs to the call.

        Args:
            param: A contiguous array of one axis and the dtype of the tape, as all arrays here.
            grad: The gradient, which is not written. It shares no memory with the others.
            slots: The slots.
            scalars: The coefficients in their order, rounded to the dtype: each a Python float for
                all elements or an array with one for each. The switches are not looked at.
            room: What ``room`` made for as many elements, or for more; by default that.
        """
        size = param.size
        length = self._length(size)
        inputs = (param, grad, *slots, *scalars)
        scratch = self.room(size) if room is None else room
        for start in range(0, size, max(length, 1)):
            block = slice(start, start + length)
            registers: list[Any] = [x[block] if isinstance(x, np.ndarray) else x for x in inputs]
            registers += self._literals
            # The last block may be shorter, and the room longer.
            registers += [x[: min(length, size - start)] for x in scratch]
            for source, target in self._negations:
                registers[target] = -registers[source]
            for function, operands in self._program:
                function(*operands(registers))

    def room(self, size: int) -> list[np.ndarray]:
        """All the memory that a run on so many elements needs: a run with it makes no array."""
        return [np.empty(self._length(size), kind) for kind in self._scratch]

    def _length(self, size: int) -> int:
        return min(size, BLOCK_BYTES // self._dtype.itemsize)


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out, source)


def _select(mask: np.ndarray, a: Any, b: Any, out: np.ndarray, room: np.ndarray) -> None:
    """``numpy.where`` with a place for the result, which may be that of ``b``.

    Where few elements are chosen (a clip, a NaN), a masked copy is the fastest. Where they are
    many, it mispredicts a branch for each; the bits of ``a`` then take up their difference from
    those of ``b``, multiplied by 0 or 1. ``room`` has integers as wide as the numbers.
    """
    if 32 * np.count_nonzero(mask) < mask.size:
        if out is not b:
            np.copyto(out, b)
        np.copyto(out, a, where=mask)
        return
    a, b = (np.asarray(x, out.dtype).view(room.dtype) for x in (a, b))
    out = out.view(room.dtype)
    # No ufunc casts here, for which NumPy would take memory of its own.
    np.logical_not(mask, out=mask)
    np.copyto(room, mask)
    np.logical_not(mask, out=mask)
    np.bitwise_xor(a, b, out=out)
    np.multiply(out, room, out=out)
    np.bitwise_xor(out, a, out=out)
