"""Quantization by the compiled kernel (``c/rounding.c``), with the same bits as the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.native.library import Library
from workers.native.thread_team import ThreadTeam, check
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix
from workers.quantization.rounding import in_groups, of_groups, quantize, squared_error


def round_weight(
    library: Library | None, weight: Tensor, form: WeightFormat, team: ThreadTeam | None = None
) -> QuantizedMatrix:
    """Quantize a weight [out, in] on the CPU to a format that ``rounding.quantize`` supports.

    ``library``: compiled kernels; None: torch computes. ``team``: an idle team that helps the
    calling thread.
    """
    if library is None or not form.has_zeros:
        return quantize(weight, form)
    numbers = in_groups(weight, form).contiguous()
    num_groups = numbers.shape[0] * numbers.shape[1]
    codes = torch.empty(num_groups, form.row_bytes(numbers.shape[2]), dtype=torch.uint8)
    scales = torch.empty(num_groups, dtype=torch.bfloat16)
    zeros = torch.empty(num_groups, dtype=torch.int8)
    run = (library if team is None else team.library).functions.rounding_groups
    pointer = None if team is None else team.pointer
    addresses = codes.data_ptr(), scales.data_ptr(), zeros.data_ptr()
    check(run(pointer, numbers.data_ptr(), num_groups, numbers.shape[2], *addresses))
    return of_groups(form, (weight.shape[0], weight.shape[1]), codes, scales, zeros)


def round_product(
    library: Library | None,
    weight: Tensor,
    forms: Sequence[WeightFormat],
    team: ThreadTeam | None = None,
) -> QuantizedMatrix:
    """Quantize a weight [out, in] on the CPU to the one of ``forms`` with the least squared error.

    ``library`` and ``team``: see ``round_weight``.
    """
    found = [round_weight(library, weight, form, team) for form in forms]
    return found[0] if len(found) == 1 else min(found, key=lambda m: squared_error(m, weight))
