"""A program that tokenizes long texts in a separate process. ``long_texts`` starts it.

The tokenizers library creates one string per token and holds the GIL while it reads and frees
them: a text of 8 MiB blocked the gateway for half a second and used 1 GiB of memory.

A message is a length (8 bytes) followed by a ``TextToEncode`` in msgpack. The reply is the total
number of token ids (8 bytes), the length of the rest in bytes (8 bytes), and the requested ids
(4 bytes each). The program exits at the end of its input.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from array import array
from pathlib import Path

import msgspec
import tokenizers

from gateway.text.harmony.marks import HarmonyPrompt, SpecialToken
from gateway.text.tokenizer import Tokenizer

LENGTH = struct.Struct("<Q")
REPLY = struct.Struct("<QQ")
ID_TYPE = "I"
"""Type code of ``array`` for token ids in messages."""


class TextToEncode(msgspec.Struct, frozen=True, kw_only=True):
    """A text to tokenize, and the requested slice of its token ids."""

    parts: list[str]
    marks: list[int] | None
    """Indices of the special tokens in the parts of a ``HarmonyPrompt``; None for a plain text."""
    add_special_tokens: bool
    start: int | None
    """Start of the slice."""
    stop: int | None
    """End of the slice."""

    @property
    def text(self) -> str:
        if self.marks is None:
            return self.parts[0]
        marks = frozenset(self.marks)
        parts = enumerate(self.parts)
        return HarmonyPrompt([SpecialToken(part) if i in marks else part for i, part in parts])


def message_of(text: str, add_special_tokens: bool, kept: slice) -> bytes:
    """Return the message that requests the slice ``kept`` of the token ids of a text."""
    is_marked = isinstance(text, HarmonyPrompt)
    parts = list(text.parts) if isinstance(text, HarmonyPrompt) else [text]
    marks = [i for i, part in enumerate(parts) if isinstance(part, SpecialToken)]
    content = msgspec.msgpack.encode(
        TextToEncode(
            parts=list(map(str, parts)),
            marks=marks if is_marked else None,
            add_special_tokens=add_special_tokens,
            start=kept.start,
            stop=kept.stop,
        )
    )
    return LENGTH.pack(len(content)) + content


def main() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(Path(sys.argv[1]))))
    return_freed = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(LENGTH.size):
        wanted = msgspec.msgpack.decode(source.read(*LENGTH.unpack(head)), type=TextToEncode)
        ids = tokenizer.encode(wanted.text, wanted.add_special_tokens)
        raw = array(ID_TYPE, ids[wanted.start : wanted.stop]).tobytes()
        sink.write(REPLY.pack(len(ids), len(raw)) + raw)
        sink.flush()
        return_freed(0)


if __name__ == "__main__":
    main()
