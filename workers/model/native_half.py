"""Building blocks that compute with native kernels (``workers.native``).

A row's bits depend neither on other rows nor on the number of threads, so these blocks serve with
``--deterministic`` and without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from workers.model.building_blocks import BuildingBlocks
from workers.model.config import Activation
from workers.model.delta_net import DeltaNet, Mix
from workers.model.half import (
    AttendsRows,
    AttentionHalf,
    DenseProjections,
    HalfOutput,
    HalfSteps,
    HeadAttention,
    RoutedProjections,
    StagedHalf,
    routed_steps,
)
from workers.model.latent import HeadProducts, LatentProjections
from workers.model.layers import Embedding, LayerContext, Linear, Mlp, Norm
from workers.model.native_delta_net import NativeDeltaNet
from workers.model.rope import Rope, RopeConfig
from workers.model.routing import Router, Routes, Routing
from workers.native.experts import ExpertShape, SlotTable, expert_pairs
from workers.native.half import (
    ATTEND,
    ENTER,
    LEAVE,
    NO_NORM,
    NO_WINDOW,
    NORM_HEADS,
    NORM_WIDTH,
    SCORINGS,
    HalfFields,
    RouterFields,
    RoutingFields,
    RowsFields,
    run_half,
)
from workers.native.matrix import Matrix, MatrixFields
from workers.native.norm import norm_rows
from workers.native.panels import DTYPES, pack
from workers.native.team import Team


class NativeLinear(Linear):
    """``Linear`` with a packed weight."""

    __slots__ = ("matrix",)

    def __init__(self, team: Team, weight: Tensor, bias: Tensor | None) -> None:
        self.matrix = Matrix(team, weight, bias)

    def weight(self) -> Tensor:
        return self.matrix.weight()

    def __call__(self, x: Tensor) -> Tensor:
        return self.matrix.multiply(x)


class NativeNorm:
    """Root mean square norm of rows [T, H], in place."""

    __slots__ = ("_team", "eps", "weight")

    def __init__(self, team: Team, weight: Tensor, eps: float) -> None:
        """weight [H], contiguous."""
        self._team, self.weight, self.eps = team, weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return norm_rows(self._team, x, self.weight, self.eps)


class NativeMlp:
    """``GatedMlp`` with silu, as the kernels' only expert; rounded as routed experts are."""

    __slots__ = ("_team", "table")

    def __init__(
        self, team: Team, gate_up: Callable[[], Tensor], down: Callable[[], Tensor]
    ) -> None:
        """Reads and packs one weight after the other; see ``BuildingBlocks.mlp``."""
        self._team = team
        weight = gate_up()
        shape = ExpertShape(weight.shape[1], len(weight) // 2, weight.shape[1], weight.dtype)
        self.table = SlotTable(shape, 1)
        """Its packed weights."""
        self.table.put(0, 0, pack(team.library, weight, is_gated=True, team=team))
        del weight
        self.table.put(0, 1, pack(team.library, down(), team=team))

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, H] -> [rows, H]."""
        slots = torch.zeros(len(x), dtype=torch.int64)
        return expert_pairs(self._team, self.table, x, torch.arange(len(x)), slots)


class NativeHeadProducts:
    """``HeadProducts``: a head's matrices are an expert's, and its rows are that expert's rows."""

    def __init__(self, team: Team, weight: Tensor, plain_dim: int) -> None:
        """weight [A, N + V, R]."""
        self._team, self._num_heads = team, len(weight)
        self._keys = self._table([head[:plain_dim].T.contiguous() for head in weight])
        self._values = self._table([head[plain_dim:].contiguous() for head in weight])

    def absorb(self, queries: Tensor) -> Tensor:
        """See ``HeadProducts``."""
        return self._multiply(self._keys, queries)

    def values(self, attended: Tensor) -> Tensor:
        """See ``HeadProducts``."""
        return self._multiply(self._values, attended).flatten(1)

    def expand(self, latents: Tensor, first: int, last: int) -> Tensor:
        raise AssertionError("exact rows are absorbed")

    def _table(self, matrices: Sequence[Tensor]) -> SlotTable:
        out, width = matrices[0].shape
        table = SlotTable(ExpertShape(width, 0, out, matrices[0].dtype), len(matrices))
        for head, matrix in enumerate(matrices):
            table.put(head, 0, pack(self._team.library, matrix, team=self._team))
        return table

    def _multiply(self, table: SlotTable, rows: Tensor) -> Tensor:
        """[T, A, in] -> [T, A, out]."""
        inputs = rows.reshape(-1, rows.shape[2]).contiguous()
        heads = torch.arange(self._num_heads).repeat(len(rows))
        found = expert_pairs(self._team, table, inputs, torch.arange(len(inputs)), heads)
        return found.view(len(rows), self._num_heads, -1)


class NativeBlocks(BuildingBlocks):
    """Building blocks over a team of threads, for models on a CPU."""

    are_native: ClassVar[bool] = True
    are_exact: ClassVar[bool] = True

    def __init__(self, team: Team) -> None:
        super().__init__()
        self._team = team

    def linear(self, weight: Tensor, bias: Tensor | None = None, may_pack: bool = True) -> Linear:
        """A native product. A weight that is used elsewhere is copied."""
        return NativeLinear(self._team, weight, bias)

    def tied(self, weight: Tensor) -> tuple[Embedding, Linear]:
        """Both read the packed weight."""
        linear = NativeLinear(self._team, weight, None)
        return linear.matrix.rows, linear

    def mlp(
        self, gate_up: Callable[[], Tensor], down: Callable[[], Tensor], activation: Activation
    ) -> Mlp:
        if activation != "silu":
            return super().mlp(gate_up, down, activation)
        return NativeMlp(self._team, gate_up, down)

    def head_products(self, weight: Tensor, plain_dim: int) -> HeadProducts:
        return NativeHeadProducts(self._team, weight, plain_dim)

    def norm(self, weight: Tensor, eps: float) -> Norm:
        return NativeNorm(self._team, weight, eps)

    def half(self, half: AttentionHalf) -> StagedHalf:
        return NativeHalf(self._team, half)

    def heads(self, attention: HeadAttention, dtype: torch.dtype) -> AttendsRows:
        return NativeAttention(self._team, attention, dtype)

    def delta_net(self, net: DeltaNet) -> Mix:
        return NativeDeltaNet(self._team, net)

    def rope(
        self, config: RopeConfig, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> Rope:
        """Rotations; those that are computed in the step, row by row."""
        return Rope(config, max_positions, dtype, device, row_by_row=True)


class NativeAttention:
    """``HeadAttention`` in one native call."""

    def __init__(self, team: Team, attention: HeadAttention, dtype: torch.dtype) -> None:
        """``dtype`` of the model."""
        self.team = team
        """Computes it."""
        self.fields = _attention_fields(attention, dtype)
        """Its description in C; valid as long as this object."""
        self._attention = attention
        self._dtype = dtype

    def attend_rows(self, rows: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        """See ``AttendsRows``."""
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
        """Memory for the rotated queries [count, A, D], where a recorder reads them."""
        if context.attention.recorder is None:
            return None
        shape = self._attention.shape
        queries = torch.empty(count, shape.num_heads, shape.head_dim, dtype=self._dtype)
        rows.queries = queries.data_ptr()
        return queries

    def _report(self, queries: Tensor | None, cache: Tensor, context: LayerContext) -> None:
        """Let the recorder make attention maps, beside the kernel's result."""
        if queries is not None and (recorder := context.attention.recorder) is not None:
            recorder.attending(queries, cache, self._attention.batch(context))

    def _run(self, context: LayerContext, rows: RowsFields, stages: int) -> None:
        assert context.native is not None
        run_half(self.team, self.fields, context.native, rows, stages)


class NativeHalf(NativeAttention):
    """``AttentionHalf`` in one native call, or in three around the exchanges of projections."""

    def __init__(self, team: Team, half: AttentionHalf) -> None:
        """``half`` has native products."""
        super().__init__(team, half, half.norm1.dtype)
        _add_half(self.fields, half)
        self._half = half

    @property
    def routing(self) -> Routing | None:
        """Of the layer's routed experts; None: it has none."""
        return None if self._half.router is None else self._half.router.routing

    @property
    def is_one_call(self) -> bool:
        """There is no exchange in it."""
        return isinstance(self._half.projections, DenseProjections)

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> HalfSteps:
        """See ``Half``."""
        if context.native is None:
            return (yield from self._half.forward(hidden, cache, context))
        shape, parts = self._half.shape, self._half.projections
        if isinstance(parts, RoutedProjections):
            return (yield from routed_steps(self, shape, parts, hidden, cache, context))
        if isinstance(parts, LatentProjections):
            projected = parts.project(self.attend_rows, hidden, cache, context)
            return self.leave(hidden, projected, context)
        rows = RowsFields(cache=cache.data_ptr())
        queries = self._queries(rows, hidden.shape[0], context)
        output = self._leave(hidden, rows, ENTER | ATTEND | LEAVE, context)
        self._report(queries, cache, context)
        return output

    def enter(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Routes]:
        """See ``HalfStages``."""
        assert isinstance(self._half.projections, RoutedProjections)
        hidden = hidden.contiguous()
        normed = torch.empty_like(hidden)
        rows = RowsFields(hidden=hidden.data_ptr(), normed=normed.data_ptr())
        return normed, self._routed(self._half.projections.router, normed, rows, ENTER, context)

    def leave(self, hidden: Tensor, projected: Tensor, context: LayerContext) -> HalfOutput:
        """See ``HalfStages``."""
        projected = projected.contiguous()
        return self._leave(hidden, RowsFields(mixed=projected.data_ptr()), LEAVE, context)

    def _leave(
        self, hidden: Tensor, rows: RowsFields, stages: int, context: LayerContext
    ) -> HalfOutput:
        """Run stages up to the last one."""
        hidden = hidden.contiguous()
        normed = torch.empty_like(hidden)
        rows.hidden, rows.normed = hidden.data_ptr(), normed.data_ptr()
        router = self._half.router
        if router is None:
            self._run(context, rows, stages)
            return HalfOutput(hidden, normed, None)
        return HalfOutput(hidden, normed, self._routed(router, normed, rows, stages, context))

    def _routed(
        self,
        router: Router,
        normed: Tensor,
        rows: RowsFields,
        stages: int,
        context: LayerContext,
    ) -> Routes:
        """Run stages that end with a router, and report its choice."""
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


def _attention_fields(attention: HeadAttention, dtype: torch.dtype) -> HalfFields:
    """The description in C of what attends; its memory is that of ``attention``."""
    shape, norm, sinks = attention.shape, attention.qk_norm, attention.sinks
    qk_norm = NO_NORM
    if norm is not None:
        assert norm.is_contiguous()
        qk_norm = NORM_HEADS if norm.dim() == 2 else NORM_WIDTH
    return HalfFields(
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


def _add_half(fields: HalfFields, half: AttentionHalf) -> None:
    """Add what stands around attention in a half, whose memory it is."""
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
    """The description of a router's choice in C; ``correction`` must outlive it."""
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
