"""Decodes request messages after counting their fields.

The protobuf parser holds the GIL and makes an object for each nested message; 16 MiB can contain
eight million of them. Source: the encoding in protobuf.dev's programming guide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from gateway.core.field_checks import check_length
from gateway.offload.json_text import MAX_ENTRIES, MAX_VALUES
from gateway.offload.long_work import INLINE_SIZE

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 100
"""Maximum depth of nested messages, as in the protobuf parser."""
_PIECE_BYTES = 65_536
_ENDS = bytes(range(128))
"""Possible values of the last byte of a varint."""
_SIZES = {
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_SFIXED32: 4,
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_SFIXED64: 8,
}
"""Bytes per number in a packed list, by field type; other types are varints."""
_TEXTS = frozenset({FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES})


def read_message(kind: Any, data: bytes) -> Message:
    """Decode a message of the type ``kind``.

    Raises:
        RequestError: the message has too many fields.
        DecodeError: ``data`` is not a message of this type.
    """
    if len(data) > INLINE_SIZE:
        _Counter(data).count(kind, 0, len(data))
    return GetMessageClass(kind).FromString(data)


@dataclass(slots=True)
class _Counter:
    """Counts the fields of a message before it is parsed. In Python, so that other threads run."""

    data: bytes
    num_fields: int = 0
    """Number of fields, including those of nested messages."""
    num_numbers: int = 0
    """Number of values in packed lists."""

    def count(self, kind: Descriptor | None, start: int, end: int, depth: int = 0) -> None:
        """Count the fields of ``data[start:end]``, a message of type ``kind``."""
        fields = {} if kind is None else kind.fields_by_number
        if depth > _MAX_DEPTH:
            raise DecodeError("nested too deeply")
        place = start
        while place < end:
            self.num_fields += 1
            if self.num_fields > MAX_VALUES:
                check_length("message", self.num_fields, MAX_VALUES, "fields")
            tag, place = self._read_varint(place, end)
            wire = tag & 7
            if wire == _BYTES:
                length, place = self._read_varint(place, end)
                if length > end - place:
                    raise DecodeError("a field exceeds its message")
                if (field := fields.get(tag >> 3)) is None or field.type in _TEXTS:
                    pass
                elif field.message_type is not None:
                    self.count(field.message_type, place, place + length, depth + 1)
                else:
                    self._count_packed(field, place, place + length)
                place += length
            elif wire == _VARINT:
                _, place = self._read_varint(place, end)
            elif wire in (_FIXED64, _FIXED32):
                place += 8 if wire == _FIXED64 else 4

    def _count_packed(self, field: FieldDescriptor, start: int, end: int) -> None:
        if size := _SIZES.get(field.type):
            self.num_numbers += (end - start) // size
        else:
            for place in range(start, end, _PIECE_BYTES):
                piece = self.data[place : min(end, place + _PIECE_BYTES)]
                self.num_numbers += len(piece) - len(piece.translate(None, _ENDS))
        check_length("message", self.num_numbers, MAX_ENTRIES, "numbers")

    def _read_varint(self, place: int, end: int) -> tuple[int, int]:
        """Decode the varint at ``place``; return the number and the position after it."""
        value = shift = 0
        data = self.data
        while place < end and shift < 70:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, place
            shift += 7
        raise DecodeError("a number has no end")
