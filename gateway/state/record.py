"""File format of a stored object: a line of JSON that describes the content, then the content.

    {"format":1,"id":"resp_0199...","created_s":1.0,"expires_s":2.0,"size":2,"sha256":"44136f.."}
    {}

Reads check the content against the first line, which detects damaged, truncated or swapped files.
"""

from __future__ import annotations

import hashlib

import msgspec

from gateway.core.errors import StorageError

FORMAT = 1
"""Version of the file format and of the folder layout."""
MAX_HEAD_BYTES = 1024
"""Maximum number of bytes of the first line."""


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metadata of an object. Times are Unix times in seconds."""

    format: int
    id: str
    created_s: float
    expires_s: float
    size: int
    """Number of bytes of the content."""
    sha256: str


class StoredObject(msgspec.Struct, frozen=True, kw_only=True):
    """A stored object and its metadata."""

    head: Head
    content: bytes


def encode(object_id: str, content: bytes, created_s: float, expires_s: float) -> bytes:
    """Return the bytes of an object's file."""
    digest = hashlib.sha256(content).hexdigest()
    return encode_head(object_id, len(content), digest, created_s, expires_s) + content


def encode_head(
    object_id: str, size: int, sha256: str, created_s: float, expires_s: float
) -> bytes:
    """Return the first line of an object's file. Its length does not depend on the digest."""
    head = Head(
        format=FORMAT,
        id=object_id,
        created_s=created_s,
        expires_s=expires_s,
        size=size,
        sha256=sha256,
    )
    return msgspec.json.encode(head) + b"\n"


def decode(raw: bytes, object_id: str) -> StoredObject:
    """Decode an object's file. Raises ``StorageError`` if it is damaged or of another object."""
    line, _, content = raw.partition(b"\n")
    head = decode_head(line)
    is_whole = len(content) == head.size and hashlib.sha256(content).hexdigest() == head.sha256
    if not is_whole or head.id != object_id:
        raise StorageError(f"the stored object {object_id} is damaged")
    return StoredObject(head=head, content=content)


def decode_head(line: bytes) -> Head:
    """Decode the first line of a file. Raises ``StorageError``."""
    try:
        head = msgspec.json.decode(line[:MAX_HEAD_BYTES], type=Head)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise StorageError("a stored object is damaged") from err
    if head.format != FORMAT:
        raise StorageError(f"a stored object has format {head.format}, supported is {FORMAT}")
    return head
