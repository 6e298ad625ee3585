"""Internal values of the model that a request can ask for, and their size. Pure.

A ``Request`` carries ``InspectionParams``; the result is a tuple of ``NamedArray`` on the request's
last output:

    logits [P, V]             hidden_states [L + 1, T, H]      embedding [H]
    logprobs [T], NaN where the label is ignored               attentions [L, A, T, T]
    router_logits:<bank>:<layer> [T, E]                        aux:<bank>:<layer> [2, E]
    topk_ids:<bank>:<layer> and topk_weights:<bank>:<layer> [T, k]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from cluster.core.codec import Message
from cluster.core.errors import RequestError

IGNORED_LABEL = -100
"""Label of a token whose log-probability is not requested."""
MAX_INSPECT_BYTES = 32 * 1024 * 1024
"""Maximum size of the result of one prompt."""
MAX_ATTENTION_TOKENS = 256
"""Maximum length of a prompt with attention maps."""


class Pooling(Enum):
    """Method that turns the final hidden states of a prompt into one vector."""

    LAST = "last"
    MEAN = "mean"


class InspectionParams(Message, frozen=True, kw_only=True, array_like=True):
    """Internal values to return from one pass over a prompt."""

    logits: tuple[int, ...] = ()
    """Ascending positions whose logits to return; one position for a classifier."""
    labels: tuple[int, ...] = ()
    """One label per token, whose log-probability after the earlier tokens to return; -100: none."""
    embedding: Pooling | None = None
    """How to pool the final hidden states into one vector; None for no vector."""
    hidden_states: bool = False
    """Return the embeddings, the states after each layer except the last, and after the norm."""
    router_logits: bool = False
    """Return the logits of every bank's router."""
    routes: bool = False
    """Return the chosen experts and their weights in every bank."""
    attentions: bool = False
    """Return the attention probabilities of every layer and query head."""
    aux: bool = False
    """Return for each expert the number of tokens that chose it, and its summed probabilities."""

    @property
    def reads_routers(self) -> bool:
        return self.router_logits or self.routes or self.aux

    @property
    def needs_captures(self) -> bool:
        """Whether the model must capture values other than the final hidden states."""
        return self.hidden_states or self.reads_routers or self.attentions

    def first_position(self, length: int) -> int:
        """Index of the first of ``length`` tokens that must be computed, even if it is cached."""
        if self.needs_captures or self.embedding is Pooling.MEAN:
            return 0
        scored = (max(i - 1, 0) for i, label in enumerate(self.labels) if label != IGNORED_LABEL)
        return min((*self.logits, *scored), default=length - 1)


class NamedArray(Message, frozen=True, kw_only=True, array_like=True):
    """A named array in row-major order, little-endian."""

    name: str
    dtype: str
    """``float32`` or ``int32``."""
    shape: tuple[int, ...]
    data: bytes
    """Four bytes per element."""


class RouterShape(Message, frozen=True, kw_only=True, array_like=True):
    """The router of one bank."""

    name: str
    """``<bank>:<layer>``."""
    num_experts: int
    top_k: int
    aux_copies: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Dimensions of a model that the result sizes depend on."""

    hidden_size: int
    num_layers: int
    num_attention_layers: int
    """Number of layers with attention, and therefore with attention maps."""
    num_heads: int
    """Number of query heads (A)."""
    vocab_size: int
    num_labels: int
    """Number of classes of a classifier; 0 for a language model."""
    banks: tuple[RouterShape, ...]
    """Banks in the order in which they run."""

    @property
    def num_logits(self) -> int:
        return self.num_labels or self.vocab_size

    @property
    def has_aux_loss(self) -> bool:
        """Whether its family defines an auxiliary loss."""
        return any(bank.aux_copies for bank in self.banks)


def num_bytes(inspection: InspectionParams, length: int, shape: ModelShape) -> int:
    """Bytes of the result of a prompt of ``length`` tokens."""
    return 4 * sum(_elements(inspection, length, shape))


def _elements(inspection: InspectionParams, length: int, shape: ModelShape) -> Iterator[int]:
    yield len(inspection.logits) * shape.num_logits + len(inspection.labels)
    if inspection.embedding is not None:
        yield shape.hidden_size
    if inspection.hidden_states:
        yield (shape.num_layers + 1) * length * shape.hidden_size
    if inspection.attentions:
        yield shape.num_attention_layers * shape.num_heads * length * length
    for bank in shape.banks:
        yield length * bank.num_experts * inspection.router_logits
        yield length * 2 * bank.top_k * inspection.routes
        yield 2 * bank.num_experts * inspection.aux


def check_inspection(inspection: InspectionParams, length: int, shape: ModelShape) -> None:
    """Raise ``RequestError`` with field, value and rule for outputs that are not available."""
    if inspection.attentions and length > MAX_ATTENTION_TOKENS:
        raise RequestError(
            f"attentions of {length} tokens are too many, at most {MAX_ATTENTION_TOKENS}",
            "outputs",
        )
    if inspection.aux and not shape.has_aux_loss:
        raise RequestError("aux_loss is not defined for this model", "outputs")
    _check_positions(inspection, length)
    if inspection.labels:
        _check_labels(inspection.labels, length, shape)
    size = num_bytes(inspection, length, shape)
    if size > MAX_INSPECT_BYTES:
        raise RequestError(
            f"outputs of {length} tokens are {size} bytes, at most {MAX_INSPECT_BYTES} are allowed",
            "outputs",
        )


def _check_positions(inspection: InspectionParams, length: int) -> None:
    positions = inspection.logits
    if positions and not 0 <= positions[0] <= positions[-1] < length:
        raise RequestError(
            f"positions {positions[0]} to {positions[-1]} are out of range for {length} tokens",
            "logits_to_keep",
        )


def _check_labels(labels: tuple[int, ...], length: int, shape: ModelShape) -> None:
    if shape.num_labels:
        raise RequestError("a sequence classifier has no labels for tokens", "labels")
    if len(labels) != length:
        raise RequestError(f"labels has {len(labels)} entries for {length} tokens", "labels")
    known = range(shape.vocab_size)
    bad = next((i for i in labels if i not in known and i != IGNORED_LABEL), None)
    if bad is not None:
        raise RequestError(
            f"labels has {bad}, it must be {IGNORED_LABEL} or 0 to {shape.vocab_size - 1}", "labels"
        )
