"""A generate call: what a client asked for, the same for all protocols.

Each protocol's ``convert.py`` makes one of its body, and the gateway makes the engine's requests
(``workers.requests.request``) of it: one a prompt, with tokens, defaults and seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from gateway.core.thinking import Thinking
from gateway.core.tool_use import ToolForm, ToolUse
from workers.requests.prompt_embeds import PromptEmbeds
from workers.requests.request import Grammar


class CallKind(Enum):
    COMPLETION = "completion"
    CHAT = "chat"


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerFormat:
    """A JSON schema that an answer follows, as prompts may show it."""

    schema: str
    """JSON text."""
    name: str | None = None
    description: str | None = None


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
    reasoning_effort: str | None = None
    """The template's variable of this name, unless ``template_kwargs`` has it."""
    tools: ToolUse | None = None
    """Tools that the model may call; None offers none."""
    answer_format: AnswerFormat | None = None
    """What ``response_format`` asks for, where that is a schema."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """What a client asked for. Names are those of the interface; None is unset."""

    kind: CallKind
    model: str | None = None
    """Model or adapter by name; None is the served model."""
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Texts or token ids (completion)."""
    chat: ChatInput | None = None
    embeds: PromptEmbeds | None = None
    """Read in place of the one prompt, whose token ids are zeros."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its own tokens (bos)."""
    max_tokens: int | None = None
    max_tokens_name: str = "max_tokens"
    """The field that ``max_tokens`` came from, for messages."""
    fits_context: bool = False
    """``max_tokens`` is lowered to what the context leaves."""
    prompt_name: str = field(default="prompt", compare=False)
    """The field that the prompts came from, for messages."""
    min_tokens: int | None = None
    """Number of new tokens before which only ``max_tokens`` may end the choice."""
    temperature: float | None = None
    """0 is argmax."""
    top_p: float | None = None
    """Probability mass that is kept."""
    top_k: int | None = None
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
    best_of: int | None = None
    """Choices a prompt that are drawn, of which the ``n`` best are returned."""
    use_beam_search: bool = False
    """The choices are the most probable outputs that so many beams find; nothing is drawn."""
    length_penalty: float | None = None
    """Of beams: see ``BeamParams``."""
    early_stopping: str | None = None
    """Of beams: false, true or never."""
    stop: tuple[str, ...] = ()
    stop_name: str = field(default="stop", compare=False)
    """The field that ``stop`` came from, for messages."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
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
    grammar: Grammar | None = None
    """What the output must follow; checked already."""
    echo: bool = False
    token_ids_only: bool = False
    """No text is made."""
    return_token_ids: bool = False
    priority: int | None = None
    """Lower runs first."""
    cache_salt: str | None = None
    """Prefixes are shared with calls of the same salt only; None is a salt of its own."""
    cache_ttl: float | None = None
    """Seconds after its end for which its KV is kept before that of others; 0: nobody will use it
    again; None: it does not say."""
    cache_ttl_hint: float | None = None
    """The same as a protocol says it, for calls without ``cache_ttl``; lowered to its limit."""
    session_id: str | None = None
    """Calls that go on from each other; they go to the same worker where that costs little."""
    prompt_cache_key: str | None = None
    """The same under OpenAI's name; ``session_id`` is taken where both are given."""
    return_tokens_as_token_ids: bool = False
    """Log-probabilities name tokens by number."""
    truncate_prompt_tokens: int | None = None
    """Tokens of each prompt that are kept; -1 keeps as many as leave room for the output."""
    truncation_side: str | None = None
    """left (default) or right: where tokens are dropped."""
    timeout_s: float | None = None
    """The client's own limit for the whole request."""
    tool_form: ToolForm | None = None
    """The form of calls in the output; set once the model's chat template is known."""
    open_message: str = ""
    """Header of the message that the prompt leaves open (Harmony); set once it is rendered."""
    thinking: Thinking | None = None
    """Where the answer's reasoning begins; set once the prompt is rendered. None: it has none, or
    the form of its calls tells it apart (Harmony)."""

    @property
    def stops_in_answer(self) -> bool:
        """The text may have reasoning, in which stops do not count: the gateway looks for them all.

        Without text, or for beams, the engine looks for stop tokens.
        """
        has_reasoning = self.thinking is not None or self.tool_form is ToolForm.HARMONY
        return has_reasoning and not (self.token_ids_only or self.use_beam_search)

    @property
    def tools(self) -> ToolUse | None:
        return self.chat.tools if self.chat is not None else None

    @property
    def num_returned(self) -> int:
        """Choices a prompt that the client gets."""
        return self.n or 1

    @property
    def num_drawn(self) -> int:
        """Choices a prompt that the engine draws."""
        return self.best_of or self.num_returned

    @property
    def is_ranked(self) -> bool:
        """Whether only the most probable of the drawn choices are returned."""
        return self.num_drawn != self.num_returned

    @property
    def session(self) -> str:
        """Name of its session; empty without one."""
        return self.session_id or self.prompt_cache_key or ""

    def prompt_text(self, index: int) -> str | None:
        """A prompt as the client gave it; None for token ids, a conversation or a part of it."""
        if index >= len(self.prompts) or self.truncate_prompt_tokens is not None:
            return None
        prompt = self.prompts[index]
        return prompt if isinstance(prompt, str) else None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported for each new token; None reports none."""
        return len(self.logprob_token_ids) or self.logprobs


FIELD_NAMES = frozenset(one.name for one in fields(GenerateCall))
"""Fields that a codec copies from fields of the same name in a body or a message."""
