"""The codec of all internal messages: ``msgspec`` structs, which are msgpack on a socket.

A decoder accepts only its message types, with exactly their fields and types, and never unpickles.
Code that reads from sockets limits the length before it decodes.

    class Ping(Message, frozen=True, kw_only=True):
        number: int

    PINGS = Codec(Ping, "a ping")
    PINGS.decode(PINGS.encode(Ping(number=3)))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Generic, TypeVar

import msgspec
import numpy as np

from cluster.core.errors import ConfigError, ProtocolError

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
"""Type of a count from 0 to 2**32 - 1 in a message; a decoder refuses other values."""
TRACE_ID_BYTES = 16
SPAN_ID_BYTES = TRACE_ID_BYTES + 8
"""Number of bytes of a span id between processes: trace id and span id of W3C Trace Context."""
SpanIdBytes = Annotated[bytes, msgspec.Meta(min_length=SPAN_ID_BYTES, max_length=SPAN_ID_BYTES)]
_MISFITS = (msgspec.MsgspecError, ValueError, LookupError, RecursionError)
"""Errors that a decoder raises for invalid data."""
_INTEGERS = {kind: np.dtype(f"<{kind}") for kind in ("u1", "u2", "u4", "u8")}
_ArrayOnWire = tuple[tuple[int, ...], str, bytes]
MAX_NUMBERS = 1 << 22
"""Maximum number of values of an array in a message."""


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of internal messages. Immutable; decoders refuse unknown fields."""


class Codec(Generic[T]):
    """Encodes and decodes messages of one type, or of a union of tagged types. Thread-safe."""

    def __init__(self, kind: Any, what: str, error: type[ProtocolError] = ProtocolError) -> None:
        """``kind``: the type or union ``T`` of the messages. ``what``: its name in errors, such as
        "a ping". ``error``: the exception type that ``decode`` raises."""
        self._what = what
        self._error = error
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_array_to_wire)
        self._decoder = msgspec.msgpack.Decoder(kind, dec_hook=_array_from_wire)

    def encode(self, message: T) -> bytes:
        """Encode a message as msgpack."""
        return self._encoder.encode(message)

    def decode(self, data: bytes | memoryview) -> T:
        """Decode a message. Raises the ``error`` type of this codec if ``data`` is not valid."""
        try:
            message: T = self._decoder.decode(data)
        except (*_MISFITS, ConfigError) as err:
            raise self._error(f"not {self._what}: {err}") from err
        return message


def to_plain(value: Any) -> Any:
    """Convert a message to dicts, lists and scalars, as in JSON."""
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=_number))


def from_plain(data: Any, kind: type[T], error: Callable[[str], Exception] = ProtocolError) -> T:
    """Convert dicts, lists and scalars to a message of type ``kind``: the inverse of ``to_plain``.

    Raises the exception that ``error`` makes for wrong types, and ``ConfigError`` for values that
    break a rule.
    """
    try:
        return msgspec.convert(data, kind)
    except _MISFITS as err:
        raise error(f"not a {kind.__name__}: {err}") from err


def _number(value: Any) -> Any:
    if not isinstance(value, np.generic):
        raise NotImplementedError(f"{type(value).__name__} is no part of a message")
    return value.item()


def _array_to_wire(array: Any) -> Any:
    """Return shape, type and bytes of an integer array, in the smallest integer type for its
    values."""
    if not isinstance(array, np.ndarray):
        return _number(array)
    largest = int(array.max(initial=0))
    kind = next(k for k in _INTEGERS if largest <= np.iinfo(k).max)
    return array.shape, kind, array.astype(f"<{kind}").tobytes()


def _array_from_wire(_: type, wire: Any) -> np.ndarray[Any, Any]:
    shape, kind, data = msgspec.convert(wire, _ArrayOnWire)
    if kind not in _INTEGERS or min(shape, default=0) < 0 or math.prod(shape) > MAX_NUMBERS:
        raise ValueError(f"no array of type {kind} and shape {shape}")
    array = np.frombuffer(data, _INTEGERS[kind]).reshape(shape).astype(np.int64)
    if kind == "u8" and int(array.min(initial=0)) < 0:
        raise ValueError("counts must be below 2**63")
    return array
