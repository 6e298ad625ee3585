"""Options of the checkpoint and of its quantization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cluster.config.option_metadata import INTERNAL
from cluster.core.checks import check, check_choice, check_each, is_at_least_1

DType = Literal["auto", "float32", "bfloat16"]
Quantize = Literal["auto", "none", "int8", "int4"]
QuantizeLayers = Literal["experts", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """The checkpoint that is served, and the types of its weights."""

    path: str = field(metadata=INTERNAL)
    """Local folder of the checkpoint; for a hub id, the folder of the download."""
    served_model_name: str
    """Model name in requests; by default the name of the checkpoint's folder or hub id."""
    dtype: DType = "auto"
    """Data type of computation; ``auto`` takes the checkpoint's dtype."""
    quantize: Quantize = "auto"
    """Format of routed experts in memory: ``auto`` as in the checkpoint, ``none`` in ``dtype``,
    ``int8`` and ``int4`` quantized during loading."""
    quantize_layers: QuantizeLayers = "experts"
    """Weights that ``quantize`` with ``int8`` or ``int4`` covers: routed experts, or all
    matrices."""
    max_model_len: int | None = None
    """Maximum tokens of prompt and output of a sequence; by default the checkpoint's limit."""
    chat_template: str | None = None
    """Chat template that replaces the checkpoint's: a file, or the Jinja text itself."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DType)
        check_choice("quantize", self.quantize, Quantize)
        check_choice("quantize_layers", self.quantize_layers, QuantizeLayers)
        check(
            self.quantize_layers == "experts" or self.quantize in ("int8", "int4"),
            "quantize_layers",
            self.quantize_layers,
            f"must be 'experts' while quantize is {self.quantize!r}",
        )
        check(bool(self.served_model_name), "served_model_name", "", "must not be empty")
        check_each(self, "max_model_len", is_at_least_1, "must be at least 1")
