"""A program that tokenizes long texts in a separate process. ``long_text_encoder`` starts it.

The tokenizers library creates one string per token and holds the GIL while it reads and frees
them: a text of 8 MiB blocked the gateway for half a second and used 1 GiB of memory.

A message is a length (8 bytes) followed by a ``TextToEncode`` in msgpack. The reply is the total
number of token ids (8 bytes), the length of the requested ids in bytes (8 bytes), and these ids
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

from gateway.text.harmony.special_tokens import HarmonyPrompt, SpecialToken
from gateway.text.tokenizer import Tokenizer

LENGTH = struct.Struct("<Q")
REPLY = struct.Struct("<QQ")
ID_TYPE = "I"
"""Type code of Python's ``array`` for the token ids in replies of the tokenizing process."""


class TextToEncode(msgspec.Struct, frozen=True, kw_only=True):
    """A text to tokenize, and the requested slice of its token ids."""

    parts: list[str]
    special_token_indices: list[int] | None
    """Indices of the special tokens in the parts of a ``HarmonyPrompt``; None for a plain text."""
    add_special_tokens: bool
    start: int | None
    """Start of the requested slice of the token ids; None for the first id."""
    stop: int | None
    """End (exclusive) of the requested slice of the token ids; None for all further ids."""

    @property
    def text(self) -> str:
        if self.special_token_indices is None:
            return self.parts[0]
        special_indices = frozenset(self.special_token_indices)
        parts = enumerate(self.parts)
        return HarmonyPrompt(
            [SpecialToken(part) if i in special_indices else part for i, part in parts]
        )


def encode_message(text: str, add_special_tokens: bool, token_slice: slice) -> bytes:
    """Return the message that requests the slice ``token_slice`` of the token ids of a text."""
    is_harmony = isinstance(text, HarmonyPrompt)
    parts = list(text.parts) if isinstance(text, HarmonyPrompt) else [text]
    special_indices = [i for i, part in enumerate(parts) if isinstance(part, SpecialToken)]
    content = msgspec.msgpack.encode(
        TextToEncode(
            parts=list(map(str, parts)),
            special_token_indices=special_indices if is_harmony else None,
            add_special_tokens=add_special_tokens,
            start=token_slice.start,
            stop=token_slice.stop,
        )
    )
    return LENGTH.pack(len(content)) + content


def main() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(Path(sys.argv[1]))))
    return_freed = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(LENGTH.size):
        request = msgspec.msgpack.decode(source.read(*LENGTH.unpack(head)), type=TextToEncode)
        ids = tokenizer.encode(request.text, request.add_special_tokens)
        raw = array(ID_TYPE, ids[request.start : request.stop]).tobytes()
        sink.write(REPLY.pack(len(ids), len(raw)) + raw)
        sink.flush()
        return_freed(0)


if __name__ == "__main__":
    main()
