"""The names that ranks have: what each tells about its own, and what all of them amount to.

>>> import numpy as np
>>> names = Names()
>>> first = names.told({"w": np.zeros(2)}, {"w": np.ones(2)})
>>> other = names.told({"w": np.zeros(2), "b": np.zeros(1)}, {"b": np.ones(1)})
>>> plan = plan_of([read(first), read(other)])
>>> list(plan.layouts), plan.sources
(['w', 'b'], {'w': 0, 'b': 1})
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import numpy as np

from multiopt.arrays import Array
from multiopt.backend import backend_for
from multiopt.distributed.packing import kind_of_device
from multiopt.layout import Layout
from multiopt.step.checks import check_name, checked_gradient

__all__ = ["Names", "Plan", "Told", "plan_of", "read"]

#: The libraries whose arrays a step can update in place.
LIBRARIES = "numpy", "torch"


class Told(NamedTuple):
    """What a rank tells about a name.

    Attributes:
        layout: The layout of its array; of its device only the type.
        has_grad: Whether it has a gradient.
    """

    layout: Layout
    has_grad: bool


class Plan(NamedTuple):
    """What the names of all ranks amount to.

    Attributes:
        layouts: The layouts of the names that have a gradient on any rank, as they were told.
        sources: By name, the lowest rank that has it, with or without a gradient.
    """

    layouts: dict[str, Layout]
    sources: dict[str, int]


class Names:
    """What this rank tells. Most steps have the names of an earlier one, so that is remembered."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._layouts: dict[Hashable, Layout] = {}
        #: The last parameters, which have gradients, and what was told of them.
        self._last: list[str] = []
        self._arrays: list[Array] = []
        self._has_grad: list[bool] = []
        self._text = b"[]"
        #: The layouts of the last parameters, by name; the same object while they are equal.
        self.layouts: dict[str, Layout] = {}

    def told(self, params: Mapping[str, Array], grads: Mapping[str, Array | None]) -> bytes:
        """Check parameters and gradients, and list them for the other ranks.

        Args:
            params: The parameters.
            grads: Their gradients; None or missing for those without one.

        Raises:
            TypeError: Something is not a usable array of NumPy or PyTorch, or a gradient has
                another library, dtype or device than its parameter.
            ValueError: A gradient has another shape than its parameter.
        """
        names, arrays = list(params), list(params.values())
        is_known = names == self._last and all(map(is_, arrays, self._arrays))
        layouts = self.layouts if is_known else self._looked_at(params)
        has_grad = []
        for (name, layout), grad in zip(layouts.items(), map(grads.get, names), strict=True):
            has_grad.append(grad is not None)
            if grad is not None:
                grad = np.asarray(grad) if isinstance(grad, np.generic) else grad
                found = self._layout_of(name, grad, "gradient")
                if found is not layout and found != layout:
                    checked_gradient(name, grad, layout)
        if names != self._last or layouts != self.layouts or has_grad != self._has_grad:
            told = [
                [name, has, x.library, x.dtype, kind_of_device(x), *x.shape]
                for (name, x), has in zip(layouts.items(), has_grad, strict=True)
            ]
            # Any string may be a name, also one that JSON would change by escaping it.
            text = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
            self._text = text.encode("utf-8", "surrogatepass")
        self._last, self._arrays, self.layouts, self._has_grad = names, arrays, layouts, has_grad
        return self._text

    def _looked_at(self, params: Mapping[str, Array]) -> dict[str, Layout]:
        """The layouts of parameters; the last ones if they are equal."""
        for name in params:
            check_name("params", name)
        layouts = {name: self._layout_of(name, x, "parameter") for name, x in params.items()}
        return self.layouts if list(layouts.items()) == list(self.layouts.items()) else layouts

    def _layout_of(self, name: str, array: Array, what: str) -> Layout:
        """The layout of an array; arrays that are alike share one."""
        try:
            # A sparse tensor has another layout, in torch's sense.
            key: Any = (
                type(array),
                array.shape,
                array.dtype,
                array.device,
                getattr(array, "layout", 0),
            )
            known = self._layouts.get(key)
        except Exception:  # of any kind: libraries have their own
            key, known = None, None
        if known is not None:
            return known
        label = f"{what} {name!r}" if what == "parameter" else f"{what} of {name!r}"
        layout = backend_for(array, label).layout(array, label)
        if layout.library not in LIBRARIES:
            raise TypeError(
                f"{label} is a {layout.library} array; expected one of NumPy or PyTorch, which can "
                "be updated in place when only another rank has a gradient: convert it"
            )
        if key is not None:
            self._layouts[key] = layout
        return layout


def read(text: bytes) -> dict[str, Told]:
    """Read what a rank has told."""
    return {
        name: Told(Layout.of(library, shape, dtype, device), has_grad)
        for name, has_grad, library, dtype, device, *shape in json.loads(
            text.decode("utf-8", "surrogatepass")
        )
    }


def plan_of(ranks: Sequence[Mapping[str, Told]]) -> Plan:
    """What the names of all ranks amount to.

    Args:
        ranks: What each rank has told.

    Raises:
        TypeError: Ranks have a name in another library, dtype or type of device.
        ValueError: Ranks have a name in another shape.
    """
    stepped = {name for names in ranks for name, told in names.items() if told.has_grad}
    layouts, sources = dict[str, Layout](), dict[str, int]()
    for rank, names in enumerate(ranks):
        for name, told in names.items():
            if name in stepped:
                first = sources.setdefault(name, rank)
                expected = layouts.setdefault(name, told.layout)
                if told.layout != expected:
                    _refuse(name, rank, told.layout, first, expected)
    return Plan(layouts, sources)


def _refuse(name: str, rank: int, layout: Layout, first: int, expected: Layout) -> None:
    whats: list[tuple[str, Any, Any, type[Exception]]] = [
        ("library", layout.library, expected.library, TypeError),
        ("shape", layout.shape, expected.shape, ValueError),
        ("dtype", layout.dtype, expected.dtype, TypeError),
        ("device", layout.device, expected.device, TypeError),
    ]
    for what, have, want, error in whats:
        if have != want:
            raise error(
                f"parameter {name!r} has {what} {have} on rank {rank}; expected {want}, as on rank "
                f"{first}: a name is one parameter on all ranks, unless it is local"
            )
