"""Storage format of quantized matrices in a checkpoint, read from its ``quantization_config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster.core.errors import CheckpointError
from workers.quantization.formats import GROUP_MULTIPLE, WeightFormat
from workers.quantization.keys import WHOLE_BITS, QuantizationKeys, check_overrides

Method = Literal["fp8", "gptq", "awq", "compressed-tensors"]
_NAME = "config.json: quantization_config"
_MAX_SIZE = 65536
"""Maximum size of a group or block, far above those of any checkpoint: scales are repeated so often
while a matrix is read."""
_GPTQ_FORMATS = ("gptq", "gptq_v2", None)
_AUTO_ROUND_PACKINGS: Mapping[str | None, tuple[Literal["gptq", "awq"], int]] = {
    None: ("gptq", 1),
    "auto_round:auto_gptq": ("gptq", 1),
    "auto_round:gptq": ("gptq", 1),
    "auto_round:gptqmodel": ("gptq", 0),
    "auto_round": ("gptq", 0),
    "auto_round:auto_awq": ("awq", 0),
    "auto_round:awq": ("awq", 0),
}
"""Layout of the tensors, and ``StorageFormat.zero_offset``, by AutoRound's ``packing_format``."""
_INTEGER_TYPES = (
    *("int", "int_sym", "int_asym", "rtn_int", "rtn_int_sym", "rtn_int_asym"),
    None,
)
"""Values of AutoRound's ``data_type`` for formats with one scale, and optionally one zero point,
per group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageFormat:
    """Storage format of a checkpoint's quantized matrices."""

    method: Method
    form: WeightFormat
    """Format of the matrices after reading: float32 scales, to which the scales of a file are
    converted."""
    block_rows: int = 1
    """Number of rows that share a scale; above 1 only for ``fp8``."""
    zero_offset: int = 0
    """Number added to stored zero points: the first version of GPTQ stores zero points minus
    one."""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """Keys of ``quantization_config`` that have no effect, sorted."""

    @property
    def block(self) -> tuple[int, int]:
        """Number of rows and of columns of a block with one scale; only for ``fp8``."""
        assert self.form.group is not None
        return self.block_rows, self.form.group


def parse_storage_format(found: object) -> StorageFormat | None:
    """Read the value of ``quantization_config``; return None if the value is None.

    Raises ``CheckpointError`` that names the key, its value and the allowed values.
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
    keys = QuantizationKeys(_NAME, found)
    keys.one_of("method", method, None)  # GPTQModel writes both
    keys.honoured("quant_method")
    return replace(_READERS[method](keys), ignored=keys.ignored())


def _fp8(keys: QuantizationKeys) -> StorageFormat:
    keys.one_of("fmt", "e4m3", "float8_e4m3fn", None)
    keys.one_of("activation_scheme", "dynamic", None)
    keys.one_of("scale_fmt", "float", "ue8m0", None)  # powers of two in float32: DeepSeek-V3.1
    keys.one_of("expert_dtype", "fp8", None)
    keys.one_of("modules_to_convert", None, [])
    keys.one_of("bits", 8, None)
    keys.one_of("act_bits", 8, WHOLE_BITS, None)
    # The headers of the files show which tensors are float8.
    keys.honoured("modules_to_not_convert", "ignored_layers", "dequantize")
    block = keys.value("weight_block_size")
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(type(n) is int and 0 < n <= _MAX_SIZE for n in sizes):
        rule = f"must be two positive sizes of at most {_MAX_SIZE}"
        raise CheckpointError(f"{_NAME}: weight_block_size {block!r} {rule}")
    form = WeightFormat(codes="e4m3", group=sizes[1])
    return StorageFormat(method="fp8", form=form, block_rows=sizes[0])


def _gptq(keys: QuantizationKeys) -> StorageFormat:
    form = _parse_shared_keys(keys, bits=(4, 8), is_symmetric=keys.value("sym") is True)
    first, second = (keys.one_of(key, *_GPTQ_FORMATS) for key in ("checkpoint_format", "format"))
    if first and second and first != second:
        raise keys.refused("format", f"{first!r}, as checkpoint_format is")
    keys.one_of("is_marlin_format", False, None)
    return StorageFormat(
        method="gptq", form=form, zero_offset=int("gptq_v2" not in (first, second))
    )


def _awq(keys: QuantizationKeys) -> StorageFormat:
    is_symmetric = keys.one_of("zero_point", True, False, None) is False
    keys.honoured("sym")  # transformers writes the default of GPTQ here
    form = _parse_shared_keys(keys, bits=(4,), is_symmetric=is_symmetric)
    for key in ("version", "format", "checkpoint_format"):
        keys.one_of(key, "gemm", None)
    if keys.value("backend") == "llm-awq":  # the other versions are kernels to load with
        raise keys.refused("backend", "a kernel for version 'gemm'")
    return StorageFormat(method="awq", form=form)


def _auto_round(keys: QuantizationKeys) -> StorageFormat:
    layout, zero_offset = _AUTO_ROUND_PACKINGS[keys.one_of("packing_format", *_AUTO_ROUND_PACKINGS)]
    bits = (4,) if layout == "awq" else (4, 8)
    form = _parse_shared_keys(keys, bits=bits, is_symmetric=keys.value("sym") is True)
    return StorageFormat(method=layout, form=form, zero_offset=zero_offset)


def _parse_shared_keys(
    keys: QuantizationKeys, bits: tuple[int, ...], is_symmetric: bool
) -> WeightFormat:
    """Return the weight format from the keys that GPTQ, AWQ and AutoRound share.

    Two keys are not needed: the headers of the files show which matrices are quantized, and the
    tensors show whether the columns of a group are neighbours (``desc_act``).
    """
    keys.honoured("modules_to_not_convert", "modules_in_block_to_quantize", "lm_head")
    keys.honoured("desc_act", "static_groups")
    keys.one_of("pack_dtype", "int32", None)
    same = {
        "bits": keys.one_of(keys.present("bits", "w_bit"), *bits),
        "group_size": keys.value(keys.present("group_size", "q_group_size")),
        "data_type": keys.one_of("data_type", *_INTEGER_TYPES),
    }
    for key in ("dynamic", "extra_config", "layer_config"):
        check_overrides(keys, key, same | ({"sym": True} if is_symmetric else {}))
    return _integer_format(same["bits"], same["group_size"], has_zeros=not is_symmetric)


def _compressed_tensors(keys: QuantizationKeys) -> StorageFormat:
    keys.one_of("format", "pack-quantized", "mixed-precision")
    keys.one_of("quantization_status", "compressed", "frozen", None)
    keys.one_of("kv_cache_scheme", None, {})
    keys.honoured("ignore")
    for key, inner in (("sparsity_config", "format"), ("transform_config", "config_groups")):
        found = keys.value(key)
        if isinstance(found, Mapping) and found.get(inner) in ("dense", None, {}):
            continue  # nothing is excluded, and nothing is transformed
        keys.one_of(key, None)
    groups = keys.value("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{_NAME}: config_groups {groups!r} must be an object")
    found = {name: _parse_group(f"{_NAME}: config_groups.{name}", g) for name, g in groups.items()}
    if len(set(found.values())) > 1:
        raise CheckpointError(f"{_NAME}: config_groups {', '.join(found)} must have equal weights")
    return StorageFormat(method="compressed-tensors", form=next(iter(found.values())))


def _parse_group(name: str, group: Any) -> WeightFormat:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{name}: weights {weights!r} must be an object")
    keys = QuantizationKeys(name, group)
    keys.one_of("input_activations", None)
    keys.one_of("output_activations", None)
    keys.one_of("format", "pack-quantized", None)
    keys.honoured("targets", "weights")
    keys.ignored()
    keys = QuantizationKeys(f"{name}.weights", weights)
    keys.one_of("type", "int")
    bits = keys.one_of("num_bits", 4, 8)
    keys.one_of("dynamic", False, None)
    keys.one_of("actorder", None, "weight", "static", False)
    keys.one_of("block_structure", None)
    is_symmetric = keys.one_of("symmetric", True, False)
    group_size = keys.value("group_size")
    if keys.one_of("strategy", "group", "channel", None) == "channel":
        group_size = -1
    keys.ignored()
    return _integer_format(bits, group_size, has_zeros=not is_symmetric)


_READERS = {
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
}


def _integer_format(bits: int, group: object, *, has_zeros: bool) -> WeightFormat:
    if type(group) is not int or (
        group != -1 and (not 0 < group <= _MAX_SIZE or group % GROUP_MULTIPLE)
    ):
        rule = f"must be -1 or a multiple of {GROUP_MULTIPLE}, at most {_MAX_SIZE}"
        raise CheckpointError(f"{_NAME}: group_size {group!r} {rule}")
    return WeightFormat(
        codes="int4" if bits == 4 else "int8",
        group=None if group == -1 else group,
        has_zeros=has_zeros,
    )
