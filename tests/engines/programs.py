"""Random updates, for what traces them and what runs the trace."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st


@st.composite
def programs(draw: st.DrawFn) -> tuple[Callable[..., Any], int]:
    """A random update: operations on any of the values so far, any of them returned."""
    slot_count = draw(st.integers(0, 3))
    arrays, bools, steps = 2 + slot_count, 0, []
    for _ in range(draw(st.integers(0, 12))):
        kind = draw(
            st.sampled_from(["+", "-", "*", "abs", "a*", "<", "==", "where", "where a", "&", "&?"])
        )
        i, j = (draw(st.integers(0, arrays - 1)) for _ in range(2))
        if ("where" in kind or "&" in kind) and not bools:
            continue
        m, n = (draw(st.integers(0, max(bools - 1, 0))) for _ in range(2))
        steps.append((kind, i, j, m, n))
        arrays, bools = (arrays, bools + 1) if kind[0] in "<=&" else (arrays + 1, bools)
    ends = draw(st.lists(st.integers(0, arrays - 1), min_size=1 + slot_count, max_size=8))

    def update(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
        x: list[Any] = [param, grad, *slots]
        masks: list[Any] = []
        of: dict[str, Callable[..., Any]] = {
            "+": lambda i, j, m, n: x[i] + x[j],
            "-": lambda i, j, m, n: x[i] - x[j],
            "*": lambda i, j, m, n: x[i] * x[j],
            "abs": lambda i, j, m, n: abs(x[i]),
            "a*": lambda i, j, m, n: c.a * x[i],
            "<": lambda i, j, m, n: x[i] < x[j],
            "==": lambda i, j, m, n: x[i] == x[j],
            "&": lambda i, j, m, n: masks[m] & masks[n],
            "&?": lambda i, j, m, n: xp.where(masks[m], x[i] > x[j], masks[n]),
            "where": lambda i, j, m, n: xp.where(masks[m], x[i], x[j]),
            "where a": lambda i, j, m, n: xp.where(masks[m], -c.a, x[j]),
        }
        for kind, *operands in steps:
            (masks if kind[0] in "<=&" else x).append(of[kind](*operands))
        return x[ends[0]], tuple(x[end] for end in ends[1 : 1 + slot_count])

    return update, slot_count
