"""Checkpoints of several ranks: each writes what it holds, and any number of ranks load it.

Every rank writes a file with its pieces, and then rank 0 the index, which makes them a checkpoint
(``multiopt.state.index``). To load, each rank reads the pieces that overlap with what it holds; all
have checked theirs before any changes anything.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from multiopt.arrays import Array
from multiopt.distributed.assembly import Wanted, assembled
from multiopt.distributed.boxes import box_of, here
from multiopt.distributed.transport import Transport
from multiopt.errors import CheckpointError, brief
from multiopt.optimizer import Optimizer
from multiopt.state.index import INDEX, Box, File, Index, Piece, checksum_of
from multiopt.state.loading import load
from multiopt.state.params import tables_of
from multiopt.state.plateaus import pending_now, warn_of_left_behind
from multiopt.state.report import LoadReport
from multiopt.state.settings import described_settings
from multiopt.state.tables import held, waiting
from multiopt.state.writing import write

__all__ = ["load_sharded", "save_sharded"]

Result = TypeVar("Result")

#: The names of the files of ranks.
FILES = re.compile(r"\.?([0-9a-f]{16})-\d{5}\.safetensors(\.[0-9a-f]{16}\.tmp)?")


def save_sharded(
    directory: str | os.PathLike[str],
    optimizer: Any,
    params: Mapping[str, Array] | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    local: Callable[[str], bool] | None = None,
    group: Any = None,
) -> None:
    """Write what all ranks hold into a directory, as one checkpoint; every rank calls this.

    A rank writes what no lower one has. If any rank is killed at any moment, the directory has the
    old checkpoint or the new one, whole. ``multiopt show`` prints what is in it.

    Args:
        directory: The directory, on a file system that all ranks see. It is made if need be.
        optimizer: A ``multiopt.Optimizer``, or an optimizer of ``multiopt.adapters.torch``, whose
            settings of groups are saved too.
        params: The parameters by name, such as ``dict(model.named_parameters())``, by default those
            of an optimizer of ``multiopt.adapters.torch``. Those that are ``DTensor``s are saved as
            the boxes that lie here. Without parameters only state is saved, and must be whole.
        metadata: What else to keep, as for ``Optimizer.save``; that of rank 0 counts.
        local: Says which names are a rank's own (``name -> bool``), so that they have other
            contents on each; only the same rank gets them back.
        group: The process group; by default all ranks.

    Raises:
        OSError: A file cannot be written.
        RuntimeError: Another rank failed. The old checkpoint is untouched.
        TypeError: The optimizer is none of multiopt's, or a parameter no usable array.
        ValueError: Ranks disagree about the shape of a parameter, or a parameter does not lie here
            as a box.
    """
    folder, ranks = Path(directory), _Ranks(group)
    params = _params_of(optimizer) if params is None else params

    def claims() -> tuple[Optimizer, list[tuple[Any, ...]], list[str], str]:
        core = _core_of(optimizer)
        core._guard.check_whole("save_sharded")
        warn_of_left_behind(core._registry)
        known = [*core._registry.names, *core._registry.pending, *(params or ())]
        own = [name for name in dict.fromkeys(known) if local and local(name)]
        boxes = [(name, *_box(params, name)) for name in dict.fromkeys(known) if name not in own]
        folder.mkdir(parents=True, exist_ok=True)
        return core, boxes, own, os.urandom(8).hex()

    (core, _, own, _), told = ranks.agree("save", claims, lambda made: made[1:])
    shapes, pieces = _shared([boxes for boxes, *_ in told])
    token = told[0][2]
    path = folder / f"{token}-{ranks.rank:05}.safetensors"

    def written() -> File:
        mine = [n for n, parts in pieces.items() if any(x.file == ranks.rank for x in parts)]
        _write(path, core, params, [*mine, *own])
        return File(path.name, path.stat().st_size, checksum_of(path))

    def commit() -> None:
        if ranks.rank == 0:
            groups = [_settings(one) for one in getattr(optimizer, "param_groups", ())]
            locals_ = [names for _, names, _ in told]
            Index(files, shapes, pieces, locals_, groups, metadata or {}).write(folder)

    try:
        files = [File(*one) for one in ranks.agree("save", written)[1]]
        ranks.agree("save", commit)
    except BaseException:
        if not (folder / INDEX).exists() or token not in (folder / INDEX).read_text():
            path.unlink(missing_ok=True)
        raise
    if ranks.rank == 0:
        _remove_others(folder, token)


def load_sharded(
    directory: str | os.PathLike[str],
    optimizer: Any,
    params: Mapping[str, Array] | None = None,
    *,
    strict: bool = True,
    cast: bool = False,
    local: Callable[[str], bool] | None = None,
    group: Any = None,
) -> LoadReport:
    """Load what ``save_sharded`` wrote, on any number of ranks; every rank calls this.

    A rank gets the parts of parameters and slots that lie on it. All ranks load, or none does.

    Args:
        directory: The directory.
        optimizer: The optimizer, as for ``save_sharded``. It may be new.
        params: The parameters by name, whose values are replaced too, in place if they can be; by
            default as for ``save_sharded``. Without parameters only state is loaded.
        strict: Whether what does not fit, or is on one side only, is an error.
        cast: Whether slots and parameters are converted to the dtype that is needed.
        local: Says which names are a rank's own, as for ``save_sharded``.
        group: The process group; by default all ranks.

    Returns:
        What became of the state of each name, as ``Optimizer.load`` says it; metadata included.

    Raises:
        CheckpointError: The checkpoint is damaged, or does not fit. Nothing has changed.
        OSError: A file cannot be read.
        RuntimeError: Another rank failed. Nothing has changed.
    """
    folder, ranks = Path(directory), _Ranks(group)
    params = _params_of(optimizer) if params is None else params
    answered = False

    def ready() -> None:
        nonlocal answered
        answered = True
        ranks.agree("load", lambda: None)

    try:
        core = _core_of(optimizer)
        index = Index.read(folder)
        groups = getattr(optimizer, "param_groups", [])
        if index.groups and groups and len(index.groups) != len(groups):
            raise CheckpointError(
                f"{folder} has the settings of {len(index.groups)} groups of parameters; expected "
                f"{len(groups)}"
            )
        wanted = {}
        for name, shape in index.shapes.items():
            whole, (offset, extent) = (
                _box(params, name)
                if name in (params or ())
                else (
                    shape,
                    ((0,) * len(shape), shape),
                )
            )
            wanted[name] = Wanted(whole, Piece(ranks.rank, offset, extent))
        own = index.local[ranks.rank] if ranks.rank < len(index.local) else []
        own = [name for name in own if local is None or local(name)]
        contents = assembled(folder, index, wanted, dict.fromkeys(own, ranks.rank))
        contents = contents._replace(metadata=index.metadata)
        parts = None if params is None else {name: here(x) for name, x in params.items()}
        names = {name: name for name in contents.all_names()}
        core._guard.check_idle("load_sharded")
        try:
            report = load(
                *(core._registry, contents, names, strict, cast),
                params=parts,
                ready=ready,
            )
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
    except BaseException as error:
        if not answered:
            ranks.fail("load", error)
        raise
    for one, settings in zip(groups, index.groups, strict=False):
        _set(one, settings)
    if params is not None and report.params is not None:
        arrays = {n: x if here(x) is not x else report.params[n] for n, x in params.items()}
        report = replace(report, params=arrays)
    return report


class _Ranks:
    """The ranks of a process group; one if there is none."""

    def __init__(self, group: Any) -> None:
        is_ranked = dist.is_available() and dist.is_initialized()
        self._transport = Transport(group) if is_ranked else None
        self.rank = 0 if self._transport is None else self._transport.rank

    def agree(
        self,
        verb: str,
        work: Callable[[], Result],
        told: Callable[[Result], Any] = lambda result: result,
    ) -> tuple[Result, list[Any]]:
        """Do something on every rank, and fail on all if it fails on one.

        Args:
            verb: What this is about, for messages.
            work: What to do.
            told: What the other ranks are told of the result; JSON must hold it.

        Returns:
            The result here, and what each rank tells.

        Raises:
            RuntimeError: Another rank failed.
        """
        try:
            result = work()
        except Exception as error:
            self.fail(verb, error)
            raise
        return result, self._gathered(verb, None, told(result))

    def fail(self, verb: str, error: BaseException) -> None:
        """Tell the other ranks, which wait in ``agree``, that this one has failed."""
        if isinstance(error, Exception):
            with suppress(RuntimeError):
                self._gathered(verb, f"{type(error).__name__}: {error}", None)

    def _gathered(self, verb: str, problem: str | None, told: Any) -> list[Any]:
        text = json.dumps([problem, told]).encode()
        if self._transport is None:
            return [json.loads(text)[1]]
        lengths = self._transport.gather_numbers([len(text)])[:, 0].tolist()
        every = self._transport.send_bytes(text, dict(enumerate(lengths)))
        answers = [json.loads(answer) for answer in every.values()]
        failed = [(rank, why) for rank, (why, _) in enumerate(answers) if why is not None]
        if failed:
            rank, why = failed[0]
            raise RuntimeError(f"rank {rank} could not {verb}: {why}; so nothing has changed")
        return [answer for _, answer in answers]


def _core_of(optimizer: Any) -> Optimizer:
    core = getattr(optimizer, "_core", optimizer)
    if not isinstance(core, Optimizer):
        raise TypeError(
            f"optimizer must be a multiopt.Optimizer or one of multiopt.adapters.torch; got "
            f"{brief(optimizer)}"
        )
    return core


def _params_of(optimizer: Any) -> dict[str, torch.Tensor] | None:
    """The parameters of an optimizer of ``multiopt.adapters.torch``; None of another one."""
    named = getattr(optimizer, "_named_params", None)
    return None if named is None else named()


def _box(params: Mapping[str, Array] | None, name: str) -> tuple[tuple[int, ...], Box]:
    """The shape of a parameter and the box of it here; nothing if only its state is saved."""
    param = None if params is None else params.get(name)
    return ((), ((), ())) if param is None else box_of(param, name)


def _shared(
    told: Sequence[Sequence[Sequence[Any]]],
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[Piece]]]:
    """Who saves what: each box is saved by the lowest rank that has it.

    Args:
        told: By rank the names it has, each with the shape of the whole and the box that is there.

    Raises:
        ValueError: Ranks disagree about the shape of a parameter.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[Piece]] = {}
    taken: set[tuple[str, Box]] = set()
    for rank, boxes in enumerate(told):
        for name, whole, (offset, extent) in boxes:
            shape, box = tuple(whole), (tuple(offset), tuple(extent))
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"parameter {name!r} has the shape {shape} on rank {rank}, and {shapes[name]} "
                    "on a lower one; expected one shape: name a rank's own in local="
                )
            if (name, box) not in taken:
                taken.add((name, box))
                pieces.setdefault(name, []).append(Piece(rank, *box))
    return shapes, pieces


def _write(
    path: Path, core: Optimizer, params: Mapping[str, Array] | None, names: Sequence[str]
) -> None:
    """Write the file of this rank."""
    known = core._registry
    seen = [name for name in names if name in known]
    pending = {name: saved for name, saved in pending_now(known).items() if name in names}
    here_only = {n: here(x) for n, x in (params or {}).items() if n in names}
    tables = [*held(known, seen), *waiting(pending)]
    skips = {name: count for name, count in known.skips.items() if name in names}
    settings = described_settings(known.settings)
    param_tables = None if params is None else tables_of(known, here_only)
    write(path, tables, known.steps, skips, settings=settings, params=param_tables)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group of ``torch.optim``, as plain data."""
    plain = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in group.items()}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in plain.items()
        if name not in ("params", "param_names")
        and isinstance(value, bool | int | float | str | tuple | None)
    }


def _set(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Set what ``_settings`` gave."""
    for name, value in settings.items():
        now = group.get(name)
        if isinstance(now, torch.Tensor):
            now.fill_(value)
        else:
            group[name] = tuple(value) if isinstance(value, list) else value


def _remove_others(folder: Path, token: str) -> None:
    """Remove the files of earlier checkpoints, and those of saves that were killed."""
    for path in folder.iterdir():
        found = FILES.fullmatch(path.name)
        if found and found[1] != token:
            path.unlink(missing_ok=True)
