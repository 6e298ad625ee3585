"""Batch-invariant building blocks, for ``--deterministic``.

Each product is tested when it is made (``row_invariance``). If a variant fails the test, the next
variant is tried; if all fail, the worker does not start (``ConfigError``). Requires a single
compute thread: several threads would split sums and products according to the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from cluster.core.errors import ConfigError
from workers.model.attention_batch import (
    AttentionBatch,
    DecodeGroup,
    PrefillChunk,
    Workspace,
    chunk_mask,
    decode_mask,
)
from workers.model.batch_invariant.attention_tiles import TILE, attend_tiles
from workers.model.batch_invariant.row_invariance import (
    MAX_ROWS,
    NUM_TRIED_ROWS,
    Agree,
    random_rows,
    refusal,
    rows_agree,
)
from workers.model.building_blocks import BuildingBlocks
from workers.model.compute_threads import ComputeThreads
from workers.model.config import ModelConfig
from workers.model.delta_net import DeltaNet, Mix, TorchDeltaNet
from workers.model.latent import HeadProducts, LinearHeadProducts
from workers.model.layers import Attend, Linear, rms_norm
from workers.model.rope import Rope, RopeConfig

MIN_ROWS = 8
"""Minimum number of rows of a product; fewer rows are padded with zeros."""
MIN_PACKED_ROWS = 2
"""Minimum number of rows of a product whose weight is in oneDNN's packed layout; fewer rows are
padded with zeros."""
BLOCK_ROWS = 32
"""Fixed number of rows of a product, for machines on which a minimum is not enough for batch
invariance."""


@dataclass(frozen=True, slots=True)
class ProductVariant:
    """Way to compute a linear product: layout of the weight, and numbers of rows."""

    may_pack: bool
    """Whether the weight may be in oneDNN's packed layout, if this is faster."""
    block_rows: int = 0
    """Fixed number of rows with which every product is computed; 0: any number from a minimum to
    ``MAX_ROWS``."""


LINEAR_FORMS = (ProductVariant(True), ProductVariant(False), ProductVariant(False, BLOCK_ROWS))


class RowInvariantLinear(Linear):
    """``Linear`` in which a row's bits do not depend on other rows: it pads few rows and splits
    many, so that all products have tested numbers of rows."""

    __slots__ = ("_max_rows", "_min_rows")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        form: ProductVariant,
        compute_threads: ComputeThreads,
    ) -> None:
        assert compute_threads.count == 1, "rows and weights are never split"
        super().__init__(weight, bias, form.may_pack, compute_threads)
        least = MIN_PACKED_ROWS if self._is_packed else MIN_ROWS
        self._min_rows = form.block_rows or least
        self._max_rows = form.block_rows or MAX_ROWS

    def __call__(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias: [rows, in] -> [rows, out]."""
        if len(x) <= self._max_rows:
            return self._at_least(x, self._min_rows)
        pieces = torch.split(x, self._max_rows)
        return torch.cat([self._at_least(piece, self._min_rows) for piece in pieces])

    def _at_least(self, x: Tensor, num_rows: int) -> Tensor:
        rows = len(x)
        if rows >= num_rows:
            return super().__call__(x)
        padded = x.new_zeros(num_rows, x.shape[1])
        padded[:rows] = x
        return super().__call__(padded)[:rows]


class RowInvariantBlocks(BuildingBlocks):
    """Batch-invariant building blocks: for each shape of a product, they use the first variant in
    ``LINEAR_FORMS`` that passes a test on this machine."""

    are_exact: ClassVar[bool] = True

    def __init__(self, device: torch.device, agree: Agree = rows_agree) -> None:
        """``agree``: test of whether a function is batch-invariant. Raises ``ConfigError`` for
        devices other than a CPU."""
        check_device(device)
        super().__init__()
        self._agree = agree
        self._forms: dict[tuple[object, ...], ProductVariant] = {}

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        may_pack: bool = True,
        may_quantize: bool = True,
    ) -> Linear:
        """Return a linear product, computed with the first variant that is batch-invariant. Raises
        ``ConfigError`` if none is."""
        key = (weight.shape, weight.dtype, bias is None, may_pack)
        if key in self._forms:
            return RowInvariantLinear(weight, bias, self._forms[key], self._compute_threads)
        rows = random_rows(NUM_TRIED_ROWS, weight.shape[1], dtype=weight.dtype)
        for form in LINEAR_FORMS:
            if may_pack or not form.may_pack:
                linear = RowInvariantLinear(weight, bias, form, self._compute_threads)
                if self._agree(linear, rows):
                    self._forms[key] = form
                    return linear
        raise refusal(f"the product with a {weight.dtype} matrix {list(weight.shape)}")

    def head_products(self, weight: Tensor, plain_dim: int) -> HeadProducts:
        """Return batch-invariant products for each head of latent attention. Raises ``ConfigError``
        if this machine has none."""
        return LinearHeadProducts(weight, plain_dim, self.linear)

    def delta_net(self, net: DeltaNet) -> Mix:
        """Return the function that computes a Gated DeltaNet layer row by row."""
        return TorchDeltaNet(net, row_by_row=True)

    def attention(self, config: ModelConfig, dtype: torch.dtype) -> Attend:
        """Return batch-invariant attention, ``attend_tiles``. Raises ``ConfigError`` if tests show
        that attention, norm or softmax are not batch-invariant on this machine."""
        norm = random_rows(config.hidden_size, dtype=dtype)
        rows = random_rows(NUM_TRIED_ROWS, config.hidden_size, dtype=dtype)
        if not self._agree(lambda x: rms_norm(x, norm, config.rms_norm_eps), rows):
            raise refusal("the norm")
        if not self._agree(lambda x: torch.softmax(x, -1, dtype=torch.float32), rows):
            raise refusal("the softmax")
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        if not tiles_agree(*heads, dtype, config.latent_rank):
            raise refusal("attention")
        return attend_tiles

    def rope(
        self, config: RopeConfig, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> Rope:
        """Return a rotary embedding in which a row's bits do not depend on other rows."""
        return Rope(config, max_positions, dtype, device, row_by_row=True)


def check_device(device: torch.device) -> None:
    """Raise ``ConfigError`` unless the device is a CPU: other kernels have not been tested."""
    if device.type != "cpu":
        raise ConfigError("deterministic", True, f"needs device cpu (is {device.type})")


def tiles_agree(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    latent_rank: int | None = None,
) -> bool:
    """Return whether ``attend_tiles`` computes the same bits for a position in a whole prompt, in
    chunks of the prompt, and as a decode row."""
    trial = _AttentionTrial(num_heads, num_kv_heads, head_dim, dtype, latent_rank)
    whole = trial.prefill(0, trial.length)
    for bounds in ((0, 1, 2, 5, 12, 64, 65, 130), (0, 3, 67, 130), (0, 129, 130)):
        parts = [trial.prefill(a, b) for a, b in pairwise(bounds)]
        if not torch.equal(torch.cat(parts), whole):
            return False
    return all(
        torch.equal(trial.decode(positions), whole[list(positions)])
        for positions in ((0,), (63,), (64,), (129,), (0, 63, 64, 127, 128, 129), range(1, 130, 3))
    )


class _AttentionTrial:
    """Test data for batch-invariant attention: a random sequence of 130 tokens in blocks of 16,
    with all keys and values in a KV cache."""

    length = 2 * TILE + 2
    _block_size = 16

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        latent_rank: int | None,
    ) -> None:
        self._latent_rank = latent_rank
        self._num_blocks = -(-self.length // self._block_size)
        num_vectors = 2 * num_kv_heads if latent_rank is None else 1
        shape = (num_vectors, self._num_blocks + 1, self._block_size, head_dim)
        self._cache = random_rows(*shape, dtype=dtype)
        self._cache[:, -1] = 0
        self._queries = random_rows(self.length, num_heads, head_dim, dtype=dtype)
        flat = self._cache[:, :-1].flatten(1, 2)[:, : self.length].transpose(0, 1)
        self._keys, self._values = flat[:, :num_kv_heads], flat[:, num_kv_heads:]
        self._workspace = Workspace(dtype, torch.device("cpu"))
        self._compute_threads = ComputeThreads()

    def prefill(self, first: int, last: int) -> Tensor:
        """Return the attention outputs of positions ``first`` to ``last`` - 1 as one chunk."""
        cpu = torch.device("cpu")
        blocks = torch.arange(-(-last // self._block_size))
        chunk = PrefillChunk(0, last - first, last, blocks, chunk_mask(first, last - first, cpu))
        return self._attend(torch.arange(first, last), (), (chunk,))

    def decode(self, positions: range | tuple[int, ...]) -> Tensor:
        """Return the attention outputs of ``positions`` as decode rows, each as if the sequence
        ended at this position."""
        rows = torch.tensor(list(positions))
        blocks = torch.arange(self._num_blocks).repeat(len(rows))
        width = self._num_blocks * self._block_size
        visible = decode_mask(rows + 1, width)
        return self._attend(rows, (DecodeGroup(0, len(rows), blocks, visible),), ())

    def _attend(
        self,
        rows: Tensor,
        decodes: tuple[DecodeGroup, ...],
        prefills: tuple[PrefillChunk, ...],
    ) -> Tensor:
        batch = AttentionBatch(
            rows,
            decodes,
            prefills,
            (self._workspace,),
            self._compute_threads,
            latent_rank=self._latent_rank,
        )
        values = self._values[rows] if self._latent_rank is None else None
        return attend_tiles(self._queries[rows], self._keys[rows], values, self._cache, batch)
