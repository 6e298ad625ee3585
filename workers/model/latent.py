"""Multi-head latent attention: one latent vector yields the keys and values of all heads.

A layer's cache stores only a token's latent vector [R] and one rotated key [P]. The same attention
can be computed in two ways:

- absorbed: each head's queries are multiplied with the matrix that would make its keys. Heads then
  attend to the latent vectors themselves, as to one key head of R + P elements, and the value
  matrix is applied to the result. This reads the least memory and is used for decodes.
- expanded: keys and values of all heads are computed from the latent vectors. Each pair of a query
  and a key then costs less (in DeepSeek-V3 320 products instead of 1,088), so this is used for long
  chunks of prompts.

If a row's result must not depend on how its prompt is split, all rows use the absorbed form.

Source: DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language
Model" (2024), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.attention import write_rows
from workers.model.attention_batch import (
    GPU_PIECE_BYTES,
    PIECE_BYTES,
    AttentionBatch,
    PrefillChunk,
)
from workers.model.layers import LayerContext, Linear, Norm
from workers.model.rope import rotate


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentShape:
    """Dimensions of multi-head latent attention (MLA): parts of queries, keys and values."""

    num_heads: int
    """A: number of heads."""
    rank: int
    """R: elements of the latent vector."""
    plain_dim: int
    """N: elements of a head's query and key without rotary embedding."""
    rotated_dim: int
    """P: elements of a head's query and key with rotary embedding; all heads share these elements
    of the key."""
    value_dim: int
    """V: elements of a head's value."""
    scale: float
    """Factor of the attention scores."""

    @property
    def query_dim(self) -> int:
        return self.plain_dim + self.rotated_dim

    @property
    def cached_dim(self) -> int:
        return self.rank + self.rotated_dim

    @property
    def min_expanded_rows(self) -> int:
        """Minimum rows of a prompt chunk for which it is cheaper to compute keys and values from
        latent vectors (expand) than to attend to the latent vectors themselves (absorb)."""
        made = self.rank * (self.plain_dim + self.value_dim)
        absorbed, expanded = self.cached_dim + self.rank, self.query_dim + self.value_dim
        return made // max(absorbed - expanded, 1) + 1


class HeadProducts(Protocol):
    """Products of each of A heads with its part of the matrix [A, N + V, R], which turns a latent
    vector [R] into the head's key [N] and value [V] (multi-head latent attention)."""

    def absorb(self, queries: Tensor) -> Tensor:
        """Multiply queries [T, A, N] by each head's key matrix: [T, A, R]. Products of the result
        with latent vectors [R] are attention scores."""

    def values(self, attended: Tensor) -> Tensor:
        """Turn attention-weighted sums of latent vectors, [T, A, R], into the sums of the values,
        [T, A * V]."""

    def expand(self, latents: Tensor, first: int, last: int) -> Tensor:
        """Compute keys and values [L, last - first, N + V] of heads ``first`` to ``last`` - 1 from
        latent vectors [L, R]."""


class TorchHeadProducts:
    """``HeadProducts`` (key and value products of latent attention) with ``torch.bmm``."""

    def __init__(self, weight: Tensor, plain_dim: int) -> None:
        """``weight`` [A, N + V, R], where N is ``plain_dim``; see ``HeadProducts``."""
        self._weight = weight
        self._keys, self._values = weight[:, :plain_dim], weight[:, plain_dim:]

    def absorb(self, queries: Tensor) -> Tensor:
        """Multiply queries by key matrices: [T, A, N] -> [T, A, R]; see ``HeadProducts``."""
        return torch.bmm(queries.transpose(0, 1), self._keys).transpose(0, 1)

    def values(self, attended: Tensor) -> Tensor:
        """Turn latent vectors into values: [T, A, R] -> [T, A * V]; see ``HeadProducts``."""
        products = torch.bmm(attended.transpose(0, 1), self._values.transpose(1, 2))
        return products.transpose(0, 1).reshape(len(attended), -1)

    def expand(self, latents: Tensor, first: int, last: int) -> Tensor:
        """Compute keys and values [L, last - first, N + V]; see ``HeadProducts``."""
        rows = functional.linear(latents, self._weight[first:last].flatten(0, 1))
        return rows.view(len(latents), last - first, -1)


class LinearHeadProducts:
    """``HeadProducts`` with two ``Linear`` objects (key, value) per head, so that a row's bits do
    not depend on other rows."""

    def __init__(self, weight: Tensor, plain_dim: int, linear: Callable[[Tensor], Linear]) -> None:
        """``weight`` [A, N + V, R], where N is ``plain_dim``; see ``HeadProducts``. ``linear``
        makes a product from a weight [out, in]."""
        self._keys = [linear(head[:plain_dim].T.contiguous()) for head in weight]
        self._values = [linear(head[plain_dim:].contiguous()) for head in weight]

    def absorb(self, queries: Tensor) -> Tensor:
        """Multiply queries by key matrices: [T, A, N] -> [T, A, R]; see ``HeadProducts``."""
        heads = zip(self._keys, queries.unbind(1), strict=True)
        return torch.stack([product(x.contiguous()) for product, x in heads], 1)

    def values(self, attended: Tensor) -> Tensor:
        """Turn latent vectors into values: [T, A, R] -> [T, A * V]; see ``HeadProducts``."""
        heads = zip(self._values, attended.unbind(1), strict=True)
        return torch.cat([product(x.contiguous()) for product, x in heads], 1)

    def expand(self, latents: Tensor, first: int, last: int) -> Tensor:
        raise AssertionError("exact rows are absorbed")


AttendRows = Callable[[Tensor, Tensor, LayerContext], Tensor]
"""Function with the arguments of ``RowAttention.attend_rows`` for latent attention. Its rows
[T, (A + 1) * (R + P)] are A queries, already multiplied by the key matrices, and one key: the
latent vector [R] and P elements that are still to be rotated, as those of the queries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentProjections:
    """Multi-head latent attention of one layer, from the first norm to the output projection, with
    its weights."""

    shape: LatentShape
    norm1: Norm
    """Norm of the residual stream [T, H] before attention."""
    queries: Callable[[Tensor, LayerContext], Tensor]
    """Function that projects normed rows [T, H] to the queries of all heads, [T, A * (N + P)]."""
    latents: Linear
    """Projection of a normed row [H] to its latent vector [R] and the key elements [P] that all
    heads share."""
    latent_norm: Norm
    """Norm of latent vectors [T, R]."""
    heads: HeadProducts
    can_expand: bool
    """Whether prompt rows may attend to keys and values computed from the latent vectors. If
    they do, the last bits of their results depend on how a prompt is split into chunks."""
    output: Linear
    """Output projection, A * V -> H."""

    def project(
        self, attend_rows: AttendRows, hidden: Tensor, cache: Tensor, context: LayerContext
    ) -> Tensor:
        """Run latent attention: residual stream [T, H] -> result of the output projection [T, H].

        Writes the rows' latent vectors and rotated keys to ``cache``.
        """
        normed = self.norm1(hidden.clone())
        queries = self.queries(normed, context).view(len(hidden), -1, self.shape.query_dim)
        latents = self._latents(normed, context)
        batch = context.attention
        expanded = batch.prefills if self._expands(batch) else ()
        if not expanded:
            attended = self._absorbed(attend_rows, queries, latents, cache, context)
            return context.multiply(self.output, attended)
        first, parts = expanded[0].first, []
        if first:
            own = replace(batch, slot_mapping=batch.slot_mapping[:first], prefills=())
            decodes = replace(
                context, cos=context.cos[:first], sin=context.sin[:first], attention=own
            )
            rows = queries[:first], latents[:first]
            parts.append(self._absorbed(attend_rows, *rows, cache, decodes))
        prompts = replace(
            context,
            cos=context.cos[first:],
            sin=context.sin[first:],
            attention=replace(batch, slot_mapping=batch.slot_mapping[first:]),
        )
        parts.append(self._expanded(queries[first:], latents[first:], cache, prompts))
        return context.multiply(self.output, torch.cat(parts))

    def _expands(self, batch: AttentionBatch) -> bool:
        """Whether the batch's prompt rows attend to expanded keys and values; never with a
        recorder, which receives absorbed queries."""
        num_rows = sum(chunk.last - chunk.first for chunk in batch.prefills)
        is_long = num_rows >= self.shape.min_expanded_rows * len(batch.prefills)
        return self.can_expand and batch.recorder is None and is_long

    def _latents(self, normed: Tensor, context: LayerContext) -> Tensor:
        """Return latent vectors and keys [T, R + P]; the last P elements are not yet rotated."""
        rows = context.multiply(self.latents, normed)
        latents, key = torch.split(rows, [self.shape.rank, self.shape.rotated_dim], 1)
        return torch.cat((self.latent_norm(latents.contiguous()), key), 1)

    def _absorbed(
        self,
        attend_rows: AttendRows,
        queries: Tensor,
        latents: Tensor,
        cache: Tensor,
        context: LayerContext,
    ) -> Tensor:
        """Attend to the latent vectors themselves, with absorbed queries: [T, A * V]."""
        shape, num_rows = self.shape, len(queries)
        rows = queries.new_empty(num_rows, shape.num_heads + 1, shape.cached_dim)
        plain, rotated = torch.split(queries, [shape.plain_dim, shape.rotated_dim], 2)
        rows[:, :-1, : shape.rank] = self.heads.absorb(plain)
        rows[:, :-1, shape.rank :] = rotated
        rows[:, -1] = latents
        attended = attend_rows(rows.view(num_rows, -1), cache, context)
        return self.heads.values(attended.view(num_rows, shape.num_heads, shape.rank))

    def _expanded(
        self, queries: Tensor, latents: Tensor, cache: Tensor, context: LayerContext
    ) -> Tensor:
        """Attend to expanded keys and values with the n rows of all prompt chunks: [n, A * V]."""
        shape, batch = self.shape, context.attention
        rows = latents.unsqueeze(1)
        keys = rotate_end(rows, shape.rank, context.cos, context.sin)
        write_rows(keys, None, cache, batch.slot_mapping)
        queries = rotate_end(queries, shape.plain_dim, context.cos, context.sin)
        first = batch.prefills[0].first
        return torch.cat(
            [
                self._attend_expanded(queries[c.first - first : c.last - first], cache, c, batch)
                for c in batch.prefills
            ]
        )

    def _attend_expanded(
        self, queries: Tensor, cache: Tensor, chunk: PrefillChunk, batch: AttentionBatch
    ) -> Tensor:
        """Attend to expanded keys and values with the queries [rows, A, N + P] of one prompt chunk:
        [rows, A * V]."""
        shape = self.shape
        found = batch.workspaces[0].gather(cache, chunk.blocks)
        cached = found.view(-1, shape.cached_dim)[: chunk.length]
        latents, rotated = cached[:, : shape.rank], cached[:, shape.rank :].unsqueeze(1)
        parts, at_once = [], self._heads_per_piece(latents)
        for first in range(0, shape.num_heads, at_once):
            last = min(first + at_once, shape.num_heads)
            made = self.heads.expand(latents, first, last)
            plain, values = torch.split(made, [shape.plain_dim, shape.value_dim], 2)
            keys = torch.cat((plain, rotated.expand(-1, last - first, -1)), 2)
            output = functional.scaled_dot_product_attention(
                queries[:, first:last].transpose(0, 1).unsqueeze(0),
                keys.transpose(0, 1).unsqueeze(0),
                values.transpose(0, 1).unsqueeze(0),
                attn_mask=chunk.visible,
                is_causal=chunk.visible is None,
                scale=shape.scale,
            )
            parts.append(output.squeeze(0).transpose(0, 1))
        return torch.cat(parts, 1).flatten(1)

    def _heads_per_piece(self, latents: Tensor) -> int:
        """Number of heads whose keys and values are computed from ``latents`` [L, R] at a time, to
        limit memory."""
        shape = self.shape
        row = 2 * shape.plain_dim + shape.rotated_dim + shape.value_dim  # as made, and with keys
        piece = PIECE_BYTES if latents.device.type == "cpu" else GPU_PIECE_BYTES
        return max(piece // (len(latents) * row * latents.itemsize), 1)


def rotate_end(heads: Tensor, first: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads [T, heads, D] with rotary embedding applied to elements ``first`` to D - 1."""
    return torch.cat((heads[..., :first], rotate(heads[..., first:], cos, sin)), -1)
