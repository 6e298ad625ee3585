"""Encoding of the messages on the control sockets (``cluster.core.frames``), and limits of their
size.

A frame is a length (4 bytes, big-endian) and then this number of bytes, a message that
``cluster.core.codec`` encodes.
"""

from __future__ import annotations

import struct
from typing import Union

from cluster.core.codec import Codec
from cluster.core.errors import ProtocolError
from cluster.core.frames import ControlChallenge, ControlFrame, ControlHello, ControlProof

MAX_FRAME_BYTES = 32 * 1024 * 1024
"""Maximum size of a control frame. A placement of 62 layers x 128 experts x 64 devices takes 3
MB."""
MAX_HELLO_BYTES = 4096
"""Maximum size of a control frame from a peer that has not proved that it knows the cluster
token."""
_LENGTH = struct.Struct(">I")
_CODEC: Codec[ControlFrame] = Codec(
    Union[tuple(ControlFrame.__subclasses__())],  # noqa: UP007
    "a control frame",
)
_HELLO_CODEC: Codec[ControlFrame] = Codec(
    ControlHello | ControlChallenge | ControlProof, "a control frame of a handshake"
)


def encode(frame: ControlFrame) -> bytes:
    """Encode a control frame, with its length before it."""
    data = _CODEC.encode(frame)
    return _LENGTH.pack(len(data)) + data


def frame_length(prefix: bytes, limit: int = MAX_FRAME_BYTES) -> int:
    """Return the length of a control frame from its first 4 bytes. Raises ``ProtocolError`` if the
    length is 0 or above ``limit``."""
    length: int = _LENGTH.unpack(prefix)[0]
    if not 0 < length <= limit:
        raise ProtocolError(f"control frame of {length} bytes: must be 1 to {limit}")
    return length


def decode(data: bytes) -> ControlFrame:
    """Decode a control frame without its length. Raises ``ProtocolError`` if it is not valid."""
    return _CODEC.decode(data)


def decode_hello(data: bytes) -> ControlFrame:
    """Decode a handshake frame. Raises ``ProtocolError`` for any other control frame, which a peer
    must not send before it has proved that it knows the cluster token."""
    return _HELLO_CODEC.decode(data)
