"""Writes responses as compact JSON, long responses in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_PIECE = 4096
"""Maximum number of entries of a long list that are written at a time."""
_JOINED = 1024
"""Number of pieces of a long response that are joined and freed at a time."""


def dump_json(content: object) -> bytes:
    """Return compact UTF-8 JSON. Raises ``ValueError`` for NaN and infinity."""
    return _JSON.encode(content).encode()


def dump_long(content: object) -> bytes:
    """Like ``dump_json``, but write small pieces, between which other threads can run."""
    pieces = _json_pieces(content)
    # joined in steps: freeing a million small pieces in a single step would block other threads
    return b"".join(iter(lambda: b"".join(islice(pieces, _JOINED)), b""))


def _has_parts(value: object) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _json_pieces(value: object) -> Iterator[bytes]:
    if isinstance(value, Mapping) and (len(value) > _PIECE or any(map(_has_parts, value.values()))):
        yield b"{"
        for index, (name, inner) in enumerate(value.items()):
            yield (b"," if index else b"") + dump_json(name) + b":"
            yield from _json_pieces(inner)
        yield b"}"
    elif isinstance(value, list | tuple) and value:
        yield b"["
        for start in range(0, len(value), _PIECE):
            piece = value[start : start + _PIECE]
            if not any(map(_has_parts, piece)):
                yield (b"," if start else b"") + dump_json(piece)[1:-1]
                continue
            for index, inner in enumerate(piece, start):
                if index:
                    yield b","
                yield from _json_pieces(inner)
        yield b"]"
    else:
        yield dump_json(value)
