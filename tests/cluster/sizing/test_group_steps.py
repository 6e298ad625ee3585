"""Times of step groups, and the choice whether they share experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.config.workers import WorkersSection
from cluster.sizing.devices import CPU_CORE
from cluster.sizing.gpus import H100
from cluster.sizing.group_steps import GroupSizes, GroupSteps, choose_sharing
from cluster.sizing.mixed_step import RankRows
from cluster.sizing.roofline import DeviceSpec
from tests.cluster.sizing.models import OLMOE

SECTION = WorkersSection(
    num_prefill_workers=1, num_decode_workers=1, num_expert_workers=2, share_experts="auto"
)
SHARED, OWN = GroupSizes(1, 1, 2), GroupSizes(1, 1, 2, 1)
DECODE = [RankRows(16, 16, 16 * 500)]
PROMPT = [RankRows(256, 1, 256)]


def chosen(workers: WorkersSection = SECTION, **more: Any) -> WorkersSection:
    asked: dict[str, Any] = {
        "num_seqs": 16,
        "step_tokens": 256,
        "context_tokens": 500,
        "device": CPU_CORE,
    }
    return choose_sharing(workers, OLMOE, **(asked | more))


@pytest.mark.parametrize("device", [CPU_CORE, H100], ids=lambda device: device.name)
def test_only_groups_that_share_experts_wait(device: DeviceSpec) -> None:
    shared, own = (GroupSteps(OLMOE, sizes, device) for sizes in (SHARED, OWN))
    for steps in (shared, own):
        decode = steps.decode.step(DECODE, has_prefill=False)
        prefill = steps.prefill.step(PROMPT, has_prefill=True)
        waits = steps.decode_s(decode, prefill) - decode.step_s
        slower = steps.prefill_s(prefill, decode) - prefill.step_s
        assert (waits > 0, slower > 0) == (steps.is_shared, steps.is_shared)
        most = steps.num_exchanges * steps.part_s(prefill)
        assert waits <= most


def test_cpus_compute_a_prompt_in_parts() -> None:
    """On CPUs decodes wait for 64 rows of a prompt, on GPUs for all."""
    rows = [RankRows(4096, 1, 4096)]
    for device, is_part in ((CPU_CORE, True), (H100, False)):
        steps = GroupSteps(OLMOE, SHARED, device)
        prefill = steps.prefill.step(rows, has_prefill=True)
        whole_s = prefill.num_micro_batches * prefill.experts_s / 16
        assert (steps.part_s(prefill) < 0.1 * whole_s) == is_part
        if not is_part:
            assert steps.part_s(prefill) == pytest.approx(whole_s)


def test_sizes_are_those_of_the_first_workers() -> None:
    workers = replace(SECTION, num_prefill_workers=2, num_expert_workers=6, share_experts="no")
    assert GroupSizes.of(workers) == (2, 1, 6, 4)
    assert GroupSizes.of(workers).text == "2 prefill + 1 decode + 4 + 2 expert workers"
    shared = replace(workers, share_experts="yes")
    assert GroupSizes.of(shared).text == "2 prefill + 1 decode + 6 expert workers"


def test_the_larger_product_of_rates_wins() -> None:
    """With few experts a row, decodes read all experts and prompts cost little: parts are long."""
    found = chosen()
    other = "no" if found.share_experts == "yes" else "yes"
    rates = {}
    for value in ("yes", "no"):
        section = replace(SECTION, share_experts=value)
        steps = GroupSteps(OLMOE, GroupSizes.of(section), CPU_CORE)
        decode = steps.decode.step(DECODE, has_prefill=False)
        prefill = steps.prefill.step([RankRows(256, 1, 500)], has_prefill=True)
        decode_s, prefill_s = steps.decode_s(decode, prefill), steps.prefill_s(prefill, decode)
        rates[value] = 1 / decode_s / prefill_s
    assert rates[found.share_experts] > rates[other]
    assert "prompt rows/s if they share them" in found.mode_reason


def test_groups_get_experts_of_their_own_where_prompts_have_long_exchanges() -> None:
    found = chosen(step_tokens=65536, device=H100)
    assert found.share_experts == "no"
    assert found.mode_reason.startswith("step groups have expert workers of their own")


@pytest.mark.parametrize(
    ("workers", "memory", "said"),
    [
        (replace(SECTION, num_expert_workers=1), None, "the only expert worker"),
        (SECTION, 20e9, "two copies of each would have 25.8 GB, of 20 GB free"),
    ],
)
def test_groups_share_what_cannot_be_divided(
    workers: WorkersSection, memory: float | None, said: str
) -> None:
    found = chosen(workers, memory_bytes=memory)
    assert found.share_experts == "yes"
    assert said in found.mode_reason


def test_a_given_value_stays() -> None:
    for value in ("yes", "no"):
        workers = replace(SECTION, share_experts=value)
        assert chosen(workers) is workers
