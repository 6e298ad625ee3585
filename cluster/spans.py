"""What traces are made of, as plain data, and every name in them.

Names of requests follow OpenTelemetry's conventions for generative AI, which are still in
development: this is the one place to follow them in. Our own begin with ``expertmesh.``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.errors import ConfigError

Value = str | bool | int | float | Sequence[str]
"""Of an attribute."""

PROVIDER = "expertmesh"
"""Value of ``gen_ai.provider.name``."""
CHAT = "chat"
TEXT_COMPLETION = "text_completion"
EMBEDDINGS = "embeddings"
"""Operations: a request's span is called by its operation and the model."""
TOKENIZE = "expertmesh.tokenize"
QUEUE = "expertmesh.queue"
PREFILL = "expertmesh.prefill"
DECODE = "expertmesh.decode"
DETOKENIZE = "expertmesh.detokenize"
"""Parts of a request."""
REBALANCE = "expertmesh.rebalance"
MIGRATION = "expertmesh.migration"
RECOVERY = "expertmesh.recovery"
"""What happens to the cluster, each a trace of its own."""

OPERATION_NAME = "gen_ai.operation.name"
PROVIDER_NAME = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
MAX_TOKENS = "gen_ai.request.max_tokens"
TEMPERATURE = "gen_ai.request.temperature"
TOP_P = "gen_ai.request.top_p"
TOP_K = "gen_ai.request.top_k"
SEED = "gen_ai.request.seed"
STOP_SEQUENCES = "gen_ai.request.stop_sequences"
FREQUENCY_PENALTY = "gen_ai.request.frequency_penalty"
PRESENCE_PENALTY = "gen_ai.request.presence_penalty"
CHOICE_COUNT = "gen_ai.request.choice.count"
RESPONSE_ID = "gen_ai.response.id"
RESPONSE_MODEL = "gen_ai.response.model"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"
"""The last two with ``--trace-content`` only."""
ERROR_TYPE = "error.type"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"

REQUEST_ID = "expertmesh.request_id"
WORKER = "expertmesh.worker"
PLACEMENT_EPOCH = "expertmesh.placement_epoch"
CACHED_TOKENS = "expertmesh.cached_tokens"
PREEMPTIONS = "expertmesh.preemptions"
REASON = "expertmesh.reason"
OUTCOME = "expertmesh.outcome"
SLOTS = "expertmesh.slots"
BYTES = "expertmesh.bytes"
BALANCEDNESS_BEFORE = "expertmesh.balancedness.before"
BALANCEDNESS_PREDICTED = "expertmesh.balancedness.predicted"
LOST_WORKERS = "expertmesh.lost_workers"

FIRST_TOKEN = "first_token"
PREEMPTED = "preempted"
EPOCH_CHANGED = "epoch_changed"
EXPERT_WORKER_LOST = "expert_worker_lost"
REPLAYED = "replayed"
"""Events on ``DECODE``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanEvent:
    """A moment within a span."""

    name: str
    """What happened."""
    time_ns: int
    """Since 1970."""
    attributes: Mapping[str, Value] = field(default_factory=dict)
    """More of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Work that is over, with its parts."""

    name: str
    """What was done."""
    began_ns: int
    """Since 1970."""
    ended_ns: int
    """Since 1970."""
    attributes: Mapping[str, Value] = field(default_factory=dict)
    """By name."""
    events: Sequence[SpanEvent] = ()
    """What happened meanwhile."""
    children: Sequence[Span] = ()
    """Its parts."""
    is_server: bool = False
    """Done for somebody outside."""
    error: str = ""
    """Why it failed; empty: it did not."""


class Exporter(Protocol):
    """Where spans go; see ``cluster.span_export``."""

    def send(self, span: Span, headers: Mapping[str, Sequence[str]] | None = None) -> None:
        """Queue a span with its parts; never waits."""

    def stop(self, limit_s: float) -> None:
        """Send what is left, within a time."""


def load_exporter(endpoint: str) -> Callable[[str, str], Exporter]:
    """What makes an exporter of an endpoint and the name of this process.

    Raises ``ConfigError`` where its packages are missing.
    """
    try:
        from cluster.span_export import SpanExport
    except ImportError as err:
        needs = "needs the extra otel: pip install -c constraints.txt -e '.[otel]'"
        raise ConfigError("otlp_endpoint", endpoint, needs) from err
    return SpanExport
