"""In which form workers keep the routed experts of a checkpoint.

By default as they are stored, where they are in codes that the kernels compute with; else in the
model dtype, or quantized while they are loaded (``--quantize``).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from cluster.config.cluster import Quantize
from cluster.core.errors import ConfigError
from workers.model.config import BankSpec, TensorPart
from workers.model.families.base import Family
from workers.model.loading import mxfp4, scaled_blocks
from workers.model.loading.packed_integers import codes_name
from workers.quantization.formats import GROUP_MULTIPLE, WeightFormat
from workers.quantization.rounding import FORMATS
from workers.quantization.stored import StoredAs


def with_form(banks: Sequence[BankSpec], form: WeightFormat | None) -> tuple[BankSpec, ...]:
    """The same banks, whose experts workers keep in a format; None: in the model dtype."""
    return tuple(
        replace(bank, exchanges=tuple(replace(e, form=form) for e in bank.exchanges))
        for bank in banks
    )


def expert_products(family: Family, names: Container[str]) -> Iterator[TensorPart]:
    """What all experts' products are made of, biases aside; see ``Family.expert_matrices``."""
    for bank in family.banks:
        for exchange in bank.exchanges:
            count = len(exchange.product_shapes)
            for expert in range(bank.num_experts):
                found = family.expert_matrices(bank, exchange.index, expert, names)
                for matrix in found[:count]:
                    yield from matrix.parts


def kept_form(setting: Quantize, family: Family, dtypes: Mapping[str, str]) -> WeightFormat | None:
    """In which workers keep a family's experts; None: in the model dtype.

    ``dtypes`` as for ``stored_form``. Raises ``ConfigError`` where the model cannot be quantized.
    """
    if setting == "auto":
        return stored_form(expert_products(family, dtypes), family.config.stored, dtypes)
    return rounded_form(setting, family.banks)


def rounded_form(setting: Quantize, banks: Sequence[BankSpec]) -> WeightFormat | None:
    """Of experts that are quantized while they are loaded; None: they are not.

    Raises ``ConfigError`` where the model's widths do not allow it.
    """
    if setting not in ("int8", "int4"):
        return None
    for bank in banks:
        for exchange in bank.exchanges:
            for _, width in exchange.product_shapes:
                if width % 2:
                    rule = f"experts must have even widths, {bank.bank} has {width}"
                    raise ConfigError("quantize", setting, rule)
    return FORMATS[setting]


def stored_form(
    parts: Iterable[TensorPart], stored: StoredAs | None, dtypes: Mapping[str, str]
) -> WeightFormat | None:
    """Of matrices with these parts; None: they are not all stored in a format of kernels.

    ``dtypes`` of all tensors by name, in safetensors spelling; empty: nothing is on disk, and the
    config is believed.
    """
    found = list(parts)
    if found and all(part.is_mxfp4 for part in found):
        return mxfp4.FORMAT
    if stored is None or (stored.form.group or GROUP_MULTIPLE) % GROUP_MULTIPLE:
        return None
    if any(part.is_transposed or part.part_shape[1] % 2 for part in found):
        return None
    if stored.method == "fp8":
        is_stored = all(dtypes.get(p.name) == scaled_blocks.DTYPE for p in found)
    else:
        is_stored = all(codes_name(part.name, stored) in dtypes for part in found)
    return stored.form if is_stored or not dtypes else None
