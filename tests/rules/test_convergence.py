"""Every rule that multiopt exports goes down to the optimum of three problems.

It has converged when the loss, whose minimum is zero, has been below a hundredth of that at the
start for 500 steps in a row: a rule that swings through the optimum has not.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import multiopt as mo
from multiopt import rules

RULES = [getattr(mo, name) for name in rules.__all__ if name != "Rule"]


class Problem:
    """A loss over four numbers or two, zero at its minimum."""

    start: np.ndarray

    def loss(self, x: np.ndarray) -> float:
        raise NotImplementedError

    def grads(self, x: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        """The gradient at ``x``, which changes in between, for each step."""
        raise NotImplementedError


class Bowl(Problem):
    """A quadratic whose curvatures are 1 to 100, in directions that are not those of the axes."""

    curvatures = np.geomspace(1.0, 100.0, 4)

    def __init__(self) -> None:
        directions = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
        self.hessian = directions * self.curvatures @ directions.T
        # As much of the loss in each direction.
        self.start = directions @ self.curvatures**-0.5

    def loss(self, x: np.ndarray) -> float:
        return float(x @ self.hessian @ x) / 2

    def grads(self, x: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        for _ in range(steps):
            yield self.hessian @ x


class Rosenbrock(Problem):
    """A bent valley."""

    start = np.array([-1.2, 1.0])

    def loss(self, x: np.ndarray) -> float:
        return float((1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2)

    def grads(self, x: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        for _ in range(steps):
            a, b = x.tolist()
            across = 200 * (b - a * a)
            yield np.array([-2 * (1 - a) - 2 * a * across, across])


class Elbo(Problem):
    """The negative evidence lower bound of two unknown means, each from one reparametrized sample.

    The prior is standard normal; ``n`` observations of each mean have deviation ``sigma``. The
    guide is normal, its parameters are locations and logarithms of scales. The posterior is normal,
    so the optimum is known: the loss is the divergence of the guide from it, by which the bound is
    below the evidence.
    """

    n, sigma, means = 10, 1.5, np.array([2.0, -2.0])
    start = np.zeros(4)

    def __init__(self) -> None:
        self.precision = 1.0 + self.n / self.sigma**2
        self.posterior = self.means * (self.n / self.sigma**2) / self.precision

    def loss(self, x: np.ndarray) -> float:
        loc, log_scale = x[:2], x[2:]
        scaled = self.precision * (np.exp(2 * log_scale) + (loc - self.posterior) ** 2)
        return float((scaled - 1 - np.log(self.precision)).sum() / 2 - log_scale.sum())

    def grads(self, x: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        for noise in np.random.default_rng(0).standard_normal((steps, 2)):
            moved = np.exp(x[2:]) * noise
            of_loc = self.precision * (x[:2] + moved - self.posterior)
            yield np.concatenate([of_loc, of_loc * moved - 1])


#: Steps within which a rule must converge.
STEPS = 25_000
#: What rules need that do not get there with their defaults, and why.
SPECIAL: dict[tuple[str, str], dict[str, Any]] = {
    # 1e-2 diverges: the curvature at the start is above 2 / 1e-2.
    ("ASGD", "Rosenbrock"): {"lr": 1e-3},
    # The steps shrink as 1 / sqrt(t): 1e-2 needs 25 000 and more.
    ("Adagrad", "Rosenbrock"): {"lr": 0.1},
    ("Adagrad", "Elbo"): {"lr": 0.1},
    # 1.0 comes close and swings to and fro there.
    ("Adadelta", "Bowl"): {"lr": 0.1},
    ("Adadelta", "Rosenbrock"): {"lr": 0.1},
    # 1e-3 needs 25 000 steps and 8000, which are slow ones. Its steps do not become small: at 1e-2
    # it leaves the valley again, sooner or later by the last bits.
    ("LAMB", "Rosenbrock"): {"lr": 5e-3},
    ("LAMB", "Elbo"): {"lr": 3e-3},
}
#: A rule for full batches: of a noisy gradient it follows the median, or stops.
REFUSED = [("Rprop", "Elbo")]
#: Rules for matrices.
MATRICES = ["Muon"]


@pytest.mark.parametrize("problem", [Bowl(), Rosenbrock(), Elbo()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("rule_class", RULES)
def test_rule_converges(rule_class: type[mo.Rule], problem: Problem) -> None:
    pair = rule_class.__name__, type(problem).__name__
    if pair in REFUSED:
        pytest.skip("the rule is not for noisy gradients")
    opt = mo.Optimizer(rule_class(**SPECIAL.get(pair, {})))
    shape = (-1, 2) if rule_class.__name__ in MATRICES else (-1,)
    x = problem.start.copy()
    params = {"x": x.reshape(shape)}
    bound = problem.loss(x) / 100
    below = 0
    for grad in problem.grads(x, STEPS):
        opt.step(params, {"x": grad.reshape(shape)})
        below = below + 1 if problem.loss(x) < bound else 0
        if below == 500:
            return
    pytest.fail(
        f"{opt.rule} is at {problem.loss(x):.3g} after {STEPS} steps, not below {bound:.3g}"
    )
