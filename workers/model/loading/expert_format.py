"""Formats in which workers keep the routed experts of a checkpoint.

By default, workers keep experts in the format on disk if the kernels compute with this format, and
in the model dtype if they do not. ``--quantize`` may select another format. All experts of an
exchange have the same format.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.config.model import Quantize
from cluster.core.errors import ConfigError
from workers.model.config import BankSpec, TensorPart
from workers.model.families.base import Family
from workers.model.loading import mxfp4, scaled_blocks
from workers.model.loading.packed_integers import codes_name
from workers.quantization.formats import GROUP_MULTIPLE, WeightFormat
from workers.quantization.rounding import FORMATS
from workers.quantization.storage_format import StorageFormat

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredExperts:
    """Storage of the experts of one exchange in the checkpoint: quantized format, or why not."""

    form: WeightFormat | None = None
    """Quantized format that all experts share and that kernels compute with; None: there is
    none."""
    obstacle: str = ""
    """Reason why workers must dequantize experts that are quantized on disk; empty: no such
    reason, or no expert is quantized."""


def kept_banks(
    setting: Quantize, family: Family, dtypes: Mapping[str, str]
) -> tuple[BankSpec, ...]:
    """Return the family's banks with the format in which workers keep the experts of each exchange.

    ``dtypes``: dtypes of all tensors by tensor name, in safetensors spelling; empty: no weights are
    on disk, so experts are assumed to be stored as ``config.json`` says. Raises ``ConfigError`` if
    the experts cannot be kept in the format that ``setting`` requests.
    """
    if setting == "none":
        return family.banks
    stored = [
        [
            stored_experts(_products(family, bank, e.index, dtypes), family.config.stored, dtypes)
            for e in bank.exchanges
        ]
        for bank in family.banks
    ]
    if setting == "auto":
        _report([own.obstacle for found in stored for own in found])
        pairs = zip(family.banks, stored, strict=True)
        return tuple(_with_forms(bank, [own.form for own in found]) for bank, found in pairs)
    if forms := {str(own.form) for found in stored for own in found if own.form is not None}:
        known = f"the checkpoint stores experts as {' and '.join(sorted(forms))}"
        rule = f"must be auto or none: {known}, which auto keeps and none decodes"
        raise ConfigError("quantize", setting, rule)
    return with_form(family.banks, rounded_form(setting, family.banks))


def with_form(banks: Sequence[BankSpec], form: WeightFormat | None) -> tuple[BankSpec, ...]:
    """Return the banks with all experts in the format ``form``; None: in the compute dtype."""
    return tuple(_with_forms(bank, [form] * len(bank.exchanges)) for bank in banks)


def rounded_form(setting: Quantize, banks: Sequence[BankSpec]) -> WeightFormat | None:
    """Return the format to which ``--quantize`` rounds experts; None: ``setting`` is not a format.

    Raises ``ConfigError`` if the widths of the experts do not allow the format.
    """
    if setting not in ("int8", "int4"):
        return None
    for bank in banks:
        for exchange in bank.exchanges:
            for _, width in exchange.product_shapes:
                if width % 2:
                    rule = f"needs experts of even widths, one of layer {bank.layer} is {width}"
                    raise ConfigError("quantize", setting, rule)
    return FORMATS[setting]


def stored_experts(
    parts: Sequence[TensorPart], stored: StorageFormat | None, dtypes: Mapping[str, str]
) -> StoredExperts:
    """Return how expert matrices are stored: in one format that kernels compute with, or not.

    ``parts``: matrices of all experts in one exchange. ``stored``: see ``ModelConfig.stored``.
    ``dtypes``: see ``kept_banks``.
    """
    if parts and all(part.is_mxfp4 for part in parts):
        return StoredExperts(form=mxfp4.FORMAT)
    if stored is None:
        return StoredExperts()
    plain = [part.name for part in parts if not _is_in_codes(part, stored, dtypes)]
    if len(plain) == len(parts):
        return StoredExperts()
    if plain:
        return StoredExperts(obstacle=f"{plain[0]} is not quantized, unlike others")
    if (stored.form.group or GROUP_MULTIPLE) % GROUP_MULTIPLE:
        words = f"groups of {stored.form.group} are not a multiple of {GROUP_MULTIPLE}"
        return StoredExperts(obstacle=words)
    for part in parts:
        if part.is_transposed or part.part_shape[1] % 2:
            return StoredExperts(obstacle=f"{part.name} has no rows of an even length")
    return StoredExperts(form=stored.form)


def _products(
    family: Family, bank: BankSpec, exchange: int, names: Container[str]
) -> list[TensorPart]:
    """Return the tensors of the matrices of all experts in one exchange of a bank, without biases.
    ``names``: see ``Family.expert_matrices``."""
    count = len(bank.exchanges[exchange].product_shapes)
    return [
        part
        for expert in range(bank.num_experts)
        for matrix in family.expert_matrices(bank, exchange, expert, names)[:count]
        for part in matrix.parts
    ]


def _report(obstacles: Sequence[str]) -> None:
    """Log why quantized experts are dequantized. ``obstacles``: ``StoredExperts.obstacle`` of each
    exchange."""
    found = [words for words in obstacles if words]
    if found:
        logger.warning(
            "quantized experts are dequantized in %d of %d exchanges: %s",
            len(found),
            len(obstacles),
            found[0],
        )


def _is_in_codes(part: TensorPart, stored: StorageFormat, dtypes: Mapping[str, str]) -> bool:
    if not dtypes:
        return True
    if stored.method == "fp8":
        return dtypes.get(part.name) == scaled_blocks.DTYPE
    return part.name not in dtypes and codes_name(part.name, stored) in dtypes


def _with_forms(bank: BankSpec, forms: Sequence[WeightFormat | None]) -> BankSpec:
    pairs = zip(bank.exchanges, forms, strict=True)
    return replace(bank, exchanges=tuple(replace(e, form=form) for e, form in pairs))
