"""What every model family tells about itself: numbers, expert banks, tensors, layers.

This module imports no torch, so parsing a ``config.json`` and listing the banks is cheap. A family
module (``olmoe``) brings the math; ``load_family`` finds it by the config's ``model_type``.

The global order of operations of a step is: for layer; for (bank, exchange) in bank order; for
micro-batch. ``Family.banks`` is in that order.
"""

from __future__ import annotations

import importlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cluster.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from workers.layers import AttentionModel
    from workers.rope import RopeConfig

FAMILIES = {"olmoe": "workers.families.olmoe"}
"""``model_type`` of the config -> module with a ``family(config) -> Family`` function."""

ExpertKind = Literal["swiglu", "linear"]
"""``swiglu``: down(silu(gate x) * up x), matrices (gate over up, down); ``linear``: one matrix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeSpec:
    """One round trip of a bank: rows go to the experts, outputs come home."""

    index: int
    """Place among the bank's exchanges, from 0."""
    name: str
    """For people: ``mlp``, ``query``, ``output``."""
    in_width: int
    """Elements of a row on its way to the experts."""
    out_width: int
    """Elements of a row on its way home."""
    per_slot_input: bool = False
    """True: every top-k slot has an input of its own, [T, k, in_width]."""
    weighted: bool = True
    """False: outputs come home per slot, [T, k, out_width], and are not summed."""
    expert_kind: ExpertKind = "swiglu"
    """What an expert computes in this exchange."""
    expert_width: int = 0
    """Inner width of a swiglu expert; 0 for a linear one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BankSpec:
    """The routed experts behind one router."""

    index: int
    """Place in ``Family.banks``; names the bank on the wire."""
    bank: str
    """Kind of bank within its layer, ``mlp`` or ``attention``."""
    layer: int
    """Layer of the model."""
    num_experts: int
    """Logical experts."""
    top_k: int
    """Experts chosen for each token."""
    exchanges: tuple[ExchangeSpec, ...]
    """Round trips in order."""
    float32_weights: bool = False
    """True: weights stay float32 in the product; False: they are cast to the model dtype first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPart:
    """A tensor of the checkpoint, or one expert's share of it."""

    name: str
    """Name in the safetensors header."""
    shape: tuple[int, ...]
    """Shape of the whole tensor on disk."""
    index: int | None = None
    """Entry of the first dimension that is meant; None is the whole tensor."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of what is read."""
        return self.shape if self.index is None else self.shape[1:]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMatrix:
    """One weight matrix of one expert: parts on disk, stacked row over row."""

    shape: tuple[int, int]
    """[out, in] after stacking."""
    parts: tuple[TensorPart, ...]
    """For example gate rows, then up rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The numbers of ``config.json`` that all families share; each keeps its own beside them."""

    model_type: str
    """Family name."""
    vocab_size: int
    """Rows of the embedding and of lm_head."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; ``num_heads`` is a multiple."""
    head_dim: int
    """Elements of one head."""
    max_position_embeddings: int
    """Context that the model was made for, in tokens."""
    rms_norm_eps: float
    """Epsilon of the norms."""
    tie_word_embeddings: bool
    """lm_head is the embedding."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an output."""
    dtype: str
    """The checkpoint's own dtype: float32 or bfloat16."""
    rope: RopeConfig
    """Rotary embedding."""


class WeightSource(Protocol):
    """What a family needs of a checkpoint to build a model."""

    def read(self, part: TensorPart, dtype: torch.dtype) -> torch.Tensor:
        """A part of a tensor on the CPU."""

    def read_stacked(self, parts: Sequence[TensorPart], dtype: torch.dtype) -> torch.Tensor:
        """Parts one under the other in one tensor on the CPU."""


class Family(Protocol):
    """One checkpoint's model, described. Nothing is loaded until ``attention_model``."""

    @property
    def config(self) -> ModelConfig:
        """Its numbers."""

    @property
    def banks(self) -> tuple[BankSpec, ...]:
        """Its expert banks in the order of their use."""

    def attention_tensors(self) -> Iterator[TensorPart]:
        """All tensors of an attention worker: everything but the routed experts."""

    def expert_matrices(
        self, bank: BankSpec, exchange: int, expert: int, names: Container[str]
    ) -> tuple[ExpertMatrix, ...]:
        """Where one expert's matrices are. ``names`` (all tensor names) decides the layout."""

    def attention_model(
        self,
        weights: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int | None = None,
    ) -> AttentionModel:
        """Load everything but the routed experts. None: ``max_position_embeddings`` positions."""


def load_family(config: Mapping[str, Any]) -> Family:
    """The model that a parsed ``config.json`` describes.

    Raises ``CheckpointError`` for an unsupported model type or a setting we cannot compute.
    """
    model_type = config.get("model_type")
    module = FAMILIES.get(str(model_type))
    if module is None:
        supported = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"model_type {model_type!r} is not supported: it is not {supported}")
    family: Family = importlib.import_module(module).family(config)
    return family
