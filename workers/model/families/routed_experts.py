"""Routed experts without groups, as in most families."""

from __future__ import annotations

from dataclasses import dataclass

from workers.model.config import BankSpec, ClampedSwiglu, ModelConfig
from workers.model.families.config_reader import ConfigReader, check_top_k
from workers.model.families.parts import mlp_exchange
from workers.model.routing import Routing, Scoring


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedExperts:
    """Settings of routed experts: number, width, experts per token, and layers with experts."""

    num_experts: int
    """E: number of routed experts in a layer."""
    top_k: int
    expert_width: int
    """I: inner width of an expert."""
    sparse_layers: tuple[int, ...] | None
    """Layers with experts; the other layers are dense. None: all layers have experts."""

    @classmethod
    def read(
        cls,
        settings: ConfigReader,
        *,
        num_experts: tuple[int, str, *tuple[str, ...]],
        top_k: tuple[int, str, *tuple[str, ...]],
        expert_width: tuple[int, str],
        sparse_layers: tuple[int, ...] | None = None,
    ) -> RoutedExperts:
        """Read the settings. Each argument: (default, usual name of the key, other names).

        Raises ``CheckpointError`` naming the unsupported key.
        """
        found = cls(
            num_experts=settings.integer(*num_experts[1:], default=num_experts[0]),
            top_k=settings.integer(*top_k[1:], default=top_k[0]),
            expert_width=settings.integer(expert_width[1], default=expert_width[0]),
            sparse_layers=sparse_layers,
        )
        check_top_k(top_k[1], found.top_k, num_experts[1], found.num_experts)
        return found

    def is_in(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.sparse_layers is None or layer in self.sparse_layers

    def banks(
        self,
        config: ModelConfig,
        *,
        float32_weights: bool = False,
        aux_copies: int = 1,
        activation: ClampedSwiglu | None = None,
        has_bias: bool = False,
    ) -> tuple[BankSpec, ...]:
        """Return a bank of gated MLPs for each sparse layer; see ``BankSpec``, ``ExchangeSpec``."""
        exchange = mlp_exchange(config, self.expert_width, activation, has_bias)
        layers = range(config.num_layers) if self.sparse_layers is None else self.sparse_layers
        return tuple(
            BankSpec(
                index=index,
                bank="mlp",
                layer=layer,
                num_experts=self.num_experts,
                top_k=self.top_k,
                exchanges=(exchange,),
                float32_weights=float32_weights,
                aux_copies=aux_copies,
            )
            for index, layer in enumerate(layers)
        )

    def routing(
        self,
        layer: int,
        scoring: Scoring,
        *,
        is_normed: bool = False,
        float32_product: bool = False,
        least_sum: float = 0.0,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> Routing:
        """Return the parameters of the router of a layer with experts; see ``Routing``."""
        return Routing(
            bank=layer if self.sparse_layers is None else self.sparse_layers.index(layer),
            num_experts=self.num_experts,
            top_k=self.top_k,
            scoring=scoring,
            is_normed=is_normed,
            float32_product=float32_product,
            least_sum=least_sum,
            scale=scale,
            num_groups=num_groups,
            top_groups=top_groups,
        )
