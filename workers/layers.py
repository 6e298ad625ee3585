"""Building blocks of all families, and the model around their layers.

A layer is a generator: it yields an ``Exchange`` for every round trip to the experts and is sent
what came home. So the model knows nothing of dispatchers, and the runner can keep two micro-batches
in flight by resuming two generators in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from workers.attention import AttentionBatch, attend
from workers.families.base import Activation, ModelConfig
from workers.lanes import Lanes
from workers.rope import Rope, RopeConfig

_PACK_MIN_ELEMENTS = 64 * 1024
"""float32 matrices from here on are packed. AMD EPYC (avx512_bf16), torch 2.13, 1 thread, 1 / 32
rows, microseconds plain -> packed: 384 x 128 5 -> 16 / 37 -> 42, 512 x 512 23 -> 29 / 190 -> 162,
50304 x 512 8600 -> 5460 / 30000 -> 16500. bfloat16 gains at every size: 384 x 128 18 -> 15 /
31 -> 27, 50304 x 512 5150 -> 1960 / 12270 -> 8570, with bitwise equal results."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dim in float32, round to x's dtype, multiply by weight in that dtype."""
    return functional.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight)


_VECTORS = 32
"""Elements that torch computes at a time in float32, or a multiple; the rest goes one by one."""


def row_sigmoid(x: Tensor) -> Tensor:
    """Sigmoid of [rows, n], a row's bits the same in any company.

    torch takes the last few elements of a tensor with another function, so there are none.
    """
    missing = -x.shape[-1] % _VECTORS
    return functional.pad(x, (0, missing)).sigmoid()[:, : x.shape[-1]] if missing else x.sigmoid()


_SPLIT_MIN_ELEMENTS = 4 * 1024 * 1024
"""Weights from here on are shared out over the lanes: reading them is the cost."""
_SPLIT_MIN_PRODUCTS = 32 * 1024 * 1024
"""Products (rows x weight elements) from which on the rows are: about 0.3 ms on one core."""


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


def unpack(packed: Tensor) -> Tensor:
    """The weight [out, in] that was packed, bit for bit, in memory of its own."""
    return packed.to_dense()


_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] times a packed weight: [rows, out]."""
    result: Tensor = _linear_pointwise(x, packed, bias, "none", [], "")
    return result


class Linear:
    """x @ weight.T + bias. Takes the weight over: the caller should drop its own reference."""

    __slots__ = ("_biases", "_is_packed", "_lanes", "_weights")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        may_pack: bool = True,
        lanes: Lanes | None = None,
    ) -> None:
        """weight [out, in]. ``may_pack`` False keeps a weight that is used elsewhere too."""
        self._lanes = lanes or Lanes()
        self._is_packed = may_pack and can_pack(weight)
        num_parts = self._lanes.count if weight.numel() >= _SPLIT_MIN_ELEMENTS else 1
        parts = weight.tensor_split(num_parts)
        self._weights = [pack(part) for part in parts] if self._is_packed else list(parts)
        self._biases = [None] * num_parts if bias is None else list(bias.tensor_split(num_parts))

    def weight(self) -> Tensor:
        """A copy of the weight [out, in]."""
        return torch.cat([unpack(w) if self._is_packed else w for w in self._weights])

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        multiply = packed_linear if self._is_packed else functional.linear
        if len(self._weights) > 1:  # each lane reads weights of its own
            tasks = [
                partial(multiply, x, w, b) for w, b in zip(self._weights, self._biases, strict=True)
            ]
            return torch.cat(self._lanes.run(tasks), 1)
        weight, bias = self._weights[0], self._biases[0]
        if self._lanes.count > 1 and len(x) * weight.numel() >= _SPLIT_MIN_PRODUCTS:
            rows = x.tensor_split(self._lanes.count)
            return torch.cat(self._lanes.run([partial(multiply, r, weight, bias) for r in rows]))
        return multiply(x, weight, bias)


Gate = Callable[[Tensor], Tensor]
"""[.., 2 * inner] -> [.., inner]: activation(first half) * second half of the last dim."""


def swiglu(gate_up: Tensor) -> Tensor:
    """The ``Gate`` of silu."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate).mul_(up)


def _gelu(gate: Tensor) -> Tensor:
    """In one piece: there is another kernel for that, and a single row always is in one."""
    return functional.gelu(gate.contiguous())


_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def gate_of(activation: Activation) -> Gate:
    """The ``Gate`` of an activation."""
    if activation == "silu":
        return swiglu
    activate = _ACTIVATIONS[activation]

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return activate(gate).mul_(up)

    return gated


class GatedMlp:
    """A dense MLP: down(activation(gate x) * up x)."""

    __slots__ = ("_down", "_gate", "_gate_up")

    def __init__(self, gate_up: Linear, down: Linear, activation: Activation) -> None:
        """gate_up [2 * inner, H], the gate's rows first; down [H, inner]."""
        self._gate_up = gate_up
        self._gate = gate_of(activation)
        self._down = down

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, H] -> [rows, H]."""
        return self._down(self._gate(self._gate_up(x)))


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, AttentionBatch], Tensor]
"""Takes the arguments of ``attention.attend`` and returns what it returns."""


class BuildingBlocks:
    """What a family makes its layers of. These are the fast ones; see also ``invariant``."""

    def __init__(self, lanes: Lanes | None = None) -> None:
        """``lanes`` share large products; None: the calling thread does them alone."""
        self._lanes = lanes or Lanes()

    def linear(self, weight: Tensor, bias: Tensor | None = None, may_pack: bool = True) -> Linear:
        """A ``Linear`` with these arguments."""
        return Linear(weight, bias, may_pack, self._lanes)

    def attention(self, config: ModelConfig, dtype: torch.dtype) -> Attend:
        """The attention of all layers."""
        return attend

    def rope(
        self, config: RopeConfig, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> Rope:
        """A ``Rope`` with these arguments."""
        return Rope(config, max_positions, dtype, device)


class Aside:
    """A product that nobody needs before the experts have answered, computed meanwhile."""

    __slots__ = ("_compute", "_result")

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._result: Tensor | None = None

    def result(self) -> Tensor:
        """What it computes, once."""
        if self._result is None:
            self._result = self._compute()
        return self._result


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
    aside: Aside | None = None
    """What to compute while the rows are away."""


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
    given: tuple[tuple[int, Tensor], ...] = ()
    """(first row, [n, H] float32) of rows that bring their embeddings; their token ids are 0."""


@dataclass(frozen=True, slots=True)
class LayerContext:
    """What a layer needs beside the hidden states."""

    cos: Tensor
    """[T, 1, D]."""
    sin: Tensor
    """[T, 1, D], signed; see ``Rope.rows``."""
    attention: AttentionBatch
    """Keys, values, masks."""
    windows: Mapping[int, AttentionBatch]
    """The same with the masks of sliding windows, by their width in tokens."""
    recorder: Recorder | None
    """Where to report."""


class Layer(Protocol):
    """One decoder layer of a family."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        """hidden [T, H] -> [T, H]; cache is this layer's part of ``KVCache``."""


class AttentionModel:
    """Everything but the routed experts: embedding, layers, final norm, head."""

    def __init__(
        self,
        *,
        embedding: Tensor,
        layers: Sequence[Layer],
        norm: Tensor,
        norm_eps: float,
        head: Linear,
        rope: Rope,
        windows: Iterable[int] = (),
    ) -> None:
        """``head`` is lm_head, or a classifier's; ``windows`` are the widths that layers use."""
        self._embedding = embedding
        self._layers = tuple(layers)
        self._norm = norm
        self._norm_eps = norm_eps
        self._head = head
        self._rope = rope
        self._windows = tuple(windows)

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
        windows = {width: inputs.attention.within(width) for width in self._windows}
        context = LayerContext(cos, sin, inputs.attention, windows, recorder)
        hidden = functional.embedding(inputs.token_ids, self._embedding)
        for first, rows in inputs.given:
            hidden[first : first + len(rows)] = rows
        for layer, cache in zip(self._layers, caches, strict=True):
            if recorder is not None:
                recorder.hidden(hidden)
            hidden = yield from layer.forward(hidden, cache, context)
        hidden = rms_norm(hidden, self._norm, self._norm_eps)
        if recorder is not None:
            recorder.hidden(hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, H] -> [rows, vocab_size or classes], model dtype."""
        return self._head(hidden)
