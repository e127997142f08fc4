"""The command line: ``multiopt demo``."""

import argparse
from collections.abc import Sequence

from multiopt.demo.show import demo

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments after the program's name; those of the process if left out.

    Returns:
        The exit status: 0, or 1 if the demo's fits on NumPy and torch differ.
    """
    parser = argparse.ArgumentParser(
        prog="multiopt",
        description="Stochastic optimizers for named parameters that appear while a model runs.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "demo",
        help="fit a hierarchical model of baseball data",
        description="Stochastic variational inference on the Efron-Morris baseball data: with "
        "NumPy and, where they are installed, with torch and with Pyro.",
    )
    command.add_argument("--steps", type=int, default=4000, help="at least 200; default 4000")
    command.add_argument("--seed", type=int, default=1970, help="at least 0; default 1970")
    arguments = parser.parse_args(argv)
    if arguments.steps < 200:
        command.error("--steps must be at least 200, so that every player is seen")
    if arguments.seed < 0:
        command.error("--seed must be at least 0")
    return 0 if demo(arguments.steps, arguments.seed) else 1
