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
"""Computation of an expert. ``gated``: down(activation(gate x) * up x), two matrices (gate over up,
down); ``linear``: one matrix."""
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]
"""Activation of a gated expert or MLP, named as in ``hidden_act`` of ``config.json``."""


@dataclass(frozen=True, slots=True)
class ClampedSwiglu:
    """Activation of gpt-oss experts: (up + 1) * gate * sigmoid(alpha * gate), with gate clamped to
    at most ``limit``, and up to [-limit, limit].

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025), and the model's reference code.
    """

    alpha: float
    limit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeSpec:
    """Description of one exchange of a bank: dispatch of rows to experts, combine of outputs."""

    index: int
    """Index among the bank's exchanges."""
    name: str
    """Name for logs: ``mlp``, ``query``, ``output``."""
    in_width: int
    """Elements of a row that is sent to the experts."""
    out_width: int
    per_slot_input: bool = False
    """True: each of a row's k experts has its own input, [T, k, in_width]; False: all k experts of
    a row have the same input, [T, in_width]."""
    weighted: bool = True
    """True: combine returns each row's weighted sum of outputs, [T, out_width]; False: the output
    of each of a row's k experts, [T, k, out_width]."""
    expert_kind: ExpertKind = "gated"
    """Computation of an expert in this exchange."""
    expert_width: int = 0
    """Inner (intermediate) width of a gated expert; 0 for a linear expert."""
    activation: Activation | ClampedSwiglu = "silu"
    """Activation of a gated expert."""
    has_bias: bool = False
    """Whether each product of an expert has a bias."""
    form: WeightFormat | None = None
    """Quantized format in which workers keep the experts' matrices, except biases; None: the model
    dtype."""

    def returns_pairs(self, combine_mode: CombineMode) -> bool:
        """Whether combine returns an output for each (row, expert) pair, not a sum for each row."""
        return combine_mode == "per_slot" or not self.weighted

    @property
    def product_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shape [out, in] of each matrix that an expert multiplies rows by, in the order of the
        products."""
        if self.expert_kind == "linear":
            return ((self.out_width, self.in_width),)
        inner = self.expert_width
        return ((2 * inner, self.in_width), (self.out_width, inner))

    @property
    def matrix_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shape [out, in] of each matrix of an expert, in the order of ``Family.expert_matrices``.

        Biases, each a matrix [out, 1], come after the matrices of the products.
        """
        products = self.product_shapes
        return products + (tuple((out, 1) for out, _ in products) if self.has_bias else ())

    def form_of(self, matrix: int) -> WeightFormat | None:
        """Quantized format of an expert's matrix with index ``matrix`` in ``matrix_shapes``; None:
        the model dtype, as for biases."""
        return self.form if matrix < len(self.product_shapes) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class BankSpec:
    """Description of a bank: the routed experts of one router in one layer."""

    index: int
    """Index in ``Family.banks``; identifies the bank in messages between workers."""
    bank: str
    """Kind of bank within its layer, ``mlp`` or ``attention``."""
    layer: int
    num_experts: int
    top_k: int
    exchanges: tuple[ExchangeSpec, ...]
    """Exchanges of the bank (rows to experts and outputs back), in order."""
    float32_weights: bool = False
    """Whether experts' outputs are multiplied by router weights in float32; False: the weights are
    first cast to the model dtype."""
    aux_copies: int = 0
    """Number of times that transformers 5 counts this router in the auxiliary loss (version 4:
    once); 0: the family has no such loss."""
    aux_dtype: Literal["model", "float32"] = "model"
    """Dtype of the router's softmax in the auxiliary loss."""

    @property
    def matrices(self) -> list[tuple[int, int, tuple[int, int]]]:
        """(exchange index, matrix index, shape [out, in]) of each matrix of an expert, in the order
        in which they are applied."""
        return [(e.index, i, s) for e in self.exchanges for i, s in enumerate(e.matrix_shapes)]

    def num_bytes(self, itemsize: int) -> int:
        """Return the bytes of one expert's weights in a worker's memory; ``itemsize``: bytes of an
        element of the model dtype."""
        total = 0
        for exchange, matrix, (out, width) in self.matrices:
            form = self.exchanges[exchange].form_of(matrix)
            total += form.num_bytes((out, width)) if form is not None else out * width * itemsize
        return total


def returns_pairs(banks: Iterable[BankSpec], combine_mode: CombineMode) -> bool:
    """Whether ``ExchangeSpec.returns_pairs`` holds for any exchange of the banks."""
    return any(exchange.returns_pairs(combine_mode) for b in banks for exchange in b.exchanges)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPart:
    """A tensor of the checkpoint, or one expert's part of a tensor."""

    name: str
    """Name in the safetensors header."""
    shape: tuple[int, ...]
    """Shape of the whole tensor on disk."""
    index: int | None = None
    """Index in the tensor's first dimension, to select one expert; None: the whole tensor."""
    is_transposed: bool = False
    """Whether the matrix is transposed on disk: [columns, rows]."""
    rows: tuple[int, int] | None = None
    """(first row, step): every ``step``-th row from the first one on; None: all rows."""
    is_mxfp4: bool = False
    """Whether the tensor is stored in MXFP4 blocks, see ``workers.model.loading.mxfp4``; ``shape``
    is then the shape of the decoded numbers."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part that ``index``, ``is_transposed`` and ``rows`` select."""
        shape = self.shape if self.index is None else self.shape[1:]
        shape = shape[::-1] if self.is_transposed else shape
        if self.rows is None:
            return shape
        return (len(range(shape[0])[slice(self.rows[0], None, self.rows[1])]), *shape[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMatrix:
    """One weight matrix of one expert, as parts of checkpoint tensors to stack row over row."""

    shape: tuple[int, int]
    """Shape [out, in] after stacking."""
    parts: tuple[TensorPart, ...]
    """Parts in order: for example gate rows, then up rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaNetSpec:
    """Gated DeltaNet layers of a model, which have a recurrent state in place of keys and values:
    their indices and dimensions.

    Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024).
    """

    layers: tuple[int, ...]
    """Indices of the Gated DeltaNet layers, ascending."""
    num_key_heads: int
    """G: number of query and key heads."""
    num_value_heads: int
    """V: number of value heads, a multiple of G; V / G neighbours share a key head."""
    key_dim: int
    """K: elements of a query or key head."""
    value_dim: int
    """D: elements of a value head."""
    kernel: int
    """Number of positions that the convolution covers, including a row's own."""

    @property
    def conv_width(self) -> int:
        """C: number of channels of the convolution, which are queries, keys and values."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def conv_values(self) -> int:
        """Number of elements of a layer's state that are earlier inputs of the convolution."""
        return (self.kernel - 1) * self.conv_width

    @property
    def layer_values(self) -> int:
        """Number of elements of a layer's state: earlier inputs of the convolution [kernel - 1, C],
        then a matrix [K, D] for each of V value heads."""
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
    """Number of key/value heads; divides ``num_heads``."""
    head_dim: int
    max_position_embeddings: int
    """Context of the model in tokens."""
    rms_norm_eps: float
    tie_word_embeddings: bool
    """Whether lm_head shares the weight of the embedding."""
    eos_token_ids: tuple[int, ...]
    """Ids of end-of-sequence tokens, which end an output; all are in the vocabulary."""
    dtype: str
    """Dtype of the checkpoint: float32, bfloat16 or float16."""
    rope: RopeConfig
    activation: Activation = "silu"
    """Activation of the experts and dense MLPs."""
    pad_token_id: int | None = None
    """Id of the padding token, which a sequence classifier ignores at the end of a prompt; None: no
    such token."""
    labels: tuple[str, ...] = ()
    """Classes of a sequence classifier, which has no lm_head; empty for a language model."""
    problem_type: str | None = None
    """Kind of sequence classifier, ``problem_type`` of ``config.json``; None: not specified, or a
    language model."""
    stored: StorageFormat | None = None
    """Storage format of the checkpoint's quantized matrices, except MXFP4 matrices, which
    ``TensorPart.is_mxfp4`` marks; None: no others are quantized."""
    has_tiled_heads: bool = False
    """Whether query head h uses key head h mod ``num_kv_heads``; False: neighbouring query heads
    share a key head."""
    latent_rank: int | None = None
    """Number of elements of the latent vector from which the keys and values of all heads are
    computed. The KV cache stores the vector as the first elements of a single key. None: no latent
    attention."""
    delta_net: DeltaNetSpec | None = None
    """Layers with a recurrent state (Gated DeltaNet); None: the model has no such layers."""
    num_prediction_layers: int = 0
    """Number of multi-token prediction (MTP) layers in the checkpoint, after the decoder layers."""
    has_predictor: bool = False
    """Whether the first multi-token prediction (MTP) layer is loaded and computed. ``num_layers``
    does not count it."""
    ignored_keys: tuple[str, ...] = ()

    @property
    def kv_vectors_per_layer(self) -> int:
        """Number of vectors of ``head_dim`` elements that hold the keys and values of one token in
        a layer's KV cache."""
        return 2 * self.num_kv_heads if self.latent_rank is None else 1

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have keys and values, without the prediction layer (MTP)."""
        others = () if self.delta_net is None else self.delta_net.layers
        return tuple(layer for layer in range(self.num_layers) if layer not in others)

    @property
    def num_kv_caches(self) -> int:
        """Number of layers that have keys and values, including the prediction layer (MTP)."""
        return len(self.kv_layers) + self.has_predictor

    @property
    def kv_vectors_per_token(self) -> int:
        """Number of vectors of ``head_dim`` elements that hold the keys and values of one token in
        all layers."""
        return self.num_kv_caches * self.kv_vectors_per_layer

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's recurrent state; 0 if the model has no recurrent layers."""
        return 0 if self.delta_net is None else self.delta_net.state_bytes

    @property
    def length_matters_above(self) -> int | None:
        """Number of prompt tokens above which keys depend on the length of the prompt (dynamic
        RoPE); None: keys never depend on it."""
        return self.max_position_embeddings if self.rope.rope_type == "dynamic" else None

    @property
    def context_tokens(self) -> int:
        """Number of positions that the model can distinguish: ``max_position_embeddings``, for
        dynamic RoPE multiplied by its factor."""
        stretch = self.rope.factor if self.rope.rope_type == "dynamic" else 1.0
        return int(self.max_position_embeddings * stretch)
