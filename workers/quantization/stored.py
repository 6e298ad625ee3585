"""How a checkpoint's ``quantization_config`` says that matrices are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.core.errors import CheckpointError
from workers.quantization.formats import GROUP_MULTIPLE, WeightFormat

Method = Literal["fp8", "gptq", "awq", "compressed-tensors"]
_NAME = "config.json: quantization_config"
_Words = Mapping[str, tuple[Any, ...]]
"""Keys, with the values that we read."""
_FP8_WORDS: _Words = {
    "fmt": ("e4m3", "float8_e4m3fn", None),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("float", None),
    "expert_dtype": ("fp8", None),
    "modules_to_convert": (None, []),
}
_FP8_KEYS = frozenset(
    {"weight_block_size", "modules_to_not_convert", "ignored_layers", "dequantize"}
)
"""The others that may be there: which tensors are float8 is in the files' headers."""
_GPTQ_WORDS: _Words = {
    "checkpoint_format": ("gptq", "gptq_v2", None),
    "pack_dtype": ("int32", None),
    "lm_head": (False, None),
    "dynamic": (None, {}),
}
_GPTQ_OTHERS = """
    bits group_size sym desc_act static_groups damp_percent damp_auto_increment true_sequential mse
    model_name_or_path model_file_base_name model_seqlen dataset tokenizer batch_size
    block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize
    use_cuda_fp16 use_exllama exllama_config disable_exllama max_input_length cache_block_outputs
    backend meta quantizer is_marlin_format hyb_act act_group_aware
"""
_GPTQ_KEYS = frozenset(_GPTQ_OTHERS.split())
"""The rest says how codes were found. A matrix whose groups are not neighbours is refused."""
_AWQ_WORDS: _Words = {
    "bits": (4,),
    "zero_point": (True, None),
    "version": ("gemm", "GEMM", None),
    "backend": ("autoawq", "llm-awq", None),
}
_AWQ_OTHERS = """
    group_size q_group_size modules_to_not_convert do_fuse fuse_max_seq_len modules_to_fuse
    exllama_config w_bit
"""
_AWQ_KEYS = frozenset(_AWQ_OTHERS.split())
_TENSORS_WORDS: _Words = {
    "format": ("pack-quantized",),
    "quantization_status": ("compressed", None),
    "kv_cache_scheme": (None, {}),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_TENSORS_KEYS = frozenset({"config_groups", "ignore", "global_compression_ratio", "version"})
_GROUP_WORDS: _Words = {
    "input_activations": (None,),
    "output_activations": (None,),
    "format": ("pack-quantized", None),
}
_WEIGHTS_WORDS: _Words = {
    "type": ("int",),
    "num_bits": (4, 8),
    "dynamic": (False, None),
    "actorder": (None, "weight", "static", False),
    "block_structure": (None,),
    "strategy": ("group", "channel"),
    "symmetric": (True, False),
}
_WEIGHTS_KEYS = frozenset({"group_size", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"})


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAs:
    """How matrices are stored that are not in the checkpoint's own dtype."""

    method: Method
    form: WeightFormat
    """With scales in float32: those of a file are converted to it."""
    block_rows: int = 1
    """Rows that share a scale, of ``fp8``."""
    zero_offset: int = 0
    """What is added to stored zero points: the first format of GPTQ has them one less."""

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block with one scale, of ``fp8``."""
        assert self.form.group is not None
        return self.block_rows, self.form.group


def stored_as(found: object) -> StoredAs | None:
    """Read ``quantization_config``; None: there is none.

    Raises ``CheckpointError`` that names the key, its value and what it must be.
    """
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{_NAME} {found!r} must be an object")
    method = found.get("quant_method")
    if method is None:
        raise CheckpointError(f"{_NAME}: quant_method is missing")
    if not isinstance(method, str) or method not in _READERS:
        known = " or ".join(repr(name) for name in _READERS)
        raise CheckpointError(f"{_NAME}: quant_method {method!r} is not supported: must be {known}")
    settings = {key: value for key, value in found.items() if key != "quant_method"}
    return _READERS[method](settings)


def _fp8(settings: Mapping[str, Any]) -> StoredAs:
    _check(_NAME, settings, _FP8_WORDS, _FP8_KEYS)
    block = settings.get("weight_block_size")
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(f"{_NAME}: weight_block_size {block!r} must be two positive sizes")
    form = WeightFormat(codes="e4m3", group=sizes[1])
    return StoredAs(method="fp8", form=form, block_rows=sizes[0])


def _gptq(settings: Mapping[str, Any]) -> StoredAs:
    _check(_NAME, settings, _GPTQ_WORDS, _GPTQ_KEYS)
    bits = settings.get("bits")
    if bits not in (4, 8):
        raise CheckpointError(f"{_NAME}: bits {bits!r} is not supported: must be 4 or 8")
    form = _integers(bits, settings.get("group_size"), has_zeros=settings.get("sym") is not True)
    is_first = settings.get("checkpoint_format") != "gptq_v2"
    return StoredAs(method="gptq", form=form, zero_offset=int(is_first))


def _awq(settings: Mapping[str, Any]) -> StoredAs:
    settings = {"bits": settings.get("w_bit"), **settings}
    _check(_NAME, settings, _AWQ_WORDS, _AWQ_KEYS)
    group = settings.get("group_size", settings.get("q_group_size"))
    return StoredAs(method="awq", form=_integers(4, group, has_zeros=True))


def _compressed_tensors(settings: Mapping[str, Any]) -> StoredAs:
    _check(_NAME, settings, _TENSORS_WORDS, _TENSORS_KEYS)
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{_NAME}: config_groups {groups!r} must be an object")
    found = {name: _of_group(f"{_NAME}: config_groups.{name}", g) for name, g in groups.items()}
    if len(set(found.values())) > 1:
        raise CheckpointError(f"{_NAME}: config_groups {', '.join(found)} must have equal weights")
    return StoredAs(method="compressed-tensors", form=next(iter(found.values())))


def _of_group(name: str, group: Any) -> WeightFormat:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{name}: weights {weights!r} must be an object")
    _check(name, group, _GROUP_WORDS, frozenset({"targets", "weights"}))
    _check(f"{name}.weights", weights, _WEIGHTS_WORDS, _WEIGHTS_KEYS)
    columns = weights.get("group_size") if weights.get("strategy") == "group" else -1
    return _integers(weights["num_bits"], columns, has_zeros=not weights.get("symmetric", True))


_READERS = {"fp8": _fp8, "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}


def _integers(bits: int, group: object, *, has_zeros: bool) -> WeightFormat:
    if type(group) is not int or (group != -1 and (group < 1 or group % GROUP_MULTIPLE)):
        rule = f"must be -1 or a multiple of {GROUP_MULTIPLE}"
        raise CheckpointError(f"{_NAME}: group_size {group!r} {rule}")
    return WeightFormat(
        codes="int4" if bits == 4 else "int8",
        group=None if group == -1 else group,
        has_zeros=has_zeros,
    )


def _check(name: str, settings: Mapping[str, Any], words: _Words, others: frozenset[str]) -> None:
    """Raise ``CheckpointError`` for a key or value that is not known; words may be left out where
    None is among them."""
    for key, value in settings.items():
        if key in words and value not in words[key]:
            known = " or ".join(repr(v) for v in words[key])
            raise CheckpointError(f"{name}: {key} {value!r} is not supported: must be {known}")
        if key not in words and key not in others:
            raise CheckpointError(f"{name}: {key} {value!r} is not supported")
    for key, known_values in words.items():
        if key not in settings and None not in known_values:
            raise CheckpointError(f"{name}: {key} is missing")
