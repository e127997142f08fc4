"""The update of a rule over the rows of a table, compiled from the rule's own code.

Nothing of a rule's mathematics stands here. ``update`` and ``scalars`` are compiled as they stand,
with the functions they call, for scalars instead of arrays: ``xp`` is a namespace of a few scalar
functions. What this file adds are loops and addresses.
"""

import math
from collections import namedtuple
from types import ModuleType
from typing import Any

from multiopt.rules import Rule
from multiopt.rules.arithmetic import BLOCK, clamp
from multiopt_numpy.compiled.identity import class_numbers
from multiopt_numpy.compiled.object_cache import ObjectCode
from multiopt_numpy.compiled.rows import FIRST_SLOT, GRAD, PARAM, SIZE
from multiopt_numpy.compiled.toolbox import jitted, namespace, object_code, toolbox
from multiopt_numpy.forms import (
    NotCompilable,
    number_fields,
    sample_scalars,
    scalars_of,
)

__all__ = ["compile_update"]


#: ``Rule.coefficients``: computed in float64, rounded once to the dtype.
_COEFFICIENTS = """
def coefficients(numbers, step):
    c = scalars(rule_class, Hyperparameters({hyperparameters}), step)
    return Scalars({rounded})
"""

#: The same where the host computes them: the numbers of a row are the coefficients.
_GIVEN_COEFFICIENTS = """
def coefficients(numbers, step):
    return Scalars({given})
"""

#: What differs between rules: how many slots.
_LOOPS = """
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


def compile_update(rule: Rule, dtype: str, given: bool) -> ObjectCode:
    """The step of a rule over the rows of a table.

    Args:
        rule: A rule, of which the switches count, and not the numbers.
        dtype: That of the computation: ``"float32"`` or ``"float64"``.
        given: Whether the numbers in a row are the coefficients, computed by the host, and not the
            hyperparameters.

    Raises:
        NotCompilable: Numba cannot compile the rule, or would compute in another dtype.
    """
    import numba  # noqa: F401 -- that it cannot be imported is another matter than a rule's fault

    try:
        return _compile_update(rule, dtype, given)
    except Exception as error:
        # Whatever a rule of the user's makes of the compiler; it has other ways to run.
        raise NotCompilable(f"{type(rule).__name__}: {error}") from error


def _compile_update(rule: Rule, dtype: str, given: bool) -> ObjectCode:
    tools = toolbox()
    kind = getattr(tools.types, dtype)
    scalars = sample_scalars(rule, dtype)
    slots = range(len(rule.slots))
    update = jitted(rule.update)
    known: dict[str, Any] = {
        "PARAM": PARAM,
        "GRAD": GRAD,
        "Scalars": type(scalars),
        "at": tools.at[dtype],
        "clamp": jitted(clamp),
        "dtype": kind,
        "inf": math.inf,
        "update": update,
        "xp": namespace(),
    }
    count = _add_given(known, rule) if given else _add_coefficients(known, rule)
    text = _LOOPS.format(
        slots="; ".join(f"s{j} = at(row[{FIRST_SLOT + j}])" for j in slots),
        reads="".join(f"s{j}[i], " for j in slots),
        writes="; ".join(f"s{j}[i] = t[{j}]" for j in slots),
    )
    exec(text, known)
    for name in ("plain", "clipping"):
        known[name] = tools.njit(known[name])
    run = _update_kernel(dtype, known, FIRST_SLOT + len(rule.slots), count)
    code = object_code(update=run)
    (compiled,) = update.overloads.values()
    returned = compiled.signature.return_type
    expected = (kind, tools.types.UniTuple(kind, len(slots)) if slots else tools.types.Tuple(()))
    if tuple(returned) != expected:
        raise NotCompilable(
            f"{type(rule).__name__}: its update would compute {returned} instead of {dtype}; has "
            "it a number literal? Make it a scalar"
        )
    return code


def _add_coefficients(known: dict[str, Any], rule: Rule) -> int:
    """Compile the coefficients of a rule; say how many numbers they are made from."""
    fields = number_fields(rule)
    # A choice of another kind selects the update, or else there is no kernel.
    names = [*rule.ranges, *rule.switches]
    places = {
        name: [f"numbers[{i}]" for i, field in enumerate(fields) if field[0] == name]
        for name in rule.ranges
    }
    values = [
        f"{name}=({', '.join(mine)},)"
        if isinstance(getattr(rule, name), tuple)
        else f"{name}={mine[0]}"
        for name, mine in places.items()
    ] + [f"{name}={getattr(rule, name)}" for name in rule.switches]
    sample = sample_scalars(rule, "float64")
    rounded = (
        f"{name}=c.{name}" if isinstance(value, bool) else f"{name}=dtype(c.{name})"
        for name, value in sample._asdict().items()
    )
    rule_class = ModuleType("rule_class")
    rule_class.__dict__.update(class_numbers(rule))
    known |= {
        "Hyperparameters": namedtuple("Hyperparameters", names),
        "rule_class": rule_class,
        "scalars": jitted(scalars_of(rule)),
    }
    text = _COEFFICIENTS.format(hyperparameters=", ".join(values), rounded=", ".join(rounded))
    exec(text, known)
    known["coefficients"] = toolbox().njit(known["coefficients"])
    return len(fields)


def _add_given(known: dict[str, Any], rule: Rule) -> int:
    """Take the coefficients of a rule from the row; say how many there are."""
    sample = sample_scalars(rule, "float64")
    values = (
        f"{name}=numbers[{i}] != 0" if isinstance(value, bool) else f"{name}=dtype(numbers[{i}])"
        for i, (name, value) in enumerate(sample._asdict().items())
    )
    exec(_GIVEN_COEFFICIENTS.format(given=", ".join(values)), known)
    known["coefficients"] = toolbox().njit(known["coefficients"])
    return len(sample)


def _update_kernel(dtype: str, made: dict[str, Any], first_number: int, count: int) -> Any:
    """The loop over the rows of a share."""
    tools = toolbox()
    coefficients, plain, clipping = made["coefficients"], made["plain"], made["clipping"]
    words, doubles, flags = tools.words, tools.doubles, tools.bytes
    number, prefetch = getattr(tools.types, dtype), tools.prefetch

    def update(arguments_at):  # type: ignore[no-untyped-def]
        a = words(arguments_at)
        index, k0, b0, k1, b1, table_at, width = words(a[0]), a[1], a[2], a[3], a[4], a[5], a[6]
        steps, own, shared, bounds = words(a[7]), doubles(a[8]), doubles(a[9]), doubles(a[10])
        clipped, write, counts = flags(a[11]), a[12], a[13]
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
            if counts != 0:
                steps[r] = step
        return 0

    return tools.njit(update)
