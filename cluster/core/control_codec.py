"""Encodes the messages on the control sockets (``cluster.core.frames``), and limits their size.

A frame is a length (4 bytes, big-endian) and this number of bytes of ``cluster.core.codec``.
"""

from __future__ import annotations

import struct
from typing import Union

from cluster.core.codec import Codec
from cluster.core.errors import ProtocolError
from cluster.core.frames import ControlChallenge, ControlFrame, ControlHello, ControlProof

MAX_FRAME_BYTES = 32 * 1024 * 1024
"""Maximum size of a frame. A placement of 62 layers x 128 experts x 64 devices takes 3 MB."""
MAX_HELLO_BYTES = 4096
"""Maximum size of a frame from a peer that has not proved that it knows the token."""
_LENGTH = struct.Struct(">I")
_CODEC: Codec[ControlFrame] = Codec(
    Union[tuple(ControlFrame.__subclasses__())],  # noqa: UP007
    "a control frame",
)
_HELLO_CODEC: Codec[ControlFrame] = Codec(
    ControlHello | ControlChallenge | ControlProof, "a control frame of a handshake"
)


def encode(frame: ControlFrame) -> bytes:
    """Encode a frame, with its length."""
    data = _CODEC.encode(frame)
    return _LENGTH.pack(len(data)) + data


def frame_length(prefix: bytes, limit: int = MAX_FRAME_BYTES) -> int:
    """Return the length in a frame's first 4 bytes. Raises ``ProtocolError`` above ``limit``."""
    length: int = _LENGTH.unpack(prefix)[0]
    if not 0 < length <= limit:
        raise ProtocolError(f"control frame of {length} bytes: must be 1 to {limit}")
    return length


def decode(data: bytes) -> ControlFrame:
    """Decode one frame. Raises ``ProtocolError`` if it is not a valid frame."""
    return _CODEC.decode(data)


def decode_hello(data: bytes) -> ControlFrame:
    """Decode a handshake frame. A peer may send no others before it has proved the token."""
    return _HELLO_CODEC.decode(data)
