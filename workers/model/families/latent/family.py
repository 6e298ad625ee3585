"""Base class of families with latent attention: everything except reading ``config.json``."""

from __future__ import annotations

from workers.model.attention_sublayer import AttentionShape, TorchAttentionSublayer
from workers.model.config import ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.decoder import DecoderLayer
from workers.model.families.grouped_experts import GroupedExperts
from workers.model.families.latent.attention import LatentAttention
from workers.model.families.parts import norm_parts
from workers.model.families.predictor import predicting


class LatentFamily(Family):
    """Model family with latent attention, then grouped experts or a dense MLP, in each layer."""

    def __init__(
        self, config: ModelConfig, attention: LatentAttention, experts: GroupedExperts
    ) -> None:
        super().__init__(config, experts.banks(config))
        self.attention = attention
        self.experts = experts

    def with_predictor(self) -> LatentFamily:
        config = predicting(self.config)
        return LatentFamily(config, self.attention, self.experts.with_layer(config.num_layers))

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """Return a layer's tensors; ``gate``, ``up``, ``down``: dense MLP or shared experts."""
        prefix, width = f"model.layers.{layer}", self.config.hidden_size
        return {
            **norm_parts(prefix, self.config),
            **self.attention.parts(f"{prefix}.self_attn", width),
            **self.experts.parts(layer, width),
        }

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        config, norm1 = self.config, loader.tensor("norm1")
        half = TorchAttentionSublayer(
            shape=AttentionShape(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                eps=config.rms_norm_eps,
                scale=self.attention.shape.scale,
                latent_rank=config.latent_rank,
            ),
            norm1=norm1,
            projections=self.attention.projections(config, loader, norm1),
            norm2=loader.tensor("norm2"),
            router=self.experts.router(layer, loader),
            attend=loader.attend,
        )
        mlp = loader.mlp("gate", "up", "down", config.activation)
        return DecoderLayer(half=loader.blocks.sublayer(half), mlp=mlp)
