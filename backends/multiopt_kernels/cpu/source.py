"""Traces as Python source for Numba to compile: one operation per line, on scalars.

Machine code is made from this text and from the loops around it, and from nothing else of a rule.
The text is therefore part of the key of the code in the cache on disk, so that an edited formula
never runs old code.

>>> from multiopt_kernels.trace import trace_function
>>> trace = trace_function(lambda xp, x: xp.where(x > 0.5, 2.0 * x, x), ["x"])
>>> lines, results = Source().lines(trace, ["x"])
>>> lines, results
(['v3 = x > 0.5', 'v4 = 2.0 * x', 'v5 = v4 if v3 else x'], ['v5'])
"""

from collections.abc import Callable, Sequence
from textwrap import indent

from multiopt_kernels.operations import Loop, Operation, Trace

__all__ = ["Source"]

#: How each operation is written in Python.
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
    "wide": "double({})",
    "narrow": "dtype({})",
}

#: The text of ``by_squaring`` with its two functions written out in it.
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
    """Prints traces that are compiled together, and collects the functions that they call."""

    def __init__(self) -> None:
        """Begin without functions."""
        # The names of functions that the printed lines call, by their text.
        self._loops: dict[str, str] = {}

    def __str__(self) -> str:
        """The text of the functions that the printed lines call."""
        return "".join(f"@njit\ndef {name}{text}" for text, name in self._loops.items())

    def lines(
        self, trace: Trace, inputs: Sequence[str], literal: Callable[[float], str] = repr
    ) -> tuple[list[str], list[str]]:
        """Print a trace.

        Args:
            trace: The trace.
            inputs: The names of its inputs in the text.
            literal: Writes a literal.

        Returns:
            A line for each operation, and how the results are written after these lines.
        """
        names = dict(enumerate(inputs)) | {k: literal(x) for k, x in trace.literals}
        lines = [self.line(operation, names) for operation in trace.operations]
        return lines, [names[value] for value in trace.results]

    def line(self, operation: Operation, names: dict[int, str]) -> str:
        """Print an operation.

        Args:
            operation: The operation.
            names: How values are written, by their numbers. The result is added.
        """
        function, values, output, _ = operation
        given = [names[value] for value in values]
        names[output] = f"v{output}"
        if isinstance(function, Loop):
            return f"v{output} = {self._loop(function)}({', '.join(given)})"
        return f"v{output} = {WRITTEN[function].format(*given)}"

    def function(self, trace: Trace) -> str:
        """Print a trace of float64 numbers as a function with the name of its result."""
        (name,) = trace.outputs
        lines, (result,) = self.lines(trace, trace.inputs)
        body = indent("\n".join([*lines, f"return {result}"]), "    ")
        return f"@njit\ndef {name}({', '.join(trace.inputs)}):\n{body}\n"

    def _loop(self, loop: Loop) -> str:
        """Print the function of a loop, if it is new, and return its name."""
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
