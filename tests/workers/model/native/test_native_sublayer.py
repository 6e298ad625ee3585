"""Native attention halves: near torch's, and to the bit the same in any chunks, batch and team."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.workers.native.builds import NAMES, team
from workers.kv.block_tables import BlockTables
from workers.model.attention import attend, attention_map
from workers.model.attention_batch import (
    AttentionBatch,
    PrefillChunk,
    Recorder,
    RowChunks,
    Workspace,
    chunk_mask,
)
from workers.model.attention_sublayer import (
    AttentionShape,
    AttentionSublayer,
    DenseProjections,
    RoutedProjections,
    SublayerOutput,
    SublayerSteps,
    TorchAttentionSublayer,
)
from workers.model.building_blocks import BuildingBlocks
from workers.model.compute_threads import ComputeThreads
from workers.model.latent import LatentProjections, LatentShape
from workers.model.layers import Dispatch, LayerContext
from workers.model.native.blocks import NativeBlocks
from workers.model.rope import Rope, RopeConfig
from workers.model.routing import Router, Routing, Scoring

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
BLOCK = 4
HIDDEN = 48
LENGTHS = (37, 9, 20)
"""Rows of three sequences."""
TABLES = ((3, 9, 1, 12, 7, 20, 4, 15, 2, 18), (5, 0, 11), (6, 8, 10, 13, 14))
NUM_BLOCKS = 22


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of half."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: str = ""
    """``head`` or ``width``."""
    clip: float | None = None
    window: int | None = None
    has_bias: bool = False
    scoring: Scoring | None = "softmax"
    """None: no router."""
    is_normed: bool = False
    num_groups: int = 1
    is_routed: bool = False
    has_sinks: bool = False
    latent_rank: int | None = None

    @property
    def num_vectors(self) -> int:
        """In the cache, of a token."""
        return 2 * self.num_kv_heads if self.latent_rank is None else 1

    @property
    def rotated_dim(self) -> int:
        return self.head_dim - (self.latent_rank or 0)

    @property
    def latent(self) -> LatentShape:
        """The parts of heads where they are made of a latent vector."""
        assert self.latent_rank is not None
        return LatentShape(
            num_heads=self.num_heads,
            rank=self.latent_rank,
            plain_dim=14,
            rotated_dim=self.rotated_dim,
            value_dim=11,
            scale=0.3,
        )


CASES = {
    "olmoe": Case(num_heads=3, num_kv_heads=3, head_dim=16, qk_norm="width"),
    "gqa, clip, bias": Case(
        num_heads=4, num_kv_heads=2, head_dim=64, qk_norm="width", clip=0.7, has_bias=True
    ),
    "wide heads": Case(num_heads=2, num_kv_heads=2, head_dim=80),
    "many heads for one": Case(num_heads=12, num_kv_heads=1, head_dim=24, is_normed=True),
    "dots1": Case(
        num_heads=4,
        num_kv_heads=4,
        head_dim=10,
        qk_norm="head",
        window=7,
        scoring="sigmoid",
        is_normed=True,
        num_groups=4,
    ),
    "window of one": Case(num_heads=6, num_kv_heads=2, head_dim=36, window=1),
    "sinks": Case(num_heads=20, num_kv_heads=2, head_dim=16, window=9, has_sinks=True),
    "dense layer": Case(num_heads=2, num_kv_heads=1, head_dim=6, scoring=None),
    "latent": Case(num_heads=12, num_kv_heads=1, head_dim=72, latent_rank=64, scoring="sigmoid"),
    "odd latent": Case(num_heads=3, num_kv_heads=1, head_dim=39, latent_rank=33),
    "jetmoe": Case(
        num_heads=6, num_kv_heads=3, head_dim=16, scoring="softmax_of_best", is_routed=True
    ),
}


def make(case: Case, dtype: torch.dtype, blocks: BuildingBlocks) -> AttentionSublayer:
    """The same random half from any blocks."""
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return values.mul_(shape[-1] ** -0.5).to(dtype)

    def norm(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.5).to(dtype)

    def router(bank: int, scoring: Scoring) -> Router:
        is_sigmoid = scoring == "sigmoid"
        routing = Routing(
            bank=bank,
            num_experts=8,
            top_k=2,
            scoring=scoring,
            is_normed=case.is_normed,
            scale=2.5,
            num_groups=case.num_groups,
            top_groups=max(case.num_groups // 2, 1),
        )
        matrix = weight(8, HIDDEN)
        linear = blocks.linear(matrix.float() if is_sigmoid else matrix)
        return Router(
            routing=routing, linear=linear, correction=weight(8).float() if is_sigmoid else None
        )

    dim, heads, kv_heads = case.head_dim, case.num_heads, case.num_kv_heads
    projections: DenseProjections | RoutedProjections | LatentProjections
    if case.latent_rank is not None:
        shape = case.latent
        made = weight(heads, shape.plain_dim + shape.value_dim, shape.rank)
        queries = blocks.linear(weight(heads * shape.query_dim, HIDDEN))
        projections = LatentProjections(
            shape=shape,
            norm1=blocks.norm(norm(HIDDEN), 1e-5),
            queries=lambda x, context: queries(x),
            latents=blocks.linear(weight(dim, HIDDEN)),
            latent_norm=blocks.norm(norm(shape.rank), 1e-6),
            heads=blocks.head_products(made, shape.plain_dim),
            can_expand=not blocks.are_exact,
            output=blocks.linear(weight(HIDDEN, heads * shape.value_dim)),
        )
    elif case.is_routed:
        projections = RoutedProjections(
            router=router(0, "softmax_of_best"),
            kv=blocks.linear(weight(2 * kv_heads * dim, HIDDEN)),
            bias=weight(HIDDEN),
        )
    else:
        width = (heads + 2 * kv_heads) * dim
        projections = DenseProjections(
            qkv=blocks.linear(weight(width, HIDDEN), weight(width) if case.has_bias else None),
            output=blocks.linear(
                weight(HIDDEN, heads * dim), weight(HIDDEN) if case.has_bias else None
            ),
        )
    qk_norm = norm(heads + kv_heads, dim) if case.qk_norm else None
    if qk_norm is not None and case.qk_norm == "width":
        qk_norm = qk_norm.flatten()
    return blocks.sublayer(
        TorchAttentionSublayer(
            shape=AttentionShape(
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=dim,
                eps=1e-5,
                clip=case.clip,
                window=case.window,
                scale=None if case.latent_rank is None else case.latent.scale,
                latent_rank=case.latent_rank,
            ),
            norm1=norm(HIDDEN),
            projections=projections,
            qk_norm=qk_norm,
            norm2=norm(HIDDEN),
            router=None if case.scoring is None else router(1, case.scoring),
            attend=attend,
            sinks=torch.randn(heads, generator=generator) if case.has_sinks else None,
        )
    )


@dataclass
class Notes:
    """``Recorder`` of one batch after the other."""

    logits: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)

    def hidden(self, state: Tensor) -> None:
        raise AssertionError("a half has no hidden states")

    def router(self, bank: int, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
        if bank == 1:
            self.logits.append(logits.float())

    def attending(self, queries: Tensor, cache: Tensor, batch: AttentionBatch) -> None:
        self.queries.append(queries.float())
        self.maps += [attention_map(queries, cache, c, batch) for c in batch.prefills]


Chunk = tuple[int, int, int]
"""Sequence, first and last + 1 position."""
WHOLE = [[(i, 0, n)] for i, n in enumerate(LENGTHS)]
"""Each sequence alone, at once."""


def run_experts(steps: SublayerSteps) -> SublayerOutput:
    """Drive a half; experts of its projections are sums that do not mix rows."""
    outputs: Tensor | None = None
    while True:
        try:
            sent = next(steps) if outputs is None else steps.send(outputs)
        except StopIteration as stop:
            result: SublayerOutput = stop.value
            return result
        assert isinstance(sent, Dispatch)
        assert next(steps) is None
        scale = 1 + sent.topk_ids.unsqueeze(-1) / 8
        if sent.exchange == 0:
            outputs = (sent.rows.unsqueeze(1) * scale).to(sent.rows.dtype)
        else:
            slots = sent.rows * scale * sent.topk_weights.unsqueeze(-1)
            outputs = (slots[:, 0] + slots[:, 1]).to(sent.rows.dtype)


def serve(
    half: AttentionSublayer,
    case: Case,
    dtype: torch.dtype,
    batches: Sequence[Sequence[Chunk]],
    recorder: Recorder | None = None,
    cache: Tensor | None = None,
) -> list[tuple[Tensor, ...]]:
    """Hidden states, their norm, ids and weights of each sequence, after batch upon batch.

    ``cache`` is a new one in the model's dtype by default.
    """
    generator = torch.Generator().manual_seed(2)
    states = [torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in LENGTHS]
    if cache is None:
        cache = torch.zeros(case.num_vectors, NUM_BLOCKS, BLOCK, case.head_dim, dtype=dtype)
    config = RopeConfig(
        head_dim=case.rotated_dim,
        rotary_dim=case.rotated_dim,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
    )
    rope = Rope(config, 64, dtype, CPU)
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in LENGTHS]
    assert rope.waves_by_position is not None
    for turn, chunks in enumerate(batches):
        batch = make_batch(chunks, dtype, recorder)
        positions = torch.cat([torch.arange(first, last) for _, first, last in chunks])
        cos, sin = rope.rows(positions, positions)
        assert batch.chunks is not None
        windows = {} if case.window is None else {case.window: batch.within(case.window)}
        waves = rope.waves_by_position if turn % 2 else (cos, sin)
        fields = batch.chunks.fields(*waves, cache, waves_by_position=bool(turn % 2))
        context = LayerContext(cos, sin, batch, windows, fields)
        hidden = torch.cat([states[i][first:last] for i, first, last in chunks])
        output = run_experts(half.forward(hidden, cache, context))
        parts = [output.hidden, output.normed]
        if output.routes is not None:
            parts += [output.routes.topk_ids, output.routes.topk_weights]
        row = 0
        for i, first, last in chunks:
            found[i].append(tuple(part[row : row + last - first] for part in parts))
            row += last - first
    return [tuple(torch.cat(rows) for rows in zip(*own, strict=True)) for own in found]


def make_batch(
    chunks: Sequence[Chunk], dtype: torch.dtype, recorder: Recorder | None
) -> AttentionBatch:
    places, slots, prefills, row = [], [], [], 0
    tables = BlockTables(len(TABLES), max(map(len, TABLES)))
    for seat, blocks_of_one in enumerate(TABLES):
        tables.put(seat, 0, blocks_of_one)
    for i, first, last in chunks:
        table = TABLES[i]
        places.append((row, last - first, first, tables.address(i)))
        slots += [table[p // BLOCK] * BLOCK + p % BLOCK for p in range(first, last)]
        blocks = torch.tensor(table[: -(-last // BLOCK)])
        mask = chunk_mask(first, last - first, CPU)
        prefills.append(PrefillChunk(row, row + last - first, last, blocks, mask))
        row += last - first
    return AttentionBatch(
        slot_mapping=torch.tensor(slots),
        decodes=(),
        prefills=tuple(prefills),
        workspaces=(Workspace(dtype, CPU),),
        compute_threads=ComputeThreads(),
        recorder=recorder,
        chunks=RowChunks(
            row, torch.tensor(places), tables.array, max(last for _, _, last in chunks)
        ),
    )


def in_chunks(*bounds: int) -> list[list[Chunk]]:
    """Chunks of the first sequence, and then the other sequences."""
    pairs = zip((0, *bounds), (*bounds, LENGTHS[0]), strict=True)
    return [[(0, first, last)] for first, last in pairs] + WHOLE[1:]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", NAMES)
def test_float32_is_near_torch(name: str, case: Case) -> None:
    dtype = torch.float32
    ours, theirs = Notes(), Notes()
    found = serve(make(case, dtype, NativeBlocks(team(name))), case, dtype, WHOLE, ours)
    expected = serve(make(case, dtype, BuildingBlocks()), case, dtype, WHOLE, theirs)
    for own, other in zip(found, expected, strict=True):
        for tensor, wanted in zip(own, other, strict=True):
            assert tensor.dtype == wanted.dtype
            assert torch.allclose(tensor.double(), wanted.double(), rtol=0, atol=2e-5)
    for seen in ("queries", "logits", "maps"):
        for noted, wanted in zip(getattr(ours, seen), getattr(theirs, seen), strict=True):
            assert (noted - wanted).abs().max() < 2e-5, seen


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_near_float32_as_torch(name: str, case: Case) -> None:
    """Ids differ where experts are about equal, so the routers' logits are compared."""
    dtype = torch.bfloat16
    notes = [Notes(), Notes(), Notes()]
    found = serve(make(case, dtype, NativeBlocks(team(name))), case, dtype, WHOLE, notes[0])
    theirs = serve(make(case, dtype, BuildingBlocks()), case, dtype, WHOLE, notes[1])
    for own, other in zip(found, theirs, strict=True):
        for tensor, wanted in zip(own[:2], other[:2], strict=True):
            assert tensor.dtype == wanted.dtype == dtype
            assert (tensor.float() - wanted.float()).abs().max() < 0.1
            assert (tensor.float() - wanted.float()).abs().mean() < 0.01
    for logits, wanted in zip(notes[0].logits, notes[1].logits, strict=True):
        assert (logits - wanted).abs().max() < 0.1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_bits_depend_on_the_row_alone(name: str, dtype: torch.dtype, case: Case) -> None:
    half = make(case, dtype, NativeBlocks(team(name)))
    whole = serve(half, case, dtype, WHOLE)
    together = [[(0, 0, 30), (2, 0, 17)], [(1, 0, 9), (0, 30, 31), (2, 17, 20)], [(0, 31, 37)]]
    decodes = in_chunks(*range(1, LENGTHS[0]))
    for batches in (decodes, in_chunks(1, 3, 8, 19, 36), together):
        assert_equal(serve(half, case, dtype, batches), whole)
    for count in (2, 3):
        other = make(case, dtype, NativeBlocks(team(name, count)))
        assert_equal(serve(other, case, dtype, WHOLE), whole)
        assert_equal(serve(other, case, dtype, together), whole)
        assert_equal(serve(other, case, dtype, decodes), whole)
    assert_equal(serve(half, case, dtype, decodes, Notes()), whole)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float32_has_the_same_bits_on_all_instruction_sets(case: Case) -> None:
    found = [
        serve(make(case, torch.float32, NativeBlocks(team(name))), case, torch.float32, WHOLE)
        for name in NAMES
    ]
    for other in found[1:]:
        assert_equal(other, found[0])


def assert_equal(found: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> None:
    for own, other in zip(found, expected, strict=True):
        for tensor, wanted in zip(own, other, strict=True):
            assert torch.equal(tensor, wanted)
