"""A process group: what its ranks send each other, and how one waits for them.

Only numbers, bytes and arrays travel, nothing that is pickled. Waiting can be interrupted: each
collective is started and then asked whether it is complete, because a signal handler of Python does
not run while a library waits.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from multiopt.errors import brief

__all__ = ["Transport"]

#: How long gloo waits before a signal handler may run. Other backends must not be given a limit,
#: after which they break off, so they are asked whether they are done, with pauses in between.
SLICE, FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=0.1), 1e-5, 1e-3

#: torch 2.13 has renamed it, and warns of the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Transport:
    """The ranks of a process group.

    Args:
        group: The group; None for the default one.

    Attributes:
        rank: The rank of this process in the group.
        size: The number of ranks.
        waiting: Whether a collective has been started and is not complete; true for ever if it was
            broken off, for then the ranks no longer agree on which comes next.

    Raises:
        RuntimeError: There is no process group.
        TypeError: ``group`` is not a process group.
        ValueError: This process is not in it.
    """

    def __init__(self, group: Any = None) -> None:
        """Look at the group; nothing is sent."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "there is no process group; expected one: call "
                'torch.distributed.init_process_group("gloo"), in a script that torchrun starts'
            )
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group does not have this process; expected a group that it is in")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a process group or None; got {brief(group)}")
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group does not have this process; expected a group that it is in")
        # As in "cpu:gloo,cuda:nccl".
        pairs = (pair.partition(":") for pair in dist.get_backend_config(group).split(","))
        self._backends = {kind: backend for kind, _, backend in pairs}
        first = "cpu" if "cpu" in self._backends else next(iter(self._backends))
        self._device = self.own_device(first)
        self.waiting = False

    @property
    def all_ranks(self) -> set[int]:
        """The ranks of the group, among all."""
        return set(dist.get_process_group_ranks(self._group or dist.group.WORLD))

    @staticmethod
    def own_device(kind: str) -> torch.device:
        """This rank's device of a type."""
        return torch.empty(0, device=kind).device

    def carrier(self, kind: str) -> torch.device:
        """Where arrays must be that travel.

        Args:
            kind: The type of their device, such as ``"cuda"``.

        Returns:
            This rank's device of that type if the group has a backend for it; otherwise, and for
            gloo, which does not have all collectives for CUDA, the device that it serves best.
        """
        if kind != "cpu" and self._backends.get(kind, "gloo") != "gloo":
            return self.own_device(kind)
        return self._device

    def gather_numbers(self, numbers: Sequence[int]) -> np.ndarray:
        """Send some int64 numbers to all ranks.

        Returns:
            The numbers of each rank, of shape (ranks, numbers).
        """
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        every = torch.empty(self.size * len(mine), dtype=torch.int64, device=self._device)
        self.all_gather(every, mine)
        found: np.ndarray = every.cpu().numpy().reshape(self.size, -1)
        return found

    def send_bytes(self, data: bytes, lengths: Mapping[int, int]) -> dict[int, bytes]:
        """Send bytes from some ranks to all.

        Args:
            data: The bytes that this rank sends, if it is one of them.
            lengths: By the ranks that send, in the same order everywhere, how many bytes they send.

        Returns:
            The bytes by rank.
        """
        found = {}
        for source, length in lengths.items():
            tensor = torch.empty(length, dtype=torch.uint8, device=self._device)
            if source == self.rank:
                tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            self.broadcast(tensor, source)
            found[source] = tensor.cpu().numpy().tobytes()
        return found

    # Collectives, whose results are complete when they return

    def all_gather(self, every: torch.Tensor, mine: torch.Tensor) -> None:
        """Fill a tensor with those of all ranks, one after the other."""
        self._complete(_all_gather, every, mine)

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Send the k-th of equal parts of a tensor to rank k, and receive one from each rank."""
        self._complete(dist.all_to_all_single, received, sent)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Add up the tensors of all ranks, in an order that is the backend's."""
        self._complete(dist.all_reduce, tensor)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Send a tensor from one rank to all others, into theirs."""
        group = self._group
        sender = source if group is None else dist.get_global_rank(group, source)
        self._complete(dist.broadcast, tensor, sender)

    def _complete(self, collective: Callable[..., Any], *arguments: Any) -> None:
        self.waiting, pause = True, FIRST_PAUSE
        work = collective(*arguments, group=self._group, async_op=True)
        if self._backends.get(arguments[0].device.type) == "gloo":
            while not _is_over(work):
                pass
        else:
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            work.wait()
        self.waiting = False


def _is_over(work: Any) -> bool:
    """Wait for gloo, for a while; a pause would make a small collective take twice as long."""
    try:
        work.wait(SLICE)
    except RuntimeError:
        if not work.is_completed():
            return False
        # It may have ended just after the time was over: this raises only what went wrong.
        work.wait()
    return True
