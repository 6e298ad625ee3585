"""The checkpoint's tokenizer, without transformers: ``tokenizer.json`` and its config file.

Text to ids, ids to text, and the exact bytes that each token stands for. The chat template is in
``gateway/text/chat_template.py``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from cluster.core.errors import CheckpointError, RequestError
from gateway.core.tool_use import ToolForm
from gateway.text.chat_template import ChatTemplate
from gateway.text.harmony.marks import MARKS, HarmonyPrompt, SpecialToken
from gateway.text.harmony.template import HarmonyTemplate
from gateway.text.tokenizer_files import DEFAULT, TOOL_USE, read_tokenizer_files

logger = logging.getLogger(__name__)
_NORMALIZER_SHRINK = 4
"""A normalizer may shorten text (NFC); the quick length check leaves this much room for it."""
_REPLACED = (
    "prompts of chats are written in the Harmony format by this server, not by the checkpoint's "
    "chat template; --chat-template with its file takes that template"
)
_NO_DEFAULT = "{{ raise_exception('the checkpoint has a template for tools only') }}"
_SHORT_CHARS = 2048
"""Longer texts and lists go the library's way for batches, the only one that releases the lock."""


class Tokenizer:
    """Thread-safe; what is long is encoded and decoded without the interpreter lock.

    Args:
        backend: what ``tokenizer.json`` describes.
        chat_template: how a conversation becomes a prompt; None if the checkpoint has none.
        file: what ``backend`` was read from; None if it is from no file.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: ChatTemplate | HarmonyTemplate | None = None,
        file: Path | None = None,
    ) -> None:
        self._backend = backend
        self.file = file
        self.chat_template = chat_template
        description = json.loads(backend.to_str())
        self.is_byte_level = _is_byte_level(description.get("decoder"))
        added = backend.get_added_tokens_decoder()
        self._added = {number: token.content for number, token in added.items()}
        self._special = frozenset(number for number, token in added.items() if token.special)
        self.max_token_chars = max(map(len, backend.get_vocab()), default=1)
        self._bytes: dict[int, bytes] = {}

    @property
    def special_ids(self) -> dict[str, int]:
        """Special tokens by their text."""
        return {self._added[number]: number for number in self._special}

    @property
    def mark_ids(self) -> dict[str, int]:
        """Tokens that grammars know by their number, by their text: see ``_is_mark``."""
        return {text: number for number, text in self._added.items() if self._is_mark(number)}

    def _is_mark(self, number: int) -> bool:
        """Special tokens, and others that look like a tag: llguidance takes both for no text."""
        text = self._added[number]
        return number in self._special or (text.startswith("<") and text.endswith(">"))

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same, for texts whose special tokens are text like any other.

        It is a second tokenizer, since the library's switch is for all threads at once.
        """
        made = tokenizers.Tokenizer.from_str(self._backend.to_str())
        made.encode_special_tokens = True
        return made

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids; special tokens in a text are special, but for those that it calls text."""
        if isinstance(text, HarmonyPrompt):
            return self._encode_marked(text, add_special_tokens)
        if len(text) <= _SHORT_CHARS:
            return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        found = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(found[0].ids)

    def _encode_marked(self, text: HarmonyPrompt, add_special_tokens: bool) -> tuple[int, ...]:
        """Marks are special tokens, texts hold none."""
        texts = [part for part in text.parts if not isinstance(part, SpecialToken)]
        if len(text) <= _SHORT_CHARS:
            found = [self._plain.encode(one, add_special_tokens=False) for one in texts]
        else:
            found = self._plain.encode_batch(texts, add_special_tokens=False)
        marks = {part: self._mark(part) for part in text.marks}
        encoded = iter(found)
        all_parts = [
            marks[part] if isinstance(part, SpecialToken) else next(encoded) for part in text.parts
        ]
        if not add_special_tokens:
            return tuple(number for one in all_parts for number in one.ids)
        whole = tokenizers.Encoding.merge(all_parts, growing_offsets=True)
        return tuple(self._backend.post_process(whole, add_special_tokens=True).ids)

    def _mark(self, mark: SpecialToken) -> tokenizers.Encoding:
        return self._backend.encode(mark, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole list of ids; ids without a token are left out."""
        if len(ids) <= _SHORT_CHARS:
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        found = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        return str(found[0])

    def is_surely_longer_than(self, text: str, num_tokens: int) -> bool:
        """Whether a text cannot have as few tokens, judged by its length alone."""
        return len(text) > num_tokens * self.max_token_chars * _NORMALIZER_SHRINK

    def is_special(self, token_id: int) -> bool:
        """Whether a token is one that readers do not want to see (eos, for example)."""
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, exactly; half a character is possible."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._make_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """A token for people to read; broken characters are U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _make_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            table = _byte_level_table()
            if all(char in table for char in token):
                return bytes(table[char] for char in token)
            return token.encode()
        if token_id in self._added:
            return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


def require_tokenizer(tokenizer: Tokenizer | None, param: str) -> Tokenizer:
    """The tokenizer. Raises ``RequestError`` about a field without one."""
    if tokenizer is None:
        raise RequestError(
            "the model has no tokenizer: only token ids can be used, not text", param
        )
    return tokenizer


def load_tokenizer(folder: str, chat_template: str | None = None) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None where the folder has no ``tokenizer.json``.

    Args:
        folder: the checkpoint.
        chat_template: Jinja text that replaces the checkpoint's own.

    Raises:
        CheckpointError: a file is there but cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as err:  # the library raises bare Exception
        raise CheckpointError(f"tokenizer.json cannot be read: {err}") from err
    tokenizer = Tokenizer(backend, file=path)
    tokenizer.chat_template = _load_template(Path(folder), chat_template, tokenizer.special_ids)
    if isinstance(tokenizer.chat_template, HarmonyTemplate):
        tokenizer.encode(tokenizer.chat_template.render([]))  # the first takes a second
    return tokenizer


def _load_template(
    folder: Path, override: str | None, special_ids: Mapping[str, int]
) -> ChatTemplate | HarmonyTemplate | None:
    """The override; else our own for a model of the Harmony format; else the checkpoint's."""
    files = read_tokenizer_files(folder)
    variables = files.tokens
    if override:
        return ChatTemplate(override, variables)
    found = None
    if files.templates.keys() & {DEFAULT, TOOL_USE}:
        source = files.templates.get(DEFAULT, _NO_DEFAULT)
        found = ChatTemplate(source, variables, tool_use=files.templates.get(TOOL_USE))
    is_harmony = found is None or found.tool_form is ToolForm.HARMONY
    if is_harmony and all(mark in special_ids for mark in MARKS):
        if found is not None:
            logger.info(_REPLACED)
        return HarmonyTemplate(variables)
    return found


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if not decoder:
        return False
    if decoder.get("type") == "Sequence":
        inner = decoder.get("decoders", [])
        return len(inner) == 1 and _is_byte_level(inner[0])
    return decoder.get("type") == "ByteLevel"


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    Source: GPT-2's ``bytes_to_unicode``: printable Latin-1 bytes stand for themselves, the others
    follow from U+0100 on. For example ``Ġ`` (U+0120) is the space.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table
