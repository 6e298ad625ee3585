"""Loops over experts: the same as a call each, with and without TorchScript."""

from __future__ import annotations

import torch

from workers.experts.scripted_products import expert_products
from workers.model.layers import can_pack
from workers.model.torch_private import pack, packed_linear


def test_each_expert_takes_its_own_rows() -> None:
    rows = torch.randn(9, 48)
    weights = [torch.randn(32, 48) for _ in range(3)]
    sizes = [2, 6, 1]
    pieces = zip(torch.split(rows, sizes), weights, strict=True)
    expected = torch.cat([piece @ weight.T for piece, weight in pieces])
    torch.testing.assert_close(expert_products(rows, sizes, weights, [], False), expected)
    biases = [torch.randn(len(weight), 1) for weight in weights]
    expected += torch.cat([b.T.expand(n, -1) for b, n in zip(biases, sizes, strict=True)])
    torch.testing.assert_close(expert_products(rows, sizes, weights, biases, False), expected)


def test_packed_weights_give_what_a_call_each_gives() -> None:
    weights = [torch.randn(512, 256) for _ in range(3)]
    assert can_pack(weights[0])
    packed = [pack(weight) for weight in weights]
    rows, sizes = torch.randn(9, 256), [2, 6, 1]
    pieces = zip(torch.split(rows, sizes), packed, strict=True)
    expected = torch.cat([packed_linear(piece, weight) for piece, weight in pieces])
    assert torch.equal(expert_products(rows, sizes, packed, [], True), expected)
