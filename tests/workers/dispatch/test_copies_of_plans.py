"""What a plan promises is what the copy tables do: shares in prefill, one copy in decode."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.core.load_profile import BankLoad, LoadProfile, device_loads
from cluster.load.view import balancedness_of
from cluster.planner import mesh
from cluster.planner.base import PlannedTopology
from workers.dispatch.copies import CopyTables, mix64

DEVICES, EXPERTS, TOP_K, ROWS = 4, 16, 4, 40_000


@pytest.fixture(scope="module")
def profile() -> LoadProfile:
    counts = np.exp(np.random.default_rng(0).normal(size=EXPERTS))
    bank = BankLoad(bank="mlp", layer=0, counts=tuple(counts.tolist()))
    return LoadProfile(model="test", top_k=TOP_K, tokens=1000, banks=(bank,))


@pytest.fixture(scope="module")
def topk_ids(profile: LoadProfile) -> torch.Tensor:
    """Rows that choose experts about as often as the profile says."""
    generator = np.random.default_rng(1)
    noise = generator.gumbel(size=(ROWS, EXPERTS))
    scores = np.log(np.array(profile.banks[0].counts)) + noise
    return torch.from_numpy(np.argsort(-scores, axis=1)[:, :TOP_K].copy())


def chosen_slots(profile: LoadProfile, topk_ids: torch.Tensor, is_prefill: bool) -> torch.Tensor:
    """Expert slot of each (device, row, choice) under a plan for the loads, -1 for none."""
    bank = mesh.plan(_seen(profile, topk_ids), _TOPOLOGY).placement.banks[0]
    tables = CopyTables.build(bank, {d: d for d in range(DEVICES)}, torch.device("cpu"))
    keys = mix64(torch.arange(ROWS))
    return tables.choose(topk_ids, torch.full((ROWS,), is_prefill), keys)[0]


_TOPOLOGY = PlannedTopology.uniform(DEVICES, num_redundant=2)


def _seen(profile: LoadProfile, topk_ids: torch.Tensor) -> LoadProfile:
    counts = torch.bincount(topk_ids.flatten(), minlength=EXPERTS).tolist()
    bank = BankLoad(bank="mlp", layer=0, counts=tuple(counts))
    return LoadProfile(model="test", top_k=TOP_K, tokens=ROWS, banks=(bank,))


def test_prefill_rows_take_the_planned_share_of_each_copy(
    profile: LoadProfile, topk_ids: torch.Tensor
) -> None:
    slots = chosen_slots(profile, topk_ids, is_prefill=True)
    seen = _seen(profile, topk_ids)
    bank = mesh.plan(seen, _TOPOLOGY).placement.banks[0]
    assert ((slots >= 0).sum(0) == 1).all()
    for device, split in enumerate(bank.split):
        for slot, expert in enumerate(bank.physical_to_logical[device]):
            total = int(seen.banks[0].counts[expert])
            achieved = int((slots[device] == slot).sum()) / total
            error = 4 * (split[slot] * (1 - split[slot]) / total) ** 0.5
            assert achieved == pytest.approx(split[slot], abs=error + 1e-6)


def test_prefill_rows_balance_the_devices_as_predicted(
    profile: LoadProfile, topk_ids: torch.Tensor
) -> None:
    slots = chosen_slots(profile, topk_ids, is_prefill=True)
    per_device = (slots >= 0).sum((1, 2)).double()
    achieved = float(per_device.mean() / per_device.max())
    seen = _seen(profile, topk_ids)
    plan = mesh.plan(seen, _TOPOLOGY)
    predicted = balancedness_of([device_loads(plan.placement.banks[0], seen.banks[0].counts)])
    assert predicted is not None
    assert predicted > 0.99
    assert achieved == pytest.approx(predicted, abs=0.015)


def test_decode_rows_activate_one_copy_of_an_expert(
    profile: LoadProfile, topk_ids: torch.Tensor
) -> None:
    slots = chosen_slots(profile, topk_ids, is_prefill=False)
    seen = _seen(profile, topk_ids)
    bank = mesh.plan(seen, _TOPOLOGY).placement.banks[0]
    assert ((slots >= 0).sum(0) == 1).all()
    for expert in range(EXPERTS):
        device, _, _ = torch.where((topk_ids == expert) & (slots >= 0))
        assert set(device.tolist()) == {bank.decode_device[expert]}
