"""dots.llm1: per-head q/k norms, sliding windows, dense first layers, a sigmoid router in groups.

Shared experts and dense layers belong to the attention worker, routed experts to the banks.

Source: checkpoint layout and math as in transformers ``models/dots1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.core.errors import CheckpointError
from workers.model.config import ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    model_config,
)
from workers.model.families.decoder import DecoderLayer, dense_attention_layer
from workers.model.families.grouped_experts import GroupDefaults, GroupedExperts
from workers.model.families.parts import (
    head_norm_parts,
    head_norms,
    norm_parts,
    projection_parts,
)

_DEFAULTS = Defaults(
    vocab_size=152064, hidden_size=4608, num_layers=62, max_positions=2048, rms_norm_eps=1e-6
)
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dots1Config:
    """Settings of dots.llm1 beyond ``ModelConfig``."""

    experts: GroupedExperts
    attention_bias: bool
    """Whether q, k, v and o have biases."""
    windows: tuple[int | None, ...]
    """Width of each layer's sliding window in tokens; None: no window."""


def family(config: Mapping[str, Any]) -> Dots1Family:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("Dots1ForCausalLM")
    windows = _windows(settings)
    own = Dots1Config(
        experts=GroupedExperts.read(settings, GroupDefaults(), len(windows)),
        attention_bias=settings.flag("attention_bias", False),
        windows=windows,
    )
    heads = AttentionHeads.read(settings, default_hidden=_DEFAULTS.hidden_size, default_heads=32)
    shared = model_config(settings, model_type="dots1", heads=heads, defaults=_DEFAULTS)
    return Dots1Family(shared, own)


def _windows(settings: ConfigReader) -> tuple[int | None, ...]:
    """Return the width of each layer's sliding window in tokens; None: no window.
    ``sliding_window`` null disables all windows; the default is 4096."""
    layers = settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
    given = settings.value("sliding_window")
    is_off = given is None and "sliding_window" in settings.raw
    width = None if is_off else settings.integer("sliding_window", default=4096)
    first = settings.integer("max_window_layers", default=62, least=0)
    kinds = settings.value("layer_types")
    if kinds is None:
        kinds = [_SLIDING if width and i >= first else _FULL for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise CheckpointError(f"config.json: layer_types must list all {layers} layers")
    for kind in kinds:
        if kind not in (_SLIDING, _FULL):
            raise CheckpointError(
                f"config.json: layer_types {kind!r} is not supported: it is not {_SLIDING}, {_FULL}"
            )
    if width is None and _SLIDING in kinds:
        raise CheckpointError("config.json: layer_types has sliding layers, sliding_window is null")
    return tuple(width if kind == _SLIDING else None for kind in kinds)


class Dots1Family(Family):
    def __init__(self, config: ModelConfig, dots1: Dots1Config) -> None:
        super().__init__(config, dots1.experts.banks(config))
        self.dots1 = dots1
        self.windows = frozenset(width for width in dots1.windows if width is not None)

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """Return a layer's tensors; ``gate``, ``up``, ``down``: dense MLP or shared experts."""
        config, prefix = self.config, f"model.layers.{layer}"
        return {
            **norm_parts(prefix, config),
            **head_norm_parts(f"{prefix}.self_attn", config),
            **projection_parts(f"{prefix}.self_attn", config, self.dots1.attention_bias),
            **self.dots1.experts.parts(layer, config.hidden_size),
        }

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        own = self.dots1
        return dense_attention_layer(
            self.config,
            loader,
            router=own.experts.router(layer, loader),
            qk_norm=head_norms(self.config, loader.tensor("q_norm"), loader.tensor("k_norm")),
            window=own.windows[layer],
        )
