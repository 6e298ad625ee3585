"""Quantization formats that the sections about quantized experts compare."""

from __future__ import annotations

from collections.abc import Mapping

from workers.model.loading import mxfp4
from workers.quantization.formats import WeightFormat
from workers.quantization.rounding import FORMATS

FLOAT8 = WeightFormat(codes="e4m3", group=128)
"""Format of DeepSeek-V3's and Qwen3's checkpoints, with a scale for each block of 128 x 128."""
GPTQ = WeightFormat(codes="int4", group=128, has_zeros=True)
"""Format of AWQ and of asymmetric compressed-tensors checkpoints too."""
MAIN: Mapping[str, WeightFormat] = {
    "int8": FORMATS["int8"],
    "int4": FORMATS["int4"],
    "float8": FLOAT8,
    "mxfp4": mxfp4.FORMAT,
}
"""Name -> format of ``--quantize`` and of most checkpoints."""
EIGHT_BITS: Mapping[str, WeightFormat] = {
    "int8": FORMATS["int8"],
    "int8 rows": WeightFormat(codes="int8", group=None),
    "int8 zeros": WeightFormat(codes="int8", group=64, scales="float16", has_zeros=True),
    "float8": FLOAT8,
    "float8 wide": WeightFormat(codes="e4m3", group=320),
}
FOUR_BITS: Mapping[str, WeightFormat] = {
    "int4": FORMATS["int4"],
    "int4 zeros": GPTQ,
    "int4 rows zeros": WeightFormat(codes="int4", group=None, has_zeros=True),
    "mxfp4": mxfp4.FORMAT,
}
