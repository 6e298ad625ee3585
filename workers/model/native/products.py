"""Products and norms with native kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.layers import Linear, row_wise
from workers.native.experts import ExpertShape, SlotTable, expert_pairs
from workers.native.matrix import Matrix
from workers.native.norm import norm_rows
from workers.native.panels import PANEL, pack
from workers.native.quantized import pack_weight
from workers.native.rounding import round_product, round_weight
from workers.native.thread_team import ThreadTeam
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import Weight
from workers.quantization.rounding import candidates


class NativeLinear(Linear):
    """Linear product with a native kernel; keeps the weight packed and possibly quantized."""

    __slots__ = ("matrix",)

    def __init__(
        self,
        team: ThreadTeam,
        weight: Tensor,
        bias: Tensor | None,
        form: WeightFormat | None = None,
    ) -> None:
        """``form``: format to which the weight is quantized if its width is even; of the format's
        variants (``candidates``), the one with the least error is used. None: not quantized."""
        kept: Weight = weight
        if form is not None and weight.shape[1] % 2 == 0:
            forms = candidates(form, weight.shape[1])
            kept = round_product(team.library, weight, forms, team)
        self.matrix = Matrix(team, kept, bias, weight.dtype)

    def weight(self) -> Tensor:
        return self.matrix.weight()

    def __call__(self, x: Tensor) -> Tensor:
        return self.matrix.multiply(x)


class NativeNorm:
    """Root mean square norm of rows [T, H], in place."""

    __slots__ = ("_team", "eps", "weight")

    def __init__(self, team: ThreadTeam, weight: Tensor, eps: float) -> None:
        """``weight`` [H], contiguous."""
        self._team, self.weight, self.eps = team, weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return norm_rows(self._team, x, self.weight, self.eps)


class NativeMlp:
    """Gated MLP with silu and native kernels. Runs as a bank of one expert, with the rounding of
    experts.

    If its stages (``gate_up``, ``activate``, ``down``) are called separately, results between them
    are rounded to the weights' dtype.
    """

    __slots__ = ("_team", "table")

    def __init__(
        self,
        team: ThreadTeam,
        gate_up: Callable[[], Tensor],
        down: Callable[[], Tensor],
        form: WeightFormat | None = None,
    ) -> None:
        """Read and pack the two weights, one at a time; see ``BuildingBlocks.mlp``.

        ``form``: format to which both weights are quantized if their widths are even; of the
        format's variants (``candidates``), the one with the least error of the first weight is
        used. None: not quantized.
        """
        self._team = team
        first = gate_up()
        dtype, width, inner = first.dtype, first.shape[1], len(first) // 2
        kept: Weight = first
        if form is not None and (width | inner) % 2 == 0:
            forms = candidates(form, math.gcd(width, inner))
            kept = round_product(team.library, first, forms, team)
            form = kept.format
        else:
            form = None
        self.table = SlotTable(ExpertShape(width, inner, width, dtype, form=form), 1)
        """Packed weights of the two products."""
        self.table.put(0, 0, pack_weight(team.library, kept, is_gated=True, team=team))
        del first, kept
        kept = down()
        if form is not None:
            kept = round_weight(team.library, kept, form, team)
        self.table.put(0, 1, pack_weight(team.library, kept, team=team))

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the whole MLP: [rows, H] -> [rows, H]."""
        slots = torch.zeros(len(x), dtype=torch.int64)
        return expert_pairs(self._team, self.table, x, torch.arange(len(x)), slots)

    def gate_up(self, x: Tensor) -> Tensor:
        """Compute the first product: [rows, H] -> [rows, 2 * inner], gates before ups."""
        inner = self.table.shape.inner
        panels = self._multiply(x, 0, len(self.table.get(0, 0)) * PANEL)
        halves = panels.view(len(x), -1, 2, PANEL // 2).transpose(1, 2).flatten(2)
        return halves[:, :, :inner].flatten(1)

    def activate(self, gate_up: Tensor) -> Tensor:
        """Compute silu(gate) * up: [rows, 2 * inner] -> [rows, inner]."""
        gate, up = gate_up.chunk(2, 1)
        return row_wise(functional.silu, gate) * up

    def down(self, x: Tensor) -> Tensor:
        """Compute the second product: [rows, inner] -> [rows, H]."""
        return self._multiply(x, 1, self.table.shape.out_width)

    def _multiply(self, x: Tensor, place: int, outputs: int) -> Tensor:
        """Multiply x [rows, in] by the packed weight with index ``place`` (0: gate and up, 1:
        down): [rows, outputs]."""
        shape, packed = self.table.shape, self.table.get(0, place)
        inputs = shape.in_width if place == 0 else shape.inner
        size = outputs, inputs
        matrix = Matrix.of_panels(self._team, packed, size, shape.dtype, shape.form)
        return matrix.multiply(x)


class NativeHeadProducts:
    """``HeadProducts`` (key and value products of latent attention) with the native expert kernels:
    each head is an expert."""

    def __init__(self, team: ThreadTeam, weight: Tensor, plain_dim: int) -> None:
        """``weight`` [A, N + V, R], where N is ``plain_dim``; see ``HeadProducts``."""
        self._team, self._num_heads = team, len(weight)
        self._keys = self._table([head[:plain_dim].T.contiguous() for head in weight])
        self._values = self._table([head[plain_dim:].contiguous() for head in weight])

    def absorb(self, queries: Tensor) -> Tensor:
        """Multiply queries by key matrices: [T, A, N] -> [T, A, R]; see ``HeadProducts``."""
        return self._multiply(self._keys, queries)

    def values(self, attended: Tensor) -> Tensor:
        """Turn latent vectors into values: [T, A, R] -> [T, A * V]; see ``HeadProducts``."""
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
        """Multiply each head's rows by its matrix in ``table``: [T, A, in] -> [T, A, out]."""
        inputs = rows.reshape(-1, rows.shape[2]).contiguous()
        heads = torch.arange(self._num_heads).repeat(len(rows))
        found = expert_pairs(self._team, table, inputs, torch.arange(len(inputs)), heads)
        return found.view(len(rows), self._num_heads, -1)
