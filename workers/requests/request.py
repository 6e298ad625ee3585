"""A request in the form that the engine uses, and its outputs.

HTTP and gRPC requests are both converted to these types. The gateway validates fields and sets
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
"""If this number of workers have died while they ran a request, the request runs alone."""


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
    """A rule of a Lark grammar, made from a client's schema. It refers to no other rules."""

    rule: str
    """Name of the rule, which is the line ``NAME: BODY`` of the text."""
    label: str
    """Description for error messages."""
    fallback: str | None = None
    """Body to use if the rule does not compile. None: the grammar is then refused."""


class Grammar(Message, frozen=True, kw_only=True, array_like=True):
    """A grammar for the output. Hashable, so that equal grammars are compiled once."""

    kind: GrammarKind
    text: str
    """A JSON schema, a regular expression, a JSON list of strings, or a Lark grammar."""
    field: str = "structured_outputs"
    """The field of the client's request that contains the grammar, for error messages."""
    parts: tuple[GrammarPart, ...] = ()
    """Rules that may fail to compile."""


class EarlyStopping(Enum):
    """When to end a beam search that has found ``n`` ended outputs."""

    HEURISTIC = "false"
    """End when no beam, if it ended now, would be better than the worst of these outputs."""
    FULL = "true"
    """End immediately."""
    NEVER = "never"
    """End when no beam can become better than the worst of these outputs."""


class BeamParams(Message, frozen=True, kw_only=True, array_like=True):
    """Beam search for the most probable outputs; the request's ``n`` is the number of beams.

    No token is sampled. Outputs are sent at the end of the search; choice 0 is the best one.
    """

    length_penalty: float = 1.0
    """The score of an output is its log-probability divided by its length to this power."""
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC


class SamplingParams(Message, frozen=True, kw_only=True, array_like=True):
    """Sampling parameters, in the order of docs/reference/sampling.md. Values are validated."""

    max_tokens: Count = 16
    """Maximum number of new tokens; 0 only scores the prompt."""
    min_tokens: Count = 0
    """Number of new tokens before which neither eos nor a stop token id is sampled."""
    temperature: float = 1.0
    """0 selects the most probable token, or of equal ones the lowest id."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability mass, (0, 1]."""
    top_k: Count = 0
    """Number of most probable tokens to keep; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens below this fraction of the most probable token's probability, [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides or multiplies logits of tokens in the prompt or the output, (0, 2]; 1 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the token is in the output, [-2, 2]."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that is in the output, [-2, 2]."""
    logit_bias: tuple[tuple[Count, float], ...] = ()
    """(token id, bias) pairs added to the logits."""
    stop_token_ids: tuple[Count, ...] = ()
    """Tokens that end the choice, in addition to the model's eos."""
    ignore_eos: bool = False
    """Do not end at the model's eos."""
    seed: int = 0
    """Seed of the random draws. If the client gives none, the gateway chooses a random seed."""
    logprobs: Count | None = None
    """Number of alternatives to report per new token. 0: only the sampled token; None: nothing."""
    prompt_logprobs: Count | None = None
    """Number of alternatives to report per prompt token; None reports nothing."""
    logprob_token_ids: tuple[Count, ...] = ()
    """Tokens to report per new token instead of the most probable ones; needs ``logprobs``."""
    allowed_token_ids: tuple[Count, ...] = ()
    """Tokens that may be sampled; empty allows all."""
    bad_words: tuple[tuple[Count, ...], ...] = ()
    """Non-empty token sequences that the output must not contain."""
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
    """Parameters of all choices. Choice j samples with (seed, j, position). By default no token is
    sampled."""
    n: Count = 1
    attempt: Count = 0
    """Number of earlier submissions. The gateway drops tokens of an older attempt."""
    output_so_far: tuple[tuple[Count, ...], ...] = ()
    """Output tokens that earlier attempts have delivered, by choice."""
    closed_choices: tuple[Count, ...] = ()
    """Choices that ended in an earlier attempt; at least one choice is open."""
    num_deaths: Count = 0
    """Number of workers that died while they ran the request, since its last token."""
    kv_peer: str = ""
    """Name of the worker from which blocks of the prompt may be fetched; empty for none."""
    deadline_ms: Count = 0
    """Milliseconds that were left until its deadline when it was sent; 0 for no deadline."""
    priority: int = 0
    """Requests of a tenant with a lower value run first."""
    cache_salt: str = ""
    """Only requests with equal salts share cached prefixes."""
    session: str = ""
    """Session of the tenant that the request continues; empty for none."""
    cache_ttl_s: float | None = None
    """Seconds for which its blocks are retained after its end; 0 if they will not be used again,
    None if unspecified."""
    inspection: InspectionParams | None = None
    """Internal values of the model to return; requires ``n`` 1 and ``max_tokens`` 0."""
    prompt_embeds: PromptEmbeds | None = None
    """Embeddings that replace the prompt's tokens; the token ids are then zeros."""
    tenant: str = ""
    """Name of the tenant. The engine shares its steps fairly between tenants."""
    weight: float = 1.0
    """Weight of the tenant, to which its share of the engine is proportional."""
    step_parents: StepParents | None = None
    """Parent spans for the spans of its steps; None if the request is not traced."""
    adapter: str = ""
    """Key of the LoRA adapter of its rows; empty for none."""

    @property
    def is_retained(self) -> bool:
        """Whether its blocks are retained after its end, for its session or a time."""
        return bool(self.session) if self.cache_ttl_s is None else self.cache_ttl_s > 0


class SoloStage(Enum):
    """Stage of a solo step, which runs rows of only one request."""

    OFFERED = "offered"
    """The worker offers the step, and may withdraw it until the gateway acknowledges it."""
    CERTAIN = "certain"
    """The step runs once the gateway has acknowledged this stage; until then nothing runs."""
    OVER = "over"
    """The step has ended. Other requests run once the gateway has acknowledged this stage."""


class SoloStep(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Message with a stage of a solo step; the gateway returns it as the acknowledgement.

    See ``workers.engine.isolation``.
    """

    request_id: str
    attempt: Count
    stage: SoloStage = SoloStage.OFFERED


class Queued(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Message that the engine has received a request that need not run alone."""

    request_id: str
    attempt: Count


class TokenLogprob(Message, frozen=True, kw_only=True, array_like=True, gc=False):
    """Log-probabilities at one position, from the model's logits before any processing.

    A long prompt has 100,000 of these, so they are small, and the garbage collector skips them.
    """

    token_id: int
    """The token at the position."""
    logprob: float
    """Natural log-probability of the token."""
    rank: int = 0
    """Rank of the token by probability, from 1."""
    top_ids: tuple[int, ...] = ()
    """The most probable tokens, best first, or ``logprob_token_ids``."""
    top_logprobs: tuple[float, ...] = ()
    """Log-probabilities of ``top_ids``."""

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """Pairs of ``top_ids`` and ``top_logprobs``."""
        return tuple(zip(self.top_ids, self.top_logprobs, strict=True))


_PIECE_ENTRIES = 256
"""Prompt positions per call of the decoder; with 20 alternatives each, a call takes 3 ms."""


class PromptLogprobs(Message, frozen=True, kw_only=True, array_like=True):
    """Encoded log-probabilities of a prompt's tokens, in pieces.

    A long prompt has 100,000 entries, and the decoder holds the interpreter lock for each piece.
    """

    pieces: tuple[bytes, ...]

    @classmethod
    def of(cls, entries: Sequence[TokenLogprob | None]) -> PromptLogprobs:
        """Encode one entry per prompt token; the entry of the first token is None."""
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
"""Maximum number of times reported for a choice in each list of ``Timings``."""


class Timings(Message, frozen=True, kw_only=True, array_like=True):
    """Times of one choice, in seconds after the worker received the request."""

    first_dispatch_s: float = 0.0
    """Time of the first dispatch of rows to the experts."""
    first_token_s: float = 0.0
    """Time of the commit of the first token."""
    finished_s: float = 0.0
    """Time of the end, or of the output with these timings."""
    prefill_s: tuple[float, ...] = ()
    """Times of the first dispatch of each prompt chunk; at most ``MAX_TIMES``."""
    preempted_s: tuple[float, ...] = ()
    """Times of preemptions; at most ``MAX_TIMES``."""


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
    """One entry per new token, if requested."""
    prompt_logprobs: PromptLogprobs | None = None
    """Set only on the first output of choice 0."""
    num_cached_tokens: int | None = None
    """Number of prompt tokens found in the prefix cache; set on the choice's first output."""
    class_logits: tuple[float, ...] = ()
    """Logits of a sequence classifier, by class; set on the last output."""
    finish_reason: FinishReason | None = None
    """Set on the last output of the choice."""
    stop_token_id: int | None = None
    """The stop token id that ended the choice; None if it ended for another reason."""
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
    """Score of the output in a beam search; None without one."""


class StepOutput(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """All outputs of one step for one gateway."""

    outputs: tuple[TokenOutput, ...]
    """Outputs in the order of their commit."""
