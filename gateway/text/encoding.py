"""Tokenizes texts; all but short ones outside the event loop, in threads or a process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from cluster.core.errors import RequestError
from gateway.offload.json_text import MAX_ENTRIES
from gateway.offload.long_work import LongWork, copy_numbers
from gateway.text.long_text_encoder import LONG_CHARS, LongTextEncoder
from gateway.text.tokenizer import Tokenizer

MAX_TOKENS = MAX_ENTRIES
"""Maximum number of tokens of a text that need not fit the model's context, as in ``/tokenize``."""
_INLINE_CHARS = 2048
"""Number of characters above which texts are tokenized in a thread, not on the event loop."""


class EncodedText(NamedTuple):
    ids: tuple[int, ...]
    """The requested slice of the token ids of a text."""
    num_tokens: int
    """Number of tokens of the whole text."""


class TextEncoder:
    """Tokenizes prompts without blocking the event loop.

    ``long_work`` runs work that holds the GIL.
    """

    def __init__(self, tokenizer: Tokenizer, long_work: LongWork) -> None:
        self._tokenizer = tokenizer
        self._long_work = long_work
        file = tokenizer.file
        self._long_text_encoder = None if file is None else LongTextEncoder(file)

    async def encode(
        self, prompts: Sequence[str | tuple[int, ...]], add_special_tokens: bool, token_slice: slice
    ) -> list[EncodedText]:
        """Return the slice ``token_slice`` of the token ids of each prompt.

        A prompt is a text or its token ids.
        """
        encoder = self._long_text_encoder
        if encoder is None or all(len(one) <= LONG_CHARS for one in _texts(prompts)):
            return await self._encode_in_thread(prompts, add_special_tokens, token_slice)
        encoded: list[EncodedText] = []
        for prompt in prompts:
            if not isinstance(prompt, str) or len(prompt) <= LONG_CHARS:
                encoded += await self._encode_in_thread([prompt], add_special_tokens, token_slice)
                continue
            ids, count = await encoder.encode(prompt, add_special_tokens, token_slice)
            encoded.append(
                EncodedText(await self._long_work.run(len(ids), copy_numbers, ids), count)
            )
        return encoded

    async def _encode_in_thread(
        self, prompts: Sequence[str | tuple[int, ...]], add_special_tokens: bool, token_slice: slice
    ) -> list[EncodedText]:
        def encode() -> list[EncodedText]:
            return [
                self._encode_prompt(prompt, add_special_tokens, token_slice) for prompt in prompts
            ]

        num_chars = sum(map(len, _texts(prompts)))
        return encode() if num_chars <= _INLINE_CHARS else await asyncio.to_thread(encode)

    def _encode_prompt(
        self, prompt: str | tuple[int, ...], add_special_tokens: bool, token_slice: slice
    ) -> EncodedText:
        if isinstance(prompt, str):
            prompt = self._tokenizer.encode(prompt, add_special_tokens)
        return EncodedText(prompt[token_slice], len(prompt))

    async def stop(self) -> None:
        """Stop the process that tokenizes long texts."""
        if self._long_text_encoder is not None:
            await self._long_text_encoder.stop()


def check_num_tokens(name: str, count: int) -> None:
    """Raise ``RequestError`` for the field ``name`` if the token count exceeds ``MAX_TOKENS``."""
    if count > MAX_TOKENS:
        raise RequestError(f"{name} has {count} tokens, at most {MAX_TOKENS} are allowed", name)


def _texts(prompts: Sequence[str | tuple[int, ...]]) -> list[str]:
    return [prompt for prompt in prompts if isinstance(prompt, str)]
