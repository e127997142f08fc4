"""What a comparison finds: where a port first departs from its prototype."""

from dataclasses import dataclass
from textwrap import fill

from multiopt.errors import brief

__all__ = ["Departure"]


@dataclass(frozen=True)
class Departure:
    """The first difference between two trainings.

    Attributes:
        step: The step, counted from 1.
        name: The parameter; the first one if several depart.
        what: ``"gradient"``, or the ``"shape"`` of one, ``"missing"`` for a gradient that only one
            side gives, ``"dtype"`` of a parameter that was handed to the port, ``"memory"`` that
            both share, ``"update"`` for a parameter that multiopt updated differently.
        index: Where the difference is largest; None if it is not one of elements.
        expected: What the prototype has.
        found: What the port has.
        cause: The usual cause of such a difference, or None.
        advice: What to look for.
        others: The other parameters that depart in this step.
    """

    step: int
    name: str
    what: str
    index: tuple[int, ...] | None
    expected: object
    found: object
    cause: str | None = None
    advice: str = ""
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A few lines that say where, what, and probably why.

        >>> print(Departure(3, "w", "gradient", (0, 1), 1.0, -1.0, "sign", "all are negated."))
        step 3, gradient of 'w' at [0, 1]: the port gives -1.0, the prototype 1.0
        sign: all are negated.
        """
        what = {"missing": "gradient", "shape": "shape of the gradient"}.get(self.what, self.what)
        at = "" if self.index is None else f" at {list(self.index)}"
        sides = f"the port gives {self.found}, the prototype {self.expected}"
        lines = [f"step {self.step}, {what} of {self.name!r}{at}: {sides}"]
        if self.cause:
            lines.append(fill(f"{self.cause}: {self.advice}", 100))
        if self.others:
            lines.append(f"others that depart: {brief(list(self.others))}")
        return "\n".join(lines)
