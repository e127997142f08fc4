"""Puts together what a rank holds from the pieces in the files of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from multiopt.errors import CheckpointError
from multiopt.state.contents import Contents, SavedParams
from multiopt.state.file import read
from multiopt.state.index import Index, Piece
from multiopt.state.record import Saved

if TYPE_CHECKING:
    from multiopt.step.skips import Skips

__all__ = ["Wanted", "assembled"]


class Wanted(NamedTuple):
    """A part of a parameter that is to be put together.

    Attributes:
        shape: The shape of the whole parameter.
        here: The part.
    """

    shape: tuple[int, ...]
    here: Piece


def assembled(
    directory: Path, index: Index, wanted: Mapping[str, Wanted], own: Mapping[str, int]
) -> Contents:
    """Read the pieces that overlap with what is wanted, a file after the other.

    Args:
        directory: The directory of the checkpoint.
        index: Its index.
        wanted: The wanted parts, by name.
        own: The numbers of the files that have names of a rank's own, whole.

    Raises:
        CheckpointError: A file is missing or damaged, or pieces do not belong together.
        OSError: A file cannot be read.
    """
    places: dict[int, dict[str, Piece | None]] = {0: {}}
    for name, part in wanted.items():
        if part.shape != index.shapes[name]:
            raise CheckpointError(
                f"parameter {name!r} was saved with the shape {index.shapes[name]}; expected "
                f"{part.shape}"
            )
        pieces = index.pieces[name]
        # A part without elements still needs to know which slots there are.
        for piece in [x for x in pieces if x.overlap(part.here)] or pieces[:1]:
            places.setdefault(piece.file, {})[name] = piece
    for name, number in own.items():
        places.setdefault(number, {})[name] = None
    index.check(directory, places)
    states, params = dict[str, Saved](), dict[str, Saved]()
    skips: dict[str, Skips] = {}
    first: Contents | None = None
    for number in sorted(places):
        path, named = directory / index.files[number].name, places[number]
        contents = read(path, set(named), with_params=True)
        contents.check_whole(path)
        first = contents if first is None else first
        skips |= {name: count for name, count in contents.skips.items() if name in named}
        given = {} if contents.params is None else contents.params.saved
        for found, kept in ((contents.saved, states), (given, params)):
            for name, record in found.items():
                stored = named[name]
                # What is whole, or just what is wanted, need not be copied.
                if stored is None or stored[1:] == wanted[name].here[1:]:
                    kept[name] = record
                else:
                    kept[name] = _joined(name, kept.get(name), record, stored, wanted[name].here)
    assert first is not None
    names = [*wanted, *own]
    order = {name: states[name] for name in names if name in states}
    whole = SavedParams([n for n in names if n in params], params, {})
    return first._replace(
        names=list(order), saved=order, skips=skips, params=whole if params else None
    )


def _joined(name: str, begun: Saved | None, record: Saved, piece: Piece, part: Piece) -> Saved:
    """Copy what a piece and a part have in common into the part.

    Raises:
        CheckpointError: The piece is of another moment, or of another rule, than the others.
    """
    axes = (2,) if record.form.is_complex else ()
    there, here = (*piece.shape, *axes), (*part.shape, *axes)
    slots = tuple(
        slot._replace(shape=here) if slot.shape == there else slot for slot in record.form.slots
    )
    form = record.form._replace(slots=slots)
    if begun is None:
        arrays = tuple(
            np.empty(here, array.dtype).reshape(-1) if slot.shape == there else array
            for slot, array in zip(record.form.slots, record.arrays, strict=True)
        )
        begun = record._replace(form=form, arrays=arrays)
    elif (begun.form, begun.step, begun.seen) != (form, record.step, record.seen):
        raise CheckpointError(
            f"the pieces of {name!r} do not belong together: they differ in clock, rule or slots"
        )
    both = piece.overlap(part)
    for slot, array, whole in zip(record.form.slots, record.arrays, begun.arrays, strict=True):
        if both is not None and slot.shape == there:
            source, target = both
            whole.reshape(here)[target] = array.reshape(there)[source]
    return begun
