"""LoRA adapters in memory, and the deltas that they add to the rows of a micro-batch.

    y = W x + scale * B (A x)        for the rows of an adapter; A has few rows, B few columns

A product of a layer may join several modules, for example q, k and v. Their A and B matrices are
joined, too, so that a delta takes two more products for any number of modules. These products use
the model's own building blocks: if these blocks are batch-invariant, rows with adapters are, too.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.core.errors import CheckpointError, ConfigError
from workers.lora.folder import AdapterFolder, ModuleMatrices
from workers.model.host_copies import to_device
from workers.model.layers import AttentionModel, LayerProduct, Linear, Mlp


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to the result of one product of the model: [n, in] -> [n, out]."""

    down: Linear
    """First product: in -> sum of the ranks of all joined A matrices."""
    up: Linear
    """Second product: sum of the ranks -> out, including the scale."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


@dataclass(frozen=True, slots=True)
class MlpDelta:
    """Deltas of an adapter for the products of an MLP; None for a product without a delta."""

    gate_up: Delta | None
    down: Delta | None


@dataclass(frozen=True, slots=True, eq=False)
class AdapterWeights:
    """Deltas of one LoRA adapter on the model's device, ready for rows."""

    linears: Mapping[Linear, Delta]
    mlps: Mapping[Mlp, MlpDelta]
    num_bytes: int
    """Size of the adapter's matrices in bytes."""


@dataclass(frozen=True, slots=True)
class JoinedMatrices:
    """Joined A and B matrices of an adapter for one product, from which a ``Delta`` is made."""

    product: Linear | Mlp
    is_down: bool
    """Whether the product is the second one of an MLP (down projection)."""
    down: Tensor
    """Joined A matrices, [ranks, in]."""
    up: Tensor
    """Joined B matrices, [out, ranks], including the scale."""

    @property
    def num_bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """A validated LoRA adapter in CPU memory, with its matrices joined by product."""

    digest: str
    """Hash of the adapter's files."""
    matrices: tuple[JoinedMatrices, ...]

    @property
    def num_bytes(self) -> int:
        return sum(own.num_bytes for own in self.matrices)


def prepare(folder: AdapterFolder, dtype: torch.dtype) -> PreparedAdapter:
    """Join the A and B matrices of an adapter's modules for each product of the model."""
    by_product: dict[tuple[int, bool], list[ModuleMatrices]] = {}
    for matrices in folder.modules:
        target = matrices.target
        key = id(target.product), _is_down(target.product, target.name)
        by_product.setdefault(key, []).append(matrices)
    return PreparedAdapter(folder.digest, tuple(_join(own, dtype) for own in by_product.values()))


def _is_down(product: LayerProduct, name: str) -> bool:
    return name == "down" and not isinstance(product.product, Linear)


def _join(own: Sequence[ModuleMatrices], dtype: torch.dtype) -> JoinedMatrices:
    product = own[0].target.product
    is_down = _is_down(product, own[0].target.name)
    names = [n for n in product.parts if _is_down(product, n) is is_down]
    rows = [product.parts[n].shape[0] for n in names]
    up = torch.zeros(sum(rows), sum(len(m.down) for m in own))
    column = 0
    for matrices in own:
        place, rank = names.index(matrices.target.name), len(matrices.down)
        first = sum(rows[:place])
        scaled = matrices.up.float() * matrices.scale
        up[first : first + rows[place], column : column + rank] = scaled
        column += rank
    if product.order is not None:
        up = up.index_select(0, product.order.cpu())
    down = torch.cat([m.down.float() for m in own])
    return JoinedMatrices(product.product, is_down, down.to(dtype), up.to(dtype))


def make(prepared: PreparedAdapter, model: AttentionModel) -> Generator[None, None, AdapterWeights]:
    """Make an adapter's deltas on the model's device, with a ``yield`` after each delta.

    Raises ``CheckpointError`` if the model cannot run such products deterministically.
    """
    linears: dict[Linear, Delta] = {}
    mlps: dict[Mlp, MlpDelta] = {}
    for own in prepared.matrices:
        try:
            down, up = (model.linear(m.to(model.device)) for m in (own.down, own.up))
        except ConfigError as err:  # such products cannot be exact here
            raise CheckpointError(str(err)) from err
        if isinstance(own.product, Linear):
            linears[own.product] = Delta(down, up)
        else:
            known = mlps.get(own.product, MlpDelta(None, None))
            place = "down" if own.is_down else "gate_up"
            mlps[own.product] = replace(known, **{place: Delta(down, up)})
        yield
    return AdapterWeights(linears, mlps, prepared.num_bytes)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one adapter in a micro-batch."""

    adapter: AdapterWeights
    indices: Tensor
    """[n] int64: indices of the adapter's rows in the micro-batch."""
    span: slice | None
    """The rows as a slice, or None if they are not contiguous."""

    def of(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.indices) if self.span is None else x[self.span]

    def put(self, x: Tensor, own: Tensor) -> None:
        if self.span is None:
            x.index_copy_(0, self.indices, own)
        else:
            x[self.span] = own


class BatchAdapters:
    """Adapters of the rows of one micro-batch; runs products and MLPs with their deltas."""

    def __init__(
        self, owners: Sequence[tuple[AdapterWeights | None, int]], device: torch.device
    ) -> None:
        """``owners``: adapter (None for none) and number of rows for each run of consecutive rows.
        At least one run has an adapter."""
        by_adapter: dict[AdapterWeights, list[int]] = {}
        plain: list[int] = []
        first = 0
        for adapter, count in owners:
            rows = plain if adapter is None else by_adapter.setdefault(adapter, [])
            rows += range(first, first + count)
            first += count
        self._groups = [_rows(adapter, own, device) for adapter, own in by_adapter.items()]
        self._plain = _indices(plain, device)

    def multiply(self, linear: Linear, x: Tensor) -> Tensor:
        """Return ``linear(x)`` plus the deltas of the rows' adapters; see ``RowAdapters``."""
        y = linear(x)
        for rows in self._groups:
            if (delta := rows.adapter.linears.get(linear)) is not None:
                rows.put(y, rows.of(y) + delta(rows.of(x)))
        return y

    def apply(self, mlp: Mlp, x: Tensor) -> Tensor:
        """Return ``mlp(x)`` with the deltas of the rows' adapters; see ``RowAdapters``. Rows
        without an adapter use the unmodified MLP."""
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


def _rows(adapter: AdapterWeights, own: Sequence[int], device: torch.device) -> _Rows:
    first, last = own[0], own[-1] + 1
    are_neighbours = last - first == len(own)
    return _Rows(adapter, _indices(own, device), slice(first, last) if are_neighbours else None)


def _indices(rows: Sequence[int], device: torch.device) -> Tensor:
    return to_device(rows, device)
