"""A request as the engine knows it, and what comes back for it.

These are the core types behind both codecs (HTTP and gRPC): validation and defaults live in the
gateway, all later code uses ``Request``, ``TokenOutput`` and ``StepOutput``.
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
"""Deaths of workers with a request after which it runs alone."""


class FinishReason(Enum):
    """Why a choice ended."""

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
    """A rule of a Lark grammar that a client's schema decides; it names no other rules."""

    rule: str
    """Its name: it is the line ``NAME: BODY`` of the text."""
    label: str
    """What it is about, for messages."""
    fallback: str | None = None
    """The body in its place where it does not compile; None: the grammar is refused."""


class Grammar(Message, frozen=True, kw_only=True, array_like=True):
    """What the output must follow. Hashable: equal ones are compiled once."""

    kind: GrammarKind
    text: str
    """A JSON schema, a regular expression, a JSON list of strings, or a Lark grammar."""
    field: str = "structured_outputs"
    """The client's field that it came from, for messages."""
    parts: tuple[GrammarPart, ...] = ()
    """Rules that may not compile."""


class EarlyStopping(Enum):
    """When a beam search ends that has as many ended outputs as beams."""

    HEURISTIC = "false"
    """Once no beam would be better than the worst of them if it ended now."""
    FULL = "true"
    """At once."""
    NEVER = "never"
    """Once no beam can become better than the worst of them."""


class BeamParams(Message, frozen=True, kw_only=True, array_like=True):
    """A search for the most probable outputs; the request's ``n`` is the number of beams.

    Nothing is drawn, and nothing is delivered before the end: choice 0 is the best output then.
    """

    length_penalty: float = 1.0
    """An output's score is its log-probability over its tokens to the power of this."""
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC


class SamplingParams(Message, frozen=True, kw_only=True, array_like=True):
    """How tokens are drawn, in the order of docs/reference/sampling.md. Values are validated."""

    max_tokens: Count = 16
    """New tokens at most; 0 scores the prompt only."""
    min_tokens: Count = 0
    """New tokens before eos or a stop token id may be drawn."""
    temperature: float = 1.0
    """0 is argmax, ties to the lowest id."""
    top_p: float = 1.0
    """Smallest set of tokens with this probability mass, (0, 1]."""
    top_k: Count = 0
    """Most probable tokens kept; 0 is off."""
    min_p: float = 0.0
    """Tokens below this share of the best token's probability are dropped, [0, 1]."""
    repetition_penalty: float = 1.0
    """Over prompt and output tokens, (0, 2]."""
    frequency_penalty: float = 0.0
    """Times the token's count in the output, [-2, 2]."""
    presence_penalty: float = 0.0
    """Once for a token that is in the output, [-2, 2]."""
    logit_bias: tuple[tuple[Count, float], ...] = ()
    """(token id, bias) pairs added to the logits."""
    stop_token_ids: tuple[Count, ...] = ()
    """Tokens that end the choice, beside the model's eos."""
    ignore_eos: bool = False
    """Do not end at the model's eos."""
    seed: int = 0
    """Drawn at admission where the client gave none, so that the engine always has one."""
    logprobs: Count | None = None
    """Alternatives to report per new token; None reports nothing, 0 the drawn token only."""
    prompt_logprobs: Count | None = None
    """The same for prompt tokens."""
    logprob_token_ids: tuple[Count, ...] = ()
    """Tokens to report per new token in place of the most probable ones; needs ``logprobs``."""
    allowed_token_ids: tuple[Count, ...] = ()
    """Tokens that may be drawn; empty allows all."""
    bad_words: tuple[tuple[Count, ...], ...] = ()
    """Token sequences that must not be in the output; none is empty."""
    grammar: Grammar | None = None
    beams: BeamParams | None = None
    """None: tokens are drawn. Otherwise only ``max_tokens``, ``min_tokens``, ``stop_token_ids``,
    ``ignore_eos`` and ``logprobs`` have an effect."""


class Request(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """One prompt with ``n`` choices."""

    request_id: str = ""
    """Unique in the cluster; the gateway sets it when it admits the call, with the call's tenant,
    adapter and session."""
    prompt: tuple[Count, ...]
    """Token ids, never empty."""
    params: SamplingParams = SamplingParams(max_tokens=0)
    """The same for all choices; choice j draws with (seed, j, position). By default the prompt is
    only read."""
    n: Count = 1
    attempt: Count = 0
    """Grows with each resubmission; tokens of an older attempt are dropped by the gateway."""
    output_so_far: tuple[tuple[Count, ...], ...] = ()
    """By choice, tokens that an earlier attempt already delivered."""
    closed_choices: tuple[Count, ...] = ()
    """Choices that have ended in an earlier attempt; at least one of the ``n`` has not."""
    num_deaths: Count = 0
    """Workers that died with it since it last had a token."""
    kv_peer: str = ""
    """Worker from which blocks of the prompt may be fetched; empty: none."""
    deadline_ms: Count = 0
    """Milliseconds left to live when it was sent; 0 is no limit."""
    priority: int = 0
    """Lower runs first."""
    cache_salt: str = ""
    """Requests share cached prefixes with those of the same salt only."""
    session: str = ""
    """Session of the tenant to which it belongs, with the requests before it; empty: none."""
    cache_ttl_s: float | None = None
    """Time after its end for which its blocks are kept before others; 0: nobody will use them
    again; None: it does not say."""
    inspection: InspectionParams | None = None
    """Internal values to return beside tokens; only with ``n`` 1 and ``max_tokens`` 0."""
    prompt_embeds: PromptEmbeds | None = None
    """What the model reads in place of the prompt's tokens, which are zeros then."""
    tenant: str = ""
    """Whose it is: tenants take turns, and ``priority`` orders the requests of one."""
    weight: float = 1.0
    """The tenant's share is in proportion to it."""
    step_parents: StepParents | None = None
    """The spans above those of its steps; None: it is not traced."""
    adapter: str = ""
    """Key of a loaded adapter, with which its rows are computed; empty: none."""

    @property
    def is_kept(self) -> bool:
        """Its blocks are wanted after its end: it names a session or a time to keep them."""
        return bool(self.session) if self.cache_ttl_s is None else self.cache_ttl_s > 0


class SoloStage(Enum):
    """How far a step with the rows of one request alone is."""

    OFFERED = "offered"
    """Until the gateway has acknowledged it, the worker may withdraw it."""
    CERTAIN = "certain"
    """It runs once the gateway has recorded that, and nothing else runs before."""
    OVER = "over"
    """It has ended; others run once the gateway has recorded that."""


class SoloStep(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """A stage of a step with the rows of one request alone, and the gateway's acknowledgement.

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
    """Log-probabilities at one position, of the model's distribution before any processing.

    It has few objects, none of which Python's collector visits: a prompt has 100,000 of them.
    """

    token_id: int
    """The token that stands at the position."""
    logprob: float
    """Its natural log-probability."""
    rank: int = 0
    """1 for the most probable token."""
    top_ids: tuple[int, ...] = ()
    """The most probable tokens, best first, or ``logprob_token_ids``."""
    top_logprobs: tuple[float, ...] = ()
    """Of ``top_ids``."""

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """``top_ids`` with their ``top_logprobs``."""
        return tuple(zip(self.top_ids, self.top_logprobs, strict=True))


_PIECE_ENTRIES = 256
"""Positions of a prompt that one call of the decoder reads: 20 alternatives each take 3 ms."""


class PromptLogprobs(Message, frozen=True, kw_only=True, array_like=True):
    """Log-probabilities of a prompt's tokens, encoded: a long prompt has 100,000 of them.

    A decoder holds the interpreter lock, so it reads them piece by piece, in any thread.
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
MAX_NOTED = 64
"""Most times of one kind that are reported for a choice."""


class Timings(Message, frozen=True, kw_only=True, array_like=True):
    """Seconds on the worker's monotonic clock, relative to ``received`` (0.0)."""

    first_dispatch_s: float = 0.0
    """From receipt to the first dispatch of rows to the experts."""
    first_token_s: float = 0.0
    """From receipt to the commit of the first token."""
    finished_s: float = 0.0
    """From receipt to the end, or to the output that carries these timings."""
    prefill_s: tuple[float, ...] = ()
    """From receipt to the first dispatch of each chunk of the prompt; ``MAX_NOTED`` at most."""
    preempted_s: tuple[float, ...] = ()
    """From receipt to each preemption; ``MAX_NOTED`` at most."""


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
    """One entry per new token where asked for."""
    prompt_logprobs: PromptLogprobs | None = None
    """Once, on the first output of choice 0."""
    num_cached_tokens: int | None = None
    """On the choice's first output: prompt tokens that were found in the prefix cache."""
    class_logits: tuple[float, ...] = ()
    """By class, from a sequence classifier; on the last output."""
    finish_reason: FinishReason | None = None
    """Set on the last output of the choice."""
    stop_token_id: int | None = None
    """The stop token id that ended it; None for eos or other reasons."""
    error: str | None = None
    """What went wrong, with finish_reason ERROR."""
    error_code: str = ""
    """Machine-readable reason, with finish_reason ERROR."""
    error_param: str | None = None
    """The request's field at fault, if one is."""
    timings: Timings | None = None
    """On the choice's first output and on its last one."""
    arrays: tuple[NamedArray, ...] = ()
    """On the last output: what the request's inspection found."""
    score: float | None = None
    """Of an output that a beam search found."""


class StepOutput(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """All outputs of one step for one gateway."""

    outputs: tuple[TokenOutput, ...]
    """In the order of their commit."""
