"""All layers of a step in one native call, where nobody looks between them.

With them go the embeddings where they are rows of a table, the final norm, and the head where all
rows draw a token.

The reference, to the bit: the layers' own ``forward``, and ``embedding``, ``norm`` and ``head`` of
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
from workers.native.exchange import HomeFields
from workers.native.experts import LocalExperts
from workers.native.half import BatchFields
from workers.native.layers import (
    NO_BANK,
    FlowFields,
    LayerEnds,
    LayerFields,
    StackFields,
    run_layers,
)

Experts = LocalExperts | Sequence[HomeFields]
"""In this process, or by ``BankSpec.index`` the exchanges with other ranks."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a layer is made of."""

    half: NativeAttentionSublayer
    mlp: NativeMlp | None


class NativeMicroBatch:
    """A micro-batch on its way through native layers."""

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
        """hidden [T, H] is changed; it gets the embeddings of ``tokens`` [T] first, if given.

        ``logits`` [T, V] are written, if given. ``keeps`` has the memory that ``batch`` names.
        """
        num_banks, (num_rows, width) = len(experts), hidden.shape
        self.hidden = hidden.contiguous()
        """[T, H]: the residual stream after the layers that are done, at last normed."""
        self.finite = torch.empty(num_rows, dtype=torch.bool)
        """[T]: all numbers of a row are finite; not set before the flow is done."""
        self.logits = logits
        """[T, V], not set before the flow is done; None: nobody reads them."""
        self.topk_ids = torch.empty((num_banks, num_rows, top_k), dtype=torch.int64)
        """[banks, T, k]; those of layers that have not begun are not set."""
        self.topk_weights = torch.empty((num_rows, top_k), dtype=torch.float32)
        """[T, k] of the last layer that has begun."""
        self.ends = (LayerEnds * num_banks)()
        """By bank."""
        self._memory = torch.empty((3, num_rows, width), dtype=hidden.dtype)
        self._kept = tokens, batch, experts, keeps  # which C reads
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
        """For C."""
        if isinstance(experts, LocalExperts):
            self.fields.experts = ctypes.addressof(experts.calls)
        else:
            self._homes = (ctypes.c_void_p * num_banks)(*map(ctypes.addressof, experts))
            self.fields.homes = ctypes.addressof(self._homes)

    @property
    def num_begun(self) -> int:
        """Layers that have begun."""
        return int(self.fields.next)

    @property
    def is_waiting(self) -> bool:
        """The last of them has dispatched its rows, whose outputs are still to be received."""
        return bool(self.fields.is_waiting)

    @property
    def is_done(self) -> bool:
        """The rows are normed, and have their logits if any are asked for."""
        return bool(self.fields.is_done)

    @property
    def others(self) -> Tensor:
        """[T, H]: what the MLP of that layer adds to the routed experts' outputs, if it has one."""
        return self._memory[1]


class NativeLayers:
    """The layers of a model in C, with what stands around them, for one thread."""

    def __init__(
        self,
        embedding: Embedding,
        parts: Sequence[_Parts],
        norm: NativeNorm,
        head: NativeLinear,
        caches: Sequence[Tensor],
    ) -> None:
        """``caches`` by layer; they must outlive this."""
        self._parts, self._norm, self._head = parts, norm, head  # whose memory the fields name
        self._team = parts[0].half.team
        self.top_k = max(part.half.fields.router.routing.top_k for part in parts)
        """Experts of a row."""
        self._fields = (LayerFields * len(parts))()
        for fields, part, cache in zip(self._fields, parts, caches, strict=True):
            routing = part.half.routing
            fields.half, fields.cache = part.half.fields, cache.data_ptr()
            fields.bank = NO_BANK if routing is None else routing.bank
            if part.mlp is not None:
                fields.mlp = part.mlp.table.fields
        self._table = table = embedding.table if isinstance(embedding, TableEmbedding) else None
        self.has_table = table is not None
        """Flows may be given tokens."""
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
        """[T, H] in the model's dtype, with undefined contents."""
        return self._norm.weight.new_empty(num_rows, len(self._norm.weight))

    def new_logits(self, num_rows: int) -> Tensor:
        """[T, V] in the model's dtype, with undefined contents."""
        return self._norm.weight.new_empty(num_rows, self._head.matrix.shape[0])

    def bank_of(self, layer: int) -> int:
        """``BankSpec.index`` of a layer's routed experts."""
        return int(self._fields[layer].bank)

    def has_mlp(self, layer: int) -> bool:
        return self._parts[layer].mlp is not None

    def run(
        self, flows: Sequence[NativeMicroBatch], advance: Callable[[], None], advance_s: float
    ) -> tuple[int, int]:
        """Run all layers of the micro-batches in turns.

        ``advance`` and what this returns and raises: see ``run_layers``.
        """
        fields = (FlowFields * len(flows))(*(flow.fields for flow in flows))
        found = run_layers(self._team, self._stack, fields, advance, advance_s)
        for flow, after in zip(flows, fields, strict=True):
            flow.fields = after
        return found


def native_layers(model: AttentionModel, caches: Sequence[Tensor]) -> NativeLayers | None:
    """A model's layers for native calls; None where one has parts that such a call lacks."""
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
