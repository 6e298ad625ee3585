"""Building blocks of all families, and the model around their layers.

A layer is a generator: it yields an ``Exchange`` for every round trip to the experts and is sent
what came home. So the model knows nothing of dispatchers, and the runner can keep two micro-batches
in flight by resuming two generators in turn.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from workers.attention import AttentionBatch
from workers.rope import Rope

_PACK_MIN_ELEMENTS = 64 * 1024
"""float32 matrices from here on are packed. AMD EPYC (avx512_bf16), torch 2.13, 1 thread, 1 / 32
rows, microseconds plain -> packed: 384 x 128 5 -> 16 / 37 -> 42, 512 x 512 23 -> 29 / 190 -> 162,
50304 x 512 8600 -> 5460 / 30000 -> 16500. bfloat16 gains at every size: 384 x 128 18 -> 15 /
31 -> 27, 50304 x 512 5150 -> 1960 / 12270 -> 8570, with bitwise equal results."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in float32, round to x's dtype, then multiply by weight in that dtype."""
    return functional.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's own weight layout is there and pays for this matrix."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and weight.numel() >= _PACK_MIN_ELEMENTS


def pack(weight: Tensor) -> Tensor:
    """A copy of weight [out, in] in oneDNN's layout, only good for ``packed_linear``."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


_linear_pointwise = torch.ops.mkldnn._linear_pointwise


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] times a packed weight: [rows, out]."""
    result: Tensor = _linear_pointwise(x, packed, bias, "none", [], "")
    return result


class Linear:
    """x @ weight.T + bias. Takes the weight over: the caller should drop its own reference."""

    __slots__ = ("_bias", "_is_packed", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, may_pack: bool = True) -> None:
        """weight [out, in]. ``may_pack`` False keeps a weight that is used elsewhere too."""
        self._is_packed = may_pack and can_pack(weight)
        self._weight = pack(weight) if self._is_packed else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        if self._is_packed:
            return packed_linear(x, self._weight, self._bias)
        return functional.linear(x, self._weight, self._bias)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last dim."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate).mul_(up)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Rows that a layer sends to the experts of one bank."""

    bank: int
    """``BankSpec.index``."""
    exchange: int
    """``ExchangeSpec.index``."""
    rows: Tensor
    """[T, in_width] or [T, k, in_width], model dtype."""
    topk_ids: Tensor
    """[T, k] int64 logical experts."""
    topk_weights: Tensor
    """[T, k] model dtype, or float32 where the bank says so."""


LayerSteps = Generator[Exchange, Tensor, Tensor]
"""Yields exchanges, is sent their outputs, returns hidden states [T, hidden_size]."""


class Recorder(Protocol):
    """Sees the inside of a forward pass; None in serving."""

    def hidden(self, state: Tensor) -> None:
        """Embeddings, then after each layer but the last, then after the final norm: [T, H]."""

    def router(self, bank: int, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
        """A bank's router: logits [T, E], topk_ids [T, k], topk_weights [T, k]."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """The rows of one micro-batch."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64, from 0 in each sequence."""
    prompt_lengths: Tensor
    """[T] int64: length of the prompt of each row's request."""
    attention: AttentionBatch
    """Where their keys and values are, and what they may see."""


@dataclass(frozen=True, slots=True)
class LayerContext:
    """What a layer needs beside the hidden states."""

    cos: Tensor
    """[T, 1, D]."""
    sin: Tensor
    """[T, 1, D], signed; see ``Rope.rows``."""
    attention: AttentionBatch
    """Keys, values, masks."""
    recorder: Recorder | None
    """Where to report."""


class Layer(Protocol):
    """One decoder layer of a family."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        """hidden [T, H] -> [T, H]; cache is this layer's part of ``KVCache``."""


class AttentionModel:
    """Everything but the routed experts: embedding, layers, final norm, lm_head."""

    def __init__(
        self,
        *,
        embedding: Tensor,
        layers: Sequence[Layer],
        norm: Tensor,
        norm_eps: float,
        lm_head: Linear,
        rope: Rope,
    ) -> None:
        self._embedding = embedding
        self._layers = tuple(layers)
        self._norm = norm
        self._norm_eps = norm_eps
        self._lm_head = lm_head
        self._rope = rope

    @property
    def dtype(self) -> torch.dtype:
        """Model dtype."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    def forward(
        self, inputs: ModelInputs, caches: Sequence[Tensor], recorder: Recorder | None = None
    ) -> LayerSteps:
        """Run all layers; returns the normed hidden states [T, H]. Writes the KV of its rows."""
        cos, sin = self._rope.rows(inputs.positions, inputs.prompt_lengths)
        context = LayerContext(cos, sin, inputs.attention, recorder)
        hidden = functional.embedding(inputs.token_ids, self._embedding)
        for layer, cache in zip(self._layers, caches, strict=True):
            if recorder is not None:
                recorder.hidden(hidden)
            hidden = yield from layer.forward(hidden, cache, context)
        hidden = rms_norm(hidden, self._norm, self._norm_eps)
        if recorder is not None:
            recorder.hidden(hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, H] -> [rows, vocab_size], model dtype."""
        return self._lm_head(hidden)
