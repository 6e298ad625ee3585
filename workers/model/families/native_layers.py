"""A step of all layers in one native call, where nobody looks between them.

The layers' own ``forward`` is the reference, to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.model.families.decoder import DecoderLayer
from workers.model.layers import Layer
from workers.model.native_half import NativeHalf, NativeMlp
from workers.native.exchange import HomeFields
from workers.native.experts import LocalExperts
from workers.native.half import BatchFields
from workers.native.layers import NO_BANK, LayerFields, LayersRowsFields, run_layers


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a layer is made of."""

    half: NativeHalf
    mlp: NativeMlp | None


@dataclass(frozen=True, slots=True)
class LayersOutput:
    """What native layers leave."""

    hidden: Tensor
    """[T, H] after the layers that are done."""
    topk_ids: Tensor
    """[banks, T, k] int64; those of layers that are not done are not set."""
    num_done: int
    """Layers, the one included in whose exchange native code has stopped."""
    stop: int
    """Why: 0, or what ``run_layers`` returned. Then the last layer's rows have been dispatched."""
    topk_weights: Tensor
    """[T, k] float32 of the last layer."""
    inputs: Tensor
    """[T, H]: what it sends to its experts. Frames that were not sent whole point to it."""
    others: Tensor | None
    """[T, H]: what its MLP adds to the routed experts' outputs, if it has one."""


class NativeLayers:
    """The layers of a model in C, for one thread."""

    def __init__(self, parts: Sequence[_Parts], caches: Sequence[Tensor]) -> None:
        """``caches`` by layer; they must outlive this."""
        self._parts = parts  # whose memory ``_fields`` names
        self._team = parts[0].half.team
        self._top_k = max(part.half.fields.router.routing.top_k for part in parts)
        self._fields = (LayerFields * len(parts))()
        for fields, part, cache in zip(self._fields, parts, caches, strict=True):
            routing = part.half.routing
            fields.half, fields.cache = part.half.fields, cache.data_ptr()
            fields.bank = NO_BANK if routing is None else routing.bank
            if part.mlp is not None:
                fields.mlp = part.mlp.table.fields

    def bank_of(self, layer: int) -> int:
        """``BankSpec.index`` of a layer's routed experts."""
        return int(self._fields[layer].bank)

    def run(
        self,
        hidden: Tensor,
        batch: BatchFields,
        experts: Sequence[LocalExperts] | Sequence[HomeFields],
        advance: Callable[[], None],
        advance_s: float,
    ) -> LayersOutput:
        """Run all layers on hidden [T, H], which may be changed.

        ``experts`` by ``BankSpec.index``, in this process or on other ranks. ``advance`` as for
        ``run_layers``, which says what this raises, too.
        """
        for fields in self._fields:
            if fields.bank != NO_BANK:
                _set_experts(fields, experts[fields.bank])
        hidden = hidden.contiguous()
        normed, others, routed = (torch.empty_like(hidden) for _ in range(3))
        ids = torch.empty((len(experts), len(hidden), self._top_k), dtype=torch.int64)
        weights = torch.empty((len(hidden), self._top_k), dtype=torch.float32)
        tensors = (hidden, normed, others, ids, weights, routed)
        rows = LayersRowsFields(*(tensor.data_ptr() for tensor in tensors))
        done, stop = run_layers(self._team, self._fields, batch, rows, advance, advance_s)
        has_mlp = self._parts[done - 1].mlp is not None
        return LayersOutput(hidden, ids, done, stop, weights, normed, others if has_mlp else None)


def _set_experts(fields: LayerFields, experts: LocalExperts | HomeFields) -> None:
    fields.home = None
    if isinstance(experts, HomeFields):
        fields.home = ctypes.addressof(experts)
        return
    fields.experts = experts.table.fields
    call, slot_of = fields.experts, experts.slot_of
    call.slot_of = None if slot_of is None else slot_of.data_ptr()
    call.rounds_products = not experts.float32_weights


def native_layers(layers: Sequence[Layer], caches: Sequence[Tensor]) -> NativeLayers | None:
    """A model's layers for native calls; None where one has parts that such a call lacks."""
    parts = [found for layer in layers if (found := _parts(layer)) is not None]
    choices = {found.half.routing.top_k for found in parts if found.half.routing is not None}
    if not parts or len(parts) < len(layers) or len(choices) > 1:
        return None
    return NativeLayers(parts, caches)


def _parts(layer: Layer) -> _Parts | None:
    if not isinstance(layer, DecoderLayer) or layer.bias is not None:
        return None
    half, mlp = layer.half, layer.mlp
    if not isinstance(half, NativeHalf) or not half.is_one_call:
        return None
    if mlp is None or isinstance(mlp, NativeMlp):
        return _Parts(half, mlp)
    return None
