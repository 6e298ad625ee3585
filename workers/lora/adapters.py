"""Adapters in memory, and what they add to the rows of a micro-batch.

    y = W x + scale * B (A x)        for the rows of an adapter; A has few rows, B few columns

The matrices of one product are joined: those of q, k and v with different A lie side by side, so
that a product of the layer takes two more, whatever it is made of. They are made of the model's own
building blocks: where rows do not depend on each other to the last bit, adapted ones do not either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.core.errors import CheckpointError, ConfigError
from workers.lora.catalog import Target, targets_of
from workers.lora.folder import AdapterFolder, ModuleMatrices
from workers.model.host_copies import to_device
from workers.model.layers import AttentionModel, LayerProduct, Linear, Mlp


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to a product: [n, in] -> [n, out]."""

    down: Linear
    """in -> ranks of all matrices of the product."""
    up: Linear
    """Those -> out, with the scale."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


@dataclass(frozen=True, slots=True)
class MlpDelta:
    """What an adapter adds to an MLP; None: nothing to that product."""

    gate_up: Delta | None
    down: Delta | None


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter in memory."""

    linears: Mapping[Linear, Delta]
    mlps: Mapping[Mlp, MlpDelta]
    num_bytes: int
    """Of its matrices."""


class AdapterMaker:
    """Makes adapters for one model."""

    def __init__(self, model: AttentionModel) -> None:
        self._model = model
        self.targets: Mapping[str, Target] = targets_of(model.products)
        """Modules that adapters may change."""

    def num_bytes(self, folder: AdapterFolder) -> int:
        """What ``make`` takes, but for what it needs meanwhile."""
        size = self._model.dtype.itemsize
        by_product = _by_product(folder)
        return sum(_num_values(own) * size for own in by_product.values())

    def make(self, folder: AdapterFolder) -> Adapter:
        """Raises ``CheckpointError``."""
        linears: dict[Linear, Delta] = {}
        mlps: dict[Mlp, MlpDelta] = {}
        try:
            for (_, stage), own in _by_product(folder).items():
                product = own[0].target.product
                delta = self._delta(product, stage, own)
                if isinstance(product.product, Linear):
                    linears[product.product] = delta
                    continue
                known = mlps.get(product.product, MlpDelta(None, None))
                is_down = stage == _DOWN
                mlps[product.product] = MlpDelta(
                    known.gate_up if is_down else delta, delta if is_down else known.down
                )
        except ConfigError as err:  # products here that could not be exact
            raise CheckpointError(str(err)) from err
        return Adapter(linears, mlps, self.num_bytes(folder))

    def _delta(self, product: LayerProduct, stage: str, own: Sequence[ModuleMatrices]) -> Delta:
        dtype, device = self._model.dtype, self._model.device
        names = [n for n in product.parts if _stage(product, n) == stage]
        rows = [product.parts[n].shape[0] for n in names]
        ranks = [len(m.down) for m in own]
        up = torch.zeros(sum(rows), sum(ranks))
        for place, matrices in enumerate(own):
            index, column = names.index(matrices.target.name), sum(ranks[:place])
            first = sum(rows[:index])
            scaled = matrices.up.float() * matrices.scale
            up[first : first + rows[index], column : column + ranks[place]] = scaled
        if product.order is not None:
            up = up.index_select(0, product.order.cpu())
        down = torch.cat([m.down.float() for m in own])
        make = self._model.linear
        return Delta(make(down.to(device, dtype)), make(up.to(device, dtype)))


_DOWN, _ONLY = "down", "all"


def _stage(product: LayerProduct, name: str) -> str:
    """Which of the two products of an MLP a matrix is in; a linear product has one."""
    if isinstance(product.product, Linear):
        return _ONLY
    return _DOWN if name == _DOWN else "gate_up"


def _by_product(folder: AdapterFolder) -> dict[tuple[int, str], list[ModuleMatrices]]:
    """The matrices of each product, in the order of the model."""
    found: dict[tuple[int, str], list[ModuleMatrices]] = {}
    for matrices in folder.modules:
        product = matrices.target.product
        key = id(product), _stage(product, matrices.target.name)
        found.setdefault(key, []).append(matrices)
    return found


def _num_values(own: Sequence[ModuleMatrices]) -> int:
    product, name = own[0].target.product, own[0].target.name
    stage, rank = _stage(product, name), sum(len(m.down) for m in own)
    rows = sum(p.shape[0] for n, p in product.parts.items() if _stage(product, n) == stage)
    return rank * (rows + own[0].down.shape[1])


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of one adapter in a micro-batch."""

    adapter: Adapter
    indices: Tensor
    """[n] int64."""
    span: slice | None
    """The same, where they are neighbours."""

    def of(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.indices) if self.span is None else x[self.span]

    def put(self, x: Tensor, own: Tensor) -> None:
        if self.span is None:
            x.index_copy_(0, self.indices, own)
        else:
            x[self.span] = own


class BatchAdapters:
    """``RowAdapters`` of a micro-batch."""

    def __init__(self, owners: Sequence[tuple[Adapter | None, int]], device: torch.device) -> None:
        """``owners``: the adapter of so many rows, one after the other; at least one has any."""
        by_adapter: dict[Adapter, list[int]] = {}
        plain: list[int] = []
        first = 0
        for adapter, count in owners:
            rows = plain if adapter is None else by_adapter.setdefault(adapter, [])
            rows += range(first, first + count)
            first += count
        self._groups = [_rows(adapter, own, device) for adapter, own in by_adapter.items()]
        self._plain = _indices(plain, device)

    def multiply(self, linear: Linear, x: Tensor) -> Tensor:
        """See ``RowAdapters``."""
        y = linear(x)
        for rows in self._groups:
            if (delta := rows.adapter.linears.get(linear)) is not None:
                rows.put(y, rows.of(y) + delta(rows.of(x)))
        return y

    def apply(self, mlp: Mlp, x: Tensor) -> Tensor:
        """See ``RowAdapters``. Rows to which nothing is added go through the MLP as ever."""
        adapted = [rows for rows in self._groups if mlp in rows.adapter.mlps]
        if not adapted:
            return mlp(x)
        y = torch.empty_like(x)
        others = [rows.indices for rows in self._groups if mlp not in rows.adapter.mlps]
        plain = torch.cat((self._plain, *others))
        if len(plain):
            y.index_copy_(0, plain, mlp(x.index_select(0, plain)))
        for rows in adapted:
            rows.put(y, _apply(mlp, rows.adapter.mlps[mlp], rows.of(x)))
        return y


def _apply(mlp: Mlp, delta: MlpDelta, x: Tensor) -> Tensor:
    gate_up = mlp.gate_up(x)
    if delta.gate_up is not None:
        gate_up = gate_up + delta.gate_up(x)
    inner = mlp.activate(gate_up)
    output = mlp.down(inner)
    return output if delta.down is None else output + delta.down(inner)


def _rows(adapter: Adapter, own: Sequence[int], device: torch.device) -> _Rows:
    first, last = own[0], own[-1] + 1
    are_neighbours = last - first == len(own)
    return _Rows(adapter, _indices(own, device), slice(first, last) if are_neighbours else None)


def _indices(rows: Sequence[int], device: torch.device) -> Tensor:
    return to_device(rows, device)
