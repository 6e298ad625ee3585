"""Internal values of the model that a request can ask for, and the size of the result. Pure.

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
"""Label of a token whose log-probability is not requested, as in PyTorch's ``cross_entropy``."""
MAX_INSPECT_BYTES = 32 * 1024 * 1024
"""Maximum size in bytes of the internal values that are returned for one prompt."""
MAX_ATTENTION_TOKENS = 256
"""Maximum number of tokens of a prompt whose attention maps are requested."""


class Pooling(Enum):
    """Method that turns the final hidden states of a prompt into one vector."""

    LAST = "last"
    MEAN = "mean"


class InspectionParams(Message, frozen=True, kw_only=True, array_like=True):
    """Internal values of the model that a request asks for, from one pass over its prompt."""

    logits: tuple[int, ...] = ()
    """Positions of the logits to return, ascending; for a classifier one position."""
    labels: tuple[int, ...] = ()
    """Token ids, one per prompt token: the log-probability of each after the earlier tokens is
    returned; -100 for a token without a label. Empty: return no log-probabilities."""
    embedding: Pooling | None = None
    """Method to pool the final hidden states into one vector to return; None: return no vector."""
    hidden_states: bool = False
    """Whether to return hidden states: the embeddings, the states after each layer except the last,
    and the states after the final norm."""
    router_logits: bool = False
    """Whether to return the logits of every expert bank's router."""
    routes: bool = False
    """Whether to return the chosen experts and their weights in every expert bank."""
    attentions: bool = False
    """Whether to return the attention probabilities of every layer and query head."""
    aux: bool = False
    """Whether to return, for each expert, the number of tokens that chose the expert, and the sum
    of its router probabilities over all tokens."""

    @property
    def reads_routers(self) -> bool:
        return self.router_logits or self.routes or self.aux

    @property
    def needs_captures(self) -> bool:
        """Whether the model must record values other than the final hidden states."""
        return self.hidden_states or self.reads_routers or self.attentions

    def first_position(self, length: int) -> int:
        """Return the index of the first prompt token that must be computed, even if it is cached.

        ``length``: number of prompt tokens.
        """
        if self.needs_captures or self.embedding is Pooling.MEAN:
            return 0
        scored = (max(i - 1, 0) for i, label in enumerate(self.labels) if label != IGNORED_LABEL)
        return min((*self.logits, *scored), default=length - 1)


class NamedArray(Message, frozen=True, kw_only=True, array_like=True):
    """A named array of internal values, which an output carries."""

    name: str
    dtype: str
    """Element type of the array: ``float32`` or ``int32``."""
    shape: tuple[int, ...]
    data: bytes
    """Elements of the array in row-major order, four bytes each, little-endian."""


class RouterShape(Message, frozen=True, kw_only=True, array_like=True):
    """Name and dimensions of the router of one expert bank."""

    name: str
    """Name of the router in results: ``<bank>:<layer>``, for example ``mlp:3``."""
    num_experts: int
    top_k: int
    aux_copies: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Dimensions of a model, from which the sizes of internal values follow."""

    hidden_size: int
    num_layers: int
    num_attention_layers: int
    """Number of layers with attention maps; other layers (linear attention) have none."""
    num_heads: int
    """Number of query heads of an attention layer."""
    vocab_size: int
    num_labels: int
    """Number of classes of a classifier; 0 for a language model."""
    banks: tuple[RouterShape, ...]
    """Routers of the model's expert banks, in the order in which the banks run."""

    @property
    def num_logits(self) -> int:
        return self.num_labels or self.vocab_size

    @property
    def has_aux_loss(self) -> bool:
        """Whether the model's family defines an auxiliary (load balancing) loss."""
        return any(bank.aux_copies for bank in self.banks)


def num_bytes(inspection: InspectionParams, length: int, shape: ModelShape) -> int:
    """Return the size in bytes of the requested values for a prompt of ``length`` tokens."""
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
    """Check that the model can return the requested values for a prompt of ``length`` tokens.

    Raises ``RequestError``, with field, value and rule.
    """
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
