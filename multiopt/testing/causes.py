"""The usual mistakes of ports, each recognized by what it does to a gradient.

A recognizer is given a ``Case`` and says what it sees, or None. They are asked in order, those
first whose picture nothing else could give by chance.
"""

from collections.abc import Callable
from itertools import combinations, permutations
from math import prod

import numpy as np

from multiopt.testing.case import Case

__all__ = ["cause_of"]

#: What a recognizer says: the cause in a word or two, and what to look for.
Said = tuple[str, str] | None


def cause_of(case: Case) -> tuple[str | None, str]:
    """The usual cause of what departs, and what to look for; None and nothing if there is none.

    >>> a = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> case = Case(1, "w", {"w": a}, {"w": a.T}, {"w": a}, [], lambda *_: None, 1e-9, "float64")
    >>> cause_of(case)[0]
    'transposed'
    """
    with np.errstate(all="ignore"):
        # What is hardly off would look like a change of order, or anything else, of itself.
        for recognize in HARDLY_OFF if case.alike(case.a, case.b) else RECOGNIZERS:
            said = recognize(case)
            if said is not None:
                return said
    return None, ""


def _not_finite(case: Case) -> Said:
    bad = ~np.isfinite(case.b)
    if not bad.any() or case.a.shape != case.b.shape or not np.isfinite(case.a[bad]).any():
        return None
    return "not finite", (
        f"{int(bad.sum())} of {bad.size} numbers are NaN or infinite. A logarithm or a root at "
        "zero, a division by zero, or a where() whose other branch overflows?"
    )


def _no_gradient(case: Case) -> Said:
    if case.b.any() or not case.a.any():
        return None
    return "no gradient", (
        "all of it is zero: a detach(), stop_gradient or rounding in between, or a parameter that "
        "the port does not use?"
    )


def _transposed(case: Case) -> Said:
    a, b = case.a, case.b
    if a.ndim < 2 or prod(a.shape) != prod(b.shape):
        return None
    for axes in _permutations(a.ndim):
        turned = np.transpose(a, axes)
        if case.alike(turned, b):
            return "transposed", f"the axes stand in another order: {list(axes)}. A missing .T?"
        if case.alike(turned.reshape(b.shape), b) and not case.alike(a.reshape(b.shape), b):
            return "transposed", (
                f"the numbers are those of the prototype with axes {list(axes)}, but in this "
                "shape. A reshape where a transpose is meant, or memory in Fortran order?"
            )
    return None


def _sign(case: Case) -> Said:
    if not case.alike(case.b, -case.a):
        return None
    return "sign", "it points the other way. The loss itself for its negative, or ascent?"


def _other_batch(case: Case) -> Said:
    for back, step, what in (
        (0, case.step - 1, "the batch of the step before: it is one late"),
        (0, case.step + 1, "the batch of the next step: it is one early, perhaps it counts from 0"),
        (1, case.step, "the parameters of the step before: it works on a copy that is one late"),
        (case.step - 1, case.step, "the parameters as training began: it does not look at params"),
    ):
        if back >= case.step or step < 0:
            continue
        grads = case.again(back, step)
        if grads is None or case.name not in grads or case.alike(grads[case.name], case.a):
            continue
        if case.alike(grads[case.name], case.b):
            return ("late" if "early" not in what else "early"), f"the port takes {what}"
    return None


def _accumulated(case: Case) -> Said:
    earlier = [grads[case.name] for grads in case.earlier if case.name in grads]
    if not earlier or not any(g.any() for g in earlier):
        return None
    if not case.alike(case.b, case.a + sum(earlier)) and not case.alike(
        case.b, case.a + earlier[-1]
    ):
        return None
    return "accumulated", "it is the sum of this gradient and earlier ones. A missing zero_grad()?"


def _scaled_together(case: Case) -> Said:
    a, b, _ = case.everything()
    factor = _scale(case, a, b)
    if factor is None:
        return None
    what = "all gradients are" if len(case.expected) > 1 else "it is"
    return _scaled(what, factor)


def _broadcast(case: Case) -> Said:
    a, b = case.a, case.b
    if a.shape != b.shape:
        try:
            fits = np.broadcast_shapes(a.shape, b.shape) in (a.shape, b.shape)
        except ValueError:
            fits = False
        if not fits:
            return None
        return "broadcast", (
            f"shape {b.shape} fits {a.shape} by broadcasting. An axis that is kept or dropped, as "
            "(n, 1) for (n,)?"
        )
    for axis in range(a.ndim):
        first = np.take(b, [0], axis)
        if b.shape[axis] < 2 or not case.alike(np.broadcast_to(first, b.shape), b):
            continue
        for summary, what in ((np.sum, "sum"), (np.mean, "mean")):
            if case.alike(summary(a, axis=axis, keepdims=True), first):
                return "broadcast", (
                    f"along axis {axis} all numbers are the {what} of the prototype's. One number "
                    "that is stretched where each should have its own?"
                )
        if not case.alike(np.broadcast_to(np.take(a, [0], axis), a.shape), a):
            return "broadcast", (
                f"along axis {axis} all numbers are equal, but not in the prototype. Something is "
                "stretched, or averaged, along it: (n, 1) - (n,) is (n, n)."
            )
    return None


def _lower_precision(case: Case) -> Said:
    a, b = case.a, case.b
    if a.shape != b.shape:
        return None
    off = np.abs(b - a).max() / np.abs(a).max()
    for dtype, bound in (("float32", 1e-4), ("float16", 5e-2), ("bfloat16", 2e-1)):
        if dtype != case.dtype and off < bound and (_held_in(b, dtype) and not _held_in(a, dtype)):
            return "precision", (
                f"every number is one of {dtype}, and off by {off:.1g} at most. A cast, an array "
                f"that is created in {dtype}, or autocast?"
            )
    return None


def _probably_lower_precision(case: Case) -> Said:
    if case.a.shape != case.b.shape:
        return None
    off = np.abs(case.b - case.a).max() / np.abs(case.a).max()
    if case.dtype == "float64" and off < 1e-5:
        return "precision", (
            f"it is off by {off:.1g} of the largest at most, as by float32 somewhere in between: a "
            "constant, a cast, or an array that is created in the default dtype?"
        )
    if case.dtype == "float32" and off < 5e-3:
        return "precision", (
            f"it is off by {off:.1g} of the largest at most, as by 16 bits or TF32 in between: a "
            "cast, autocast, or the precision of matrix products?"
        )
    return None


def _term(case: Case) -> Said:
    """What is missing or too much, as a multiple of something known."""
    a, b, x = case.everything()
    if not a.size:
        return None
    own = case.params[case.name].ravel()
    for d, p, what in (
        (b - a, x, "all parameters"),
        ((case.b - case.a).ravel(), own, "the parameter"),
    ):
        if d.size < 2 or not d.any():
            continue
        noise = 1e-6 + 100 * case.tolerance * np.abs(case.a).max() / np.abs(d).max()
        for source, name, meaning in (
            (p, what, "an L2 penalty, a weight decay, or a normal prior, and its scale"),
            (np.sign(p), f"the sign of {what}", "an L1 penalty or a Laplace prior, and its scale"),
            (np.ones_like(p), "one", "an entropy, the derivative of a transform, or a linear term"),
        ):
            if what == "all parameters" and name == "one" and len(case.expected) > 1:
                continue
            factor = _factor(source, d)
            if factor is None or noise > 0.05:
                continue
            if (np.abs(d - factor * source) <= noise * np.abs(d).max()).all():
                return "term", (
                    f"the port's gradient is the prototype's {factor:+.6g} times {name}. A term "
                    f"that is dropped, added or scaled otherwise: {meaning}?"
                )
    return None


def _scaled_in_part(case: Case) -> Said:
    """One of two terms is scaled, and the other is known."""
    a, b, p = case.a.ravel(), case.b.ravel(), case.params[case.name].ravel()
    if a.size != b.size or a.size < 4:
        return None
    for source, what in ((p, "the parameter"), (np.ones_like(p), "one")):
        terms = np.stack([a, source], axis=1)
        (factor, rest), _, rank, _ = np.linalg.lstsq(terms, b, rcond=None)
        if rank == 2 and abs(rest) > case.tolerance and case.alike(terms @ (factor, rest), b):
            return "scaled", (
                f"it is {factor:.6g} times the prototype's {rest:+.6g} times {what}, as if one "
                "term of the loss were scaled and the other, a penalty or a prior, were not. The "
                "size of a batch or of the data that is missing in a factor?"
            )
    return None


def _scaled_alone(case: Case) -> Said:
    a, b = case.a.ravel(), case.b.ravel()
    factor = _scale(case, a, b)
    return None if factor is None else _scaled("it alone is", factor)


def _scale(case: Case, a: np.ndarray, b: np.ndarray) -> float | None:
    """The factor between two vectors; None if there is none, or if it may be rounding."""
    factor = _factor(a, b)
    if factor is None or not case.alike(b, factor * a) or (a.size == 1 and not _is_plain(factor)):
        return None
    # A constant of float32 is off by up to 6e-8. What is left must be small beside the excess.
    excess = abs(factor - 1)
    is_sure = excess > 1e-6 and np.abs(b - factor * a).max() < 0.01 * excess * np.abs(a).max()
    return factor if excess > 0.01 or is_sure else None


def _scaled(what: str, factor: float) -> Said:
    if factor < 0:
        return "scaled", f"{what} {factor:.6g} times the prototype's: another sign and scale"
    way = f"{factor:.6g} times as large"
    if factor < 1 and _is_plain(factor):
        way = f"1/{1 / factor:.6g} as large"
    return "scaled", (
        f"{what} {way}. A sum in the place of a mean, or the size of a batch or of the data that "
        "is missing in a factor?"
    )


def _chain_rule(case: Case) -> Said:
    """A factor that is a function of the parameter."""
    a, b, p = case.a, case.b, case.params[case.name]
    if a.shape != b.shape or a.size < 2:
        return None
    sigmoid = 1 / (1 + np.exp(-p))
    for factor, what in (
        (np.exp(p), "exp(parameter)"),
        (p, "the parameter"),
        (sigmoid, "sigmoid(parameter)"),
        (sigmoid * (1 - sigmoid), "the derivative of sigmoid(parameter)"),
        (1 - p * p, "1 - parameter ** 2"),
        (1 - np.tanh(p) ** 2, "the derivative of tanh(parameter)"),
    ):
        for scale, how in ((factor, "times"), (1 / factor, "divided by")):
            if case.alike(b, a * scale):
                return "chain rule", (
                    f"it is the prototype's {how} {what}. The derivative of a transform that is "
                    "missing, or taken twice?"
                )
    return None


def _clipped(case: Case) -> Said:
    a, b = case.a, case.b
    if a.shape != b.shape:
        return None
    bound = np.abs(b).max()
    if bound > 0 and np.abs(a).max() > bound and case.alike(np.clip(a, -bound, bound), b):
        return "clipped", f"it is cut off at {bound:.6g}. Clipped before it is compared?"
    return None


def _reordered(case: Case) -> Said:
    a, b = case.a, case.b
    if a.size < 2 or a.size != b.size:
        return None
    for axis in range(a.ndim) if a.shape == b.shape else ():
        for shift in (1, -1):
            if a.shape[axis] > 2 and case.alike(np.roll(a, shift, axis), b):
                return (
                    "order",
                    f"it is rolled by {shift} along axis {axis}. An index that is one off?",
                )
        if case.alike(np.flip(a, axis), b):
            return "order", f"axis {axis} is reversed. A flip, or the other end first?"
    if case.alike(np.sort(a.ravel()), np.sort(b.ravel())):
        return "order", "the numbers are the same, but in another order. Axes, gates or classes?"
    return None


def _partly(case: Case) -> Said:
    a, b = case.a, case.b
    if a.shape != b.shape:
        return None
    scale = np.abs(a).max()
    is_off = np.abs(a - b) > 10 * case.tolerance * scale
    if not is_off.any() or is_off.all():
        return None
    if not b[is_off].any():
        return "partly zero", (
            f"{int(is_off.sum())} of {is_off.size} numbers are zero, the others right. A mask, a "
            "padding index, or a slice that ends too early?"
        )
    for axis in range(a.ndim):
        rest = tuple(k for k in range(a.ndim) if k != axis)
        lines = is_off.any(axis=rest)
        if a.ndim > 1 and not lines.all():
            which = np.flatnonzero(lines).tolist()
            shown = which if len(which) < 6 else [*which[:5], "..."]
            return "partly", f"along axis {axis} only {shown} of {a.shape[axis]} are off"
    which = np.flatnonzero(is_off).tolist()
    return (
        "partly",
        f"{len(which)} of {is_off.size} numbers are off: the first is number {which[0]}",
    )


#: In the order in which they are asked.
RECOGNIZERS: tuple[Callable[[Case], Said], ...] = (
    _not_finite,
    _no_gradient,
    _lower_precision,
    _other_batch,
    _accumulated,
    _sign,
    _scaled_together,
    _transposed,
    _broadcast,
    _term,
    _reordered,
    _clipped,
    _scaled_alone,
    _chain_rule,
    _scaled_in_part,
    _probably_lower_precision,
    _partly,
)

#: Those for gradients that are nearly right.
HARDLY_OFF = (_lower_precision, _scaled_together, _term, _scaled_alone, _probably_lower_precision)


def _factor(x: np.ndarray, y: np.ndarray) -> float | None:
    """The number by which ``x`` comes nearest to ``y``; None if there is none."""
    square = x @ x if x.shape == y.shape and x.size else 0.0
    if not 0 < square < np.inf:
        return None
    factor = float((x @ y) / square)
    return factor if np.isfinite(factor) and factor != 0 else None


def _is_plain(factor: float) -> bool:
    """Whether a number, or its inverse, is a small integer or half of one."""
    larger = max(abs(factor), 1 / abs(factor))
    return larger < 1e6 and abs(2 * larger - round(2 * larger)) < 1e-6 * larger


def _held_in(x: np.ndarray, dtype: str) -> bool:
    """Whether a dtype holds all numbers exactly."""
    if dtype == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32)
        return bool((x == x.astype(np.float32)).all() and not (bits & 0xFFFF).any())
    return bool((x == x.astype(dtype)).all())


def _permutations(count: int) -> list[tuple[int, ...]]:
    """The orders of axes but the first; of many axes only those that swap two."""
    own = tuple(range(count))
    if count <= 4:
        return [axes for axes in permutations(own) if axes != own]
    swapped = []
    for i, j in combinations(own, 2):
        axes = list(own)
        axes[i], axes[j] = axes[j], axes[i]
        swapped.append(tuple(axes))
    return swapped
