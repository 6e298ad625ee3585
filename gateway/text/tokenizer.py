"""The checkpoint's tokenizer, loaded from ``tokenizer.json`` and its config without transformers.

It converts between text and token ids, and returns the exact bytes of each token.
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
from gateway.core.tool_use import ToolCallFormat
from gateway.text.chat_template import ChatTemplate
from gateway.text.harmony.special_tokens import SPECIAL_TOKENS, HarmonyPrompt, SpecialToken
from gateway.text.harmony.template import HarmonyTemplate
from gateway.text.tokenizer_files import DEFAULT, TOOL_USE, read_tokenizer_files

logger = logging.getLogger(__name__)
_NORMALIZER_SHRINK = 4
"""Maximum factor by which a normalizer (NFC) shortens a text, for estimates of token counts."""
_REPLACED = (
    "the server writes chat prompts in the Harmony format and does not use the chat template of "
    "the checkpoint; pass its file as --chat-template to use it"
)
_NO_DEFAULT = "{{ raise_exception('the checkpoint has a template for tools only') }}"
_SHORT_CHARS = 2048
"""Length above which texts and token lists use batch methods of ``tokenizers``, which release the
GIL."""


class Tokenizer:
    """Encodes and decodes text. Thread-safe; long texts are processed without the GIL.

    Args:
        backend: the tokenizer described by ``tokenizer.json``.
        chat_template: renders a conversation to a prompt; None if the checkpoint has none.
        file: the file of ``backend``; None if it was not read from a file.
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
        """Ids of the special tokens by their text."""
        return {self._added[number]: number for number in self._special}

    @property
    def grammar_token_ids(self) -> dict[str, int]:
        """Ids of the tokens that grammars must refer to by id, by the tokens' text.

        These are the special tokens and added tokens like ``<a>``.
        """
        return {
            text: number for number, text in self._added.items() if self._is_grammar_token(number)
        }

    def _is_grammar_token(self, number: int) -> bool:
        """Whether llguidance treats a token as special: special tokens and tokens like ``<a>``."""
        text = self._added[number]
        return number in self._special or (text.startswith("<") and text.endswith(">"))

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A tokenizer that encodes special tokens in a text as plain text.

        It is a separate object because the option of the library applies to all threads.
        """
        made = tokenizers.Tokenizer.from_str(self._backend.to_str())
        made.encode_special_tokens = True
        return made

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Return the token ids of a text.

        In the client texts of a ``HarmonyPrompt``, names of special tokens are plain text.
        """
        if isinstance(text, HarmonyPrompt):
            return self._encode_marked(text, add_special_tokens)
        if len(text) <= _SHORT_CHARS:
            return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        encodings = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encodings[0].ids)

    def _encode_marked(self, text: HarmonyPrompt, add_special_tokens: bool) -> tuple[int, ...]:
        """Encode a Harmony prompt: special tokens as such, and the other parts as plain text."""
        texts = [part for part in text.parts if not isinstance(part, SpecialToken)]
        if len(text) <= _SHORT_CHARS:
            encodings = [self._plain_backend.encode(one, add_special_tokens=False) for one in texts]
        else:
            encodings = self._plain_backend.encode_batch(texts, add_special_tokens=False)
        encoded_tokens = {part: self._encode_special(part) for part in text.special_tokens}
        encoded = iter(encodings)
        all_parts = [
            encoded_tokens[part] if isinstance(part, SpecialToken) else next(encoded)
            for part in text.parts
        ]
        if not add_special_tokens:
            return tuple(number for one in all_parts for number in one.ids)
        whole = tokenizers.Encoding.merge(all_parts, growing_offsets=True)
        return tuple(self._backend.post_process(whole, add_special_tokens=True).ids)

    def _encode_special(self, token: SpecialToken) -> tokenizers.Encoding:
        return self._backend.encode(token, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of a complete list of ids, skipping unknown ids."""
        if len(ids) <= _SHORT_CHARS:
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        texts = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        return str(texts[0])

    def is_surely_longer_than(self, text: str, num_tokens: int) -> bool:
        """Whether a text certainly has more than ``num_tokens`` tokens, by its length alone."""
        return len(text) > num_tokens * self.max_token_chars * _NORMALIZER_SHRINK

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a special token (for example eos)."""
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes that a token adds to the text; they may be part of a character."""
        cached = self._bytes.get(token_id)
        if cached is None:
            cached = self._bytes[token_id] = self._make_bytes(token_id)
        return cached

    def token_text(self, token_id: int) -> str:
        """Return the text of a token; incomplete characters become U+FFFD."""
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
    """Return the tokenizer. Raises ``RequestError`` for the field ``param`` if there is none."""
    if tokenizer is None:
        raise RequestError(
            "the model has no tokenizer: only token ids can be used, not text", param
        )
    return tokenizer


def load_tokenizer(folder: str, chat_template: str | None = None) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint; None if the folder has no ``tokenizer.json``.

    Args:
        folder: the checkpoint.
        chat_template: Jinja text that replaces the chat template of the checkpoint.

    Raises:
        CheckpointError: a file exists but cannot be read.
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
        tokenizer.encode(tokenizer.chat_template.render([]))  # warm-up: the first takes a second
    return tokenizer


def _load_template(
    folder: Path, override: str | None, special_ids: Mapping[str, int]
) -> ChatTemplate | HarmonyTemplate | None:
    """Return the chat template of a model; None if there is none.

    The order is: ``override``, the built-in template for models in the Harmony format, the template
    of the checkpoint.
    """
    files = read_tokenizer_files(folder)
    variables = files.tokens
    if override:
        return ChatTemplate(override, variables)
    template = None
    if files.templates.keys() & {DEFAULT, TOOL_USE}:
        source = files.templates.get(DEFAULT, _NO_DEFAULT)
        template = ChatTemplate(source, variables, tool_use=files.templates.get(TOOL_USE))
    is_harmony = template is None or template.tool_format is ToolCallFormat.HARMONY
    if is_harmony and all(token in special_ids for token in SPECIAL_TOKENS):
        if template is not None:
            logger.info(_REPLACED)
        return HarmonyTemplate(variables)
    return template


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if not decoder:
        return False
    if decoder.get("type") == "Sequence":
        inner = decoder.get("decoders", [])
        return len(inner) == 1 and _is_byte_level(inner[0])
    return decoder.get("type") == "ByteLevel"


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """Return the byte for each printable character of a byte-level vocabulary.

    Source: GPT-2's ``bytes_to_unicode``: printable Latin-1 bytes map to themselves, other bytes to
    U+0100 and above. For example the space maps to ``Ġ`` (U+0120).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table
