"""The posterior of the players' skills: exact, by quadrature, and from a fitted guide."""

from collections.abc import Mapping, Sequence
from math import comb, log, pi
from typing import NamedTuple

import numpy as np

from multiopt.demo.baseball import AT_BATS, Floats, Player, sigmoid

__all__ = ["Posterior", "exact", "of_guide"]


class Posterior(NamedTuple):
    """Means and standard deviations of a posterior.

    Attributes:
        averages: The posterior mean of each player's batting average.
        mu: Mean and standard deviation of ``mu``.
        sigma: Mean and standard deviation of ``sigma``.
    """

    averages: Floats
    mu: tuple[float, float]
    sigma: tuple[float, float]


def exact(players: Sequence[Player]) -> tuple[Posterior, float]:
    """The posterior and the log evidence, by quadrature.

    Given ``mu`` and ``sigma``, the players are independent, so each ``z`` is integrated by itself.
    Doubling the number of nodes in every direction changes the averages and the log evidence by
    less than 1e-10, and the mean and the deviation of ``sigma`` by less than 2e-5.

    Returns:
        The posterior, and the logarithm of the probability of the data.
    """
    # Extended to negative sigma, the posterior is even and smooth, so the midpoint rule loses
    # nothing at 0. Only 1.2e-9 of the posterior lies outside these ranges.
    step = 0.01
    mu = np.arange(-2.0, 0.0, step)
    sigma = np.arange(0.5 * step, 2.0, step)
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    weights = weights / np.sqrt(2 * pi)

    theta = mu[:, None, None] + sigma[:, None] * nodes
    average = sigmoid(theta)
    log_posterior = -0.5 * (mu[:, None] + 1.0) ** 2 - 0.5 * sigma**2 - log(pi)
    given = {}  # by hits, the mean of the average given mu and sigma
    for hits in {player.hits for player in players}:
        log_likelihood = log(comb(AT_BATS, hits)) + hits * theta
        likelihood = np.exp(log_likelihood - AT_BATS * np.logaddexp(0.0, theta))
        evidence = likelihood @ weights
        given[hits] = (likelihood * average) @ weights / evidence
        log_posterior += sum(player.hits == hits for player in players) * np.log(evidence)

    posterior = np.exp(log_posterior)
    evidence = posterior.sum()
    posterior /= evidence
    averages = np.array([(posterior * given[player.hits]).sum() for player in players])
    return (
        Posterior(
            averages,
            _mean_and_deviation(mu, posterior.sum(axis=1)),
            _mean_and_deviation(sigma, posterior.sum(axis=0)),
        ),
        log(evidence * step * step),
    )


def of_guide(values: Mapping[str, Floats], players: Sequence[Player]) -> Posterior:
    """The posterior of a fitted guide, from 100 000 draws; errors of averages are about 1e-4.

    Args:
        values: The guide's parameters by name.
        players: The players to estimate.
    """
    rng = np.random.default_rng(0)

    def draws(latent: str) -> Floats:
        noise = rng.standard_normal(100_000)
        return values[f"{latent}.loc"] + np.exp(values[f"{latent}.log_scale"]) * noise

    mu, sigma = draws("mu"), np.exp(draws("log_sigma"))
    averages = [sigmoid(mu + sigma * draws(f"z.{player.name}")).mean() for player in players]
    return Posterior(
        np.array(averages),
        (float(mu.mean()), float(mu.std())),
        (float(sigma.mean()), float(sigma.std())),
    )


def _mean_and_deviation(x: Floats, probability: Floats) -> tuple[float, float]:
    mean = float(x @ probability)
    return mean, float(np.sqrt((x - mean) ** 2 @ probability))
