"""What all decoder families do alike: name the tensors around the layers, load, build the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor

from workers.families.base import (
    Activation,
    BankSpec,
    ExpertMatrix,
    ModelConfig,
    TensorPart,
    WeightSource,
)
from workers.families.parts import part
from workers.layers import Attend, AttentionModel, BuildingBlocks, GatedMlp, Layer, Linear


class Loader:
    """Makes building blocks of the named tensors of one layer, one tensor in memory at a time."""

    def __init__(
        self,
        weights: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        blocks: BuildingBlocks,
        parts: Mapping[str, TensorPart],
    ) -> None:
        """``parts`` by short name; biases have the name of their matrix and ``_bias``."""
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._blocks = blocks
        self._parts = parts

    def tensor(self, *names: str, dtype: torch.dtype | None = None) -> Tensor:
        """Tensors one under the other, in the model dtype unless another is given."""
        parts = [self._parts[name] for name in names]
        return self._weights.read_stacked(parts, dtype or self._dtype).to(self._device)

    def linear(self, *names: str) -> Linear:
        """One product for all these matrices, with their biases where there are any."""
        biases = [f"{name}_bias" for name in names]
        bias = self.tensor(*biases) if biases[0] in self._parts else None
        return self._blocks.linear(self.tensor(*names), bias)

    def float32_linear(self, name: str) -> Linear:
        """A product in float32, without a bias; the matrix is rounded to the model dtype before."""
        return self._blocks.linear(self.tensor(name).float(), None)

    def mlp(self, gate: str, up: str, down: str, activation: Activation) -> GatedMlp:
        """A dense gated MLP."""
        return GatedMlp(self.linear(gate, up), self.linear(down), activation)


class DecoderFamily(ABC):
    """``Family`` of a model with an embedding, layers, a final norm and one head."""

    def __init__(self, config: ModelConfig, banks: tuple[BankSpec, ...]) -> None:
        self.config = config
        self.banks = banks

    @property
    def windows(self) -> frozenset[int]:
        """Widths of the sliding windows in use, in tokens."""
        return frozenset()

    @abstractmethod
    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """Tensors of a layer but its routed experts, by short name."""

    @abstractmethod
    def make_layer(self, layer: int, loader: Loader, attend: Attend) -> Layer:
        """A layer of the tensors that ``layer_parts`` names."""

    @abstractmethod
    def expert_matrices(
        self, bank: BankSpec, exchange: int, expert: int, names: Container[str]
    ) -> tuple[ExpertMatrix, ...]:
        """See ``Family``."""

    def attention_tensors(self) -> Iterator[TensorPart]:
        """All tensors but the routed experts."""
        yield from self._outer_parts().values()
        for layer in range(self.config.num_layers):
            yield from self.layer_parts(layer).values()

    def attention_model(
        self,
        weights: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int | None = None,
        blocks: BuildingBlocks | None = None,
    ) -> AttentionModel:
        """Load everything but the routed experts, one tensor at a time."""
        config, blocks = self.config, blocks or BuildingBlocks()
        outer = Loader(weights, dtype, device, blocks, self._outer_parts())
        embedding = outer.tensor("embedding")
        attend = blocks.attention(config, dtype)
        layers = [
            self.make_layer(i, Loader(weights, dtype, device, blocks, self.layer_parts(i)), attend)
            for i in range(config.num_layers)
        ]
        norm = outer.tensor("norm")
        if config.labels or not config.tie_word_embeddings:
            head = outer.linear("head")
        else:
            head = blocks.linear(embedding, may_pack=False)
        limit = max_positions or config.context_tokens
        return AttentionModel(
            embedding=embedding,
            layers=layers,
            norm=norm,
            norm_eps=config.rms_norm_eps,
            head=head,
            rope=blocks.rope(config.rope, limit, dtype, device),
            windows=self.windows,
        )

    def _outer_parts(self) -> dict[str, TensorPart]:
        """Tensors around the layers, by short name; ``head`` unless it is the embedding."""
        config = self.config
        width = config.hidden_size
        parts = {
            "embedding": part("model.embed_tokens.weight", config.vocab_size, width),
            "norm": part("model.norm.weight", width),
        }
        if config.labels:
            parts["head"] = part("score.weight", len(config.labels), width)
        elif not config.tie_word_embeddings:
            parts["head"] = part("lm_head.weight", config.vocab_size, width)
        return parts
