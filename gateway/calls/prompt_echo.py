"""Echo of prompts in the output of a call: texts, tokens and log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from gateway.calls.choices import Prompt
from gateway.core.call import GenerateCall
from gateway.core.delta import TokenText
from gateway.text.detokenizer import align_offsets, locate_tokens, make_detokenizer
from gateway.text.tokenizer import Tokenizer

_INLINE_TOKENS = 1024
"""Number of tokens above which a prompt is decoded in a thread."""


class PromptEcho:
    """Prepares the echo (text, tokens, log-probabilities) of a call's prompts in the output.

    Args:
        call: the call.
        tokenizer: tokenizer of the model; None if the call produces no text.
    """

    def __init__(self, call: GenerateCall, tokenizer: Tokenizer | None) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self.is_shown = call.echo or call.prompt_logprobs is not None

    async def prepare(self, prompts: Collection[Prompt]) -> None:
        """Decode texts and log-probabilities of prompts for the echo; long prompts in a thread.

        Prompts whose log-probabilities have not arrived yet are skipped.
        """
        ready = [prompt for prompt in prompts if not prompt.waits_for_logprobs]

        def make() -> None:
            for prompt in ready:
                if prompt.scores is not None and prompt.logprobs is None:
                    prompt.logprobs = prompt.scores.entries()
                self.take(prompt)

        if sum(len(prompt.request.prompt) for prompt in ready) <= _INLINE_TOKENS:
            make()
        else:
            await asyncio.to_thread(make)

    def take(self, prompt: Prompt) -> tuple[str, list[TokenText]]:
        """Return the text and tokens of a prompt for the echo; empty unless ``echo`` is set."""
        if not self._call.echo:
            return "", []
        if prompt.echo is None:
            given, logprobs = self._call.prompt_text(prompt.index), prompt.logprobs or ()
            tokenizer, has_text = self._tokenizer, given is not None
            detokenizer = None
            if tokenizer is not None:  # the client's own text keeps its special tokens
                skips_special = self._call.skip_special_tokens and not has_text
                detokenizer = make_detokenizer(tokenizer, skips_special, ())
            text, tokens = locate_tokens(detokenizer, prompt.request.prompt, logprobs)
            is_aligned = has_text and tokenizer is not None
            prompt.echo = align_offsets(given or "", text, tokens) if is_aligned else (text, tokens)
        return prompt.echo
