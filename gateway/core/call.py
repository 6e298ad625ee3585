"""A call of a client, independent of its protocol.

The ``convert.py`` of each protocol converts a request body to a ``GenerateCall``. The gateway
converts the call to engine requests (``workers.requests.request``): one per prompt, with tokens,
defaults and seeds.
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
    """JSON schema of the output, for chat templates that show it to the model."""

    schema: str
    """The schema as JSON text."""
    name: str | None = None
    description: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatInput:
    """A conversation with its options for the chat template."""

    messages: tuple[Mapping[str, Any], ...]
    """Messages for the chat template; content is a string."""
    add_generation_prompt: bool | None = None
    """Whether the prompt opens the assistant's turn (default True)."""
    continue_final_message: bool | None = None
    """Whether the prompt ends within the last message, which the output continues."""
    template: str | None = None
    """Source of a Jinja template; None uses the model's template."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    """Value of the template variable ``reasoning_effort``, unless ``template_kwargs`` sets it."""
    tools: ToolUse | None = None
    """Tools that the model may call; None without tools."""
    output_schema: OutputSchema | None = None
    """Schema in ``response_format``; None without a schema."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """A call of a client. Fields have the names of the API; None means that a field is not set."""

    kind: CallKind
    model: str | None = None
    """Name of a model or adapter; None selects the served model."""
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Texts or token ids of a completion."""
    chat: ChatInput | None = None
    embeds: PromptEmbeds | None = None
    """Embeddings to use in place of the only prompt, whose token ids are then zeros."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds special tokens, such as bos."""
    max_tokens: int | None = None
    max_tokens_name: str = "max_tokens"
    """Name of the client's field for ``max_tokens``, for error messages."""
    fits_context: bool = False
    """Whether to lower ``max_tokens`` to the remaining context instead of refusing the call."""
    prompt_name: str = field(default="prompt", compare=False)
    """Name of the client's field for the prompts, for error messages."""
    min_tokens: int | None = None
    """Minimum number of new tokens; before it, only ``max_tokens`` ends the choice."""
    temperature: float | None = None
    """0 selects the most probable token at each step."""
    top_p: float | None = None
    """Probability mass of the most probable tokens that may be sampled."""
    top_k: int | None = None
    min_p: float | None = None
    """Minimum probability of a token that may be sampled, relative to the most probable token."""
    frequency_penalty: float | None = None
    """Penalty for each occurrence of a token in the output."""
    presence_penalty: float | None = None
    """Penalty for tokens that occur in the output."""
    repetition_penalty: float | None = None
    """Penalty factor for tokens that occur in the prompt or the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) pairs."""
    seed: int | None = None
    """Seed of sampling; None uses a random seed."""
    n: int | None = None
    best_of: int | None = None
    """Number of sampled choices per prompt, of which the ``n`` best are returned."""
    use_beam_search: bool = False
    """Whether choices are the outputs of a beam search with one beam per choice."""
    length_penalty: float | None = None
    """Length penalty of a beam search; see ``BeamParams``."""
    early_stopping: str | None = None
    """Stopping rule of a beam search: false, true or never."""
    stop: tuple[str, ...] = ()
    stop_name: str = field(default="stop", compare=False)
    """Name of the client's field for ``stop``, for error messages."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    """Number of alternatives per token; None returns no log-probabilities."""
    logprobs_name: str = "logprobs"
    """Name of the client's field for ``logprobs``, for error messages."""
    prompt_logprobs: int | None = None
    """Number of alternatives per prompt token; None returns no log-probabilities."""
    logprob_token_ids: tuple[int, ...] = ()
    """Tokens whose log-probabilities are returned instead of those of the most probable tokens."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Tokens that may be sampled; None allows all."""
    bad_words: tuple[str, ...] = ()
    grammar: Grammar | None = None
    """Grammar that the output must match."""
    echo: bool = False
    token_ids_only: bool = False
    """Whether to return only token ids, without text."""
    return_token_ids: bool = False
    priority: int | None = None
    """Requests with lower values run first."""
    cache_salt: str | None = None
    """Cached prefixes are shared only among calls with equal salts; None counts as a salt."""
    cache_ttl: float | None = None
    """Seconds after the call for which its KV blocks are evicted only after other blocks. 0 means
    that they are not reused."""
    cache_ttl_hint: float | None = None
    """TTL of a protocol's hint, used without ``cache_ttl``; lowered to the server's limit."""
    session_id: str | None = None
    """Id of a conversation. Its calls go to the same worker if that costs little."""
    prompt_cache_key: str | None = None
    """OpenAI's field for a session. ``session_id`` takes precedence."""
    return_tokens_as_token_ids: bool = False
    """Whether tokens in log-probabilities are named by their ids instead of their texts."""
    truncate_prompt_tokens: int | None = None
    """Number of tokens to keep of each prompt; -1 keeps as many as fit with the output."""
    truncation_side: str | None = None
    """Side on which tokens are dropped: left (default) or right."""
    revision: str | None = None
    """Name of the model's revision that must serve the call; None: any."""
    last_revision: str = ""
    """``model/revision`` of the stored response that the call continues; it serves the call if it
    can."""
    timeout_s: float | None = None
    """The client's time limit in seconds for the whole request."""
    tool_format: ToolCallFormat | None = None
    """Format of tool calls in the output; set when the prompt is rendered."""
    open_message: str = ""
    """Header of the Harmony message that the prompt leaves open; set when it is rendered."""
    thinking: Thinking | None = None
    """Where reasoning begins; set when the prompt is rendered. None without reasoning, and for
    Harmony, whose messages have channels for it."""

    @property
    def stops_in_answer(self) -> bool:
        """Whether the gateway checks all stops, as stops within reasoning do not end the output.

        The engine checks stop tokens if there is no text, and for beam searches.
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
        """Id of the session; empty without a session."""
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
        """Number of alternatives per new token; None returns no log-probabilities."""
        return len(self.logprob_token_ids) or self.logprobs


FIELD_NAMES = frozenset(one.name for one in fields(GenerateCall))
"""Fields that ``convert`` modules copy from a field of the same name in a body or message."""
