"""Check the vectors against exact arithmetic: ``python spec/check_vectors.py [DIRECTORY]``.

This is a second implementation of the rules, from the equations of their papers, in mpmath with 256
bits (77 digits). Nothing is imported from multiopt, so a mistake in a rule cannot hide in its own
check. Each history is recomputed completely from the parameter, the gradients and the
hyperparameters in the file: an error in any step remains visible in all later ones.

The program prints one line per file; the exit status is 1 if a file has a fault, or if there are no
files.
"""

import json
import struct
import sys
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mpmath import MPContext

exact = MPContext()
exact.prec = 256

# How far a result may be from the exact one, by name, in ulps. An ulp is the spacing of the dtype
# at the largest magnitude that the element of the parameter or slot has had. (If numbers cancel,
# the difference carries the rounding errors of the larger ones.) With u for half an ulp,
# coefficients rounded like everything else, and each rounding at its worst, a step adds
#
# * to ``momentum_buffer`` and ``exp_avg``, a * x + b * y, 3 u: coefficient, product, sum;
# * to ``exp_avg_sq`` the same, and 1 u more for the second product of its new term;
# * to ``max_corrected_exp_avg_sq`` once 2 u: coefficient, product;
# * to ``param`` 1 u for the subtraction, 2 u for a decay, and the error of the change, weighted by
#   its share in the parameter: 7 u of its own, the error of ``exp_avg``, and half of the error of
#   ``exp_avg_sq``.
#
# That is about 2 ulps per step, and less over several steps, because errors have either sign.
# RMSprop is allowed twice as many for the parameter: its first changes are ten times as large as
# the later ones, and where they cancel each other their errors add up.
SGD_ULPS = {"param": 4.0, "momentum_buffer": 4.0}
ADAM_SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "max_corrected_exp_avg_sq")
ADAM_ULPS = dict.fromkeys(("param", *ADAM_SLOTS), 8.0)
ULPS = {
    "SGD": SGD_ULPS,
    "Adam": ADAM_ULPS,
    "AdamW": ADAM_ULPS,
    "ClippedAdam": ADAM_ULPS,
    # ``sum`` gains 2 u per step: the square and the addition.
    "Adagrad": {"param": 8.0, "sum": 4.0},
    # ``delta`` has 6 u of its own and half of the error of either average; its square has twice
    # that, and enters ``acc_delta``, which keeps it, with the weight of the new term.
    "Adadelta": {"param": 8.0, "square_avg": 8.0, "acc_delta": 8.0},
    # ``prev`` is a gradient or zero; ``step_size`` gains 2 u per step: factor and product.
    "Rprop": {"param": 8.0, "prev": 0.0, "step_size": 8.0},
    "AdagradRMSProp": {"param": 8.0, "sum": 8.0},
    "RMSprop": {"param": 16.0, "square_avg": 8.0, "momentum_buffer": 8.0, "grad_avg": 8.0},
    "ASGD": {"param": 8.0, "ax": 8.0},
    "Lion": {"param": 8.0, "exp_avg": 8.0},
    # ``exp_inf`` gains 2 u per step, from a product or a sum.
    "Adamax": {"param": 8.0, "exp_avg": 8.0, "exp_inf": 8.0},
    "NAdam": ADAM_ULPS,
    "RAdam": ADAM_ULPS,
    # ``exp_avg_var`` gains the error of ``exp_avg`` in addition to what ``exp_avg_sq`` gains.
    "AdaBelief": {"param": 8.0, "exp_avg": 8.0, "exp_avg_var": 8.0},
}

#: Bits of the significand, the exponent of the smallest number, and the letter for ``struct``.
FORMATS = {"float32": (24, -149, "f"), "float64": (53, -1074, "d")}


# The rules. Each yields, for one element, the exact parameter and slots after each step.


def decayed(param: Any, grad: Any, h: Any, rate: Any) -> tuple[Any, Any]:
    """Return the parameter and the gradient after weight decay of one or the other.

    Loshchilov & Hutter (2019), Algorithms 1 and 2, in torch's form, which scales the decay by the
    learning rate.
    """
    grad = -grad if h.maximize else grad
    if h.decoupled_weight_decay:
        return param - rate * h.weight_decay * param, grad
    return param, grad + h.weight_decay * param


def sgd(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Sutskever et al. (2013), equations 1-4, with the learning rate outside the buffer."""
    has_buffer = options["momentum"] != 0
    buffer = None
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        param, grad = decayed(param, grad, h, h.lr)
        direction = grad
        if has_buffer:
            buffer = grad if step == 1 else h.momentum * buffer + (1 - h.dampening) * grad
            direction = grad + h.momentum * buffer if h.nesterov else buffer
        param -= h.lr * direction
        yield {"param": param, "momentum_buffer": buffer}


def adam(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Kingma & Ba (2015), Algorithm 1; the AMSGrad of Reddi et al. (2018), and torch's."""
    m = v = largest = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        beta1, beta2 = h.betas
        param, grad = decayed(param, grad, h, h.lr)
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        m_hat = m / (1 - beta1**step)
        v_hat = v / (1 - beta2**step)
        if h.amsgrad == "corrected":
            v_hat = largest = max(largest, v_hat)
        elif h.amsgrad:
            largest = max(largest, v)
            v_hat = largest / (1 - beta2**step)
        param -= h.lr * m_hat / (exact.sqrt(v_hat) + h.eps)
        largest_slots = dict.fromkeys(("max_exp_avg_sq", "max_corrected_exp_avg_sq"), largest)
        yield {"param": param, "exp_avg": m, "exp_avg_sq": v, **largest_slots}


def adamw(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Loshchilov & Hutter (2019), Algorithm 2."""
    return adam(param, grads, {**options, "decoupled_weight_decay": True})


def clipped_adam(
    param: Any, grads: Iterable[Any], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Kingma & Ba (2015), section 2: the bias corrections in the step size; Pyro's additions."""
    m = v = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        beta1, beta2 = h.betas
        grad = max(-h.clip_norm, min(grad, h.clip_norm)) + h.weight_decay * param
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * (grad - m if h.centered_variance else grad) ** 2
        lr = h.lr * h.lrd**step
        step_size = lr * exact.sqrt(1 - beta2**step) / (1 - beta1**step)
        param -= step_size * m / (exact.sqrt(v) + h.eps)
        yield {"param": param, "exp_avg": m, "exp_avg_sq": v}


def adagrad(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Duchi et al. (2011), Figure 1, diagonal; torch's start of the sum and decay of the rate."""
    total = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        if step == 1:
            total = h.initial_accumulator_value
        rate = h.lr / (1 + (step - 1) * h.lr_decay)
        param, grad = decayed(param, grad, h, rate)
        total += grad**2
        param -= rate * grad / (exact.sqrt(total) + h.eps)
        yield {"param": param, "sum": total}


def adadelta(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Zeiler (2012), Algorithm 1."""
    square = change = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        param, grad = decayed(param, grad, h, h.lr)
        square = h.rho * square + (1 - h.rho) * grad**2
        delta = exact.sqrt(change + h.eps) / exact.sqrt(square + h.eps) * grad
        change = h.rho * change + (1 - h.rho) * delta**2
        param -= h.lr * delta
        yield {"param": param, "square_avg": square, "acc_delta": change}


def rprop(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Riedmiller & Braun (1993) without the step back: iRprop- of Igel & Hüsken (2000)."""
    prev = size = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        if step == 1:
            size = h.lr
        grad = -grad if h.maximize else grad
        product = prev * grad
        size *= h.etas[product > 0] if product else 1
        size = min(max(size, h.step_sizes[0]), h.step_sizes[1])
        prev = exact.zero if product < 0 else grad
        param -= exact.sign(prev) * size
        yield {"param": param, "prev": prev, "step_size": size}


def adagrad_rmsprop(
    param: Any, grads: Iterable[Any], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Kucukelbir et al. (2017), equations 10 and 11, with tau of 1."""
    average = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        average = grad**2 if step == 1 else h.t * grad**2 + (1 - h.t) * average
        rate = h.eta * exact.power(step, h.delta - exact.mpf("0.5"))
        param -= rate / (1 + exact.sqrt(average)) * grad
        yield {"param": param, "sum": average}


def rmsprop(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Tieleman & Hinton (2012); centered: Graves (2013), equations 38-41; eps outside the root."""
    mean_square = mean = buffer = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        param, grad = decayed(param, grad, h, h.lr)
        mean_square = h.alpha * mean_square + (1 - h.alpha) * grad**2
        mean = h.alpha * mean + (1 - h.alpha) * grad
        divisor = exact.sqrt(mean_square - mean**2 if h.centered else mean_square) + h.eps
        buffer = h.momentum * buffer + grad / divisor
        param -= h.lr * buffer
        slots = {"square_avg": mean_square, "momentum_buffer": buffer, "grad_avg": mean}
        yield {"param": param, **slots}


def asgd(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Polyak & Juditsky (1992), with the learning rate of Bottou (2012)."""
    average = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        grad = (-grad if h.maximize else grad) + h.weight_decay * param
        eta = h.lr / (1 + h.lambd * h.lr * (step - 1)) ** h.alpha
        param = (1 - h.lambd * eta) * param - eta * grad
        average += (param - average) / max(1, step - 1 - h.t0)
        yield {"param": param, "ax": average}


def lion(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Chen et al. (2023), Algorithm 2."""
    m = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        beta1, beta2 = h.betas
        grad = -grad if h.maximize else grad
        param -= h.lr * (exact.sign(beta1 * m + (1 - beta1) * grad) + h.weight_decay * param)
        m = beta2 * m + (1 - beta2) * grad
        yield {"param": param, "exp_avg": m}


def adamax(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Kingma & Ba (2015), Algorithm 2; torch's eps."""
    m = u = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        beta1, beta2 = h.betas
        param, grad = decayed(param, grad, h, h.lr)
        m = beta1 * m + (1 - beta1) * grad
        u = max(beta2 * u, abs(grad) + h.eps)
        param -= h.lr / (1 - beta1**step) * m / u
        yield {"param": param, "exp_avg": m, "exp_inf": u}


def nadam(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Dozat (2016), Algorithm 2, with the constant beta1 in the average, as torch."""
    m = v = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        beta1, beta2 = h.betas
        param, grad = decayed(param, grad, h, h.lr)
        factor = exact.mpf(0.96)
        *mus, mu, mu_next = (
            beta1 * (1 - factor ** (i * h.momentum_decay) / 2) for i in range(1, step + 2)
        )
        product = exact.fprod([*mus, mu])
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        m_hat = mu_next * m / (1 - product * mu_next) + (1 - mu) * grad / (1 - product)
        param -= h.lr * m_hat / (exact.sqrt(v / (1 - beta2**step)) + h.eps)
        yield {"param": param, "exp_avg": m, "exp_avg_sq": v}


def radam(param: Any, grads: Iterable[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Liu et al. (2020), Algorithm 2; torch's eps and its bound of 5."""
    m = v = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        beta1, beta2 = h.betas
        param, grad = decayed(param, grad, h, h.lr)
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        m_hat = m / (1 - beta1**step)
        limit = 2 / (1 - beta2) - 1
        rho = limit - 2 * step * beta2**step / (1 - beta2**step)
        if rho > 5:
            r = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
            m_hat *= exact.sqrt(r * (1 - beta2**step)) / (exact.sqrt(v) + h.eps)
        param -= h.lr * m_hat
        yield {"param": param, "exp_avg": m, "exp_avg_sq": v}


def adabelief(
    param: Any, grads: Iterable[Any], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Zhuang et al. (2020), Algorithm 2."""
    m = s = exact.zero
    for step, grad in enumerate(grads, start=1):
        h = at(options, step)
        beta1, beta2 = h.betas
        param, grad = decayed(param, grad, h, h.lr)
        m = beta1 * m + (1 - beta1) * grad
        s = beta2 * s + (1 - beta2) * (grad - m) ** 2 + h.eps
        m_hat, s_hat = m / (1 - beta1**step), s / (1 - beta2**step)
        param -= h.lr * m_hat / (exact.sqrt(s_hat) + h.eps)
        yield {"param": param, "exp_avg": m, "exp_avg_var": s}


RULES = {
    "SGD": sgd,
    "Adam": adam,
    "AdamW": adamw,
    "ClippedAdam": clipped_adam,
    "Adagrad": adagrad,
    "Adadelta": adadelta,
    "Rprop": rprop,
    "AdagradRMSProp": adagrad_rmsprop,
    "RMSprop": rmsprop,
    "ASGD": asgd,
    "Lion": lion,
    "Adamax": adamax,
    "NAdam": nadam,
    "RAdam": radam,
    "AdaBelief": adabelief,
}


def at(options: dict[str, Any], step: int) -> SimpleNamespace:
    """The hyperparameters at a step; floats become exact numbers, switches stay as they are."""

    def exactly(value: Any) -> Any:
        if isinstance(value, dict):
            return exactly(value["schedule"][step - 1])
        if isinstance(value, list):
            return [exactly(part) for part in value]
        return exact.mpf(value) if isinstance(value, float) else value

    return SimpleNamespace(**{name: exactly(value) for name, value in options.items()})


# The comparison


def deviations(
    rule: str,
    dtype: str,
    options: dict[str, Any],
    param: float,
    grads: list[float],
    steps: list[dict[str, float]],
) -> dict[str, list[float]]:
    """Measure how far the history of one element is from the exact one.

    Args:
        rule: A key of ``RULES``.
        dtype: A key of ``FORMATS``.
        options: The hyperparameters: floats, bools, ``{"schedule": [...]}``.
        param: The parameter before the first step.
        grads: The gradient of each step.
        steps: The parameter and the slots after each step, by name.

    Returns:
        By name, for each step, the distance in ulps as defined above ``ULPS``.
    """
    start = exact.mpf(param)
    truth = RULES[rule](start, map(exact.mpf, grads), options)
    # ASGD averages parameters, so its average inherits their errors.
    largest = dict.fromkeys(steps[0], exact.zero) | {"param": abs(start), "ax": abs(start)}
    result: dict[str, list[float]] = {name: [] for name in steps[0]}
    for got, wanted in zip(steps, truth, strict=True):
        for name, value in got.items():
            largest[name] = max(largest[name], abs(wanted[name]))
            distance = abs(value - wanted[name]) / ulp(largest[name], dtype)
            result[name].append(float(distance))
    return result


def ulp(x: Any, dtype: str) -> Any:
    """The spacing of the numbers of a dtype near ``x``."""
    bits, smallest, _ = FORMATS[dtype]
    exponent = exact.frexp(x)[1] - bits if x else smallest
    return exact.ldexp(1, max(exponent, smallest))


# The files


def parsed(value: Any) -> Any:
    """Convert the hexadecimal strings in parsed JSON to floats."""
    if isinstance(value, dict):
        return {key: parsed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [parsed(part) for part in value]
    return float.fromhex(value) if isinstance(value, str) and value != "corrected" else value


def check(path: Path) -> tuple[str, list[str]]:
    """Check a file of vectors.

    Elements that meet an infinity or a NaN are left out; a case with such elements must say so.

    Returns:
        A summary of what was checked, and the faults found.
    """
    file = json.loads(path.read_text(encoding="utf-8"))
    rule, faults, numbers = file["rule"], [], 0
    worst: dict[str, dict[str, float]] = {dtype: {} for dtype in FORMATS}
    for case in file["cases"]:
        dtype, where = case["dtype"], f"{case['name']}, {case['dtype']}"
        bounds, letter = ULPS[rule], FORMATS[dtype][2]
        options, param, grads, steps = (
            parsed(case[key]) for key in ("hyperparameters", "param", "grads", "steps")
        )
        finite = True
        for i, start in enumerate(param):
            inputs = [grad[i] for grad in grads]
            results = [{name: array[i] for name, array in after.items()} for after in steps]
            values = [start, *inputs, *(x for after in results for x in after.values())]
            if not all(map(isfinite, values)):
                finite = False
                continue
            if any(struct.unpack(letter, struct.pack(letter, x))[0] != x for x in values):
                faults.append(f"{where}: element {i} has a number that is not a {dtype}")
            numbers += len(results) * len(results[0])
            for name, off in deviations(rule, dtype, options, start, inputs, results).items():
                worst[dtype][name] = max(worst[dtype].get(name, 0.0), *off)
                faults += [
                    f"{where}: {name}[{i}] after step {step} is off by {distance:.3g} ulps; "
                    f"at most {bounds[name]:g} are allowed"
                    for step, distance in enumerate(off, start=1)
                    if not distance <= bounds[name]
                ]
        if finite != case["finite"]:
            faults.append(f"{where}: 'finite' says {case['finite']}, but it is {finite}")
    margins = "; ".join(
        f"{dtype} " + ", ".join(f"{name} {x:.1f}/{ULPS[rule][name]:g}" for name, x in row)
        for dtype, row in ((dtype, row.items()) for dtype, row in worst.items())
    )
    return f"{len(file['cases'])} cases, {numbers} numbers, worst ulps: {margins}", faults


def main(directory: Path) -> int:
    """Check every file in a directory; return the exit status."""
    paths = sorted(directory.glob("*.json"))
    failed = not paths
    for path in paths:
        summary, faults = check(path)
        print(f"{path.name}: {'FAILED' if faults else 'ok'}: {summary}")
        for fault in faults:
            print(f"  {fault}", file=sys.stderr)
        failed = failed or bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "vectors"))
