"""Parameters and outputs of calls, with the names and meanings of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any, Literal, TypedDict


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: Sequence[int]


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
"""One prompt: a text, or token ids."""
Message = Mapping[str, Any]
"""A message of a conversation: ``role`` and ``content``, as in the chat completions API."""
Conversation = Sequence[Message]
PlainPrompt = str | tuple[int, ...]
PoolingTask = Literal["embed", "classify"]


class ChatOptions(TypedDict, total=False):
    """Options of ``chat`` and ``chat_stream``. None selects the server's default."""

    add_generation_prompt: bool | None
    """Whether the prompt ends with the beginning of the model's message (default True)."""
    continue_final_message: bool | None
    """Whether the output continues the last message (default False)."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Variables of the chat template."""
    lora_request: str | None
    """Name of an adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling parameters. None selects the server's default, given in parentheses below."""

    n: int | None = None
    """Number of outputs per prompt (default 1)."""
    max_tokens: int | None = None
    """Maximum number of new tokens (default 16; for conversations, the rest of the context)."""
    min_tokens: int | None = None
    """Number of new tokens before an end-of-text token or a stop may end the output (default 0)."""
    temperature: float | None = None
    """Sampling temperature; 0 samples greedily (default 1)."""
    top_p: float | None = None
    """Probability mass of the most probable tokens that may be sampled, in (0, 1]."""
    top_k: int | None = None
    """Number of most probable tokens that may be sampled; 0 and -1 allow all."""
    min_p: float | None = None
    """Minimum probability of a token, as a fraction of the highest probability, in [0, 1]."""
    presence_penalty: float | None = None
    """Penalty for every token that has been generated, in [-2, 2]."""
    frequency_penalty: float | None = None
    """Penalty for each time that a token has been generated, in [-2, 2]."""
    repetition_penalty: float | None = None
    """Factor for tokens that occurred, in (0, 2]; above 1 makes them less likely."""
    seed: int | None = None
    """Seed of the random numbers; None samples differently each time."""
    stop: str | Sequence[str] = ()
    """Texts that end the output."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output."""
    bad_words: Sequence[str] = ()
    """Texts that must not be in the output."""
    ignore_eos: bool = False
    """Whether the output continues after an end-of-text token."""
    logprobs: int | None = None
    """Number of alternatives per new token; None returns no log-probabilities."""
    prompt_logprobs: int | None = None
    """Number of alternatives per prompt token; None returns no log-probabilities."""
    skip_special_tokens: bool | None = None
    """Whether to omit special tokens from the text (default True)."""
    include_stop_str_in_output: bool = False
    """Whether the text includes the stop text that ended it."""
    logit_bias: Mapping[int, float] | None = None
    """Bias in [-100, 100] to add to the logit of a token, by token id."""
    allowed_token_ids: Sequence[int] | None = None
    """Tokens that may be sampled; None allows all."""
    structured_outputs: Mapping[str, Any] | None = None
    """Exactly one of ``json`` (a schema), ``regex``, ``choice``, ``grammar`` or ``json_object``."""

    def given(self) -> dict[str, Any]:
        """Return the fields that are set, by name; sequences and a single ``stop`` as lists."""
        found = {"stop": [self.stop]} if isinstance(self.stop, str) else {}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in found and value not in (None, one.default):
                is_list = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
                found[one.name] = list(value) if is_list else value
        return found


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log-probability of one token at one position."""

    logprob: float
    rank: int | None = None
    """1 for the most probable token; None if the protocol does not report it."""
    decoded_token: str | None = None
    """Text of the token; None if the protocol does not report it."""


LogprobsByToken = dict[int, Logprob]
"""Log-probabilities at one position by token id: the token there and its alternatives."""


@dataclass(slots=True)
class CompletionOutput:
    """One output of a request; in a stream, the next piece of the output."""

    index: int
    """Index of the output, from 0."""
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Sum of the tokens' log-probabilities; None unless ``logprobs`` is set."""
    logprobs: list[LogprobsByToken] | None = None
    """One entry per token; None unless ``logprobs`` is set."""
    finish_reason: str | None = None
    """``stop``, ``length`` or ``tool_calls``; None while the output continues."""
    stop_reason: int | str | None = None
    """Stop text or stop token that ended the output; None for an end-of-text token."""
    reasoning: str = ""
    """Reasoning text of the model. ``text`` excludes it."""


@dataclass(slots=True)
class RequestOutput:
    """Outputs of one prompt; in a stream, the next pieces of the outputs."""

    request_id: str
    prompt: str | None
    """The text of the prompt; None for token ids and chats."""
    prompt_token_ids: list[int]
    """Token ids of the prompt; in a stream, empty after the first piece."""
    outputs: list[CompletionOutput]
    """One entry per output; in a stream, the outputs with a new piece."""
    prompt_logprobs: list[LogprobsByToken | None] | None = None
    """One entry per prompt token, None for the first; None unless ``prompt_logprobs`` is set."""
    finished: bool = True
    """Whether this is the whole result; False for every piece of a stream, also the last."""


@dataclass(slots=True)
class PoolingOutput:
    """Embedding of one prompt, or the probabilities of its classes."""

    data: list[float]
    """``hidden_size`` numbers, not normalized, or the probability of each class."""


@dataclass(slots=True)
class PoolingRequestOutput:
    """Result of ``encode`` for one prompt."""

    outputs: PoolingOutput
    finished: bool = True


@dataclass(slots=True)
class EmbeddingOutput:
    """Embedding of one prompt."""

    embedding: list[float]
    """The vector, of ``hidden_size`` numbers, not normalized."""


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """Result of ``embed`` for one prompt."""

    outputs: EmbeddingOutput
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Query:
    """One prompt or conversation with its options: the input of a transport."""

    params: SamplingParams
    prompt: PlainPrompt | None = None
    """The prompt as text or token ids; None for a conversation."""
    messages: tuple[Message, ...] = ()
    chat: Mapping[str, Any] = field(default_factory=dict)
    """Options of the chat template that are set, by name."""
    model: str | None = None


def list_of_prompts(prompts: Prompt | Sequence[Prompt]) -> list[PlainPrompt]:
    """Convert one prompt or several prompts to texts and tuples of token ids."""
    every: Any = prompts
    is_one = isinstance(prompts, str) or not isinstance(prompts, Sequence)
    is_one = is_one or bool(every and isinstance(every[0], int))
    return list(map(_plain_prompt, [every] if is_one else every))


def _plain_prompt(prompt: Any) -> PlainPrompt:
    found = prompt
    if isinstance(prompt, Mapping):
        found = prompt.get("prompt_token_ids", prompt.get("prompt"))
    try:
        return found if isinstance(found, str) else tuple(map(index, found))
    except TypeError as err:
        raise ValueError(f"prompts ({str(prompt)[:64]}) must be texts or token ids") from err


def list_of_conversations(
    messages: Conversation | Sequence[Conversation],
) -> list[tuple[Message, ...]]:
    """Convert one conversation or several conversations to tuples of messages."""
    chats: Any = [messages] if messages and _is_list_of_dicts(messages) else messages
    if not (isinstance(chats, Sequence) and all(map(_is_list_of_dicts, chats))):
        raise ValueError(f"messages ({str(messages)[:64]}) must be dicts, in one or several lists")
    return list(map(tuple, chats))


def _is_list_of_dicts(value: object) -> bool:
    return isinstance(value, Sequence) and all(isinstance(one, Mapping) for one in value)


def check_names(options: Mapping[str, Any], kind: Any) -> None:
    """Raise ``TypeError`` for an option that the ``TypedDict`` class ``kind`` does not have."""
    for name in options.keys() - kind.__annotations__.keys():
        raise TypeError(f"{name} is not an option; the options: {', '.join(kind.__annotations__)}")


def one_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Return the parameters of each prompt. Raises ``ValueError`` for a wrong number or type."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count or not all(isinstance(one, SamplingParams) for one in params):
        rule = f"must be one SamplingParams, or one per prompt ({count})"
        raise ValueError(f"sampling_params ({str(params)[:64]}) {rule}")
    return list(params)
