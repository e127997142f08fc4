"""Checkpoints of several ranks: a directory with a file for each rank, and an index.

Each file is a checkpoint of its own, of the pieces of parameters and slots that its rank held. The
index says which file has which piece, and it is written last: whoever is killed at any moment
leaves the old index with the old files, or the new one with the new files. ``spec/checkpoint.md``
defines the form.

>>> from multiopt.state.index import Piece
>>> piece = Piece(0, (2, 0), (3, 4))
>>> piece.overlap(Piece(1, (0, 0), (4, 4)))               # of rows 2 to 4 and rows 0 to 3
((slice(0, 2, None), slice(0, 4, None)), (slice(2, 4, None), slice(0, 4, None)))
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from xxhash import xxh3_64, xxh3_64_hexdigest

from multiopt.errors import CheckpointError, brief
from multiopt.state.durable import replacing
from multiopt.state.file import Listed, listed
from multiopt.state.metadata import check_nesting, described, restored
from multiopt.state.record import Saved

__all__ = ["INDEX", "Box", "File", "Index", "Piece", "checksum_of", "listed_together"]

#: The name of the index in its directory.
INDEX = "index.json"

#: The version of the form of an index.
VERSION = 1

#: The first element and the shape of a part of an array.
Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


class Piece(NamedTuple):
    """A part of a parameter, with the same part of its slots.

    Attributes:
        file: The number of the file that has it.
        offset: Its first element in the whole parameter.
        shape: Its shape.
    """

    file: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(self, other: "Piece") -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Where in this piece, and where in another one, the elements of both are; or None."""
        here, there = [], []
        for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            first, last = max(a, b), min(a + m, b + n)
            if first >= last:
                return None
            here.append(slice(first - a, last - a))
            there.append(slice(first - b, last - b))
        return tuple(here), tuple(there)


class File(NamedTuple):
    """A file of a rank.

    Attributes:
        name: Its name in the directory.
        size: Its size in bytes.
        checksum: The XXH3 of its bytes, with 64 bits, in hexadecimal digits.
    """

    name: str
    size: int
    checksum: str


class Index(NamedTuple):
    """What is where.

    Attributes:
        files: The files, by rank.
        shapes: The shapes of whole parameters, by name.
        pieces: Where their pieces are.
        local: By rank, the names that are its own, which are whole in its file.
        groups: The settings of the optimizer's groups, if it is one of ``torch.optim``.
        metadata: What the user saved along with the state.
    """

    files: list[File]
    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, list[Piece]]
    local: list[list[str]]
    groups: list[dict[str, Any]]
    metadata: Mapping[str, Any]

    def write(self, directory: Path) -> None:
        """Write the index of a directory, whole or not at all.

        Raises:
            OSError: It cannot be written.
            ValueError: The metadata or a name is not what JSON can hold.
        """
        more, nonfinite = described({"groups": self.groups, "metadata": self.metadata})
        text = json.dumps(
            {
                "version": VERSION,
                "files": self.files,
                "names": {
                    name: [self.shapes[name], [list(piece) for piece in pieces]]
                    for name, pieces in self.pieces.items()
                },
                "local": self.local,
                "more": more,
                "nonfinite": nonfinite,
            },
            allow_nan=False,
        )
        whole = json.dumps({"checksum": xxh3_64_hexdigest(text.encode()), "multiopt": text})
        with replacing(directory / INDEX) as file:
            file.write(whole.encode())

    @classmethod
    def read(cls, directory: Path) -> "Index":
        """Read the index of a directory.

        Raises:
            CheckpointError: It is none, it is damaged, or of a later version.
            OSError: It cannot be read.
        """
        path = directory / INDEX
        try:
            outer = json.loads(path.read_bytes())
            text = outer["multiopt"]
            if xxh3_64_hexdigest(text.encode()) != outer["checksum"]:
                raise CheckpointError(f"{path} is damaged: its checksum differs")
            document = json.loads(text)
            check_nesting(document)
            if document["version"] != VERSION:
                raise CheckpointError(
                    f"{path} has version {brief(document['version'])}; expected {VERSION}: load it "
                    "with the multiopt that wrote it, or a later one"
                )
            names = document["names"]
            more = restored(document["more"], document["nonfinite"])
            return cls(
                [File(*file) for file in document["files"]],
                {name: tuple(shape) for name, (shape, _) in names.items()},
                {
                    name: [Piece(file, tuple(a), tuple(b)) for file, a, b in pieces]
                    for name, (_, pieces) in names.items()
                },
                document["local"],
                more["groups"],
                more["metadata"],
            )
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} is not the index of a multiopt checkpoint ({error})"
            ) from error

    def check(self, directory: Path, numbers: Iterable[int]) -> None:
        """Hold files to their sizes and checksums.

        Raises:
            CheckpointError: A file is missing, or is not the one that was written.
        """
        for number in numbers:
            file = self.files[number]
            path = directory / file.name
            try:
                found = File(file.name, path.stat().st_size, checksum_of(path))
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{path} is missing; the index of {directory} needs it"
                ) from error
            if found != file:
                raise CheckpointError(
                    f"{path} is damaged: it has {found.size} bytes with the checksum "
                    f"{found.checksum}; expected {file.size} with {file.checksum}"
                )


def checksum_of(path: Path) -> str:
    """The checksum of a file, as ``File`` has it."""
    checksum = xxh3_64()
    with path.open("rb") as file:
        while data := file.read(2**20):
            checksum.update(data)
    return checksum.hexdigest()


def listed_together(directory: str | os.PathLike[str]) -> tuple[Listed, int]:
    """List the contents of all files of a directory as one, and check them.

    Returns:
        The contents, and how many files there are.

    Raises:
        CheckpointError: The index is unusable, or a file is missing or not the one that was
            written.
        OSError: A file cannot be read.
    """
    folder = Path(directory)
    index = Index.read(folder)
    index.check(folder, range(len(index.files)))
    parts: list[Listed] = [listed(folder / file.name) for file in index.files]
    first, saved = parts[0], dict[str, dict[str, Saved]]()
    for number, part in enumerate(parts):
        own = set(index.local[number])
        for section, records in part.saved.items():
            merged = saved.setdefault(section, {})
            for name, record in records.items():
                if name in own:
                    merged[f"{name} (rank {number})"] = record
                elif name not in merged:
                    merged[name] = _whole(record, index, name)
    together = first._replace(
        saved=saved,
        steps=max((part.steps or 0 for part in parts), default=0),
        size=sum(part.size for part in parts),
        metadata=dict(index.metadata),
        damaged=[damage for part in parts for damage in part.damaged],
    )
    return together, len(parts)


def _whole(record: Saved, index: Index, name: str) -> Saved:
    """A record with the shapes of whole slots in the place of those of a piece."""
    if name not in index.shapes:
        return record
    whole, (piece, *_) = index.shapes[name], index.pieces[name]
    parts = (2,) if record.form.is_complex else ()
    slots = tuple(
        slot._replace(shape=(*whole, *parts)) if slot.shape == (*piece.shape, *parts) else slot
        for slot in record.form.slots
    )
    return record._replace(form=record.form._replace(slots=slots))
