"""Writes matrices in the layouts of GPTQ, AWQ and compressed-tensors, number by number."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix, decode_codes, pack_nibbles
from workers.quantization.rounding import quantize
from workers.quantization.storage_format import parse_storage_format

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Neighbours from the lowest bits of an int32 on."""


def unsigned(matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and zero points [groups, out], both int64 from 0 on."""
    middle = 1 << (matrix.format.code_bits - 1)
    codes = decode_codes(matrix.codes, matrix.format.codes).long() + middle
    zeros = torch.zeros_like(matrix.scales).long() if matrix.zeros is None else matrix.zeros.long()
    return codes, (zeros + middle).T


def along_rows(numbers: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[n, m] -> [n, m * bits / 32] int32."""
    each = 32 // bits
    rows = []
    for row in numbers.tolist():
        words = []
        for first in range(0, len(row), each):
            word = 0
            for place, own in enumerate(order or range(each)):
                word |= row[first + own] << (bits * place)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def rounded(weight: Tensor, form: WeightFormat) -> QuantizedMatrix:
    """``quantize`` with zero points too: the codes of a group reach from its least number, or 0, to
    its largest one, or 0.
    """
    if not form.has_zeros:
        return quantize(weight, form)
    rows, width = weight.shape
    group, middle = form.group or width, 1 << (form.code_bits - 1)
    numbers = functional.pad(weight, (0, -width % group)).view(rows, -1, group)
    low, high = numbers.amin(2).clamp(max=0), numbers.amax(2).clamp(min=0)
    scales = (high - low) / (2 * middle - 1)
    zeros = (-middle - low / scales).round().clamp(-middle, middle - 1)
    codes = (numbers / scales.unsqueeze(2)).round() + zeros.unsqueeze(2)
    whole = codes.clamp(-middle, middle - 1).to(torch.int8).view(rows, -1)[:, :width]
    stored = whole.contiguous().view(torch.uint8)
    return QuantizedMatrix(
        format=form,
        shape=(rows, width),
        codes=pack_nibbles(stored & 15) if form.code_bits == 4 else stored,
        scales=scales,
        zeros=zeros.to(torch.int8),
    )


def gptq(name: str, matrix: QuantizedMatrix, zero_offset: int) -> dict[str, Tensor]:
    """Zero points are stored less ``zero_offset``."""
    codes, zeros = unsigned(matrix)
    bits, (_, width) = matrix.format.code_bits, matrix.shape
    return {
        f"{name}.qweight": along_rows(codes, bits).T.contiguous(),
        f"{name}.qzeros": along_rows((zeros - zero_offset) % (1 << bits), bits),
        f"{name}.scales": matrix.scales.T.half().contiguous(),
        f"{name}.g_idx": torch.arange(width, dtype=torch.int32) // (matrix.format.group or width),
    }


def awq(name: str, matrix: QuantizedMatrix, _: int) -> dict[str, Tensor]:
    codes, zeros = unsigned(matrix)
    return {
        f"{name}.qweight": along_rows(codes.T, 4, AWQ_ORDER),
        f"{name}.qzeros": along_rows(zeros, 4, AWQ_ORDER),
        f"{name}.scales": matrix.scales.T.half().contiguous(),
    }


def compressed_tensors(name: str, matrix: QuantizedMatrix, _: int) -> dict[str, Tensor]:
    codes, zeros = unsigned(matrix)
    bits = matrix.format.code_bits
    found = {
        f"{name}.weight_packed": along_rows(codes, bits),
        f"{name}.weight_scale": matrix.scales.bfloat16(),
        f"{name}.weight_shape": torch.tensor(matrix.shape),
    }
    if matrix.zeros is not None:
        found[f"{name}.weight_zero_point"] = along_rows(zeros, bits).T.contiguous()
    return found


PACKERS: Mapping[str, Callable[[str, QuantizedMatrix, int], dict[str, Tensor]]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
}


def pack_checkpoint(
    path: Path, settings: dict[str, Any], plain: str = " "
) -> dict[str, QuantizedMatrix]:
    """Store the matrices of a checkpoint's layers, and its head where ``lm_head`` says so, as
    ``quantization_config`` says, but for routers and those with names that begin with ``plain``.

    Returns them by name.
    """
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    stored = parse_storage_format(settings)
    assert stored is not None
    found, tensors = {}, load_file(path / "model.safetensors")
    for name, tensor in list(tensors.items()):
        is_inside = ".layers." in name and not name.endswith("mlp.gate.weight")
        is_head = name == "lm_head.weight" and settings.get("lm_head", False)
        if tensor.dim() == 2 and (is_inside or is_head) and not name.startswith(plain):
            matrix = rounded(tensors.pop(name).float(), stored.form)
            # The layouts have scales of 16 bits.
            matrix.scales.copy_(matrix.scales.half().bfloat16())
            found[name] = matrix
            pack = PACKERS[stored.method]
            tensors |= pack(name.removesuffix(".weight"), matrix, stored.zero_offset)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return found
