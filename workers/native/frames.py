"""Frames of the data plane for native code (``c/frames.h``).

Reference: ``workers.transport.frames`` for their form, ``workers.transport.edge`` for the sockets.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from workers.native.structure import fields

HEADER_BYTES = 36
END_OF_STREAM = -1
"""``FrameFields.error`` where the peer has closed."""


class StepFields(ctypes.Structure):
    """``struct step``."""

    _fields_ = fields(
        "int64: generation number flags",
    )


class PlaceFields(ctypes.Structure):
    """``struct place``."""

    _fields_ = fields(
        "pointer: step",
        "int64: bank exchange micro_batch",
    )


class WaitingFields(ctypes.Structure):
    """``struct waiting``."""

    _fields_ = fields(
        "int64: epoll wake limit_ms spin_ns",
    )


class FrameFields(ctypes.Structure):
    """``struct frame``."""

    _fields_ = fields(
        "int64: socket",
        ("counts", ctypes.c_int64 * 2),
        ("bytes", ctypes.c_int64 * 2),
        ("parts", ctypes.c_void_p * 2),
        "int64: done error",
        ("header", ctypes.c_uint8 * HEADER_BYTES),
    )

    def came(self) -> bytes:
        """What was received of it."""
        left = int(self.done)
        taken = []
        for piece in self._pieces():
            taken.append(bytes(piece[:left]))
            left -= len(taken[-1])
        return b"".join(taken)

    def rest(self) -> bytes:
        """What was not sent of it."""
        if not any(self.counts):
            return b""
        return b"".join(map(bytes, self._pieces()))[self.done :]

    def _pieces(self) -> Iterator[memoryview]:
        yield memoryview(self.header)
        for address, count in zip(self.parts, self.bytes, strict=True):
            if count:
                yield memoryview((ctypes.c_uint8 * count).from_address(address))
