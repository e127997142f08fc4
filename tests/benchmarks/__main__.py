"""``python -m tests.benchmarks``: measure, and print the table of ``docs/performance.md``."""

import argparse
import sys
from collections.abc import Sequence

from multiopt import cli
from multiopt.bench.machine import cores
from tests.benchmarks.comparisons import ROWS
from tests.benchmarks.show import bench

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print.

    Args:
        argv: The arguments after the program's name; those of the process if left out.

    Returns:
        The exit status, as of ``multiopt.cli.main``. No figure changes it.
    """
    return cli.run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Times steps side by side with the libraries that are installed and prints a "
        "table; docs/performance.md says how to read it. Takes some minutes.",
    )
    parser.add_argument("--quick", action="store_true", help="little work, to see that it runs")
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, metavar="NAME", help=f"some of: {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--threads", nargs="+", type=int, metavar="N", help="default: 1, and as many as cores"
    )
    cli.add_json(parser)

    def run(arguments: argparse.Namespace) -> int:
        threads = arguments.threads or [1, cores()]
        if min(threads) < 1:
            parser.error("--threads must be at least 1")
        if problem := cli.unwritable(arguments.json):
            parser.error(problem)
        bench(arguments.only or ROWS, threads, arguments.quick, arguments.json)
        return 0

    parser.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
