"""Exceptions that expertmesh raises on purpose.

    ExpertMeshError
    ├── ConfigError               a setting breaks a rule; has field, value and rule
    ├── CheckpointError           a checkpoint cannot be served
    ├── StartError                the cluster did not start; has the part that failed and its reason
    ├── RequestError              the client's request is wrong
    │   ├── UnsupportedParameterError   a field of other servers is not supported here
    │   ├── ContextLengthError    prompt and output exceed the model's context
    │   └── ModelNotFoundError    the model is not served here
    ├── AuthenticationError       the API key is missing or unknown
    ├── PermissionDeniedError     the API key does not permit this request
    ├── RequestTooLargeError      the body exceeds the limit
    ├── LimitReachedError         the request is valid but exceeds a limit now: retry later
    │   ├── KeyLimitError         a limit of the API key
    │   └── QueueFullError        a limit of the queue: the cluster is saturated
    ├── NotReadyError             the cluster loads, drains or lacks experts
    ├── DeadlineExceededError     the client's or the server's time limit has passed
    ├── RequestFailedError        this request cannot be finished (NaN logits, for example)
    │   └── PoisonousRequestError    workers died while they ran this request alone in a step
    ├── RequestAbortedError       an operator ended this request
    ├── ConflictError             the state of the cluster does not permit a command
    ├── UnknownNameError          no worker, node or operation has this name
    └── TransportError            an error of the data plane or the control plane
        ├── ProtocolError         a peer sent invalid or unexpected data
        │   ├── HandshakeError    a peer belongs to another cluster or was started differently
        │   └── SupersededError   another controller has replaced this one
        ├── PeerLostError         an edge was reset, closed or timed out
        ├── TransferAbortedError  a transfer of expert weights was cancelled or took too long
        └── GenerationChangedError   a new generation interrupts the current step

Exceptions are pickled between processes, so every constructor passes all its arguments to
``super().__init__``.
"""

from __future__ import annotations


class ExpertMeshError(Exception):
    """Base of all errors that expertmesh raises on purpose."""


class ConfigError(ExpertMeshError):
    """A setting breaks a rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(field, value, rule)
        self.field = field
        self.value = value
        self.rule = rule

    def __str__(self) -> str:
        return f"{self.field} ({self.value}) {self.rule}"


class CheckpointError(ExpertMeshError):
    """A checkpoint is missing, damaged, or not of a supported shape."""


class StartError(ExpertMeshError):
    """A part of the cluster did not start; all parts already started have been ended."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(part, reason)
        self.part = part
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.part} did not start: {self.reason}"


class _TextError:
    """Base of errors whose text is their first argument."""

    args: tuple[object, ...]

    @property
    def message(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return self.message


class RequestError(_TextError, ExpertMeshError):
    """The request is invalid; ``param`` names the field, ``code`` states the reason."""

    default_code = "invalid_value"

    def __init__(self, message: str, param: str | None = None, code: str = "") -> None:
        super().__init__(message, param, code)
        self.param = param
        self.code = code or self.default_code

    @staticmethod
    def missing(param: str) -> RequestError:
        """Make the error for a required field that the request lacks."""
        return RequestError(f"{param} is required", param, "missing_required_parameter")


class UnsupportedParameterError(RequestError):
    """A known field of other servers that is not supported here."""

    default_code = "unsupported_parameter"


class ContextLengthError(RequestError):
    """Prompt and requested output together exceed the model's context."""

    default_code = "context_length_exceeded"


class ModelNotFoundError(RequestError):
    """The named model is not served here."""

    default_code = "model_not_found"

    def __init__(self, message: str, param: str | None = "model", code: str = "") -> None:
        super().__init__(message, param, code)


class AuthenticationError(ExpertMeshError):
    """The API key is missing or unknown."""


class PermissionDeniedError(ExpertMeshError):
    """The API key is known but does not allow this request."""


class RequestTooLargeError(ExpertMeshError):
    """The body is larger than the limit."""


class LimitReachedError(_TextError, ExpertMeshError):
    """A limit is exceeded. ``limit``: its name in metrics. ``retry_after_s``: when to retry."""

    def __init__(self, message: str, retry_after_s: float, limit: str) -> None:
        super().__init__(message, retry_after_s, limit)
        self.retry_after_s = retry_after_s
        self.limit = limit


class KeyLimitError(LimitReachedError):
    """A key has reached one of its limits: key_requests, key_tokens or key_concurrency."""


class QueueFullError(LimitReachedError):
    """The queue is full; ``retry_after_s`` estimates when it will have room.

    ``limit`` is queue_full (requests), queue_tokens or queue_wait at a gateway, and
    worker_queue_full at an attention worker.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0, limit: str = "queue_full") -> None:
        super().__init__(message, retry_after_s, limit)


class NotReadyError(_TextError, ExpertMeshError):
    """The cluster cannot serve now; ``code`` is not_ready, draining or experts_unavailable."""

    def __init__(self, message: str, code: str = "not_ready", retry_after_s: float = 1.0) -> None:
        super().__init__(message, code, retry_after_s)
        self.code = code
        self.retry_after_s = retry_after_s


class DeadlineExceededError(_TextError, ExpertMeshError):
    """A time limit has passed. ``started``: whether the request was already running."""

    def __init__(self, message: str, started: bool = False) -> None:
        super().__init__(message, started)
        self.started = started


class RequestFailedError(ExpertMeshError):
    """This request cannot be finished, although it is valid."""


class PoisonousRequestError(RequestFailedError):
    """Several workers died while they ran this request, the last one while it ran alone."""


class RequestAbortedError(ExpertMeshError):
    """An operator ended the request."""


class ConflictError(ExpertMeshError):
    """The cluster's state does not allow the command; nothing was changed."""


UNDER_WAY = "is under way"
"""End of the message of a ``ConflictError`` that is caused only by another running operation."""


class UnknownNameError(ExpertMeshError):
    """No worker, node or operation has that name."""


class TransportError(ExpertMeshError):
    """An error on the data plane or the control plane."""


class ProtocolError(TransportError):
    """A peer sent invalid or unexpected data; its edge is closed."""


class SupersededError(ProtocolError):
    """A newer controller has taken over; the older controller must no longer command or end
    workers."""


class DuplicateRegistrationError(ProtocolError):
    """A worker that is already registered registers again, after its connection broke; frames may
    be lost."""


class HandshakeError(ProtocolError):
    """A peer belongs to another cluster, or has another checkpoint or configuration."""


class PeerLostError(TransportError):
    """The edge to ``peer`` (a worker's name) was reset, closed, or timed out.

    If ``is_late``, the edge is intact, but the peer delays a step.
    """

    def __init__(self, peer: str, reason: str, *, is_late: bool = False) -> None:
        super().__init__(peer, reason)
        self.peer = peer
        self.reason = reason
        self.is_late = is_late

    def __str__(self) -> str:
        return f"lost {self.peer}: {self.reason}"


class TransferAbortedError(TransportError):
    """A transfer of expert weights was aborted; its destination is unchanged."""


class GenerationChangedError(TransportError):
    """The controller announced a new generation, so the current step is abandoned and repeated."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
