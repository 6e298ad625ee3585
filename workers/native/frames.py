"""Frames of the data plane for native code (``c/frames.h``).

Reference: ``workers.transport.frames`` for the format, ``workers.transport.edge`` for the sockets.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from workers.native.structs import c_struct

END_OF_STREAM = -1
"""Value of ``FrameFields.error`` if the peer has closed the connection."""


@c_struct("frames.h", "step")
class StepFields(ctypes.Structure):
    """C ``struct step``: generation, step number and flags in a frame's header."""


@c_struct("frames.h", "place")
class PlaceFields(ctypes.Structure):
    """C ``struct place``: header fields that all frames of an exchange share."""


@c_struct("frames.h", "waiting")
class WaitingFields(ctypes.Structure):
    """C ``struct waiting``: sockets to watch and time limit of waits for frames."""


@c_struct("frames.h", "frame")
class FrameFields(ctypes.Structure):
    """C ``struct frame``: a frame to or from one peer, possibly sent or received only in part."""

    def received(self) -> bytes:
        """Return the bytes of this frame that have been received so far."""
        left = int(self.done)
        taken = []
        for piece in self._pieces():
            taken.append(bytes(piece[:left]))
            left -= len(taken[-1])
        return b"".join(taken)

    def unsent(self) -> bytes:
        """Return the bytes of this frame that have not been sent yet."""
        if not any(self.counts):
            return b""
        return b"".join(map(bytes, self._pieces()))[self.done :]

    def _pieces(self) -> Iterator[memoryview]:
        yield memoryview(self.header)
        for address, count in zip(self.parts, self.bytes, strict=True):
            if count:
                yield memoryview((ctypes.c_uint8 * count).from_address(address))
