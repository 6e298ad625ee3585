"""Rounds matrices to 8-bit and 4-bit floats, as makers of checkpoints do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.loading import mxfp4
from workers.quantization.matrix import pack_nibbles

_E4M3_MAX = 448.0
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def float8_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """weight [rows, columns] -> the same in float8 E4M3, and float32 scales to multiply by, one for
    each block; the largest number of a block becomes the largest float8.

    Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 3.3.
    """
    (rows, columns), (high, wide) = weight.shape, block
    whole = functional.pad(weight.float(), (0, -columns % wide, 0, -rows % high))
    blocks = whole.view(-1, high, whole.shape[1] // wide, wide)
    scales = blocks.abs().amax((1, 3)).div_(_E4M3_MAX).clamp_(min=1e-12)
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scales


def mxfp4_numbers(weight: Tensor) -> Tensor:
    """weight [rows, columns] -> the same rounded to MXFP4, in bfloat16. Columns: n * 32.

    The scale of 32 neighbours is a power of two, by which the largest of them comes to 4 up to 8;
    what is above 6 becomes 6. Source: Open Compute Project, "OCP Microscaling Formats (MX)
    Specification" 1.0 (2023), section 6.3.
    """
    blocks = weight.float().view(len(weight), -1, mxfp4.BLOCK)
    exponents = blocks.abs().amax(2).clamp_(min=1e-30).log2_().floor_() - 2
    small = blocks * torch.exp2(-exponents).unsqueeze(2)
    nearest = (small.abs().unsqueeze(3) - _E2M1).abs().argmin(3)
    codes = pack_nibbles((nearest + 8 * (small < 0)).to(torch.uint8))
    return mxfp4.decoded(codes, (exponents + 127).to(torch.uint8))
