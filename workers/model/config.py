"""Description of a model before loading: dimensions, expert banks, tensors on disk.

An expert bank is the set of routed experts of one router. The module imports no torch, so that
parsing a ``config.json`` and listing the banks is cheap. All workers run the exchanges of a step in
the same order: for layer; for (bank, exchange) in the order of ``Family.banks``; for micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from workers.quantization.formats import WeightFormat
from workers.quantization.storage_format import StorageFormat

if TYPE_CHECKING:
    from cluster.config.cluster import CombineMode
    from workers.model.rope import RopeConfig

ExpertKind = Literal["gated", "linear"]
"""``gated``: down(activation(gate x) * up x), two matrices (gate over up, down); ``linear``: one
matrix."""
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]
"""Activation of a gated expert or MLP, with the names of ``hidden_act``."""


@dataclass(frozen=True, slots=True)
class ClampedSwiglu:
    """(up + 1) * gate * sigmoid(alpha * gate), with gate <= ``limit`` and abs(up) <= ``limit``.

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025), and the model's reference code.
    """

    alpha: float
    limit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeSpec:
    """One round trip of a bank: rows are dispatched to experts, and their outputs combined."""

    index: int
    """Index among the bank's exchanges."""
    name: str
    """Name for logs: ``mlp``, ``query``, ``output``."""
    in_width: int
    """Elements of a row that is sent to the experts."""
    out_width: int
    per_slot_input: bool = False
    """True: every top-k slot has its own input, [T, k, in_width]."""
    weighted: bool = True
    """False: combine returns each slot's output, [T, k, out_width], without a sum."""
    expert_kind: ExpertKind = "gated"
    """Computation of an expert in this exchange."""
    expert_width: int = 0
    """Inner width of a gated expert; 0 for a linear one."""
    activation: Activation | ClampedSwiglu = "silu"
    """Activation of a gated expert."""
    has_bias: bool = False
    """Whether each product has a bias."""
    form: WeightFormat | None = None
    """Format in which workers keep the matrices, without biases; None: in the model dtype."""

    def returns_pairs(self, combine_mode: CombineMode) -> bool:
        """Whether combine returns an output for every (row, slot) pair, not a sum for every row."""
        return combine_mode == "per_slot" or not self.weighted

    @property
    def product_shapes(self) -> tuple[tuple[int, int], ...]:
        """[out, in] of the matrices that rows are multiplied by, in order."""
        if self.expert_kind == "linear":
            return ((self.out_width, self.in_width),)
        inner = self.expert_width
        return ((2 * inner, self.in_width), (self.out_width, inner))

    @property
    def matrix_shapes(self) -> tuple[tuple[int, int], ...]:
        """[out, in] of all matrices of an expert, in the order of ``Family.expert_matrices``.

        Biases, each a matrix [out, 1], are after the matrices of the products.
        """
        products = self.product_shapes
        return products + (tuple((out, 1) for out, _ in products) if self.has_bias else ())

    def form_of(self, matrix: int) -> WeightFormat | None:
        """Format of a matrix; None: in the model dtype, as biases always are."""
        return self.form if matrix < len(self.product_shapes) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class BankSpec:
    """The routed experts of one router."""

    index: int
    """Index in ``Family.banks``; identifies the bank in messages between workers."""
    bank: str
    """Kind of bank within its layer, ``mlp`` or ``attention``."""
    layer: int
    num_experts: int
    top_k: int
    exchanges: tuple[ExchangeSpec, ...]
    """Round trips in order."""
    float32_weights: bool = False
    """Whether router weights stay float32 when outputs are multiplied by them; otherwise they are
    cast to the model dtype first."""
    aux_copies: int = 0
    """Number of times that transformers 5 counts this router in the auxiliary loss (version 4:
    once); 0: the family has no such loss."""
    aux_dtype: Literal["model", "float32"] = "model"
    """Dtype of the router's softmax in the auxiliary loss."""

    @property
    def matrices(self) -> list[tuple[int, int, tuple[int, int]]]:
        """Return (exchange, matrix, [out, in]) of each matrix of an expert, in the order of use."""
        return [(e.index, i, s) for e in self.exchanges for i, s in enumerate(e.matrix_shapes)]

    def num_bytes(self, itemsize: int) -> int:
        """Return the bytes of an expert in a worker; ``itemsize``: bytes of the model dtype."""
        total = 0
        for exchange, matrix, (out, width) in self.matrices:
            form = self.exchanges[exchange].form_of(matrix)
            total += form.num_bytes((out, width)) if form is not None else out * width * itemsize
        return total


def returns_pairs(banks: Iterable[BankSpec], combine_mode: CombineMode) -> bool:
    """Whether any exchange of the banks returns pairs."""
    return any(exchange.returns_pairs(combine_mode) for b in banks for exchange in b.exchanges)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPart:
    """A tensor of the checkpoint, or one expert's part of a tensor."""

    name: str
    """Name in the safetensors header."""
    shape: tuple[int, ...]
    """Shape of the whole tensor on disk."""
    index: int | None = None
    """Entry of the first dimension; None: the whole tensor."""
    is_transposed: bool = False
    """Whether the matrix is [columns, rows] on disk."""
    rows: tuple[int, int] | None = None
    """(first row, step): every ``step``-th row from the first one on; None: all rows."""
    is_mxfp4: bool = False
    """Whether the tensor is stored in blocks, see ``workers.model.loading.mxfp4``; ``shape`` is the
    shape of the decoded numbers."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part, without the rest of the tensor."""
        shape = self.shape if self.index is None else self.shape[1:]
        shape = shape[::-1] if self.is_transposed else shape
        if self.rows is None:
            return shape
        return (len(range(shape[0])[slice(self.rows[0], None, self.rows[1])]), *shape[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMatrix:
    """One weight matrix of one expert: parts on disk, stacked row over row."""

    shape: tuple[int, int]
    """Shape [out, in] after stacking."""
    parts: tuple[TensorPart, ...]
    """Parts in order: for example gate rows, then up rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaNetSpec:
    """Layers with a recurrent state in place of keys and values, and the dimensions of each.

    Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024).
    """

    layers: tuple[int, ...]
    """Indices of the layers, ascending."""
    num_key_heads: int
    """G: number of query and key heads."""
    num_value_heads: int
    """V: number of value heads, a multiple of G. Neighbours share a key head."""
    key_dim: int
    """K: elements of a query or key head."""
    value_dim: int
    """D: elements of a value head."""
    kernel: int
    """Positions that the convolution covers, a row's own included."""

    @property
    def conv_width(self) -> int:
        """C: channels of the convolution: queries, keys, values."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def conv_values(self) -> int:
        """Number of values in a layer's state that are earlier inputs of the convolution."""
        return (self.kernel - 1) * self.conv_width

    @property
    def layer_values(self) -> int:
        """Number of values in a layer's state: earlier inputs [kernel - 1, C], then [V, K, D]."""
        return self.conv_values + self.num_value_heads * self.key_dim * self.value_dim

    @property
    def state_bytes(self) -> int:
        """Bytes of the float32 state of one sequence, in all layers."""
        return 4 * len(self.layers) * self.layer_values


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Settings of ``config.json`` that all families share; a family adds its own."""

    model_type: str
    vocab_size: int
    """Rows of the embedding and of lm_head."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Number of key/value heads; ``num_heads`` is a multiple."""
    head_dim: int
    max_position_embeddings: int
    """Context of the model in tokens."""
    rms_norm_eps: float
    tie_word_embeddings: bool
    """Whether lm_head is the embedding."""
    eos_token_ids: tuple[int, ...]
    """End-of-sequence tokens, which end an output."""
    dtype: str
    """Dtype of the checkpoint: float32, bfloat16 or float16."""
    rope: RopeConfig
    activation: Activation = "silu"
    """Activation of the experts and dense MLPs."""
    pad_token_id: int | None = None
    """Token that a classifier ignores at the end of a prompt."""
    labels: tuple[str, ...] = ()
    """Classes of a sequence classifier, which has no lm_head; empty for a language model."""
    problem_type: str | None = None
    """Kind of classifier, if the checkpoint names it."""
    stored: StorageFormat | None = None
    """Storage format of matrices that are not in ``dtype``; None: all are in ``dtype``."""
    has_tiled_heads: bool = False
    """Whether query head h uses key head h mod ``num_kv_heads``; otherwise neighbours share one."""
    latent_rank: int | None = None
    """Elements of the latent vector from which the keys and values of all heads are computed. The
    cache stores it as the first elements of a single key. None: no latent attention."""
    delta_net: DeltaNetSpec | None = None
    """Layers with a recurrent state; None: there are none."""
    num_prediction_layers: int = 0
    """Number of layers after the last one that predict further tokens, in the checkpoint."""
    has_predictor: bool = False
    """Whether the first of these layers is computed; ``num_layers`` does not count it."""
    ignored_keys: tuple[str, ...] = ()

    @property
    def kv_vectors_per_layer(self) -> int:
        """Number of vectors of ``head_dim`` for the keys and values of one token in a layer's
        cache."""
        return 2 * self.num_kv_heads if self.latent_rank is None else 1

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Layers with keys and values, without the predictor."""
        others = () if self.delta_net is None else self.delta_net.layers
        return tuple(layer for layer in range(self.num_layers) if layer not in others)

    @property
    def num_kv_caches(self) -> int:
        """Number of layers with keys and values, including the predictor."""
        return len(self.kv_layers) + self.has_predictor

    @property
    def kv_vectors_per_token(self) -> int:
        """Number of vectors for the keys and values of one token in all caches."""
        return self.num_kv_caches * self.kv_vectors_per_layer

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's recurrent state; 0 without one."""
        return 0 if self.delta_net is None else self.delta_net.state_bytes

    @property
    def length_matters_above(self) -> int | None:
        """Prompt tokens above which keys depend on the prompt's length (dynamic RoPE), or None."""
        return self.max_position_embeddings if self.rope.rope_type == "dynamic" else None

    @property
    def context_tokens(self) -> int:
        """Number of positions that the model can distinguish: dynamic RoPE multiplies it by its
        factor."""
        stretch = self.rope.factor if self.rope.rope_type == "dynamic" else 1.0
        return int(self.max_position_embeddings * stretch)
