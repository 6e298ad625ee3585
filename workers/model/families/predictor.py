"""Layer after the last one that predicts the token after the next (multi-token prediction).

The inputs are the final hidden state at position i and the token at position i + 1. The predictor
computes another hidden state, from which the head makes the logits of the token at position i + 2.
The predictor is a decoder layer with its own keys and values; its routed experts are one more bank.
It uses the embedding and the head of the model.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 2.2; checkpoint layout of
DeepSeek-V3 and GLM-4.5; their copies of embedding and head are not read. The hidden state is taken
after the final norm, as in vLLM. Only the first of several such layers is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.core.errors import CheckpointError
from workers.model.config import ModelConfig, TensorPart
from workers.model.families.parts import part
from workers.model.layers import Layer, LayerContext, LayerSteps, Linear, Norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictor:
    """Multi-token prediction layer (MTP): a projection and one decoder layer."""

    token_norm: Norm
    state_norm: Norm
    projection: Linear
    """Projection of a token's embedding [H] and a hidden state [H], concatenated: 2H -> H."""
    layer: Layer
    norm: Norm

    def forward(
        self, embedded: Tensor, hidden: Tensor, cache: Tensor, context: LayerContext
    ) -> LayerSteps:
        """Return hidden states for the logits of the token after the next: [T, H]."""
        normed = self.token_norm(embedded), self.state_norm(hidden.clone())
        joined = self.projection(torch.cat(normed, 1))
        return self.norm((yield from self.layer.forward(joined, cache, context)))


def predictor_parts(config: ModelConfig, prefix: str) -> dict[str, TensorPart]:
    """Return the prediction layer's tensors that a decoder layer lacks, by short name."""
    width = config.hidden_size
    return {
        "token_norm": part(f"{prefix}.enorm.weight", width),
        "state_norm": part(f"{prefix}.hnorm.weight", width),
        "projection": part(f"{prefix}.eh_proj.weight", width, 2 * width),
        "predicted_norm": part(f"{prefix}.shared_head.norm.weight", width),
    }


def predicting(config: ModelConfig) -> ModelConfig:
    """Return ``config`` with the prediction layer in use; ``CheckpointError`` if it has none."""
    if not config.num_prediction_layers:
        raise CheckpointError(
            "config.json: num_nextn_predict_layers must be at least 1 for speculative_method mtp: "
            "the checkpoint has no layer that predicts further tokens"
        )
    ignored = tuple(key for key in config.ignored_keys if key != "num_nextn_predict_layers")
    return replace(config, has_predictor=True, ignored_keys=ignored)
