"""Base class of model families: loads embedding, layers and head into an ``AttentionModel``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from cluster.core.errors import CheckpointError
from workers.model.building_blocks import BuildingBlocks
from workers.model.config import (
    Activation,
    BankSpec,
    ExpertMatrix,
    ModelConfig,
    TensorPart,
)
from workers.model.families.parts import gated_expert, part
from workers.model.families.predictor import Predictor, predictor_parts
from workers.model.layers import (
    Attend,
    AttentionModel,
    Embedding,
    Layer,
    LayerProduct,
    Linear,
    Mlp,
    Norm,
    TableEmbedding,
)


class WeightReader(Protocol):
    """Methods of a ``Checkpoint`` that a family uses."""

    def read_stacked(self, parts: Sequence[TensorPart], dtype: torch.dtype) -> Tensor:
        """Read parts stacked row over row, newly allocated on the CPU."""

    def borrow(self, parts: Sequence[TensorPart], dtype: torch.dtype) -> Tensor:
        """``read_stacked`` into memory that is read-only and valid until the checkpoint closes."""


@dataclass(frozen=True, slots=True)
class Loader:
    """Makes building blocks from the named tensors of one layer, one tensor in memory at a time."""

    reader: WeightReader
    dtype: torch.dtype
    device: torch.device
    blocks: BuildingBlocks
    attend: Attend
    """Implementation of attention that all layers use."""
    parts: Mapping[str, TensorPart]
    """Tensors by short name; the name of a bias is the name of its matrix with ``_bias``."""
    products: list[LayerProduct] = field(default_factory=list)
    """Products made so far, of all layers; the loader appends each new one."""

    def tensor(self, *names: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return tensors stacked row over row, in the model dtype unless another is given."""
        parts = [self.parts[name] for name in names]
        return self.reader.read_stacked(parts, dtype or self.dtype).to(self.device)

    def weight(self, *names: str) -> Tensor:
        """Return tensors like ``tensor``, for a product; native products copy the weight."""
        if not self.blocks.are_native:
            return self.tensor(*names)
        return self.reader.borrow([self.parts[name] for name in names], self.dtype)

    def linear(self, *names: str, order: Tensor | None = None, may_quantize: bool = True) -> Linear:
        """Return one product for all these matrices stacked, with their biases if they have any.

        order [rows] int64: order of the matrices' rows in the product; None: unchanged.
        ``may_quantize`` as in ``BuildingBlocks.linear``.
        """
        biases = [f"{name}_bias" for name in names]
        bias = self.tensor(*biases) if biases[0] in self.parts else None
        weight = self.weight(*names)
        if order is not None:
            order = order.to(weight.device)
            weight = weight.index_select(0, order)
            bias = None if bias is None else bias.index_select(0, order)
        product = self.blocks.linear(weight, bias, may_quantize=may_quantize)
        self.products.append(LayerProduct(product, {n: self.parts[n] for n in names}, order))
        return product

    def router(self, name: str) -> Linear:
        """Return the product of a router or gate, with its bias if it has one."""
        return self.linear(name, may_quantize=False)

    def float32_linear(self, name: str, *, rounds: bool = True) -> Linear:
        """Return a product in float32, without a bias.

        ``rounds``: whether the matrix is first rounded to the model dtype.
        """
        weight = self.tensor(name, dtype=self.dtype if rounds else torch.float32)
        return self.blocks.linear(weight.float(), None, may_quantize=False)

    def mlp(self, gate: str, up: str, down: str, activation: Activation) -> Mlp:
        """Return a gated MLP without biases."""
        weights = partial(self.weight, gate, up), partial(self.weight, down)
        product = self.blocks.mlp(*weights, activation)
        parts = {"gate": self.parts[gate], "up": self.parts[up], "down": self.parts[down]}
        self.products.append(LayerProduct(product, parts))
        return product


class Family(ABC):
    """Description of one checkpoint's model: an embedding, layers, a final norm and one head.

    ``attention_model`` and methods with a ``Loader`` load weights; the others describe them.
    """

    windows: frozenset[int] = frozenset()
    """Widths of the sliding windows in use, in tokens."""
    prefix: str = "model"
    """Prefix of the names of all tensors except the head's."""
    has_sinks: ClassVar[bool] = False
    """Whether the model has attention sinks: see ``AttentionBatch.sinks``."""

    def __init__(self, config: ModelConfig, banks: tuple[BankSpec, ...]) -> None:
        self.config = config
        self.banks = banks
        """Expert banks in the order of their use."""

    @abstractmethod
    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """Return the tensors of a layer except its routed experts, by short name."""

    @abstractmethod
    def make_layer(self, layer: int, loader: Loader) -> Layer:
        """Return a layer made of the tensors that ``layer_parts`` names."""

    def with_predictor(self) -> Family:
        """Return the family with the layer that predicts the token after the next.

        Raises ``CheckpointError`` if the checkpoint has no such layer, as in most families.
        """
        name = self.config.model_type
        raise CheckpointError(
            f"model_type {name} has no layer for speculative_method mtp that is supported"
        )

    def expert_matrices(
        self, bank: BankSpec, exchange: int, expert: int, names: Container[str]
    ) -> tuple[ExpertMatrix, ...]:
        """Return the location of one expert's matrices: by default, of a gated MLP with the usual
        names.

        ``names``: all tensor names, which show if experts are separate tensors or fused.
        """
        return gated_expert(f"{self.prefix}.layers.{bank.layer}.mlp.experts", bank, expert, names)

    def attention_tensors(self) -> Iterator[TensorPart]:
        """Return all tensors of an attention worker: everything except the routed experts."""
        yield from self._outer_parts().values()
        for layer in range(self.config.num_layers):
            yield from self.layer_parts(layer).values()
        if self.config.has_predictor:
            yield from self._predictor_parts().values()

    def attention_model(
        self,
        reader: WeightReader,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int | None,
        blocks: BuildingBlocks,
    ) -> AttentionModel:
        """Load everything except the routed experts, one tensor at a time.

        ``max_positions`` None: the checkpoint's context.
        """
        config = self.config
        attend = blocks.attention(config, dtype)
        outer = Loader(reader, dtype, device, blocks, attend, self._outer_parts())
        embedding, head = self._ends(outer, blocks)
        inner = replace(outer, products=[])
        layers = [
            self.make_layer(i, replace(inner, parts=self.layer_parts(i)))
            for i in range(config.num_layers)
        ]
        limit = max_positions or config.context_tokens
        return AttentionModel(
            embedding=embedding,
            dtype=dtype,
            device=device,
            is_native=blocks.are_native,
            layers=layers,
            norm=self.final_norm(outer),
            head=head,
            rope=blocks.rope(config.rope, limit, dtype, device),
            windows=self.windows,
            kv_layer=config.kv_layers[0],
            predictor=self._predictor(outer) if config.has_predictor else None,
            products=tuple(inner.products),
            linear=partial(blocks.linear, may_quantize=False),
        )

    def _predictor(self, outer: Loader) -> Predictor:
        config = self.config
        loader = replace(outer, parts=self._predictor_parts())
        names = ("token_norm", "state_norm", "predicted_norm")
        eps = config.rms_norm_eps
        norms = {name: loader.blocks.norm(loader.tensor(name), eps) for name in names}
        return Predictor(
            token_norm=norms["token_norm"],
            state_norm=norms["state_norm"],
            projection=loader.linear("projection"),
            layer=self.make_layer(config.num_layers, loader),
            norm=norms["predicted_norm"],
        )

    def _predictor_parts(self) -> dict[str, TensorPart]:
        layer = self.config.num_layers
        around = predictor_parts(self.config, f"{self.prefix}.layers.{layer}")
        return {**self.layer_parts(layer), **around}

    def final_norm(self, outer: Loader) -> Norm:
        """Return the norm after the layers."""
        return outer.blocks.norm(outer.tensor("norm"), self.config.rms_norm_eps)

    def _ends(self, outer: Loader, blocks: BuildingBlocks) -> tuple[Embedding, Linear]:
        """Return the embedding and the head. Call it before the layers are loaded.

        Packing the head, the largest matrix, may temporarily take a second copy of it, which is
        less memory than the layers take later.
        """
        if not self.config.labels and self.config.tie_word_embeddings:
            return blocks.tied(outer.weight("embedding"))
        head = outer.linear("head")
        return TableEmbedding(outer.tensor("embedding")), head

    def _outer_parts(self) -> dict[str, TensorPart]:
        """Tensors outside the layers, by short name, with ``head`` unless it is the embedding."""
        config = self.config
        width = config.hidden_size
        parts = {
            "embedding": part(f"{self.prefix}.embed_tokens.weight", config.vocab_size, width),
            "norm": part(f"{self.prefix}.norm.weight", width),
        }
        if config.labels:
            parts["head"] = part("score.weight", len(config.labels), width)
        elif not config.tie_word_embeddings:
            parts["head"] = part("lm_head.weight", config.vocab_size, width)
        return parts
