"""Prompts from text and conversations to tokens, off the event loop where they are long."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.errors import RequestError
from gateway.call import ChatInput, GenerateFields
from gateway.model import ModelFacts
from gateway.tokenizer import Tokenizer
from gateway.validate import check_chat, check_context, check_token_ids

_INLINE_CHARS = 2048
"""Longer texts are tokenized in a thread."""


class PromptMaker:
    """Tokenizes.

    Args:
        tokenizer: None where the checkpoint has none: prompts must be token ids then.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer

    def require_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer. Raises ``RequestError`` without one."""
        if self.tokenizer is None:
            raise RequestError(
                "the model has no tokenizer: only token ids can be used, not text", param
            )
        return self.tokenizer

    async def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a text."""
        return (await self._encode_all([text], add_special_tokens))[0]

    async def render(self, chat: ChatInput) -> str:
        """The prompt of a conversation. Raises ``RequestError`` without a chat template."""
        check_chat(chat)
        template = self.require_tokenizer("messages").chat_template
        if template is None:
            raise RequestError("the model has no chat template: use completions", "messages")
        opens_turn = chat.add_generation_prompt
        return await asyncio.to_thread(
            template.render,
            chat.messages,
            add_generation_prompt=not chat.continue_final_message
            if opens_turn is None
            else opens_turn,
            continue_final_message=bool(chat.continue_final_message),
            variables=chat.template_kwargs,
        )

    async def decode(self, ids: Sequence[int], facts: ModelFacts) -> str:
        """Text of token ids. Raises ``RequestError`` for one outside the vocabulary."""
        tokenizer = self.require_tokenizer("tokens")
        check_token_ids("tokens", ids, facts.vocab_size)
        return await asyncio.to_thread(tokenizer.decode, ids, False)

    async def make(
        self, fields: GenerateFields, facts: ModelFacts
    ) -> list[tuple[str | None, tuple[int, ...]]]:
        """(text or None, token ids) of each prompt of a call."""
        if fields.chat is not None:
            text = await self.render(fields.chat)
            self._check_length(text, facts, "messages")
            return [(None, await self.encode(text, bool(fields.add_special_tokens)))]
        texts = [prompt for prompt in fields.prompts if isinstance(prompt, str)]
        for text in texts:
            self._check_length(text, facts, "prompt")
        encoded = iter(await self._encode_all(texts, fields.add_special_tokens is not False))
        return [
            (prompt, next(encoded)) if isinstance(prompt, str) else (None, prompt)
            for prompt in fields.prompts
        ]

    async def _encode_all(
        self, texts: Sequence[str], add_special_tokens: bool
    ) -> list[tuple[int, ...]]:
        if not texts:
            return []
        encode = self.require_tokenizer("prompt").encode
        if sum(map(len, texts)) <= _INLINE_CHARS:
            return [encode(text, add_special_tokens) for text in texts]
        return await asyncio.to_thread(lambda: [encode(text, add_special_tokens) for text in texts])

    def _check_length(self, text: str, facts: ModelFacts, param: str) -> None:
        """Refuse a text that cannot fit before time is spent on it."""
        tokenizer = self.require_tokenizer(param)
        if tokenizer.is_surely_longer_than(text, facts.context_tokens):
            at_least = len(text) // tokenizer.max_token_chars
            check_context(at_least, 0, facts, param)
