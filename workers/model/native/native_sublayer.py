"""The attention sublayer of a layer with native kernels.

A row's bits depend neither on other rows nor on the number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.model.attention_sublayer import (
    DenseProjections,
    HeadAttention,
    RoutedProjections,
    SublayerOutput,
    SublayerSteps,
    TorchAttentionSublayer,
    staged_steps,
)
from workers.model.layers import LayerContext, Linear
from workers.model.native.products import NativeLinear
from workers.model.routing import Router, Routes, Routing
from workers.native.attention_sublayer import (
    ATTEND,
    ENTER,
    LEAVE,
    NO_NORM,
    NO_WINDOW,
    NORM_HEADS,
    NORM_WIDTH,
    SCORINGS,
    RouterFields,
    RoutingFields,
    RowsFields,
    SublayerFields,
    run_sublayer,
)
from workers.native.matrix import MatrixFields
from workers.native.norm import norm_rows
from workers.native.panels import DTYPES
from workers.native.thread_team import ThreadTeam


class NativeAttention:
    """Attention from projected rows to attended values in one native call, on the CPU."""

    def __init__(self, team: ThreadTeam, attention: HeadAttention, dtype: torch.dtype) -> None:
        """``dtype``: data type of the model."""
        self.team = team
        """Threads that compute the attention."""
        self.fields = _attention_fields(attention, dtype)
        """Description of the attention as a C struct, valid as long as this object exists."""
        self._attention = attention
        self._dtype = dtype

    def attend_rows(self, rows: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        """Attend from projected rows; see ``RowAttention.attend_rows``."""
        shape = self._attention.shape
        if context.native is None:
            return self._attention.attend_rows(rows, cache, context)
        attended = rows.new_empty(rows.shape[0], shape.num_heads * shape.value_dim)
        fields = RowsFields(
            projected=rows.data_ptr(), cache=cache.data_ptr(), attended=attended.data_ptr()
        )
        queries = self._queries(fields, rows.shape[0], context)
        self._run(context, fields, ATTEND)
        self._report(queries, cache, context)
        return attended

    def _queries(self, rows: RowsFields, count: int, context: LayerContext) -> Tensor | None:
        """Make the native call write the rotated queries for the batch's recorder; return their
        memory [count, A, D]. None: the batch has no recorder."""
        if context.attention.recorder is None:
            return None
        shape = self._attention.shape
        queries = torch.empty(count, shape.num_heads, shape.head_dim, dtype=self._dtype)
        rows.queries = queries.data_ptr()
        return queries

    def _report(self, queries: Tensor | None, cache: Tensor, context: LayerContext) -> None:
        """Give rotated queries to the batch's recorder, which computes attention maps from them;
        None: there is no recorder."""
        if queries is not None and (recorder := context.attention.recorder) is not None:
            recorder.attending(queries, cache, self._attention.batch(context))

    def _run(self, context: LayerContext, rows: RowsFields, stages: int) -> None:
        assert context.native is not None
        run_sublayer(self.team, self.fields, context.native, rows, stages)


class NativeAttentionSublayer(NativeAttention):
    """Attention sublayer in one native call, or in several if its projections are routed or latent
    or the batch has LoRA adapters."""

    def __init__(self, team: ThreadTeam, half: TorchAttentionSublayer) -> None:
        """``half``: weights and parameters of the sublayer; its products must be native."""
        super().__init__(team, half, half.norm1.dtype)
        _add_half(self.fields, half)
        self._apart = SublayerFields.from_buffer_copy(self.fields)
        self._apart.qkv = self._apart.output = MatrixFields()
        self._half = half

    @property
    def routing(self) -> Routing | None:
        """Routing of the layer's routed experts; None: the layer has no routed experts."""
        return None if self._half.router is None else self._half.router.routing

    @property
    def is_one_call(self) -> bool:
        """Whether one native call can run the whole sublayer: its projections are neither routed
        nor latent."""
        return isinstance(self._half.projections, DenseProjections)

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> SublayerSteps:
        """Run the sublayer on hidden states [T, H]; see ``AttentionSublayer``."""
        if context.native is None:
            return (yield from self._half.forward(hidden, cache, context))
        shape, parts = self._half.shape, self._half.projections
        if not isinstance(parts, DenseProjections):
            return (yield from staged_steps(self, shape, parts, hidden, cache, context))
        if context.adapters is not None:
            return self._adapted(parts, hidden, cache, context)
        rows = RowsFields(cache=cache.data_ptr())
        queries = self._queries(rows, hidden.shape[0], context)
        output = self._leave(hidden, rows, ENTER | ATTEND | LEAVE, context)
        self._report(queries, cache, context)
        return output

    def _adapted(
        self, parts: DenseProjections, hidden: Tensor, cache: Tensor, context: LayerContext
    ) -> SublayerOutput:
        """Run the sublayer for a batch with LoRA adapters on its projections. Rows without an
        adapter have the same bits as in a batch without adapters."""
        normed = norm_rows(self.team, hidden.clone(), self._half.norm1, self._half.shape.eps)
        rows = context.multiply(parts.qkv, normed)
        attended = self.attend_rows(rows.contiguous(), cache, context)
        return self.leave(hidden, context.multiply(parts.output, attended), context)

    def _run(self, context: LayerContext, rows: RowsFields, stages: int) -> None:
        """Run ``stages`` (ENTER, ATTEND, LEAVE bits) of the sublayer on ``rows``. The q/k/v and
        output projections run only if all stages run."""
        assert context.native is not None
        fields = self.fields if stages == ENTER | ATTEND | LEAVE else self._apart
        run_sublayer(self.team, fields, context.native, rows, stages)

    def enter(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Routes]:
        """Run the stage before attention, only for routed projections: first norm, router."""
        assert isinstance(self._half.projections, RoutedProjections)
        hidden = hidden.contiguous()
        normed = torch.empty_like(hidden)
        rows = RowsFields(hidden=hidden.data_ptr(), normed=normed.data_ptr())
        return normed, self._routed(self._half.projections.router, normed, rows, ENTER, context)

    def leave(self, hidden: Tensor, projected: Tensor, context: LayerContext) -> SublayerOutput:
        """Run the stage after attention: residual sum, second norm, router."""
        projected = projected.contiguous()
        return self._leave(hidden, RowsFields(mixed=projected.data_ptr()), LEAVE, context)

    def _leave(
        self, hidden: Tensor, rows: RowsFields, stages: int, context: LayerContext
    ) -> SublayerOutput:
        """Run ``stages`` (ENTER, ATTEND, LEAVE bits), which include LEAVE, the stage after
        attention; return the sublayer's output."""
        hidden = hidden.contiguous()
        normed = torch.empty_like(hidden)
        rows.hidden, rows.normed = hidden.data_ptr(), normed.data_ptr()
        router = self._half.router
        if router is None:
            self._run(context, rows, stages)
            return SublayerOutput(hidden, normed, None)
        return SublayerOutput(hidden, normed, self._routed(router, normed, rows, stages, context))

    def _routed(
        self,
        router: Router,
        normed: Tensor,
        rows: RowsFields,
        stages: int,
        context: LayerContext,
    ) -> Routes:
        """Run ``stages``, which end with ``router``; return the selected experts, also given to the
        batch's recorder."""
        routing, count = router.routing, normed.shape[0]
        ids = torch.empty((count, routing.top_k), dtype=torch.int64)
        weights = torch.empty((count, routing.top_k), dtype=torch.float32)
        rows.topk_ids, rows.topk_weights = ids.data_ptr(), weights.data_ptr()
        if (recorder := context.attention.recorder) is None:
            self._run(context, rows, stages)
        else:
            dtype = torch.float32 if routing.has_float32_logits else normed.dtype
            logits = torch.empty(count, routing.num_experts, dtype=dtype)
            rows.logits = logits.data_ptr()
            self._run(context, rows, stages)
            recorder.router(routing.bank, logits, ids, weights)
        return Routes(routing.bank, ids, weights)


def _attention_fields(attention: HeadAttention, dtype: torch.dtype) -> SublayerFields:
    """Return a C struct that describes the attention and points to memory of ``attention``."""
    shape, norm, sinks = attention.shape, attention.qk_norm, attention.sinks
    qk_norm = NO_NORM
    if norm is not None:
        assert norm.is_contiguous()
        qk_norm = NORM_HEADS if norm.dim() == 2 else NORM_WIDTH
    return SublayerFields(
        dtype=DTYPES.index(dtype),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        window=NO_WINDOW if shape.window is None else shape.window,
        qk_norm=qk_norm,
        latent_rank=shape.latent_rank or 0,
        eps=shape.eps,
        scale=shape.head_dim**-0.5 if shape.scale is None else shape.scale,
        clip=math.inf if shape.clip is None else shape.clip,
        sinks=None if sinks is None else sinks.data_ptr(),
        qk_norm_weights=None if norm is None else norm.data_ptr(),
    )


def _add_half(fields: SublayerFields, half: TorchAttentionSublayer) -> None:
    """Add to the C struct the parts of a sublayer around attention: norms, projections, routers.
    ``half`` must outlive the struct."""
    norm1, norm2, parts = half.norm1, half.norm2, half.projections
    assert norm1.is_contiguous()
    assert norm2.is_contiguous()
    fields.hidden_size = len(norm1)
    fields.norm1, fields.norm2 = norm1.data_ptr(), norm2.data_ptr()
    if isinstance(parts, DenseProjections):
        fields.qkv, fields.output = _matrix(parts.qkv), _matrix(parts.output)
    elif isinstance(parts, RoutedProjections):
        fields.query_router = _router_fields(parts.router)
    if half.router is not None:
        fields.router = _router_fields(half.router)


def _router_fields(router: Router) -> RouterFields:
    return RouterFields(
        matrix=_matrix(router.linear), routing=routing_fields(router.routing, router.correction)
    )


def routing_fields(routing: Routing, correction: Tensor | None) -> RoutingFields:
    """Return a C struct with the parameters of a router; ``correction`` must outlive the struct."""
    return RoutingFields(
        num_experts=routing.num_experts,
        top_k=routing.top_k,
        scoring=SCORINGS.index(routing.scoring),
        is_normed=routing.is_normed,
        float32_product=routing.has_float32_logits,
        least_sum=routing.least_sum,
        num_groups=routing.num_groups,
        top_groups=routing.top_groups,
        scale=routing.scale,
        correction=None if correction is None else correction.data_ptr(),
    )


def _matrix(linear: Linear) -> MatrixFields:
    assert isinstance(linear, NativeLinear), "the parts of a native half are native"
    return linear.matrix.fields
