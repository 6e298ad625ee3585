"""Encode texts to token ids outside the event loop: in threads, or in a process for long texts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from cluster.core.errors import RequestError
from gateway.offload.json_text import MAX_ENTRIES
from gateway.offload.long_work import LongWork, numbers_of
from gateway.text.long_texts import LONG_CHARS, LongTexts
from gateway.text.tokenizer import Tokenizer

MAX_TOKENS = MAX_ENTRIES
"""Maximum number of tokens of a text that no context length limits, as for ids in a body."""
_INLINE_CHARS = 2048
"""Longer texts are tokenized in a thread."""


class EncodedText(NamedTuple):
    ids: tuple[int, ...]
    """The requested slice of the token ids."""
    num_tokens: int
    """Number of tokens of the whole text."""


class TextEncoder:
    """Encodes prompts; ``long_work`` runs work that holds the GIL."""

    def __init__(self, tokenizer: Tokenizer, long_work: LongWork) -> None:
        self._tokenizer = tokenizer
        self._long_work = long_work
        file = tokenizer.file
        self._long_texts = None if file is None else LongTexts(file)

    async def encode(
        self, prompts: Sequence[str | tuple[int, ...]], add_special_tokens: bool, kept: slice
    ) -> list[EncodedText]:
        """Return the slice ``kept`` of the token ids of each prompt."""
        long_texts = self._long_texts
        if long_texts is None or all(len(one) <= LONG_CHARS for one in _texts(prompts)):
            return await self._encode_here(prompts, add_special_tokens, kept)
        found: list[EncodedText] = []
        for prompt in prompts:
            if not isinstance(prompt, str) or len(prompt) <= LONG_CHARS:
                found += await self._encode_here([prompt], add_special_tokens, kept)
                continue
            ids, count = await long_texts.encode(prompt, add_special_tokens, kept)
            found.append(EncodedText(await self._long_work.run(len(ids), numbers_of, ids), count))
        return found

    async def _encode_here(
        self, prompts: Sequence[str | tuple[int, ...]], add_special_tokens: bool, kept: slice
    ) -> list[EncodedText]:
        def encode() -> list[EncodedText]:
            return [self._encoded(prompt, add_special_tokens, kept) for prompt in prompts]

        num_chars = sum(map(len, _texts(prompts)))
        return encode() if num_chars <= _INLINE_CHARS else await asyncio.to_thread(encode)

    def _encoded(
        self, prompt: str | tuple[int, ...], add_special_tokens: bool, kept: slice
    ) -> EncodedText:
        if isinstance(prompt, str):
            prompt = self._tokenizer.encode(prompt, add_special_tokens)
        return EncodedText(prompt[kept], len(prompt))

    async def stop(self) -> None:
        """Stop the process for long texts."""
        if self._long_texts is not None:
            await self._long_texts.stop()


def check_num_tokens(name: str, count: int) -> None:
    """Raise ``RequestError`` if ``count`` exceeds ``MAX_TOKENS``."""
    if count > MAX_TOKENS:
        raise RequestError(f"{name} has {count} tokens, at most {MAX_TOKENS} are allowed", name)


def _texts(prompts: Sequence[str | tuple[int, ...]]) -> list[str]:
    return [prompt for prompt in prompts if isinstance(prompt, str)]
