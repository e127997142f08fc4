"""Tapes: traces as programs of NumPy operations, run on blocks that fit in the processor's cache.

For each operation on a large array, ``update(np, ...)`` writes a temporary array of the same size
to memory, and the next operation reads it back. A tape runs all operations on one block before it
goes on to the next, and writes their results to memory that was allocated once. The operations and
their order are the same, and each of them treats every element alike, so the results are equal.

>>> def descend(xp, param, grad, slots, c):
...     return param - c.lr * grad, slots
>>> tape = tapes(descend, 0, {"lr": Kind.NUMBER}, "float64")[()]
>>> param, grad = np.zeros(100_000), np.ones(100_000)
>>> tape.run(param, grad, slots=(), scalars=[0.5])
>>> bool((param == -0.5).all())
True
>>> [memory.size for memory in tape.room(param.size)]  # for ``c.lr * grad``, a block at a time
[16384]
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np

from multiopt_kernels.operations import Kind, Trace
from multiopt_kernels.trace import trace_update

__all__ = ["Tape", "Tapes", "tapes"]

#: The size of one array in a block, in bytes. Longer blocks do not fit into the second-level cache;
#: with shorter ones the calls cost more.
BLOCK_BYTES = 1 << 17


class Tape:
    """The program of an update for one setting of its switches and one dtype.

    Every value has a register: an index into a list that is filled for each block, first with the
    block's part of each array, then with coefficients, literals and scratch memory. A register is
    free once its value has been read for the last time. The next result may then be written to it,
    even if the value is an input of the same operation. The registers of the parameter and of the
    slots are also the homes of the results: a result is computed in its home if that is free by
    then; otherwise it is computed elsewhere and moved home at the end of the block.

    Args:
        trace: The trace from ``trace_update``, for switches that do not change.
        slots: The number of slots.
        dtype: ``"float32"`` or ``"float64"``.
    """

    def __init__(self, trace: Trace, slots: int, dtype: str) -> None:
        """Give every value a register."""
        self._dtype = np.dtype(dtype)
        self._literals = [x for _, x in trace.literals]
        self._scratch: list[np.dtype] = []
        self._program: list[tuple[Callable[..., Any], itemgetter[Any]]] = []
        # Inputs and literals have the first registers. Then come the negatives of coefficients.
        first = len(trace.inputs) + len(trace.literals)
        register = {value: value for value in range(first)}
        numbers = [op for op in trace.operations if op.kind is Kind.NUMBER]
        register |= {op.output: k for k, op in enumerate(numbers, first)}
        self._negatives = [register[op.inputs[0]] for op in numbers]
        first += len(numbers)
        operations = [op for op in trace.operations if op.kind is not Kind.NUMBER]
        last = {value: step for step, op in enumerate(operations) for value in op.inputs}
        last |= dict.fromkeys(trace.results, len(operations))
        homes = [0, *range(2, 2 + slots)]
        # All registers that may be written. The gradient is not among them: it is the caller's.
        dtypes = dict.fromkeys(homes, self._dtype)
        free: list[int] = []

        # The registers in which ``_select`` widens a mask, by the dtype of the results.
        masks: dict[np.dtype, int] = {}

        def scratch(kind: np.dtype) -> int:
            self._scratch.append(kind)
            new = first + len(self._scratch) - 1
            dtypes[new] = kind
            return new

        for step, op in enumerate(operations):
            sources = [register[value] for value in op.inputs]
            ended = dict.fromkeys(register[value] for value in op.inputs if last[value] == step)
            dying = [k for k in ended if k in dtypes]
            chooses = op.function == "where"  # ``_select`` reads inputs after it begins to write
            free += [] if chooses else dying
            kind = np.dtype(bool) if op.kind is Kind.BOOL else self._dtype
            fit = [k for k in free if dtypes[k] == kind]
            own = [k for k, v in zip(homes, trace.results, strict=True) if v == op.output]
            at_home = [k for k in own if k in fit]
            target = at_home[0] if at_home else fit[-1] if fit else scratch(kind)
            register[op.output] = target
            free = [k for k in (*free, *(dying if chooses else [])) if k != target]
            function, places = getattr(np, str(op.function)), [*sources, target]
            if chooses:
                if kind not in masks:
                    masks[kind] = scratch(np.dtype(f"i{kind.itemsize}"))
                function, places = _select, [*places, masks[kind]]
            self._program.append((function, itemgetter(*places)))

        ends = zip(homes, (register[value] for value in trace.results), strict=True)
        moves = {end: source for end, source in ends if end != source}
        for end, source in moves.items():
            # A value that another move will overwrite is copied elsewhere first.
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

        Several threads may run one tape, because the scratch memory belongs to the call.

        Args:
            param: The parameter. All arrays are contiguous, one-dimensional and of the tape's
                dtype.
            grad: The gradient. It is not written, and shares no memory with the other arrays.
            slots: The slots.
            scalars: The coefficients in their order, rounded to the dtype: each is a Python float
                for all elements, or an array with a number for each. Switches are ignored.
            room: Scratch memory from ``room``, for at least as many elements; None to allocate it.
        """
        size = param.size
        length = self._length(size)
        inputs = (param, grad, *slots, *scalars)
        scratch = self.room(size) if room is None else room
        for start in range(0, size, max(length, 1)):
            registers: list[Any] = list(inputs)
            if size > length:
                block = slice(start, start + length)
                registers = [x[block] if isinstance(x, np.ndarray) else x for x in inputs]
            registers += self._literals
            for source in self._negatives:
                registers.append(-registers[source])
            # The last block may be shorter, and the scratch memory may be longer.
            registers += [x[: min(length, size - start)] for x in scratch]
            for function, operands in self._program:
                function(*operands(registers))

    def room(self, size: int) -> list[np.ndarray]:
        """Allocate the scratch memory for a run on so many elements; the run allocates no more."""
        return [np.empty(self._length(size), kind) for kind in self._scratch]

    def _length(self, size: int) -> int:
        return min(size, BLOCK_BYTES // self._dtype.itemsize)


#: The tapes of an update, by the setting of its switches in their order.
Tapes: TypeAlias = dict[tuple[bool, ...], Tape]


def tapes(
    update: Callable[..., Any], slots: int, coefficients: Mapping[str, bool | Kind], dtype: str
) -> Tapes:
    """Make a tape for each setting of the switches of an update.

    Args:
        update: The update.
        slots: The number of slots.
        coefficients: What each coefficient is, as ``trace_update`` takes it.
        dtype: ``"float32"`` or ``"float64"``.

    Raises:
        NotTraceable: The update has no trace.
    """
    switches = {
        name: [kind] if isinstance(kind, bool) else [False, True]
        for name, kind in coefficients.items()
        if kind is not Kind.NUMBER
    }
    found = {}
    for setting in product(*switches.values()):
        now = {**coefficients, **dict(zip(switches, setting, strict=True))}
        found[setting] = Tape(trace_update(update, slots, now), slots, dtype)
    return found


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out, source)


def _select(mask: np.ndarray, a: Any, b: Any, out: np.ndarray, room: np.ndarray) -> None:
    """Compute ``numpy.where(mask, a, b)`` into an array that is not one of the inputs.

    If few elements are chosen (by a clip, or for NaN), a masked copy is the fastest. If there are
    many, it would mispredict a branch for each of them. The result is then computed from bits:
    those of ``b``, changed by their difference from those of ``a`` where the mask is 1.

    Args:
        mask: The condition.
        a: The values where it holds, as an array or a number.
        b: The values where it does not.
        out: Receives the result.
        room: Memory for integers as wide as the numbers.
    """
    if 32 * np.count_nonzero(mask) < mask.size:
        np.copyto(out, b)
        np.copyto(out, a, where=mask)
        return
    bits = out.view(room.dtype)
    a, b = (np.asarray(x, out.dtype).view(room.dtype) for x in (a, b))
    # No ufunc may cast here, because NumPy would allocate memory for that.
    np.copyto(room, mask)
    np.bitwise_xor(a, b, out=bits)
    np.multiply(bits, room, out=bits)
    np.bitwise_xor(bits, b, out=bits)
