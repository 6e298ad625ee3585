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
    """Interface of a checkpoint for families: the methods with which they read weights."""

    def read_stacked(self, parts: Sequence[TensorPart], dtype: torch.dtype) -> Tensor:
        """Read parts of tensors, stacked row over row, as ``dtype`` in new memory on the CPU."""

    def borrow(self, parts: Sequence[TensorPart], dtype: torch.dtype) -> Tensor:
        """Like ``read_stacked``; the result is read-only, and valid until the checkpoint closes."""


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
    """Products and MLPs loaded so far, of all layers; each new one is appended."""

    def tensor(self, *names: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read tensors by short name, stacked row over row. ``dtype`` None: the model dtype."""
        parts = [self.parts[name] for name in names]
        return self.reader.read_stacked(parts, dtype or self.dtype).to(self.device)

    def weight(self, *names: str) -> Tensor:
        """Read a product's weight, stacked like ``tensor``; read-only if blocks are native."""
        if not self.blocks.are_native:
            return self.tensor(*names)
        return self.reader.borrow([self.parts[name] for name in names], self.dtype)

    def linear(self, *names: str, order: Tensor | None = None, may_quantize: bool = True) -> Linear:
        """Load one product from matrices stacked row over row, with biases if the first has one.

        ``order`` [rows] int64: index of the stacked row at each row of the product; None: the same
        order. ``may_quantize``: see ``BuildingBlocks.linear``.
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
        """Load the product of a router or gate, with its bias if present; never quantized."""
        return self.linear(name, may_quantize=False)

    def float32_linear(self, name: str, *, rounds: bool = True) -> Linear:
        """Load a product that is computed in float32, without a bias.

        ``rounds``: whether the matrix is first rounded to the model dtype.
        """
        weight = self.tensor(name, dtype=self.dtype if rounds else torch.float32)
        return self.blocks.linear(weight.float(), None, may_quantize=False)

    def mlp(self, gate: str, up: str, down: str, activation: Activation) -> Mlp:
        """Load a gated MLP without biases, from the short names of its three matrices."""
        weights = partial(self.weight, gate, up), partial(self.weight, down)
        product = self.blocks.mlp(*weights, activation)
        parts = {"gate": self.parts[gate], "up": self.parts[up], "down": self.parts[down]}
        self.products.append(LayerProduct(product, parts))
        return product


class Family(ABC):
    """Description of one checkpoint's model: an embedding, layers, a final norm and one head.

    ``attention_model`` and methods with a ``Loader`` load weights; other methods describe weights.
    """

    windows: frozenset[int] = frozenset()
    """Widths of the sliding windows in use, in tokens."""
    prefix: str = "model"
    """Prefix of the checkpoint's tensor names, except the name of the head's tensor."""
    has_sinks: ClassVar[bool] = False
    """Whether attention has sinks: an extra score per head in the softmax, without a value."""

    def __init__(self, config: ModelConfig, banks: tuple[BankSpec, ...]) -> None:
        self.config = config
        self.banks = banks
        """Banks (the routed experts of each router), in the order in which a step uses them."""

    @abstractmethod
    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """Return the tensors of a layer except its routed experts, by short name."""

    @abstractmethod
    def make_layer(self, layer: int, loader: Loader) -> Layer:
        """Load a layer from the tensors that ``layer_parts`` names."""

    def with_predictor(self) -> Family:
        """Return a copy of the family that includes the multi-token prediction layer (MTP).

        Raises ``CheckpointError`` if there is none that is supported, as in most families.
        """
        name = self.config.model_type
        raise CheckpointError(
            f"model_type {name} has no layer for speculative_method mtp that is supported"
        )

    def expert_matrices(
        self, bank: BankSpec, exchange: int, expert: int, names: Container[str]
    ) -> tuple[ExpertMatrix, ...]:
        """Return the tensor parts that make up one expert's matrices in an exchange. By default,
        these are the parts of a gated MLP with the usual tensor names.

        ``names``: all tensor names, which show if experts are separate tensors or fused.
        """
        return gated_expert(f"{self.prefix}.layers.{bank.layer}.mlp.experts", bank, expert, names)

    def attention_tensors(self) -> Iterator[TensorPart]:
        """Yield all tensors that an attention worker loads: all except the routed experts."""
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
        """Load the model except its routed experts, one tensor at a time.

        ``max_positions``: positions in the rotary embedding's table; None: the model's context.
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
        """Load the norm that follows the last layer."""
        return outer.blocks.norm(outer.tensor("norm"), self.config.rms_norm_eps)

    def _ends(self, outer: Loader, blocks: BuildingBlocks) -> tuple[Embedding, Linear]:
        """Load the embedding and the head. Must be called before the layers are loaded.

        Packing the head, the largest matrix, may temporarily take memory for a second copy of the
        head, which is less memory than the layers take later.
        """
        if not self.config.labels and self.config.tie_word_embeddings:
            return blocks.tied(outer.weight("embedding"))
        head = outer.linear("head")
        return TableEmbedding(outer.tensor("embedding")), head

    def _outer_parts(self) -> dict[str, TensorPart]:
        """Return the tensors outside the layers by short name; no ``head`` if lm_head is tied."""
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
