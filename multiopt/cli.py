"""The command line: ``multiopt demo``, ``bench``, ``verify`` and ``show``."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from multiopt import __version__
from multiopt.bench.show import bench
from multiopt.demo.show import demo
from multiopt.errors import CheckpointError
from multiopt.state.show import show
from multiopt.verify.show import verify

__all__ = ["add_json", "main", "run", "unwritable"]

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or without one print the help.

    Args:
        argv: The arguments after the program's name; those of the process if left out.

    Returns:
        The exit status: 0, or 1 if the demo's fits on NumPy and torch differ, if two libraries that
        the bench compares compute different numbers, if a promise is not kept, if a slot in a file
        that is shown is damaged, or if nobody reads what is printed, or 130 after Ctrl-C. Wrong
        arguments and a file that cannot be shown end the program with status 2.
    """
    return run(_parser(), argv)


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Run what the arguments ask for, and end without a traceback if it is cut short.

    Args:
        parser: Puts a function of the arguments, which returns the exit status, into ``run``.
        argv: The arguments after the program's name; those of the process if None.

    Returns:
        The exit status: 1 if nobody reads what is printed, 130 after Ctrl-C.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        # A name may contain characters that the terminal cannot display.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            arguments = parser.parse_args(argv)
            status: int = arguments.run(arguments)
        except KeyboardInterrupt:
            # After the "^C" of the terminal.
            print(f"\n{parser.prog}: interrupted", file=sys.stderr)
            # If the last string that was executed, in an import perhaps, ended by Ctrl-C, ``python
            # -m`` ends by the signal, whatever the status.
            exec("")
            status = 130
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        # Whoever read it, such as ``head``, has enough. Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="multiopt",
        description="Stochastic optimizers for named parameters that appear while a model runs.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def run(arguments: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    parser.set_defaults(run=run)
    commands = parser.add_subparsers(metavar="command")
    _add_demo(commands)
    _add_bench(commands)
    _add_verify(commands)
    _add_show(commands)
    return parser


def _add_demo(commands: "Commands") -> None:
    command = commands.add_parser(
        "demo",
        help="fit a hierarchical model of baseball data",
        description="Stochastic variational inference on the Efron-Morris baseball data: with "
        "NumPy and, where they are installed, with torch and with Pyro.",
    )
    command.add_argument("--steps", type=int, default=4000, help="at least 200; default 4000")
    command.add_argument("--seed", type=int, default=1970, help="at least 0; default 1970")

    def run(arguments: argparse.Namespace) -> int:
        if arguments.steps < 200:
            command.error("--steps must be at least 200, so that every player is seen")
        if arguments.seed < 0:
            command.error("--seed must be at least 0")
        return 0 if demo(arguments.steps, arguments.seed) else 1

    command.set_defaults(run=run)


def _add_bench(commands: "Commands") -> None:
    command = commands.add_parser(
        "bench",
        help="time a step of Adam here, beside other libraries",
        description="Times a step of Adam on this machine with every library that is installed, "
        "beside textbook NumPy, torch.optim, optax and pyro.optim. Takes under a minute. Exit "
        "status: 0; 1 if two libraries compute different numbers, whose times say nothing.",
    )
    command.add_argument("--quick", action="store_true", help="little work, to see that it runs")
    add_json(command)

    def run(arguments: argparse.Namespace) -> int:
        if problem := unwritable(arguments.json):
            command.error(problem)
        return 0 if bench(arguments.quick, arguments.json) else 1

    command.set_defaults(run=run)


def add_json(command: argparse.ArgumentParser) -> None:
    """Give a command the option ``--json``."""
    command.add_argument("--json", metavar="FILE", help="also as JSON; - for JSON alone, printed")


def unwritable(path: str | None) -> str | None:
    """Why the file of ``--json`` cannot be written, if so, before anything is measured."""
    if path is None or path == "-":
        return None
    try:
        Path(path).open("a").close()
    except OSError as error:
        return f"--json must be a file that can be written: {error}"
    return None


def _add_verify(commands: "Commands") -> None:
    command = commands.add_parser(
        "verify",
        help="check that this machine and its libraries keep what multiopt promises",
        description="Performs the operations that equal results rest on with every library that is "
        "installed, and holds them to IEEE 754; runs every rule on every engine, and compares the "
        "results to the last bit; writes files and reads them. Takes a minute or two, and a few "
        "seconds once all kernels are on disk. Exit status: "
        "0; 1 if a promise is not kept here, and then the report says what to do.",
    )
    command.add_argument(
        "--library",
        metavar="MODULE",
        action="append",
        default=[],
        help="also check the arrays of another Array API library; may be repeated",
    )
    add_json(command)

    def run(arguments: argparse.Namespace) -> int:
        if problem := unwritable(arguments.json):
            command.error(problem)
        for name in arguments.library:
            if not find_spec(name) or not hasattr(import_module(name), "asarray"):
                command.error(
                    f"--library must be an Array API library that is installed; got {name!r}"
                )
        return 0 if verify(arguments.json, arguments.library) else 1

    command.set_defaults(run=run)


def _add_show(commands: "Commands") -> None:
    command = commands.add_parser(
        "show",
        help="print what is in a checkpoint, and check it",
        description="Prints the names, rules, steps, shapes, dtypes and bytes in a file that "
        "Optimizer.save wrote, or in a directory of save_sharded, and holds its arrays to their "
        "checksums. Pending names wait for a "
        "parameter. What is too wide for the terminal is cut; COLUMNS=200 in the environment makes "
        "room. Exit status: 0; 1 if an array is damaged; 2 if the file cannot be shown: it is "
        "missing, of another kind, or damaged as a whole.",
    )
    command.add_argument("file", metavar="FILE", help="or the directory of several ranks")

    def run(arguments: argparse.Namespace) -> int:
        try:
            return 0 if show(arguments.file) else 1
        except BrokenPipeError:
            raise
        except (CheckpointError, OSError) as error:
            command.error(str(error))

    command.set_defaults(run=run)
