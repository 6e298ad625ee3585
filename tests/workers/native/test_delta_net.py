"""Native Gated DeltaNet: near torch's two forms, and the same bits however rows are cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from tests.workers.native.builds import NAMES, team
from workers.model.attention_batch import StateRows
from workers.model.config import DeltaNetSpec
from workers.model.delta_net import DeltaNet, Mix, TorchDeltaNet
from workers.model.native.delta_net import NativeDeltaNet
from workers.model.state_runs import StateRun

SPECS = [
    DeltaNetSpec(
        layers=(0,), num_key_heads=2, num_value_heads=6, key_dim=16, value_dim=80, kernel=4
    ),
    DeltaNetSpec(
        layers=(0,), num_key_heads=3, num_value_heads=3, key_dim=7, value_dim=19, kernel=2
    ),
    DeltaNetSpec(
        layers=(0,), num_key_heads=1, num_value_heads=2, key_dim=128, value_dim=128, kernel=1
    ),
]
DTYPES = [torch.float32, torch.bfloat16]


def weights(spec: DeltaNetSpec, dtype: torch.dtype) -> DeltaNet:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads = spec.num_value_heads
    return DeltaNet(
        spec=spec,
        conv=draw(spec.kernel, spec.conv_width).to(dtype).float(),
        rate=-draw(heads).exp(),
        bias=draw(heads),
        norm=(1 + draw(spec.value_dim) / 4).to(dtype),
        eps=1e-4,
    )


def inputs(net: DeltaNet, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, net.row_width, generator=generator).to(net.norm.dtype)


def states_of(*sequences: Sequence[tuple[int, int, int]], num_decodes: int = 0) -> StateRows:
    """Runs (rows, read, write) of each sequence."""
    runs: list[StateRun] = []
    for sequence in sequences:
        for count, read, write in sequence:
            first = runs[-1].last if runs else 0
            runs.append(StateRun(first, first + count, read, write))
    places = torch.tensor([(r.first, r.last, r.read, r.write) for r in runs])
    chains = torch.tensor([0, *accumulate(map(len, sequences))])
    slots = places[:num_decodes, 2:].T.contiguous()
    return StateRows(tuple(runs), places, chains, num_decodes, slots)


def zeros(spec: DeltaNetSpec, num_slots: int = 6) -> Tensor:
    return torch.zeros(num_slots, spec.layer_values)


def whole(mix: Mix, net: DeltaNet, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and the last state of one sequence in one run."""
    cache = zeros(net.spec)
    return mix(rows, cache, states_of([(len(rows), 5, 0)])), cache[0]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_forms_are_near_each_other(spec: DeltaNetSpec, dtype: torch.dtype) -> None:
    net = weights(spec, dtype)
    rows = inputs(net, 150, 2)
    mixes: list[Mix] = [TorchDeltaNet(net, row_by_row=row_by_row) for row_by_row in (True, False)]
    mixes += [NativeDeltaNet(team(name), net) for name in NAMES]
    outputs, states = zip(*(whole(mix, net, rows) for mix in mixes), strict=True)
    limit = 2e-4 if dtype == torch.float32 else 0.05
    for output, state in zip(outputs[1:], states[1:], strict=True):
        assert output.dtype == dtype
        assert (
            (output - outputs[0]).abs() <= limit * (1 + outputs[0].abs())
        ).float().mean() > 0.999
        assert torch.allclose(state, states[0], rtol=limit, atol=limit)
    for output, state in zip(outputs[3:], states[3:], strict=True):
        assert torch.equal(output, outputs[2]), "all instruction sets have the same bits"
        assert torch.equal(state, states[2])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["torch", 1, 3])
def test_bits_depend_on_the_sequence_alone(
    spec: DeltaNetSpec, dtype: torch.dtype, kind: str | int
) -> None:
    net = weights(spec, dtype)
    mix: Mix = TorchDeltaNet(net, row_by_row=True)
    if isinstance(kind, int):
        if not NAMES:
            pytest.skip("no kernels for this processor")
        mix = NativeDeltaNet(team(NAMES[0], kind), net)
    own, other = inputs(net, 70, 3), inputs(net, 9, 4)
    expected, last = whole(mix, net, own)
    rng = random.Random(6)
    for _ in range(5):
        cache, found, slot = zeros(spec), [], 5
        cuts = [0, *sorted(rng.sample(range(1, 70), rng.randint(1, 5))), 70]
        for first, end in pairwise(cuts):
            middle = rng.randint(first, end)
            runs = [(middle - first, slot, 1), (end - middle, 1, 2)]
            if middle in (first, end):
                runs = [(end - first, slot, 2)]
            before = cache[slot].clone()
            batch = torch.cat((other, own[first:end]))
            output = mix(batch, cache, states_of([(9, 5, 4)], runs))
            assert slot == 2 or torch.equal(cache[slot], before), "a state changed that was read"
            found.append(output[9:])
            cache[3], slot = cache[2], 3
        assert torch.equal(torch.cat(found), expected)
        assert torch.equal(cache[3], last)


@pytest.mark.parametrize("spec", SPECS)
def test_a_run_may_change_its_own_slot(spec: DeltaNetSpec) -> None:
    """Rows of a sequence in two micro-batches: the second one goes on in the slot written."""
    net = weights(spec, torch.float32)
    rows = inputs(net, 5, 7)
    mixes: list[Mix] = [TorchDeltaNet(net, row_by_row=True)]
    mixes += [NativeDeltaNet(team(name), net) for name in NAMES]
    for mix in mixes:
        expected, last = whole(mix, net, rows)
        cache = zeros(spec)
        parts = [mix(rows[:3], cache, states_of([(3, 5, 0)]))]
        parts += [mix(rows[i : i + 1], cache, states_of([(1, 0, 0)])) for i in (3, 4)]
        assert torch.equal(torch.cat(parts), expected)
        assert torch.equal(cache[0], last)


def test_decodes_together_are_near_those_alone() -> None:
    net = weights(SPECS[0], torch.float32)
    mix = TorchDeltaNet(net, row_by_row=False)
    cache = torch.randn(6, SPECS[0].layer_values, generator=torch.Generator().manual_seed(8))
    rows, alone = inputs(net, 3, 9), cache.clone()
    found = mix(rows, cache, states_of([(1, 0, 3)], [(1, 1, 4)], [(1, 2, 5)], num_decodes=3))
    for i in range(3):
        expected = mix(rows[i : i + 1], alone, states_of([(1, i, 3 + i)]))
        assert torch.allclose(found[i : i + 1], expected, atol=1e-4)
    assert torch.allclose(cache, alone, atol=1e-4)


def test_the_kernel_gets_only_what_it_reads() -> None:
    if not NAMES:
        pytest.skip("no kernels for this processor")
    net = weights(SPECS[0], torch.bfloat16)
    mix = NativeDeltaNet(team(NAMES[0]), net)
    rows, states, cache = inputs(net, 3, 10), states_of([(3, 5, 0)]), zeros(SPECS[0])
    mix(rows, cache, states)
    with pytest.raises(AssertionError, match=r"float32 where torch\.bfloat16 is read"):
        mix(rows.float(), cache, states)
    with pytest.raises(AssertionError, match="columns where"):
        mix(rows[:, 1:].contiguous(), cache, states)
    with pytest.raises(AssertionError, match=r"bfloat16 where torch\.float32 is read"):
        mix(rows, cache.bfloat16(), states)
    with pytest.raises(AssertionError, match="columns where"):
        mix(rows, cache[:, 1:].contiguous(), states)
    with pytest.raises(AssertionError, match=r"int32 where torch\.int64 is read"):
        mix(rows, cache, replace(states, places=states.places.int()))
    with pytest.raises(AssertionError, match="int32 chains"):
        mix(rows, cache, replace(states, chains=states.chains.int()))
