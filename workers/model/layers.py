"""Building blocks of all model families, and the model around the layers.

A layer is a generator. It yields a ``Dispatch`` to send rows to the experts and is resumed
immediately; a bare ``yield`` then waits for the experts' outputs:

    yield Dispatch(bank, 0, normed, topk_ids, topk_weights)
    shared = self.shared_experts(normed)  # overlaps with the routed experts
    routed = yield

So the model does not depend on dispatchers, and the runner can overlap two micro-batches by
resuming their generators alternately.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.attention_batch import AttentionBatch
from workers.model.compute_threads import ComputeThreads
from workers.model.config import Activation, ClampedSwiglu, TensorPart
from workers.model.rope import Rope
from workers.model.torch_private import pack, packed_linear, supports_packing, unpack
from workers.native.attention_sublayer import BatchFields

_PACK_MIN_ELEMENTS = 64 * 1024
"""Minimum elements of a float32 weight to pack it in oneDNN's layout; bfloat16 has no minimum.

Microseconds of a product, plain -> packed, for 1 row / 32 rows (AMD EPYC with avx512_bf16, torch
2.13, 1 thread): 384 x 128 5 -> 16 / 37 -> 42, 512 x 512 23 -> 29 / 190 -> 162, 50304 x 512
8600 -> 5460 / 30000 -> 16500. bfloat16 gains at every size, with equal bits: 384 x 128
18 -> 15 / 31 -> 27, 50304 x 512 5150 -> 1960 / 12270 -> 8570."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dim in float32, round to x's dtype, multiply by weight in that dtype."""
    return functional.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight)


_VECTORS = 32
"""``row_wise`` pads rows to a multiple of this, which is a multiple of a SIMD vector's length."""


def row_wise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an elementwise function to [rows, n], so that a row's bits do not depend on other rows.

    torch computes the last few elements of a tensor with another function, so the input is padded.
    """
    missing = -x.shape[-1] % _VECTORS
    if missing:
        return function(functional.pad(x, (0, missing)))[:, : x.shape[-1]]
    return function(x.contiguous())


def row_sigmoid(x: Tensor) -> Tensor:
    """Return the sigmoid of [rows, n]; a row's bits do not depend on other rows."""
    return row_wise(torch.sigmoid, x)


_SPLIT_MIN_ELEMENTS = 4 * 1024 * 1024
"""Minimum elements of a weight to split it among threads: from this size on, reading the weight
dominates the cost."""
_SPLIT_MIN_PRODUCTS = 32 * 1024 * 1024
"""Minimum multiplications (rows x weight elements) to split rows: 0.3 ms on one core."""


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a packed layout for this weight, and products with it are faster."""
    is_worth_it = weight.dtype == torch.bfloat16 or weight.numel() >= _PACK_MIN_ELEMENTS
    return is_worth_it and supports_packing(weight)


class Linear:
    """Computes x @ weight.T + bias. It may copy the weight; callers should drop their reference."""

    __slots__ = ("_biases", "_compute_threads", "_is_packed", "_weights")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        may_pack: bool = True,
        compute_threads: ComputeThreads | None = None,
    ) -> None:
        """``weight`` [out, in]. ``may_pack``: False to share memory, as a tied lm_head does.
        ``compute_threads`` share large products; None: the calling thread computes alone."""
        self._compute_threads = compute_threads or ComputeThreads()
        self._is_packed = may_pack and can_pack(weight)
        num_parts = self._compute_threads.count if weight.numel() >= _SPLIT_MIN_ELEMENTS else 1
        parts = weight.tensor_split(num_parts)
        self._weights = [pack(part) for part in parts] if self._is_packed else list(parts)
        self._biases = [None] * num_parts if bias is None else list(bias.tensor_split(num_parts))

    def weight(self) -> Tensor:
        """Return a copy of the weight [out, in]."""
        return torch.cat([unpack(w) if self._is_packed else w for w in self._weights])

    def __call__(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias: [rows, in] -> [rows, out]."""
        multiply = packed_linear if self._is_packed else functional.linear
        if len(self._weights) > 1:  # each thread reads its own part of the weights
            tasks = [
                partial(multiply, x, w, b) for w, b in zip(self._weights, self._biases, strict=True)
            ]
            return torch.cat(self._compute_threads.run(tasks), 1)
        weight, bias = self._weights[0], self._biases[0]
        if self._compute_threads.count > 1 and len(x) * weight.numel() >= _SPLIT_MIN_PRODUCTS:
            rows = x.tensor_split(self._compute_threads.count)
            return torch.cat(
                self._compute_threads.run([partial(multiply, r, weight, bias) for r in rows])
            )
        return multiply(x, weight, bias)


GatedActivation = Callable[[Tensor], Tensor]
"""Function [.., 2 * inner] -> [.., inner]: activation(first half) * second half."""


def _gelu(gate: Tensor) -> Tensor:
    """Compute GELU in float32 on contiguous memory; a row's bits do not depend on other rows.

    For other memory layouts torch uses another kernel, and in bfloat16 its AVX2 code rounds the
    last elements of a vector differently.
    """
    return functional.gelu(gate.contiguous().float()).to(gate.dtype)


_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": _gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def gated_activation(activation: Activation | ClampedSwiglu) -> GatedActivation:
    """Return a function of gate and up: activation(gate) * up, or ``ClampedSwiglu``."""
    if isinstance(activation, ClampedSwiglu):
        return partial(_clamped, alpha=activation.alpha, limit=activation.limit)
    activate = _ACTIVATIONS[activation]

    def apply(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return activate(gate).mul_(up)

    return apply


def _clamped(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """Compute ``ClampedSwiglu``; gate * sigmoid(alpha * gate) = silu(alpha * gate) / alpha."""
    gate, up = gate_up.chunk(2, -1)
    activated = functional.silu(gate.clamp(max=limit).mul_(alpha)).div_(alpha)
    return activated.mul_(up.clamp(-limit, limit).add_(1))


class Mlp(Protocol):
    """Interface of an MLP; its two products can also be computed separately."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the whole MLP: [rows, H] -> [rows, H]."""

    def gate_up(self, x: Tensor) -> Tensor:
        """Compute the first product: [rows, H] -> [rows, 2 * inner], the gate first."""

    def activate(self, gate_up: Tensor) -> Tensor:
        """Apply the activation: [rows, 2 * inner] -> [rows, inner]."""

    def down(self, x: Tensor) -> Tensor:
        """Compute the second product: [rows, inner] -> [rows, H]."""


class GatedMlp:
    """A dense MLP: down(activation(gate x) * up x)."""

    __slots__ = ("activate", "down", "gate_up")

    def __init__(self, gate_up: Linear, down: Linear, activation: Activation) -> None:
        """gate_up [2 * inner, H], the gate's rows first; down [H, inner]."""
        self.gate_up = gate_up
        self.activate = gated_activation(activation)
        self.down = down

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the whole MLP: [rows, H] -> [rows, H]."""
        return self.down(self.activate(self.gate_up(x)))


@dataclass(frozen=True, slots=True)
class LayerProduct:
    """Product or MLP of a layer, with the checkpoint matrices that LoRA adapters may change."""

    product: Linear | Mlp
    """The linear product, or an MLP with all its products."""
    parts: Mapping[str, TensorPart]
    """Matrices by short name, in the order of their rows; an MLP has ``gate``, ``up``, ``down``."""
    order: Tensor | None = None
    """[rows] int64: row of the stacked matrices at each row of the product; None: same order."""


class RowAdapters(Protocol):
    """Interface of the LoRA adapters of a micro-batch's rows, which add deltas to products."""

    def multiply(self, linear: Linear, x: Tensor) -> Tensor:
        """Return ``linear(x)`` plus the delta of each row's adapter: [T, in] -> [T, out]."""

    def apply(self, mlp: Mlp, x: Tensor) -> Tensor:
        """Return ``mlp(x)`` with each row's deltas in the MLP's products: [T, H] -> [T, H]."""


Attend = Callable[[Tensor, Tensor, Tensor | None, Tensor, AttentionBatch], Tensor]
"""Function that computes attention over a KV cache, with the arguments of ``attention.attend``."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Rows that a layer sends to the experts of one bank, in one of the bank's exchanges."""

    bank: int
    """Index of the bank (the routed experts of one router), ``BankSpec.index``."""
    exchange: int
    """Index of the exchange among those of the bank, ``ExchangeSpec.index``."""
    rows: Tensor
    """Rows to send, in the model dtype: [T, in_width], or [T, k, in_width] if each of a row's k
    experts has its own input."""
    topk_ids: Tensor
    """Logical experts of each row, [T, k] int64."""
    topk_weights: Tensor
    """Router weights [T, k]: model dtype, or float32 with ``BankSpec.float32_weights``."""


Embedding = Callable[[Tensor], Tensor]
"""Function that turns token ids [T] int64 into a new tensor [T, H]."""


class TableEmbedding:
    """``Embedding`` that looks up rows of a table."""

    __slots__ = ("table",)

    def __init__(self, table: Tensor) -> None:
        """``table`` [vocabulary, H]: the embedding of each token id."""
        self.table = table

    def __call__(self, token_ids: Tensor) -> Tensor:
        return functional.embedding(token_ids, self.table)


Norm = Callable[[Tensor], Tensor]
"""Function that normalises rows [T, H], possibly in place, and returns them."""
LayerSteps = Generator[Any, Tensor, Tensor]
"""Generator that runs one or more layers and returns hidden states [T, hidden_size]. It alternates
``yield Dispatch(..)``, resumed by ``next``, and a bare ``yield``, resumed by ``send`` with the
experts' outputs. The yield type is Any because mypy otherwise forbids a bare ``yield``; the runner
checks the order."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Inputs of a forward pass: the rows (token positions) of one micro-batch."""

    token_ids: Tensor
    """[T] int64: token id of each row."""
    positions: Tensor
    """[T] int64: position of each row in its sequence, from 0."""
    prompt_lengths: Tensor
    """[T] int64: length of the prompt of each row's request."""
    attention: AttentionBatch
    """KV cache slots that the rows write, and the keys that the rows attend to."""
    given: tuple[tuple[int, Tensor], ...] = ()
    """(first row, embeddings [n, H] float32) of rows given as embeddings; their token id is 0."""
    adapters: RowAdapters | None = None
    """LoRA adapters of the rows; None: no row has an adapter."""


@dataclass(frozen=True, slots=True)
class LayerContext:
    """Inputs that all layers of a forward pass share."""

    cos: Tensor
    """Cosines of the rotary embedding of each row, [T, 1, D]."""
    sin: Tensor
    """Sines of each row, [T, 1, D], negated in the first half; see ``Rope.rows``."""
    attention: AttentionBatch
    windows: Mapping[int, AttentionBatch]
    """Variants of ``attention`` with the mask of a sliding window, by window width in tokens."""
    native: BatchFields | None
    """The batch as a C struct for native kernels; None if torch computes."""
    adapters: RowAdapters | None = None
    """LoRA adapters of the rows; None: no row has an adapter."""

    def multiply(self, linear: Linear, x: Tensor) -> Tensor:
        """Return ``linear(x)`` plus the deltas of the rows' LoRA adapters: [T, in] -> [T, out]."""
        return linear(x) if self.adapters is None else self.adapters.multiply(linear, x)

    def apply(self, mlp: Mlp, x: Tensor) -> Tensor:
        """Return ``mlp(x)`` with the deltas of the rows' LoRA adapters: [T, H] -> [T, H]."""
        return mlp(x) if self.adapters is None else self.adapters.apply(mlp, x)

    def within(self, window: int | None) -> AttentionBatch:
        """Return the batch for a layer with a window of ``window`` positions; None: no window."""
        return self.attention if window is None else self.windows[window]


class Layer(Protocol):
    """Interface of one decoder layer."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        """Run the layer: [T, H] -> [T, H]; ``cache`` is the layer's tensor of ``KVCache``."""


class TokenPredictor(Protocol):
    """Interface of a multi-token prediction (MTP) layer: predicts the token after the next one."""

    def forward(
        self, embedded: Tensor, hidden: Tensor, cache: Tensor, context: LayerContext
    ) -> LayerSteps:
        """Return hidden states [T, H], from which lm_head computes logits.

        ``embedded`` [T, H]: embedding of the token that follows each row's token; may be
        overwritten. ``hidden`` [T, H]: the model's final hidden states of the rows. ``cache``: the
        prediction layer's tensor of ``KVCache``.
        """


@dataclass(kw_only=True)
class AttentionModel:
    """A model without the routed experts, as attention workers load it."""

    embedding: Embedding
    dtype: torch.dtype
    device: torch.device
    is_native: bool
    """Whether layers use native kernels, which read ``AttentionBatch.chunks``."""
    layers: Sequence[Layer]
    """Layers in order; a caller may replace elements."""
    norm: Norm
    head: Linear
    """lm_head, or a classifier's: [rows, H] -> [rows, vocab_size or classes], model dtype."""
    rope: Rope
    windows: Collection[int] = ()
    """Widths of the sliding windows, in tokens."""
    kv_layer: int = 0
    """Index of the first layer that has keys and values (not a recurrent state)."""
    predictor: TokenPredictor | None = None
    products: Sequence[LayerProduct] = ()
    """Products and MLPs of the layers, routers included; LoRA selects its targets among them."""
    linear: Callable[[Tensor], Linear] = Linear
    """Makes a product like those of the layers, from a weight [out, in]."""

    def forward(self, inputs: ModelInputs, caches: Sequence[Tensor]) -> LayerSteps:
        """Run all layers and the final norm; return hidden states [T, H]. Writes keys, values and
        recurrent states to ``caches``, one tensor per layer."""
        context = self.context(inputs, caches)
        hidden = self.embed(inputs.token_ids, inputs.given)
        return (yield from self.run_from(0, hidden, context, caches))

    def run_from(
        self, first: int, hidden: Tensor, context: LayerContext, caches: Sequence[Tensor]
    ) -> LayerSteps:
        """Run the layers from index ``first`` on, and the final norm, on hidden states [T, H]."""
        recorder = context.attention.recorder
        for layer, cache in zip(self.layers[first:], caches[first:], strict=True):
            if recorder is not None:
                recorder.hidden(hidden)
            hidden = yield from layer.forward(hidden, cache, context)
        hidden = self.norm(hidden)
        if recorder is not None:
            recorder.hidden(hidden)
        return hidden

    def context(self, inputs: ModelInputs, caches: Sequence[Tensor]) -> LayerContext:
        """Return the ``LayerContext`` that all layers receive in a forward pass."""
        cos, sin = self.rope.rows(inputs.positions, inputs.prompt_lengths)
        windows = {width: inputs.attention.within(width) for width in self.windows}
        chunks = inputs.attention.chunks
        native = None if chunks is None else chunks.fields(cos, sin, caches[self.kv_layer])
        return LayerContext(cos, sin, inputs.attention, windows, native, inputs.adapters)

    def embed(self, token_ids: Tensor, given: Iterable[tuple[int, Tensor]]) -> Tensor:
        """Return the first layer's input [T, H], a new tensor; ``given`` as in ``ModelInputs``."""
        hidden = self.embedding(token_ids)
        for first, rows in given:
            hidden[first : first + len(rows)] = rows
        return hidden
