"""A request as the engine sees it, and its outputs.

These are the core types behind both codecs (HTTP and gRPC). The gateway validates and sets
defaults; all later code uses ``Request``, ``TokenOutput`` and ``StepOutput``.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from itertools import chain

from cluster.core.codec import Codec, Count, Message
from workers.requests.inspection import InspectionParams, NamedArray
from workers.requests.prompt_embeds import PromptEmbeds
from workers.requests.traced import StepParents

MAX_DEATHS = 2
"""Number of deaths of workers with a request after which it runs alone."""


class FinishReason(Enum):
    """Reason for the end of a choice."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class GrammarKind(Enum):
    """Language that a grammar is written in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"


class GrammarPart(Message, frozen=True, kw_only=True, array_like=True):
    """A rule of a Lark grammar that comes from a client's schema; it refers to no other rules."""

    rule: str
    """Name of the rule, which is the line ``NAME: BODY`` of the text."""
    label: str
    """Description for error messages."""
    fallback: str | None = None
    """Body to use if the rule does not compile; None refuses the grammar."""


class Grammar(Message, frozen=True, kw_only=True, array_like=True):
    """A grammar for the output. Hashable, so that equal ones are compiled once."""

    kind: GrammarKind
    text: str
    """A JSON schema, a regular expression, a JSON list of strings, or a Lark grammar."""
    field: str = "structured_outputs"
    """The client's field that contained it, for error messages."""
    parts: tuple[GrammarPart, ...] = ()
    """Rules that may fail to compile."""


class EarlyStopping(Enum):
    """When a beam search ends after it has found ``n`` ended outputs."""

    HEURISTIC = "false"
    """When no beam would be better than the worst of them if it ended now."""
    FULL = "true"
    """Immediately."""
    NEVER = "never"
    """When no beam can become better than the worst of them."""


class BeamParams(Message, frozen=True, kw_only=True, array_like=True):
    """A search for the most probable outputs; the request's ``n`` is the number of beams.

    No tokens are sampled, and no output is sent before the end, when choice 0 is the best output.
    """

    length_penalty: float = 1.0
    """The score of an output is its log-probability divided by its length to this power."""
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC


class SamplingParams(Message, frozen=True, kw_only=True, array_like=True):
    """Sampling parameters, in the order of docs/reference/sampling.md. Values are validated."""

    max_tokens: Count = 16
    """Maximum number of new tokens; 0 only scores the prompt."""
    min_tokens: Count = 0
    """Number of new tokens before eos or a stop token id may be sampled."""
    temperature: float = 1.0
    """0 is argmax, ties to the lowest id."""
    top_p: float = 1.0
    """Smallest set of tokens with this probability mass, (0, 1]."""
    top_k: Count = 0
    """Number of most probable tokens to keep; 0 is off."""
    min_p: float = 0.0
    """Tokens below this fraction of the best token's probability are dropped, [0, 1]."""
    repetition_penalty: float = 1.0
    """Applied to prompt and output tokens, (0, 2]."""
    frequency_penalty: float = 0.0
    """Multiplied by the token's count in the output, [-2, 2]."""
    presence_penalty: float = 0.0
    """Applied once to each token in the output, [-2, 2]."""
    logit_bias: tuple[tuple[Count, float], ...] = ()
    """(token id, bias) pairs added to the logits."""
    stop_token_ids: tuple[Count, ...] = ()
    """Tokens that end the choice, in addition to the model's eos."""
    ignore_eos: bool = False
    """Do not end at the model's eos."""
    seed: int = 0
    """Chosen randomly at admission if the client gives none, so that the engine always has one."""
    logprobs: Count | None = None
    """Alternatives to report per new token; None reports nothing, 0 only the sampled token."""
    prompt_logprobs: Count | None = None
    """Number of alternatives to report per prompt token."""
    logprob_token_ids: tuple[Count, ...] = ()
    """Tokens to report per new token instead of the most probable ones; needs ``logprobs``."""
    allowed_token_ids: tuple[Count, ...] = ()
    """Tokens that may be sampled; empty allows all."""
    bad_words: tuple[tuple[Count, ...], ...] = ()
    """Non-empty token sequences that must not be in the output."""
    grammar: Grammar | None = None
    beams: BeamParams | None = None
    """Beam search parameters; None for sampling. In a search, only ``max_tokens``, ``min_tokens``,
    ``stop_token_ids``, ``ignore_eos`` and ``logprobs`` have an effect."""


class Request(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """One prompt with ``n`` choices."""

    request_id: str = ""
    """Unique in the cluster. The gateway sets it at admission, with the tenant, adapter and
    session."""
    prompt: tuple[Count, ...]
    """Token ids, never empty."""
    params: SamplingParams = SamplingParams(max_tokens=0)
    """Parameters of all choices; choice j samples with (seed, j, position). By default the prompt
    is only read."""
    n: Count = 1
    attempt: Count = 0
    """Increases with each resubmission; the gateway drops tokens of an older attempt."""
    output_so_far: tuple[tuple[Count, ...], ...] = ()
    """Tokens that an earlier attempt already delivered, by choice."""
    closed_choices: tuple[Count, ...] = ()
    """Choices that ended in an earlier attempt; at least one choice is open."""
    num_deaths: Count = 0
    """Number of workers that died with it since its last token."""
    kv_peer: str = ""
    """Worker that blocks of the prompt may be fetched from; empty for none."""
    deadline_ms: Count = 0
    """Remaining milliseconds when it was sent; 0 for no limit."""
    priority: int = 0
    """Requests with a lower value run first."""
    cache_salt: str = ""
    """Only requests with equal salts share cached prefixes."""
    session: str = ""
    """Session of the tenant that the request continues; empty for none."""
    cache_ttl_s: float | None = None
    """Time in seconds for which its blocks are retained after its end; 0: they will not be used
    again; None: unspecified."""
    inspection: InspectionParams | None = None
    """Internal values to return in addition to tokens; only with ``n`` 1 and ``max_tokens`` 0."""
    prompt_embeds: PromptEmbeds | None = None
    """Embeddings that replace the prompt's tokens, which are then zeros."""
    tenant: str = ""
    """Tenants take turns; ``priority`` orders the requests of one tenant."""
    weight: float = 1.0
    """The tenant's share is proportional to its weight."""
    step_parents: StepParents | None = None
    """Parent spans for its steps; None if it is not traced."""
    adapter: str = ""
    """Key of the adapter for its rows; empty for none."""

    @property
    def is_retained(self) -> bool:
        """Whether its blocks are retained after its end: it has a session or a retention time."""
        return bool(self.session) if self.cache_ttl_s is None else self.cache_ttl_s > 0


class SoloStage(Enum):
    """Stage of a step that runs rows of only one request."""

    OFFERED = "offered"
    """The worker may withdraw the step until the gateway has acknowledged it."""
    CERTAIN = "certain"
    """The step runs once the gateway has recorded it, and nothing else runs before."""
    OVER = "over"
    """The step has ended; other requests run once the gateway has recorded that."""


class SoloStep(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """A stage of a solo step, and its acknowledgement by the gateway.

    See ``workers.engine.isolation``.
    """

    request_id: str
    attempt: Count
    stage: SoloStage = SoloStage.OFFERED


class Queued(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """The engine has the request, which does not run alone."""

    request_id: str
    attempt: Count


class TokenLogprob(Message, frozen=True, kw_only=True, array_like=True, gc=False):
    """Log-probabilities at one position, from the model's distribution before any processing.

    It has few objects, and Python's garbage collector skips all of them: a prompt has 100,000.
    """

    token_id: int
    """The token at the position."""
    logprob: float
    """Natural log-probability of the token."""
    rank: int = 0
    """1 for the most probable token."""
    top_ids: tuple[int, ...] = ()
    """The most probable tokens, best first, or ``logprob_token_ids``."""
    top_logprobs: tuple[float, ...] = ()
    """Log-probabilities of ``top_ids``."""

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """Pairs of ``top_ids`` and ``top_logprobs``."""
        return tuple(zip(self.top_ids, self.top_logprobs, strict=True))


_PIECE_ENTRIES = 256
"""Prompt positions per call of the decoder: with 20 alternatives each they take 3 ms."""


class PromptLogprobs(Message, frozen=True, kw_only=True, array_like=True):
    """Encoded log-probabilities of a prompt's tokens: a long prompt has 100,000 of them.

    The decoder holds the interpreter lock, so it decodes one piece at a time, on any thread.
    """

    pieces: tuple[bytes, ...]

    @classmethod
    def of(cls, entries: Sequence[TokenLogprob | None]) -> PromptLogprobs:
        """Encode one entry per token, None for the first."""
        starts = range(0, len(entries), _PIECE_ENTRIES)
        return cls(
            pieces=tuple(_ENTRIES.encode(tuple(entries[i : i + _PIECE_ENTRIES])) for i in starts)
        )

    def entries(self) -> list[TokenLogprob | None]:
        """Inverse of ``of``. Raises ``ProtocolError``."""
        return list(chain.from_iterable(map(_ENTRIES.decode, self.pieces)))


_ENTRIES: Codec[tuple[TokenLogprob | None, ...]] = Codec(
    tuple[TokenLogprob | None, ...], "log-probabilities"
)
MAX_TIMES = 64
"""Maximum number of reported times of one kind for a choice."""


class Timings(Message, frozen=True, kw_only=True, array_like=True):
    """Seconds on the worker's monotonic clock, relative to ``received`` (0.0)."""

    first_dispatch_s: float = 0.0
    """From receipt to the first dispatch of rows to the experts."""
    first_token_s: float = 0.0
    """From receipt to the commit of the first token."""
    finished_s: float = 0.0
    """From receipt to the end, or to the output with these timings."""
    prefill_s: tuple[float, ...] = ()
    """From receipt to the first dispatch of each chunk of the prompt; at most ``MAX_TIMES``."""
    preempted_s: tuple[float, ...] = ()
    """From receipt to each preemption; at most ``MAX_TIMES``."""


class TokenOutput(Message, frozen=True, kw_only=True, array_like=True):
    """Output of one choice after one step."""

    request_id: str
    attempt: int
    choice: int
    index: int
    """Position of ``token_ids[0]`` in the choice's output, from 0."""
    token_ids: tuple[int, ...] = ()
    """New tokens (usually one)."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One entry per new token if requested."""
    prompt_logprobs: PromptLogprobs | None = None
    """Set once, on the first output of choice 0."""
    num_cached_tokens: int | None = None
    """Number of prompt tokens found in the prefix cache; set on the choice's first output."""
    class_logits: tuple[float, ...] = ()
    """Logits by class of a sequence classifier; set on the last output."""
    finish_reason: FinishReason | None = None
    """Set on the last output of the choice."""
    stop_token_id: int | None = None
    """The stop token id that ended it; None for eos or other reasons."""
    error: str | None = None
    """Error message, with finish_reason ERROR."""
    error_code: str = ""
    """Machine-readable reason, with finish_reason ERROR."""
    error_param: str | None = None
    """The request's field that caused the error, if any."""
    timings: Timings | None = None
    """Set on the choice's first and last output."""
    arrays: tuple[NamedArray, ...] = ()
    """Results of the request's inspection; set on the last output."""
    score: float | None = None
    """Score of an output of a beam search."""


class StepOutput(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """All outputs of one step for one gateway."""

    outputs: tuple[TokenOutput, ...]
    """Outputs in the order of their commit."""
