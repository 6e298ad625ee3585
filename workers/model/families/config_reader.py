"""Reading of ``config.json``: typed values, under old or new keys, and a check of unread keys.

A family reads its keys; ``check_rest`` then checks the keys that were not read. An unread key that
would change the model's results is an error; unknown keys are reported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from cluster.core.errors import CheckpointError
from workers.model.config import Activation, ModelConfig
from workers.model.rope import parse_rope
from workers.quantization.storage_format import StorageFormat, parse_storage_format

_MAX_VALUES: Mapping[str, int] = {
    "num_hidden_layers": 4096,
    "num_experts": 65536,
    "num_local_experts": 65536,
    "n_routed_experts": 65536,
    "moe_num_experts": 65536,
}
"""Maximum values of keys, far above those of any model: larger values could loop for hours."""
_MAX_INTEGER = 2**31 - 1
"""Maximum value of any other key with an integer, far above those of any model."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "clip_qkv": (),
    "use_qk_norm": (True,),
    "sliding_window": (),
    "layer_types": (),
    "quantization_config": (),
    "compression_config": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "partial_rotary_factor": (1, 1.0),
    "rotary_dim": (),
    "attn_type_list": (),
    "use_bias": (False,),
    "qk_norm_type": ("per_layer",),
    "shared_intermediate_size": (0,),
    "use_routing_bias": (True,),
    "num_shared_experts": (0,),
    "n_shared_experts": (0,),
    "n_group": (1,),
    "routed_scaling_factor": (1, 1.0),
    "first_k_dense_replace": (0,),
    "attn_output_gate": (True,),
    "mamba_ssm_dtype": ("float32",),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
    "moe_layer_freq": (1,),
    "q_lora_rank": (),
    "kv_lora_rank": (),
    "mlp_layer_types": (),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
}
"""Keys that change a model's results unless their value is null or in the tuple."""
_HARMLESS_WORDS = """
    _attn_implementation _name_or_path architectures attention_dropout attn_implementation auto_map
    aux_loss_alpha aux_loss_coef bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id ep_size finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range is_decoder label2id max_window_layers model_type num_labels
    original_max_position_embeddings output_attentions output_hidden_states output_router_logits
    pad_token_id prefix pretraining_tp problem_type pruned_heads return_dict router_aux_loss_coef
    router_jitter_noise scoring_func sep_token_id seq_aux task_specific_params tie_encoder_decoder
    tokenizer_class topk_method torchscript transformers_version use_bfloat16 use_cache
    use_sliding_window

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    tf_legacy_loss top_k top_p typical_p
"""
_HARMLESS = frozenset(_HARMLESS_WORDS.split())
"""Keys of transformers or public checkpoints that do not change a model's results."""


class ConfigReader:
    """Reader of a parsed ``config.json``; null values count as absent, as in transformers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.raw = config
        self._asked: set[str] = set()

    def value(self, *keys: str, default: Any = None) -> Any:
        """Return the value of the first of these keys that is present, or the default."""
        self._asked.update(keys)
        return next((self.raw[key] for key in keys if self.raw.get(key) is not None), default)

    def integer(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """Return the integer >= ``least`` at the first present key; default None: required."""
        value = self.value(*keys, default=default)
        if value is None:
            raise CheckpointError(f"config.json: {keys[0]} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            rule = "must be a positive integer" if least == 1 else f"must be at least {least}"
            raise CheckpointError(f"config.json: {keys[0]} {value!r} {rule}")
        most = _MAX_VALUES.get(keys[0], _MAX_INTEGER)
        if value > most:
            raise CheckpointError(f"config.json: {keys[0]} {value} must be at most {most}")
        return value

    def real(self, key: str, default: float) -> float:
        """Return the positive number at ``key``, or ``default``. Raises ``CheckpointError``."""
        value = self.value(key, default=default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value <= sys.float_info.max
        ):
            raise CheckpointError(f"config.json: {key} {value!r} must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool, *, null: bool | None = None) -> bool:
        """Return a boolean. ``null``: meaning of a null value; None: null means ``default``."""
        is_null = key in self.raw and self.raw[key] is None
        value = self.value(key, default=null if is_null and null is not None else default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} {value!r} must be true or false")
        return value

    def only(self, key: str, *values: Any) -> None:
        """Raise ``CheckpointError`` if the key is present with a value other than ``values``."""
        value = self.value(key)
        if value is not None and value not in values:
            known = " or ".join(repr(v) for v in values)
            raise CheckpointError(f"config.json: {key} {value!r} is not supported: must be {known}")

    def activation(self, *keys: str) -> Activation:
        """Return the activation (``hidden_act``) at the first present key; silu if none is."""
        value = self.value(*keys) or "silu"
        if value not in get_args(Activation):
            known = ", ".join(get_args(Activation))
            raise CheckpointError(
                f"config.json: {keys[0]} {value!r} is not supported: it is not {known}"
            )
        return cast(Activation, value)

    def token_ids(self, key: str, default: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
        """Return the ids at ``key``; null: none; absent: those of ``default`` < ``vocab_size``."""
        self._asked.add(key)
        if key not in self.raw:
            return tuple(token for token in default if token < vocab_size)
        value = self.raw[key]
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(f"config.json: {key} {value!r} must be a token id or a list")
        return tuple(ids)

    def architecture(self, *known: str) -> str:
        """Return the first of ``architectures``, one of ``known``; if absent, ``known[0]``."""
        names = self.value("architectures") or [known[0]]
        if not isinstance(names, list) or not names or names[0] not in known:
            raise CheckpointError(
                f"config.json: architectures {names!r} is not supported: it is not "
                + ", ".join(known)
            )
        return str(names[0])

    def labels(self) -> tuple[str, ...]:
        """Return the names of a classifier's classes (``id2label``) in index order."""
        names = self.value("id2label")
        if names is None:
            return tuple(f"LABEL_{i}" for i in range(self.integer("num_labels", default=2)))
        try:
            by_index = {int(index): str(name) for index, name in names.items()}
            return tuple(by_index[i] for i in range(len(by_index)))
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise CheckpointError(
                f"config.json: id2label {names!r} must name the classes 0, 1, .."
            ) from err

    def storage_format(self) -> StorageFormat | None:
        """Return the format of quantized weights (``quantization_config``); None: no such key."""
        return parse_storage_format(self.value("quantization_config"))

    def check_rest(self, model_type: str) -> tuple[str, ...]:
        """Return the unknown keys that the family has not read, sorted.

        Raises ``CheckpointError`` for an unread key that would change the model's results.
        """
        rest = self.raw.keys() - self._asked
        for key in sorted(rest & _NEUTRAL.keys()):
            value, allowed = self.raw[key], _NEUTRAL[key]
            if value is not None and value not in allowed:
                known = " or ".join(repr(v) for v in allowed) or "null"
                raise CheckpointError(
                    f"config.json: {key} {value!r} is not supported for {model_type}: "
                    f"must be {known}"
                )
        return tuple(sorted(rest - _NEUTRAL.keys() - _HARMLESS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """A model family's default values for keys that ``config.json`` lacks."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    """Default of ``max_position_embeddings``."""
    rms_norm_eps: float
    rope_theta: float = 10000.0
    rotates_neighbours: bool = False
    """Whether checkpoints rotate element 2i with 2i + 1; see ``RopeConfig.has_neighbours``."""
    rotary_share: float | None = None
    """Default of ``partial_rotary_factor``; None: the family has no such key."""
    tied: bool = False
    """Default of ``tie_word_embeddings``."""
    eos: tuple[int, ...] = ()
    pad: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionHeads:
    """Numbers and width of attention heads, read from keys that differ between families."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    are_tiled: bool = False
    """Whether query head h uses key head h mod ``num_kv_heads``; False: neighbours share one."""

    @classmethod
    def read(
        cls,
        settings: ConfigReader,
        *,
        default_hidden: int,
        default_heads: int,
        default_kv_heads: int | None = None,
        default_head_dim: int | None = None,
    ) -> AttentionHeads:
        """Read the numbers and the width of attention heads from the usual keys.

        ``default_kv_heads`` None: the number of query heads; ``default_head_dim`` None: the hidden
        size divided by the number of heads.
        """
        hidden = settings.integer("hidden_size", default=default_hidden)
        heads = settings.integer("num_attention_heads", default=default_heads)
        return cls(
            num_heads=heads,
            num_kv_heads=settings.integer("num_key_value_heads", default=default_kv_heads or heads),
            head_dim=settings.integer(
                "head_dim", default=default_head_dim or max(hidden // heads, 1)
            ),
        )

    def check(self) -> None:
        """Raise ``CheckpointError`` for shapes that attention or rotation do not support."""
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {self.num_heads} must be a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config.json: head_dim {self.head_dim} must be even")


def check_top_k(key: str, top_k: int, of_key: str, num_experts: int) -> None:
    """Raise ``CheckpointError`` if ``top_k`` exceeds the number of experts."""
    if top_k > num_experts:
        raise CheckpointError(f"config.json: {key} {top_k} exceeds {of_key} {num_experts}")


def sparse_layers(settings: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Return layers with experts: each ``decoder_sparse_step``-th, except ``mlp_only_layers``."""
    step = settings.integer("decoder_sparse_step", default=1)
    dense = settings.value("mlp_only_layers", default=[])
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise CheckpointError(f"config.json: mlp_only_layers {dense!r} must be a list of layers")
    found = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    if not found:
        raise CheckpointError(
            f"config.json: mlp_only_layers {dense!r} and decoder_sparse_step {step} leave no layer "
            f"with experts of num_hidden_layers {num_layers}"
        )
    return found


def _prediction_layers(settings: ConfigReader) -> int:
    """Return the number of multi-token prediction layers (MTP); 0 if absent or invalid."""
    count = settings.raw.get("num_nextn_predict_layers")
    return count if isinstance(count, int) and count > 0 else 0


def model_config(
    settings: ConfigReader,
    *,
    model_type: str,
    heads: AttentionHeads,
    defaults: Defaults,
    activation_keys: Sequence[str] = ("hidden_act",),
    is_classifier: bool = False,
    latent_rank: int | None = None,
) -> ModelConfig:
    """Read the config that all families share. Must be called last: it checks all unread keys.

    ``latent_rank``: see ``ModelConfig``; only elements of a head from this index on are rotated.

    Raises ``CheckpointError`` naming key, value and rule.
    """
    if latent_rank is None:
        heads.check()
    vocab_size = settings.integer("vocab_size", default=defaults.vocab_size)
    max_positions = settings.integer("max_position_embeddings", default=defaults.max_positions)
    pad = settings.token_ids(
        "pad_token_id", () if defaults.pad is None else (defaults.pad,), vocab_size
    )
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        settings.value(key)
    if defaults.rotary_share is not None:
        settings.value("partial_rotary_factor")
        settings.value("rotary_dim")
    stored = settings.storage_format()
    eos = settings.token_ids("eos_token_id", defaults.eos, vocab_size)
    ignored = () if stored is None else (f"quantization_config.{key}" for key in stored.ignored)
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=settings.integer("hidden_size", default=defaults.hidden_size),
        num_layers=settings.integer("num_hidden_layers", default=defaults.num_layers),
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        has_tiled_heads=heads.are_tiled,
        max_position_embeddings=max_positions,
        rms_norm_eps=settings.real("rms_norm_eps", defaults.rms_norm_eps),
        tie_word_embeddings=settings.flag("tie_word_embeddings", defaults.tied),
        eos_token_ids=tuple(i for i in eos if 0 <= i < vocab_size),  # no other id is sampled
        dtype=str(settings.value("dtype", "torch_dtype") or "float32").removeprefix("torch."),
        rope=parse_rope(
            settings.raw,
            heads.head_dim - (latent_rank or 0),
            max_positions,
            rotary_share=defaults.rotary_share,
            default_theta=defaults.rope_theta,
            has_neighbours=defaults.rotates_neighbours,
        ),
        activation=settings.activation(*activation_keys),
        stored=stored,
        pad_token_id=pad[0] if pad else None,
        labels=settings.labels() if is_classifier else (),
        problem_type=settings.value("problem_type") if is_classifier else None,
        latent_rank=latent_rank,
        num_prediction_layers=_prediction_layers(settings),
        ignored_keys=(*settings.check_rest(model_type), *ignored),
    )
