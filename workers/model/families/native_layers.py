"""Runs all layers of a step in one native call, for steps in which no request reads inner tensors.

The call includes the embeddings if they are rows of a table, the final norm, and the head if a
token is sampled for all rows.

Results are bitwise equal to ``forward`` of the layers, and ``embedding``, ``norm`` and ``head`` of
``AttentionModel``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.model.families.decoder import DecoderLayer
from workers.model.layers import AttentionModel, Embedding, Layer, TableEmbedding
from workers.model.native.native_sublayer import NativeAttentionSublayer
from workers.model.native.products import NativeLinear, NativeMlp, NativeNorm
from workers.native.attention_sublayer import BatchFields
from workers.native.exchange import AttentionSideFields
from workers.native.experts import LocalExperts
from workers.native.layers import (
    NO_BANK,
    FlowFields,
    LayerEnds,
    LayerFields,
    StackFields,
    run_layers,
)

Experts = LocalExperts | Sequence[AttentionSideFields]
"""Experts in this process, or exchanges with other ranks by ``BankSpec.index``."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """Attention sublayer and MLP (None: no MLP) of a layer, both with native kernels."""

    half: NativeAttentionSublayer
    mlp: NativeMlp | None


class NativeMicroBatch:
    """Micro-batch that ``NativeLayers`` runs: its tensors and its progress."""

    def __init__(
        self,
        *,
        hidden: Tensor,
        tokens: Tensor | None,
        batch: BatchFields,
        experts: Experts,
        top_k: int,
        logits: Tensor | None,
        keeps: object,
    ) -> None:
        """``hidden`` [T, H] is modified; if ``tokens`` [T] are given, their embeddings are first
        written to ``hidden``. ``experts``: routed experts in this process or other ranks.

        ``logits`` [T, V] are written, if given. ``keeps``: owner of the memory to which ``batch``
        points.
        """
        num_banks, (num_rows, width) = len(experts), hidden.shape
        self.hidden = hidden.contiguous()
        """[T, H]: residual stream after the completed layers; its final norm once ``is_done``."""
        self.finite = torch.empty(num_rows, dtype=torch.bool)
        """[T]: whether a row's final hidden state is finite; undefined until ``is_done``."""
        self.logits = logits
        """Logits [T, V], undefined until ``is_done``; None if not requested."""
        self.topk_ids = torch.empty((num_banks, num_rows, top_k), dtype=torch.int64)
        """Selected experts of the rows, [banks, T, k]; undefined for layers not yet begun."""
        self.topk_weights = torch.empty((num_rows, top_k), dtype=torch.float32)
        """Router weights [T, k] of the last layer that has begun."""
        self.ends = (LayerEnds * num_banks)()
        """Monotonic times in ns at which the parts of each layer ended, by the layer's bank."""
        self._memory = torch.empty((3, num_rows, width), dtype=hidden.dtype)
        self._kept = tokens, batch, experts, keeps  # C reads it
        part, memory = self.hidden.nbytes, self._memory.data_ptr()
        self.fields = FlowFields(
            batch=ctypes.addressof(batch),
            tokens=None if tokens is None else tokens.data_ptr(),
            hidden=self.hidden.data_ptr(),
            is_finite=self.finite.data_ptr(),
            logits=None if self.logits is None else self.logits.data_ptr(),
            normed=memory,
            others=memory + part,
            topk_ids=self.topk_ids.data_ptr(),
            topk_weights=self.topk_weights.data_ptr(),
            routed=memory + 2 * part,
            ends=ctypes.addressof(self.ends),
        )
        """C struct that describes the micro-batch and its progress."""
        if isinstance(experts, LocalExperts):
            self.fields.experts = ctypes.addressof(experts.calls)
        else:
            self._exchanges = (ctypes.c_void_p * num_banks)(*map(ctypes.addressof, experts))
            self.fields.exchanges = ctypes.addressof(self._exchanges)

    @property
    def num_begun(self) -> int:
        """Number of layers that have begun."""
        return int(self.fields.next)

    @property
    def is_waiting(self) -> bool:
        """Whether the last begun layer waits for the outputs of its dispatched rows."""
        return bool(self.fields.is_waiting)

    @property
    def is_done(self) -> bool:
        """Whether all layers and the final norm have run, and logits if requested."""
        return bool(self.fields.is_done)

    @property
    def others(self) -> Tensor:
        """[T, H]: MLP output of the layer that began last, to add to its experts' outputs."""
        return self._memory[1]


class NativeLayers:
    """Layers, embedding, final norm and head of a model, run by native calls of one thread."""

    def __init__(
        self,
        embedding: Embedding,
        parts: Sequence[_Parts],
        norm: NativeNorm,
        head: NativeLinear,
        caches: Sequence[Tensor],
    ) -> None:
        """``caches``: KV cache tensor of each layer; the tensors must outlive this object."""
        self._parts, self._norm, self._head = parts, norm, head  # the fields point to its memory
        self._team = parts[0].half.team
        self.top_k = max(part.half.fields.router.routing.top_k for part in parts)
        """Number of routed experts per row."""
        self._fields = (LayerFields * len(parts))()
        for fields, part, cache in zip(self._fields, parts, caches, strict=True):
            routing = part.half.routing
            fields.sublayer, fields.cache = part.half.fields, cache.data_ptr()
            fields.bank = NO_BANK if routing is None else routing.bank
            if part.mlp is not None:
                fields.mlp = part.mlp.table.fields
        self._table = table = embedding.table if isinstance(embedding, TableEmbedding) else None
        self.has_table = table is not None
        """Whether micro-batches may contain token ids: the embedding is a plain table."""
        width, dtype = head.matrix.shape[1], head.matrix.dtype
        for weight in (norm.weight, *(() if table is None else (table,))):
            assert weight.is_contiguous()
            assert (weight.shape[-1], weight.dtype) == (width, dtype), f"{weight.dtype} weights"
        self._stack = StackFields(
            embedding=None if table is None else table.data_ptr(),
            vocab_size=0 if table is None else len(table),
            layers=self._fields,
            num_layers=len(parts),
            norm=norm.weight.data_ptr(),
            eps=norm.eps,
            head=head.matrix.fields,
        )

    def new_rows(self, num_rows: int) -> Tensor:
        """Allocate hidden states [T, H] in the model's dtype, with undefined contents."""
        return self._norm.weight.new_empty(num_rows, len(self._norm.weight))

    def new_logits(self, num_rows: int) -> Tensor:
        """Allocate logits [T, V] in the model's dtype, with undefined contents."""
        return self._norm.weight.new_empty(num_rows, self._head.matrix.shape[0])

    def bank_of(self, layer: int) -> int:
        """Return ``BankSpec.index`` of a layer's routed experts; ``NO_BANK``: it has none."""
        return int(self._fields[layer].bank)

    def has_mlp(self, layer: int) -> bool:
        return self._parts[layer].mlp is not None

    def run(
        self, flows: Sequence[NativeMicroBatch], advance: Callable[[], None], advance_s: float
    ) -> tuple[int, int]:
        """Run all layers in native calls, alternating between the micro-batches ``flows``.

        ``advance``, ``advance_s``, the result and the errors are those of ``run_layers``.
        """
        fields = (FlowFields * len(flows))(*(flow.fields for flow in flows))
        found = run_layers(self._team, self._stack, fields, advance, advance_s)
        for flow, after in zip(flows, fields, strict=True):
            flow.fields = after
        return found


def native_layers(model: AttentionModel, caches: Sequence[Tensor]) -> NativeLayers | None:
    """Return the layers of a model for native calls; None if the model does not support them."""
    parts = [found for layer in model.layers if (found := _parts(layer)) is not None]
    choices = {found.half.routing.top_k for found in parts if found.half.routing is not None}
    if not parts or len(parts) < len(model.layers) or len(choices) > 1:
        return None
    norm, head = model.norm, model.head
    if not isinstance(norm, NativeNorm) or not isinstance(head, NativeLinear):
        return None
    return NativeLayers(model.embedding, parts, norm, head, caches)


def _parts(layer: Layer) -> _Parts | None:
    if not isinstance(layer, DecoderLayer) or layer.bias is not None:
        return None
    half, mlp = layer.half, layer.mlp
    if not isinstance(half, NativeAttentionSublayer) or not half.is_one_call:
        return None
    if mlp is None or isinstance(mlp, NativeMlp):
        return _Parts(half, mlp)
    return None
