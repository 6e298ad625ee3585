"""gpt-oss: attention sinks, windows in every other layer, experts with biases and a clamped SwiGLU,
weights of experts in MXFP4.

Source: checkpoint layout and math as in transformers ``models/gpt_oss``. There, norms multiply by
their weight before they round to bfloat16; here they round first, as in all families.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.core.errors import CheckpointError
from workers.model.config import BankSpec, ClampedSwiglu, ExpertMatrix, ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    model_config,
)
from workers.model.families.decoder import DecoderLayer, dense_attention_layer
from workers.model.families.parts import norm_parts, part, projection_parts
from workers.model.families.routed_experts import RoutedExperts
from workers.model.routing import Router
from workers.quantization.keys import QuantizationKeys

_DEFAULTS = Defaults(
    vocab_size=201088,
    hidden_size=2880,
    num_layers=36,
    max_positions=131072,
    rms_norm_eps=1e-5,
    rope_theta=150000.0,
)
_ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Value of ``rope_parameters`` for a ``config.json`` that lacks this key."""
_KINDS = ("sliding_attention", "full_attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class GptOssConfig:
    """Settings of gpt-oss beyond ``ModelConfig``."""

    experts: RoutedExperts
    attention_bias: bool
    """Whether q, k, v and o have biases."""
    swiglu: ClampedSwiglu
    windows: tuple[int | None, ...]
    """Width of each layer's sliding window in tokens; None: no window."""
    is_quantized: bool
    """Whether experts are stored in MXFP4, from ``quantization_config``."""


def family(config: Mapping[str, Any]) -> GptOssFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    ignored = _ignored_keys(config.get("quantization_config"))
    known = {key: value for key, value in config.items() if key != "quantization_config"}
    if not (known.get("rope_scaling") or known.get("rope_parameters")):
        known["rope_parameters"] = _ROPE
    if not (known.get("dtype") or known.get("torch_dtype")):
        known["dtype"] = "bfloat16"  # the public configs have no such key
    settings = ConfigReader(known)
    settings.architecture("GptOssForCausalLM")
    settings.value("initial_context_length")  # the key of rope_scaling
    own = GptOssConfig(
        experts=RoutedExperts.read(
            settings,
            num_experts=(128, "num_local_experts", "num_experts"),
            top_k=(4, "num_experts_per_tok", "experts_per_token"),
            expert_width=(2880, "intermediate_size"),
        ),
        attention_bias=settings.flag("attention_bias", True),
        swiglu=ClampedSwiglu(
            alpha=settings.real("swiglu_alpha", 1.702), limit=settings.real("swiglu_limit", 7.0)
        ),
        windows=_windows(settings),
        is_quantized=config.get("quantization_config") is not None,
    )
    heads = AttentionHeads.read(
        settings,
        default_hidden=_DEFAULTS.hidden_size,
        default_heads=64,
        default_kv_heads=8,
        default_head_dim=64,
    )
    shared = model_config(settings, model_type="gpt_oss", heads=heads, defaults=_DEFAULTS)
    return GptOssFamily(replace(shared, ignored_keys=(*shared.ignored_keys, *ignored)), own)


def _ignored_keys(found: Any) -> tuple[str, ...]:
    """Return the keys of ``quantization_config`` that have no effect.

    Raises ``CheckpointError`` for experts in another storage format than MXFP4.
    """
    if found is None:
        return ()
    name = "config.json: quantization_config"
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{name} {found!r} must be an object")
    if found.get("quant_method") != "mxfp4":
        method = found.get("quant_method")
        raise CheckpointError(f"{name}: quant_method {method!r} is not supported: must be 'mxfp4'")
    keys = QuantizationKeys(name, found)
    keys.honoured("quant_method", "modules_to_not_convert", "dequantize")
    return tuple(f"quantization_config.{key}" for key in keys.ignored())


def _windows(settings: ConfigReader) -> tuple[int | None, ...]:
    """Return each layer's window in tokens or None; by default layers 0, 2, 4 .. have a window."""
    num_layers = settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
    has_window = "sliding_window" not in settings.raw or settings.value("sliding_window")
    width = settings.integer("sliding_window", default=128) if has_window else None
    kinds = settings.value("layer_types", default=[_KINDS[i % 2] for i in range(num_layers)])
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= set(_KINDS):
        raise CheckpointError(
            f"config.json: layer_types {kinds!r} must name {' or '.join(_KINDS)} for each of the "
            f"{num_layers} layers"
        )
    return tuple(width if kind == _KINDS[0] else None for kind in kinds)


class GptOssFamily(Family):
    has_sinks = True

    def __init__(self, config: ModelConfig, gpt_oss: GptOssConfig) -> None:
        banks = gpt_oss.experts.banks(config, activation=gpt_oss.swiglu, has_bias=True)
        super().__init__(config, banks)
        self.gpt_oss = gpt_oss
        self.windows = frozenset(w for w in gpt_oss.windows if w is not None)

    def expert_matrices(
        self, bank: BankSpec, exchange: int, expert: int, names: Container[str]
    ) -> tuple[ExpertMatrix, ...]:
        """Return the tensor parts that make up one expert's matrices and biases. On disk, rows of
        gate and up alternate, and matrices are [in, out], but in MXFP4 [out, in]."""
        (spec,) = bank.exchanges
        width, inner = spec.in_width, spec.expert_width
        prefix = f"model.layers.{bank.layer}.mlp.experts"
        is_planned = not names and self.gpt_oss.is_quantized  # nothing is on disk
        is_packed = is_planned or f"{prefix}.gate_up_proj_blocks" in names

        def matrix(name: str, out: int, columns: int, rows: tuple[int, int] | None) -> TensorPart:
            shape = (out, columns) if is_packed else (columns, out)
            return TensorPart(
                name=f"{prefix}.{name}",
                shape=(bank.num_experts, *shape),
                index=expert,
                is_transposed=not is_packed,
                is_mxfp4=is_packed,
                rows=rows,
            )

        def bias(name: str, out: int, rows: tuple[int, int] | None) -> TensorPart:
            shape = (bank.num_experts, out)
            return TensorPart(name=f"{prefix}.{name}_bias", shape=shape, index=expert, rows=rows)

        up, halves = "gate_up_proj", ((0, 2), (1, 2))
        return (
            ExpertMatrix(
                shape=(2 * inner, width),
                parts=tuple(matrix(up, 2 * inner, width, rows) for rows in halves),
            ),
            ExpertMatrix(shape=(width, inner), parts=(matrix("down_proj", width, inner, None),)),
            ExpertMatrix(
                shape=(2 * inner, 1), parts=tuple(bias(up, 2 * inner, rows) for rows in halves)
            ),
            ExpertMatrix(shape=(width, 1), parts=(bias("down_proj", width, None),)),
        )

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        config, own, prefix = self.config, self.gpt_oss, f"model.layers.{layer}"
        router = f"{prefix}.mlp.router"
        return {
            **norm_parts(prefix, config),
            "sinks": part(f"{prefix}.self_attn.sinks", config.num_heads),
            "router": part(f"{router}.weight", own.experts.num_experts, config.hidden_size),
            "router_bias": part(f"{router}.bias", own.experts.num_experts),
        } | projection_parts(f"{prefix}.self_attn", config, own.attention_bias)

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        own = self.gpt_oss
        routing = own.experts.routing(layer, "softmax_of_best")
        return dense_attention_layer(
            self.config,
            loader,
            router=Router(routing=routing, linear=loader.router("router")),
            window=own.windows[layer],
            sinks=loader.tensor("sinks").float(),
        )
