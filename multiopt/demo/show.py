"""The report of ``multiopt demo``."""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from multiopt.demo.baseball import AT_BATS, Floats, Player, latents, negative_elbo, players
from multiopt.demo.fit import Fit, Plan, Record, equal, resume, start
from multiopt.demo.posterior import Posterior, exact, of_guide
from multiopt.terminal import table

__all__ = ["demo"]

INTRODUCTION = f"""\
Batting averages of 18 baseball players, 1970 (Efron & Morris, JASA 70, 1975).
The first {AT_BATS} at bats of each are known; the rest of the season is the judge.

  hits ~ Binomial({AT_BATS}, sigmoid(mu + sigma * z)),  z ~ Normal(0, 1)
  mu ~ Normal(-1, 1),  sigma ~ HalfNormal(1)
"""

NEXT = """
Next: "First steps" in README.md; multiopt.adapters.pyro, for a Pyro program;
`multiopt bench`, for the speed here; `multiopt show FILE`, for a checkpoint."""


def demo(steps: int, seed: int) -> bool:
    """Fit, compare and print.

    Args:
        steps: Steps of the fit in NumPy; Pyro's takes three eighths as many.
        seed: The seed of all random numbers.

    Returns:
        False if torch is installed and its fit differs from NumPy's, else True.
    """
    everyone = players()
    order = np.random.default_rng(seed).permutation(len(everyone))
    plan = Plan(tuple(everyone[i] for i in order), steps, seed)
    truth, log_evidence = exact(everyone)

    print(INTRODUCTION)
    fit = fit_in_numpy(plan)
    guide = of_guide(fit.params, everyone)
    show_estimates(everyone, guide, truth, final_elbo(fit, everyone, seed), log_evidence)

    if find_spec("pyro"):
        from multiopt.demo import with_pyro

        print("The same model in Pyro: pyro.infer.SVI with multiopt.adapters.pyro.")
        values = with_pyro.fit(everyone, steps * 3 // 8, seed, "Pyro")
        in_pyro = of_guide(values, everyone)
        print(
            "  Averages, RMS difference from exact: "
            f"Pyro {average(rms(in_pyro.averages - truth.averages), 4)}, "
            f"NumPy {average(rms(guide.averages - truth.averages), 4)}.\n"
        )
    else:
        print("Pyro is not installed: the same model in pyro.infer.SVI is left out.\n")

    agree = True
    if find_spec("torch"):
        agree = show_torch(plan, fit)
    else:
        print("torch is not installed: the same fit with torch is left out.")
    if agree:
        print(NEXT)
    return agree


def fit_in_numpy(plan: Plan) -> Fit:
    """Run both halves of the plan with NumPy arrays, and report what happens."""
    print(
        f"NumPy alone. A player joins every {plan.every} steps and brings parameters; a step\n"
        f"sees {plan.batch} of those who have joined. The more of them, the lower the ELBO."
    )
    with TemporaryDirectory() as folder:
        first = start(plan, Path(folder), np.asarray, "NumPy, first half")
        size = (Path(folder) / "optimizer.safetensors").stat().st_size
        show_elbo(first, 0)
        print(
            f"\n  Half-way: the state of {first[-1].names} names is saved ({size / 1000:.0f} kB), "
            "all is dropped,\n  and a new optimizer loads the file."
        )
        fit, second = resume(plan, Path(folder), np.asarray, "NumPy, second half")
    pending = [record.pending for record in second]
    settled = 1 + (pending.index(0) if 0 in pending else len(pending) - 1)
    middle = 1 + settled // 2
    print(
        f"  Names pending: {first[-1].names} after loading, {pending[0]} after one step, "
        f"{pending[middle - 1]} after {middle}, {pending[settled - 1]} after {settled}.\n"
    )
    show_elbo(second, plan.half)

    oldest, youngest = (f"z.{plan.stream[i].name}.loc" for i in (0, -1))
    print("\n  Each name has a clock of its own, for its learning rate and bias correction:")
    for name in ("mu.loc", oldest, youngest):
        print(f"    {fit.optimizer.state(name).step:6} steps  {name}")
    clipped = sum(record.clipped for record in first + second)
    total = sum(fit.optimizer.state(name).step for name in fit.optimizer.names)
    print(f"  The clip shortened {clipped} of {total} gradients.\n")
    return fit


def show_elbo(history: Sequence[Record], done: int) -> None:
    """Print the mean ELBO of four stretches of steps."""
    if not done:
        print("\n         steps   players     names      ELBO")
    edges = np.linspace(0, len(history), 5).astype(int)
    for begin, end in pairwise(edges):
        stretch = history[begin:end]
        elbo = np.mean([record.elbo for record in stretch])
        steps = f"{done + begin + 1}-{done + end}"
        print(f"  {steps:>12}{stretch[-1].joined:10}{stretch[-1].names:10}{elbo:10.2f}")


def show_estimates(
    everyone: Sequence[Player], guide: Posterior, truth: Posterior, elbo: float, evidence: float
) -> None:
    """Print the estimates beside the exact posterior and the rest of the season."""
    first = np.array([player.hits / AT_BATS for player in everyone])
    rest = np.array([player.rest_average for player in everyone])
    columns = (first, guide.averages, truth.averages, rest)
    rows: list[tuple[str, ...]] = [("  batting average", "first 45", "SVI", "exact", "rest")]
    for player, *row in zip(everyone, *columns, strict=True):
        rows.append((f"  {player.name}", *map(average, row)))
    errors = [rms(column - rest) for column in columns[:3]]
    rows.append(("  RMS error, judged by the rest", *map(average, errors), ""))
    print(table(rows, numbers={1, 2, 3, 4}) + "\n")

    both = [("", "SVI", "exact")]
    for name, ours, theirs in (("mu", guide.mu, truth.mu), ("sigma", guide.sigma, truth.sigma)):
        cells = [f"{mean:.2f} ({deviation:.2f})" for mean, deviation in (ours, theirs)]
        both.append((f"  {name}, mean (deviation)", cells[0], cells[1]))
    both.append(("  ELBO <= log evidence", f"{elbo:.2f}", f"{evidence:.2f}"))
    print(table(both, numbers={1, 2}))
    print("  The guide's normals are independent, so it is a little too sure.\n")


def show_torch(plan: Plan, fit: Fit) -> bool:
    """Run both halves of the plan with torch tensors, and compare."""
    import torch

    print("The same fit with torch tensors; the gradient is the same NumPy function.")
    with TemporaryDirectory() as folder:
        start(plan, Path(folder), torch.from_numpy, "torch, first half")
        other, _ = resume(plan, Path(folder), torch.from_numpy, "torch, second half")
    slots = sum(len(fit.optimizer.state(name).slots) for name in fit.optimizer.names)
    agree = equal(fit, other)
    print(
        f"  NumPy and torch: {len(fit.params)} parameters and {slots} slots, "
        f"equal to the last bit: {agree}"
    )
    return agree


def final_elbo(fit: Fit, everyone: Sequence[Player], seed: int) -> float:
    """The ELBO of all players, from 10 000 draws: its error is about 0.01."""
    noise = np.random.default_rng(seed).standard_normal((10_000, len(latents(everyone))))
    return -negative_elbo(fit.params, everyone, len(everyone), noise)[0]


def average(x: float, digits: int = 3) -> str:
    """A batting average as it is written in the sport.

    >>> average(0.3456)
    '.346'
    """
    return f"{x:.{digits}f}".removeprefix("0")


def rms(x: Floats) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean(x**2)))
