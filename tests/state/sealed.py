"""The bytes of a file: taken apart, and put together with another description."""

import json
from typing import Any

from xxhash import xxh3_64


def parts(raw: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    size = len(header) if length is None else length
    return (size % 2**64).to_bytes(8, "little") + header + data


def sealed(document: Any, header: dict[str, Any], data: bytes) -> bytes:
    """A file with another description, and the checksum of that: hostile, not damaged."""
    text = document if isinstance(document, str) else json.dumps(document)
    words = header["__metadata__"]["checksums"].split()
    words[0] = xxh3_64(text.encode()).hexdigest()
    metadata = {"checksums": " ".join(words), "multiopt": text}
    return joined(json.dumps({**header, "__metadata__": metadata}).encode(), data)
