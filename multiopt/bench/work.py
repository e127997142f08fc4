"""The parameters that are stepped."""

from math import prod
from random import Random
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arrays", "Work"]

Arrays: TypeAlias = dict[str, NDArray[Any]]

#: How many steps differ before drawn names come again.
DRAWS = 100


class Work(NamedTuple):
    """Parameters to step.

    Attributes:
        title: What the table calls them.
        shapes: Their shapes.
        drawn: How many of them a step is for, drawn at random each time; 0 for all.
    """

    title: str
    shapes: tuple[tuple[int, ...], ...]
    drawn: int = 0

    @property
    def is_parallel(self) -> bool:
        """Whether torch splits an array among threads, which it does above a grain of 2**15.

        >>> Work("small", ((10,),)).is_parallel
        False
        """
        return any(prod(shape) > 2**15 for shape in self.shapes)

    def arrays(self) -> tuple[Arrays, Arrays]:
        """New parameters and gradients, float32, the same numbers every time.

        >>> params, grads = Work("two", ((), (3,))).arrays()
        >>> list(params), grads["p1"].shape, grads["p1"].dtype
        (['p0', 'p1'], (3,), dtype('float32'))
        """
        rng = np.random.default_rng(0)
        # From 0.5 to 1.5: no gradient is so small that it matters where one adds epsilon.
        params, grads = (
            {
                f"p{i}": np.asarray(rng.random(shape, np.float32) + np.float32(0.5))
                for i, shape in enumerate(self.shapes)
            }
            for _ in range(2)
        )
        return params, grads

    def turns(self) -> list[list[str]]:
        """The names of one step after the other, the same every time; after the last, the first.

        >>> Work("two", ((), (3,))).turns()
        [['p0', 'p1']]
        """
        names, rng = [f"p{i}" for i in range(len(self.shapes))], Random(0)
        return [rng.sample(names, self.drawn) for _ in range(DRAWS)] if self.drawn else [names]
