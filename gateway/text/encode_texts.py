"""A program that tokenizes long texts, in a process of its own. ``long_texts`` starts it.

The library makes one string a token, and the interpreter lock is held while these are read and
freed: a text of 8 MiB stopped the gateway for half a second and took a gigabyte.

A message is a length of 8 bytes and that many bytes: a pickled text, ``add_special_tokens`` and the
slice of the token ids that is wanted. The reply is the number of all token ids and the length of
the rest, 8 bytes each, then the wanted ids, 4 bytes each. The program ends with its input.
"""

from __future__ import annotations

import ctypes
import pickle
import struct
import sys
from array import array
from pathlib import Path

import tokenizers

from gateway.text.tokenizer import Tokenizer

LENGTH = struct.Struct("<Q")
REPLY = struct.Struct("<QQ")
ID_TYPE = "I"
"""Of ``array``: token ids in messages."""


def main() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(Path(sys.argv[1]))))
    return_freed = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(LENGTH.size):
        text, add_special_tokens, kept = pickle.loads(source.read(*LENGTH.unpack(head)))
        ids = tokenizer.encode(text, add_special_tokens)
        raw = array(ID_TYPE, ids[kept]).tobytes()
        sink.write(REPLY.pack(len(ids), len(raw)) + raw)
        sink.flush()
        return_freed(0)


if __name__ == "__main__":
    main()
