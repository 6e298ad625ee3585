"""Prepares steps for native (compiled) code, and finishes a step in Python if that code stops."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.engine.batch import (
    MicroBatch,
    num_decodes,
    positions_and_lengths,
    prompt_embedding_rows,
    row_chunks,
    row_tokens,
)
from workers.kv.block_tables import BlockTables
from workers.kv.cache import KVCache
from workers.model.families.native_layers import (
    Experts,
    NativeLayers,
    NativeMicroBatch,
    native_layers,
)
from workers.model.layers import AttentionModel, LayerSteps
from workers.scheduling.step_plan import PlannedRows


class NativeStep:
    """Prepares steps of one model for native code, which runs all layers in one call."""

    def __init__(
        self, model: AttentionModel, layers: NativeLayers, cache: KVCache, tables: BlockTables
    ) -> None:
        self.layers = layers
        """The layers of the model in the form that native code runs."""
        self._model, self._cache, self._tables = model, cache, tables

    def micro_batches(
        self, parts: Sequence[Sequence[PlannedRows]], experts: Sequence[Experts]
    ) -> list[NativeMicroBatch]:
        """Return the micro-batches of a step, ready for the model's first layer.

        ``parts`` and ``experts``: planned rows and experts of each micro-batch. A single
        micro-batch of decode rows gets logits, because each of its rows samples a token.
        """
        has_logits = len(parts) == 1 and num_decodes(parts[0]) == len(parts[0])
        pairs = zip(parts, experts, strict=True)
        return [self._micro_batch(part, own, has_logits) for part, own in pairs]

    def _micro_batch(
        self, part: Sequence[PlannedRows], experts: Experts, has_logits: bool
    ) -> NativeMicroBatch:
        model, layers = self._model, self.layers
        chunks = row_chunks(part, self._tables)
        waves = model.rope.waves_by_position
        cos, sin = waves or model.rope.rows(*map(torch.from_numpy, positions_and_lengths(part)))
        batch = chunks.fields(cos, sin, self._cache.layers[0], waves_by_position=waves is not None)
        tokens, given = (
            torch.from_numpy(row_tokens(part)),
            [*prompt_embedding_rows(part, model.device)],
        )
        looks_up = layers.has_table and not given
        return NativeMicroBatch(
            hidden=layers.new_rows(len(tokens)) if looks_up else model.embed(tokens, given),
            tokens=tokens if looks_up else None,
            batch=batch,
            experts=experts,
            top_k=layers.top_k,
            logits=layers.new_logits(len(tokens)) if has_logits else None,
            keeps=(chunks, cos, sin),
        )

    def remaining_layers(self, flow: NativeMicroBatch, part: Sequence[PlannedRows]) -> LayerSteps:
        """Run the layers of a micro-batch that native code did not run, as a generator.

        If native code had sent rows to the experts, the caller must first send their outputs into
        the generator. Returns the hidden states [T, H].
        """
        if flow.is_done:
            return flow.hidden
        model, caches = self._model, self._cache.by_layer
        inputs = MicroBatch(part, self._cache, self._tables, model.device, model.is_native).inputs
        assert inputs is not None, "the micro-batch has rows"
        context = model.context(inputs, caches)
        if flow.is_waiting:
            outputs = yield
            others = flow.others if self.layers.has_mlp(flow.num_begun - 1) else None
            flow.hidden.add_(outputs if others is None else outputs + others)
        return (yield from model.run_from(flow.num_begun, flow.hidden, context, caches))


def native_step(model: AttentionModel, cache: KVCache, tables: BlockTables) -> NativeStep | None:
    """Return the native step of a model, or None if native code does not support all layers."""
    layers = native_layers(model, cache.by_layer)
    return None if layers is None else NativeStep(model, layers, cache, tables)
