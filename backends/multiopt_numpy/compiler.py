"""Kernels compiled by Numba from the rules' own code, into object code that needs no Numba to run.

Nothing of a rule's mathematics stands here. ``update`` and ``scalars`` are compiled as they stand,
with the functions they call, for scalars instead of arrays: ``xp`` is a namespace of a few scalar
functions. What this file adds are loops, addresses and the summation tree of
``spec/arithmetic.md`` in its loop form.

A kernel takes the address of a block of int64 arguments (``kernels.py`` fills it) and works on the
rows of a table, one for each parameter. It allocates nothing and calls nothing outside itself, but
for one function of torch (``look_torch``).
"""

import copy
import dis
import inspect
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from multiopt.rules import Rule
from multiopt.rules.arithmetic import BLOCK, clamp, clip_coefficient, rescaling
from multiopt_numpy.object_cache import ObjectCode

__all__ = [
    "FIRST_SLOT",
    "GRAD",
    "PARAM",
    "SIZE",
    "NotCompilable",
    "check_scalars",
    "compile_look",
    "compile_norms",
    "compile_update",
    "identity",
    "norms_identity",
    "number_fields",
    "other_fields",
    "sample_scalars",
]

#: Columns of a row of int64 words: addresses, the number of elements, the shape, then an address
#: for each slot, then the hyperparameters, which are float64.
PARAM, GRAD, SIZE, NDIM, SHAPE, FIRST_SLOT = range(6)


class NotCompilable(Exception):  # noqa: N818 -- an answer, to which the caller has another way
    """A rule that Numba cannot compile, or would compile into other numbers."""


def number_fields(rule: Rule) -> list[tuple[str, int | None]]:
    """The numbers among the hyperparameters: field, and place in it where the field is a tuple."""
    fields: list[tuple[str, int | None]] = []
    for name in rule.ranges:
        value = getattr(rule, name)
        if isinstance(value, tuple):
            fields += [(name, place) for place in range(len(value))]
        else:
            fields.append((name, None))
    return fields


def sample_scalars(rule: Rule, dtype: str) -> Any:
    """Coefficients of a rule, for what they are and not for their values. Asks no schedule."""
    sample = copy.copy(rule)
    for name in rule.ranges:
        value = getattr(rule, name)
        if isinstance(value, tuple):
            numbers: Any = tuple(0.5 if callable(part) else part for part in value)
        else:
            numbers = 0.5 if callable(value) else value
        object.__setattr__(sample, name, numbers)
    return sample.coefficients(1, dtype)


def other_fields(rule: Rule) -> dict[str, Any]:
    """The hyperparameters that are no numbers: switches, and choices of other kinds."""
    return {f.name: getattr(rule, f.name) for f in fields(rule) if f.name not in rule.ranges}


# Which code a kernel was made from


def identity(rule: Rule, dtype: str) -> list[str]:
    """All that the kernel of a rule is made from, beside this file."""
    facts = (
        type(rule).__qualname__,
        number_fields(rule),
        sorted(other_fields(rule).items()),
        rule.slots,
        sorted(_class_numbers(rule).items()),
        dtype,
    )
    return [repr(facts), *fingerprint(rule.update, _scalars(rule), clamp)]


def norms_identity(dtype: str) -> list[str]:
    """Likewise for the kernels of norms."""
    return [dtype, *fingerprint(clip_coefficient, rescaling)]


def _scalars(rule: Rule) -> FunctionType:
    function: FunctionType = type(rule).scalars.__func__  # type: ignore[attr-defined]
    return function


def _class_numbers(rule: Rule) -> dict[str, bool | int | float]:
    """The numbers of its class that ``scalars`` may ask for."""
    values = {
        name: getattr(type(rule), name, None)
        for name in inspect.unwrap(_scalars(rule)).__code__.co_names
    }
    return {k: v for k, v in values.items() if isinstance(v, bool | int | float)}


def fingerprint(*functions: Callable[..., Any]) -> Iterator[str]:
    """What the meaning of functions depends on: their code, and what it reaches by global names.

    Line numbers, file names and comments are no part of it.
    """
    seen: set[int] = set()
    waiting = [inspect.unwrap(function) for function in functions]
    while waiting:
        function = waiting.pop(0)
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield repr((function.__qualname__, function.__defaults__, _code(function.__code__)))
        for value in _reached(function):
            if isinstance(value, FunctionType):
                waiting.append(inspect.unwrap(value))
            elif isinstance(value, type):
                yield repr((value.__qualname__, getattr(value, "_fields", None)))
            else:
                yield value.__name__ if isinstance(value, ModuleType) else repr(value)


def _reached(function: Callable[..., Any]) -> list[Any]:
    """What the code of a function refers to by the names of globals and of enclosing scopes."""
    globals_, cells = function.__globals__, function.__closure__ or ()
    by_name = [globals_.get(name) for name in _names(function.__code__)]
    return by_name + [cell.cell_contents for cell in cells]


def check_scalars(rule: Rule) -> None:
    """Refuse coefficients that would be other numbers in a kernel, or for arrays of steps.

    Raises:
        NotCompilable: They are computed with ``**`` or with functions of ``math``, whose results
            differ in the last bit between Python, NumPy and compiled code.
    """
    seen: set[int] = set()
    waiting = [inspect.unwrap(_scalars(rule))]
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for instruction in dis.get_instructions(function.__code__):
            if instruction.argrepr in ("**", "**="):
                raise NotCompilable(f"{function.__qualname__} uses **; there is power()")
        for value in _reached(function):
            if value is math or getattr(value, "__module__", None) == "math":
                raise NotCompilable(f"{function.__qualname__} uses math; there is np.sqrt")
            if isinstance(value, FunctionType):
                waiting.append(inspect.unwrap(value))


def _code(code: CodeType) -> tuple[Any, ...]:
    constants = tuple(_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars


def _names(code: CodeType) -> list[str]:
    inner = [name for c in code.co_consts if isinstance(c, CodeType) for name in _names(c)]
    return [*code.co_names, *inner]


# Numba's side


@cache
def _tools() -> Any:
    """What kernels are made with: compiling, and reading memory at an address."""
    import numba
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    def njit(function: Any) -> Any:
        # The error model lets a division by zero be an infinity. Contraction is off in Numba
        # unless it is asked for.
        return numba.njit(  # type: ignore[call-overload]
            function,
            error_model="numpy",
            no_cpython_wrapper=True,
            no_cfunc_wrapper=True,
            _nrt=False,
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
        call=call,
        prefetch=prefetch,
        types=types,
        words=pointer(types.int64),
        doubles=pointer(types.float64),
        halves=pointer(types.int32),
        bytes=pointer(types.uint8),
        at={name: pointer(getattr(types, name)) for name in ("float32", "float64")},
    )
    return tools


@cache
def _namespace() -> ModuleType:
    """The Array API for scalars: a module, the one kind of namespace that Numba takes.

    Numba's own ``where`` makes a 0-d array of scalars.
    """
    njit = _tools().njit
    namespace = ModuleType("scalar_namespace")
    namespace.__dict__.update(
        sqrt=np.sqrt,
        abs=abs,
        isnan=np.isnan,
        isfinite=np.isfinite,
        where=njit(lambda condition, x, y: x if condition else y),
    )
    return namespace


def _jitted(function: Callable[..., Any]) -> Any:
    """A rule's function as it stands, compiled for scalars, with the functions that it calls."""
    function = inspect.unwrap(function)
    known = function.__globals__
    replaced = {}
    for name in _names(function.__code__):
        value = known.get(name)
        if isinstance(value, FunctionType):
            replaced[name] = _jitted(value)
        elif value is np:
            replaced[name] = _namespace()
    rebound = FunctionType(
        function.__code__,
        {**known, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return _tools().njit(rebound)


def _object_code(**kernels: Any) -> ObjectCode:
    symbols, objects = {}, []
    int64 = _tools().types.int64
    for name, kernel in kernels.items():
        kernel.compile((int64,))
        (compiled,) = kernel.overloads.values()
        symbols[name] = compiled.fndesc.llvm_func_name
        objects.append(compiled.library._get_compiled_object())
    return ObjectCode(symbols, tuple(objects))


# The update of a rule

#: What differs between rules: how many slots, which scalars. ``coefficients`` is
#: ``Rule.coefficients``: computed in float64, rounded once to the dtype.
_TEMPLATE = """
def coefficients(numbers, step):
    c = scalars(rule_class, Hyperparameters({hyperparameters}), step)
    return Scalars({rounded})

def plain(row, low, high, c):
    p, g = at(row[PARAM]), at(row[GRAD])
    {slots}
    for i in range(low, high):
        q, t = update(xp, p[i], g[i], ({reads}), c)
        p[i] = q
        {writes}

def clipping(row, low, high, c, own, shared, bound, write):
    p, g = at(row[PARAM]), at(row[GRAD])
    {slots}
    beyond = 0
    if bound == inf:
        for i in range(low, high):
            d = own * g[i] * shared
            if write:
                g[i] = d
            q, t = update(xp, p[i], d, ({reads}), c)
            p[i] = q
            {writes}
    else:
        for i in range(low, high):
            d = own * g[i] * shared
            beyond |= (d > bound) | (d < -bound)
            d = clamp(xp, d, bound)
            if write:
                g[i] = d
            q, t = update(xp, p[i], d, ({reads}), c)
            p[i] = q
            {writes}
    return beyond
"""


def compile_update(rule: Rule, dtype: str) -> ObjectCode:
    """The step of a rule over the rows of a table.

    Args:
        rule: A rule, of which the switches count, and not the numbers.
        dtype: That of the computation: ``"float32"`` or ``"float64"``.

    Raises:
        NotCompilable: Numba cannot compile the rule, or would compute in another dtype.
    """
    import numba  # noqa: F401 -- that it cannot be imported is another matter than a rule's fault

    check_scalars(rule)
    try:
        return _compile_update(rule, dtype)
    except Exception as error:
        # Whatever a rule of the user's makes of the compiler; it has other ways to run.
        raise NotCompilable(f"{type(rule).__name__}: {error}") from error


def _compile_update(rule: Rule, dtype: str) -> ObjectCode:
    tools = _tools()
    kind = getattr(tools.types, dtype)
    scalars = sample_scalars(rule, dtype)
    fields = number_fields(rule)
    # A choice of another kind selects the update, or else there is no kernel.
    names = [*rule.ranges, *rule.switches]
    hyperparameters = {
        name: [f"numbers[{i}]" for i, field in enumerate(fields) if field[0] == name]
        for name in rule.ranges
    }
    given = [
        f"{name}=({', '.join(places)},)"
        if isinstance(getattr(rule, name), tuple)
        else f"{name}={places[0]}"
        for name, places in hyperparameters.items()
    ] + [f"{name}={getattr(rule, name)}" for name in rule.switches]
    slots = range(len(rule.slots))
    rule_class = ModuleType("rule_class")
    rule_class.__dict__.update(_class_numbers(rule))
    update = _jitted(rule.update)
    known: dict[str, Any] = {
        "PARAM": PARAM,
        "GRAD": GRAD,
        "Hyperparameters": namedtuple("Hyperparameters", names),
        "Scalars": type(scalars),
        "at": tools.at[dtype],
        "clamp": _jitted(clamp),
        "dtype": kind,
        "inf": math.inf,
        "rule_class": rule_class,
        "scalars": _jitted(_scalars(rule)),
        "update": update,
        "xp": _namespace(),
    }
    text = _TEMPLATE.format(
        hyperparameters=", ".join(given),
        rounded=", ".join(
            f"{name}=c.{name}" if isinstance(value, bool) else f"{name}=dtype(c.{name})"
            for name, value in scalars._asdict().items()
        ),
        slots="; ".join(f"s{j} = at(row[{FIRST_SLOT + j}])" for j in slots),
        reads="".join(f"s{j}[i], " for j in slots),
        writes="; ".join(f"s{j}[i] = t[{j}]" for j in slots),
    )
    exec(text, known)
    for name in ("coefficients", "plain", "clipping"):
        known[name] = tools.njit(known[name])
    run = _update_kernel(dtype, known, FIRST_SLOT + len(rule.slots), len(fields))
    code = _object_code(update=run)
    (compiled,) = update.overloads.values()
    returned = compiled.signature.return_type
    expected = (kind, tools.types.UniTuple(kind, len(slots)) if slots else tools.types.Tuple(()))
    if tuple(returned) != expected:
        raise NotCompilable(
            f"{type(rule).__name__}: its update would compute {returned} instead of {dtype}; has "
            "it a number literal? Make it a scalar"
        )
    return code


def _update_kernel(dtype: str, made: dict[str, Any], first_number: int, count: int) -> Any:
    """The loop over the rows of a share."""
    tools = _tools()
    coefficients, plain, clipping = made["coefficients"], made["plain"], made["clipping"]
    words, doubles, flags = tools.words, tools.doubles, tools.bytes
    number, prefetch = getattr(tools.types, dtype), tools.prefetch

    def update(arguments_at):  # type: ignore[no-untyped-def]
        a = words(arguments_at)
        index, k0, b0, k1, b1, table_at, width = words(a[0]), a[1], a[2], a[3], a[4], a[5], a[6]
        steps, own, shared, bounds = words(a[7]), doubles(a[8]), doubles(a[9]), doubles(a[10])
        clipped, write = flags(a[11]), a[12]
        if k1 == k0 and b1 == 0:
            return 0
        known = doubles(table_at + (index[k0] * width + first_number) * 8)
        known_step = steps[index[k0]] + 1
        c = coefficients(known, known_step)
        for k in range(k0, k1 + 1 if b1 > 0 else k1):
            r = index[k]
            row_at = table_at + r * width * 8
            row, numbers = words(row_at), doubles(row_at + first_number * 8)
            if k + 4 < k1:
                ahead = words(table_at + index[k + 4] * width * 8)
                for i in range(FIRST_SLOT, first_number):
                    prefetch(ahead[i])
                prefetch(ahead[PARAM])
                prefetch(ahead[GRAD])
            low = b0 * BLOCK if k == k0 else 0
            high = min(b1 * BLOCK, row[SIZE]) if k == k1 else row[SIZE]
            step, bound = steps[r] + 1, bounds[r]
            # Most rows have the numbers of the row before. To compute them takes 40 ns.
            same = step == known_step
            for i in range(count):
                same &= numbers[i] == known[i]
            if not same:
                c = coefficients(numbers, step)
                known, known_step = numbers, step
            x, y, z = number(own[r]), number(shared[r]), number(bound)
            scaled = x != 1 or y != 1
            if not scaled and bound == math.inf:
                plain(row, low, high, c)
            elif clipping(row, low, high, c, x, y, z, write != 0) != 0 or scaled:
                clipped[r] = 1
        return 0

    return tools.njit(update)


# Norms, which no rule has a part in


def compile_norms(dtype: str) -> ObjectCode:
    """Sums of squares over the tree of the spec, and the search for what is not finite."""
    tools = _tools()
    njit, words, doubles, flags = tools.njit, tools.words, tools.doubles, tools.bytes
    prefetch = tools.prefetch
    at, number, double = tools.at[dtype], getattr(tools.types, dtype), tools.types.float64

    @njit
    def fold(s, n):  # type: ignore[no-untyped-def]
        """Fold ``n`` numbers; the zeros that fill them up are not added: ``x + 0`` is ``x``."""
        half = 1
        while half < n:
            half *= 2
        half //= 2
        while half > 0:
            for j in range(n - half):
                s[j] += s[j + half]
            n = half
            half //= 2
        return s[0]

    @njit
    def eight(g, j, q):  # type: ignore[no-untyped-def]
        """The squares of eight elements, ``q`` apart, folded to one number."""
        x0, x1, x2, x3 = double(g[j]), double(g[j + q]), double(g[j + 2 * q]), double(g[j + 3 * q])
        j += 4 * q
        x4, x5, x6, x7 = double(g[j]), double(g[j + q]), double(g[j + 2 * q]), double(g[j + 3 * q])
        even = (x0 * x0 + x4 * x4) + (x2 * x2 + x6 * x6)
        return even + ((x1 * x1 + x5 * x5) + (x3 * x3 + x7 * x7))

    @njit
    def leaves(g, n, s):  # type: ignore[no-untyped-def]
        """The squares of a block of ``n`` elements, a whole block folded four times at once."""
        if n < BLOCK:
            for j in range(n):
                s[j] = double(g[j]) * double(g[j])
            return n
        q = BLOCK // 16
        for j in range(q):
            s[j] = eight(g, j, 2 * q) + eight(g, j + q, 2 * q)
        return q

    @njit
    def scaled_leaves(g, n, own, factor, s):  # type: ignore[no-untyped-def]
        """The squares of a block of ``n`` elements, each multiplied first."""
        for j in range(n):
            x = double(own * g[j]) * factor
            s[j] = x * x
        return n

    @njit
    def block_sum(g, n, own, factor, s):  # type: ignore[no-untyped-def]
        """The sum of squares of a block of ``n`` elements."""
        if own == 1 and factor == 1:
            return fold(s, leaves(g, n, s))
        return fold(s, scaled_leaves(g, n, own, factor, s))

    itemsize = np.dtype(dtype).itemsize

    def squares(arguments_at):  # type: ignore[no-untyped-def]
        """The sums of the blocks of a share."""
        a = words(arguments_at)
        index, k0, b0, k1, b1, table_at, width = words(a[0]), a[1], a[2], a[3], a[4], a[5], a[6]
        own, factor, first, sums_at = doubles(a[7]), doubles(a[8])[0], words(a[9]), a[10]
        scratch = doubles(a[11])
        for k in range(k0, k1 + 1 if b1 > 0 else k1):
            r = index[k]
            row = words(table_at + r * width * 8)
            size, sums = row[SIZE], doubles(sums_at + first[k] * 8)
            x = number(own[r])
            for b in range(
                b0 if k == k0 else 0,
                min(b1, first[k + 1] - first[k]) if k == k1 else first[k + 1] - first[k],
            ):
                g = at(row[GRAD] + b * BLOCK * itemsize)
                if (b + 1) * BLOCK < size:
                    # The next block, while this one is added up: 3.6 ms for 1e7 instead of 3.8.
                    for line in range(0, BLOCK * itemsize, 64):
                        prefetch(row[GRAD] + (b + 1) * BLOCK * itemsize + line)
                sums[b] = block_sum(g, min(BLOCK, size - b * BLOCK), x, factor, scratch)
        return 0

    coefficient, factor_for = _jitted(clip_coefficient), _jitted(rescaling)
    namespace = _namespace()

    @njit
    def total(g_at, size, factor, sums, scratch):  # type: ignore[no-untyped-def]
        """The sum of squares of one gradient."""
        blocks = -(-size // BLOCK)
        for b in range(blocks):
            g = at(g_at + b * BLOCK * itemsize)
            sums[b] = block_sum(g, min(BLOCK, size - b * BLOCK), number(1.0), factor, scratch)
        return fold(sums, blocks) if blocks > 0 else 0.0

    def measure(arguments_at):  # type: ignore[no-untyped-def]
        """The norms of all rows, and what they scale the gradients by."""
        a = words(arguments_at)
        n, table_at, width = a[0], a[1], a[2]
        bounds, eps, norms, own = doubles(a[3]), doubles(a[4]), doubles(a[5]), doubles(a[6])
        scratch, sums = doubles(a[7]), doubles(a[7] + BLOCK * 8)
        for r in range(n):
            if r + 8 < n:
                prefetch(words(table_at + (r + 8) * width * 8)[GRAD])
            bound = bounds[r]
            if not math.isnan(bound):
                row = words(table_at + r * width * 8)
                g, size = row[GRAD], row[SIZE]
                squares = total(g, size, 1.0, sums, scratch)
                factor = factor_for(namespace, squares)
                if factor != 1.0:
                    squares = total(g, size, factor, sums, scratch)
                norms[r] = math.sqrt(squares) / factor
                own[r] = number(coefficient(namespace, bound, norms[r], eps[r]))
        return 0

    def totals(arguments_at):  # type: ignore[no-untyped-def]
        """The sum of each row, from those of its blocks."""
        a = words(arguments_at)
        n, first, sums_at, out = a[0], words(a[1]), a[2], doubles(a[3])
        for k in range(n):
            blocks = first[k + 1] - first[k]
            out[k] = fold(doubles(sums_at + first[k] * 8), blocks) if blocks > 0 else 0.0
        return 0

    def finite(arguments_at):  # type: ignore[no-untyped-def]
        """Mark the rows of a share that have an infinity or a NaN."""
        a = words(arguments_at)
        index, k0, b0, k1, b1, table_at, width = words(a[0]), a[1], a[2], a[3], a[4], a[5], a[6]
        bad = flags(a[7])
        for k in range(k0, k1 + 1 if b1 > 0 else k1):
            r = index[k]
            row = words(table_at + r * width * 8)
            g = at(row[GRAD])
            low = b0 * BLOCK if k == k0 else 0
            high = min(b1 * BLOCK, row[SIZE]) if k == k1 else row[SIZE]
            found = 0
            for i in range(low, high):
                found |= g[i] - g[i] != 0
            if found != 0:
                bad[r] = 1
        return 0

    return _object_code(
        squares=njit(squares), totals=njit(totals), measure=njit(measure), finite=njit(finite)
    )


# Looking at arrays


def compile_look() -> ObjectCode:
    """What arrays are, where they are, and whether two parameters overlap, read at every step.

    ``look_numpy`` reads the fields of NumPy's public C structure (``PyArrayObject_fields``),
    ``look_torch`` asks torch through DLPack's table of C functions (DLPack 1.3,
    ``dltensor_from_py_object_no_sync``). Each fills the addresses into the table, marks the rows
    whose parameter or gradient is not exactly what the row says, and returns how many there are;
    or -1 if all are regular and two parameters overlap, or may overlap, in the order given.
    """
    tools = _tools()
    njit, words, halves, flags = tools.njit, tools.words, tools.halves, tools.bytes
    call, prefetch = tools.call, tools.prefetch

    @njit
    def overlap(order, n, table_at, width, itemsize):  # type: ignore[no-untyped-def]
        """Whether a parameter overlaps with anything, or the order is not that of the addresses."""
        last, reached, reached_by_params = 0, 0, 0
        for k in range(2 * n):
            writes = order[k] < n
            row = words(table_at + (order[k] if writes else order[k] - n) * width * 8)
            if row[SIZE] > 0:
                low = row[PARAM] if writes else row[GRAD]
                high = low + row[SIZE] * itemsize
                if low < last or low < (reached if writes else reached_by_params):
                    return True
                last, reached = low, max(reached, high)
                if writes:
                    reached_by_params = max(reached_by_params, high)
        return False

    @njit
    def numpy_address(o, row, needed, kind, descr):  # type: ignore[no-untyped-def]
        """The address of the elements, or -1."""
        if words(o + 8)[0] != kind:
            return -1
        # data, number of dimensions (an int), dimensions, strides, base, descr, flags (an int)
        a = words(o + 16)
        ndim = halves(o + 24)[0]
        if ndim != row[NDIM] or (halves(o + 64)[0] & needed) != needed or a[5] != descr:
            return -1
        dims, shape = words(a[2]), words(row[SHAPE])
        for d in range(ndim):
            if dims[d] != shape[d]:
                return -1
        return a[0]

    def look_numpy(arguments_at):  # type: ignore[no-untyped-def]
        a = words(arguments_at)
        # The object arrays are NumPy arrays too: their first field is where the pointers stand.
        params, grads, n = words(words(a[0] + 16)[0]), words(words(a[1] + 16)[0]), a[2]
        table_at, width, irregular, order, itemsize = a[3], a[4], flags(a[5]), words(a[6]), a[7]
        kind, descr, count = a[9], a[10], 0
        for k in range(n):
            row = words(table_at + k * width * 8)
            if k + 4 < n:
                prefetch(params[k + 4] + 16)
                prefetch(grads[k + 4] + 16)
            # C-contiguous and aligned; the parameter writeable as well.
            p = numpy_address(params[k], row, 0x501, kind, descr)
            g = numpy_address(grads[k], row, 0x101, kind, descr)
            odd = p == -1 or g == -1
            irregular[k] = odd
            count += odd
            row[PARAM], row[GRAD] = p, g
        return -1 if count == 0 and overlap(order, n, table_at, width, itemsize) else count

    @njit
    def inner(o, kind, other):  # type: ignore[no-untyped-def]
        """What the Python object of a tensor points to: a hint where to prefetch, never read."""
        known = words(o + 8)[0] == kind or words(o + 8)[0] == other
        return words(o + 16)[0] if known else o

    @njit
    def torch_address(o, row, call_at, kind, other, dtype, tensor_at):  # type: ignore[no-untyped-def]
        """The address of the elements, or -1."""
        if words(o + 8)[0] != kind and words(o + 8)[0] != other:
            return -1
        if call(call_at, o, tensor_at) != 0:
            return -1
        # DLTensor: data, device (two ints), dimensions and dtype, shape, strides, offset
        t = words(tensor_at)
        device, ndim = halves(tensor_at + 8)[0], halves(tensor_at + 16)[0]
        if device != 1 or ndim != row[NDIM] or t[2] >> 32 != dtype:
            return -1
        dims, strides, shape, expected = words(t[3]), words(t[4]), words(row[SHAPE]), 1
        for d in range(ndim - 1, -1, -1):
            # Strides of axes of length 1 say nothing about memory, but they tell a view such as
            # ``x.conj().imag``, whose values are the negatives of what is in its memory.
            if dims[d] != shape[d] or (strides[d] != expected and row[SIZE] > 0):
                return -1
            expected *= dims[d]
        if t[0] == 0 and row[SIZE] > 0:
            return -1
        return t[0] + t[5]

    def look_torch(arguments_at):  # type: ignore[no-untyped-def]
        a = words(arguments_at)
        params, grads, n = words(words(a[0] + 16)[0]), words(words(a[1] + 16)[0]), a[2]
        table_at, width, irregular, order, itemsize = a[3], a[4], flags(a[5]), words(a[6]), a[7]
        tensor_at, kind, other, dtype, call_at, count = a[8], a[9], a[10], a[11], a[12], 0
        for k in range(n):
            row = words(table_at + k * width * 8)
            if k + 8 < n:
                prefetch(params[k + 8] + 16)
                prefetch(grads[k + 8] + 16)
            if k + 4 < n:
                prefetch(inner(params[k + 4], kind, other))
                prefetch(inner(grads[k + 4], kind, other))
            p = torch_address(params[k], row, call_at, kind, other, dtype, tensor_at)
            g = torch_address(grads[k], row, call_at, kind, other, dtype, tensor_at)
            odd = p == -1 or g == -1
            irregular[k] = odd
            count += odd
            row[PARAM], row[GRAD] = p, g
        return -1 if count == 0 and overlap(order, n, table_at, width, itemsize) else count

    def warm_torch(arguments_at):  # type: ignore[no-untyped-def]
        """Ask for the cache lines of tensors all at once; Python goes from one to the next.

        Then for what the first words of each point to, whatever that is: where its gradient is
        found is among it. The Python object must be known to have its tensor behind the header.
        """
        a = words(arguments_at)
        params, n, kind, other = words(words(a[0] + 16)[0]), a[1], a[2], a[3]
        for k in range(n):
            prefetch(params[k] + 16)
        for k in range(n):
            tensor = inner(params[k], kind, other)
            prefetch(tensor)
            prefetch(tensor + 64)
            prefetch(tensor + 128)
        for k in range(n):
            o = params[k]
            if words(o + 8)[0] == kind or words(o + 8)[0] == other:
                tensor = words(words(o + 16)[0])
                for i in range(8):
                    prefetch(tensor[i])
        return 0

    return _object_code(
        look_numpy=njit(look_numpy), look_torch=njit(look_torch), warm_torch=njit(warm_torch)
    )
