"""What codes stand for."""

from __future__ import annotations

import pytest
import torch

from tests.workers.quantization.random import FORMATS, name_of, random_matrix
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix, empty_weight, parts_of, plain


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
@pytest.mark.parametrize("shape", [(3, 128), (2, 200), (1, 8)])
def test_bytes_are_those_of_codes_scales_and_zero_points(
    form: WeightFormat, shape: tuple[int, int]
) -> None:
    matrix = random_matrix(form, shape)
    assert matrix.nbytes == form.num_bytes(shape) == sum(part.nbytes for part in parts_of(matrix))
    assert matrix.dequantized().shape == shape
    assert matrix.dequantized().isfinite().all()


@pytest.mark.parametrize(
    ("form", "width", "num_bytes"),
    [
        (WeightFormat(codes="int4", group=32, scales="bfloat16"), 200, 100 + 7 * 2),
        (WeightFormat(codes="int4", group=128, has_zeros=True), 200, 100 + 2 * (4 + 1)),
        (WeightFormat(codes="int8", group=None), 10, 10 + 4),
        (WeightFormat(codes="e4m3", group=128), 129, 129 + 2 * 4),
        (WeightFormat(codes="e2m1", group=32, scales="e8m0"), 64, 32 + 2),
    ],
)
def test_bytes_of_a_row(form: WeightFormat, width: int, num_bytes: int) -> None:
    assert form.num_bytes((3, width)) == 3 * num_bytes


def test_a_weight_is_scale_times_code_less_zero_point() -> None:
    matrix = QuantizedMatrix(
        format=WeightFormat(codes="int4", group=8, has_zeros=True),
        shape=(1, 10),
        codes=torch.tensor([[0x10, 0x32, 0x87, 0xF9, 0x21]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, 2.0]]),
        zeros=torch.tensor([[1, -2]], dtype=torch.int8),
    )
    first = [(code - 1) * 0.5 for code in (0, 1, 2, 3, 7, -8, -7, -1)]
    assert matrix.dequantized().tolist() == [[*first, 6.0, 8.0]]


def test_floats_of_8_and_4_bits() -> None:
    eight = QuantizedMatrix(
        format=WeightFormat(codes="e4m3", group=None),
        shape=(1, 4),
        codes=torch.tensor([[0x38, 0x01, 0xFE, 0x80]], dtype=torch.uint8),
        scales=torch.tensor([[2.0]]),
    )
    assert eight.dequantized().tolist() == [[2.0, 2.0**-8, -896.0, -0.0]]
    four = QuantizedMatrix(
        format=WeightFormat(codes="e2m1", group=32, scales="e8m0"),
        shape=(1, 4),
        codes=torch.tensor([[0x71, 0xF9]], dtype=torch.uint8),
        scales=torch.tensor([[128]], dtype=torch.uint8),
    )
    assert four.dequantized().tolist() == [[1.0, 12.0, -1.0, -12.0]]


def test_powers_of_two_reach_from_the_least_one_to_what_is_no_number() -> None:
    matrix = QuantizedMatrix.empty(WeightFormat(codes="e2m1", group=8, scales="e8m0"), (1, 32))
    matrix.scales.copy_(torch.tensor([[0, 1, 254, 255]], dtype=torch.uint8))
    found = matrix.float_scales()[0].tolist()
    assert found[:3] == [2.0**-127, 2.0**-126, 2.0**127]
    assert found[3] != found[3]


def test_what_is_not_quantized() -> None:
    weight = empty_weight(None, (2, 3), torch.bfloat16)
    assert plain(weight) is parts_of(weight)[0]
    assert plain(weight).dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="int8 in rows"):
        plain(empty_weight(WeightFormat(codes="int8", group=None), (2, 4), torch.bfloat16))
