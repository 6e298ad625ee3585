"""Parser of ``multipart/form-data`` bodies. Source: RFC 7578."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from cluster.core.errors import RequestError
from gateway.core.field_checks import require

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MAX_PARTS = 8
_MAX_HEADER_BYTES = 4096


@dataclass(slots=True)
class FormPart:
    """One field of a form."""

    name: str
    filename: str | None
    """Name of an uploaded file; None for other fields."""
    content: bytes

    @property
    def text(self) -> str:
        """Return the value as text."""
        return self.content.decode(errors="replace")


def read_form(content_type: str, raw: bytes) -> dict[str, FormPart]:
    """Parse a body; return its fields by name. Raises ``RequestError``."""
    kind, options = parse_options_header(content_type)
    rule = f"({content_type[:64]!r}) must be multipart/form-data with a boundary"
    boundary = options.get(b"boundary")
    require(kind == b"multipart/form-data" and bool(boundary), "content-type", rule)
    reader = _Reader()
    try:
        parser = MultipartParser(boundary or b"", reader.callbacks())
        parser.write(raw)
        parser.finalize()
    except FormParserError as err:
        raise RequestError("the body is not a form", "body") from err
    if not reader.is_ended:
        raise RequestError("the body is an incomplete form", "body")
    return reader.parts


class _Reader:
    def __init__(self) -> None:
        self.parts: dict[str, FormPart] = {}
        self.is_ended = False
        self._field, self._value = bytearray(), bytearray()
        self._options: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []

    def callbacks(self) -> MultipartCallbacks:
        """Return the callbacks by which the parser fills ``parts``."""
        return {
            "on_part_begin": self._begin,
            "on_part_data": lambda data, start, end: self._pieces.append(data[start:end]),
            "on_part_end": self._end_part,
            "on_header_field": lambda data, start, end: self._add(self._field, data[start:end]),
            "on_header_value": lambda data, start, end: self._add(self._value, data[start:end]),
            "on_header_end": self._end_header,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._options, self._pieces = {}, []

    def _add(self, to: bytearray, piece: bytes) -> None:
        require(len(to) + len(piece) <= _MAX_HEADER_BYTES, "body", "has a header that is too long")
        to += piece

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, self._options = parse_options_header(bytes(self._value))
        self._field.clear()
        self._value.clear()

    def _end_part(self) -> None:
        name = self._options.get(b"name")
        if name is None:
            raise RequestError("the body has a part without a name", "body")
        filename = self._options.get(b"filename")
        shown = name.decode(errors="replace")
        require(shown not in self.parts, shown[:64], "is given twice")
        require(len(self.parts) < _MAX_PARTS, "body", f"has more than {_MAX_PARTS} parts")
        self.parts[shown] = FormPart(
            shown,
            None if filename is None else filename.decode(errors="replace"),
            b"".join(self._pieces),
        )

    def _end(self) -> None:
        self.is_ended = True
