"""``--mode auto``: which layout wins, what prevents the comparison, and the reason it gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.config.cluster import ClusterConfig
from cluster.config.model import ModelSection
from cluster.config.resources import NodeResources
from cluster.config.workers import WorkersSection
from cluster.sizing.devices import CPU_CORE
from cluster.sizing.gpus import H100
from cluster.sizing.mode_choice import choose_mode, resolve_mode
from cluster.sizing.roofline import DeviceSpec, HostTime, colocated_step, disaggregated_step
from tests.cluster.sizing.models import OLMOE

WORKERS = WorkersSection(mode="auto", num_attention_workers=2, num_expert_workers=6)
SLOW_MESSAGES = replace(CPU_CORE, message_s=5e-3)


def test_a_small_pool_is_colocated() -> None:
    asked = WorkersSection(mode="auto")
    choice = choose_mode(asked, OLMOE, batch=64, context_tokens=1024, device=CPU_CORE)
    assert choice.mode == "colocated"
    assert choice.pools == {"colocated": 3}
    together = colocated_step(OLMOE, 64, 1024, num_workers=3, device=CPU_CORE)
    apart = disaggregated_step(OLMOE, 64, 1024, num_attention=1, num_experts=2, device=CPU_CORE)
    assert together.step_s < apart.step_s


def test_two_pools_win_where_messages_are_dear() -> None:
    """8 colocated workers exchange 14 messages each a layer and side; 2 + 6 workers 12 and 4."""
    choice = choose_mode(WORKERS, OLMOE, batch=16, context_tokens=0, device=SLOW_MESSAGES)
    assert choice.mode == "disaggregated"
    assert choice.pools == {"attention": 2, "expert": 6}
    assert choice.mode_reason.index("2 attention") < choice.mode_reason.index("8 c")


def test_many_rows_on_one_host_are_colocated() -> None:
    """Slow messages make two pools faster, until one host commits the rows of all three workers."""
    asked = WorkersSection(mode="auto")
    slow = replace(H100, message_s=40e-6)
    unhosted = replace(slow, host=HostTime())

    def mode(device: DeviceSpec) -> str:
        return choose_mode(asked, OLMOE, batch=256, context_tokens=64, device=device).mode

    assert mode(unhosted) == "disaggregated"
    assert mode(slow) == "colocated"


def test_the_reason_has_both_predictions() -> None:
    choice = choose_mode(WORKERS, OLMOE, batch=64, context_tokens=512, device=CPU_CORE)
    reason = choice.mode_reason
    assert reason.startswith("a decode step of 64 rows with 512 tokens of context each")
    assert "8 colocated workers (attention " in reason
    together = colocated_step(OLMOE, 64, 512, num_workers=8, device=CPU_CORE)
    assert f"; host {1000 * together.host_s:.3g})" in reason
    assert "2 attention + 6 expert workers (attention " in reason
    assert reason.endswith("two pools would give elasticity and failure isolation, not speed")
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        (replace(WORKERS, placement_file="p.json"), "the placement file is for 6 expert workers"),
        (
            replace(WORKERS, num_expert_workers=63),
            "65 colocated workers would be more than the 64 experts of a bank",
        ),
    ],
)
def test_what_cannot_be_colocated_is_not_compared(workers: WorkersSection, words: str) -> None:
    choice = choose_mode(workers, OLMOE, batch=64, context_tokens=512, device=CPU_CORE)
    assert choice == replace(workers, mode="disaggregated", mode_reason=words)


def test_a_configuration_is_resolved_with_the_shares_of_its_nodes() -> None:
    config = ClusterConfig(
        model=ModelSection(path="p", served_model_name="m"), workers=WorkersSection(mode="auto")
    )
    node = NodeResources(node_id="a", address="here", cpus=6.0)
    found = resolve_mode(config, OLMOE, 2048, [node])
    assert found.workers.mode == "colocated"
    assert "64 rows with 1024 tokens" in found.workers.mode_reason
    assert ClusterConfig.from_dict(found.to_dict()) == found
    limited = replace(config, model=replace(config.model, max_model_len=100))
    assert "with 50 tokens" in resolve_mode(limited, OLMOE, 2048, [node]).workers.mode_reason
