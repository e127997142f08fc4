"""Processes that run a function on several ranks of torch.distributed, with gloo on this machine.

Starting a process and importing torch takes seconds, so processes wait for the next function. Each
run has a process group of its own, with as many ranks as it asks for.
"""

import atexit
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["on_ranks", "start"]

#: How many seconds a rank waits for others before it gives up, and how many a run may take.
PATIENCE, LIMIT = 60, 300

_waiting: list[tuple[Any, Connection]] = []
_numbers = count()


def on_ranks(
    ranks: int, function: Callable[..., Any], *arguments: Any, initialized: bool = True
) -> list[Any]:
    """Call a function on each rank; in it, ``torch.distributed`` is initialized.

    Args:
        ranks: How many ranks there are.
        function: A function of a module, called with the arguments.
        *arguments: Whatever can be pickled.
        initialized: Whether there is a process group; if not, the function makes its own.

    Returns:
        What it returned on each rank, in their order.

    Raises:
        AssertionError: It raised on some rank; the message has the tracebacks of all that did.
    """
    while len(_waiting) < ranks:
        _waiting.append(start())
    taken = [_waiting.pop() for _ in range(ranks)]
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / str(next(_numbers))}" if initialized else None
        for rank, (_, pipe) in enumerate(taken):
            pipe.send((store, rank, ranks, function, arguments))
        for rank, (process, pipe) in enumerate(taken):
            try:
                answer = pipe.recv() if pipe.poll(LIMIT) else (False, f"no answer in {LIMIT} s")
            except EOFError:
                process.join()
                answer = False, f"ended with exit code {process.exitcode}"
            answers.append((rank, *answer))
    failed = [f"rank {rank}: {text}" for rank, succeeded, text in answers if not succeeded]
    if failed:
        for process, _ in taken:
            process.kill()
    else:
        _waiting.extend(reversed(taken))
    assert not failed, "\n".join(failed)
    return [result for _, _, result in answers]


def start() -> tuple[Any, Connection]:
    """Start a process that waits for functions; return it and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            store, rank, ranks, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if store is not None:
                patience = timedelta(seconds=PATIENCE)
                dist.init_process_group(
                    "gloo", init_method=store, rank=rank, world_size=ranks, timeout=patience
                )
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)


@atexit.register
def _stop() -> None:
    for process, pipe in _waiting:
        pipe.close()
        process.kill()
