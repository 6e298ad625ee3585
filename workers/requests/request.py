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
"""Number of workers that must have died while they ran a request before the request runs alone."""


class FinishReason(Enum):
    """Reason for the end of one choice of a request."""

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
    """A rule of a Lark grammar that may fail to compile, made from a part of a client's schema.

    The rule refers to no other rules.
    """

    rule: str
    """Name of the rule; the grammar's text has the line ``NAME: BODY``."""
    label: str
    """Description of the schema's part, for error messages."""
    fallback: str | None = None
    """Body to use instead if the rule, or the grammar as a whole, does not compile; None: the
    grammar is refused if the rule does not compile."""


class Grammar(Message, frozen=True, kw_only=True, array_like=True):
    """A grammar that the output must follow. Hashable, so that equal grammars are compiled once."""

    kind: GrammarKind
    text: str
    """Text of the grammar in the language ``kind``: a JSON schema, a regular expression, a JSON
    list of strings, or a Lark grammar."""
    field: str = "structured_outputs"
    """Field of the client's request that contains the grammar, for error messages."""
    parts: tuple[GrammarPart, ...] = ()
    """Rules of a Lark grammar that may fail to compile, with replacements."""


class EarlyStopping(Enum):
    """When to end a beam search that has found ``n`` complete outputs, as in transformers."""

    HEURISTIC = "false"
    """End the search when no running beam, with its present length, would score better than the
    worst of the ``n`` complete outputs."""
    FULL = "true"
    """End the search as soon as ``n`` outputs are complete."""
    NEVER = "never"
    """End the search when no running beam can still score better than the worst of the ``n``
    complete outputs."""


class BeamParams(Message, frozen=True, kw_only=True, array_like=True):
    """Parameters of a beam search for the most probable outputs.

    The request's ``n`` is the number of beams.

    No token is sampled. Outputs are sent at the end of the search; choice 0 is the best one.
    """

    length_penalty: float = 1.0
    """Exponent of the length in the score of an output: log-probability / length ** exponent."""
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC


class SamplingParams(Message, frozen=True, kw_only=True, array_like=True):
    """Sampling parameters of a request, already validated.

    Fields are in the order of docs/reference/sampling.md.
    """

    max_tokens: Count = 16
    """Maximum number of new tokens; 0 only scores the prompt."""
    min_tokens: Count = 0
    """Minimum number of new tokens: before, no end-of-sequence or stop token is sampled."""
    temperature: float = 1.0
    """Divisor of the logits; 0 selects the most probable token, of equal ones the lowest id."""
    top_p: float = 1.0
    """Probability mass, (0, 1]: only the smallest set of tokens with at least this mass is kept."""
    top_k: Count = 0
    """Number of most probable tokens to keep; 0 keeps all."""
    min_p: float = 0.0
    """Minimum probability of a token, as a fraction of the most probable token's, [0, 1]."""
    repetition_penalty: float = 1.0
    """Divisor of positive logits, and factor of negative logits, of each token that is in the
    prompt or the output, (0, 2]; 1 is off."""
    frequency_penalty: float = 0.0
    """Number subtracted from a token's logit for each time that the token is in the output, [-2,
    2]; 0 is off."""
    presence_penalty: float = 0.0
    """Number subtracted once from the logit of each token that is in the output, [-2, 2]; 0 is
    off."""
    logit_bias: tuple[tuple[Count, float], ...] = ()
    """Numbers to add to logits, as (token id, number) pairs."""
    stop_token_ids: tuple[Count, ...] = ()
    """Ids of tokens that end the choice, in addition to the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Whether the choice continues after an end-of-sequence token of the model."""
    seed: int = 0
    """Seed of the random draws. If the client gives none, the gateway chooses a random seed."""
    logprobs: Count | None = None
    """Number of most probable tokens to report logprobs of, with each new token. 0: only the
    sampled token; None: no logprobs."""
    prompt_logprobs: Count | None = None
    """Number of most probable tokens to report logprobs of, with each prompt token. 0: only the
    prompt token; None: no logprobs."""
    logprob_token_ids: tuple[Count, ...] = ()
    """Ids of tokens to report logprobs of with each new token, instead of the most probable tokens;
    needs ``logprobs``."""
    allowed_token_ids: tuple[Count, ...] = ()
    """Ids of the tokens that may be sampled; empty allows all tokens."""
    bad_words: tuple[tuple[Count, ...], ...] = ()
    """Non-empty token sequences that the output must not contain."""
    grammar: Grammar | None = None
    beams: BeamParams | None = None
    """Beam search parameters; None for sampling. In a search, only ``max_tokens``, ``min_tokens``,
    ``stop_token_ids``, ``ignore_eos`` and ``logprobs`` have an effect."""


class Request(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """A request to the engine: one prompt, for which ``n`` choices (outputs) are generated."""

    request_id: str = ""
    """Id of the request, unique in the cluster. The gateway sets it at admission, with the tenant,
    adapter and session."""
    prompt: tuple[Count, ...]
    """Token ids of the prompt, never empty."""
    params: SamplingParams = SamplingParams(max_tokens=0)
    """Sampling parameters of all choices. Choice j samples with (seed, j, position). By default no
    token is sampled."""
    n: Count = 1
    attempt: Count = 0
    """Number of earlier submissions of the request to a worker. The gateway drops tokens of all
    attempts except the latest."""
    output_so_far: tuple[tuple[Count, ...], ...] = ()
    """Output tokens that earlier attempts have delivered, by choice."""
    closed_choices: tuple[Count, ...] = ()
    """Choices that ended in an earlier attempt; at least one choice is open."""
    num_deaths: Count = 0
    """Number of workers that died while they ran the request, since its last token."""
    kv_peer: str = ""
    """Name of the worker from which KV blocks of the prompt may be fetched; empty for none."""
    deadline_ms: Count = 0
    """Milliseconds left until the request's deadline when it was sent; 0 for no deadline."""
    priority: int = 0
    """Priority among the requests of a tenant; requests with lower values run first."""
    cache_salt: str = ""
    """Salt of cached prefixes: only requests with equal salts share cached KV blocks."""
    session: str = ""
    """Name of the tenant's session that the request continues; empty for none."""
    cache_ttl_s: float | None = None
    """Seconds for which the request's KV blocks are retained after its end; 0 if the blocks will
    not be used again, None if unspecified."""
    inspection: InspectionParams | None = None
    """Internal values of the model to return, or None; requires ``n`` 1 and ``max_tokens`` 0."""
    prompt_embeds: PromptEmbeds | None = None
    """Embeddings that replace the prompt's tokens (all token ids are then 0), or None."""
    tenant: str = ""
    """Name of the tenant. The engine shares its steps fairly between tenants."""
    weight: float = 1.0
    """Weight of the tenant, to which its share of the engine is proportional."""
    step_parents: StepParents | None = None
    """Parent trace spans of the spans for the request's steps; None if it is not traced."""
    adapter: str = ""
    """Key of the LoRA adapter that the request uses; empty for none."""
    pauses: bool = False
    """Whether the worker pauses the request once its shortest choice has a new token, because it
    then moves to another step group. The worker reports it with ``Paused``."""

    @property
    def is_retained(self) -> bool:
        """Whether the request's KV blocks are retained after its end: for its session, or for
        ``cache_ttl_s``."""
        return bool(self.session) if self.cache_ttl_s is None else self.cache_ttl_s > 0


class SoloStage(Enum):
    """Stage of a solo step, a step that runs rows of only one request."""

    OFFERED = "offered"
    """The worker offers the solo step, and may withdraw the offer until the gateway acknowledges
    it."""
    CERTAIN = "certain"
    """The solo step runs once the gateway has acknowledged this stage; before, the worker runs no
    request."""
    OVER = "over"
    """The solo step has ended. Other requests run once the gateway has acknowledged this stage."""


class SoloStep(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Message of a worker to a gateway: the stage of a solo step (rows of only one request).

    The gateway returns the message as the acknowledgement. See ``workers.engine.isolation``.
    """

    request_id: str
    attempt: Count
    stage: SoloStage = SoloStage.OFFERED


class Queued(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Message of a worker to a gateway: a request is in the queue and need not run alone."""

    request_id: str
    attempt: Count


class TokenLogprob(Message, frozen=True, kw_only=True, array_like=True, gc=False):
    """Log-probabilities of tokens at one position, from the model's logits before any processing.

    A long prompt has 100,000 of these objects, so they are small, and the garbage collector skips
    them.
    """

    token_id: int
    """Id of the token at the position: a prompt token or a sampled token."""
    logprob: float
    """Natural log-probability of the token."""
    rank: int = 0
    """Rank of the token by probability, from 1; 0 if unknown."""
    top_ids: tuple[int, ...] = ()
    """Ids of the most probable tokens, best first, or the request's ``logprob_token_ids``."""
    top_logprobs: tuple[float, ...] = ()
    """Log-probabilities of ``top_ids``."""

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """(token id, log-probability) pairs of ``top_ids``."""
        return tuple(zip(self.top_ids, self.top_logprobs, strict=True))


_PIECE_ENTRIES = 256
"""Prompt positions per piece of ``PromptLogprobs``; to decode a piece with 20 alternatives per
position takes 3 ms."""


class PromptLogprobs(Message, frozen=True, kw_only=True, array_like=True):
    """Encoded log-probabilities of a prompt's tokens, in pieces.

    A long prompt has 100,000 entries, and the decoder holds the interpreter lock for each piece.
    """

    pieces: tuple[bytes, ...]

    @classmethod
    def of(cls, entries: Sequence[TokenLogprob | None]) -> PromptLogprobs:
        """Encode the logprobs of a prompt: one entry per token, None for the first token."""
        starts = range(0, len(entries), _PIECE_ENTRIES)
        return cls(
            pieces=tuple(_ENTRIES.encode(tuple(entries[i : i + _PIECE_ENTRIES])) for i in starts)
        )

    def entries(self) -> list[TokenLogprob | None]:
        """Decode the log-probabilities: one entry per prompt token, None for the first token.

        Raises ``ProtocolError``.
        """
        return list(chain.from_iterable(map(_ENTRIES.decode, self.pieces)))


_ENTRIES: Codec[tuple[TokenLogprob | None, ...]] = Codec(
    tuple[TokenLogprob | None, ...], "log-probabilities"
)
MAX_TIMES = 64
"""Maximum length of each list of times in ``Timings``; later times are not reported."""


class Timings(Message, frozen=True, kw_only=True, array_like=True):
    """Times of one choice, in seconds after the worker received the request."""

    first_dispatch_s: float = 0.0
    """Time of the first dispatch of rows to the experts; ``finished_s`` if there was none."""
    first_token_s: float = 0.0
    """Time of the commit of the first token; ``finished_s`` if there was none."""
    finished_s: float = 0.0
    """Time of the end of the choice, or of the output that carries these timings."""
    prefill_s: tuple[float, ...] = ()
    """Times of the first dispatch to the experts of each prompt chunk; at most ``MAX_TIMES``."""
    preempted_s: tuple[float, ...] = ()
    """Times of preemptions of the choice; at most ``MAX_TIMES``."""


class TokenOutput(Message, frozen=True, kw_only=True, array_like=True):
    """Output of one choice of a request after one step."""

    request_id: str
    attempt: int
    choice: int
    index: int
    """Position of ``token_ids[0]`` in the choice's output, from 0."""
    token_ids: tuple[int, ...] = ()
    """Ids of the new tokens, usually one; in a beam search, of all tokens of the output."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Log-probabilities of the new tokens, one entry per token; empty if not requested."""
    prompt_logprobs: PromptLogprobs | None = None
    """Log-probabilities of the prompt, if requested, on the first output of choice 0; else None."""
    num_cached_tokens: int | None = None
    """Number of prompt tokens found in the prefix cache, on the first output of a choice; else
    None."""
    class_logits: tuple[float, ...] = ()
    """Logits of a sequence classifier, by class; set on the last output."""
    finish_reason: FinishReason | None = None
    """Reason for the end of the choice, on its last output; else None."""
    stop_token_id: int | None = None
    """Id of the stop token that ended the choice; None if the choice continues, or ended for
    another reason."""
    error: str | None = None
    """Message of the error that ended the choice; None unless ``finish_reason`` is ERROR."""
    error_code: str = ""
    """Machine-readable code of the error that ended the choice; empty without an error."""
    error_param: str | None = None
    """Field of the request that caused the error; None if no field did."""
    timings: Timings | None = None
    """Times of the choice so far, on its first and last output; else None."""
    arrays: tuple[NamedArray, ...] = ()
    """Internal values of the model that the request asks for; set on the last output."""
    score: float | None = None
    """Score of the complete output in a beam search; None for sampled outputs."""


class StepOutput(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Message of a worker to a gateway: the outputs of one step for this gateway's requests."""

    outputs: tuple[TokenOutput, ...]
    """Outputs of choices, in the order in which their steps committed."""
