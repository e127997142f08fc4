"""The training loop: players join one by one, and half-way everything is saved and dropped."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from tqdm import tqdm

import multiopt as mo
from multiopt.demo.baseball import Player, born, latents, negative_elbo
from multiopt.terminal import width

__all__ = [
    "AsArray",
    "Fit",
    "Plan",
    "Record",
    "advance",
    "equal",
    "load",
    "progress",
    "resume",
    "save",
    "start",
]

#: Converts a NumPy array to the library that a fit runs on, such as ``torch.from_numpy``.
AsArray: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True)
class Plan:
    """How to fit.

    Args:
        stream: The players, in the order in which they join.
        steps: How many steps to take.
        seed: The seed of the minibatches and the noise.
        batch: How many of the players who have joined are in a minibatch.
        samples: How many samples each step draws from the guide.
    """

    stream: tuple[Player, ...]
    steps: int
    seed: int
    batch: int = 6
    samples: int = 16

    @property
    def half(self) -> int:
        """The number of steps before the fit is saved."""
        return self.steps // 2

    @property
    def every(self) -> int:
        """The number of steps from one player to the next: all have joined before half-way."""
        return self.half // (len(self.stream) + 2)


class Record(NamedTuple):
    """What a step saw and did.

    Attributes:
        elbo: The estimate of the ELBO for the players who have joined.
        joined: How many players have joined.
        names: How many names the optimizer has seen.
        pending: How many names still have pending state.
        clipped: How many gradients the clip shortened.
    """

    elbo: float
    joined: int
    names: int
    pending: int
    clipped: int


def learning_rate(step: int) -> float:
    """Large first, to get there; then small, to average out the noise."""
    return 0.1 / (1.0 + step / 50.0)


def new_optimizer() -> mo.Optimizer:
    """A new optimizer; the schedule of each name starts when the name is first seen."""
    return mo.Optimizer(mo.Adam(lr=learning_rate), clip=mo.Clip(norm=30.0))


@dataclass
class Fit:
    """A fit under way: the guide's parameters by name, and their optimizer."""

    params: dict[str, Any] = field(default_factory=dict)
    optimizer: mo.Optimizer = field(default_factory=new_optimizer)


def advance(fit: Fit, plan: Plan, steps: range, as_array: AsArray, title: str = "") -> list[Record]:
    """Take some steps of the plan.

    Args:
        fit: The fit, changed in place.
        plan: The plan.
        steps: Which of its steps to take; the first is 0.
        as_array: Converts arrays to the library that the fit runs on.
        title: The text before the progress bar; if empty, there is no bar.

    Returns:
        A record of each step.
    """
    history: list[Record] = []
    smooth = 0.0
    with progress(steps, title) as bar:
        for step in bar:
            # Seeded by the step, so that a resumed fit draws the same numbers.
            rng = np.random.default_rng([plan.seed, step])
            joined = min(1 + step // plan.every, len(plan.stream))
            chosen = rng.choice(joined, min(plan.batch, joined), replace=False)
            batch = [plan.stream[i] for i in chosen]
            noise = rng.standard_normal((plan.samples, len(latents(batch))))

            for latent in latents(batch):
                if f"{latent}.loc" not in fit.params:
                    fit.params |= {name: as_array(value) for name, value in born(latent).items()}
            values = {name: np.asarray(param) for name, param in fit.params.items()}
            loss, grads = negative_elbo(values, batch, joined, noise)
            gradients = {name: as_array(grad) for name, grad in grads.items()}
            opt = fit.optimizer
            fit.params = opt.step(fit.params, gradients)

            history.append(Record(-loss, joined, len(opt), len(opt.pending), len(opt.last.clipped)))
            smooth += (-loss - smooth) / min(len(history), 200)
            bar.set_postfix_str(f"ELBO {smooth:.2f}", refresh=False)
    return history


def save(fit: Fit, folder: Path) -> None:
    """Write the state of the optimizer to one file and the parameters to another."""
    fit.optimizer.save(folder / "optimizer.safetensors")
    values = {name: np.asarray(param) for name, param in fit.params.items()}
    np.savez(folder / "parameters.npz", allow_pickle=False, **values)


def load(folder: Path, as_array: AsArray) -> Fit:
    """Read what ``save`` wrote into a new fit; the state of all its names is pending."""
    with np.load(folder / "parameters.npz") as values:
        fit = Fit({name: as_array(value) for name, value in values.items()})
    fit.optimizer.load(folder / "optimizer.safetensors")
    return fit


def start(plan: Plan, folder: Path, as_array: AsArray, title: str = "") -> list[Record]:
    """Take the first half of the steps, save, and drop everything but the records."""
    fit = Fit()
    history = advance(fit, plan, range(plan.half), as_array, title)
    save(fit, folder)
    return history


def resume(
    plan: Plan, folder: Path, as_array: AsArray, title: str = ""
) -> tuple[Fit, list[Record]]:
    """Load what ``start`` saved and take the second half of the steps."""
    fit = load(folder, as_array)
    return fit, advance(fit, plan, range(plan.half, plan.steps), as_array, title)


def equal(fit: Fit, other: Fit) -> bool:
    """Whether two fits, on any libraries, are equal in every name, value, clock and slot."""
    names = fit.params.keys()
    if any(x != names for x in (other.params.keys(), {*fit.optimizer}, {*other.optimizer})):
        return False
    for name in names:
        state, other_state = fit.optimizer.state(name), other.optimizer.state(name)
        pairs = [(fit.params[name], other.params[name])]
        pairs += [(state.slots[slot], other_state.slots[slot]) for slot in state.slots]
        if state.step != other_state.step or not all(np.array_equal(a, b) for a, b in pairs):
            return False
    return True


def progress(steps: range, title: str) -> "tqdm[int]":
    """A progress bar over steps; it is off without a title, or without a terminal."""
    form = "{desc:19}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {elapsed}{postfix}"
    # None turns it off unless the output is a terminal.
    off = None if title else True
    return tqdm(steps, title, disable=off, ncols=min(width(), 80) - 1, bar_format=form)
