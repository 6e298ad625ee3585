"""A generate call between the codecs and the engine.

``GenerateFields`` is what a client asked for, by either codec, unset fields None;
``GenerateCall`` is the same after validation, with defaults, tokens and seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from gateway.tool_use import AnswerForm, ToolUse
from workers.inspection import Inspection
from workers.prompt_embeds import PromptEmbeds
from workers.request import Grammar, Request, SamplingParams


class CallKind(Enum):
    """What the prompt is."""

    COMPLETION = "completion"
    CHAT = "chat"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatInput:
    """A conversation and how to render it."""

    messages: tuple[Mapping[str, Any], ...]
    """Messages as the chat template sees them; content is a string."""
    add_generation_prompt: bool | None = None
    """Open the assistant's turn (default True)."""
    continue_final_message: bool | None = None
    """Leave the last message open instead."""
    template: str | None = None
    """Jinja text in place of the model's template; None is the model's."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the template."""
    tools: ToolUse | None = None
    """What the model may call; None: it is told of no tool."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateFields:
    """What a client asked for. Names are those of the interface; None is unset."""

    kind: CallKind
    """Completion or chat."""
    model: str | None = None
    """Model by name; None is the served one."""
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Texts or token ids (completion)."""
    chat: ChatInput | None = None
    """The conversation (chat)."""
    embeds: PromptEmbeds | None = None
    """Read in place of the one prompt, whose token ids are zeros."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its own tokens (bos)."""
    max_tokens: int | None = None
    """New tokens at most."""
    max_tokens_name: str = "max_tokens"
    """The field that ``max_tokens`` came from, for messages."""
    prompt_name: str = field(default="prompt", compare=False)
    """The field that the prompts came from, for messages."""
    min_tokens: int | None = None
    """New tokens before anything but max_tokens may end the choice."""
    temperature: float | None = None
    """0 is argmax."""
    top_p: float | None = None
    """Probability mass that is kept."""
    top_k: int | None = None
    """Tokens that are kept."""
    min_p: float | None = None
    """Least share of the best token's probability."""
    frequency_penalty: float | None = None
    """By count in the output."""
    presence_penalty: float | None = None
    """By presence in the output."""
    repetition_penalty: float | None = None
    """By presence in prompt and output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) pairs."""
    seed: int | None = None
    """None: one is drawn."""
    n: int | None = None
    """Choices a prompt."""
    best_of: int | None = None
    """Choices a prompt that are drawn, of which the ``n`` best are told."""
    stop: tuple[str, ...] = ()
    """Stop strings."""
    stop_token_ids: tuple[int, ...] = ()
    """Stop tokens."""
    ignore_eos: bool | None = None
    """Do not end at eos."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text (default True)."""
    include_stop_str_in_output: bool | None = None
    """Keep what ended the text."""
    logprobs: int | None = None
    """Alternatives a token; None reports none."""
    logprobs_name: str = "logprobs"
    """The field that ``logprobs`` came from."""
    prompt_logprobs: int | None = None
    """Alternatives a prompt token; None reports none."""
    logprob_token_ids: tuple[int, ...] = ()
    """Tokens to report in place of the most probable ones."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Tokens that may be drawn; None allows all."""
    bad_words: tuple[str, ...] = ()
    """Words that must not be in the output."""
    grammar: Grammar | None = None
    """What the output must follow; checked already."""
    echo: bool = False
    """The prompt comes first."""
    token_ids_only: bool = False
    """No text is made."""
    return_token_ids: bool = False
    """Token ids beside the text."""
    priority: int | None = None
    """Lower runs first."""
    cache_salt: str | None = None
    """Prefixes are shared with calls of the same salt only; None is a salt of its own."""
    return_tokens_as_token_ids: bool = False
    """Log-probabilities name tokens by number."""
    truncate_prompt_tokens: int | None = None
    """Tokens of each prompt that are kept; -1 keeps what leaves room for the output."""
    truncation_side: str | None = None
    """left (default) or right: where tokens are dropped."""
    tool_form: AnswerForm | None = None
    """How calls are written; set once the model's chat template is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallPrompt:
    """One prompt of a call, ready for the engine."""

    ids: tuple[int, ...]
    """Token ids, never empty."""
    text: str | None
    """As the client gave it; None for token ids."""
    params: SamplingParams
    """With this prompt's seed and token limit."""
    inspection: Inspection | None = None
    """What to bring home of the model's inside."""
    embeds: PromptEmbeds | None = None
    """What the model reads in place of ``ids``, which are zeros then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """A validated call: everything is set and within its limits."""

    kind: CallKind
    """Completion or chat."""
    model: str
    """The model's name as the client knows it."""
    prompts: tuple[CallPrompt, ...]
    """At least one."""
    n: int
    """Choices a prompt that are drawn; choice j of prompt i has index i * n + j."""
    stop: tuple[str, ...]
    """Stop strings."""
    include_stop_str_in_output: bool
    """Keep what ended the text."""
    skip_special_tokens: bool
    """Leave special tokens out of the text."""
    logprobs: int | None
    """Alternatives a token; None reports none."""
    prompt_logprobs: int | None
    """Alternatives a prompt token; None reports none."""
    echo: bool
    """The prompt comes first."""
    token_ids_only: bool
    """No text is made."""
    return_token_ids: bool
    """Token ids beside the text."""
    priority: int
    """Lower runs first."""
    cache_salt: str
    """Prefixes are shared with calls of the same salt only."""
    return_tokens_as_token_ids: bool
    """Log-probabilities name tokens by number."""
    tool_form: AnswerForm | None = None
    """The output may hold calls in this form."""
    num_best: int | None = None
    """Choices a prompt that are told, those of the most probable tokens; None: all."""

    @property
    def num_choices(self) -> int:
        """Choices of all prompts."""
        return len(self.prompts) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def num_prompt_bytes(self) -> int:
        """Bytes of prompts that are embeddings."""
        return sum(len(p.embeds.data) for p in self.prompts if p.embeds is not None)

    @property
    def max_total_tokens(self) -> int:
        """Tokens that the call may need in the engines."""
        return sum(len(p.ids) + self.n * p.params.max_tokens for p in self.prompts)

    def requests(self, call_id: str, deadline_ms: int) -> tuple[Request, ...]:
        """The engine requests, one a prompt, named ``call_id``-i."""
        return tuple(
            Request(
                request_id=f"{call_id}-{place}",
                prompt=prompt.ids,
                params=prompt.params,
                n=self.n,
                deadline_ms=deadline_ms,
                priority=self.priority,
                cache_salt=self.cache_salt,
                inspection=prompt.inspection,
                prompt_embeds=prompt.embeds,
            )
            for place, prompt in enumerate(self.prompts)
        )
