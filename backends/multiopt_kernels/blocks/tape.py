"""A trace as a tape of NumPy operations, run in blocks that stay in the processor's cache.

``update(np, ...)`` on a large array writes a temporary as large as the array for each operation
and fetches it back from memory for the next. The tape runs block by block, each operation into
memory that is there already. The operations and their order are the same, and each of them treats
every element alike, so the numbers are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np

from multiopt_kernels.operations import Kind, Trace
from multiopt_kernels.trace import trace_update

__all__ = ["Tape", "Tapes", "tapes"]

#: Bytes of one array in a block. Longer blocks leave the second-level cache, shorter ones pay more
#: for the calls.
BLOCK_BYTES = 1 << 17


class Tape:
    """An update for a setting of the switches and a dtype.

    Every value has a register, a place in a list that is made for each block: first the block's
    part of each array, then coefficients, literals and scratch memory. A register is free once
    its value has been read for the last time; the next result may go there, over an input of its
    own operation too. The parameter and each slot are registers and at the same time the home of
    one result. It is computed right there if its home is free by then; if not, it is computed
    elsewhere and moved home at the end of the block.

    Args:
        trace: What ``trace_update`` gave for switches that do not change.
        slots: How many slots there are.
        dtype: ``"float32"`` or ``"float64"``.
    """

    def __init__(self, trace: Trace, slots: int, dtype: str) -> None:
        """Give every value its register."""
        self._dtype = np.dtype(dtype)
        self._literals = [x for _, x in trace.literals]
        self._scratch: list[np.dtype] = []
        self._program: list[tuple[Callable[..., Any], itemgetter[Any]]] = []
        # Inputs and literals have the first registers, then the coefficients that are the
        # negative of another.
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
        # All registers that may be written. The gradient belongs to the caller.
        dtypes = dict.fromkeys(homes, self._dtype)
        free: list[int] = []

        # Where ``_select`` makes a mask as wide as the results, by what they are.
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
            chooses = op.function == "where"  # and reads when it has begun to write
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
            for source in self._negatives:
                registers.append(-registers[source])
            # The last block may be shorter, and the room longer.
            registers += [x[: min(length, size - start)] for x in scratch]
            for function, operands in self._program:
                function(*operands(registers))

    def room(self, size: int) -> list[np.ndarray]:
        """All the memory that a run on so many elements needs: a run with it makes no array."""
        return [np.empty(self._length(size), kind) for kind in self._scratch]

    def _length(self, size: int) -> int:
        return min(size, BLOCK_BYTES // self._dtype.itemsize)


#: The tapes of an update by the setting of its switches, in their order.
Tapes: TypeAlias = dict[tuple[bool, ...], Tape]


def tapes(
    update: Callable[..., Any], slots: int, coefficients: Mapping[str, bool | Kind], dtype: str
) -> Tapes:
    """A tape for each setting of the switches of an update.

    Args:
        update: The formula.
        slots: How many slots there are.
        coefficients: What each coefficient is, as ``trace_update`` takes it.
        dtype: ``"float32"`` or ``"float64"``.

    Raises:
        NotTraceable: There is none.
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
    """``numpy.where`` with a place for the result, which is none of the others.

    Where few elements are chosen (a clip, a NaN), a masked copy is the fastest. Where they are
    many, it mispredicts a branch for each; the bits of ``b`` then take up their difference from
    those of ``a``, multiplied by 0 or 1. ``room`` has integers as wide as the numbers.
    """
    if 32 * np.count_nonzero(mask) < mask.size:
        np.copyto(out, b)
        np.copyto(out, a, where=mask)
        return
    bits = out.view(room.dtype)
    a, b = (np.asarray(x, out.dtype).view(room.dtype) for x in (a, b))
    # No ufunc casts here, for which NumPy would take memory of its own.
    np.copyto(room, mask)
    np.bitwise_xor(a, b, out=bits)
    np.multiply(bits, room, out=bits)
    np.bitwise_xor(bits, b, out=bits)
