"""Parameters and data to draw in property tests, with hypothesis.

Numbers are moderate, and never NaN: a model should be right for them, and its gradients finite.

>>> import numpy as np
>>> from hypothesis import given, settings
>>> @settings(max_examples=5, database=None)
... @given(parameters({"w": (3,), "b": ()}), data((4, 3)))
... def test(params, x):
...     assert (x @ params["w"] + params["b"]).shape == (4,)
>>> test()
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

__all__ = ["data", "parameters"]

#: The largest number that is drawn. Its exponential, squared and summed, is still a float32.
LARGEST = 8.0


def parameters(
    shapes: Mapping[str, tuple[int, ...]] | None = None, dtype: str = "float64"
) -> st.SearchStrategy[dict[str, np.ndarray]]:
    """Draw parameters by name.

    Args:
        shapes: Their shapes by name. None draws one to four names, and arrays of up to three
            dimensions of at most four elements.
        dtype: ``"float32"`` or ``"float64"``.
    """
    if shapes is not None:
        return st.fixed_dictionaries({name: data(shape, dtype) for name, shape in shapes.items()})
    drawn = array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=4)
    names = st.text("abcxyz.0123456789", min_size=1, max_size=5)
    return st.dictionaries(
        names, drawn.flatmap(lambda shape: data(shape, dtype)), min_size=1, max_size=4
    )


def data(
    shape: tuple[int, ...] | st.SearchStrategy[tuple[int, ...]], dtype: str = "float64"
) -> st.SearchStrategy[np.ndarray]:
    """Draw an array of numbers from -8 to 8, zeros and small ones among them.

    Args:
        shape: Its shape, or a strategy of shapes.
        dtype: ``"float32"`` or ``"float64"``.

    Raises:
        ValueError: The dtype is another.
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64'; got {dtype!r}")
    width: Literal[32, 64] = 32 if dtype == "float32" else 64
    numbers = st.floats(-LARGEST, LARGEST, width=width, allow_subnormal=False)
    return arrays(dtype, shape, elements=numbers)
