"""Traces as Python source, for Numba to compile: one operation a line, on scalars.

The text is all that machine code is made from, beside the loops around it. It says what the code
is called on the disk, so that a formula that was edited is never an old one.

>>> from multiopt_kernels.trace import trace_function
>>> trace = trace_function(lambda xp, x: xp.where(x > 0.5, 2.0 * x, x), ["x"])
>>> lines, results = Source().lines(trace, ["x"])
>>> lines, results
(['v3 = x > 0.5', 'v4 = 2.0 * x', 'v5 = v4 if v3 else x'], ['v5'])
"""

from collections.abc import Callable, Sequence
from textwrap import indent

from multiopt_kernels.operations import Loop, Trace

__all__ = ["Source"]

#: How each operation is written.
WRITTEN = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "sqrt": "sqrt({})",
    "abs": "abs({})",
    "negative": "-{}",
    "equal": "{} == {}",
    "not_equal": "{} != {}",
    "less": "{} < {}",
    "less_equal": "{} <= {}",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "logical_and": "{} & {}",
    "logical_or": "{} | {}",
    "logical_not": "not {}",
    "where": "{1} if {0} else {2}",
}

#: ``by_squaring`` for one pair of functions.
LOOP = """
    bits = int(exponent)
    while bits:
        if bits & 1:
{combined}
            {results} = {combination}
{squared}
        {squares} = {square}
        bits >>= 1
    return {result}
"""


class Source:
    """The text of functions that are compiled together."""

    def __init__(self) -> None:
        """Begin without any function."""
        # The bodies of functions that lines call, and their names.
        self._loops: dict[str, str] = {}

    def __str__(self) -> str:
        """The functions that lines call."""
        return "".join(f"@njit\ndef {name}{text}" for text, name in self._loops.items())

    def lines(
        self, trace: Trace, inputs: Sequence[str], literal: Callable[[float], str] = repr
    ) -> tuple[list[str], list[str]]:
        """What a trace does, a line an operation, and the names of its results.

        Args:
            trace: The trace.
            inputs: What its inputs are called.
            literal: How a literal is written.
        """
        names = dict(enumerate(inputs)) | {k: literal(x) for k, x in trace.literals}
        lines = []
        for function, values, output, _ in trace.operations:
            given = [names[value] for value in values]
            names[output] = f"v{output}"
            if isinstance(function, Loop):
                text = f"{self._loop(function)}({', '.join(given)})"
            else:
                text = WRITTEN[function].format(*given)
            lines.append(f"{names[output]} = {text}")
        return lines, [names[value] for value in trace.results]

    def function(self, trace: Trace) -> str:
        """A function of float64 numbers, named as its result."""
        (name,) = trace.outputs
        lines, (result,) = self.lines(trace, trace.inputs)
        body = indent("\n".join([*lines, f"return {result}"]), "    ")
        return f"@njit\ndef {name}({', '.join(trace.inputs)}):\n{body}\n"

    def _loop(self, loop: Loop) -> str:
        """The name of a loop."""
        combined, combination = self.lines(loop.combined, loop.combined.inputs)
        squared, square = self.lines(loop.squared, loop.squared.inputs)
        results, squares = loop.combined.outputs, loop.squared.outputs
        body = f"({', '.join(('exponent', *results, *squares))}):" + LOOP.format(
            combined=indent("\n".join(combined), " " * 12),
            combination=", ".join(combination),
            results=", ".join(results),
            squared=indent("\n".join(squared), " " * 8),
            square=", ".join(square),
            squares=", ".join(squares),
            result=results[0],
        )
        return self._loops.setdefault(body, f"by_squaring{len(self._loops)}")
