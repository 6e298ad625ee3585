"""A call of a client, independent of its protocol.

Each protocol's ``convert.py`` makes one of a request body. The gateway makes the engine's requests
(``workers.requests.request``) of it: one per prompt, with tokens, defaults and seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from gateway.core.thinking import Thinking
from gateway.core.tool_use import ToolCallFormat, ToolUse
from workers.requests.prompt_embeds import PromptEmbeds
from workers.requests.request import Grammar


class CallKind(Enum):
    COMPLETION = "completion"
    CHAT = "chat"


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSchema:
    """JSON schema of the output, for prompts that show it."""

    schema: str
    """JSON text."""
    name: str | None = None
    description: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatInput:
    """A conversation and how to render it."""

    messages: tuple[Mapping[str, Any], ...]
    """Messages for the chat template; content is a string."""
    add_generation_prompt: bool | None = None
    """Whether the prompt opens the assistant's turn (default True)."""
    continue_final_message: bool | None = None
    """Whether the prompt leaves the last message open instead."""
    template: str | None = None
    """Source of a Jinja template; None uses the model's template."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    """Template variable of this name, unless ``template_kwargs`` has it."""
    tools: ToolUse | None = None
    """Tools that the model may call; None offers none."""
    output_schema: OutputSchema | None = None
    """Schema of ``response_format``, if it has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """A call of a client. Fields have the names of the API; None is unset."""

    kind: CallKind
    model: str | None = None
    """Name of a model or adapter; None is the served model."""
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Texts or token ids of a completion."""
    chat: ChatInput | None = None
    embeds: PromptEmbeds | None = None
    """Embeddings that replace the single prompt, whose token ids are zeros."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds special tokens (bos)."""
    max_tokens: int | None = None
    max_tokens_name: str = "max_tokens"
    """The client's field of ``max_tokens``, for error messages."""
    fits_context: bool = False
    """Whether ``max_tokens`` is lowered to the remaining context."""
    prompt_name: str = field(default="prompt", compare=False)
    """The client's field of the prompts, for error messages."""
    min_tokens: int | None = None
    """Number of new tokens before which only ``max_tokens`` ends the choice."""
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    """Probability mass that is kept."""
    top_k: int | None = None
    min_p: float | None = None
    """Smallest probability that is kept, relative to the most probable token."""
    frequency_penalty: float | None = None
    """Penalty by count in the output."""
    presence_penalty: float | None = None
    """Penalty by presence in the output."""
    repetition_penalty: float | None = None
    """Penalty by presence in prompt and output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) pairs."""
    seed: int | None = None
    """None uses a random seed."""
    n: int | None = None
    best_of: int | None = None
    """Sampled choices per prompt; the ``n`` best are returned."""
    use_beam_search: bool = False
    """Whether choices are the outputs of a beam search with one beam per choice."""
    length_penalty: float | None = None
    """For beam searches; see ``BeamParams``."""
    early_stopping: str | None = None
    """For beam searches: false, true or never."""
    stop: tuple[str, ...] = ()
    stop_name: str = field(default="stop", compare=False)
    """The client's field of ``stop``, for error messages."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    """Alternatives per token; None returns no log-probabilities."""
    logprobs_name: str = "logprobs"
    """The client's field of ``logprobs``, for error messages."""
    prompt_logprobs: int | None = None
    """Alternatives per prompt token; None returns no log-probabilities."""
    logprob_token_ids: tuple[int, ...] = ()
    """Tokens to return instead of the most probable ones."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Tokens that may be sampled; None allows all."""
    bad_words: tuple[str, ...] = ()
    grammar: Grammar | None = None
    """Compiled grammar of the output."""
    echo: bool = False
    token_ids_only: bool = False
    """Whether no text is produced."""
    return_token_ids: bool = False
    priority: int | None = None
    """Lower values run first."""
    cache_salt: str | None = None
    """Cached prefixes are shared only with calls of the same salt; None is a salt, too."""
    cache_ttl: float | None = None
    """Seconds after its end for which its KV blocks are evicted after others; 0 means that they are
    not reused; None is unset."""
    cache_ttl_hint: float | None = None
    """``cache_ttl`` by a protocol's hint, for calls without it; lowered to the limit."""
    session_id: str | None = None
    """Calls that continue each other; they go to the same worker if that costs little."""
    prompt_cache_key: str | None = None
    """OpenAI's name of ``session_id``, which takes precedence."""
    return_tokens_as_token_ids: bool = False
    """Whether log-probabilities name tokens by id."""
    truncate_prompt_tokens: int | None = None
    """Number of tokens of each prompt that are kept; -1 keeps what fits with the output."""
    truncation_side: str | None = None
    """Side on which tokens are dropped: left (default) or right."""
    timeout_s: float | None = None
    """The client's time limit for the whole request."""
    tool_format: ToolCallFormat | None = None
    """Format of tool calls in the output; set when the prompt is rendered."""
    open_message: str = ""
    """Header of the message that the prompt leaves open (Harmony); set when it is rendered."""
    thinking: Thinking | None = None
    """Where reasoning begins; set when the prompt is rendered. None without reasoning, and for
    Harmony, whose format marks it."""

    @property
    def stops_in_answer(self) -> bool:
        """Whether the gateway checks all stops, because they do not count within reasoning.

        Without text, and for beam searches, the engine checks stop tokens.
        """
        has_reasoning = self.thinking is not None or self.tool_format is ToolCallFormat.HARMONY
        return has_reasoning and not (self.token_ids_only or self.use_beam_search)

    @property
    def tools(self) -> ToolUse | None:
        return self.chat.tools if self.chat is not None else None

    @property
    def num_returned(self) -> int:
        """Number of returned choices per prompt."""
        return self.n or 1

    @property
    def num_sampled(self) -> int:
        """Number of sampled choices per prompt."""
        return self.best_of or self.num_returned

    @property
    def is_ranked(self) -> bool:
        """Whether only the most probable choices are returned."""
        return self.num_sampled != self.num_returned

    @property
    def session(self) -> str:
        """Name of the session; empty without one."""
        return self.session_id or self.prompt_cache_key or ""

    def prompt_text(self, index: int) -> str | None:
        """Text of a prompt as the client sent it; None for token ids, chats and truncated
        prompts."""
        if index >= len(self.prompts) or self.truncate_prompt_tokens is not None:
            return None
        prompt = self.prompts[index]
        return prompt if isinstance(prompt, str) else None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per new token; None returns no log-probabilities."""
        return len(self.logprob_token_ids) or self.logprobs


FIELD_NAMES = frozenset(one.name for one in fields(GenerateCall))
"""Fields that codecs copy from the same field of a body or message."""
