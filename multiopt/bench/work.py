"""The parameters that are stepped: a few sets of shapes."""

from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from multiopt.bench.machine import last_level_cache

__all__ = ["Arrays", "Work", "works"]

Arrays: TypeAlias = dict[str, NDArray[Any]]

VAE = (
    *((400, 784), (400,), (20, 400), (20,), (20, 400), (20,)),
    *((400, 20), (400,), (784, 400), (784,)),
)
#: Of a hierarchical model's latent variables: of everyone, of groups, of their members.
LATENTS = ((),) * 20 + ((10,),) * 20 + ((100,),) * 10 + ((1000,),) * 4 + ((1000, 5),) * 2


class Work(NamedTuple):
    """Parameters to step.

    Attributes:
        title: What the table calls them.
        shapes: Their shapes.
    """

    title: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def is_parallel(self) -> bool:
        """Whether torch shares the work of one array among threads: from its grain of 2**15 on.

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


def works(quick: bool) -> dict[str, Work]:
    """Every work by its key in ``comparisons``.

    Args:
        quick: Whether to make fewer parameters, for a look or a test.
    """
    large, many, most = (300_000, 20, 200) if quick else (10_000_000, 1000, 100_000)
    # Parameter, gradient and two slots of float32. No more than 2 GiB of them.
    beyond = 1_000_000 if quick else min(4 * last_level_cache(), 2**31) // 16
    return {
        "large": Work(f"one array of {large:.0e}".replace("e+0", "e"), ((large,),)),
        "beyond": Work(f"one array of {beyond / 1e6:.0f} million", ((beyond,),)),
        "many small": Work(f"{many} of 10", ((10,),) * many),
        "most small": Work(f"{most} of 10", ((10,),) * most),
        "few small": Work("10 of 10", ((10,),) * 10),
        "thousands": Work(f"{10 * many} of 10", ((10,),) * 10 * many),
        "two thousand": Work(f"{2 * many} of 10", ((10,),) * 2 * many),
        "many new": Work(f"{5 * many} of 10", ((10,),) * 5 * many),
        "many middling": Work(f"{many} of 1000", ((1000,),) * many),
        "vae": Work("a VAE", VAE),
        "guide": Work("a guide", tuple(shape for shape in LATENTS for _ in ("loc", "scale"))),
    }
